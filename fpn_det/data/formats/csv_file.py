"""CSV: one row per object, in the columns that common tools write.

| from | columns |
|---|---|
| keras-retinanet, torchvision tutorials | path,x1,y1,x2,y2,class, with or without a header |
| TensorFlow's and Roboflow's exports | filename,width,height,class,xmin,ymin,xmax,ymax |
| Open Images | ImageID,...,LabelName,...,XMin,XMax,YMin,YMax,...,IsGroupOf,...: fractions of the image |

A row without corners and class is an image without objects.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from fpn_det.data.formats.image_folder import ImageFolder
from fpn_det.data.formats.labels import (
    Collector,
    LabelledData,
    LabelledImage,
    LabelledSplit,
    number,
    numbers,
    occurring_classes,
)
from fpn_det.data.problems import Defect, Problem, shown
from fpn_det.structures import InputError

HEADERS = {
    "image": (
        "path",
        "filename",
        "file_name",
        "file",
        "image",
        "image_path",
        "image_name",
        "img_path",
        "imageid",
        "image_id",
    ),
    "class": ("class", "class_name", "label", "label_name", "labelname", "name", "category", "category_name"),
    "x1": ("x1", "xmin", "x_min", "left"),
    "y1": ("y1", "ymin", "y_min", "top"),
    "x2": ("x2", "xmax", "x_max", "right"),
    "y2": ("y2", "ymax", "y_max", "bottom"),
    "width": ("width", "image_width", "img_width"),
    "height": ("height", "image_height", "img_height"),
    "crowd": ("isgroupof", "iscrowd", "is_crowd"),
}
"""What a column is called, in lower case: the first name that a file has."""

REQUIRED = ("image", "class", "x1", "y1", "x2", "y2")
HEADERLESS = ("image", "x1", "y1", "x2", "y2", "class")
DELIMITERS = ",;\t"

MIN_ROWS_TO_JUDGE = 20
"""Fewer boxes may look like fractions by chance."""


class _Row(NamedTuple):
    line: int
    values: dict[str, str]


def read_csv(
    paths: Sequence[Path],
    *,
    images: Path,
    classes: Sequence[str] | None = None,
    normalized: bool = False,
    one_based: bool = False,
) -> LabelledData:
    """Read tables of boxes; what is wrong with single rows is collected, not raised.

    The delimiter is a comma, semicolon or tab, the encoding UTF-8. Images are looked up in `images` by the path in the
    row, else by its file name in any folder; ids without a suffix (Open Images) by the name of the file without it.

    Args:
        paths: the files; each is a split, called as the file is.
        images: the folder of the images.
        classes: the only classes, in the order of their ids; by default those that occur, sorted.
        normalized: corners are fractions of the image; of Open Images they always are.
        one_based: corners count pixels from 1, the last one included, as in tables that were made of VOC XML.

    Raises:
        InputError: a file is not such a table, two files share a name, or the boxes look like fractions.
    """
    if len({path.stem for path in paths}) < len(paths):
        raise InputError(f"{', '.join(map(str, paths))}: two files of one name, which is that of the split; rename one")
    problems: list[Problem] = []
    splits: dict[str, LabelledSplit] = {}
    folder = ImageFolder(images)
    unlabelled = set(folder.names)
    for path in paths:
        collector = Collector(folder, problems, classes)
        rows, is_open_images = _read_rows(path)
        fractions = normalized or is_open_images
        if not fractions:
            _refuse_fractions(path, rows)
        _take_rows(path, rows, collector, fractions=fractions, one_based=one_based)
        splits[path.stem] = collector.split()
        unlabelled &= collector.unlabelled()
    return LabelledData(
        splits=splits,
        classes=tuple(classes or occurring_classes(splits.values())),
        problems=problems,
        num_unlabelled=len(unlabelled),
    )


def _read_rows(path: Path) -> tuple[list[_Row], bool]:
    """The rows with their columns by our names, and whether they are Open Images' (fractions)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start:,} is not UTF-8: save the file as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    first = text.split("\n", 1)[0]
    if not first.strip():
        raise InputError(f"{path}: the first line is empty; expected the names of the columns")
    delimiter = max(DELIMITERS, key=first.count)
    lines = _parse(path, text, delimiter)
    _, header = next(lines)
    columns = _columns(header)
    if columns is None:
        if not _is_row(header):
            wanted = "; ".join(f"{key}: {', '.join(HEADERS[key][:4])}" for key in REQUIRED)
            raise InputError(f"{path}: not all columns are there ({wanted}). It has {shown(list(header))}; rename them")
        columns = {key: place for place, key in enumerate(HEADERLESS)}
        lines = chain([(1, header)], lines)
    rows = [
        _Row(line, {key: fields[i].strip() if i < len(fields) else "" for key, i in columns.items()})
        for line, fields in lines
        if any(field.strip() for field in fields)
    ]
    if not rows:
        raise InputError(f"{path}: no row below the names of the columns")
    names = {name.strip().lower() for name in header}
    return rows, {"imageid", "isgroupof"} <= names


def _parse(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for fields in reader:
            yield reader.line_num, fields
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: is not valid CSV ({error})") from error


def _columns(header: Sequence[str]) -> dict[str, int] | None:
    """Column -> place; None if one that is required is missing."""
    places = {name.strip().lower(): i for i, name in reversed([*enumerate(header)])}
    found = {key: next((places[n] for n in names if n in places), None) for key, names in HEADERS.items()}
    if any(found[key] is None for key in REQUIRED):
        return None
    return {key: i for key, i in found.items() if i is not None}


def _is_row(fields: Sequence[str]) -> bool:
    """Whether the first line holds values, in the order of `HEADERLESS`."""
    corners = [field.strip() for field in fields[1:5]]
    return len(fields) == len(HEADERLESS) and (numbers(corners) is not None or not any(corners))


def _refuse_fractions(path: Path, rows: Sequence[_Row]) -> None:
    corners = [numbers(row.values[key] for key in ("x1", "y1", "x2", "y2")) for row in rows]
    boxes = [box for box in corners if box]
    if len(boxes) >= MIN_ROWS_TO_JUDGE and all(0 <= value <= 1 for box in boxes for value in box):
        raise InputError(
            f"{path}: no corner is above 1: they look like fractions of the image. If so, add --normalized"
        )


def _take_rows(path: Path, rows: Sequence[_Row], collector: Collector, *, fractions: bool, one_based: bool) -> None:
    images: dict[str, LabelledImage | None] = {}  # as the file calls them
    for row in tqdm(rows, desc=f"reading {path.stem}", unit="row", disable=None, file=sys.stderr):
        where, values = f"{path}:{row.line}", row.values
        name = values["image"]
        if name not in images:
            found = collector.folder.named(name) if name and "\0" not in name else []
            images[name] = collector.image(where, found, _stated_size(values), called=name)
        image = images[name]
        corners = [values[key] for key in ("x1", "y1", "x2", "y2")]
        if image is None or not any([*corners, values["class"]]):
            continue
        box = numbers(corners)
        if box is not None and fractions:
            if not all(0 <= value <= 1 for value in box):
                collector.note(Defect.LABEL_FRACTIONS, where, shown(corners))
                continue
            height, width = image.size
            box = [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
        elif box is not None and one_based:
            box = [box[0] - 1, box[1] - 1, box[2], box[3]]
        is_crowd = number(values.get("crowd", "0")) == 1
        label = collector.label(where, values["class"], box, is_crowd=is_crowd)
        if label is not None:
            image.labels.append(label)


def _stated_size(values: dict[str, str]) -> tuple[int, int] | None:
    height, width = number(values.get("height")), number(values.get("width"))
    return (int(height), int(width)) if height and width else None
