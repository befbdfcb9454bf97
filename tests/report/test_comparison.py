"""Differences of two detectors and their intervals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import BOX, found, random_set, truth_of
from torch import Tensor

from fpn_det.engine.coco_eval import METRIC_NAMES, GroundTruth, ScoredBoxes, score
from fpn_det.report.analysis import analyse
from fpn_det.report.comparison import _RANGES, Difference, _mean_of_classes, _Outcomes, compare, format_comparison
from fpn_det.report.examples import Names, compare_image
from fpn_det.report.pictures import WRONG, DrawnBox


def resampled(truth: GroundTruth, results: ScoredBoxes, times: np.ndarray) -> tuple[GroundTruth, ScoredBoxes]:
    """The data set with each image as often as `times` says, under ids of their own."""
    copies = np.repeat(np.arange(len(times)), times)
    boxes = [np.flatnonzero(truth.images == i) for i in copies]
    rows = [np.flatnonzero(results.image_ids == truth.image_ids[i]) for i in copies]
    columns = {name: getattr(truth, name)[np.concatenate(boxes)] for name in ("boxes", "areas", "crowd", "classes")}
    places = np.repeat(np.arange(len(copies)), [len(b) for b in boxes])
    more = replace(truth, image_ids=np.arange(len(copies)), images=places, **columns)
    return more, replace(
        results[np.concatenate(rows)], image_ids=np.repeat(np.arange(len(copies)), [len(r) for r in rows])
    )


def distinct(results: ScoredBoxes, seed: int = 0) -> ScoredBoxes:
    """The same with scores that have no ties, whose order COCO takes from the images' ids."""
    return replace(results, scores=np.random.default_rng(seed).permutation(np.linspace(0.05, 0.95, len(results))))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [100, 4])
def test_numbers_of_weighted_images_are_those_of_copies(seed: int, limit: int) -> None:
    truth, results = random_set(seed)
    truth = replace(truth, boxes=truth.boxes * 2, areas=truth.areas * 4)  # some are small, some large
    results = distinct(replace(results, boxes=results.boxes * 2))
    weights = np.random.default_rng(seed).multinomial(12, np.full(12, 1 / 12), size=3).astype(np.int32)
    weights = np.concatenate([np.ones_like(weights[:1]), weights])
    expected = [score(*resampled(truth, results, times), max_detections=limit) for times in weights]
    for suffix, area_range in _RANGES.items():
        outcomes = _Outcomes.of(truth, results, area_range=area_range, max_detections=limit)
        by_class = [outcomes.resampled(k, weights) for k in range(len(truth.names))]
        for name in by_class[0]:
            full_name = "AR100" if name + suffix == "AR" else name + suffix
            values = _mean_of_classes(np.stack([of_class[name] for of_class in by_class], axis=1))
            if full_name in METRIC_NAMES:
                assert values == pytest.approx([m[full_name] for m in expected], abs=1e-9), full_name  # type: ignore[literal-required]
            if full_name == "AP":
                for k, class_name in enumerate(truth.names):
                    plain = np.array([m["per_class"][class_name]["AP"] for m in expected])
                    assert by_class[k]["AP"] == pytest.approx(
                        np.where(plain > -1, plain, np.nan), abs=1e-9, nan_ok=True
                    )


def test_intervals_are_those_of_resampled_sets() -> None:
    truth, first = random_set(3, num_images=20)
    first = distinct(first)
    second = replace(first, boxes=first.boxes + np.random.default_rng(0).normal(0, 1.5, first.boxes.shape))
    found_here = compare(truth, first, second, num_resamples=40, seed=7)
    plain: dict[str, list[float]] = {name: [] for name in (*METRIC_NAMES, *truth.names[:3])}
    for times in np.random.default_rng(7).multinomial(20, np.full(20, 1 / 20), size=40):
        a, b = (score(*resampled(truth, results, times)) for results in (first, second))
        for name in METRIC_NAMES:
            plain[name].append(b[name] - a[name])  # type: ignore[literal-required]
        for name in truth.names[:3]:
            plain[name].append(b["per_class"][name]["AP"] - a["per_class"][name]["AP"])
    differences = {d.name: d for d in [*found_here.metrics, *found_here.classes]}
    for name, values in plain.items():
        d = differences[name]
        if d.delta is None:
            assert (name, d.low) == ("APl", None) or (name, d.low) == ("ARl", None)  # nothing is large
            continue
        assert (d.low, d.high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=1e-9), name
        assert d.high - d.low > 0.005  # type: ignore[operator]


def test_numbers_are_those_of_score() -> None:
    truth, first = random_set(0)
    _, second = random_set(1)
    for limit in (100, 5):
        comparison = compare(truth, first, second, num_resamples=0, max_detections=limit)
        for results, side in ((first, "a"), (second, "b")):
            metrics = score(truth, results, max_detections=limit)
            assert {d.name: getattr(d, side) for d in comparison.metrics} == {
                d.name: metrics[d.name]  # type: ignore[literal-required]
                for d in comparison.metrics
            }
            assert [getattr(d, side) for d in comparison.classes] == [
                metrics["per_class"][name]["AP"] for name in truth.names
            ]
        assert all(d.low is None and not d.is_clear for d in [*comparison.metrics, *comparison.classes])


def test_equal_detectors_do_not_differ() -> None:
    truth, results = random_set(0)
    comparison = compare(truth, results, results, num_resamples=20)
    assert {(d.delta, d.low, d.high) for d in comparison.metrics if d.a > -1} == {(0.0, 0.0, 0.0)}
    assert not any(d.is_clear for d in [*comparison.metrics, *comparison.classes])
    assert comparison.images == []


def test_clear_differences_are_marked() -> None:
    truth, results = random_set(0)
    worse = replace(results, boxes=results.boxes + [30.0, 30.0, 0.0, 0.0])
    comparison = compare(truth, results, worse, num_resamples=50)
    differences = {d.name: d for d in comparison.metrics}
    assert differences["AP"].is_clear
    assert differences["APl"].delta is None  # nothing is large
    lines = format_comparison(comparison, ("one", "other"), max_classes=2).splitlines()
    assert next(line for line in lines if line.startswith("AP ")).endswith("*")
    assert next(line for line in lines if line.startswith("APl ")).split() == ["APl", "-", "-", "-"]
    assert comparison.images
    assert Difference("x", 0.5, 0.6, -0.1, 0.2).is_clear is False
    assert Difference("x", 0.5, 0.6, 0.05, 0.2).is_clear is True


def test_classes_and_sets_without_anything() -> None:
    empty = found([])
    for truth in (truth_of([(0, 0, BOX)]), truth_of([])):
        comparison = compare(truth, empty, found([(0, 0, BOX, 0.9)]), num_resamples=10)
        assert [d.low for d in comparison.classes][1:] == [None, None]
        format_comparison(comparison, ("a", "b"))


def test_missed_boxes_are_drawn_where_they_are_missing(monkeypatch) -> None:
    truth, results = truth_of([(0, 0, BOX), (0, 1, (60.0, 0.0, 30.0, 30.0))]), found([(0, 0, BOX, 0.9)])
    shown: dict[str, list[str]] = {}

    def noted(image: Tensor, panels: dict[str, list[DrawnBox]]) -> bytes:
        shown.update({title: [box.text for box in boxes if box.color == WRONG] for title, boxes in panels.items()})
        return b""

    monkeypatch.setattr("fpn_det.report.examples.compared", noted)
    detectors = {"A": (analyse(truth, results, score(truth, results)), results)}
    compare_image(torch.zeros(3, 40, 100, dtype=torch.uint8), 10, truth, Names(truth, {}), detectors)
    assert shown == {"ground truth: 2": [], "A: 1, missed 1, false 0": ["missed class 1"]}
