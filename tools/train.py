"""Train a detector.

    python tools/train.py --config configs/r50_fpn.yaml [--output-dir D] [--resume] [--profile] [key=value ...]
    torchrun --nproc-per-node 8 tools/train.py --config configs/r50_fpn.yaml

Writes to runs/NAME (or D): config.yaml, log.txt, log.jsonl, tensorboard/, checkpoints, predictions.json and
metrics.json. SIGINT and SIGTERM save a checkpoint and exit; --resume goes on from the last one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fpn_det import build
from fpn_det.cli import config_parser, user_errors
from fpn_det.config import Config, dump_config, load_config
from fpn_det.data.coco import CocoAnnotations, check_same_categories, format_problems
from fpn_det.data.transforms import load_image
from fpn_det.draw import draw_comparison
from fpn_det.engine import checkpoint
from fpn_det.engine.coco_eval import (
    METRIC_NAMES,
    PROPOSAL_METRIC_NAMES,
    Metrics,
    ProposalMetrics,
    ScoredBoxes,
    format_proposal_table,
    format_table,
    write_results,
)
from fpn_det.engine.distributed import Process, launched_process
from fpn_det.engine.evaluate import View, from_coco_results
from fpn_det.engine.optim import MovingAverage
from fpn_det.engine.profile import StepProfiler
from fpn_det.engine.runlog import RunLog
from fpn_det.engine.train import train
from fpn_det.models.faster_rcnn import Detector
from fpn_det.structures import InputError


def main() -> None:
    """Read the command line and train."""
    parser = config_parser(__doc__)
    parser.add_argument("--output-dir", type=Path, help="folder of the run (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    parser.add_argument(
        "--profile", action="store_true", help="profile ten steps: the top operators in the log, trace.json.gz"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    args = parser.parse_intermixed_args()
    with user_errors():
        config = load_config(args.config, args.overrides)
        if args.print_config:
            print(dump_config(config), end="")
            return
        folder = args.output_dir or Path("runs") / config.name
        with launched_process() as process:
            run(config, folder, resume=args.resume, profile=args.profile, process=process)


def run(config: Config, folder: Path, *, resume: bool, profile: bool = False, process: Process) -> None:
    """One training run in `folder`, from the data to metrics.json."""
    state = open_run(folder, resume=resume)
    train_data, val_data = build.load_train_data(config), build.load_val_data(config)
    truth = build.load_ground_truth(config)
    check_same_categories(train_data, val_data)
    categories = train_data.categories
    num_steps = build.num_steps(config, len(train_data))
    torch.manual_seed(config.seed)
    model = build.build_model(config, len(categories), pretrained=state is None)
    build.place(config, model, process.device)
    optimizer = build.build_optimizer(config, model)
    decay = config.train.ema_decay
    start_step = state["step"] if state is not None else 0
    ema = MovingAverage(model, decay=decay, num_updates=start_step) if decay else None
    if state is not None:
        source = checkpoint.step_path(folder, start_step)
        if start_step > num_steps:
            raise InputError(
                f"{source} is beyond the end of the run: train.steps or train.epochs give {num_steps}; raise it"
            )
        checkpoint.check_categories(state, source, categories, train_data.source)
        checkpoint.load_weights(model, state["model"], source)
        checkpoint.load_optimizer(optimizer, state["optimizer"], source)
        if ema is not None:
            checkpoint.load_weights(ema.module, state.get("ema") or state["model"], source)
    detector: Detector = build.place(config, ema.module, process.device) if ema is not None else model  # type: ignore[arg-type]

    if process.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config))
    val_loader = build.build_val_loader(config, val_data, process=process)
    proposals_only = config.model.kind == "rpn"
    pictures = list(range(min(config.eval.tensorboard_images, len(val_data))))
    best, headline = folder / "best.pth", "AR1000" if proposals_only else "AP"
    best_value = checkpoint.load_checkpoint(best).get(headline, -1.0) if process.is_main and best.exists() else -1.0

    with RunLog(folder if process.is_main else None, start_step=start_step, num_steps=num_steps) as log:
        for data in (train_data, val_data):
            log.message(data.summary())
            if data.problems:
                log.message(format_problems(data.problems))
        log.message(describe(config, model, train_data, num_steps, start_step, process))
        if state is not None and state["config"] != dump_config(config):
            log.message(f"the config changed since that checkpoint:\n{changes(state['config'], dump_config(config))}")

        def weights_for_use(step: int) -> checkpoint.State:
            return {
                "model": detector.state_dict(),
                "categories": categories.state_dict(),
                "config": dump_config(config),
                "step": step,
            }

        def save(step: int) -> None:
            if process.is_main:
                moving_average = {"ema": ema.module.state_dict()} if ema is not None else {}
                resumable = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **moving_average}
                checkpoint.save_checkpoint(checkpoint.step_path(folder, step), weights_for_use(step) | resumable)
                checkpoint.prune_checkpoints(folder, config.train.keep_checkpoints)

        def evaluate_at(step: int) -> None:
            process.share_buffers(detector)
            if proposals_only:
                recalls = build.evaluate_model_proposals(config, detector, val_loader, truth, process=process)
                if recalls is not None:
                    record(step, recalls, PROPOSAL_METRIC_NAMES, format_proposal_table(recalls))
                return
            views = [View(batches=val_loader)]
            evaluated = build.evaluate_model(config, detector, views, truth, categories, process=process)
            if evaluated is None:
                return
            metrics, results = evaluated
            record(step, metrics, METRIC_NAMES, format_table(metrics))
            for index in pictures:
                log.image(step, f"val/{index}", draw_validation(val_data, index, results))
            if step == num_steps:
                write_results(folder / "predictions.json", results)

        def record(step: int, metrics: Metrics | ProposalMetrics, names: Sequence[str], table: str) -> None:
            nonlocal best_value
            log.message(f"step {step}:\n{table}")
            numbers: dict[str, Any] = {**metrics, "step": step}
            log.scalars(step, {f"val/{name}": numbers[name] for name in names})
            if numbers[headline] > best_value:
                best_value = numbers[headline]
                checkpoint.save_checkpoint(best, weights_for_use(step) | {headline: best_value})
            if step == num_steps:
                checkpoint.save_checkpoint(folder / "final.pth", weights_for_use(step))
                (folder / "metrics.json").write_text(json.dumps(numbers, indent=2))

        done = start_step
        if start_step < num_steps:
            with StepProfiler(folder, log) if profile and process.is_main else nullcontext() as profiler:
                done = train(
                    model,
                    build.build_train_loader(config, train_data, start_step=start_step, process=process),
                    optimizer=optimizer,
                    lr_at=build.build_schedule(config, num_steps),
                    start_step=start_step,
                    num_steps=num_steps,
                    seed=config.seed,
                    process=process,
                    log=log,
                    save=save,
                    evaluate=evaluate_at,
                    accumulate=config.train.accumulate,
                    precision=config.train.precision,
                    clip_norm=config.optim.clip_norm,
                    ema=ema,
                    profiler=profiler,
                    log_every=config.train.log_every,
                    save_every=build.interval(config.train.save_every, num_steps),
                    evaluate_every=build.interval(config.eval.every, num_steps),
                )
        if done < num_steps:
            log.message(f"stopped at step {done} of {num_steps}, saved; add --resume to the same command to go on")
            return
        evaluate_at(num_steps)
        written = ("final.pth", "metrics.json") if proposals_only else ("final.pth", "metrics.json", "predictions.json")
        log.message(f"done: {', '.join(f'{folder}/{name}' for name in written)}")


def open_run(folder: Path, *, resume: bool) -> checkpoint.State | None:
    """The state to resume from, or None for a fresh run; refuses to overwrite one."""
    last = checkpoint.latest_checkpoint(folder)
    present = [path for path in (last, folder / "final.pth", folder / "best.pth") if path is not None and path.exists()]
    if present and not resume:
        raise InputError(
            f"{folder}: holds a run already ({present[0].name}); add --resume to go on with it, choose another "
            "--output-dir, or delete the folder"
        )
    if present and last is None:
        raise InputError(
            f"{folder}: holds {present[0].name}, but no step_*.pth to resume from; choose another --output-dir, or "
            "delete the folder"
        )
    return checkpoint.load_checkpoint(last) if last is not None else None


def describe(
    config: Config, model: torch.nn.Module, data: CocoAnnotations, num_steps: int, start_step: int, process: Process
) -> str:
    """What is about to happen, for the first lines of the log."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    optim, batch_size = config.optim, config.train.batch_size
    scaling = f" = {optim.lr:g} x {batch_size} / {optim.base_batch_size}" if optim.scale_lr else " (optim.scale_lr off)"
    begin = f"resuming at step {start_step} of" if start_step else "training"
    return (
        f"{total / 1e6:.1f} M parameters, {trainable / 1e6:.1f} M trained\n"
        f"{begin} {num_steps:,} steps of {batch_size} images ({num_steps * batch_size / len(data):.1f} epochs) on "
        f"{process.world_size} x {process.device.type}, {config.train.precision}\n"
        f"learning rate {build.peak_lr(config):g}{scaling}, {build.warmup_steps(config, num_steps)} steps of warm-up"
    )


def changes(before: str, after: str) -> str:
    """The lines that differ between two configs."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "then", "now", lineterm="", n=0)
    return "\n".join(line for line in lines if line.startswith(("-", "+")))


def draw_validation(data: CocoAnnotations, index: int, results: ScoredBoxes) -> torch.Tensor:
    """Ground truth and detections of one validation image, side by side."""
    h, w = data.sizes[index].tolist()
    of_image = results.image_ids == int(data.image_ids[index])
    detections = from_coco_results(results[of_image], data.categories)
    boxes, labels = data.targets(index)
    return draw_comparison(load_image(data.path(index), (h, w)), detections, boxes, labels, data.categories.names)


if __name__ == "__main__":
    main()
