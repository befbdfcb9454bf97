"""COCO-format annotations as flat tensors.

A data set of COCO's size is a million small Python objects; kept as such, each loader worker ends up with its own
copy (reading an object writes its reference count). Everything here is a handful of tensors instead, which workers
share. Crowd boxes and boxes that cannot be used are left out here; the evaluation reads the annotation file itself.

Dimensions: I images, B boxes of all images.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from reprlib import repr as short  # bounded in length and depth, whatever the file holds
from typing import Any

import torch
from torch import Tensor

from fpn_det.structures import Categories, InputError

CLIP_TOLERANCE_PX = 1.0
"""Boxes that reach further than this beyond their image are reported; rounding by labelling tools stays below."""


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
        counts = self.box_offsets.diff()
        keep = counts.nonzero().flatten().tolist()
        names = [bytes(self.name_bytes[a:b].numpy()) for a, b in self.name_offsets.unfold(0, 2, 1)[keep].tolist()]
        name_bytes, name_offsets = _pack_names(names)
        return replace(
            self,
            name_bytes=name_bytes,
            name_offsets=name_offsets,
            image_ids=self.image_ids[keep],
            sizes=self.sizes[keep],
            box_offsets=_offsets(counts[keep]),
        )

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

    Images keep the order of the file; class indices follow the ascending category ids.

    Args:
        annotations: the JSON file, with lists `images`, `annotations`, `categories`.
        images: the folder that each `file_name` is relative to.
        on_error: `drop` leaves boxes that cannot be used out of training and reports them in `problems`;
            `fail` refuses the data set. Unusable: not four finite numbers, no width or height, wholly outside the
            image, of an unknown image or category. Boxes partly outside are clipped.

    Raises:
        InputError: a missing, malformed or empty file, missing images, or unusable boxes with `on_error="fail"`.
    """
    data = read_coco_json(annotations)
    categories = _read_categories(annotations, data["categories"])
    image_ids, sizes, names = _read_images(annotations, images, data["images"])
    image_index = {image_id: i for i, image_id in enumerate(image_ids)}
    class_index = {category_id: i for i, category_id in enumerate(categories.ids)}

    problems: list[Problem] = []
    owners: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    num_crowd = 0
    for annotation in data["annotations"]:
        if not isinstance(annotation, dict):
            problems.append(Problem(None, "not a JSON object", short(annotation), fatal=True))
            continue
        owner = _lookup(image_index, annotation.get("image_id"))
        label = _lookup(class_index, annotation.get("category_id"))
        if owner is None or label is None:
            key = "image_id" if owner is None else "category_id"
            unknown = f"{key} that the file does not define"
            problems.append(Problem(annotation.get("id"), unknown, short(annotation.get(key)), fatal=True))
            continue
        if annotation.get("iscrowd"):
            num_crowd += 1
            continue
        box, reason = _usable_box(annotation.get("bbox"), size=sizes[owner])
        if reason:
            problems.append(Problem(annotation.get("id"), reason, short(annotation.get("bbox")), fatal=box is None))
        if box is not None:
            owners.append(owner)
            boxes.append(box)
            labels.append(label)

    if on_error == "fail" and any(p.fatal for p in problems):
        raise InputError(
            f"{annotations}: boxes that cannot be used:\n{format_problems(problems)}\n"
            "Correct the annotations, or train without these boxes with data.on_error=drop"
        )
    owner_tensor = torch.tensor(owners, dtype=torch.int64)
    order = owner_tensor.argsort(stable=True)
    name_bytes, name_offsets = _pack_names([os.fsencode(name) for name in names])
    return CocoAnnotations(
        source=annotations,
        folder=images,
        categories=categories,
        name_bytes=name_bytes,
        name_offsets=name_offsets,
        image_ids=torch.tensor(image_ids, dtype=torch.int64),
        sizes=torch.tensor(sizes, dtype=torch.int64),
        box_offsets=_offsets(owner_tensor.bincount(minlength=len(image_ids))),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)[order],
        labels=torch.tensor(labels, dtype=torch.int64)[order],
        num_crowd=num_crowd,
        problems=tuple(problems),
    )


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


def _lookup(index: dict[int, int], key: object) -> int | None:
    return index.get(key) if type(key) is int else None


def _usable_box(bbox: object, *, size: tuple[int, int]) -> tuple[tuple[float, float, float, float] | None, str | None]:
    """XYWH of the file -> (XYXY clipped to the image or None, what is wrong or None)."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return None, "bbox that is not [x, y, width, height]"
    # A comparison instead of math.isfinite, which overflows on integers of 400 digits.
    if not all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in bbox):
        return None, "bbox with a value that is not a finite number"
    x, y, w, h = map(float, bbox)
    if w <= 0 or h <= 0:
        return None, "bbox without area (width or height <= 0)"
    height, width = size
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return None, "bbox outside its image"
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    left, top, right, bottom = struct.unpack("4f", struct.pack("4f", x1, y1, x2, y2))  # what float32 keeps of it
    if right <= left or bottom <= top:
        return None, "bbox too thin to have an area in float32"
    outside = max(x1 - x, y1 - y, x + w - x2, y + h - y2)
    return (x1, y1, x2, y2), "bbox partly outside its image" if outside > CLIP_TOLERANCE_PX else None


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
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{source}: image id {image_id}: file_name {name!r} leaves the image folder {folder}")
        ids.append(image_id)
        sizes.append((height, width))
        names.append(name)
    if len(set(ids)) < len(ids):
        twice = [i for i, n in Counter(ids).items() if n > 1]
        raise InputError(f"{source}: image ids {twice[:5]} are defined more than once ({len(twice)} in all)")
    missing = _missing(folder, names)
    if missing:
        raise InputError(
            f"{folder}: {len(missing):,} of the {len(names):,} images of {source} are missing, first {missing[0]!r}. "
            "Set data.train.images and data.val.images to the folder that holds them"
        )
    return ids, sizes, names


def _missing(folder: Path, names: Iterable[str]) -> list[str]:
    """File names that do not exist below `folder`; one directory listing instead of one call per file."""
    try:
        present = {e.name for e in os.scandir(folder) if e.is_file()}
    except OSError as error:
        raise InputError(
            f"{folder}: cannot read the image folder ({error.strerror}). Paths are relative to the current folder; "
            "set data.train.images and data.val.images"
        ) from error
    return [name for name in names if name not in present and not os.path.isfile(folder / name)]


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _pack_names(names: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    packed = torch.tensor(list(b"".join(names)), dtype=torch.uint8)  # frombuffer refuses an empty buffer
    return packed, _offsets(torch.tensor([len(name) for name in names], dtype=torch.int64))
