"""Two detectors on the same validation data, side by side, with 95 % bootstrap intervals.

    python tools/compare.py A B [--resamples 500] [--output-dir D]
    python tools/compare.py A.json B.json --annotations GT.json [--images FOLDER]

A and B are folders of runs, or files of detections (COCO results format) such as the predictions.json of a run. The
ground truth is that of the runs' configs, which must be the same file or one of equal content; --annotations replaces
it. Prints the twelve COCO numbers, the classes that differ most and what differs in the configs; writes D
(default: compare_A in the folder of B) with comparison.html, which needs no other file, comparison.json and charts.

The intervals come from drawing images with replacement: they say how far the choice of images explains a difference,
not what another seed of the training would give. 500 resamples of 5,000 images take about a minute on one CPU core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fpn_det import build
from fpn_det.cli import say, user_errors
from fpn_det.config import Config, load_config
from fpn_det.data.coco import load_coco
from fpn_det.engine.coco_eval import ScoredBoxes, read_ground_truth, read_results
from fpn_det.extras import require
from fpn_det.report.comparison import compare, format_comparison, write_comparison
from fpn_det.report.examples import ReadImage
from fpn_det.structures import InputError, printable

CURVES = {"loss/total": ("loss", 1), "val/AP": ("AP of the validation set, percent", 100)}
"""Records of log.jsonl that are drawn: what the chart is called, and the factor of its values."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One side of a comparison; a file of detections has neither config nor log."""

    name: str
    folder: Path
    results: ScoredBoxes
    config: Config | None
    log: list[dict[str, Any]]


def main() -> None:
    """Read the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A", help="folder of a run, or file of detections")
    parser.add_argument("b", type=Path, metavar="B", help="the same for the other")
    parser.add_argument("--annotations", type=Path, help="the ground truth; by default that of the runs' configs")
    parser.add_argument("--images", type=Path, help="folder of the images; by default that of the runs' configs")
    parser.add_argument("--resamples", type=int, default=500, help="of the bootstrap (default: 500)")
    parser.add_argument("--output-dir", type=Path, help="where the page goes")
    args = parser.parse_args()
    if args.resamples < 0:
        parser.error(f"--resamples must be 0 or more, got {args.resamples}")
    with user_errors():
        require("matplotlib", extra="report", purpose="Comparing")
        a, b = read_run(args.a), read_run(args.b)
        truth = read_ground_truth(args.annotations or common_annotations(a, b))
        limit = max_detections(a, b)
        if sys.stderr.isatty() and args.resamples:
            say(f"resampling {len(truth.image_ids):,} images {args.resamples:,} times", file=sys.stderr)
        comparison = compare(truth, a.results, b.results, max_detections=limit, num_resamples=args.resamples)
        names = (str(args.a), str(args.b))
        say(format_comparison(comparison, (printable(names[0]), printable(names[1]))))
        differences = config_differences(a, b)
        if differences:
            say("\nconfig (A | B)")
            for key, of_a, of_b in differences:
                say(printable(f"{key}: {of_a} | {of_b}"))
        read_image, image_names = images(truth.source, args.images, a, b)
        path = write_comparison(
            args.output_dir or b.folder / f"compare_{a.name}",
            comparison,
            truth,
            a.results,
            b.results,
            names=names,
            read_image=read_image,
            image_names=image_names,
            about={
                "A": names[0],
                "B": names[1],
                "annotations": str(truth.source),
                "detections per image and class": str(limit),
                "resamples": str(args.resamples),
                "date": time.strftime("%Y-%m-%d %H:%M"),
                "version: hotcoco": version("hotcoco"),
            },
            config_differences=differences,
            curves=training_curves(a, b),
        )
        say(f"\nwritten: {path}")


def read_run(path: Path) -> Run:
    """Detections, config and log of a folder, or the detections of a file."""
    folder, file = (path, path / "predictions.json") if path.is_dir() else (path.parent, path)
    if path.is_dir() and not file.exists():
        raise InputError(f"{path}: there is no predictions.json; tools/eval.py --checkpoint {path}/best.pth writes it")
    config = load_config(folder / "config.yaml") if path.is_dir() and (folder / "config.yaml").exists() else None
    log = read_log(folder / "log.jsonl") if path.is_dir() else []
    name = path.resolve().name if path.is_dir() else path.stem  # a folder's name may hold points, as in lr0.02
    return Run(name=name, folder=folder, results=read_results(file), config=config, log=log)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a run; those that a crash left torn are passed over."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def common_annotations(a: Run, b: Run) -> Path:
    """The ground truth of both.

    Raises:
        InputError: none is known, or they have different ones.
    """
    known = [run.config.data.val.annotations for run in (a, b) if run.config is not None]
    if not known:
        raise InputError("no config.yaml says what the ground truth is; give it with --annotations")
    if len({sha256(path) for path in known}) > 1:
        raise InputError(
            f"the runs were evaluated on different data: {known[0]} and {known[1]} differ. Evaluate both on the same "
            "with tools/eval.py, or give --annotations if their predictions.json are of the same images"
        )
    return known[0]


def sha256(path: Path) -> str:
    """The content of a file in 64 letters."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the ground truth with --annotations") from error


def max_detections(a: Run, b: Run) -> int:
    """Detections per image and class that count.

    Raises:
        InputError: the runs have different limits.
    """
    limits = {run.config.model.roi_head.detections_per_image for run in (a, b) if run.config is not None}
    if len(limits) > 1:
        raise InputError(
            f"model.roi_head.detections_per_image is {' and '.join(map(str, sorted(limits)))}: evaluate both with "
            "the same"
        )
    return limits.pop() if limits else 100


def config_differences(a: Run, b: Run) -> list[tuple[str, str, str]]:
    """Key, value of A, value of B where they differ; empty unless both configs are known."""
    if a.config is None or b.config is None:
        return []
    of_a, of_b = (flat(run.config.model_dump(mode="json")) for run in (a, b) if run.config is not None)
    keys = [*of_a, *(key for key in of_b if key not in of_a)]
    pairs = [(key, of_a.get(key, "(not there)"), of_b.get(key, "(not there)")) for key in keys]
    return [(key, str(one), str(other)) for key, one, other in pairs if one != other]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    items: dict[str, Any] = {}
    for key, value in values.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return items


def training_curves(a: Run, b: Run) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """What `CURVES` names -> A and B -> steps and values, of the runs that have such records."""
    curves: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for key, (title, factor) in CURVES.items():
        for side, run in (("A", a), ("B", b)):
            records = [r for r in run.log if isinstance(r.get(key), float | int)]
            if records:
                values = [factor * r[key] for r in records]
                curves.setdefault(title, {})[side] = ([r["step"] for r in records], values)
    return curves


def images(annotations: Path, folder: Path | None, a: Run, b: Run) -> tuple[ReadImage | str, dict[int, str]]:
    """How images are read, or why there are none, and their names."""
    folders = [folder] if folder else [run.config.data.val.images for run in (b, a) if run.config is not None]
    if not folders:
        return "no config.yaml says where the images are; give their folder with --images", {}
    try:
        data = load_coco(annotations, folders[0])
    except InputError as error:
        return str(error), {}
    if not len(data):
        return f"no image of the annotations is in {folders[0]}", {}
    return build.image_reader(data), dict(zip(data.image_ids.tolist(), data.names(), strict=True))


if __name__ == "__main__":
    main()
