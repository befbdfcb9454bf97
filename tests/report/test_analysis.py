"""The numbers of a report against short computations of their own, and against COCO's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import BOX, Box, found, random_set, truth_of

from fpn_det.engine.coco_eval import GroundTruth, ScoredBoxes, hotcoco_evaluator, read_ground_truth, read_results, score
from fpn_det.report.analysis import (
    SCORE_GRID,
    Analysis,
    analyse,
    best_threshold,
    by_aspect,
    by_size,
    confusion_matrix,
    curves_over_scores,
    find_matches,
    find_suspects,
    worst_images,
)


def analysis_of(truth: GroundTruth, results: ScoredBoxes) -> Analysis:
    return analyse(truth, results, score(truth, results))


def iou(one: Any, other: Any) -> float:
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / (one[2] * one[3] + other[2] * other[3] - overlap)


def best_first(results: ScoredBoxes) -> list[int]:
    return sorted(range(len(results)), key=lambda i: (-results.scores[i], results.image_ids[i], i))


def plain_matches(truth: GroundTruth, results: ScoredBoxes) -> tuple[dict[int, int], set[int]]:
    """COCO's greedy matching at IoU 0.5: detection -> box, and the detections that crowds take."""
    taken: dict[int, int] = {}
    ignored: set[int] = set()
    for i in best_first(results):
        image, k = results.image_ids[i] - 10, (results.category_ids[i] - 1) // 2
        own = [g for g in range(len(truth.boxes)) if truth.images[g] == image and truth.classes[g] == k]
        overlaps = {g: iou(results.boxes[i], truth.boxes[g]) for g in own if not truth.crowd[g]}
        free = {g: o for g, o in overlaps.items() if g not in taken.values() and o >= 0.5}
        if free:
            taken[i] = max(free, key=lambda g: (free[g], g))
        elif any(truth.crowd[g] and inside(results.boxes[i], truth.boxes[g]) >= 0.5 for g in own):
            ignored.add(i)
    return taken, ignored


def inside(box: Any, region: Any) -> float:
    width = min(box[0] + box[2], region[0] + region[2]) - max(box[0], region[0])
    height = min(box[1] + box[3], region[1] + region[3]) - max(box[1], region[1])
    return max(width, 0) * max(height, 0) / (box[2] * box[3])


@pytest.mark.parametrize("seed", range(5))
def test_matches_are_cocos(seed: int) -> None:
    truth, results = random_set(seed)
    taken, ignored = plain_matches(truth, results)
    evaluator = hotcoco_evaluator(truth, results, limits=[100])
    matches = find_matches(evaluator, num_results=len(results), num_boxes=len(truth.boxes))
    assert set(np.flatnonzero(matches.correct).tolist()) == set(taken)
    assert set(np.flatnonzero(~matches.counted).tolist()) == ignored
    assert {d: g for g, d in enumerate(matches.found_by.tolist()) if d >= 0} == taken
    assert ignored
    assert taken


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_are_the_best_there_are(seed: int) -> None:
    truth, results = random_set(seed)
    taken, ignored = plain_matches(truth, results)
    analysis = analysis_of(truth, results)
    of_class = (results.category_ids - 1) // 2
    for k, found_class in enumerate(analysis.classes):
        num_boxes = int(((truth.classes == k) & ~truth.crowd).sum())
        rows = [i for i in range(len(results)) if of_class[i] == k and i not in ignored]
        assert (found_class.num_boxes, found_class.num_detections) == (num_boxes, len(rows))
        if num_boxes == 0:
            assert found_class.best is None
            continue
        f1 = {}
        for threshold in {results.scores[i] for i in rows}:
            kept = [i for i in rows if results.scores[i] >= threshold]
            f1[threshold] = 2 * sum(i in taken for i in kept) / (len(kept) + num_boxes)
        best = found_class.best
        assert best is not None
        assert best.f1 == pytest.approx(max(f1.values()), abs=1e-12)
        assert f1[best.score] == pytest.approx(best.f1, abs=1e-12)
        kept = [i for i in rows if results.scores[i] >= best.score]
        assert best.precision == pytest.approx(sum(i in taken for i in kept) / len(kept))
        assert best.recall == pytest.approx(sum(i in taken for i in kept) / num_boxes)


def test_a_threshold_does_not_part_equal_scores() -> None:
    scores, correct = np.array([0.5, 0.9, 0.5, 0.5]), np.array([True, True, False, False])
    best = best_threshold(scores, correct, num_boxes=2)
    assert best is not None
    assert (best.score, best.precision, best.recall) == (0.9, 1.0, 0.5)  # 0.5 would be 2 of 4, not 2 of 2
    assert best_threshold(scores, correct, num_boxes=0) is None
    assert best_threshold(scores[:0], correct[:0], num_boxes=2) is None


def test_curves_over_scores_count_what_is_kept() -> None:
    rng = np.random.default_rng(0)
    scores, correct = rng.uniform(0, 0.9, 200).round(2), rng.random(200) < 0.5
    curves = curves_over_scores(scores, correct, num_boxes=150)
    assert len(curves.f1) == 46  # up to 0.90
    for i, (precision, recall) in enumerate(zip(curves.precision, curves.recall, strict=True)):
        kept = scores >= SCORE_GRID[i]
        assert precision == pytest.approx(correct[kept].mean())
        assert recall == pytest.approx(correct[kept].sum() / 150)
        assert curves.f1[i] == pytest.approx(2 * precision * recall / (precision + recall) if precision else 0)


@pytest.mark.parametrize("seed", range(5))
def test_confusions_are_counted_box_by_box(seed: int) -> None:
    truth, results = random_set(seed)
    _, ignored = plain_matches(truth, results)
    counts = np.zeros((5, 5), int)
    used: set[int] = set()
    for i in best_first(results):
        if i in ignored or results.scores[i] < 0.3:
            continue
        image, k = results.image_ids[i] - 10, (results.category_ids[i] - 1) // 2
        free = [g for g in range(len(truth.boxes)) if truth.images[g] == image and not truth.crowd[g] and g not in used]
        overlaps = {g: o for g in free if (o := iou(results.boxes[i], truth.boxes[g])) >= 0.5}
        if overlaps:
            g = max(overlaps, key=lambda g: overlaps[g])
            used.add(g)
            counts[truth.classes[g], k] += 1
        else:
            counts[4, k] += 1
    for g in range(len(truth.boxes)):
        if g not in used and not truth.crowd[g]:
            counts[truth.classes[g], 4] += 1
    matches = find_matches(
        hotcoco_evaluator(truth, results, limits=[100]), num_results=len(results), num_boxes=len(truth.boxes)
    )
    assert confusion_matrix(truth, results, matches, score_thresh=0.3).tolist() == counts.tolist()
    assert ignored  # which hotcoco alone would count as background


def plain_tide(truth: GroundTruth, results: ScoredBoxes) -> dict[str, set[int]]:
    """TIDE's errors as its paper defines them (section 2.1): places of detections, for `Miss` of boxes."""
    taken, ignored = plain_matches(truth, results)
    errors: dict[str, set[int]] = {kind: set() for kind in ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")}
    explained = set(taken.values())
    for i in range(len(results)):
        if i in taken or i in ignored:
            continue
        k = (results.category_ids[i] - 1) // 2
        own, other = {}, {}
        for g in np.flatnonzero((truth.images == results.image_ids[i] - 10) & ~truth.crowd).tolist():
            (own if truth.classes[g] == k else other)[g] = iou(results.boxes[i], truth.boxes[g])
        best_own, best_other = max(own.values(), default=0.0), max(other.values(), default=0.0)
        if 0.1 <= best_own <= 0.5:
            errors["Loc"].add(i)
            explained.add(max(own, key=lambda g: own[g]))
        elif best_other >= 0.5:
            errors["Cls"].add(i)
            explained.add(max(other, key=lambda g: other[g]))
        elif best_own >= 0.5:
            errors["Dupe"].add(i)
        elif max(best_own, best_other) <= 0.1:
            errors["Bkg"].add(i)
        else:
            errors["Both"].add(i)
    errors["Miss"] = set(np.flatnonzero(~truth.crowd).tolist()) - explained
    return errors


@pytest.mark.parametrize("seed", range(5))
def test_tide_counts_and_costs(seed: int) -> None:
    truth, results = random_set(seed, crowd=0.0)
    errors = plain_tide(truth, results)
    analysis = analysis_of(truth, results)
    assert {e.kind: e.count for e in analysis.errors} == {kind: len(places) for kind, places in errors.items()}
    costs = {e.kind: e.cost for e in analysis.errors}
    ap50 = analysis.metrics["AP50"]
    for kind in ("Both", "Dupe", "Bkg"):  # false detections that no correction makes right: they go
        kept = results[~np.isin(np.arange(len(results)), list(errors[kind]))]
        assert costs[kind] == pytest.approx(score(truth, kept)["AP50"] - ap50, abs=1e-9), kind
    keep = ~np.isin(np.arange(len(truth.boxes)), list(errors["Miss"]))
    fewer = replace(
        truth, **{name: getattr(truth, name)[keep] for name in ("boxes", "areas", "crowd", "images", "classes")}
    )
    assert costs["Miss"] == pytest.approx(score(fewer, results)["AP50"] - ap50, abs=1e-9)
    assert all(errors.values())


@pytest.mark.parametrize(
    ("kind", "detection"),
    [
        ("Cls", (0, 1, BOX, 0.9)),
        ("Loc", (0, 0, (24.0, 0.0, 40.0, 40.0), 0.9)),
        ("Both", (0, 1, (24.0, 0.0, 40.0, 40.0), 0.9)),
        ("Bkg", (1, 0, BOX, 0.9)),
        ("Miss", None),
    ],
)
def test_one_error_alone(kind: str, detection: tuple | None) -> None:
    analysis = analysis_of(truth_of([(0, 0, BOX)]), found([detection] if detection else []))
    counts = {e.kind: e.count for e in analysis.errors}
    assert counts[kind] == 1  # type: ignore[index]
    assert sum(counts.values()) == (1 if kind in ("Cls", "Loc", "Miss") else 2)  # else the box is missed, too
    if kind in ("Cls", "Loc"):
        assert {e.kind: e.cost for e in analysis.errors}[kind] == pytest.approx(1.0)  # type: ignore[index]


@pytest.mark.parametrize("seed", range(3))
def test_calibration_is_the_mean_gap(seed: int) -> None:
    truth, results = random_set(seed)
    results = replace(results, scores=np.random.default_rng(seed).uniform(0, 1, len(results)))  # on no edge of a bin
    taken, ignored = plain_matches(truth, results)
    rows = np.array([i for i in range(len(results)) if i not in ignored])
    correct = np.isin(rows, list(taken))
    bins = np.minimum((results.scores[rows] * 10).astype(int), 9)
    gaps = [
        abs(results.scores[rows][bins == b].mean() - correct[bins == b].mean()) * (bins == b).mean() for b in range(10)
    ]
    analysis = analysis_of(truth, results)
    assert analysis.calibration_error == pytest.approx(sum(gaps))
    assert [b.count for b in analysis.bins] == np.bincount(bins, minlength=10).tolist()
    assert [b.precision for b in analysis.bins] == pytest.approx([correct[bins == b].mean() for b in range(10)])


def test_scores_that_are_no_probabilities_have_no_calibration() -> None:
    analysis = analysis_of(truth_of([(0, 0, BOX)]), found([(0, 0, BOX, 7.5)]))
    assert (analysis.calibration_error, analysis.bins) == (None, [])
    assert analysis.threshold.score == 7.5


def test_slices_of_cocos_ranges_are_cocos_numbers() -> None:
    truth, results = random_set(1)
    metrics = score(truth, results)
    ranges = np.array([[0, 32**2], [32**2, 96**2]])
    precision = hotcoco_evaluator(truth, results, limits=[100], ranges=ranges).eval["precision"]
    for i, name in enumerate(("APs", "APm")):
        of_range = precision[:, :, :, i, 0]
        assert of_range[of_range > -1].mean() == metrics[name]  # type: ignore[literal-required]


def test_slices_by_size_and_shape() -> None:
    boxes: list[tuple[int, int, Box]] = [(0, 0, (0, 0, 10, 10)), (0, 0, (100, 0, 20, 20)), (1, 0, (0, 0, 10, 40))]
    results = found([(0, 0, (100, 0, 20, 20), 0.9), (1, 0, (0, 0, 10, 40), 0.8), (1, 0, (200, 0, 90, 20), 0.99)])
    sizes = {s.name: s for s in by_size(truth_of(boxes), results, limit=100)}
    assert [s.num_boxes for s in sizes.values()] == [1, 2, 0, 0, 0, 0, 0]
    assert (sizes["0 to 16 px"].ap, sizes["16 to 32 px"].ap, sizes["32 to 64 px"].ap) == (0.0, 1.0, -1.0)
    shapes = {s.name: s for s in by_aspect(truth_of(boxes), results, limit=100)}
    assert [s.num_boxes for s in shapes.values()] == [1, 0, 2, 0, 0]
    assert shapes["taller than 1:3"].ap == pytest.approx(1.0)  # the false wide one is of another slice
    assert shapes["2:3 to 3:2"].recall50 == 0.5


def test_worst_images_and_suspects() -> None:
    truth = truth_of(
        [(0, 0, BOX), (0, 1, (100, 0, 40, 40)), (1, 0, BOX), (1, 2, (200, 0, 100, 100)), (2, 0, (200, 200, 9, 9))],
        crowd=(3,),
    )
    results = found(
        [
            (0, 0, BOX, 0.9),  # right
            (0, 2, (100, 0, 40, 40), 0.8),  # wrong class
            (0, 0, (300, 300, 40, 40), 0.7),  # nothing there
            (1, 0, BOX, 0.2),  # right, below the threshold
            (1, 0, (210, 10, 40, 40), 0.95),  # in a crowd of another class
            (1, 2, (210, 60, 40, 40), 0.9),  # in a crowd of its class: ignored
        ]
    )
    evaluator = hotcoco_evaluator(truth, results, limits=[100])
    matches = find_matches(evaluator, num_results=len(results), num_boxes=len(truth.boxes))
    worst = worst_images(truth, results, matches, score_thresh=0.5)
    assert [(i.image_id, i.missed, i.false) for i in worst] == [(10, [1], [1, 2]), (11, [2], [4]), (12, [4], [])]
    suspects = find_suspects(evaluator, truth, results, matches, score_thresh=0.5)
    assert [(s.kind, s.image_id, s.detection, s.gt) for s in suspects] == [
        ("wrong class", 10, 1, 1),
        ("not annotated", 10, 2, None),
        ("never found", 12, None, 4),
    ]
    assert len(find_suspects(evaluator, truth, results, matches, score_thresh=0.5, unreadable=[12])) == 2
    assert [s.kind for s in find_suspects(evaluator, truth, results, matches, score_thresh=0.99)] == ["never found"]


@pytest.mark.parametrize(
    ("truth", "results"),
    [
        (truth_of([(0, 0, BOX)]), found([])),
        (truth_of([]), found([(0, 0, BOX, 0.9)])),
        (truth_of([]), found([])),
        (truth_of([(0, 0, BOX)], crowd=(0,)), found([(0, 0, BOX, 0.9), (0, 0, BOX, 0.8)])),
        (truth_of([(0, 0, (5, 5, 0, 0))]), found([(0, 0, (5, 5, 0, 0), 0.9)])),
    ],
    ids=["no detections", "no boxes", "nothing", "a crowd alone", "no area"],
)
def test_empty_sets_have_numbers(truth: GroundTruth, results: ScoredBoxes) -> None:
    analysis = analysis_of(truth, results)
    json.dumps(analysis.as_json(), allow_nan=False)
    assert len(analysis.errors) == 6
    assert len(analysis.confusion) == 4


def test_real_data(test_data: Path) -> None:
    truth = read_ground_truth(test_data / "coco_eval/gt.json")
    results = read_results(test_data / "coco_eval/detections.json")
    analysis = analysis_of(truth, results)
    with_boxes = [c for c in analysis.classes if c.num_boxes]
    assert np.mean([c.ap for c in with_boxes]) == pytest.approx(analysis.metrics["AP"])
    assert np.mean([np.mean(c.precision50) for c in with_boxes]) == pytest.approx(analysis.metrics["AP50"])
    assert np.mean(analysis.precision) == pytest.approx(analysis.metrics["AP"])
    assert np.mean(analysis.precision75) == pytest.approx(analysis.metrics["AP75"])
    rows = np.array(analysis.confusion).sum(axis=1)[:-1].tolist()
    assert rows == [c.num_boxes for c in analysis.classes]
    taken, _ = plain_matches_by_ids(truth, results)
    assert analysis.threshold.recall * analysis.num_boxes == pytest.approx(
        sum(results.scores[i] >= analysis.threshold.score for i in taken)
    )
    assert sum(s.num_boxes for s in analysis.by_size) == sum(s.num_boxes for s in analysis.by_aspect)
    assert sum(s.num_boxes for s in analysis.by_size) == analysis.num_boxes


def plain_matches_by_ids(truth: GroundTruth, results: ScoredBoxes) -> tuple[dict[int, int], set[int]]:
    """`plain_matches` for any ids."""
    numbered = replace(
        results,
        image_ids=np.searchsorted(truth.image_ids, results.image_ids) + 10,
        category_ids=np.searchsorted(truth.category_ids, results.category_ids) * 2 + 1,
    )
    return plain_matches(truth, numbered)
