"""What a detector gets wrong: the numbers behind a report, from ground truth and detections.

hotcoco computes the six errors of TIDE (arXiv 2008.08115), calibration, the confusion matrix and who found whom. Own
code finds the best threshold of each class (hotcoco gives F1 of the interpolated precision, which is too high, and no
threshold) and keeps detections that COCO ignores (in crowds) out of the confusion matrix, where hotcoco counts them.

Dimensions: I images, G ground-truth boxes, B detections of all images, K classes, R = 101 recall thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from fpn_det.engine.coco_eval import GroundTruth, Metrics, ProposalMetrics, ScoredBoxes, hotcoco_evaluator

ErrorKind = Literal["Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"]
SuspectKind = Literal["wrong class", "not annotated", "never found"]

ERROR_KINDS: tuple[ErrorKind, ...] = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
NUM_BINS = 10
"""Of the calibration."""

SCORE_GRID = np.linspace(0, 1, 51)
"""Thresholds of `ScoreCurves`."""

_IOU_50, _IOU_75 = 0, 5  # indices in the IoU thresholds
_BACKGROUND_IOU = 0.1  # below it, TIDE says that a detection touches nothing
_SIZE_EDGES = (0.0, 16.0, 32.0, 64.0, 96.0, 192.0, 384.0, np.inf)  # sqrt(area); 32 and 96 are COCO's
_ASPECT_EDGES = (0.0, 1 / 3, 2 / 3, 3 / 2, 3.0, np.inf)  # width / height
_ASPECT_NAMES = ("taller than 1:3", "1:3 to 2:3", "2:3 to 3:2", "3:2 to 3:1", "wider than 3:1")


@dataclass(frozen=True, slots=True)
class Threshold:
    """What detections of at least a score reach, at IoU 0.5.

    Attributes:
        score: the threshold.
        precision: 0..1.
        recall: 0..1.
        f1: 0..1.
    """

    score: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True)
class ScoreCurves:
    """What detections of at least each score of `SCORE_GRID` reach at IoU 0.5; shorter if no scores are as high.

    Attributes:
        precision: 0..1.
        recall: 0..1.
        f1: 0..1.
    """

    precision: list[float]
    recall: list[float]
    f1: list[float]


@dataclass(frozen=True, slots=True)
class ErrorType:
    """One of TIDE's error types.

    Attributes:
        kind: its name.
        cost: how much AP50 would rise without these errors alone, 0..1.
        count: detections of any score, or missed boxes.
    """

    kind: ErrorKind
    cost: float
    count: int


@dataclass(frozen=True, slots=True)
class ClassAnalysis:
    """What one class reaches; AP and AR as in `coco_eval.ClassMetrics`.

    Attributes:
        name: of the class.
        num_boxes: ground truth, without crowds.
        num_detections: of any score, without those that COCO ignores.
        ap: AP.
        ap50: AP at IoU 0.5.
        ar: AR of `max_detections`.
        best: the threshold with the highest F1; None without ground truth or detections.
        precision50: (R,) interpolated precision at IoU 0.5; empty without ground truth.
        precision75: the same at IoU 0.75.
        by_score: precision, recall and F1 over the threshold.
    """

    name: str
    num_boxes: int
    num_detections: int
    ap: float
    ap50: float
    ar: float
    best: Threshold | None
    precision50: list[float]
    precision75: list[float]
    by_score: ScoreCurves


@dataclass(frozen=True, slots=True)
class Confusion:
    """Boxes of one class taken for another.

    Attributes:
        gt: class of the ground truth.
        detected: class of the detections.
        count: how many.
        share: of the boxes of class `gt`, 0..1.
    """

    gt: str
    detected: str
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class Bin:
    """Detections of similar score: `low` <= score < `high` (the last one: <=)."""

    low: float
    high: float
    count: int
    mean_score: float
    precision: float


@dataclass(frozen=True, slots=True)
class Slice:
    """Metrics of the boxes of some size or shape, averaged over the classes; -1 where there are none."""

    name: str
    num_boxes: int
    ap: float
    ap50: float
    ar: float
    recall50: float


@dataclass(frozen=True, slots=True)
class ImageMistakes:
    """What is wrong in an image at the threshold of the report.

    Attributes:
        image_id: the data set's own.
        missed: places in the ground truth of the boxes that were not found.
        false: places in the results of the detections that match nothing.
    """

    image_id: int
    missed: list[int]
    false: list[int]


@dataclass(frozen=True, slots=True)
class Suspect:
    """A place where the annotations may be wrong.

    Attributes:
        kind: `wrong class` (a detection of another class lies on the box), `not annotated` (a detection where nothing
            is) or `never found` (no detection of any class and score touches the box).
        image_id: the data set's own.
        detection: its place in the results, or None.
        gt: its place in the ground truth, or None.
        score: of the detection, or None.
    """

    kind: SuspectKind
    image_id: int
    detection: int | None
    gt: int | None
    score: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """All numbers of a report.

    Attributes:
        metrics: COCO's.
        num_images: I.
        num_boxes: ground truth, without crowds.
        num_crowd: crowd regions.
        num_detections: B.
        threshold: the one score threshold for all classes with the highest F1 over all detections; what the confusion
            matrix, the images and the suspects are seen at.
        errors: TIDE's six.
        classes: in the order of the classes.
        precision50: (R,) interpolated precision at IoU 0.5, mean over the classes; empty without ground truth.
        precision75: the same at IoU 0.75.
        precision: the same, mean over all IoU thresholds.
        by_score: precision, recall and F1 of all detections over the threshold.
        confusion: (K + 1, K + 1) counts, rows ground truth, columns detections, the last one background.
        confusions: pairs of different classes, the most frequent first.
        calibration_error: expected calibration error, 0..1; None without detections, or if scores lie outside 0..1.
        bins: of the calibration; empty without it.
        by_size: by the square root of COCO's area.
        by_aspect: by width / height.
        worst: images with mistakes, most first.
        suspects: by kind, the likeliest of each first.
        proposals: recall of the proposals, where they were measured.
    """

    metrics: Metrics
    num_images: int
    num_boxes: int
    num_crowd: int
    num_detections: int
    threshold: Threshold
    errors: list[ErrorType]
    classes: list[ClassAnalysis]
    precision50: list[float]
    precision75: list[float]
    precision: list[float]
    by_score: ScoreCurves
    confusion: list[list[int]]
    confusions: list[Confusion]
    calibration_error: float | None
    bins: list[Bin]
    by_size: list[Slice]
    by_aspect: list[Slice]
    worst: list[ImageMistakes]
    suspects: list[Suspect]
    proposals: ProposalMetrics | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data: what report.json holds."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Matches:
    """Who found whom at an IoU threshold, as COCO matches.

    Attributes:
        counted: (B,) bool; not those that match a crowd or are beyond the limit per image and class.
        correct: (B,) bool; a box of their class is theirs.
        found_by: (G,) int64 place of the detection that found the box, -1 if none did.
    """

    counted: NDArray[np.bool_]
    correct: NDArray[np.bool_]
    found_by: NDArray[np.int64]


def analyse(
    truth: GroundTruth, results: ScoredBoxes, metrics: Metrics, *, proposals: ProposalMetrics | None = None
) -> Analysis:
    """Everything that a report shows.

    Args:
        truth: ground truth.
        results: the detections.
        metrics: of these two.
        proposals: recall of the model's proposals, if measured.

    Raises:
        InputError: a result is malformed, or names an image or category that the ground truth lacks.
    """
    limit = metrics["max_detections"]
    evaluator = hotcoco_evaluator(truth, results, limits=[limit])
    matches = find_matches(evaluator, num_results=len(results), num_boxes=len(truth.boxes))
    num_boxes = int((~truth.crowd).sum())
    scores, correct = results.scores[matches.counted], matches.correct[matches.counted]
    threshold = best_threshold(scores, correct, num_boxes=num_boxes) or Threshold(0.5, 0.0, 0.0, 0.0)
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # (T, R, K)
    confusion = confusion_matrix(truth, results, matches, score_thresh=threshold.score)
    calibration_error, bins = calibration(evaluator, results)
    tide = evaluator.tide_errors()
    return Analysis(
        metrics=metrics,
        num_images=len(truth.image_ids),
        num_boxes=num_boxes,
        num_crowd=int(truth.crowd.sum()),
        num_detections=len(results),
        threshold=threshold,
        errors=[ErrorType(kind, tide["delta_ap"][kind], tide["counts"][kind]) for kind in ERROR_KINDS],
        classes=_classes(truth, results, matches, metrics, precision),
        precision50=_mean_curve(precision[[_IOU_50]]),
        precision75=_mean_curve(precision[[_IOU_75]]),
        precision=_mean_curve(precision),
        by_score=curves_over_scores(scores, correct, num_boxes=num_boxes),
        confusion=confusion.tolist(),
        confusions=_confusions(truth, confusion),
        calibration_error=calibration_error,
        bins=bins,
        by_size=by_size(truth, results, limit=limit),
        by_aspect=by_aspect(truth, results, limit=limit),
        worst=worst_images(truth, results, matches, score_thresh=threshold.score),
        suspects=find_suspects(
            evaluator,
            truth,
            results,
            matches,
            score_thresh=threshold.score,
            unreadable=metrics.get("unreadable_images", []),
        ),
        proposals=proposals,
    )


def find_matches(evaluator: Any, *, num_results: int, num_boxes: int, iou: float = 0.5) -> Matches:
    """COCO's matching at one of its IoU thresholds, from an evaluator of `hotcoco_evaluator`."""
    found = evaluator.image_diagnostics(iou_thr=iou)
    counted, correct = np.zeros(num_results, np.bool_), np.zeros(num_results, np.bool_)
    for number, status in found["dt_status"].items():
        counted[number - 1] = True
        correct[number - 1] = status == "tp"
    found_by = np.full(num_boxes, -1)
    for number, detection in found["gt_match"].items():
        found_by[number - 1] = detection - 1
    return Matches(counted=counted, correct=correct, found_by=found_by)


def best_threshold(
    scores: NDArray[np.floating[Any]], correct: NDArray[np.bool_], *, num_boxes: int
) -> Threshold | None:
    """The score threshold with the highest F1, the highest of several; None without boxes or detections.

    Args:
        scores: (B,) of the detections that count.
        correct: (B,) whether each found a box.
        num_boxes: that there are to find.
    """
    if num_boxes == 0 or len(scores) == 0:
        return None
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    num_correct = np.cumsum(correct[order])
    num_kept = np.arange(1, len(ordered) + 1)
    f1 = 2 * num_correct / (num_kept + num_boxes)
    f1[:-1][ordered[:-1] == ordered[1:]] = -1.0  # a threshold cannot part equal scores
    i = int(np.argmax(f1))
    return Threshold(
        score=float(ordered[i]),
        precision=float(num_correct[i] / num_kept[i]),
        recall=float(num_correct[i] / num_boxes),
        f1=float(f1[i]),
    )


def curves_over_scores(scores: NDArray[np.floating[Any]], correct: NDArray[np.bool_], *, num_boxes: int) -> ScoreCurves:
    """Precision, recall and F1 over the threshold; arguments as in `best_threshold`."""
    order = np.argsort(scores, kind="stable")
    num_kept = len(scores) - np.searchsorted(scores[order], SCORE_GRID)
    num_kept = num_kept[num_kept > 0]
    if num_boxes == 0 or len(num_kept) == 0:
        return ScoreCurves([], [], [])
    num_correct = np.cumsum(correct[order][::-1])[num_kept - 1]
    return ScoreCurves(
        precision=(num_correct / num_kept).tolist(),
        recall=(num_correct / num_boxes).tolist(),
        f1=(2 * num_correct / (num_kept + num_boxes)).tolist(),
    )


def confusion_matrix(
    truth: GroundTruth, results: ScoredBoxes, matches: Matches, *, score_thresh: float
) -> NDArray[np.int64]:
    """Which class was taken for which: (K + 1, K + 1), rows ground truth, columns detections, last background.

    Each detection, best first, takes the box of any class that it overlaps most, by IoU 0.5 or more. Detections that
    COCO ignores are left out.
    """
    kept = results[matches.counted & (results.scores >= score_thresh)]
    evaluator = hotcoco_evaluator(truth, kept, limits=[max(1, len(kept))])
    counts = evaluator.confusion_matrix(iou_thr=0.5, max_det=max(1, len(kept)))["matrix"]
    return counts.astype(np.int64)


def calibration(evaluator: Any, results: ScoredBoxes) -> tuple[float | None, list[Bin]]:
    """Expected calibration error at IoU 0.5 and its bins; None and none without scores in 0..1."""
    if not len(results) or results.scores.min() < 0 or results.scores.max() > 1:
        return None, []
    found = evaluator.calibration(n_bins=NUM_BINS, iou_threshold=0.5)
    bins = [
        Bin(b["bin_lower"], b["bin_upper"], b["count"], b["avg_confidence"], b["avg_accuracy"]) for b in found["bins"]
    ]
    return found["ece"], bins


def by_size(truth: GroundTruth, results: ScoredBoxes, *, limit: int) -> list[Slice]:
    """Metrics by the square root of the area, finer than COCO's three."""
    return _slices(
        truth,
        results,
        np.sqrt(truth.areas.clip(min=0)),
        np.sqrt((results.boxes[:, 2] * results.boxes[:, 3]).clip(min=0)),
        edges=_SIZE_EDGES,
        names=[
            f"{low:g} to {high:g} px" if np.isfinite(high) else f"from {low:g} px"
            for low, high in pairwise(_SIZE_EDGES)
        ],
        limit=limit,
    )


def by_aspect(truth: GroundTruth, results: ScoredBoxes, *, limit: int) -> list[Slice]:
    """Metrics by width / height."""
    return _slices(
        truth,
        results,
        _aspect(truth.boxes),
        _aspect(results.boxes),
        edges=_ASPECT_EDGES,
        names=_ASPECT_NAMES,
        limit=limit,
    )


def worst_images(
    truth: GroundTruth, results: ScoredBoxes, matches: Matches, *, score_thresh: float
) -> list[ImageMistakes]:
    """Images with mistakes at a threshold, most mistakes first, of equally many the surest false ones."""
    shown = matches.counted & (results.scores >= score_thresh)
    is_found = matches.found_by >= 0
    is_found[is_found] = shown[matches.found_by[is_found]]
    missed = _by_image(truth.image_ids[truth.images], np.flatnonzero(~truth.crowd & ~is_found))
    false = _by_image(results.image_ids, np.flatnonzero(shown & ~matches.correct))
    mistakes = [ImageMistakes(i, missed.get(i, []), false.get(i, [])) for i in sorted(missed.keys() | false.keys())]

    def badness(image: ImageMistakes) -> tuple[int, float]:
        return len(image.missed) + len(image.false), float(results.scores[image.false].sum())

    return sorted(mistakes, key=badness, reverse=True)


def find_suspects(
    evaluator: Any,
    truth: GroundTruth,
    results: ScoredBoxes,
    matches: Matches,
    *,
    score_thresh: float,
    unreadable: Sequence[int] = (),
) -> list[Suspect]:
    """Where the annotations may be wrong: surest detections first, then the largest boxes that nothing touches.

    Args:
        evaluator: of `truth` and `results`.
        truth: ground truth.
        results: the detections.
        matches: of these two.
        score_thresh: detections below say nothing.
        unreadable: ids of images that could not be read, whose boxes say nothing either.
    """
    found: list[Suspect] = []
    in_crowd = _in_crowd(truth, results)
    for error in evaluator.image_diagnostics(iou_thr=0.5, score_thr=score_thresh)["label_errors"]:
        detection, gt = error["dt_id"] - 1, error["gt_id"]
        if gt is None and in_crowd[detection]:
            continue
        found.append(
            Suspect(
                kind="not annotated" if gt is None else "wrong class",
                image_id=int(results.image_ids[detection]),
                detection=detection,
                gt=None if gt is None else gt - 1,
                score=float(results.scores[detection]),
            )
        )
    found.sort(key=lambda s: (-(s.score or 0.0), s.detection))
    return found + _never_found(truth, results, matches, unreadable=unreadable)


def _never_found(
    truth: GroundTruth, results: ScoredBoxes, matches: Matches, *, unreadable: Sequence[int]
) -> list[Suspect]:
    """Boxes that no detection touches, the largest first."""
    image_ids = truth.image_ids[truth.images]
    is_readable = ~np.isin(image_ids, np.array(unreadable, np.int64))
    of_image = _by_image(results.image_ids, np.arange(len(results)))
    untouched: list[int] = []
    for image_id, boxes in _by_image(
        image_ids, np.flatnonzero(~truth.crowd & (matches.found_by < 0) & is_readable)
    ).items():
        iou = _iou(truth.boxes[boxes], results.boxes[of_image.get(image_id, [])])
        untouched += np.array(boxes)[(iou < _BACKGROUND_IOU).all(axis=1)].tolist()
    untouched.sort(key=lambda box: -truth.areas[box])
    return [Suspect("never found", int(image_ids[box]), detection=None, gt=box, score=None) for box in untouched]


def _in_crowd(truth: GroundTruth, results: ScoredBoxes) -> NDArray[np.bool_]:
    """(B,) whether half of a detection lies in a crowd region of any class."""
    inside = np.zeros(len(results), np.bool_)
    of_image = _by_image(results.image_ids, np.arange(len(results)))
    for box, image in zip(truth.boxes[truth.crowd], truth.images[truth.crowd], strict=True):
        rows = of_image.get(int(truth.image_ids[image]), [])
        found = results.boxes[rows]
        low, high = np.maximum(found[:, :2], box[:2]), np.minimum(found[:, :2] + found[:, 2:], box[:2] + box[2:])
        overlap = (high - low).clip(min=0).prod(axis=1)
        inside[rows] |= overlap >= 0.5 * found[:, 2] * found[:, 3]
    return inside


def _classes(
    truth: GroundTruth, results: ScoredBoxes, matches: Matches, metrics: Metrics, precision: NDArray[np.float64]
) -> list[ClassAnalysis]:
    classes = np.searchsorted(truth.category_ids, results.category_ids)
    num_boxes = np.bincount(truth.classes[~truth.crowd], minlength=len(truth.names)).tolist()
    analyses = []
    for k, name in enumerate(truth.names):
        own = matches.counted & (classes == k)
        scores, correct = results.scores[own], matches.correct[own]
        curves = precision[[_IOU_50, _IOU_75], :, k] if num_boxes[k] else np.zeros((2, 0))
        analyses.append(
            ClassAnalysis(
                name=name,
                num_boxes=num_boxes[k],
                num_detections=int(own.sum()),
                ap=metrics["per_class"][name]["AP"],
                ap50=metrics["per_class"][name]["AP50"],
                ar=metrics["per_class"][name]["AR100"],
                best=best_threshold(scores, correct, num_boxes=num_boxes[k]),
                precision50=curves[0].tolist(),
                precision75=curves[1].tolist(),
                by_score=curves_over_scores(scores, correct, num_boxes=num_boxes[k]),
            )
        )
    return analyses


def _confusions(truth: GroundTruth, counts: NDArray[np.int64]) -> list[Confusion]:
    between = counts[:-1, :-1].copy()
    np.fill_diagonal(between, 0)
    totals = counts.sum(axis=1)
    pairs = [
        Confusion(truth.names[i], truth.names[j], int(between[i, j]), float(between[i, j] / totals[i]))
        for i, j in np.argwhere(between)
    ]
    return sorted(pairs, key=lambda c: (-c.count, -c.share))


def _slices(
    truth: GroundTruth,
    results: ScoredBoxes,
    of_truth: NDArray[np.float64],
    of_results: NDArray[np.float64],
    *,
    edges: Sequence[float],
    names: Sequence[str],
    limit: int,
) -> list[Slice]:
    """Metrics by any quantity, which takes the place of COCO's area: boxes outside a range are ignored."""
    ranges = np.array([(low, np.nextafter(high, 0)) for low, high in pairwise(edges)])
    evaluator = hotcoco_evaluator(
        replace(truth, areas=of_truth), results, limits=[limit], ranges=ranges, result_areas=of_results
    )
    precision, recall = evaluator.eval["precision"][..., -1], evaluator.eval["recall"][..., -1]
    return [
        Slice(
            name=name,
            num_boxes=int((~truth.crowd & (of_truth >= low) & (of_truth <= high)).sum()),
            ap=_mean(precision[..., i]),
            ap50=_mean(precision[_IOU_50, ..., i]),
            ar=_mean(recall[..., i]),
            recall50=_mean(recall[_IOU_50, ..., i]),
        )
        for i, (name, (low, high)) in enumerate(zip(names, ranges, strict=True))
    ]


def _mean_curve(precision: NDArray[np.float64]) -> list[float]:
    """(R,) mean over IoU thresholds and classes with ground truth; empty if none has."""
    defined = precision[:, :, (precision > -1).all(axis=(0, 1))]
    return defined.mean(axis=(0, 2)).tolist() if defined.size else []


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def _aspect(boxes: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    sides = boxes[:, 2:].astype(np.float64).clip(min=1e-9)
    return sides[:, 0] / sides[:, 1]


def _iou(one: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """IoU of each of (x, y, w, h) with each."""
    corners = [np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1).astype(np.float64) for b in (one, other)]
    return box_iou(*map(torch.from_numpy, corners)).numpy()


def _by_image(image_ids: NDArray[np.int64], places: NDArray[np.int64]) -> dict[int, list[int]]:
    """Image id -> those of the places that are in the image."""
    order = places[np.argsort(image_ids[places], kind="stable")]
    ids, starts = np.unique(image_ids[order], return_index=True)
    return dict(zip(ids.tolist(), (part.tolist() for part in np.split(order, starts[1:])), strict=False))
