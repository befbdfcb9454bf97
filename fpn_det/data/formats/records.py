"""COCO-format files as they are: reading, dividing, merging and choosing classes, with everything that entries hold.

`fpn_det.data.coco` reads such files for training and keeps boxes only; here masks, attributes and licences stay.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fpn_det.data.coco import check_categories, garbage_collection_paused, read_coco_json
from fpn_det.data.formats.split import IMAGES, Counts, assign
from fpn_det.data.problems import Defect, Problem, problem, shown
from fpn_det.files import write_text
from fpn_det.structures import InputError

LISTS = ("images", "annotations", "categories")

Duplicates = Literal["fail", "unite", "first"]
"""Of an image that several merged files have: an error, all its annotations, or those of the first file."""

Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CocoRecords:
    """The content of a COCO-format file; entries are never changed in place.

    Attributes:
        source: the file.
        images: each with an integer `id` of its own and a text `file_name`.
        annotations: each of one of the images and categories; boxes are not looked at.
        categories: each with an integer `id` of its own and a text `name`.
        rest: what else the file holds, as `info` and `licenses`.
    """

    source: Path
    images: list[Entry]
    annotations: list[Entry]
    categories: list[Entry]
    rest: Entry

    def class_counts(self) -> dict[str, int]:
        """How many annotations each class has, in the order of the categories."""
        names = {category["id"]: category["name"] for category in self.categories}
        counts = dict.fromkeys(names.values(), 0)
        for annotation in self.annotations:
            counts[names[annotation["category_id"]]] += 1
        return counts

    def write(self, path: Path) -> None:
        """Write them as a COCO-format file, whole or not at all; its folder must exist.

        Raises:
            InputError: the file cannot be written.
        """
        content = {**self.rest, **{key: getattr(self, key) for key in LISTS}}
        write_text(path, json.dumps(content, separators=(",", ":")))


def read_records(path: Path) -> tuple[CocoRecords, list[Problem]]:
    """Read a COCO-format file, and say which entries had to be left out.

    Raises:
        InputError: what `fpn_det.data.coco.read_coco_json` raises, or a category without id or name.
    """
    with garbage_collection_paused():
        content = read_coco_json(path, "Name a file in COCO format; paths are relative to the current folder")
    categories = check_categories(path, content["categories"])
    problems: list[Problem] = []
    images = _usable_images(content["images"], problems)
    image_ids, category_ids = {image["id"] for image in images}, set(categories.ids)
    all_ids = {i for entry in content["images"] if (i := _integer(entry, "id")) is not None}
    annotations: list[Entry] = []
    for position, entry in enumerate(content["annotations"]):
        image_id, category_id = _integer(entry, "image_id"), _integer(entry, "category_id")
        if not isinstance(entry, dict):
            problems.append(problem(Defect.ANNOTATION_MALFORMED, position, None, entry))
        elif image_id not in all_ids:
            problems.append(problem(Defect.UNKNOWN_IMAGE, position, entry, entry.get("image_id")))
        elif category_id not in category_ids:
            problems.append(problem(Defect.UNKNOWN_CATEGORY, position, entry, entry.get("category_id")))
        elif image_id in image_ids:  # else it goes with its image
            annotations.append(entry)
    records = CocoRecords(
        source=path,
        images=images,
        annotations=annotations,
        categories=content["categories"],
        rest={key: value for key, value in content.items() if key not in LISTS},
    )
    return records, problems


def _usable_images(entries: list[Any], problems: list[Problem]) -> list[Entry]:
    of_id: dict[int | None, list[Any]] = defaultdict(list)
    for entry in entries:
        of_id[_integer(entry, "id")].append(entry)
    ambiguous = {image_id for image_id, alike in of_id.items() if any(other != alike[0] for other in alike)}
    taken: set[int] = set()
    images: list[Entry] = []
    for position, entry in enumerate(entries):
        image_id = _integer(entry, "id")
        if image_id is None:
            problems.append(problem(Defect.IMAGE_MALFORMED, position, entry, entry))
        elif image_id in ambiguous:
            problems.append(problem(Defect.IMAGE_AMBIGUOUS, position, entry, entry.get("file_name")))
        elif image_id in taken:
            problems.append(problem(Defect.IMAGE_REPEATED, position, entry, entry.get("file_name")))
        elif not isinstance(entry.get("file_name"), str):
            problems.append(problem(Defect.IMAGE_NAME, position, entry, entry.get("file_name")))
        else:
            taken.add(image_id)
            images.append(entry)
    return images


def _integer(entry: object, key: str) -> int | None:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if type(value) is int else None


def format_table(parts: Mapping[str, CocoRecords], *, with_shares: bool = False) -> str:
    """A table of what is in each part, one column each: images, boxes, and the boxes of each class.

    Args:
        parts: by name, with the same categories.
        with_shares: add which share of all its boxes each part has of a class.
    """
    rows: dict[str, list[int]] = {"images": [], "  without boxes": [], "boxes": [], "  crowd": []}
    classes = {category["name"]: [0] * len(parts) for part in parts.values() for category in part.categories}
    for place, part in enumerate(parts.values()):
        rows["images"].append(len(part.images))
        rows["  without boxes"].append(len(part.images) - len({a["image_id"] for a in part.annotations}))
        rows["boxes"].append(len(part.annotations))
        rows["  crowd"].append(sum(a.get("iscrowd") == 1 for a in part.annotations))
        for name, count in part.class_counts().items():
            classes[name][place] = count
    labels = [(name, name if len(name) <= 30 and name.isprintable() else shown(name)[:30]) for name in classes]
    lines = [*rows.items(), *((f"  {label}", classes[name]) for name, label in labels)]
    width = max(len(label) for label, _ in lines) + 2
    cells = [["", *parts], *([label, *_cells(counts, with_shares)] for label, counts in lines)]
    column = max(len(cell) for row in cells for cell in row[1:]) + 3
    return "\n".join(
        (f"{row[0]:<{width}}" + "".join(f"{cell:>{column}}" for cell in row[1:])).rstrip() for row in cells
    )


def _cells(counts: Sequence[int], with_shares: bool) -> list[str]:
    total = sum(counts)
    return [f"{n:,}" + (f" ({n / total:6.1%})" if with_shares and total else "") for n in counts]


# --- Dividing ---


def split_records(
    records: CocoRecords, fractions: Mapping[str, float], *, seed: int, group_by: str | None = None
) -> dict[str, CocoRecords]:
    """Divide by images, so that each part has its share of every class (`split.assign`).

    Ids stay as they are; each part has all categories. The division depends on file names, annotations and the seed,
    not on the order of the entries or on the ids of the images. Entries of one file name stay together.

    Args:
        records: what to divide.
        fractions: name of a part -> share, positive, of sum 1.
        seed: another seed, another division.
        group_by: a regular expression; images in whose file names it finds the same text (the first group of it, if it
            has one) stay together, as frames of one video. Each image that it is not found in is alone.

    Raises:
        InputError: the fractions or the expression are none, or a part would get no image.
    """
    _check_fractions(fractions)
    pattern = _pattern(group_by)
    group_of = {image["id"]: _group(image["file_name"], pattern) for image in records.images}
    groups: dict[str, Counts] = {group: Counter() for group in group_of.values()}
    for image in records.images:
        groups[group_of[image["id"]]][IMAGES] += 1
    for annotation in records.annotations:
        groups[group_of[annotation["image_id"]]][annotation["category_id"]] += 1
    part_of = assign(groups, list(fractions.values()), seed=seed)
    parts = {}
    for i, name in enumerate(fractions):
        inside = {image_id for image_id, group in group_of.items() if part_of[group] == i}
        if not inside:
            raise InputError(
                f"{records.source}: no image is left for {shown(name)}: {len(groups):,} "
                f"{'groups' if pattern else 'images'} are too few for these fractions"
            )
        parts[name] = _of_images(records, inside)
    return parts


def _check_fractions(fractions: Mapping[str, float]) -> None:
    if len(fractions) < 2 or not all(0 < value < 1 for value in fractions.values()):
        raise InputError(f"fractions {dict(fractions)}: expected two or more, each between 0 and 1")
    if abs(sum(fractions.values()) - 1) > 1e-6:
        raise InputError(f"fractions {dict(fractions)}: their sum is {sum(fractions.values()):.6g}, not 1")


def _pattern(group_by: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(group_by) if group_by is not None else None
    except re.error as error:
        raise InputError(f"{shown(group_by)}: is no regular expression ({error})") from error


def _group(name: str, pattern: re.Pattern[str] | None) -> str:
    found = pattern.search(name) if pattern else None
    text = found and found.group(1 if found.re.groups else 0)
    return f"image {name}" if text is None else f"group {text}"


def _of_images(records: CocoRecords, ids: set[int]) -> CocoRecords:
    return replace(
        records,
        images=[image for image in records.images if image["id"] in ids],
        annotations=[annotation for annotation in records.annotations if annotation["image_id"] in ids],
    )


# --- Classes ---


def choose_classes(
    records: CocoRecords,
    *,
    keep: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    drop_empty: bool = False,
) -> CocoRecords:
    """The same images with some of the classes, under other names.

    Ids stay as they are; classes that have the same name afterwards become the first of them.

    Args:
        records: what to choose from.
        keep: the names to keep; None keeps all.
        drop: the names to leave out.
        rename: old name -> new name.
        drop_empty: leave out images without annotations, whether they had some before or not.

    Raises:
        InputError: a name that no category has, or no category is left.
    """
    rename = rename or {}
    known = [category["name"] for category in records.categories]
    for name in [*(keep or ()), *drop, *rename]:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {shown(close[0])}?" if close else f"it has {shown(known)}"
            raise InputError(f"{records.source}: no category is called {shown(name)}; {hint}")
    of_name: dict[str, Entry] = {}
    new_ids: dict[int, int] = {}
    for category in records.categories:
        name = category["name"]
        if name in drop or (keep is not None and name not in keep):
            continue
        name = rename.get(name, name)
        new_ids[category["id"]] = of_name.setdefault(name, {**category, "name": name})["id"]
    if not of_name:
        raise InputError(f"{records.source}: none of its {len(known)} categories would be left")
    annotations = [
        {**annotation, "category_id": new_ids[annotation["category_id"]]}
        for annotation in records.annotations
        if annotation["category_id"] in new_ids
    ]
    chosen = replace(records, annotations=annotations, categories=[*of_name.values()])
    return _of_images(chosen, {a["image_id"] for a in annotations}) if drop_empty else chosen


# --- Merging ---


def merge_records(
    parts: Sequence[CocoRecords], folders: Sequence[Path], *, duplicates: Duplicates = "fail"
) -> tuple[CocoRecords, Path, list[Problem]]:
    """Put several data sets into one.

    Classes are the same if their names are; the categories of the first file keep their ids, others get the next.
    Images, annotations and licences are numbered anew, from 1. The images stay where they are: file names become
    relative to the deepest folder that holds all image folders. Of other keys of the files, the first one's count.

    Args:
        parts: the data sets.
        folders: the image folder of each.
        duplicates: see `Duplicates`; an image is the same if its path is.

    Returns:
        The merged data set, its image folder, and the images of several files: left out (`fail`: whoever calls this
        decides whether to go on; `first`), or kept (`unite`).

    Raises:
        InputError: an image has another size in another file.
    """
    root = Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))
    categories, category_ids = _unite_categories(parts)
    licenses, license_ids = _unite_licenses(parts)
    images: list[Entry] = []
    annotations: list[Entry] = []
    problems: list[Problem] = []
    of_path: dict[str, tuple[Entry, int]] = {}  # with the place of its file
    for i, (part, folder) in enumerate(zip(parts, folders, strict=True)):
        image_ids: dict[int, int] = {}
        for image in part.images:
            name = _relative(os.path.join(os.path.abspath(folder), image["file_name"]), root)
            new = {**image, "id": len(images) + 1, "file_name": name}
            if "license" in image:
                new["license"] = license_ids[i].get(str(image["license"]), image["license"])
            first, place = of_path.setdefault(name, (new, i))
            if place == i:
                images.append(new)
                image_ids[image["id"]] = new["id"]
                continue
            source = parts[place].source
            _check_same_size(first, source, new, part.source)
            defect = Defect.IMAGE_UNITED if duplicates == "unite" else Defect.IMAGE_IN_EARLIER
            problems.append(Problem(defect, None, image["id"], f"{shown(name)} in {part.source} and {source}"))
            if duplicates == "unite":
                image_ids[image["id"]] = first["id"]
        annotations += (
            {
                **annotation,
                "image_id": image_ids[annotation["image_id"]],
                "category_id": category_ids[i][annotation["category_id"]],
            }
            for annotation in part.annotations
            if annotation["image_id"] in image_ids
        )
    rest = {key: value for part in reversed(parts) for key, value in part.rest.items()}
    if licenses:
        rest["licenses"] = licenses
    merged = CocoRecords(
        source=parts[0].source,
        images=images,
        annotations=[{**annotation, "id": i} for i, annotation in enumerate(annotations, start=1)],
        categories=categories,
        rest=rest,
    )
    return merged, _shortest(root), problems


def _unite_categories(parts: Sequence[CocoRecords]) -> tuple[list[Entry], list[dict[int, int]]]:
    """The categories of all files by name, and for each file old id -> new id."""
    of_name: dict[str, Entry] = {}
    maps = []
    for part in parts:
        for category in part.categories:
            if category["name"] not in of_name:
                taken = max((known["id"] for known in of_name.values()), default=0)
                of_name[category["name"]] = {**category, "id": category["id"] if part is parts[0] else taken + 1}
        maps.append({category["id"]: of_name[category["name"]]["id"] for category in part.categories})
    return [*of_name.values()], maps


def _unite_licenses(parts: Sequence[CocoRecords]) -> tuple[list[Entry], list[dict[str, int]]]:
    """The licences of all files, those that differ in the id alone once, and for each file old id -> new id."""
    united: dict[str, Entry] = {}
    maps = []
    for part in parts:
        entries = part.rest.get("licenses")
        new_ids = {}
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict):
                key = json.dumps({k: v for k, v in entry.items() if k != "id"}, sort_keys=True)
                new_ids[str(entry.get("id"))] = united.setdefault(key, {**entry, "id": len(united) + 1})["id"]
        maps.append(new_ids)
    return [*united.values()], maps


def _shortest(path: Path) -> Path:
    """The path relative to the current folder, if it is in there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _relative(path: str, root: Path) -> str:
    return Path(os.path.relpath(os.path.normpath(path), root)).as_posix()


def _check_same_size(first: Entry, first_source: Path, image: Entry, source: Path) -> None:
    sizes = [(entry.get("width"), entry.get("height")) for entry in (first, image)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{source}: {shown(image['file_name'])} has width and height {shown(sizes[1])}, in {first_source} "
            f"{shown(sizes[0])}; correct one of them"
        )


def find_copies(folder: Path, names: Iterable[str]) -> list[Problem]:
    """The images that are byte for byte an earlier one, each as a problem; only files of one size are read.

    Args:
        folder: what the names are relative to.
        names: file names; those without a regular file are passed over.
    """
    of_size: dict[int, list[str]] = defaultdict(list)
    for name in names:
        try:
            status = os.stat(folder / name)
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(status.st_mode):
            of_size[status.st_size].append(name)
    copies: list[Problem] = []
    for alike in of_size.values():
        of_hash: dict[bytes, str] = {}
        for name in alike if len(alike) > 1 else ():
            try:
                with open(folder / name, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").digest()
            except OSError:
                continue
            first = of_hash.setdefault(found, name)
            if first != name:
                copies.append(Problem(Defect.IMAGE_COPY, None, None, f"{shown(name)} is {shown(first)}"))
    return copies
