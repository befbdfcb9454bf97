"""COCO's box metrics and the recall of proposals: ground truth and boxes in, numbers out.

Two evaluators do the matching: pycocotools, the reference, and hotcoco, the same algorithm in Rust and many times
faster. Both receive the same cleaned copy of the ground truth, so that they agree to the last bit on files that one
of them would reject or read differently:

- `area` (COCO: the mask's) and `iscrowd` are filled from the box and with 0 where they are missing;
- annotations are numbered from 1: pycocotools takes the id 0 for "unmatched" and would count such a box as missed,
  and of annotations that share an id it keeps the last only;
- images and categories are numbered from 1 in the order of their ids: the arrays that hotcoco reads hold ids as
  float64, which cannot tell all int64 apart;
- categories are named by their numbers: hotcoco takes no name with an unpaired surrogate;
- results of unknown images or categories are refused: pycocotools stops at the first and passes over the second,
  hotcoco passes over both.

Boxes stay arrays from the model to hotcoco: handling half a million records in Python would take longer than the rest.

Dimensions: I images, G ground-truth boxes, B detections or proposals of all images, K classes, T IoU thresholds
(0.50, 0.55 .. 0.95), R recall thresholds, A area ranges, M detection limits.
"""

from __future__ import annotations

import contextlib
import io
import sys
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import hotcoco
import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_det.files import write_text
from fpn_det.json_file import read_json
from fpn_det.structures import InputError, printable

Backend = Literal["pycocotools", "hotcoco"]

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""The twelve numbers, in the order of pycocotools' `summarize`."""

PROPOSAL_METRIC_NAMES = ("AR100", "AR1000", "ARs", "ARm", "ARl", "ARs100", "ARm100", "ARl100")
"""The recalls of proposals; the first five are the columns of the FPN paper's table 1."""

_IOU_50, _IOU_75 = 0, 5  # indices in T
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # indices in A: any area, below 32², to 96², above (pixels)


class ClassMetrics(TypedDict):
    """What one class reaches, 0..1; -1 where it has no ground truth to find."""

    AP: float
    AP50: float
    AR100: float


class Metrics(TypedDict):
    """COCO's twelve numbers, 0..1; -1 where there is no ground truth to find.

    `AR100` keeps its name when `max_detections` is not 100: it, every AP and ARs, ARm, ARl are those of the
    `max_detections` best detections per image and class. AR1 and AR10 are limited by it too.
    """

    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    AR1: float
    AR10: float
    AR100: float
    ARs: float
    ARm: float
    ARl: float
    max_detections: int
    per_class: dict[str, ClassMetrics]
    unreadable_images: NotRequired[list[int]]
    """Ids of the images that could not be read, if there are any: they count as images without detections."""


class ProposalMetrics(TypedDict):
    """Average recall over the IoU thresholds, 0..1; -1 where there is no ground truth to find.

    AR100 and AR1000 are those of the 100 and 1000 best proposals of each image, ARs, ARm, ARl those of 1000, and
    ARs100, ARm100, ARl100 those of 100, by the `area` of the ground truth.
    """

    AR100: float
    AR1000: float
    ARs: float
    ARm: float
    ARl: float
    ARs100: float
    ARm100: float
    ARl100: float
    unreadable_images: NotRequired[list[int]]
    """As in `Metrics`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroundTruth:
    """What box evaluation needs of a COCO file; `read_ground_truth` makes it, once per run.

    Attributes:
        source: the file.
        image_ids: (I,) int64, the data set's own ids, ascending.
        category_ids: (K,) int64, the data set's own ids, ascending.
        names: K class names, with the id appended where several classes share one.
        boxes: (G, 4) float64, (x, y, width, height) in pixels, in the order of the file.
        areas: (G,) float64, square pixels.
        crowd: (G,) bool.
        images: (G,) int64, the place of each box's image in `image_ids`.
        classes: (G,) int64, the place of each box's class in `category_ids`.
    """

    source: Path
    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    names: tuple[str, ...]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    images: NDArray[np.int64]
    classes: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredBoxes:
    """Detections or proposals of a whole data set.

    Those of an image may stand anywhere among them; of equal scores the first counts first.

    Attributes:
        boxes: (B, 4) float32 or float64, (x, y, width, height) in pixels of the original image.
        scores: (B,) float32 or float64.
        image_ids: (B,) int64, the data set's own ids.
        category_ids: (B,) int64, the data set's own ids; zeros for proposals, which are of no class.
    """

    boxes: NDArray[np.floating[Any]]
    scores: NDArray[np.floating[Any]]
    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: NDArray[Any]) -> ScoredBoxes:
        """The boxes that a mask (B,) selects, or those at the given places, in that order."""
        return ScoredBoxes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def records(self) -> list[dict[str, Any]]:
        """The same in the form of COCO's results files: {image_id, category_id, bbox, score} of each box."""
        columns = (self.image_ids, self.category_ids, self.boxes, self.scores)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [dict(zip(("image_id", "category_id", "bbox", "score"), row, strict=True)) for row in rows]

    @staticmethod
    def join(parts: Sequence[ScoredBoxes]) -> ScoredBoxes:
        """The boxes of one part after the other; of at least one part."""
        columns = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(ScoredBoxes)}
        return ScoredBoxes(**columns)


def read_results(path: Path) -> ScoredBoxes:
    """Read results in COCO's format.

    Args:
        path: JSON file, a list of {image_id, category_id, bbox (x, y, width, height in pixels), score}.

    Returns:
        The detections in the order of the file, of which there may be none.

    Raises:
        InputError: the file cannot be read, is no such list, or a record lacks a field or holds a value that is
            not a finite number.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise InputError(f"{path}: results must be a JSON list of records, got {_shown(records)}")
    try:
        return _as_arrays(records)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise _first_malformed(records, path) from None


def write_results(path: Path, results: ScoredBoxes) -> None:
    """Write detections in COCO's format; `read_results` gives back the same numbers.

    Args:
        path: JSON file.
        results: detections with finite numbers, as `score` accepts them.
    """
    columns = (results.image_ids, results.category_ids, results.boxes, results.scores)
    # The text of json.dumps, without building the records: two thirds of the time and memory.
    records = (
        f'{{"image_id": {image_id}, "category_id": {category_id}, "bbox": {box}, "score": {value}}}'
        for image_id, category_id, box, value in zip(*(column.tolist() for column in columns), strict=True)
    )
    write_text(path, f"[{', '.join(records)}]")


def score(
    truth: GroundTruth, results: ScoredBoxes, *, backend: Backend = "hotcoco", max_detections: int = 100
) -> Metrics:
    """Compare detections with ground truth.

    Args:
        truth: crowd boxes are matched by intersection over the detection's area and count neither for nor against.
        results: detections in any order.
        backend: who does the matching; the numbers are the same.
        max_detections: how many detections per image and class count, best first (COCO: 100).

    Returns:
        With `max_detections=100` the very numbers of pycocotools' `summarize`, and those of each class.

    Raises:
        InputError: a result is malformed, or names an image or category that the ground truth lacks, or
            `max_detections` is below 1.
    """
    if max_detections < 1:
        raise InputError(f"max_detections must be at least 1, got {max_detections}")
    limits = sorted({min(limit, max_detections) for limit in (1, 10, max_detections)})
    precision, recall = _evaluate(truth, results, "results", backend=backend, limits=limits)
    limit_1, limit_10 = (limits.index(min(limit, max_detections)) for limit in (1, 10))
    ap, ar = precision[..., -1], recall[..., -1]
    return Metrics(
        AP=_mean(ap[..., _ALL]),
        AP50=_mean(ap[_IOU_50, ..., _ALL]),
        AP75=_mean(ap[_IOU_75, ..., _ALL]),
        APs=_mean(ap[..., _SMALL]),
        APm=_mean(ap[..., _MEDIUM]),
        APl=_mean(ap[..., _LARGE]),
        AR1=_mean(recall[..., _ALL, limit_1]),
        AR10=_mean(recall[..., _ALL, limit_10]),
        AR100=_mean(ar[..., _ALL]),
        ARs=_mean(ar[..., _SMALL]),
        ARm=_mean(ar[..., _MEDIUM]),
        ARl=_mean(ar[..., _LARGE]),
        max_detections=max_detections,
        per_class={
            name: ClassMetrics(
                AP=_mean(ap[:, :, k, _ALL]), AP50=_mean(ap[_IOU_50, :, k, _ALL]), AR100=_mean(ar[:, k, _ALL])
            )
            for k, name in enumerate(truth.names)
        },
    )


def score_proposals(truth: GroundTruth, proposals: ScoredBoxes, *, backend: Backend = "hotcoco") -> ProposalMetrics:
    """Compare proposals with the ground truth of all classes: how much of it do they cover (arXiv 1502.05082)?

    Args:
        truth: crowd boxes need not be found.
        proposals: the boxes, their classes if any unheeded; the 1000 best of each image count.
        backend: who does the matching; the numbers are the same. The 5 million proposals of COCO's validation images
            take hotcoco 3 seconds and 3 GB of memory, pycocotools some 5 minutes and 6 GB.

    Returns:
        The recalls of COCO's evaluation with `useCats` off and `maxDets` 100 and 1000.

    Raises:
        InputError: a proposal is malformed, or of an image that the ground truth lacks.
    """
    order = np.argsort(truth.classes, kind="stable")  # in which COCOeval without useCats sees them
    columns = {name: getattr(truth, name)[order] for name in ("boxes", "areas", "crowd", "images")}
    one_class = replace(
        truth, category_ids=np.zeros(1, np.int64), names=("object",), classes=np.zeros_like(order), **columns
    )
    objects = replace(proposals, category_ids=np.zeros_like(proposals.image_ids))
    _, recall = _evaluate(one_class, objects, "proposals", backend=backend, limits=[100, 1000])
    recall = recall[:, 0]  # (T, A, M)
    return ProposalMetrics(
        AR100=_mean(recall[:, _ALL, 0]),
        AR1000=_mean(recall[:, _ALL, 1]),
        ARs=_mean(recall[:, _SMALL, 1]),
        ARm=_mean(recall[:, _MEDIUM, 1]),
        ARl=_mean(recall[:, _LARGE, 1]),
        ARs100=_mean(recall[:, _SMALL, 0]),
        ARm100=_mean(recall[:, _MEDIUM, 0]),
        ARl100=_mean(recall[:, _LARGE, 0]),
    )


def format_table(metrics: Metrics, *, max_width: int = 110) -> str:
    """Lay out metrics for the console, in percent; '-' where COCO defines no number.

    Args:
        metrics: as `score` gives them; control characters in names are escaped.
        max_width: characters per line that the classes may fill; more than 40 of them stand in several columns.

    Returns:
        Lines without a final newline.
    """
    labels = {name: name for name in METRIC_NAMES} | {"AR100": f"AR{metrics['max_detections']}"}
    lines = [f"box metrics in percent, {metrics['max_detections']} detections per image and class"]
    for names in (METRIC_NAMES[:6], METRIC_NAMES[6:]):
        lines.append("".join(f"{labels[name]:>7}" for name in names))
        lines.append("".join(f"{_percent(metrics[name]):>7}" for name in names))  # type: ignore[literal-required]

    per_class = [(_cut(printable(name), 32), numbers) for name, numbers in metrics["per_class"].items()]
    name_width = max([_num_columns(name) for name, _ in per_class] + [len("class")])
    header = f"{'class':<{name_width}}{'AP':>6}{'AP50':>6}{'AR':>6}"
    rows = [
        f"{name}{' ' * (name_width - _num_columns(name))}"
        f"{_percent(n['AP']):>6}{_percent(n['AP50']):>6}{_percent(n['AR100']):>6}"
        for name, n in per_class
    ]
    gap = "  |  "
    num_columns = 1
    if len(rows) > 40:
        num_columns = max(1, (max_width + len(gap)) // (len(header) + len(gap)))
    height = -(-len(rows) // num_columns)
    columns = [rows[i : i + height] for i in range(0, len(rows), max(height, 1))]
    lines += ["", gap.join([header] * len(columns))]
    lines += [gap.join(column[i] for column in columns if i < len(column)) for i in range(height)]
    return "\n".join(lines + _unreadable_lines(metrics))


def format_proposal_table(metrics: ProposalMetrics) -> str:
    """Lay out the recalls of proposals for the console, in percent; '-' where COCO defines no number.

    Returns:
        Lines without a final newline.
    """
    rows = {"100": ("AR100", "ARs100", "ARm100", "ARl100"), "1000": ("AR1000", "ARs", "ARm", "ARl")}
    lines = ["average recall in percent, all classes as one"]
    lines.append(f"{'proposals':<9}" + "".join(f"{name:>7}" for name in ("AR", "ARs", "ARm", "ARl")))
    for limit, names in rows.items():
        cells = (_percent(metrics[name]) for name in names)  # type: ignore[literal-required]
        lines.append(f"{limit:>9}" + "".join(f"{cell:>7}" for cell in cells))
    return "\n".join(lines + _unreadable_lines(metrics))


def _unreadable_lines(metrics: Metrics | ProposalMetrics) -> list[str]:
    """Why the numbers are lower than the model deserves, if images could not be read."""
    ids = metrics.get("unreadable_images", [])
    if not ids:
        return []
    shown = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
    return [f"images that could not be read, and count as if nothing was found there: {len(ids):,} (ids {shown})"]


def read_ground_truth(path: Path) -> GroundTruth:
    """Read the parts of a COCO file that box evaluation needs.

    Raises:
        InputError: naming the first entry that cannot be used, and how many `area`s are like it.
    """
    content = read_json(path, "Set data.val.annotations")
    if not isinstance(content, dict):
        raise InputError(f"{path}: COCO annotations must be a JSON object, got {_shown(content)}")
    for key in ("images", "categories", "annotations"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            got = f"{key!r} holds {_shown(entries)}" if key in content else f"{key!r} is missing"
            raise InputError(
                f"{path}: COCO annotations need lists of objects 'images', 'categories', 'annotations'; {got}"
            )
        if not entries and key != "annotations":
            raise InputError(f"{path}: {key!r} is empty, there is nothing to evaluate on")
    image_place = _read_ids(content["images"], f"{path}: images")
    class_place = _read_ids(content["categories"], f"{path}: categories")
    for i, category in enumerate(content["categories"]):
        if not isinstance(category.get("name"), str):
            raise InputError(f"{path}: categories[{i}] needs a string 'name', got {_shown(category.get('name'))}")

    boxes, areas, crowd = [], [], []
    bad_areas: list[tuple[str, Any]] = []  # the data layer, which reports all else, does not read them
    images: list[int] = []
    classes: list[int] = []
    for i, annotation in enumerate(content["annotations"]):
        where = f"{path}: annotations[{i}] (id {_shown(annotation.get('id'))})"
        for key, kind, place, found in (
            ("image_id", "images", image_place, images),
            ("category_id", "categories", class_place, classes),
        ):
            value = annotation.get(key)
            if not _is_id(value) or value not in place:
                raise InputError(f"{where}: {key} must be the id of one of the {kind}, got {_shown(value)}")
            found.append(place[value])
        box = annotation.get("bbox")
        if not _is_box(box):
            raise InputError(f"{where}: bbox must be 4 finite numbers (x, y, width, height), got {_shown(box)}")
        area = annotation.get("area")
        if area is None:
            area = box[2] * box[3]
        if not _is_number(area):
            bad_areas.append((where, area))
            area = 0.0
        is_crowd = annotation.get("iscrowd")
        if is_crowd and is_crowd != 1:
            raise InputError(f"{where}: iscrowd must be 0 or 1, got {_shown(is_crowd)}")
        boxes.append(box)
        areas.append(area)
        crowd.append(bool(is_crowd))
    if bad_areas:
        where, area = bad_areas[0]
        others = f" (one of {len(bad_areas):,} such annotations)" if len(bad_areas) > 1 else ""
        raise InputError(
            f"{where}: area must be a finite number, got {_shown(area)}{others}. Correct it, or leave it out: the "
            "box's area then counts"
        )
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    uses = Counter(names.values())
    return GroundTruth(
        source=path,
        image_ids=np.array(list(image_place), np.int64),
        category_ids=np.array(list(class_place), np.int64),
        names=tuple(names[c] if uses[names[c]] == 1 else f"{names[c]} (id {c})" for c in class_place),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        areas=np.array(areas, np.float64),
        crowd=np.array(crowd, np.bool_),
        images=np.array(images, np.int64),
        classes=np.array(classes, np.int64),
    )


def hotcoco_evaluator(
    truth: GroundTruth,
    results: ScoredBoxes,
    *,
    limits: list[int],
    ranges: NDArray[np.float64] | None = None,
    result_areas: NDArray[np.float64] | None = None,
) -> Any:
    """hotcoco's evaluator after `evaluate` and `accumulate`, for the analyses that it offers.

    Args:
        truth: its boxes are numbered from 1 in their order, and so are images and classes, which are named by their
            numbers.
        results: numbered from 1 in their order.
        limits: of detections per image and class, ascending.
        ranges: (A, 2) first and last value of `areas` that counts, instead of COCO's four.
        result_areas: (B,) what is compared with `ranges` of results that match nothing; by default their area.

    Raises:
        InputError: a result is malformed, or names an image or category that the ground truth lacks.
    """
    dataset, rows = _coco_form(truth, results, "results")
    ground_truth = hotcoco.COCO(dataset)
    detected = ground_truth.load_res(rows)
    if result_areas is not None:
        detected.update_anns(ids=np.arange(1, len(rows) + 1), area=result_areas)
    evaluator = hotcoco.COCOeval(ground_truth, detected, "bbox")
    evaluator.params.maxDets = limits
    if ranges is not None:
        evaluator.params.areaRng = ranges.tolist()
        evaluator.params.areaRngLbl = [str(i) for i in range(len(ranges))]
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator


def _evaluate(
    truth: GroundTruth, found: ScoredBoxes, what: str, *, backend: Backend, limits: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """COCOeval's precision (T, R, K, A, M) and recall (T, K, A, M) of the best `limits` per image and class."""
    dataset, rows = _coco_form(truth, found, what)
    evaluator: Any
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress
        match backend:
            case "hotcoco":
                ground_truth = hotcoco.COCO(dataset)
                evaluator = hotcoco.COCOeval(ground_truth, ground_truth.load_res(rows), "bbox")
            case "pycocotools":
                evaluator = COCOeval(_indexed(dataset), _indexed(dataset | {"annotations": _as_records(rows)}), "bbox")
            case _:
                raise InputError(f"backend must be 'pycocotools' or 'hotcoco', got {backend!r}")
        evaluator.params.maxDets = limits
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def _coco_form(
    truth: GroundTruth, found: ScoredBoxes, what: str
) -> tuple[dict[str, list[dict[str, Any]]], NDArray[np.float64]]:
    """Ground truth as COCO's records, and boxes as the rows (B, 7) that `loadRes` takes; all ids from 1."""
    _check_scored_boxes(found, what)
    images = _places(found.image_ids, truth.image_ids, f"{what}: %d image_id", truth.source)
    classes = _places(found.category_ids, truth.category_ids, f"{what}: %d category_id", truth.source)
    rows = np.column_stack([images + 1, found.boxes, found.scores, classes + 1])  # (B, 7) float64
    columns = (truth.images + 1, truth.classes + 1, truth.boxes, truth.areas, truth.crowd.astype(np.int64))
    dataset: dict[str, list[dict[str, Any]]] = {
        "images": [{"id": i + 1} for i in range(len(truth.image_ids))],
        # Not the names: hotcoco takes text of Unicode only, and JSON can hold lone surrogates.
        "categories": [{"id": i + 1, "name": str(i + 1)} for i in range(len(truth.names))],
        "annotations": [
            {"id": i + 1, "image_id": image, "category_id": k, "bbox": box, "area": area, "iscrowd": crowd}
            for i, (image, k, box, area, crowd) in enumerate(zip(*(c.tolist() for c in columns), strict=True))
        ],
    }
    return dataset, rows


def _as_records(rows: NDArray[np.float64]) -> list[dict[str, Any]]:
    """What pycocotools' `loadRes` makes of results; it cannot read an empty list."""
    return [
        {
            "id": i + 1,
            "image_id": int(image),
            "category_id": int(category),
            "bbox": [x, y, w, h],
            "area": w * h,
            "iscrowd": 0,
            "score": value,
        }
        for i, (image, x, y, w, h, value, category) in enumerate(map(np.ndarray.tolist, rows))
    ]


def _indexed(dataset: dict[str, list[dict[str, Any]]]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _as_arrays(records: list[Any]) -> ScoredBoxes:
    """Results as arrays; an exception of any kind if one of them is malformed."""
    boxes = [r["bbox"] for r in records]
    if not set(map(len, boxes)) <= {4}:
        raise ValueError("boxes must have 4 numbers")
    return ScoredBoxes(
        boxes=_finite(list(chain.from_iterable(boxes))).reshape(-1, 4),
        scores=_finite([r["score"] for r in records]),
        image_ids=_integers([r["image_id"] for r in records]),
        category_ids=_integers([r["category_id"] for r in records]),
    )


def _finite(values: list[Any]) -> NDArray[np.float64]:
    if not set(map(type, values)) <= {int, float}:
        raise TypeError("not a number")
    array = np.array(values, np.float64)
    if not np.isfinite(array).all():
        raise ValueError("not finite")
    return array


def _integers(values: list[Any]) -> NDArray[np.int64]:
    if not set(map(type, values)) <= {int}:
        raise TypeError("not an integer")
    return np.array(values, np.int64)


def _first_malformed(records: list[Any], path: Path) -> InputError:
    """What is wrong with the first result that `_as_arrays` cannot take."""
    checks: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("image_id", _is_id, "an integer of 64 bits"),
        ("category_id", _is_id, "an integer of 64 bits"),
        ("bbox", _is_box, "4 finite numbers (x, y, width, height)"),
        ("score", _is_number, "a finite number"),
    )
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            return InputError(f"{path}: record {i} must be an object, got {_shown(record)}")
        for key, is_valid, wanted in checks:
            if key not in record:
                return InputError(f"{path}: record {i} lacks {key!r}, got {_shown(record)}")
            if not is_valid(record[key]):
                return InputError(f"{path}: record {i}: {key} must be {wanted}, got {_shown(record[key])}")
    raise AssertionError("no record is malformed")


def _check_scored_boxes(found: ScoredBoxes, what: str) -> None:
    shape = found.scores.shape
    columns = {f.name: np.shape(getattr(found, f.name)) for f in fields(found)}
    if len(shape) != 1 or columns != dict.fromkeys(columns, shape) | {"boxes": (*shape, 4)}:
        raise InputError(
            f"{what}: boxes (B, 4), scores (B,), image_ids (B,) and category_ids (B,) must have one row per box, got "
            f"shapes {', '.join(map(str, columns.values()))}"
        )
    finite = np.isfinite(found.boxes).all(axis=1) & np.isfinite(found.scores)
    if not finite.all():
        i = int(np.argmin(finite))
        raise InputError(
            f"{what}: box and score must be finite, got {found.boxes[i].tolist()} and {found.scores[i]} in row {i} of "
            f"image {found.image_ids[i]}"
        )


def _places(ids: NDArray[np.int64], known: NDArray[np.int64], what: str, source: Path) -> NDArray[np.int64]:
    """The place of each id (B,) in `known`, which ascends and is not empty; refuses an id that is not there."""
    places = np.searchsorted(known, ids).clip(max=len(known) - 1)
    unknown = np.unique(ids[known[places] != ids]).tolist()
    if unknown:
        raise InputError(
            f"{what % len(unknown)} not in {source}: {_first(unknown)}; are these the results of another data set or "
            "split?"
        )
    return places


def _read_ids(entries: Sequence[Mapping[str, Any]], source: str) -> dict[int, int]:
    """Id -> place among all ids in ascending order; the keys in that order."""
    seen: set[int] = set()
    for i, entry in enumerate(entries):
        value: Any = entry.get("id")
        if not _is_id(value):
            raise InputError(f"{source}[{i}] needs an integer 'id' of 64 bits, got {_shown(value)}")
        if value in seen:
            raise InputError(f"{source}[{i}] repeats the id {value}; ids must be unique")
        seen.add(value)
    return {value: place for place, value in enumerate(sorted(seen))}


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else -1.0


def _is_id(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    # The bound refuses NaN, infinities and integers too large for a float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(_is_number, value))


def _first(values: Sequence[int], count: int = 5) -> str:
    return ", ".join(map(str, values[:count])) + (", ..." if len(values) > count else "")


def _shown(value: Any) -> str:
    return _shortened(repr(value), 120)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _cut(text: str, limit: int) -> str:
    """`text` in at most `limit` columns of a terminal."""
    if _num_columns(text) <= limit:
        return text
    ends = list(accumulate(map(_num_columns, text)))
    return f"{text[: bisect_right(ends, limit - 1)]}…"


def _num_columns(text: str) -> int:
    """How wide a terminal shows printable text: Chinese or Korean signs fill two columns, accents of their own none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me") for char in text)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if value > -1 else "-"
