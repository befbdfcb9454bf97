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
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from fpn_det.data.formats.image_folder import ImageFolder
from fpn_det.data.formats.labels import (
    SPLIT_FOLDERS,
    Collector,
    LabelledData,
    LabelledImage,
    LabelledSplit,
    counted_from_1,
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

CORNERS = ("x1", "y1", "x2", "y2")
REQUIRED = ("image", "class", *CORNERS)
HEADERLESS = ("image", *CORNERS, "class")
DELIMITERS = ",;\t"

MIN_BOXES_TO_JUDGE = 20
"""Fewer boxes may look like fractions by chance."""


def read_csv(
    paths: Sequence[Path],
    *,
    images: Path,
    classes: Sequence[str] | None = None,
    normalized: bool = False,
    one_based: bool = False,
    class_names: Path | None = None,
) -> LabelledData:
    """Read tables of boxes; what is wrong with single rows is collected, not raised.

    The delimiter is a comma, semicolon or tab, the encoding UTF-8. Images are looked up in `images` by the path in the
    row, else by its file name in any folder; ids without a suffix (Open Images) by the name of the file without it.

    Args:
        paths: the files; each is a split, called as the file is, or, where these have one name, as its folder
            (Roboflow: train/_annotations.csv, valid/_annotations.csv).
        images: the folder of the images.
        classes: the only classes, in the order of their ids; by default those that occur, sorted.
        normalized: corners are fractions of the image; of Open Images they always are.
        one_based: corners count pixels from 1, the last one included, as in tables that were made of VOC XML.
        class_names: a table of two columns, what a class is called in `paths` and its name, as Open Images'
            class-descriptions-boxable.csv; classes that are not in it keep what they are called.

    Raises:
        InputError: a file is not such a table, two files share a name, or the boxes look like fractions.
    """
    names = {} if class_names is None else _read_class_names(class_names)
    problems: list[Problem] = []
    splits: dict[str, LabelledSplit] = {}
    folder = ImageFolder(images)
    unlabelled = set(folder.names)
    for split, path in _split_names(paths).items():
        collector = Collector(folder, problems, classes)
        with _open(path) as file:
            _read_table(_Table(path, file), collector, names, normalized=normalized, one_based=one_based)
        splits[split] = collector.split()
        unlabelled &= collector.unlabelled()
    return LabelledData(
        splits=splits,
        classes=tuple(classes or occurring_classes(splits.values())),
        problems=problems,
        num_unlabelled=len(unlabelled),
    )


def _split_names(paths: Sequence[Path]) -> dict[str, Path]:
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        folders = [path.resolve().parent.name for path in paths]
        names = [SPLIT_FOLDERS.get(folder, folder) for folder in folders]
    if len(set(names)) < len(names):
        raise InputError(f"{', '.join(map(str, paths))}: two files of one name, which is that of the split; rename one")
    return dict(zip(names, paths, strict=True))


def _read_class_names(path: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    try:
        with _open(path) as file:
            for row in csv.reader(file):
                if len(row) != 2:
                    raise InputError(f"{path}: expected two columns, a class and its name; got {shown(row)}")
                names[row[0].strip()] = row[1].strip()
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not valid CSV in UTF-8 ({error})") from error
    return names


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: cannot be read (it is a folder, a pipe or a device, not a file)")
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


class _Table:
    """The rows of a file, one after the other, by our names of the columns.

    Attributes:
        path: the file.
        columns: our name of a column -> its place.
        is_open_images: the header is Open Images'.
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path = path
        lines = self._lines(file)
        _, header = next(lines, (1, []))
        if not any(header):
            raise InputError(f"{path}: the first line is empty; expected the names of the columns")
        self._rows = lines
        columns = _columns(header)
        if columns is None:
            if not _is_row(header):
                wanted = "; ".join(f"{key}: {', '.join(HEADERS[key][:4])}" for key in REQUIRED)
                raise InputError(
                    f"{path}: not all columns are there ({wanted}). It has {shown(list(header))}; rename them (x2, y2 "
                    "are the other corner, not width and height)"
                )
            columns = {key: place for place, key in enumerate(HEADERLESS)}
            self._rows = chain([(1, header)], lines)
        self.columns = columns
        self.is_open_images = {"imageid", "isgroupof"} <= {name.strip().lower() for name in header}

    def _lines(self, file: TextIO) -> Iterator[tuple[int, list[str]]]:
        line = 0
        try:
            first = file.readline(csv.field_size_limit())
            file.seek(0)
            reader = csv.reader(file, delimiter=max(DELIMITERS, key=first.count))
            for fields in reader:
                line = reader.line_num
                yield line, fields
        except csv.Error as error:
            raise InputError(f"{self.path}:{line + 1}: is not valid CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: after line {line} it is not UTF-8: save the file as UTF-8") from error

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        for line, fields in self._rows:
            if any(fields):
                places = self.columns.items()
                yield line, {key: fields[i].strip() if i < len(fields) else "" for key, i in places}


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


def _read_table(
    table: _Table, collector: Collector, names: Mapping[str, str], *, normalized: bool, one_based: bool
) -> None:
    """Take the rows.

    Raises:
        InputError: there are none, or all corners look like fractions, and nobody said that they are.
    """
    path, fractions = table.path, normalized or table.is_open_images
    images: dict[str, LabelledImage | None] = {}  # as the file calls them
    num_boxes = num_small = 0
    for line, values in tqdm(table, desc=f"reading {path.stem}", unit="row", disable=None, file=sys.stderr):
        where, name = f"{path}:{line}", values["image"]
        if name not in images:
            found = collector.folder.named(name) if name and "\0" not in name else []
            images[name] = collector.image(where, found, _stated_size(values), called=name)
        image = images[name]
        corners = [values[key] for key in CORNERS]
        if image is None or not any([*corners, values["class"]]):
            continue
        stated = numbers(corners)
        box: Sequence[float] | None = None
        if stated is not None:
            num_boxes += 1
            is_small = all(0 <= value <= 1 for value in stated)
            num_small += is_small
            if fractions and not is_small:
                collector.note(Defect.LABEL_FRACTIONS, where, shown(corners))
                continue
            box = _in_pixels(stated, image, fractions=fractions, one_based=one_based)
        is_crowd = number(values.get("crowd", "0")) == 1
        class_name = names.get(values["class"], values["class"])
        label = collector.label(where, class_name, box, is_crowd=is_crowd)
        if label is not None:
            image.labels.append(label)
            if stated is not None and one_based and not fractions:
                collector.check_first_pixel(where, stated)
    if not images:
        raise InputError(f"{path}: no row below the names of the columns")
    if not fractions and num_boxes >= MIN_BOXES_TO_JUDGE and num_small == num_boxes:
        raise InputError(
            f"{path}: no corner is above 1: they look like fractions of the image. If so, add --normalized"
        )


def _in_pixels(box: Sequence[float], image: LabelledImage, *, fractions: bool, one_based: bool) -> Sequence[float]:
    if fractions:
        (x1, y1, x2, y2), (height, width) = box, image.size
        return x1 * width, y1 * height, x2 * width, y2 * height
    return counted_from_1(box) if one_based else box


def _stated_size(values: dict[str, str]) -> tuple[int, int] | None:
    height, width = number(values.get("height")), number(values.get("width"))
    return (int(height), int(width)) if height and width else None
