"""YOLO: one text file per image, a line `class cx cy w h` per object in fractions of the image, and data.yaml.

Source: Ultralytics' documentation, "Object Detection Datasets Overview". Its readers turn images upright by their EXIF
orientation before they look at boxes, and so does this one.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tqdm import tqdm

from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.folder import escapes
from fpn_det.data.formats.image_folder import ImageFolder, read_sizes, stem
from fpn_det.data.formats.labels import (
    Box,
    Collector,
    Label,
    LabelledData,
    LabelledSplit,
    bounds,
    numbers,
    read_text,
)
from fpn_det.data.problems import Defect, Problem, shown
from fpn_det.files import write_errors, write_text
from fpn_det.structures import InputError

SETS = ("train", "val", "test")
"""The keys of data.yaml that name images."""

NO_LABELS = ("classes.txt", "labels.txt", "train.txt", "val.txt", "test.txt")
"""Text files that may lie among those of labels."""

TOLERANCE = 0.01
"""How far fractions may lie beyond 0..1, as those of boxes at the border do after rounding."""

Place = Literal["link", "copy", "none"]
"""What becomes of the image files: links to them, copies, or nothing."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where the parts of a data set are.

    Attributes:
        names: of the classes, by their index.
        folders: of the images of each split, or lists of images (*.txt).
        has_keypoints: lines hold keypoints after the box.
        missing: what data.yaml names for testing and is not there, as in exports without test images.
    """

    names: tuple[str, ...]
    folders: dict[str, list[Path]]
    missing: Sequence[Path] = ()
    has_keypoints: bool = False


def read_yolo(source: Path, *, images: Path | None = None, classes: Sequence[str] | None = None) -> LabelledData:
    """Read YOLO labels; what is wrong with single ones is collected, not raised.

    Labels of `.../images/a.jpg` are in `.../labels/a.txt`, or beside the image where no folder is called `images`; an
    image without such a file is one without objects. Polygons become the boxes around them.

    Args:
        source: data.yaml (its keys names, path, train, val, test), or a folder that holds it, or one other YAML file;
            or a folder with classes.txt (a name per line). Where no key names images, all below are one split `all`,
            or those in the folders images/train, images/val, images/test are a split each.
        images: the folder of the images, for all of `source`; for labels that are not laid out as above: the
            counterpart of `a/b.jpg` in it is `a/b.txt` in `source`, or in the folder `labels` there, if there is one.
        classes: the only classes, in the order of their ids; without data.yaml and classes.txt, the names of the
            indices. By default all of them.

    Raises:
        InputError: data.yaml, the names or a folder cannot be read, or there is no image.
    """
    layout = _read_layout(source, images, classes)
    labels = None if images is None else _labels_folder(source)
    problems: list[Problem] = []
    splits: dict[str, LabelledSplit] = {}
    for path in layout.missing:
        problems.append(Problem(Defect.SOURCE_SPLIT_MISSING, None, None, shown(str(path))))
    for split, folders in layout.folders.items():
        folder, files = _find_images(folders)
        collector = Collector(folder, problems, classes)
        for name in tqdm(files, desc=f"reading {split}", unit="image", disable=None, file=sys.stderr):
            path = folder.path / name
            _read_file(_labels_path(folder.path, name, labels), path, name, collector, layout)
        if all(folder.is_dir() for folder in folders):
            _note_orphans(folder, files, labels, collector)
        splits[split] = collector.split()
    return LabelledData(splits=splits, classes=tuple(classes or layout.names), problems=problems)


def _read_layout(source: Path, images: Path | None, classes: Sequence[str] | None) -> _Layout:
    config = _find_yaml(source)
    if config.is_file():
        content = _read_yaml(config)
        names = _read_names(config, content.get("names"))
        missing: list[Path] = []
        if images is None and any(content.get(key) for key in SETS):
            folders, missing = _read_folders(config, content)
        else:
            folders = _usual_folders(config.parent, images)
        return _Layout(names=names, folders=folders, missing=missing, has_keypoints="kpt_shape" in content)
    if not source.is_dir():
        raise InputError(f"{source}: no such file. Name data.yaml, or the folder that holds it or classes.txt")
    if (source / "classes.txt").is_file():
        names = tuple(line.strip() for line in read_text(source / "classes.txt").splitlines() if line.strip())
        _check_names(source / "classes.txt", names)
    elif classes:
        names = tuple(classes)
    else:
        raise InputError(
            f"{source}: neither data.yaml nor classes.txt is in it. Give the names of the classes, in the order of "
            "their indices, with --classes"
        )
    return _Layout(names=names, folders=_usual_folders(source, images))


def _usual_folders(source: Path, images: Path | None) -> dict[str, list[Path]]:
    root = images or (source / "images" if (source / "images").is_dir() else source)
    parts = {name: [root / name] for name in SETS if images is None and (root / name).is_dir()}
    return parts or {"all": [root]}


def _labels_folder(source: Path) -> Path:
    folder = source if source.is_dir() else source.parent
    return folder / "labels" if (folder / "labels").is_dir() else folder


def _find_yaml(source: Path) -> Path:
    """data.yaml in the folder, or the only other YAML file; the file itself, if it is no folder."""
    if not source.is_dir():
        return source
    usual = source / "data.yaml"
    if usual.exists() or (source / "classes.txt").exists():
        return usual
    found = [path for path in source.iterdir() if path.suffix in (".yaml", ".yml")]
    return found[0] if len(found) == 1 else usual


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: is not valid YAML ({reason[:200]})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys `names`, `train`, `val`; got {shown(content)}")
    return content


def _read_names(path: Path, names: object) -> tuple[str, ...]:
    """The class names of data.yaml, a list or a map from 0, 1, ... on."""
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, (str, int, float)) for name in names):
        raise InputError(f"{path}: names: expected a list of names, or a map of 0, 1, ... to names; got {shown(names)}")
    found = tuple(str(name) for name in names)  # YAML takes some names for numbers
    _check_names(path, found)
    return found


def _check_names(path: Path, names: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or not names:
        value = f"several classes are called {shown(repeated[0])}" if repeated else "no name"
        raise InputError(f"{path}: {value}; give every class a name of its own")


def _read_folders(path: Path, content: dict[str, Any]) -> tuple[dict[str, list[Path]], list[Path]]:
    """The folders and lists of each split, and those for testing that are not there."""
    root = path.parent
    stated = content.get("path")
    if isinstance(stated, str) and (root / stated).is_dir():  # else it is that of another machine
        root = root / stated
    folders: dict[str, list[Path]] = {}
    missing: list[Path] = []
    for key in SETS:
        values = content.get(key) or []
        values = values if isinstance(values, list) else [values]
        if not all(isinstance(value, str) and "\0" not in value for value in values):
            raise InputError(f"{path}: {key}: expected a folder or a list of folders; got {shown(content[key])}")
        found = []
        for value in values:
            tried = _candidates(path, root, value)
            existing = next((candidate for candidate in tried if candidate.exists()), None)
            if existing is not None:
                found.append(existing)
            elif key == "test":
                missing.append(tried[0])
            else:
                raise InputError(
                    f"{path}: {key}: {shown(value)} does not exist (looked for {tried[0]}); correct it, or `path`"
                )
        if found:
            folders[key] = found
    if not folders:
        raise InputError(f"{path}: no folder of images that it names is there")
    return folders, missing


def _candidates(path: Path, root: Path, value: str) -> list[Path]:
    """What data.yaml may mean: exports of Roboflow write `../train/images` for `train/images`, some tools `\\`."""
    value = value.replace("\\", "/")
    return [root / value, root / value.removeprefix("../"), path.parent / value]


def _find_images(sources: Sequence[Path]) -> tuple[ImageFolder, list[str]]:
    """The folder that holds all images of a split, and their names in it, sorted within each source."""
    listed: list[tuple[Path, list[str]]] = []
    for source in sources:
        if source.is_dir():
            listed.append((source, sorted(ImageFolder(source).names)))
            continue
        lines = [line.strip() for line in read_text(source).splitlines() if line.strip()]
        listed.append((source.parent, [line.removeprefix("./") for line in lines]))
    paths = [os.path.normpath(parent / name) for parent, names in listed for name in names]
    if not paths:
        raise InputError(f"{', '.join(map(str, sources))}: no image in this folder")
    if len(sources) == 1 and not any(escapes(name) for name in listed[0][1]):
        root = listed[0][0]
    else:
        root = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
    relative = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
    return ImageFolder(root), list(dict.fromkeys(relative))


def _labels_path(folder: Path, name: str, labels: Path | None) -> Path:
    """Where the labels of an image are: below `labels`, else the last folder called `images` becomes one so called."""
    if labels is not None:
        return labels / f"{stem(name)}.txt"
    head, found, tail = os.path.abspath(folder / name).rpartition(f"{os.sep}images{os.sep}")
    path = f"{head}{os.sep}labels{os.sep}{tail}" if found else str(folder / name)
    return Path(stem(path) + ".txt")


def _note_orphans(folder: ImageFolder, files: Sequence[str], labels: Path | None, collector: Collector) -> None:
    """Note the files of labels that belong to no image."""
    root = _labels_path(folder.path, "a", labels).parent
    known = {_labels_path(folder.path, name, labels) for name in files}
    for path in sorted(root.rglob("*.txt")):
        if path not in known and path.name not in NO_LABELS:
            collector.note(Defect.SOURCE_IMAGE_MISSING, str(path), shown(path.stem))


def _read_file(path: Path, image_path: Path, name: str, collector: Collector, layout: _Layout) -> None:
    found = [name] if name in collector.folder.names else []
    image = collector.image(str(image_path), found, None, called=name)
    if image is None or not path.exists():
        return
    try:
        lines = read_text(path).splitlines()
    except InputError as error:
        collector.images.remove(image)  # not an image without objects
        collector.note(Defect.SOURCE_UNREADABLE, str(path), str(error).removeprefix(f"{path}: "))
        return
    for position, line in enumerate(lines, start=1):
        if line.strip():
            label = _read_line(line, f"{path}:{position}", image.size, collector, layout)
            if label is not None:
                image.labels.append(label)


def _read_line(line: str, where: str, size: tuple[int, int], collector: Collector, layout: _Layout) -> Label | None:
    fields = numbers(line.split())
    if fields is None or not (len(fields) == 5 or (len(fields) >= 7 and (len(fields) % 2 or layout.has_keypoints))):
        collector.note(Defect.LABEL_MALFORMED, where, shown(line))
        return None
    index, *values = fields
    if not (index.is_integer() and 0 <= index < len(layout.names)):
        collector.note(Defect.LABEL_CLASS, where, f"class {shown(line.split()[0])}, {len(layout.names)} names")
        return None
    values = values[:4] if layout.has_keypoints else values
    if not all(-TOLERANCE <= value <= 1 + TOLERANCE for value in values):
        collector.note(Defect.LABEL_FRACTIONS, where, shown(line))
        return None
    height, width = size
    return collector.label(where, layout.names[int(index)], _box(values, height, width))


def _box(values: Sequence[float], height: int, width: int) -> Box:
    """XYXY in pixels from [cx, cy, w, h] or the points of a polygon, in fractions."""
    if len(values) == 4:
        cx, cy, w, h = values
        x1, y1, x2, y2 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    else:
        x1, y1, x2, y2 = bounds([*zip(values[::2], values[1::2], strict=True)])
    return x1 * width, y1 * height, x2 * width, y2 * height


def unfit_images(data: CocoAnnotations) -> dict[int, Problem]:
    """The images (index -> what is wrong) whose boxes readers of YOLO would misplace, or that cannot be opened."""
    found: dict[int, Problem] = {}
    sizes = [(h, w) for h, w in data.sizes.tolist()]
    for index in tqdm(range(len(data)), desc="opening images", unit="image", disable=None, file=sys.stderr):
        path, size = data.path(index), sizes[index]
        try:
            upright, stored = read_sizes(path)
        except InputError as error:
            defect, value = Defect.IMAGE_UNREADABLE, str(error)
        else:
            if size == upright:
                continue
            defect = Defect.IMAGE_TURNED if size == stored else Defect.IMAGE_SIZE_DIFFERS
            value = f"{path} is {upright[1]}x{upright[0]} (width x height), annotated {size[1]}x{size[0]}"
        found[index] = Problem(defect, None, int(data.image_ids[index]), value if value.isprintable() else shown(value))
    return found


def write_yolo(output: Path, splits: Mapping[str, CocoAnnotations], *, place: Place) -> None:
    """Write a data set as images/SPLIT, labels/SPLIT and data.yaml, which is written last.

    Each image gets a file of labels, an empty one without boxes. Coordinates have nine decimals: a box comes back to
    1e-4 of a pixel.

    Args:
        output: a folder that does not exist, or is empty.
        splits: by name, with the same categories.
        place: what becomes of the image files; links are to absolute paths.

    Raises:
        InputError: the folder is not empty or cannot be written, or two images would share a file of labels.
    """
    check_unused(output)
    names = {split: data.names() for split, data in splits.items()}
    for split, data in splits.items():
        if not names[split]:
            raise InputError(f"{data.source}: no image of it can be used")
        _check_stems(data, names[split])
    for split, data in splits.items():
        todo = tqdm(names[split], desc=f"writing {split}", unit="image", disable=None, file=sys.stderr)
        for index, name in enumerate(todo):
            labels = output / "labels" / split / f"{stem(name)}.txt"
            _write_file(labels, _lines(data, index))
            if place != "none":
                _place_image(data.path(index), output / "images" / split / name, place)
    categories = next(iter(splits.values())).categories
    content = {split: f"images/{split}" for split in splits} | {"names": dict(enumerate(categories.names))}
    write_text(output / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def check_unused(output: Path) -> None:
    """Refuse a path that exists, unless it is an empty folder.

    Raises:
        InputError: it does.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists and is not an empty folder; choose another, or delete it")


def _check_stems(data: CocoAnnotations, names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(stem(name), name)
        if other != name:
            raise InputError(
                f"{data.source}: {shown(other)} and {shown(name)} would share one file of labels; rename one of them"
            )
    repeated = [name for name, count in islice(Counter(names).most_common(1), 1) if count > 1]
    if repeated:
        raise InputError(f"{data.source}: {shown(repeated[0])} has several entries; give it one with all annotations")


def _lines(data: CocoAnnotations, index: int) -> str:
    boxes, labels = data.targets(index)
    height, width = data.sizes[index].tolist()
    boxes = boxes.double() / torch.tensor([width, height, width, height], dtype=torch.float64)
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    rows = torch.hstack([centres, sides]).tolist()
    return "".join(
        " ".join([str(label), *(f"{value:.9f}" for value in row)]) + "\n"
        for label, row in zip(labels.tolist(), rows, strict=True)
    )


def _write_file(path: Path, text: str) -> None:
    """Not by `files.replacing`, which waits for the disk: of 118,000 files, until data.yaml is there, none counts."""
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _place_image(source: Path, target: Path, place: Place) -> None:
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if place == "link":
            target.symlink_to(source.resolve())
        else:
            shutil.copyfile(source, target)
