"""COCO metrics of a checkpoint, or of a file of results.

    python tools/eval.py --config C --checkpoint K [--proposals] [--output-dir D] [key=value ...]
    python tools/eval.py --config C --predictions FILE [--output-dir D]
    torchrun --nproc-per-node 8 tools/eval.py --config C --checkpoint K

The ground truth is `data.val.annotations` of the config. Prints a table; writes metrics.json and, with a checkpoint,
predictions.json (COCO results format) to D, by default the folder of the checkpoint or file. With --proposals, and
for `model.kind` rpn always, the numbers are the recall of the proposals (proposal_metrics.json). With `eval.tta={}` the
detections in several sizes of each image and its mirror image are merged (tta_metrics.json, tta_predictions.json).

Images that cannot be read count as images where nothing was found: the table and `unreadable_images` of metrics.json
say so, standard error says why, and the exit code is 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fpn_det import build
from fpn_det.cli import config_parser, say, user_errors
from fpn_det.config import Config, load_config
from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.loader import explain_unreadable
from fpn_det.data.problems import format_problems
from fpn_det.engine import checkpoint
from fpn_det.engine.coco_eval import (
    Metrics,
    ProposalMetrics,
    format_proposal_table,
    format_table,
    read_results,
    score,
    write_results,
)
from fpn_det.engine.distributed import Process, launched_process
from fpn_det.files import write_errors, write_json
from fpn_det.structures import InputError, printable


def main() -> None:
    """Read the command line and evaluate."""
    parser = config_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="weights to evaluate")
    source.add_argument("--predictions", type=Path, help="results to score without a model (COCO results format)")
    parser.add_argument("--proposals", action="store_true", help="measure the recall of the proposals instead")
    parser.add_argument("--output-dir", type=Path, help="where metrics.json and predictions.json go")
    args = parser.parse_intermixed_args()
    if args.proposals and args.predictions:
        parser.error("--proposals goes with --checkpoint: a file of --predictions holds detections")
    with user_errors():
        config = load_config(args.config, args.overrides)
        folder = args.output_dir or (args.checkpoint or args.predictions).parent
        if args.predictions:
            metrics = score(
                build.load_ground_truth(config),
                read_results(args.predictions),
                backend=config.eval.backend,
                max_detections=config.model.roi_head.detections_per_image,
            )
            report(metrics, format_table(metrics), folder / "metrics.json")
            return
        proposals = args.proposals or config.model.kind == "rpn"
        if proposals and config.eval.tta is not None:
            raise InputError("eval.tta merges detections, not proposals; set eval.tta=none to measure their recall")
        with launched_process() as process:
            num_unreadable = evaluate_checkpoint(config, args.checkpoint, folder, proposals=proposals, process=process)
    sys.exit(1 if num_unreadable else 0)


def evaluate_checkpoint(config: Config, path: Path, folder: Path, *, proposals: bool, process: Process) -> int:
    """Detect, or propose, on the validation images and report; returns how many of them could not be read."""
    model, state = build.load_detector(config, path, process.device)
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
    if evaluated is None:
        return 0
    metrics, results = evaluated
    prefix = "" if config.eval.tta is None else "tta_"  # what training wrote stays
    report(metrics, format_table(metrics), folder / f"{prefix}metrics.json", step=state["step"])
    write_results(folder / f"{prefix}predictions.json", results)
    return print_unreadable(data, metrics)


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
