"""COCO-format annotations as flat tensors.

A data set of COCO's size is a million small Python objects; kept as such, each loader worker ends up with its own
copy (reading an object writes its reference count). Everything here is a handful of tensors instead, which workers
share. Crowd boxes and what cannot be used are left out here; the evaluation reads the annotation file itself.

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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpn_det.data.cache import ArrayCache
from fpn_det.data.folder import escapes, find_defects
from fpn_det.data.problems import Defect, Problem, problem, shown
from fpn_det.json_file import read_json
from fpn_det.structures import Categories, InputError

CACHE_VERSION = 2
"""To be raised with every change of what is made of a file."""

CLIP_TOLERANCE_PX = 1.0
"""Boxes that reach further than this beyond their image are reported; rounding by labelling tools stays below."""

BOX_DEFECTS = (
    # The first that applies; the last three leave a box that can be used.
    Defect.BOX_INVERTED,
    Defect.BOX_EMPTY,
    Defect.BOX_OUTSIDE,
    Defect.BOX_THIN,
    Defect.BOX_CORNERS,
    Defect.BOX_LARGE,
    Defect.BOX_PARTLY_OUTSIDE,
)

MIN_BOXES_TO_JUDGE = 20
"""Fewer boxes may look like corners or fractions by chance."""

TENSORS = ("name_bytes", "name_offsets", "image_ids", "sizes", "box_offsets", "boxes", "labels")
"""The fields of `CocoAnnotations` that grow with the data."""

COUNTS = ("num_images_in_file", "num_images_lost", "num_annotations", "num_crowd")
"""The fields that are counts."""

REMEDY = (
    "Set data.train.annotations and data.val.annotations to annotation files; paths are relative to the current folder"
)


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
        num_images_in_file: entries of the list `images`.
        num_images_lost: images that were left out, repeated entries not counted.
        num_annotations: entries of the list `annotations`.
        num_crowd: crowd annotations that were left out, as COCO means it.
        problems: all that is wrong, in the order of the file.
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
    num_images_in_file: int
    num_images_lost: int
    num_annotations: int
    num_crowd: int
    problems: tuple[Problem, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_boxes_lost(self) -> int:
        """Boxes that were left out, on their own account or with their image; crowd boxes are none."""
        return self.num_annotations - self.num_crowd - len(self.boxes)

    def path(self, index: int) -> Path:
        """The image file of image `index`."""
        start, end = self.name_offsets[index : index + 2].tolist()
        return self.folder / os.fsdecode(bytes(self.name_bytes[start:end].numpy()))

    def names(self) -> list[str]:
        """The file names of all images."""
        names = self.name_bytes.numpy().tobytes()
        return [os.fsdecode(names[start:end]) for start, end in pairwise(self.name_offsets.tolist())]

    def targets(self, index: int) -> tuple[Tensor, Tensor]:
        """Boxes (G, 4) float32 XYXY and labels (G,) int64 of image `index`, in original pixels."""
        start, end = self.box_offsets[index : index + 2].tolist()
        return self.boxes[start:end], self.labels[start:end]

    def without_empty(self) -> CocoAnnotations:
        """The same data without the images that have no box to train on, which are not lost."""
        return self._select(self.box_offsets.diff() > 0)

    def only(self, indices: Sequence[int]) -> CocoAnnotations:
        """The same data with the images at these places alone, in the order of the file."""
        keep = torch.zeros(len(self), dtype=torch.bool)
        keep[list(indices)] = True
        return self._select(keep)

    def without(self, problems: dict[int, Problem]) -> CocoAnnotations:
        """The same data without images that turned out to be unusable (index -> what is wrong), and their boxes."""
        if not problems:
            return self
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[list(problems)] = False
        return replace(
            self._select(keep),
            num_images_lost=self.num_images_lost + len(problems),
            problems=(*self.problems, *problems.values()),
        )

    def _select(self, keep: Tensor) -> CocoAnnotations:
        """The images that a mask (I,) selects, with their boxes."""
        counts, lengths = self.box_offsets.diff(), self.name_offsets.diff()
        of_kept = keep.repeat_interleave(counts)
        return replace(
            self,
            name_bytes=self.name_bytes[keep.repeat_interleave(lengths)],
            name_offsets=_offsets(lengths[keep]),
            image_ids=self.image_ids[keep],
            sizes=self.sizes[keep],
            box_offsets=_offsets(counts[keep]),
            boxes=self.boxes[of_kept],
            labels=self.labels[of_kept],
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
            f"{self.num_images_lost:,} unusable images, {self.num_boxes_lost:,} boxes unusable or of such images"
        )


def load_coco(annotations: Path, images: Path, *, follow_links: bool = False) -> CocoAnnotations:
    """Read a COCO-format annotation file; what is wrong with its entries and images is collected, not raised.

    Whether the problems are too many, or such that nobody should train, is for the caller to ask `checks.refusals`.

    Images keep the order of the file; class indices follow the ascending category ids. What was read from a large file
    is kept in `$XDG_CACHE_HOME/fpn_det` (`~/.cache/fpn_det`) and used until the file changes; whether the images exist
    is looked up each time.

    Args:
        annotations: the JSON file, with lists `images`, `annotations`, `categories`.
        images: the folder that each `file_name` is relative to.
        follow_links: whether links in that folder may lead out of it; else the images behind them are left out.

    Raises:
        InputError: the file cannot be read at all (see `read_coco_json`), or the folder cannot.
    """
    cache = ArrayCache(annotations, version=CACHE_VERSION)
    kept = cache.read()
    if kept is not None:
        data = _unpack(kept, source=annotations, folder=images)
    else:
        with garbage_collection_paused():
            data = _parse(annotations, images)
        cache.write(_pack(data))
    names = data.names()
    data = data.without(
        {
            place: Problem(defect, None, int(data.image_ids[place]), shown(names[place]))
            for place, defect in find_defects(images, names, follow_links=follow_links).items()
        }
    )
    return replace(data, problems=(*data.problems, *_empty_categories(data)))


def read_coco_json(path: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """Read a COCO-format file and check its outline: three lists, `images` and `categories` not empty.

    Args:
        path: the file.
        remedy: what to do about a file that is not there or not the right one, for the message.

    Raises:
        InputError: what `read_json` raises, or the file is not of that outline.
    """
    data = read_json(path, remedy)
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            got = f"keys {shown(sorted(data))}" if isinstance(data, dict) else type(data).__name__
            if isinstance(data, dict) and key in data:
                got = f"{key}: {shown(data[key])}"
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
        InputError: what `read_coco_json` raises, or a category without id or name, or with the id of another.
    """
    return check_categories(path, read_coco_json(path)["categories"])


def check_categories(path: Path, entries: list[Any]) -> Categories:
    """The categories of the list `categories` of `path`.

    Raises:
        InputError: a category without id or name, or with the id of another.
    """
    categories, problems = _read_categories(entries)
    refused = [p for p in problems if p.defect.outcome == "refused"]
    if refused:
        raise InputError(f"{path}: category {refused[0].value}: {refused[0].defect.reason}")
    return categories


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Without it, reading millions of objects takes three times as long: they are searched again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parse(annotations: Path, images: Path) -> CocoAnnotations:
    """All of `load_coco` that depends on the annotation file alone."""
    content = read_coco_json(annotations)
    categories, category_problems = _read_categories(content["categories"])
    image_index, sizes, names, image_problems = _read_images(content["images"])
    image_ids = [image_id for image_id, index in image_index.items() if index is not None]
    class_index = {category_id: i for i, category_id in enumerate(categories.ids)}

    problems: list[Problem] = []
    positions: list[int] = []
    owners: list[int] = []
    labels: list[int] = []
    xywh: list[list[float]] = []
    ids: list[Any] = []
    num_crowd = 0
    for position, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict):
            problems.append(problem(Defect.ANNOTATION_MALFORMED, position, None, annotation))
            continue
        ids.append(annotation.get("id"))
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        label = class_index.get(category_id) if type(category_id) is int else None
        crowd, bbox = annotation.get("iscrowd"), annotation.get("bbox")
        if type(image_id) is not int or image_id not in image_index:
            problems.append(problem(Defect.UNKNOWN_IMAGE, position, annotation, image_id))
        elif label is None:
            problems.append(problem(Defect.UNKNOWN_CATEGORY, position, annotation, category_id))
        elif crowd:
            if crowd == 1:
                num_crowd += 1
            else:
                problems.append(problem(Defect.CROWD, position, annotation, crowd))
        elif defect := _malformed(bbox):
            problems.append(problem(defect, position, annotation, bbox))
        elif (owner := image_index[image_id]) is not None:  # else it goes with its image
            positions.append(position)
            owners.append(owner)
            labels.append(label)
            xywh.append(bbox)  # type: ignore[arg-type]  # _malformed has looked

    size_array, owner_array = np.array(sizes, np.int64).reshape(-1, 2), np.array(owners, np.int64)
    stated = np.array(xywh, np.float64).reshape(-1, 4)
    boxes, defects = _judge_boxes(stated, size_array[owner_array])
    usable = np.ones(len(boxes), bool)
    for i in np.flatnonzero(defects >= 0).tolist():
        defect, position = BOX_DEFECTS[defects[i]], positions[i]
        usable[i] = defect.outcome == "clipped"
        problems.append(problem(defect, position, content["annotations"][position], xywh[i]))
    problems += _repeated_ids(content["annotations"], ids)
    problems.sort(key=lambda found: found.position or 0)

    order = np.flatnonzero(usable)
    order = order[np.argsort(owner_array[order], kind="stable")]
    name_bytes, name_offsets = _pack_names(names)
    num_repeated = sum(p.defect is Defect.IMAGE_REPEATED for p in image_problems)
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
        num_images_in_file=len(content["images"]),
        num_images_lost=len(content["images"]) - num_repeated - len(image_ids),
        num_annotations=len(content["annotations"]),
        num_crowd=num_crowd,
        problems=(*_judge_all_boxes(stated, size_array[owner_array]), *category_problems, *image_problems, *problems),
    )


def _malformed(bbox: object) -> Defect | None:
    """Whether this is not four finite numbers."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return Defect.BOX_MALFORMED
    # A comparison instead of math.isfinite, which overflows on integers of 400 digits.
    if not all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in bbox):
        return Defect.BOX_NOT_FINITE
    return None


def _judge_boxes(xywh: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to their images, and say what is wrong with them.

    Args:
        xywh: (n, 4) float64, finite, as the file has them.
        sizes: (n, 2) (h, w) of their images.

    Returns:
        (n, 4) float32 XYXY, and (n,) indices into `BOX_DEFECTS`, -1 where nothing is wrong.
    """
    x, y, w, h = xywh.T
    height, width = sizes.T
    with np.errstate(over="ignore"):  # infinite is far outside, too
        stated = np.stack([x, y, x + w, y + h], 1)
        clipped = np.hstack([stated[:, :2].clip(min=0), np.minimum(stated[:, 2:], sizes[:, ::-1])])
        boxes = clipped.astype(np.float32)
        beyond = np.abs(stated - clipped).max(1, initial=0) > CLIP_TOLERANCE_PX
    fits_as_corners = (x >= 0) & (y >= 0) & (w > x) & (h > y) & (w <= width) & (h <= height)
    conditions = [
        (w < 0) | (h < 0),
        (w == 0) | (h == 0),
        (x >= width) | (y >= height) | (stated[:, 2] <= 0) | (stated[:, 3] <= 0),
        (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1]),
        beyond & fits_as_corners,
        (w > width + CLIP_TOLERANCE_PX) | (h > height + CLIP_TOLERANCE_PX),
        beyond,
    ]
    return boxes, np.select(conditions, range(len(conditions)), default=-1)


def _judge_all_boxes(xywh: np.ndarray, sizes: np.ndarray) -> list[Problem]:
    """Whether the boxes of a file mean something else than [x, y, width, height] in pixels; (n, 4) and (n, 2) (h, w).

    Corners: of at least 95 % the third value exceeds the first and the fourth the second, at least 10 % reach beyond
    their image as [x, y, width, height], and at most 1 % as [x1, y1, x2, y2] (by more than `CLIP_TOLERANCE_PX`).
    Fractions: in at least 95 %, all four values are within 0..1.
    """
    if len(xywh) < MIN_BOXES_TO_JUDGE:
        return []
    x, y, w, h = xywh.T
    height, width = sizes.T + CLIP_TOLERANCE_PX
    with np.errstate(over="ignore"):
        ordered = ((w > x) & (h > y)).mean()
        beyond = ((x + w > width) | (y + h > height)).mean()
    beyond_as_corners = ((w > width) | (h > height)).mean()
    if ordered >= 0.95 and beyond >= 0.10 and beyond_as_corners <= 0.01:
        value = f"{beyond:.1%} of {len(xywh):,} boxes reach beyond their image, {beyond_as_corners:.1%} as corners"
        return [Problem(Defect.ALL_CORNERS, None, None, value)]
    fractions = ((xywh >= 0) & (xywh <= 1)).all(1).mean()
    if fractions >= 0.95:
        value = f"{fractions:.1%} of {len(xywh):,} boxes have no value above 1, as {shown(xywh[0].tolist())}"
        return [Problem(Defect.ALL_FRACTIONS, None, None, value)]
    return []


def _repeated_ids(annotations: list[Any], ids: list[Any]) -> list[Problem]:
    """One problem for each `id` that several annotations have; `ids` are those of all that are objects."""
    plain = [i for i in ids if type(i) is int or type(i) is str]
    if len(set(plain)) == len(plain):
        return []
    counts, problems = Counter(plain), []
    for position, annotation in enumerate(annotations):
        value = annotation.get("id") if isinstance(annotation, dict) else None
        if (type(value) is int or type(value) is str) and (count := counts.pop(value, 1)) > 1:
            number = f"{count:,} annotations"
            problems.append(replace(problem(Defect.ANNOTATION_ID_REPEATED, position, annotation, None), value=number))
    return problems


def _read_categories(entries: list[Any]) -> tuple[Categories, list[Problem]]:
    """The categories that can be used, and what is wrong with the list."""
    names: dict[int, str] = {}
    seen: set[str] = set()
    problems: list[Problem] = []
    for position, entry in enumerate(entries):
        category_id = entry.get("id") if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if type(category_id) is not int or not isinstance(name, str):
            problems.append(problem(Defect.CATEGORY_MALFORMED, position, entry, entry))
            continue
        if category_id in names:
            problems.append(problem(Defect.CATEGORY_ID_REPEATED, position, entry, name))
        elif name in seen:
            problems.append(problem(Defect.CATEGORY_NAME_REPEATED, position, entry, name))
        names.setdefault(category_id, name)
        seen.add(name)
    ids = tuple(sorted(names))
    return Categories(ids, tuple(names[i] for i in ids)), problems


def _empty_categories(data: CocoAnnotations) -> list[Problem]:
    counts = torch.bincount(data.labels, minlength=len(data.categories)).tolist()
    categories = zip(data.categories.ids, data.categories.names, counts, strict=True)
    return [problem(Defect.CATEGORY_EMPTY, None, {"id": i}, name) for i, name, count in categories if count == 0]


def _read_images(
    entries: list[Any],
) -> tuple[dict[int, int | None], list[tuple[int, int]], list[bytes], list[Problem]]:
    """Which images can be used, and what is wrong with the others.

    Returns:
        For each id the index of its image, None where that is left out; (h, w) and the encoded file names of the
        images; the problems.
    """
    first: dict[int, int] = {}  # id -> position
    repeated: set[int] = set()  # positions
    ambiguous: set[int] = set()  # ids
    for position, entry in enumerate(entries):
        image_id = _image_id(entry)
        if image_id is None:
            continue
        place = first.setdefault(image_id, position)
        if place != position:
            if all(entry.get(key) == entries[place].get(key) for key in ("file_name", "height", "width")):
                repeated.add(position)
            else:
                ambiguous.add(image_id)

    index: dict[int, int | None] = dict.fromkeys(first)
    sizes: list[tuple[int, int]] = []
    names: list[bytes] = []
    seen: set[str] = set()
    problems: list[Problem] = []
    for position, entry in enumerate(entries):
        image_id = _image_id(entry)
        if image_id is None:
            problems.append(problem(Defect.IMAGE_MALFORMED, position, entry, entry))
            continue
        name, size = entry.get("file_name"), (entry.get("height"), entry.get("width"))
        if image_id in ambiguous:
            problems.append(problem(Defect.IMAGE_AMBIGUOUS, position, entry, name))
        elif position in repeated:
            problems.append(problem(Defect.IMAGE_REPEATED, position, entry, name))
        elif (encoded := _encoded(name)) is None:
            problems.append(problem(Defect.IMAGE_NAME, position, entry, name))
        elif escapes(name):
            problems.append(problem(Defect.IMAGE_ESCAPES, position, entry, name))
        elif not all(type(side) is int and 0 < side < 2**31 for side in size):
            problems.append(problem(Defect.IMAGE_SIZE, position, entry, {"height": size[0], "width": size[1]}))
        else:
            if name in seen:
                problems.append(problem(Defect.IMAGE_NAME_REPEATED, position, entry, name))
            seen.add(name)
            index[image_id] = len(sizes)
            sizes.append(size)
            names.append(encoded)
    return index, sizes, names, problems


def _image_id(entry: object) -> int | None:
    image_id = entry.get("id") if isinstance(entry, dict) else None
    return image_id if type(image_id) is int and -(2**63) <= image_id < 2**63 else None


def _encoded(name: object) -> bytes | None:
    """A file name as the file system has it; None for what can be none."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:  # a lone surrogate
        return None


def _pack(data: CocoAnnotations) -> dict[str, np.ndarray]:
    """The arrays that `_unpack` needs; source and folder are left to it."""
    rest = {
        "categories": data.categories.state_dict(),
        "counts": {name: getattr(data, name) for name in COUNTS},
        "problems": [[p.defect.name, p.position, p.id, p.value] for p in data.problems],
    }
    arrays = {name: getattr(data, name).numpy() for name in TENSORS}
    return {**arrays, "rest": np.frombuffer(json.dumps(rest).encode(), np.uint8)}


def _unpack(arrays: dict[str, np.ndarray], *, source: Path, folder: Path) -> CocoAnnotations:
    """Inverse of `_pack`."""
    rest = json.loads(arrays["rest"].tobytes())
    tensors: dict[str, Any] = {name: torch.from_numpy(arrays[name]) for name in TENSORS}
    return CocoAnnotations(
        source=source,
        folder=folder,
        categories=Categories.from_state_dict(rest["categories"]),
        problems=tuple(Problem(Defect[name], *fields) for name, *fields in rest["problems"]),
        **rest["counts"],
        **tensors,
    )


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _pack_names(names: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    packed = torch.from_numpy(np.frombuffer(b"".join(names), np.uint8).copy())
    return packed, _offsets(torch.tensor([len(name) for name in names], dtype=torch.int64))
