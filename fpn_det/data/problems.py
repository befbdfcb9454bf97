"""What can be wrong with a data set: the kinds of defects, the problems that were found, and the report of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from reprlib import Repr
from typing import Any, Literal

What = Literal["file", "category", "image", "annotation"]
Outcome = Literal["refused", "left out", "clipped", "kept"]

_PLURALS = {"file": "files", "category": "categories", "image": "images", "annotation": "annotations"}
_BY_SEVERITY: tuple[Outcome, ...] = ("refused", "left out", "clipped", "kept")
_ENTRY = "Correct the entry, or delete it and its annotations"
_BOX = "Correct the bbox, which is [x, y, width, height] in pixels, or delete the annotation"
_CORNERS = "If it is [x1, y1, x2, y2], write [x1, y1, x2 - x1, y2 - y1]"


class Defect(Enum):
    """A kind of problem; the names are part of data_report.json and of cached annotations.

    Attributes:
        what: what has the defect.
        outcome: `refused`: no training with such a file; `left out`; `clipped` to the image, and used; `kept` as it is.
        reason: the defect in words.
        remedy: what to do about it.
    """

    what: What
    outcome: Outcome
    reason: str
    remedy: str

    def __init__(self, what: What, outcome: Outcome, reason: str, remedy: str) -> None:
        self.what = what
        self.outcome = outcome
        self.reason = reason
        self.remedy = remedy

    # The file as a whole
    ALL_CORNERS = (
        "file",
        "refused",
        "the boxes look like [x1, y1, x2, y2], not [x, y, width, height]",
        "Convert them: width = x2 - x1, height = y2 - y1",
    )
    ALL_FRACTIONS = (
        "file",
        "refused",
        "the boxes look like fractions of the image, not pixels",
        "Multiply x and width by the width of the image, y and height by its height",
    )
    SAME_FILE = (
        "file",
        "kept",
        "training and validation have the same annotation file, so the metrics are those of the training images",
        "If that is not meant, set data.val.annotations to another file",
    )

    # Categories
    CATEGORY_MALFORMED = ("category", "refused", "no integer `id` or no text `name`", "Correct the list `categories`")
    CATEGORY_ID_REPEATED = (
        "category",
        "refused",
        "an `id` that another category has",
        "Give every category an id of its own, and the annotations the right ones",
    )
    CATEGORY_NAME_REPEATED = (
        "category",
        "kept",
        "a `name` that another category has",
        "If they are the same class, give them one id",
    )
    CATEGORY_EMPTY = ("category", "kept", "no box to learn from", "Remove the category if it is not meant to occur")

    # Entries of images
    IMAGE_MALFORMED = ("image", "left out", "not a JSON object with an integer `id` of 64 bits", _ENTRY)
    IMAGE_NAME = ("image", "left out", "no text `file_name`, or one that no file can have", _ENTRY)
    IMAGE_SIZE = ("image", "left out", "no positive integers `height` and `width`", _ENTRY)
    IMAGE_REPEATED = ("image", "left out", "an entry that repeats an earlier one", "Delete all but one")
    IMAGE_AMBIGUOUS = (
        "image",
        "left out",
        "an `id` that another image has: whose its annotations are, nobody knows",
        "Give every image an id of its own",
    )
    IMAGE_NAME_REPEATED = (
        "image",
        "kept",
        "a `file_name` that another image has",
        "If it is the same image, give it one entry with all annotations",
    )

    # Files of images
    IMAGE_ESCAPES = (
        "image",
        "left out",
        "a `file_name` that leaves the image folder",
        "Write names relative to the image folder, without `..` and with `/` between folders",
    )
    IMAGE_LINK_ESCAPES = (
        "image",
        "left out",
        "a link out of the image folder",
        "If you trust the links of this folder, set data.follow_links=true",
    )
    IMAGE_MISSING = (
        "image",
        "left out",
        "no file of that name in the image folder (a folder or a pipe is none)",
        "Add the file or delete the entry; data.train.images and data.val.images name the folders",
    )
    IMAGE_UNREADABLE = ("image", "left out", "a file that cannot be decoded", "Replace the file or delete the entry")
    IMAGE_KILLS_DECODER = (
        "image",
        "left out",
        "a file whose decoding ended the process",
        "Replace the file or delete the entry",
    )
    IMAGE_SIZE_DIFFERS = (
        "image",
        "left out",
        "a file of another size than the entry says",
        "Correct `width` and `height` (and the boxes), or replace the file",
    )
    IMAGE_NOT_UPRIGHT = (
        "image",
        "kept",
        "a size that fits the pixels as stored, not the upright image: its EXIF orientation is not applied",
        "If the boxes were drawn on the upright image, swap `width` and `height`",
    )
    IMAGE_IN_BOTH = (
        "image",
        "kept",
        "the same file in training and validation, so the metrics are too good",
        "Keep it in one of them",
    )
    IMAGE_SAME_BYTES = (
        "image",
        "kept",
        "a copy, byte for byte, of a training image in validation, so the metrics are too good",
        "Keep it in one of them",
    )

    # Annotations
    ANNOTATION_MALFORMED = ("annotation", "left out", "not a JSON object", "Delete it")
    ANNOTATION_ID_REPEATED = (
        "annotation",
        "kept",
        "an `id` of several annotations",
        "Look whether boxes are in the file twice; number the annotations from 1",
    )
    UNKNOWN_IMAGE = (
        "annotation",
        "left out",
        "image_id that the file does not define",
        "Add the image or delete the annotation",
    )
    UNKNOWN_CATEGORY = (
        "annotation",
        "left out",
        "category_id that the file does not define",
        "Add the category or delete the annotation",
    )
    CROWD = ("annotation", "left out", "iscrowd that is neither 0 nor 1", "Write 1 for a group of objects, else 0")
    BOX_MALFORMED = ("annotation", "left out", "bbox that is not [x, y, width, height]", _BOX)
    BOX_NOT_FINITE = ("annotation", "left out", "bbox with a value that is not a finite number", _BOX)
    BOX_INVERTED = (
        "annotation",
        "left out",
        "bbox of negative width or height",
        f"Were its corners swapped? {_BOX}",
    )
    BOX_EMPTY = ("annotation", "left out", "bbox without area (width or height 0)", _BOX)
    BOX_OUTSIDE = ("annotation", "left out", "bbox outside its image", _BOX)
    BOX_THIN = ("annotation", "left out", "bbox too thin to have an area in float32", _BOX)
    BOX_CORNERS = (
        "annotation",
        "clipped",
        "bbox partly outside its image, which it would not be as [x1, y1, x2, y2]",
        _CORNERS,
    )
    BOX_LARGE = ("annotation", "clipped", "bbox larger than its image", _BOX)
    BOX_PARTLY_OUTSIDE = ("annotation", "clipped", "bbox partly outside its image", _BOX)

    # Labels of other formats (fpn_det/data/formats), when they are converted
    SOURCE_UNREADABLE = ("file", "left out", "labels that cannot be read", "Correct the file or delete it")
    SOURCE_IMAGE_MISSING = (
        "image",
        "left out",
        "labels of an image that is not in the image folder",
        "Add the image or delete its labels; --images names the folder",
    )
    SOURCE_IMAGE_UNCLEAR = (
        "image",
        "left out",
        "labels that could be those of several images",
        "Let only one image have that name, whatever its suffix",
    )
    SOURCE_IMAGE_REPEATED = (
        "image",
        "left out",
        "labels of an image that other labels are about, too",
        "Delete all but one of them",
    )
    LABEL_MALFORMED = (
        "annotation",
        "left out",
        "a label without a class or without finite coordinates",
        "Complete it or delete it",
    )
    LABEL_CLASS = (
        "annotation",
        "left out",
        "a class that is not among the classes",
        "Add it to --classes (YOLO: to `names`), or delete the label",
    )
    LABEL_INVERTED = ("annotation", "left out", "a box whose corners are swapped", "Swap them back or delete the label")
    LABEL_FRACTIONS = (
        "annotation",
        "left out",
        "coordinates that are not fractions of the image, from 0 to 1",
        "Divide x by the width of the image and y by its height, or delete the label",
    )
    LABEL_SHAPE = (
        "annotation",
        "left out",
        "a shape that bounds no area",
        "Draw a rectangle or a polygon, or delete the label",
    )
    LABEL_EMPTY = (
        "annotation",
        "kept",
        "a box without area, a slip of the mouse: written as such, training leaves it out",
        "Draw it anew or delete the label",
    )
    LABEL_BEFORE_FIRST = (
        "annotation",
        "kept",
        "a corner before the first pixel, which was taken to be 1",
        "If the tool that wrote them counts from 0 (CVAT, Roboflow), each box is off by a pixel: add --zero-based, or "
        "leave out --one-based (CSV)",
    )
    SOURCE_SPLIT_MISSING = (
        "file",
        "left out",
        "the images of a split are not there",
        "Correct the path in data.yaml, or delete the line if there is no such split",
    )
    IMAGE_TURNED = (
        "image",
        "left out",
        "boxes in the frame of the pixels as stored: readers of YOLO turn the image by its EXIF orientation",
        "Remove the orientation from the file",
    )
    IMAGE_UNITED = (
        "image",
        "kept",
        "an image of several of the merged files: it has the annotations of all of them",
        "If they were made twice, take --duplicates first",
    )
    IMAGE_IN_EARLIER = (
        "image",
        "left out",
        "an image that an earlier one of the merged files has, too",
        "Take --duplicates unite for the annotations of both files, or first for those of the earlier one",
    )
    IMAGE_COPY = (
        "image",
        "kept",
        "a copy, byte for byte, of another image: divided later, it may be in training and in validation",
        "Delete the entry of one of them",
    )


@dataclass(frozen=True, slots=True)
class Problem:
    """One defect of one thing.

    Attributes:
        defect: what is wrong.
        position: where in its list of the file it stands, from 0; None where that is not known.
        id: its `id`, in words (`shown`) unless an integer of 64 bits; None where it has none.
        value: what the file says, in words: one line, printable, of bounded length.
    """

    defect: Defect
    position: int | None
    id: int | str | None
    value: str


def problem(defect: Defect, position: int | None, entry: object, value: object) -> Problem:
    """The problem of an `entry` of the file, with the value that is wrong."""
    found = entry.get("id") if isinstance(entry, dict) else None
    is_plain = found is None or (type(found) is int and -(2**63) <= found < 2**63)
    return Problem(defect, position, found if is_plain else shown(found), shown(value))


def shown(value: object) -> str:
    """A value of the file in words: one line of at most 200 characters, control characters escaped."""
    text = _REPR.repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlist = 4  # bounded in depth too, by default


def format_problems(problems: Iterable[Problem], limit: int = 5) -> str:
    """A readable report: one paragraph per defect with count, outcome, the first ids with their values, and remedy.

    What was left out stands before what was clipped, and that before what was kept; the frequent before the rare.
    """
    groups: dict[Defect, list[Problem]] = {}
    for found in problems:
        groups.setdefault(found.defect, []).append(found)
    ordered = sorted(groups.items(), key=lambda group: (_BY_SEVERITY.index(group[0].outcome), -len(group[1])))
    return "\n".join(_paragraph(defect, alike, limit) for defect, alike in ordered)


def _paragraph(defect: Defect, alike: Sequence[Problem], limit: int) -> str:
    first = "; ".join(f"{_name(p)}{p.value}" for p in alike[:limit])
    more = "; ..." if len(alike) > limit else ""
    noun = defect.what if len(alike) == 1 else _PLURALS[defect.what]
    return f"  {len(alike):,} {noun} {defect.outcome}: {defect.reason}\n      {first}{more}\n      {defect.remedy}."


def _name(found: Problem) -> str:
    if found.id is not None:
        return f"id {found.id}: "
    return f"entry {found.position}: " if found.position is not None else ""


def as_record(found: Problem, file: object) -> dict[str, Any]:
    """The problem as plain data for data_report.json; `file` is the annotation file."""
    return {
        "file": str(file),
        "what": found.defect.what,
        "id": found.id,
        "position": found.position,
        "value": found.value,
        "defect": found.defect.name,
        "reason": found.defect.reason,
        "outcome": found.defect.outcome,
        "remedy": found.defect.remedy,
    }
