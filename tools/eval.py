"""COCO metrics of a checkpoint, or of a file of results.

    python tools/eval.py --checkpoint K [--config C] [--report | --proposals] [--output-dir D] [key=value ...]
    python tools/eval.py --predictions FILE --config C [--report] [--output-dir D]
    torchrun --nproc-per-node 8 tools/eval.py --checkpoint K

Without --config, the one in the checkpoint counts. The ground truth is `data.val.annotations` of the config. Prints a
table; writes metrics.json and, with a checkpoint, predictions.json (COCO results format) to D, by default the folder of
the checkpoint or file. With --proposals, and for `model.kind` rpn always, the numbers are the recall of the proposals
(proposal_metrics.json). With `eval.tta={}` the detections in several sizes of each image and its mirror image are
merged (tta_metrics.json, tta_predictions.json).

With --report, D/report/report.html shows what the detector gets wrong: what costs most AP, each class, curves,
confusions, calibration, sizes and shapes, the recall of the proposals (with a checkpoint), the worst images, likely
label errors. It needs no other file and no network; charts lie beside it as PNG, the numbers as report.json.

Images that cannot be read count as images where nothing was found: the table and `unreadable_images` of metrics.json
say so, standard error says why, and the exit code is 1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from fpn_det import build
from fpn_det.cli import config_parser, say, user_errors
from fpn_det.config import Config, dump_config, load_config
from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.loader import explain_unreadable
from fpn_det.data.problems import format_problems
from fpn_det.engine import checkpoint
from fpn_det.engine.checkpoint import State
from fpn_det.engine.coco_eval import (
    GroundTruth,
    Metrics,
    ProposalMetrics,
    ScoredBoxes,
    format_proposal_table,
    format_table,
    read_results,
    score,
    write_results,
)
from fpn_det.engine.distributed import Process, launched_process
from fpn_det.extras import require
from fpn_det.files import write_errors, write_json
from fpn_det.report.analysis import analyse
from fpn_det.report.evaluation import write_report
from fpn_det.structures import InputError, printable


def main() -> None:
    """Read the command line and evaluate."""
    parser = config_parser(__doc__, required=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="weights to evaluate")
    source.add_argument("--predictions", type=Path, help="results to score without a model (COCO results format)")
    parser.add_argument("--proposals", action="store_true", help="measure the recall of the proposals instead")
    parser.add_argument("--report", action="store_true", help="write a page on what the detector gets wrong")
    parser.add_argument("--output-dir", type=Path, help="where metrics.json and predictions.json go")
    args = parser.parse_intermixed_args()
    if args.proposals and args.predictions:
        parser.error("--proposals goes with --checkpoint: a file of --predictions holds detections")
    if args.predictions and not args.config:
        parser.error("--predictions needs --config, whose data.val.annotations is the ground truth")
    if args.proposals and args.report:
        parser.error("--report is about detections; it holds the recall of the proposals, too: leave --proposals out")
    with user_errors():
        if args.report:
            require("matplotlib", extra="report", purpose="--report")  # now, not after an hour of detecting
        folder = args.output_dir or (args.checkpoint or args.predictions).parent
        if args.predictions:
            score_file(load_config(args.config, args.overrides), args.predictions, folder, with_report=args.report)
            return
        state = checkpoint.load_checkpoint(args.checkpoint)
        config = build.config_for(state, args.checkpoint, given=args.config, overrides=args.overrides)
        proposals = args.proposals or config.model.kind == "rpn"
        if proposals and config.eval.tta is not None:
            raise InputError("eval.tta merges detections, not proposals; set eval.tta=none to measure their recall")
        if proposals and args.report:
            raise InputError("--report is about detections, but model.kind rpn only proposes; leave --report out")
        with launched_process() as process:
            num_unreadable = evaluate_checkpoint(
                config,
                args.checkpoint,
                state,
                folder,
                proposals=proposals,
                with_report=args.report,
                process=process,
            )
    sys.exit(1 if num_unreadable else 0)


def score_file(config: Config, path: Path, folder: Path, *, with_report: bool) -> None:
    """Compare the detections of a file with the ground truth."""
    truth, results = build.load_ground_truth(config), read_results(path)
    metrics = score(
        truth,
        results,
        backend=config.eval.backend,
        max_detections=config.model.roi_head.detections_per_image,
    )
    report(metrics, format_table(metrics), folder / "metrics.json")
    if with_report:
        try:
            data: CocoAnnotations | str = build.read_split(config, "val")
        except InputError as error:
            data = str(error)
        report_mistakes(config, folder / "report", truth, results, metrics, None, data, {"predictions": str(path)})


def evaluate_checkpoint(
    config: Config, path: Path, state: State, folder: Path, *, proposals: bool, with_report: bool, process: Process
) -> int:
    """Detect, or propose, on the validation images and report; returns how many of them could not be read."""
    model = build.build_detector(config, state, path, process.device)
    data, truth = build.load_val_data(config), build.load_ground_truth(config)
    checkpoint.check_categories(state, path, data.categories, data.source)
    if process.is_main:
        say(data.summary())
        if data.problems:
            say(format_problems(data.problems))
    if proposals:
        batches = build.build_val_loader(config, data, process=process)
        recalls = build.evaluate_model_proposals(config, model, batches, truth, process=process)
        if recalls is not None:
            name = "metrics" if config.model.kind == "rpn" else "proposal_metrics"
            report(recalls, format_proposal_table(recalls), folder / f"{name}.json", step=state["step"])
        return print_unreadable(data, recalls)
    views = build.build_val_views(config, data, process=process)
    evaluated = build.evaluate_model(config, model, views, truth, data.categories, process=process)
    prefix = "" if config.eval.tta is None else "tta_"  # what training wrote stays
    if evaluated is not None:
        metrics, results = evaluated
        report(metrics, format_table(metrics), folder / f"{prefix}metrics.json", step=state["step"])
        write_results(folder / f"{prefix}predictions.json", results)
    recalls = None
    if with_report and config.model.kind == "faster_rcnn":
        batches = build.build_val_loader(config, data, process=process)
        recalls = build.evaluate_model_proposals(config, model, batches, truth, process=process)
    if evaluated is None:
        return 0
    if with_report:
        about = {"checkpoint": str(path), "step": f"{state['step']:,}"}
        report_mistakes(config, folder / f"{prefix}report", truth, results, metrics, recalls, data, about)
    return print_unreadable(data, metrics)


def report_mistakes(
    config: Config,
    folder: Path,
    truth: GroundTruth,
    results: ScoredBoxes,
    metrics: Metrics,
    proposals: ProposalMetrics | None,
    data: CocoAnnotations | str,
    about: dict[str, str],
) -> None:
    """Write the page on what the detector gets wrong; `data` are the images, or why there are none."""
    read_image: Callable[[int], Tensor] | str
    names: dict[int, str] = {}
    if isinstance(data, str):
        read_image = data
    elif not len(data):
        read_image = f"no image of the annotations is in data.val.images ({data.folder})"
    else:
        read_image = build.image_reader(data)
        names = dict(zip(data.image_ids.tolist(), data.names(), strict=True))
    settings = {
        "run": config.name,
        **about,
        "annotations": str(config.data.val.annotations),
        "images": str(config.data.val.images),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "detections per image and class": str(metrics["max_detections"]),
        "several views of each image (eval.tta)": "no" if config.eval.tta is None else "yes",
        **{f"version: {name}": value for name, value in checkpoint.versions().items()},
        "version: hotcoco": version("hotcoco"),
    }
    path = write_report(
        folder,
        analyse(truth, results, metrics, proposals=proposals),
        truth,
        results,
        read_image=read_image,
        image_names=names,
        about=settings,
        config=dump_config(config),
    )
    say(f"written: {path}")


def print_unreadable(data: CocoAnnotations, metrics: Metrics | ProposalMetrics | None) -> int:
    """Say why images could not be read; returns how many there were."""
    ids = metrics.get("unreadable_images", []) if metrics is not None else []
    for reason in explain_unreadable(data, ids):
        say(printable(reason), file=sys.stderr)
    return len(ids)


def report(metrics: Metrics | ProposalMetrics, table: str, path: Path, *, step: int | None = None) -> None:
    """Print the table and write the numbers, with the step of a checkpoint as training writes it."""
    say(table)  # first: a folder that cannot be written must not cost the numbers
    with write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, metrics if step is None else {**metrics, "step": step})
    say(f"written: {path}")


if __name__ == "__main__":
    main()
