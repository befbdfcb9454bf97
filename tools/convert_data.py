"""Convert data sets to COCO format, which everything here reads, and to YOLO; divide, merge, choose classes.

    python tools/convert_data.py from-voc VOCdevkit/VOC2012 --output data/voc
    python tools/convert_data.py from-yolo my_yolo/data.yaml --output data/mine
    python tools/convert_data.py from-csv train.csv val.csv --images photos --output data/mine
    python tools/convert_data.py from-labelme labelled --output data/mine
    python tools/convert_data.py to-yolo --train train.json photos --val val.json photos --output yolo
    python tools/convert_data.py split all.json --fractions train=0.8 val=0.1 test=0.1 --output data/mine
    python tools/convert_data.py merge a.json b.json --images a_photos b_photos --output both.json
    python tools/convert_data.py subset all.json --keep car truck --rename truck=lorry --output some.json

Each prints what it read, what it left out and why, and the lines for the config. Images stay where they are (to-yolo
links or copies them). `COMMAND --help` has the options; `fpn_det/data/formats` says how each format is read.

Entries that cannot be used are counted all at once, the first of each kind listed with file and place (--examples says
how many), and nothing is written; with --on-error drop, all the others are. Existing files are kept unless there is
--overwrite.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from fpn_det.cli import say, user_errors
from fpn_det.data.checks import check_same_categories
from fpn_det.data.coco import load_coco
from fpn_det.data.formats.csv_file import read_csv
from fpn_det.data.formats.labelme import read_labelme
from fpn_det.data.formats.labels import LabelledData, to_records
from fpn_det.data.formats.records import (
    CocoRecords,
    Duplicates,
    choose_classes,
    find_copies,
    format_table,
    merge_records,
    read_records,
    split_records,
)
from fpn_det.data.formats.voc import Difficult, read_voc
from fpn_det.data.formats.yolo import Place, check_unused, read_yolo, unfit_images, write_yolo
from fpn_det.data.problems import Defect, Problem, format_problems, shown
from fpn_det.files import write_errors
from fpn_det.structures import InputError

SPLITS = ("train", "val", "test")


def main() -> None:
    """Read the command line and convert."""
    args = _parser().parse_args()
    with user_errors():
        args.command(args)


# --- To COCO format ---


def from_voc(args: argparse.Namespace) -> None:
    """Pascal VOC XML."""
    sets = {path.stem: path for path in args.sets}
    if len(sets) < len(args.sets):
        raise InputError("--sets: two files of one name, which is that of the split; rename one of them")
    data = read_voc(
        args.source,
        images=args.images,
        sets=sets,
        classes=args.classes,
        zero_based=args.zero_based,
        difficult=args.difficult,
    )
    _write_labels(data, args, "Pascal VOC XML")


def from_yolo(args: argparse.Namespace) -> None:
    """YOLO text files."""
    _write_labels(read_yolo(args.source, images=args.images, classes=args.classes), args, "YOLO labels")


def from_csv(args: argparse.Namespace) -> None:
    """Tables."""
    data = read_csv(
        args.source,
        images=args.images,
        classes=args.classes,
        normalized=args.normalized,
        one_based=args.one_based,
    )
    _write_labels(data, args, "CSV")


def from_labelme(args: argparse.Namespace) -> None:
    """LabelMe JSON."""
    _write_labels(read_labelme(args.source, images=args.images, classes=args.classes), args, "LabelMe JSON")


def _write_labels(data: LabelledData, args: argparse.Namespace, name: str) -> None:
    """Print what was read, write a file per split, and print how training will read it."""
    source = args.source[0] if isinstance(args.source, list) else args.source
    splits = {
        split: to_records(part, data.classes, source=source, description=f"Converted from {name}")
        for split, part in data.splits.items()
    }
    say(format_table(splits))
    if data.num_unlabelled:
        say(f"\nnot in it: {data.num_unlabelled:,} images that no labels are about")
    _settle(data.problems, args)
    for split, records in splits.items():
        if not records.images or not records.categories:
            what = "image" if not records.images else "class"
            raise InputError(f"{source}: no {what} to write for {shown(split)}; nothing was written")
    written = _write_folder(splits, args)
    for split, path in written.items():
        read = load_coco(path, data.splits[split].folder, follow_links=args.follow_links)
        say(f"\nas training reads it, {read.summary()}")
        if read.problems:
            say(format_problems(read.problems))
    _say_config(
        {split: (data.splits[split].folder, path) for split, path in written.items()}, follow_links=args.follow_links
    )
    if len(written) == 1 and not written.keys() & {"train", "val"}:
        ((split, path),) = written.items()
        _say_split(data.splits[split].folder, path)


# --- From COCO format ---


def to_yolo(args: argparse.Namespace) -> None:
    """YOLO text files, images and data.yaml."""
    given = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    if not given:
        raise InputError("give at least one of --train, --val, --test: an annotation file and its image folder")
    check_unused(args.output)
    splits = {
        split: load_coco(annotations, images, follow_links=args.follow_links)
        for split, (annotations, images) in given.items()
    }
    first = next(iter(splits.values()))
    for data in splits.values():
        check_same_categories(first, data)
    splits = {split: data.without(unfit_images(data)) for split, data in splits.items()}
    for split, data in splits.items():
        say(f"{split}: {data.summary()}")
    _settle([p for data in splits.values() for p in data.problems], args)
    write_yolo(args.output, splits, place=args.images)
    say(f"\nwritten: {args.output / 'data.yaml'}")


def split(args: argparse.Namespace) -> None:
    """Divide by fractions."""
    fractions = dict(args.fractions)
    if len(fractions) < len(args.fractions):
        raise InputError(f"--fractions: a name is there twice: {' '.join(name for name, _ in args.fractions)}")
    records = _read(args.source, args)
    parts = split_records(records, fractions, seed=args.seed, group_by=args.group_by)
    say(format_table(parts, with_shares=True))
    written = _write_folder(parts, args)
    _say_config({name: (args.images, path) for name, path in written.items()})


def merge(args: argparse.Namespace) -> None:
    """Put several data sets into one."""
    if len(args.images) != len(args.source):
        raise InputError(f"--images: {len(args.images)} folders for {len(args.source)} files; name one for each")
    parts = [_read(source, args) for source in args.source]
    merged, folder, problems = merge_records(parts, args.images, duplicates=args.duplicates)
    say(format_table({args.output.stem: merged}))
    problems += find_copies(folder, [image["file_name"] for image in merged.images])
    if problems:
        say(f"\n{format_problems(problems, args.examples)}")
    refused = [p for p in problems if p.defect is Defect.IMAGE_IN_EARLIER and args.duplicates == "fail"]
    if refused:
        raise InputError(
            f"{len(refused):,} images are in several of the files, as said above; nothing was written. Say which "
            "annotations to take: --duplicates unite or first"
        )
    _write({args.output: merged}, overwrite=args.overwrite)
    _say_config({args.output.stem: (folder, args.output)})


def subset(args: argparse.Namespace) -> None:
    """Keep, leave out and rename classes."""
    records = _read(args.source, args)
    rename = dict(_renaming(pair, records) for pair in args.rename)
    chosen = choose_classes(
        records, keep=args.keep, drop=args.drop, rename=rename, drop_empty=args.empty_images == "drop"
    )
    say(format_table({args.output.stem: chosen}))
    left_out = len(records.images) - len(chosen.images), len(records.annotations) - len(chosen.annotations)
    say(f"left out: {left_out[0]:,} images, {left_out[1]:,} boxes")
    _write({args.output: chosen}, overwrite=args.overwrite)
    _say_config({args.output.stem: (args.images, args.output)})


def _renaming(pair: str, records: CocoRecords) -> tuple[str, str]:
    """OLD=NEW; names may hold the sign, too, so OLD is the longest name of a category that fits."""
    names = [c["name"] for c in records.categories if pair.startswith(f"{c['name']}=")]
    old = max(names, key=len, default=pair.partition("=")[0])
    new = pair[len(old) + 1 :]
    if not new:
        raise InputError(f"--rename {shown(pair)}: expected OLD=NEW")
    return old, new


# --- What they share ---


def _read(path: Path, args: argparse.Namespace) -> CocoRecords:
    records, problems = read_records(path)
    _settle(problems, args)
    return records


def _settle(problems: Sequence[Problem], args: argparse.Namespace) -> None:
    """Print what is wrong; refuse to go on if entries would be lost and the user has not said that they may be."""
    if problems:
        say(f"\n{format_problems(problems, args.examples)}")
    lost = sum(p.defect.outcome in ("left out", "refused") for p in problems)
    if lost and args.on_error == "fail":
        raise InputError(
            f"{lost:,} {'entry' if lost == 1 else 'entries'} cannot be used, as said above; nothing was written. "
            "Correct the data, or go on without them with --on-error drop"
        )


def _write_folder(parts: Mapping[str, CocoRecords], args: argparse.Namespace) -> dict[str, Path]:
    """Write a file per part to the folder --output, and return their paths."""
    paths = {name: args.output / f"{name}.json" for name in parts}
    _write({paths[name]: records for name, records in parts.items()}, overwrite=args.overwrite)
    return paths


def _write(files: Mapping[Path, CocoRecords], *, overwrite: bool) -> None:
    for path in files:
        if path.exists() and not overwrite:
            raise InputError(f"{path}: exists; choose another --output, or replace it with --overwrite")
    for path, records in files.items():
        with write_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        records.write(path)
        say(f"written: {path}")


def _say_config(splits: Mapping[str, tuple[Path | None, Path]], *, follow_links: bool = False) -> None:
    """The lines of YAML that name these files; splits that the config does not know are comments."""
    say("\nfor the config (paths are relative to the folder that training runs in):")
    known = {name: _named(*paths) for name, paths in splits.items() if name in ("train", "val")}
    if known:
        say(_flow({"data": {**known, **({"follow_links": True} if follow_links else {})}}))
    for name, paths in splits.items():
        if name not in known:
            say(f"# {name}: {_flow(_named(*paths), flow=True)}")


def _say_split(images: Path, annotations: Path) -> None:
    """The command that makes a training and a validation set of a single file."""
    files = ["split", str(annotations), "--images", str(images), "--output", str(annotations.parent)]
    say("\nto divide it into a training and a validation set:")
    say(f"python tools/convert_data.py {shlex.join([*files, '--fractions', 'train=0.8', 'val=0.2'])}")


def _named(images: Path | None, annotations: Path) -> dict[str, str]:
    return {"images": "FOLDER OF THE IMAGES" if images is None else str(images), "annotations": str(annotations)}


def _flow(content: Mapping[str, Any], *, flow: bool | None = None) -> str:
    return yaml.safe_dump(content, default_flow_style=flow, width=2**20, sort_keys=False, allow_unicode=True).rstrip()


# --- The command line ---


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(command=command)
        added.add_argument(
            *("--on-error",),
            choices=("fail", "drop"),
            default="fail",
            help="entries that cannot be used: write nothing (default), or leave them out",
        )
        added.add_argument(
            *("--examples",), type=_natural, default=5, metavar="N", help="how many of each kind to list (default: 5)"
        )
        return added

    voc = add("from-voc", from_voc, "Pascal VOC XML to COCO format, one file per image set")
    voc.add_argument("source", type=Path, help="folder with Annotations, JPEGImages, ImageSets; or with XML files")
    voc.add_argument("--sets", type=Path, nargs="+", default=[], help="lists of images (default: of ImageSets/Main)")
    voc.add_argument("--zero-based", action="store_true", help="corners are continuous pixels from 0 (CVAT, Roboflow)")
    voc.add_argument(
        *("--difficult",),
        choices=get_args(Difficult),
        default="crowd",
        help="difficult objects: ignored in training and evaluation (default), objects like others, left out",
    )
    _add_reading(voc)

    yolo = add("from-yolo", from_yolo, "YOLO labels to COCO format, one file per split of data.yaml")
    yolo.add_argument("source", type=Path, help="data.yaml, or a folder that holds it or classes.txt")
    _add_reading(yolo)

    table = add("from-csv", from_csv, "CSV to COCO format, one file per table")
    table.add_argument("source", type=Path, nargs="+", help="tables, each called as its split is to be")
    table.add_argument("--normalized", action="store_true", help="corners are fractions of the image")
    table.add_argument("--one-based", action="store_true", help="corners count pixels from 1, the last one included")
    _add_reading(table, images_required=True)

    labelme = add("from-labelme", from_labelme, "LabelMe JSON to COCO format, one file per folder")
    labelme.add_argument("source", type=Path, nargs="+", help="folders, each called as its split is to be")
    _add_reading(labelme)

    back = add("to-yolo", to_yolo, "COCO format to YOLO labels with data.yaml")
    for name in SPLITS:
        back.add_argument(f"--{name}", type=Path, nargs=2, metavar=("ANNOTATIONS", "IMAGES"))
    back.add_argument("--output", type=Path, required=True, help="folder to write, new or empty")
    back.add_argument("--follow-links", action="store_true", help="take images behind links out of their folder")
    back.add_argument(
        "--images", choices=get_args(Place), default="link", help="image files: links (default), copies, nothing"
    )

    divide = add(
        "split", split, "divide a COCO-format file by fractions, so that each part has its share of each class"
    )
    divide.add_argument("source", type=Path, help="annotation file")
    divide.add_argument(
        *("--fractions",), type=_fraction, nargs="+", required=True, metavar="NAME=SHARE", help="as train=0.8 val=0.2"
    )
    divide.add_argument("--seed", type=int, default=0, help="another seed, another division (default: 0)")
    divide.add_argument(
        "--group-by", metavar="REGEX", help=r"keep images together whose names share what it finds, as '^(.*)_frame'"
    )
    divide.add_argument("--output", type=Path, required=True, help="folder for NAME.json")
    _add_naming(divide)

    union = add("merge", merge, "merge COCO-format files; classes are united by name")
    union.add_argument("source", type=Path, nargs="+", help="annotation files")
    union.add_argument("--images", type=Path, nargs="+", required=True, help="the image folder of each")
    union.add_argument(
        *("--duplicates",),
        choices=get_args(Duplicates),
        default="fail",
        help="images in several files: write nothing (default), take all annotations, or those of the first",
    )
    union.add_argument("--output", type=Path, required=True, help="file to write")
    union.add_argument("--overwrite", action="store_true", help="replace an existing file")

    choose = add("subset", subset, "keep, leave out, rename and unite classes of a COCO-format file")
    choose.add_argument("source", type=Path, help="annotation file")
    choose.add_argument("--keep", nargs="+", metavar="NAME", help="classes to keep (default: all), as the file says")
    choose.add_argument("--drop", nargs="+", default=[], metavar="NAME", help="classes to leave out")
    choose.add_argument(
        *("--rename",), nargs="+", default=[], metavar="OLD=NEW", help="new names; the same one unites classes"
    )
    choose.add_argument(
        "--empty-images", choices=("keep", "drop"), default="keep", help="images without boxes (default: keep)"
    )
    choose.add_argument("--output", type=Path, required=True, help="file to write")
    _add_naming(choose)
    return parser


def _add_reading(parser: argparse.ArgumentParser, *, images_required: bool = False) -> None:
    parser.add_argument("--images", type=Path, required=images_required, help="folder of the images")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="the classes in the order of their ids")
    parser.add_argument("--output", type=Path, required=True, help="folder for one JSON file per split")
    parser.add_argument("--follow-links", action="store_true", help="images may be links out of their folder")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def _add_naming(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, help="folder of the images, for the lines of the config")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def _natural(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"expected a number from 0 on, got {shown(text)}")
    return int(text)


def _fraction(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not re.fullmatch(r"\w[\w.-]*", name) or not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"expected NAME=SHARE with a share between 0 and 1, got {shown(text)}")
    return name, share


if __name__ == "__main__":
    main()
