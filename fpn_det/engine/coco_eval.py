"""COCO's box metrics and the recall of proposals: a ground-truth file and boxes in, numbers out.

Two evaluators do the matching: pycocotools, the reference, and hotcoco, the same algorithm in Rust and many times
faster. Both receive the same cleaned copy of the ground truth, so that they agree to the last bit on files that one
of them would reject or read differently:

- `area` (COCO: the mask's) and `iscrowd` are filled from the box and with 0 where they are missing;
- annotations are numbered from 1: pycocotools takes the id 0 for "unmatched" and would count such a box as missed,
  and of annotations that share an id it keeps the last only;
- results of unknown images or categories are refused: pycocotools stops at the first and passes over the second,
  hotcoco passes over both.

Dimensions: T IoU thresholds (0.50, 0.55 .. 0.95), R recall thresholds, K classes, A area ranges, M detection limits.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import hotcoco
import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_det.structures import InputError

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBoxes:
    """Class-agnostic boxes of a whole data set: arrays, because COCO's validation images have 5 million proposals.

    Dimension: B boxes, those of an image anywhere among them; of equal scores the first counts first.

    Attributes:
        boxes: (B, 4) float32, XYXY in pixels of the original image.
        scores: (B,) float32.
        image_ids: (B,) int64, the data set's own ids.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    image_ids: NDArray[np.int64]


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read results in COCO's format.

    Args:
        path: JSON file, a list of {image_id, category_id, bbox (x, y, width, height in pixels), score}.

    Returns:
        The records, which may be none.

    Raises:
        InputError: the file cannot be read, is no such list, or a record lacks a field or holds a value that is
            not a finite number.
    """
    records = _read_json(path)
    if not isinstance(records, list):
        raise InputError(f"{path}: results must be a JSON list of records, got {_shown(records)}")
    _check_results(records, str(path))
    return records


def score(
    annotations: Path,
    results: Sequence[dict[str, Any]],
    *,
    backend: Backend = "pycocotools",
    max_detections: int = 100,
) -> Metrics:
    """Compare detections with ground truth.

    Args:
        annotations: COCO ground truth (JSON). Crowd boxes are matched by intersection over the detection's area and
            count neither for nor against.
        results: records as `read_results` gives them, in any order.
        backend: who does the matching; the numbers are the same.
        max_detections: how many detections per image and class count, best first (COCO: 100).

    Returns:
        With `max_detections=100` the very numbers of pycocotools' `summarize`, and those of each class.

    Raises:
        InputError: the ground truth or a result is malformed, a result names an image or category that the ground
            truth lacks, or `max_detections` is below 1.
    """
    if max_detections < 1:
        raise InputError(f"max_detections must be at least 1, got {max_detections}")
    dataset = read_ground_truth(annotations)
    _check_results(results, "results")
    for key, known in (("image_id", dataset["images"]), ("category_id", dataset["categories"])):
        unknown = sorted({r[key] for r in results} - {entry["id"] for entry in known})
        _refuse_unknown(unknown, f"results: {len(unknown)} {key}", annotations)

    found = dataset | {"annotations": _as_annotations(results)}
    limits = sorted({min(limit, max_detections) for limit in (1, 10, max_detections)})
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress
        match backend:
            case "pycocotools":
                evaluator = COCOeval(_indexed(dataset), _indexed(found), "bbox")
            case "hotcoco":
                evaluator = hotcoco.COCOeval(hotcoco.COCO(dataset), hotcoco.COCO(found), "bbox")
            case _:
                raise _unknown_backend(backend)
        evaluator.params.maxDets = limits
        evaluator.evaluate()
        evaluator.accumulate()

    precision: NDArray[np.float64] = evaluator.eval["precision"]  # (T, R, K, A, M)
    recall: NDArray[np.float64] = evaluator.eval["recall"]  # (T, K, A, M)
    limit_1, limit_10 = (limits.index(min(limit, max_detections)) for limit in (1, 10))
    ap, ar = precision[..., -1], recall[..., -1]
    names = _unique_names(dataset["categories"])
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
            names[int(category_id)]: ClassMetrics(
                AP=_mean(ap[:, :, k, _ALL]), AP50=_mean(ap[_IOU_50, :, k, _ALL]), AR100=_mean(ar[:, k, _ALL])
            )
            for k, category_id in enumerate(evaluator.params.catIds)
        },
    )


def score_proposals(annotations: Path, proposals: ScoredBoxes, *, backend: Backend = "pycocotools") -> ProposalMetrics:
    """Compare proposals with the ground truth of all classes: how much of it do they cover (arXiv 1502.05082)?

    Args:
        annotations: COCO ground truth (JSON). Crowd boxes need not be found.
        proposals: the boxes; the 1000 best of each image count.
        backend: who does the matching; the numbers are the same. The 5 million proposals of COCO's validation images
            take hotcoco 3 seconds and 3 GB of memory, pycocotools some 5 minutes and 6 GB.

    Returns:
        The recalls of COCO's evaluation with `useCats` off and `maxDets` 100 and 1000.

    Raises:
        InputError: the ground truth or a proposal is malformed, or a proposal is of an image that the ground truth
            lacks.
    """
    dataset = read_ground_truth(annotations)
    _check_proposals(proposals)
    # Numbered from 1: arrays for the evaluators hold image ids as float64, which cannot tell all int64 apart.
    ids = np.unique([image["id"] for image in dataset["images"]])
    numbers = np.searchsorted(ids, proposals.image_ids).clip(max=len(ids) - 1)
    unknown = np.unique(proposals.image_ids[ids[numbers] != proposals.image_ids]).tolist()
    _refuse_unknown(unknown, f"proposals: {len(unknown)} image_id", annotations)
    boxes = proposals.boxes.astype(np.float64)
    rows = np.column_stack(
        [numbers + 1, boxes[:, :2], boxes[:, 2:] - boxes[:, :2], proposals.scores, np.ones(len(boxes))]
    )  # (B, 7): image, x, y, width, height, score, category

    number_of = dict(zip(ids.tolist(), range(1, len(ids) + 1), strict=True))
    one_class: dict[str, list[dict[str, Any]]] = {
        "images": [{"id": number} for number in number_of.values()],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [
            annotation | {"image_id": number_of[annotation["image_id"]], "category_id": 1}
            for annotation in sorted(dataset["annotations"], key=lambda a: a["category_id"])  # as without useCats
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        match backend:
            case "pycocotools":
                records = (
                    {"image_id": int(row[0]), "category_id": 1, "bbox": row[1:5], "score": row[5]}
                    for row in map(np.ndarray.tolist, rows)
                )
                found = one_class | {"annotations": _as_annotations(records)}
                evaluator = COCOeval(_indexed(one_class), _indexed(found), "bbox")
            case "hotcoco":
                truth = hotcoco.COCO(one_class)
                evaluator = hotcoco.COCOeval(truth, truth.load_res(rows), "bbox")
            case _:
                raise _unknown_backend(backend)
        evaluator.params.maxDets = [100, 1000]
        evaluator.evaluate()
        evaluator.accumulate()

    recall: NDArray[np.float64] = evaluator.eval["recall"][:, 0]  # (T, A, M)
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
        metrics: as `score` gives them.
        max_width: characters per line that the classes may fill; more than 40 of them stand in several columns.

    Returns:
        Lines without a final newline.
    """
    labels = {name: name for name in METRIC_NAMES} | {"AR100": f"AR{metrics['max_detections']}"}
    lines = [f"box metrics in percent, {metrics['max_detections']} detections per image and class"]
    for names in (METRIC_NAMES[:6], METRIC_NAMES[6:]):
        lines.append("".join(f"{labels[name]:>7}" for name in names))
        lines.append("".join(f"{_percent(metrics[name]):>7}" for name in names))  # type: ignore[literal-required]

    per_class = [(_shortened(name, 32), numbers) for name, numbers in metrics["per_class"].items()]
    name_width = max([len(name) for name, _ in per_class] + [len("class")])
    header = f"{'class':<{name_width}}{'AP':>6}{'AP50':>6}{'AR':>6}"
    rows = [
        f"{name:<{name_width}}{_percent(n['AP']):>6}{_percent(n['AP50']):>6}{_percent(n['AR100']):>6}"
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
    return "\n".join(lines)


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
    return "\n".join(lines)


def read_ground_truth(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The parts of a COCO file that box evaluation needs, in a form that both evaluators read alike.

    Raises:
        InputError: naming the first entry that cannot be used.
    """
    content = _read_json(path)
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
    ids = {key: _read_ids(content[key], f"{path}: {key}") for key in ("images", "categories")}
    for i, category in enumerate(content["categories"]):
        if not isinstance(category.get("name"), str):
            raise InputError(f"{path}: categories[{i}] needs a string 'name', got {_shown(category.get('name'))}")

    annotations = []
    for i, annotation in enumerate(content["annotations"]):
        where = f"{path}: annotations[{i}] (id {_shown(annotation.get('id'))})"
        for key, kind in (("image_id", "images"), ("category_id", "categories")):
            value = annotation.get(key)
            if not _is_id(value) or value not in ids[kind]:
                raise InputError(f"{where}: {key} must be the id of one of the {kind}, got {_shown(value)}")
        box = annotation.get("bbox")
        if not _is_box(box):
            raise InputError(f"{where}: bbox must be 4 finite numbers (x, y, width, height), got {_shown(box)}")
        area = annotation.get("area")
        if area is None:
            area = box[2] * box[3]
        if not _is_number(area):
            raise InputError(f"{where}: area must be a finite number, got {_shown(area)}")
        annotations.append(
            {
                "id": i + 1,
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": [float(value) for value in box],
                "area": float(area),
                "iscrowd": int(bool(annotation.get("iscrowd"))),
            }
        )
    return {
        "images": [{"id": entry["id"]} for entry in content["images"]],
        "categories": [{"id": entry["id"], "name": entry["name"]} for entry in content["categories"]],
        "annotations": annotations,
    }


def _as_annotations(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What pycocotools' `loadRes` makes of results; it cannot read an empty list."""
    return [
        {
            "id": i + 1,
            "image_id": r["image_id"],
            "category_id": r["category_id"],
            "bbox": [float(value) for value in r["bbox"]],
            "area": float(r["bbox"][2] * r["bbox"][3]),
            "iscrowd": 0,
            "score": float(r["score"]),
        }
        for i, r in enumerate(results)
    ]


def _indexed(dataset: dict[str, list[dict[str, Any]]]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _check_results(records: Sequence[Any], source: str) -> None:
    checks: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("image_id", _is_id, "an integer"),
        ("category_id", _is_id, "an integer"),
        ("bbox", _is_box, "4 finite numbers (x, y, width, height)"),
        ("score", _is_number, "a finite number"),
    )
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise InputError(f"{source}: record {i} must be an object, got {_shown(record)}")
        for key, is_valid, wanted in checks:
            if key not in record:
                raise InputError(f"{source}: record {i} lacks {key!r}, got {_shown(record)}")
            if not is_valid(record[key]):
                raise InputError(f"{source}: record {i}: {key} must be {wanted}, got {_shown(record[key])}")


def _check_proposals(proposals: ScoredBoxes) -> None:
    boxes, scores, image_ids = proposals.boxes, proposals.scores, proposals.image_ids
    if boxes.shape != (len(scores), 4) or scores.ndim != 1 or image_ids.shape != scores.shape:
        raise InputError(
            "proposals: boxes (B, 4), scores (B,) and image_ids (B,) must have one row per proposal, got "
            f"{boxes.shape}, {scores.shape} and {image_ids.shape}"
        )
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    if not finite.all():
        i = int(np.argmin(finite))
        raise InputError(
            f"proposals: box and score must be finite, got {boxes[i].tolist()} and {scores[i]} in row {i} of image "
            f"{image_ids[i]}"
        )


def _refuse_unknown(unknown: Sequence[int], what: str, annotations: Path) -> None:
    if unknown:
        raise InputError(
            f"{what} not in {annotations}: {_first(unknown)}; are these the results of another data set or split?"
        )


def _unknown_backend(backend: object) -> InputError:
    return InputError(f"backend must be 'pycocotools' or 'hotcoco', got {backend!r}")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # not JSON, or not text at all
        raise InputError(f"{path}: is not valid JSON ({error})") from error


def _read_ids(entries: Sequence[Mapping[str, Any]], source: str) -> set[int]:
    seen: set[int] = set()
    for i, entry in enumerate(entries):
        value: Any = entry.get("id")
        if not _is_id(value):
            raise InputError(f"{source}[{i}] needs an integer 'id', got {_shown(value)}")
        if value in seen:
            raise InputError(f"{source}[{i}] repeats the id {value}; ids must be unique")
        seen.add(value)
    return seen


def _unique_names(categories: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Category id -> name, with the id appended to names that several categories share."""
    uses = Counter(c["name"] for c in categories)
    return {c["id"]: c["name"] if uses[c["name"]] == 1 else f"{c['name']} (id {c['id']})" for c in categories}


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else -1.0


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # The bound refuses NaN, infinities and integers too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_box(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 4 and all(_is_number(v) for v in value)


def _first(values: Sequence[int], count: int = 5) -> str:
    return ", ".join(map(str, values[:count])) + (", ..." if len(values) > count else "")


def _shown(value: Any) -> str:
    return _shortened(repr(value), 120)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if value > -1 else "-"
