"""COCO metrics of a checkpoint, or of a file of results.

    python tools/eval.py --config C --checkpoint K [--output-dir D] [key=value ...]
    python tools/eval.py --config C --predictions FILE [--output-dir D]
    torchrun --nproc-per-node 8 tools/eval.py --config C --checkpoint K

The ground truth is `data.val.annotations` of the config. Prints a table; writes metrics.json and, with a checkpoint,
predictions.json (COCO results format) to D, by default the folder of the checkpoint or file.
"""

from __future__ import annotations

import json
from pathlib import Path

from fpn_det import build
from fpn_det.cli import config_parser, user_errors
from fpn_det.config import Config, load_config
from fpn_det.data.coco import format_problems
from fpn_det.engine import checkpoint
from fpn_det.engine.coco_eval import Metrics, format_table, read_results, score
from fpn_det.engine.distributed import Process, launched_process


def main() -> None:
    """Read the command line and evaluate."""
    parser = config_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="weights to evaluate")
    source.add_argument("--predictions", type=Path, help="results to score without a model (COCO results format)")
    parser.add_argument("--output-dir", type=Path, help="where metrics.json and predictions.json go")
    args = parser.parse_intermixed_args()
    with user_errors():
        config = load_config(args.config, args.overrides)
        folder = args.output_dir or (args.checkpoint or args.predictions).parent
        if args.predictions:
            metrics = score(
                config.data.val.annotations,
                read_results(args.predictions),
                backend=config.eval.backend,
                max_detections=config.model.roi_head.detections_per_image,
            )
            report(metrics, folder)
            return
        with launched_process() as process:
            evaluate_checkpoint(config, args.checkpoint, folder, process=process)


def evaluate_checkpoint(config: Config, path: Path, folder: Path, *, process: Process) -> None:
    """Detect on the validation images and report."""
    state = checkpoint.load_checkpoint(path)
    categories = checkpoint.checkpoint_categories(state)
    build.check_num_classes(config, categories)
    data = build.load_val_data(config)
    checkpoint.check_categories(state, path, data.categories, data.source)
    model = build.build_model(config, len(categories), pretrained=False)
    checkpoint.load_weights(model, checkpoint.best_weights(state), path)
    if process.is_main:
        print(data.summary())
        if data.problems:
            print(format_problems(data.problems))
    batches = build.build_val_loader(config, data, process=process)
    evaluated = build.evaluate_model(config, model.to(process.device), batches, categories, process=process)
    if evaluated is not None:
        metrics, results = evaluated
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "predictions.json").write_text(json.dumps(results))
        report(metrics, folder, step=state["step"])


def report(metrics: Metrics, folder: Path, *, step: int | None = None) -> None:
    """Print the table and write metrics.json, with the step of a checkpoint as training writes it."""
    print(format_table(metrics))  # first: a folder that cannot be written must not cost the numbers
    folder.mkdir(parents=True, exist_ok=True)
    written = metrics if step is None else {**metrics, "step": step}
    (folder / "metrics.json").write_text(json.dumps(written, indent=2))
    print(f"written: {folder / 'metrics.json'}")


if __name__ == "__main__":
    main()
