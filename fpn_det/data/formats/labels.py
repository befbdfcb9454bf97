"""What the readers of all formats give: images with labelled boxes, and what was wrong with them.

Boxes are XYXY, absolute and continuous, in pixels of the image; sizes are (h, w).
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fpn_det.data.formats.image_folder import ImageFolder, Size, read_sizes
from fpn_det.data.formats.records import CocoRecords
from fpn_det.data.problems import Defect, Problem, shown
from fpn_det.structures import InputError

MAX_LABEL_BYTES = 2**26
"""Larger files with the labels of one image are not read."""

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
"""Folders that are a split each, and what it is called here."""

DECIMALS = 6
"""Of the numbers in a COCO-format file: a millionth of a pixel."""

Box = tuple[float, float, float, float]


class Label(NamedTuple):
    """One object.

    Attributes:
        name: of its class.
        box: XYXY in pixels of the image.
        is_crowd: whether it is a group, or not to be judged: no box to train on, and neither right nor wrong to find.
    """

    name: str
    box: Box
    is_crowd: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImage:
    """An image with its labels.

    Attributes:
        file_name: relative to the image folder, with `/`.
        size: (h, w) of the image that the boxes were drawn on.
        labels: its objects, none if it is empty.
    """

    file_name: str
    size: Size
    labels: list[Label] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LabelledSplit:
    """Images that belong together, as for training.

    Attributes:
        folder: what the file names are relative to.
        images: in the order in which they are written.
    """

    folder: Path
    images: list[LabelledImage]


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """A data set as a reader found it.

    Attributes:
        splits: by name (`train`, `val`, ...).
        classes: the names of all splits; the category ids are 1, 2, ... in this order.
        problems: what was left out or is odd, each with the file and the place in it.
        num_unlabelled: images of the folders that no labels are about; they are in no split.
    """

    splits: dict[str, LabelledSplit]
    classes: tuple[str, ...]
    problems: list[Problem]
    num_unlabelled: int = 0


class Collector:
    """Takes what a reader finds in the files of one split, and notes what cannot be taken.

    Attributes:
        folder: the images.
        problems: all that was wrong so far; several collectors may share the list.
        images: what could be taken.
    """

    def __init__(self, folder: ImageFolder, problems: list[Problem], classes: Iterable[str] | None = None) -> None:
        """Collect labels of these images.

        Args:
            folder: the images.
            problems: where to note what is wrong.
            classes: the only ones to take; None takes all.
        """
        self.folder = folder
        self.problems = problems
        self.images: list[LabelledImage] = []
        self._classes = None if classes is None else frozenset(classes)
        self._taken: dict[str, str] = {}  # file name -> where its labels are

    def note(self, defect: Defect, where: str, value: str = "") -> None:
        """Note a problem of what stands at `where`, a file or a place in it."""
        where = where if where.isprintable() else shown(where)
        self.problems.append(Problem(defect, None, None, f"{where}: {value}" if value else where))

    def image(self, where: str, found: Sequence[str], stated: Size | None, *, called: str) -> LabelledImage | None:
        """Take an image, without labels yet.

        Args:
            where: the file, or the place in it, that its labels are from.
            found: the images of the folder that it may be.
            stated: (h, w) that the labels say; None where they do not.
            called: what it is called there.

        Returns:
            The image, with its size from the file: upright, unless the labels state the size of the pixels as stored.
            None if it cannot be taken; that is noted.
        """
        if len(found) != 1:
            defect = Defect.SOURCE_IMAGE_UNCLEAR if found else Defect.SOURCE_IMAGE_MISSING
            self.note(defect, where, ", ".join(shown(name) for name in found[:3]) or shown(called))
            return None
        name = found[0]
        if name in self._taken:
            self.note(Defect.SOURCE_IMAGE_REPEATED, where, f"{shown(name)}, as {self._taken[name]}")
            return None
        self._taken[name] = where
        try:
            upright, stored = read_sizes(self.folder.path / name)
        except InputError as error:
            self.note(Defect.IMAGE_UNREADABLE, where, str(error))
            return None
        if stated not in (None, upright, stored):
            value = f"{shown(name)} is {upright[1]}x{upright[0]} (width x height), labelled {stated[1]}x{stated[0]}"
            self.note(Defect.IMAGE_SIZE_DIFFERS, where, value)
            return None
        image = LabelledImage(file_name=name, size=stated or upright)
        self.images.append(image)
        return image

    def label(self, where: str, name: object, box: Sequence[float] | None, *, is_crowd: bool = False) -> Label | None:
        """A label that was read, unless something is wrong with it, which is noted.

        Args:
            where: the place that it is from.
            name: its class.
            box: XYXY in pixels; None, or a value that is not finite, if it could not be read.
            is_crowd: see `Label`.
        """
        if not isinstance(name, str) or not name or box is None or not all(map(math.isfinite, box)):
            self.note(Defect.LABEL_MALFORMED, where, f"class {shown(name)}, box {shown(box)}")
            return None
        if self._classes is not None and name not in self._classes:
            self.note(Defect.LABEL_CLASS, where, shown(name))
            return None
        x1, y1, x2, y2 = box
        if x2 < x1 or y2 < y1:
            self.note(Defect.LABEL_INVERTED, where, f"{name if name.isprintable() else shown(name)} {shown([*box])}")
            return None
        if x2 == x1 or y2 == y1:
            self.note(Defect.LABEL_EMPTY, where, f"{name if name.isprintable() else shown(name)} {shown([*box])}")
        return Label(name, (x1, y1, x2, y2), is_crowd)

    def check_first_pixel(self, where: str, corners: Sequence[float]) -> None:
        """Note corners (XYXY) below 1 that were read as counted from 1: the data set may count from 0."""
        if min(corners[:2]) < 1:
            self.note(Defect.LABEL_BEFORE_FIRST, where, shown([*corners]))

    def unlabelled(self) -> set[str]:
        """The images of the folder that no labels are about."""
        return self.folder.names - set(self._taken)

    def split(self) -> LabelledSplit:
        """What was taken."""
        return LabelledSplit(folder=self.folder.path, images=self.images)


def number(value: object) -> float | None:
    """A finite number, or the text of one; None for all else, as `nan`, and thousands of digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        result = float(value)
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def numbers(values: Iterable[object]) -> list[float] | None:
    """Finite numbers, None unless all of the values are such."""
    found = [number(value) for value in values]
    return None if None in found else [value for value in found if value is not None]


def bounds(points: Sequence[Sequence[float]]) -> Box:
    """The box around points (x, y), of which there is at least one."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), min(ys), max(xs), max(ys)


def counted_from_1(corners: Sequence[float]) -> Box:
    """The continuous box of corners that count pixels from 1, the last one included.

    A pixel has a width here, so the corners xmin, xmax become x1 = xmin - 1, x2 = xmax; the same for y. Corners that
    coincide are no box of one pixel but a click without a drag: no area.
    """
    x1, y1, x2, y2 = corners
    if (x1 == x2 and y1 <= y2) or (y1 == y2 and x1 <= x2):
        return x1 - 1, y1 - 1, x1 - 1, y1 - 1
    # Swapped corners stay swapped, also those that lie next to each other.
    return x1 - 1, y1 - 1, x2 - (x2 < x1), y2 - (y2 < y1)


def read_bytes(path: Path) -> bytes:
    """The content of a file of labels.

    Raises:
        InputError: it cannot be read, is no regular file, or is too large to hold the labels of one image.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: not a regular file")
        if status.st_size > MAX_LABEL_BYTES:
            raise InputError(f"{path}: {status.st_size:,} bytes, more than {MAX_LABEL_BYTES:,}")
        with path.open("rb") as file:
            return file.read(status.st_size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_text(path: Path) -> str:
    """The text of a file of labels in UTF-8, with or without a byte order mark; errors are those of `read_bytes`.

    Raises:
        InputError: as said, or it is not UTF-8.
    """
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start:,} is not UTF-8: save the file as UTF-8") from error


def occurring_classes(splits: Iterable[LabelledSplit]) -> tuple[str, ...]:
    """The names of all labels, sorted."""
    return tuple(sorted({label.name for split in splits for image in split.images for label in image.labels}))


def to_records(split: LabelledSplit, classes: Sequence[str], *, source: Path, description: str) -> CocoRecords:
    """A split as the content of a COCO-format file.

    Images, annotations and categories are numbered from 1; `area` is that of the box.

    Args:
        split: the images; all classes of their labels are among `classes`.
        classes: the names in the order of their ids.
        source: where it is from.
        description: for `info`.
    """
    ids = {name: i for i, name in enumerate(classes, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(split.images, start=1):
        height, width = image.size
        images.append({"id": image_id, "file_name": image.file_name, "width": width, "height": height})
        for label in image.labels:
            x1, y1, x2, y2 = label.box
            w, h = x2 - x1, y2 - y1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[label.name],
                    "bbox": [round(value, DECIMALS) for value in (x1, y1, w, h)],
                    "area": round(w * h, DECIMALS),
                    "iscrowd": int(label.is_crowd),
                }
            )
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    rest = {"info": {"description": description}}
    return CocoRecords(source=source, images=images, annotations=annotations, categories=categories, rest=rest)
