"""The ablation of the FPN paper (arXiv 1612.03144, tables 1 and 3) on generated shapes: does each part earn its place?

    python benchmarks/ablation.py [--seeds 0 1] [--jobs 2] [--report-only]

Trains the six RPNs of table 1, the three detectors of table 3 and one of table 2 with equal budgets, one thread each,
`--jobs` at a time, in runs/ablation; finished runs are kept, interrupted ones resume. Writes docs/ablation.md and
docs/ablation.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from tqdm import tqdm

from fpn_det.cli import user_errors
from fpn_det.data.shapes import generate
from fpn_det.structures import InputError

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "ablation"
DATA = {"num_train": 3000, "num_val": 400, "size": 256, "smallest": 12, "distractors": 8}
STEPS = {"rpn": 500, "faster_rcnn": 300}

FPN = ["model.neck.channels=64", "model.anchors.sizes=[12,24,48,96,192]"]
ONE_LEVEL = [  # as many anchors and candidates there as on the five levels of a pyramid together
    "model.anchors.sizes=[[12,24,48,96,192]]",
    "model.rpn.pre_nms_top_k_train=2500",
    "model.rpn.pre_nms_top_k_test=5000",
]
C4 = ["model.neck={kind: single, stage: 4}", *ONE_LEVEL]
C5 = ["model.neck={kind: single, stage: 5}", *ONE_LEVEL]
TWO_FC = "model.roi_head.box_head={num_fcs: 2, fc_dim: 256}"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table.

    Attributes:
        name: of its runs.
        row: of the paper's table.
        overrides: of benchmarks/ablation.yaml.
        paper: the published numbers, in the order of the table's columns, in percent.
    """

    name: str
    row: str
    overrides: Sequence[str]
    paper: Sequence[float]


TABLE_1 = [
    Variant(name="rpn_c4", row="(a) C4", overrides=C4, paper=(36.1, 48.3, 32.0, 58.7, 62.2)),
    Variant(name="rpn_c5", row="(b) C5", overrides=C5, paper=(36.3, 44.9, 25.3, 55.5, 64.2)),
    Variant(name="rpn_fpn", row="(c) FPN", overrides=FPN, paper=(44.0, 56.3, 44.9, 63.4, 66.2)),
    Variant(
        name="rpn_no_top_down",
        row="(d) no top-down path",
        overrides=[*FPN, "model.neck.top_down=false"],
        paper=(37.4, 49.5, 30.5, 59.9, 68.0),
    ),
    Variant(
        name="rpn_no_lateral",
        row="(e) no lateral connections",
        overrides=[*FPN, "model.neck.lateral=false"],
        paper=(34.5, 46.1, 26.5, 57.4, 64.7),
    ),
    Variant(
        name="rpn_finest_only",
        row="(f) finest level only",
        overrides=["model.neck={channels: 64, finest_only: true}", *ONE_LEVEL],
        paper=(38.4, 51.3, 35.1, 59.7, 67.6),
    ),
]
COLUMNS_1 = {"AR100": "AR@100", "AR1000": "AR@1000", "ARs": "small", "ARm": "medium", "ARl": "large"}

TABLE_3 = [
    Variant(
        name="detector_c4",
        row="(a) C4, stage 5 as head",
        overrides=[*C4, "model.roi_head={box_head: {kind: res5}, pool_size: 7}"],
        paper=(53.1, 31.6, 13.2, 35.6, 47.1),
    ),
    Variant(name="detector_c5", row="(b) C5, 2 fc", overrides=[*C5, TWO_FC], paper=(51.7, 28.0, 9.6, 31.9, 43.1)),
    Variant(
        name="detector_no_top_down",
        row="(2d) no top-down path, 2 fc",
        overrides=[*FPN, TWO_FC, "model.neck.top_down=false"],
        paper=(44.9, 24.9, 10.9, 24.4, 38.5),
    ),
    Variant(name="detector_fpn", row="(c) FPN, 2 fc", overrides=[*FPN, TWO_FC], paper=(56.9, 33.9, 17.8, 37.7, 45.8)),
]
COLUMNS_3 = {"AP50": "AP50", "AP": "AP", "APs": "small", "APm": "medium", "APl": "large"}


def main() -> None:
    """Read the command line, train what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one run each per variant")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--report-only", action="store_true", help="write the report from the runs that are there")
    args = parser.parse_args()
    with user_errors():
        if not args.report_only:
            generate(ROOT / "data" / "shapes_ablation", **DATA)
            train_all(args.seeds, jobs=args.jobs)
        write_report(args.seeds)


def train_all(seeds: Sequence[int], *, jobs: int) -> None:
    """Train every variant with every seed; the first seed of all variants comes first."""
    runs = [(variant, seed) for seed in seeds for variant in (*TABLE_1, *TABLE_3)]
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), desc="ablation", unit="run") as progress:
        futures = [pool.submit(train, variant, seed) for variant, seed in runs]
        for future in futures:
            future.add_done_callback(lambda _: progress.update())
        for future in futures:
            future.result()


def train(variant: Variant, seed: int) -> None:
    """Train one variant, or go on with it; its processor seconds are added up in seconds.json."""
    folder = run_folder(variant, seed)
    kind = "rpn" if variant in TABLE_1 else "faster_rcnn"
    steps = STEPS[kind]
    if (folder / "metrics.json").exists() and json.loads((folder / "metrics.json").read_text())["step"] == steps:
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "tools/train.py", "--config", "benchmarks/ablation.yaml", "--output-dir", str(folder)]
    command += ["--resume", f"seed={seed}", f"train.steps={steps}", f"model.kind={kind}", *variant.overrides]
    with (folder / "console.txt").open("w") as console:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=console, stderr=console, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        _, status, usage = os.wait4(process.pid, 0)  # the only call that tells one child's processor time
        elapsed = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    path = folder / "seconds.json"
    before = json.loads(path.read_text()) if path.exists() else {"processor": 0.0, "clock": 0.0}
    spent = {"processor": before["processor"] + usage.ru_utime + usage.ru_stime, "clock": before["clock"] + elapsed}
    path.write_text(json.dumps(spent))
    if process.returncode:
        last = (folder / "console.txt").read_text().strip().splitlines()[-1:]
        raise InputError(f"{variant.name}, seed {seed}: training ended with {process.returncode}: {' '.join(last)}")


def run_folder(variant: Variant, seed: int) -> Path:
    """Where a run lies."""
    return RUNS / f"{variant.name}_{seed}"


def write_report(seeds: Sequence[int]) -> None:
    """docs/ablation.md and docs/ablation.png from the finished runs."""
    variants = [*TABLE_1, *TABLE_3]
    results = {v.name: read_runs(v, seeds) for v in variants}
    seconds = [json.loads(path.read_text()) for path in RUNS.glob("*/seconds.json")]
    hours = {clock: sum(s[clock] for s in seconds) / 3600 for clock in ("processor", "clock")}
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    draw_figure(results, docs / "ablation.png")
    (docs / "ablation.md").write_text(
        f"""# The ablation of the FPN paper, run

`python benchmarks/ablation.py` trains the rows of tables 1 and 3 of arXiv 1612.03144 on generated shapes:
{DATA["num_train"]} training and {DATA["num_val"]} validation images, {DATA["size"]} pixels a side, shapes of
{DATA["smallest"]} to 180 pixels among up to {DATA["distractors"]} others per image that belong to no category.
ResNet-18 from scratch, steps of 8 images ({STEPS["rpn"]} in table 1, {STEPS["faster_rcnn"]} in table 3), seeds
{", ".join(map(str, seeds))}; [benchmarks/ablation.yaml](../benchmarks/ablation.yaml) has the rest. All of it took
{60 * hours["processor"]:.0f} minutes of processor time, {60 * hours["processor"] / 2:.0f} minutes on two cores.

"Ours" is the mean over the seeds, with half the distance between the lowest and the highest after the sign. Small,
medium and large are COCO's (below 32², to 96², above, in pixels of area). The paper's numbers are ResNet-50 on COCO:
compare the order of the rows and the sign of the differences, not the values.

![Recall and precision by object size, ours and the paper's](ablation.png)

## Table 1: region proposals, average recall

{format_rows(TABLE_1, COLUMNS_1, results)}

`small`, `medium` and `large` are at 1000 proposals.

## Table 3: Faster R-CNN, average precision

{format_rows(TABLE_3, COLUMNS_3, results)}

Row (2d) is of the paper's table 2, Fast R-CNN on the proposals of an FPN; here, both stages of all rows train together.
{read_findings(docs / "ablation.md")}"""
    )
    print(f"written: {docs / 'ablation.md'}, {docs / 'ablation.png'}")


FINDINGS = "\n## Findings\n"


def read_findings(path: Path) -> str:
    """What a person wrote below the tables of an earlier report, which the next one keeps."""
    text = path.read_text() if path.exists() else ""
    return FINDINGS + text.partition(FINDINGS)[2] if FINDINGS in text else ""


def read_runs(variant: Variant, seeds: Sequence[int]) -> list[dict[str, float]]:
    """The metrics of the finished runs of a variant, at least one."""
    paths = [run_folder(variant, seed) / "metrics.json" for seed in seeds]
    runs = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not runs:
        raise InputError(f"{paths[0]}: no such file; train first (leave out --report-only)")
    return runs


def format_rows(
    variants: Sequence[Variant], columns: dict[str, str], results: dict[str, list[dict[str, float]]]
) -> str:
    """A Markdown table: ours, then the paper's."""
    header = ["", "seeds", *(f"{c}, ours" for c in columns.values()), *(f"{c}, paper" for c in columns.values())]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for v in variants:
        cells = [v.row, str(len(results[v.name]))]
        for key in columns:
            values = [100 * run[key] for run in results[v.name]]
            spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}")
        lines.append("| " + " | ".join(cells + [f"{x:.1f}" for x in v.paper]) + " |")
    return "\n".join(lines)


def draw_figure(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Bars by object size, ours above, the paper's below."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 7), gridspec_kw={"width_ratios": [6, 3.4]}, sharey="col")
    tables = ((TABLE_1, ("ARs", "ARm", "ARl"), "AR@1000"), (TABLE_3, ("APs", "APm", "APl"), "AP"))
    for column, (variants, keys, unit) in enumerate(tables):
        for row, source in enumerate(("ours, shapes", "paper, COCO")):
            axis = axes[row, column]
            for k, (key, size) in enumerate(zip(keys, ("small", "medium", "large"), strict=True)):
                for i, v in enumerate(variants):
                    values = [100 * run[key] for run in results[v.name]] if row == 0 else [v.paper[2 + k]]
                    low, high = mean(values) - min(values), max(values) - mean(values)
                    axis.bar(
                        i + 0.26 * (k - 1),
                        mean(values),
                        width=0.24,
                        color=("#9ecae1", "#4292c6", "#084594")[k],
                        yerr=[[low], [high]] if row == 0 else None,
                        ecolor="#555555",
                        label=size if i == 0 else None,
                    )
            labels = [v.row.partition(",")[0].replace(") ", ")\n").replace(" connections", "") for v in variants]
            axis.set_xticks(range(len(variants)), labels, fontsize=9)
            axis.set_title(f"{'RPN' if column == 0 else 'Faster R-CNN'}: {unit} by size, {source}", fontsize=10)
            axis.set_ylabel(f"{unit} (%)")
            axis.grid(axis="y", alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, ncols=3, loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
