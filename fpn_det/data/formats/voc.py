"""Pascal VOC: one XML file per image, corners counted from 1, the last pixel included.

Source: the VOC2012 development kit, section 3 ("Ground truth annotation").
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from tqdm import tqdm

from fpn_det.data.formats.image_folder import ImageFolder, stem
from fpn_det.data.formats.labels import (
    SPLIT_FOLDERS,
    Collector,
    LabelledData,
    LabelledSplit,
    counted_from_1,
    number,
    numbers,
    occurring_classes,
    read_bytes,
    read_text,
)
from fpn_det.data.problems import Defect, Problem
from fpn_det.structures import InputError

Difficult = Literal["crowd", "keep", "drop"]
"""What becomes of objects that are marked as difficult: no box to train on, and neither right nor wrong to find, which
is VOC's own rule; an object like any other; nothing."""

SETS = ("train", "val", "test")
"""The files of ImageSets/Main that make up a data set; others repeat their images (`trainval`) or name one class."""

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(
    folder: Path,
    *,
    images: Path | None = None,
    sets: Mapping[str, Path] | None = None,
    classes: Sequence[str] | None = None,
    zero_based: bool = False,
    difficult: Difficult = "crowd",
) -> LabelledData:
    """Read XML annotations; what is wrong with single ones is collected, not raised.

    An image belongs to the XML file of its name; `filename` decides where that is not one image.

    Args:
        folder: XML files (in folders, too), or a data set as VOC lays it out: Annotations, JPEGImages, ImageSets.
        images: the folder of the images, by default JPEGImages, or `folder` where images lie beside the XML files.
        sets: files with one image name (without suffix) per line, by the name of the split; by default those of
            ImageSets/Main that are called train, val and test. Without any, all is one split `all`, unless all is in
            folders called train, valid (or val) and test, as Roboflow exports it: these are a split each then.
        classes: the only classes, in the order of their ids; by default those that occur, sorted.
        zero_based: the corners are continuous pixels from 0, as CVAT and Roboflow write them.
        difficult: see `Difficult`.

    Raises:
        InputError: a folder or set cannot be read, or there is no XML file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; paths are relative to the current folder")
    annotations = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    suffix = ".xml"
    files = {path.relative_to(annotations).as_posix()[: -len(suffix)]: path for path in annotations.rglob(f"*{suffix}")}
    if not files:
        raise InputError(f"{annotations}: no XML file in this folder")
    image_folder = _find_images(folder) if images is None else ImageFolder(images)
    main = folder / "ImageSets" / "Main"
    sets = sets or {name: main / f"{name}.txt" for name in SETS if (main / f"{name}.txt").is_file()}
    members = {name: _read_set(path) for name, path in sets.items()} or _by_folder(sorted(files))

    problems: list[Problem] = []
    splits: dict[str, LabelledSplit] = {}
    unlabelled = set(image_folder.names)
    for split, names in members.items():
        collector = Collector(image_folder, problems, classes)
        for name in tqdm(names, desc=f"reading {split}", unit="file", disable=None, file=sys.stderr):
            name = name if name in files else stem(name)  # some lists have the suffix of the image
            if name in files:
                _read_file(files[name], name, collector, zero_based=zero_based, difficult=difficult)
            else:
                path = annotations / f"{name}{suffix}"
                collector.note(Defect.SOURCE_UNREADABLE, str(path), f"no such file, but {sets[split]} names it")
        splits[split] = collector.split()
        unlabelled &= collector.unlabelled()
    return LabelledData(
        splits=splits,
        classes=tuple(classes or occurring_classes(splits.values())),
        problems=problems,
        num_unlabelled=len(unlabelled),
    )


def _find_images(folder: Path) -> ImageFolder:
    images = ImageFolder(folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder)
    if not images.names:
        raise InputError(f"{images.path}: no image in this folder; name the folder of the images with --images")
    return images


def _by_folder(names: Sequence[str]) -> dict[str, list[str]]:
    """The names of each split, if all are in folders that are called so; else all as one."""
    splits: dict[str | None, list[str]] = {}
    for name in names:
        first, slash, _ = name.partition("/")
        splits.setdefault(SPLIT_FOLDERS.get(first) if slash else None, []).append(name)
    return {"all": [*names]} if None in splits else {split: splits[split] for split in SETS if split in splits}


def _read_set(path: Path) -> list[str]:
    """The image names of a set; lines of a class's set end in -1, 0 or 1, which tells whether it occurs."""
    names = [re.sub(r"\s+(-1|0|1)$", "", line.strip()) for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path}: no image name in this file")
    return names


def _read_file(path: Path, name: str, collector: Collector, *, zero_based: bool, difficult: Difficult) -> None:
    try:
        root = parse_xml(read_bytes(path))
    except (InputError, ValueError) as error:
        collector.note(Defect.SOURCE_UNREADABLE, str(path), str(error).removeprefix(f"{path}: "))
        return
    if root.tag != "annotation":
        collector.note(Defect.SOURCE_UNREADABLE, str(path), "expected the element <annotation>")
        return
    stated = (root.findtext("filename") or "").strip()
    found = collector.folder.of_stem(name)
    if len(found) != 1:
        found = [n for n in found if n.rpartition("/")[2] == stated] or found or collector.folder.named(stated)
    height, width = number(root.findtext("size/height")), number(root.findtext("size/width"))
    size = (int(height), int(width)) if height and width else None  # many tools write 0
    image = collector.image(str(path), found, size, called=stated or name)
    if image is None:
        return
    for position, element in enumerate(root.iterfind("object"), start=1):
        is_difficult = (element.findtext("difficult") or "0").strip() == "1"
        if is_difficult and difficult == "drop":
            continue
        class_name = (element.findtext("name") or "").strip()
        corners = numbers(element.findtext(f"bndbox/{key}") for key in CORNERS)
        box = corners if corners is None or zero_based else counted_from_1(corners)
        where = f"{path}, object {position}"
        label = collector.label(where, class_name, box, is_crowd=is_difficult and difficult == "crowd")
        if label is not None:
            image.labels.append(label)
            if corners is not None and not zero_based:
                collector.check_first_pixel(where, corners)


def parse_xml(data: bytes) -> ElementTree.Element:
    """The root element of an XML text without a document type, which is where entities could be defined.

    Without one, nothing is expanded and no other file is opened.

    Raises:
        ValueError: it is not such an XML.
    """
    parser = ElementTree.XMLParser(target=_Builder())
    try:
        parser.feed(data)
        root = parser.close()
    except ElementTree.ParseError as error:
        raise ValueError(f"not valid XML: {error}") from error
    except LookupError as error:  # an encoding that nobody knows
        raise ValueError(f"not valid XML: {error}") from error
    assert isinstance(root, ElementTree.Element)
    return root


class _Builder(ElementTree.TreeBuilder):
    def doctype(self, name: str, public_id: str | None, system_id: str | None) -> None:
        raise ValueError("has a document type (<!DOCTYPE ...>), which no annotation needs: delete it")
