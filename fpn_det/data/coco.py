"""COCO-format annotations as flat tensors.

A data set of COCO's size is a million small Python objects; kept as such, each loader worker ends up with its own
copy (reading an object writes its reference count). Everything here is a handful of tensors instead, which workers
share. Crowd boxes and boxes that cannot be used are left out here; the evaluation reads the annotation file itself.

Dimensions: I images, B boxes of all images, n boxes of the file that are four finite numbers.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from reprlib import repr as short  # bounded in length and depth, whatever the file holds
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpn_det.data.cache import ArrayCache
from fpn_det.structures import Categories, InputError

CACHE_VERSION = 1
"""To be raised with every change of what `load_coco` makes of a file."""

CLIP_TOLERANCE_PX = 1.0
"""Boxes that reach further than this beyond their image are reported; rounding by labelling tools stays below."""

BOX_PROBLEMS = (
    # what is wrong, and whether the box is unusable
    ("bbox without area (width or height <= 0)", True),
    ("bbox outside its image", True),
    ("bbox too thin to have an area in float32", True),
    ("bbox partly outside its image", False),
)

TENSORS = ("name_bytes", "name_offsets", "image_ids", "sizes", "box_offsets", "boxes", "labels")
"""The fields of `CocoAnnotations` that grow with the data."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An annotation that was clipped or cannot be used.

    Attributes:
        annotation_id: its `id` in the file, or None where it has none.
        reason: what is wrong, the same words for the same defect so that problems can be counted.
        value: what the file says.
        fatal: whether the box is unusable (else it was clipped to its image and kept).
    """

    annotation_id: object
    reason: str
    value: str
    fatal: bool


@dataclass(frozen=True, kw_only=True)
class CocoAnnotations:
    """Images with their trainable boxes.

    Attributes:
        source: the annotation file.
        folder: the folder that the file names are relative to.
        categories: class indices, ids and names.
        name_bytes, name_offsets: uint8 (L,) and int64 (I + 1,); the file name of image i is
            `name_bytes[name_offsets[i]:name_offsets[i + 1]]`, encoded as the file system does.
        image_ids: (I,) int64.
        sizes: (I, 2) int64, (h, w) as the file states them.
        box_offsets: (I + 1,) int64; the boxes of image i are `boxes[box_offsets[i]:box_offsets[i + 1]]`.
        boxes: (B, 4) float32 XYXY in pixels of the original image, clipped to it, of positive area.
        labels: (B,) int64, 0..K-1.
        num_crowd: crowd annotations that were left out.
        problems: annotations that were clipped or dropped.
    """

    source: Path
    folder: Path
    categories: Categories
    name_bytes: Tensor
    name_offsets: Tensor
    image_ids: Tensor
    sizes: Tensor
    box_offsets: Tensor
    boxes: Tensor
    labels: Tensor
    num_crowd: int
    problems: tuple[Problem, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, index: int) -> Path:
        """The image file of image `index`."""
        start, end = self.name_offsets[index : index + 2].tolist()
        return self.folder / os.fsdecode(bytes(self.name_bytes[start:end].numpy()))

    def targets(self, index: int) -> tuple[Tensor, Tensor]:
        """Boxes (G, 4) float32 XYXY and labels (G,) int64 of image `index`, in original pixels."""
        start, end = self.box_offsets[index : index + 2].tolist()
        return self.boxes[start:end], self.labels[start:end]

    def without_empty(self) -> CocoAnnotations:
        """The same data without the images that have no box to train on."""
        counts, lengths = self.box_offsets.diff(), self.name_offsets.diff()
        keep = counts > 0
        return replace(
            self,
            name_bytes=self.name_bytes[keep.repeat_interleave(lengths)],
            name_offsets=_offsets(lengths[keep]),
            image_ids=self.image_ids[keep],
            sizes=self.sizes[keep],
            box_offsets=_offsets(counts[keep]),
        )

    def sha256(self) -> str:
        """Tells whether two data sets are the same to the model: names, sizes, boxes and labels in this order."""
        digest = hashlib.sha256()
        for name in TENSORS:
            digest.update(getattr(self, name).numpy().tobytes())
        return digest.hexdigest()

    def summary(self) -> str:
        """One line: how many images, boxes, classes; what was left out."""
        empty = int((self.box_offsets.diff() == 0).sum())
        return (
            f"{self.source}: {len(self):,} images ({empty:,} without boxes), {len(self.boxes):,} boxes, "
            f"{len(self.categories)} classes; left out: {self.num_crowd:,} crowd boxes, "
            f"{sum(p.fatal for p in self.problems):,} unusable boxes"
        )


def load_coco(annotations: Path, images: Path, *, on_error: str = "drop") -> CocoAnnotations:
    """Read a COCO-format annotation file.

    Images keep the order of the file; class indices follow the ascending category ids. What was read from a large file
    is kept in `$XDG_CACHE_HOME/fpn_det` (`~/.cache/fpn_det`) and used until the file changes; whether the images exist
    is looked up each time.

    Args:
        annotations: the JSON file, with lists `images`, `annotations`, `categories`.
        images: the folder that each `file_name` is relative to.
        on_error: `drop` leaves boxes that cannot be used out of training and reports them in `problems`;
            `fail` refuses the data set. Unusable: not four finite numbers, no width or height, wholly outside the
            image, of an unknown image or category. Boxes partly outside are clipped.

    Raises:
        InputError: a missing, malformed or empty file, missing images, or unusable boxes with `on_error="fail"`.
    """
    cache = ArrayCache(annotations, version=CACHE_VERSION)
    kept = cache.read()
    if kept is not None:
        data = _unpack(kept, source=annotations, folder=images)
        names = data.name_bytes.numpy().tobytes()
        bounds = pairwise(data.name_offsets.tolist())
        _check_images_exist(annotations, images, [os.fsdecode(names[start:end]) for start, end in bounds])
    else:
        with _garbage_collection_paused():
            data = _parse(annotations, images)
        cache.write(_pack(data))
    if on_error == "fail" and any(p.fatal for p in data.problems):
        raise InputError(
            f"{annotations}: boxes that cannot be used:\n{format_problems(data.problems)}\n"
            "Correct the annotations, or train without these boxes with data.on_error=drop"
        )
    return data


def read_coco_json(path: Path) -> dict[str, Any]:
    """Read a COCO-format file and check its outline: three lists, `images` and `categories` not empty.

    Raises:
        InputError: the file is missing, empty, not JSON, or not of that outline.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot read the annotation file ({error.strerror}). Paths are relative to the current folder; "
            "set data.train.annotations and data.val.annotations"
        ) from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "the file is empty" if not text.strip() else f"not valid JSON ({error})"
        raise InputError(f"{path}: {what}; expected COCO-format annotations") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            got = f"keys {sorted(map(str, data))[:8]}" if isinstance(data, dict) else type(data).__name__
            raise InputError(
                f"{path}: expected a JSON object with the lists images, annotations, categories; got {got}"
            )
    for key in ("images", "categories"):
        if not data[key]:
            raise InputError(f"{path}: the list {key!r} is empty; nothing to train on or to evaluate")
    return data


def read_categories(path: Path) -> Categories:
    """The categories of a COCO-format file, of which nothing else is read.

    Raises:
        InputError: what `read_coco_json` raises, or a category without id or name.
    """
    return _read_categories(path, read_coco_json(path)["categories"])


def check_same_categories(train: CocoAnnotations, val: CocoAnnotations) -> None:
    """Refuse a validation set whose classes differ from the training set's: its AP would mean nothing.

    Raises:
        InputError: naming both files and the differing categories.
    """
    if train.categories != val.categories:
        ours = set(zip(train.categories.ids, train.categories.names, strict=True))
        theirs = set(zip(val.categories.ids, val.categories.names, strict=True))
        raise InputError(
            f"{train.source} and {val.source} define different categories: only in the first {sorted(ours - theirs)}, "
            f"only in the second {sorted(theirs - ours)}. Give both files the same list `categories`"
        )


def format_problems(problems: Sequence[Problem], limit: int = 5) -> str:
    """A readable report, one line per reason: count, then the first annotation ids with their values."""
    lines = []
    for (reason, fatal), count in Counter((p.reason, p.fatal) for p in problems).most_common():
        alike = [p for p in problems if (p.reason, p.fatal) == (reason, fatal)]
        first = [f"{short(p.annotation_id)}: {p.value}" for p in alike[:limit]]
        more = ", ..." if count > limit else ""
        outcome = "not used" if fatal else "clipped"
        lines.append(f"  {count:,} x {reason} ({outcome}): annotation {', '.join(first)}{more}")
    return "\n".join(lines)


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Without it, reading millions of objects takes three times as long: they are searched again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parse(annotations: Path, images: Path) -> CocoAnnotations:
    """All that `load_coco` does but for the cache and `on_error`."""
    data = read_coco_json(annotations)
    categories = _read_categories(annotations, data["categories"])
    image_ids, sizes, names = _read_images(annotations, images, data["images"])
    image_index = {image_id: i for i, image_id in enumerate(image_ids)}
    class_index = {category_id: i for i, category_id in enumerate(categories.ids)}

    problems: list[tuple[int, Problem]] = []  # along with the position in the file
    positions: list[int] = []
    owners: list[int] = []
    labels: list[int] = []
    xywh: list[list[float]] = []
    num_crowd = 0
    for position, annotation in enumerate(data["annotations"]):
        if not isinstance(annotation, dict):
            problems.append((position, Problem(None, "not a JSON object", short(annotation), fatal=True)))
            continue
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        owner = image_index.get(image_id) if type(image_id) is int else None
        label = class_index.get(category_id) if type(category_id) is int else None
        if owner is None or label is None:
            key = "image_id" if owner is None else "category_id"
            unknown = f"{key} that the file does not define"
            problems.append((position, _problem(annotation, key, unknown, fatal=True)))
        elif annotation.get("iscrowd"):
            num_crowd += 1
        elif reason := _malformed(annotation.get("bbox")):
            problems.append((position, _problem(annotation, "bbox", reason, fatal=True)))
        else:
            positions.append(position)
            owners.append(owner)
            labels.append(label)
            xywh.append(annotation["bbox"])

    size_array, owner_array = np.array(sizes), np.array(owners, np.int64)
    boxes, found = _clip_boxes(np.array(xywh, np.float64).reshape(-1, 4), size_array[owner_array])
    usable = np.ones(len(boxes), bool)
    for i in np.flatnonzero(found >= 0).tolist():
        reason, fatal = BOX_PROBLEMS[found[i]]
        usable[i] = not fatal
        problems.append((positions[i], _problem(data["annotations"][positions[i]], "bbox", reason, fatal=fatal)))
    problems.sort(key=lambda problem: problem[0])

    order = np.flatnonzero(usable)
    order = order[np.argsort(owner_array[order], kind="stable")]
    name_bytes, name_offsets = _pack_names([os.fsencode(name) for name in names])
    return CocoAnnotations(
        source=annotations,
        folder=images,
        categories=categories,
        name_bytes=name_bytes,
        name_offsets=name_offsets,
        image_ids=torch.tensor(image_ids, dtype=torch.int64),
        sizes=torch.from_numpy(size_array),
        box_offsets=_offsets(torch.from_numpy(np.bincount(owner_array[order], minlength=len(image_ids)))),
        boxes=torch.from_numpy(boxes[order]),
        labels=torch.from_numpy(np.array(labels, np.int64)[order]),
        num_crowd=num_crowd,
        problems=tuple(problem for _, problem in problems),
    )


def _problem(annotation: dict[str, Any], key: str, reason: str, *, fatal: bool) -> Problem:
    """What is wrong with the value of `key`."""
    annotation_id = annotation.get("id")
    if not isinstance(annotation_id, int | float | str | None):
        annotation_id = short(annotation_id)
    return Problem(annotation_id, reason, short(annotation.get(key)), fatal=fatal)


def _malformed(bbox: object) -> str | None:
    """Why this is not four finite numbers, if so."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return "bbox that is not [x, y, width, height]"
    # A comparison instead of math.isfinite, which overflows on integers of 400 digits.
    if not all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in bbox):
        return "bbox with a value that is not a finite number"
    return None


def _clip_boxes(xywh: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to their images.

    Args:
        xywh: (n, 4) float64, finite, as the file has them.
        sizes: (n, 2) (h, w) of their images.

    Returns:
        (n, 4) float32 XYXY, and (n,) indices into `BOX_PROBLEMS`, -1 where nothing is wrong.
    """
    x, y, w, h = xywh.T
    height, width = sizes.T
    with np.errstate(over="ignore"):  # infinite is far outside, too
        stated = np.stack([x, y, x + w, y + h], 1)
        clipped = np.hstack([stated[:, :2].clip(min=0), np.minimum(stated[:, 2:], sizes[:, ::-1])])
        boxes = clipped.astype(np.float32)
        beyond = np.abs(stated - clipped).max(1, initial=0)
    conditions = [
        (w <= 0) | (h <= 0),
        (x >= width) | (y >= height) | (stated[:, 2] <= 0) | (stated[:, 3] <= 0),
        (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1]),
        beyond > CLIP_TOLERANCE_PX,
    ]
    return boxes, np.select(conditions, range(4), default=-1)


def _read_categories(source: Path, entries: list[Any]) -> Categories:
    names: dict[int, str] = {}
    for entry in entries:
        category_id = entry.get("id") if isinstance(entry, dict) else None
        if type(category_id) is not int or not isinstance(entry.get("name"), str):
            raise InputError(f"{source}: category {short(entry)} needs an integer `id` and a text `name`")
        if category_id in names:
            raise InputError(f"{source}: category id {category_id} is defined twice")
        names[category_id] = entry["name"]
    ids = tuple(sorted(names))
    return Categories(ids, tuple(names[i] for i in ids))


def _read_images(source: Path, folder: Path, entries: list[Any]) -> tuple[list[int], list[tuple[int, int]], list[str]]:
    """Ids, (h, w) and file names, each checked; every file must exist below `folder`."""
    ids: list[int] = []
    sizes: list[tuple[int, int]] = []
    names: list[str] = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise InputError(f"{source}: image {short(entry)} is not a JSON object")
        image_id, name, height, width = (entry.get(key) for key in ("id", "file_name", "height", "width"))
        if type(image_id) is not int or not -(2**63) <= image_id < 2**63 or not isinstance(name, str):
            raise InputError(f"{source}: image {short(entry)} needs an integer `id` of 64 bits and a text `file_name`")
        if type(height) is not int or type(width) is not int or not (0 < height < 2**31 and 0 < width < 2**31):
            raise InputError(
                f"{source}: image id {image_id} ({name!r}) needs positive integers `height` and `width`, "
                f"got {short(height)} and {short(width)}"
            )
        if name.startswith("/") or ".." in name.split("/"):
            raise InputError(f"{source}: image id {image_id}: file_name {name!r} leaves the image folder {folder}")
        ids.append(image_id)
        sizes.append((height, width))
        names.append(name)
    if len(set(ids)) < len(ids):
        twice = [i for i, n in Counter(ids).items() if n > 1]
        raise InputError(f"{source}: image ids {twice[:5]} are defined more than once ({len(twice)} in all)")
    _check_images_exist(source, folder, names)
    return ids, sizes, names


def _check_images_exist(source: Path, folder: Path, names: Sequence[str]) -> None:
    """One listing per folder instead of one call per file."""
    present: set[str] = set()
    for parent in {"", *(name.rpartition("/")[0] for name in names)}:
        try:
            with os.scandir(folder / parent) as entries:
                present.update(os.path.join(parent, e.name) for e in entries if e.is_file())
        except ValueError:  # not the name of a folder; its images are missing
            continue
        except OSError as error:
            if parent:
                continue
            raise InputError(
                f"{folder}: cannot read the image folder ({error.strerror}). Paths are relative to the current "
                "folder; set data.train.images and data.val.images"
            ) from error
    missing = [name for name in names if name not in present and not os.path.isfile(folder / name)]
    if missing:
        raise InputError(
            f"{folder}: {len(missing):,} of the {len(names):,} images of {source} are missing, first {missing[0]!r}. "
            "Set data.train.images and data.val.images to the folder that holds them"
        )


def _pack(data: CocoAnnotations) -> dict[str, np.ndarray]:
    """The arrays that `_unpack` needs; source and folder are left to it."""
    rest = {
        "categories": data.categories.state_dict(),
        "num_crowd": data.num_crowd,
        "problems": [[p.annotation_id, p.reason, p.value, p.fatal] for p in data.problems],
    }
    arrays = {name: getattr(data, name).numpy() for name in TENSORS}
    return {**arrays, "rest": np.frombuffer(json.dumps(rest).encode(), np.uint8)}


def _unpack(arrays: dict[str, np.ndarray], *, source: Path, folder: Path) -> CocoAnnotations:
    """Inverse of `_pack`."""
    rest = json.loads(arrays["rest"].tobytes())
    return CocoAnnotations(
        source=source,
        folder=folder,
        categories=Categories.from_state_dict(rest["categories"]),
        num_crowd=rest["num_crowd"],
        problems=tuple(Problem(*fields) for fields in rest["problems"]),
        **{name: torch.from_numpy(arrays[name]) for name in TENSORS},
    )


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _pack_names(names: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    packed = torch.from_numpy(np.frombuffer(b"".join(names), np.uint8).copy())
    return packed, _offsets(torch.tensor([len(name) for name in names], dtype=torch.int64))
