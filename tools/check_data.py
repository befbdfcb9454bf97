"""Check a data set before training on it: everything that is wrong with it, in one go.

    python tools/check_data.py --config configs/mine.yaml [--quick] [--output-dir D] [key=value ...]

Reads both splits of the config as training does, and decodes every image (in `data.num_workers` processes; about a
minute per 10,000 photographs and process); --quick leaves the images unopened. Prints what is in the data, then each
kind of problem with its count, the first examples, what training makes of it, and what to do. Writes all problems to
data_report.json in runs/NAME (or D); `fpn_det/data/report.py` says what is in it.

Exit code: 0 nothing is wrong; 1 there are problems, training goes on without the entries that are left out; 2 training
would be refused (or the config cannot be read).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fpn_det import build
from fpn_det.cli import config_parser, say, user_errors
from fpn_det.config import Config, load_config
from fpn_det.data.checks import check_same_categories, compare_splits
from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.decoding import decode_all
from fpn_det.data.problems import Defect, Problem, format_problems, shown
from fpn_det.data.report import format_counts, write_report
from fpn_det.structures import InputError

SPLITS: tuple[build.Split, ...] = ("train", "val")


def main() -> None:
    """Read the command line and check."""
    parser = config_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="do not open the images")
    parser.add_argument("--output-dir", type=Path, help="folder of data_report.json (default: runs/NAME)")
    args = parser.parse_intermixed_args()
    with user_errors():
        config = load_config(args.config, args.overrides)
        folder = args.output_dir or Path("runs") / config.name
        sys.exit(check(config, folder / "data_report.json", quick=args.quick))


def check(config: Config, report: Path, *, quick: bool) -> int:
    """Check both splits, print, and write the report.

    Returns:
        The exit code.
    """
    splits: dict[str, CocoAnnotations] = {}
    refused: dict[str, list[str]] = {"train": [], "val": []}
    between: list[Problem] = []
    for split in SPLITS:
        with refusal_into(refused[split]):
            splits[split] = build.read_split(config, split)
    if "train" in splits:
        with refusal_into(refused["train"]):
            build.check_num_classes(config, splits["train"].categories)
    if "val" in splits:
        refused["val"] += build.split_refusals(config, "val", splits["val"])
        with refusal_into(refused["val"]):
            build.load_ground_truth(config)
    if len(splits) == 2:
        between += compare_splits(splits["train"], splits["val"])
        with refusal_into(refused["val"]):
            check_same_categories(splits["train"], splits["val"])
    if not quick:
        copies = decode_images(splits, num_workers=config.data.num_workers)
        paired = {p.id for p in between}
        between += [p for p in copies if p.id not in paired and splits["train"].source != splits["val"].source]
    if "train" in splits:  # last, because images that cannot be decoded count
        refused["train"] += build.split_refusals(config, "train", splits["train"])

    say(format_counts(splits))
    for name, data in splits.items():
        say(f"\n{name}: {data.source}")
        if name == "val" and data.problems:
            say(
                "  (The metrics take boxes as the file has them, and an image that cannot be decoded as one without "
                "detections; what is left out or clipped here is in pictures only.)"
            )
        say(format_problems(data.problems) or "  no problem")
    if between:
        say(f"\ntraining and validation together:\n{format_problems(between)}")
    reasons = [reason for split in SPLITS for reason in refused[split]]
    num_problems = len(between) + sum(len(data.problems) for data in splits.values())
    if reasons:
        say("\ntraining would be refused:")
        say("\n".join(f"  {reason}" for reason in reasons))
    elif num_problems:
        say(f"\n{num_problems:,} problems; training would go on as said above")
    else:
        say("\nnothing is wrong")
    write_report(report, {split: splits.get(split) for split in SPLITS}, refused=refused, between=between)
    say(f"written: {report}")
    return 2 if reasons else 1 if num_problems else 0


def decode_images(splits: dict[str, CocoAnnotations], *, num_workers: int) -> list[Problem]:
    """Decode every image, and note in `splits` what was found.

    Returns:
        Validation images that are copies of training images.
    """
    of_train: dict[bytes, str] = {}  # SHA-256 of the file -> its name
    copies: list[Problem] = []
    for split, data in splits.items():
        lost: dict[int, Problem] = {}
        odd: list[Problem] = []
        names = data.names()
        for index, found in decode_all(data, num_workers=num_workers, name=split):
            image_id = int(data.image_ids[index])
            if found.defect is not None:
                problem = Problem(found.defect, None, image_id, found.value)
                if found.defect.outcome == "left out":
                    lost[index] = problem
                else:
                    odd.append(problem)
            if split == "train":
                of_train.setdefault(found.sha256, names[index])
            elif found.sha256 and found.sha256 in of_train:
                value = f"{shown(names[index])} is {shown(of_train[found.sha256])}"
                copies.append(Problem(Defect.IMAGE_SAME_BYTES, None, image_id, value))
        data = replace(data, problems=(*data.problems, *odd))
        splits[split] = data.without(dict(sorted(lost.items())))
    return copies


@contextmanager
def refusal_into(reasons: list[str]) -> Iterator[None]:
    """Note an `InputError` and go on."""
    try:
        yield
    except InputError as error:
        reasons.append(str(error))


if __name__ == "__main__":
    main()
