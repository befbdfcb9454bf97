"""LabelMe: one JSON file per image, with shapes in continuous pixels.

Source: github.com/wkentaro/labelme, which turns images upright by their EXIF orientation before one draws on them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from fpn_det.data.formats.image_folder import ImageFolder, stem
from fpn_det.data.formats.labels import (
    Box,
    Collector,
    LabelledData,
    LabelledSplit,
    bounds,
    number,
    numbers,
    occurring_classes,
)
from fpn_det.data.problems import Defect, Problem, shown
from fpn_det.json_file import read_json
from fpn_det.structures import InputError

FEWEST_POINTS = {"rectangle": 2, "mask": 2, "polygon": 3, "oriented_rectangle": 4, "circle": 2}
"""The shapes that bound an area, and how many points they have at least."""


def read_labelme(
    folders: Sequence[Path], *, images: Path | None = None, classes: Sequence[str] | None = None
) -> LabelledData:
    """Read shapes; what is wrong with single ones is collected, not raised.

    An image belongs to the JSON file of its name; `imagePath` decides where that is not one image. `imageData` is not
    read.

    Args:
        folders: JSON files, in folders below, too; each is a split, called as the folder is.
        images: the folder of the images; by default they are in the folder of the JSON files.
        classes: the only classes, in the order of their ids; by default those that occur, sorted.

    Raises:
        InputError: a folder cannot be read or holds no JSON file, or two of them share a name.
    """
    if len({folder.resolve().name for folder in folders}) < len(folders):
        raise InputError(f"{', '.join(map(str, folders))}: two folders of one name, which is that of the split")
    problems: list[Problem] = []
    splits: dict[str, LabelledSplit] = {}
    num_unlabelled = 0
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; paths are relative to the current folder")
        files = sorted(folder.rglob("*.json"))
        if not files:
            raise InputError(f"{folder}: no JSON file in this folder")
        collector = Collector(ImageFolder(images or folder), problems, classes)
        name = folder.resolve().name
        for path in tqdm(files, desc=f"reading {name}", unit="file", disable=None, file=sys.stderr):
            _read_file(path, path.relative_to(folder).as_posix(), collector)
        splits[name] = collector.split()
        num_unlabelled += len(collector.unlabelled())
    return LabelledData(
        splits=splits,
        classes=tuple(classes or occurring_classes(splits.values())),
        problems=problems,
        num_unlabelled=num_unlabelled,
    )


def _read_file(path: Path, name: str, collector: Collector) -> None:
    try:
        content = read_json(path)
    except InputError as error:
        collector.note(Defect.SOURCE_UNREADABLE, str(path), str(error).removeprefix(f"{path}: "))
        return
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        collector.note(Defect.SOURCE_UNREADABLE, str(path), "expected a JSON object with a list `shapes`")
        return
    stated = content.get("imagePath")
    found = collector.folder.of_stem(stem(name))
    if len(found) != 1 and isinstance(stated, str) and "\0" not in stated:
        found = collector.folder.named(stated)
    height, width = number(content.get("imageHeight")), number(content.get("imageWidth"))
    size = (int(height), int(width)) if height and width else None
    image = collector.image(str(path), found, size, called=stated if isinstance(stated, str) else name)
    if image is None:
        return
    for position, shape in enumerate(shapes, start=1):
        where = f"{path}, shape {position}"
        if not isinstance(shape, dict):
            collector.note(Defect.LABEL_MALFORMED, where, shown(shape))
            continue
        kind, points = shape.get("shape_type") or "polygon", _points(shape.get("points"))
        fewest = FEWEST_POINTS.get(kind) if isinstance(kind, str) else None
        if fewest is None or (points is not None and len(points) < fewest):
            collector.note(Defect.LABEL_SHAPE, where, f"{shown(kind)} of points {shown(shape.get('points'))}")
            continue
        label = collector.label(where, shape.get("label"), None if points is None else _box(kind, points))
        if label is not None:
            image.labels.append(label)


def _points(value: object) -> list[tuple[float, float]] | None:
    """Points of two finite numbers each, None for all else."""
    if not isinstance(value, list):
        return None
    found = [numbers(point) if isinstance(point, list) and len(point) == 2 else None for point in value]
    return None if None in found else [(point[0], point[1]) for point in found if point is not None]


def _box(kind: str, points: Sequence[tuple[float, float]]) -> Box:
    """XYXY; of a circle by its centre and a point on it, of all else the box around the points in any order."""
    if kind == "circle":
        (x, y), on_circle = points[:2]
        radius = math.dist((x, y), on_circle)
        return x - radius, y - radius, x + radius, y + radius
    return bounds(points)
