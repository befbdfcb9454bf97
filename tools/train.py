"""Train a detector.

    python tools/train.py --config configs/r50_fpn.yaml [--output-dir D] [--resume] [--profile] [key=value ...]
    python tools/train.py --config configs/r50_fpn.yaml --overfit 8
    torchrun --nproc-per-node 8 tools/train.py --config configs/r50_fpn.yaml

Writes to runs/NAME (or D): config.yaml, data_report.json, log.txt, log.jsonl, tensorboard/, checkpoints,
predictions.json and metrics.json; diagnosis.json if training diverged. SIGINT and SIGTERM save a checkpoint and exit
with code 0; --resume goes on from the newest one that is whole. `torchrun --max-restarts N` goes on by itself when a
process is lost.

--overfit N is a check: it trains on the same N images until their AP exceeds 0.9 (exit code 0), or says which stage
fails, with numbers and the way out (exit code 1). It writes to runs/NAME_overfit.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from fpn_det import build
from fpn_det.cli import config_parser, user_errors
from fpn_det.config import Config, dump_config, load_config
from fpn_det.data.checks import UnreadableImages, check_same_categories, compare_splits
from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.loader import explain_unreadable
from fpn_det.data.problems import format_problems
from fpn_det.data.report import write_report
from fpn_det.engine import checkpoint, run_folder
from fpn_det.engine.coco_eval import (
    METRIC_NAMES,
    PROPOSAL_METRIC_NAMES,
    GroundTruth,
    Metrics,
    ProposalMetrics,
    format_proposal_table,
    format_table,
    write_results,
)
from fpn_det.engine.diagnosis import SkippedSteps
from fpn_det.engine.distributed import Process, launched_process
from fpn_det.engine.evaluate import View
from fpn_det.engine.optim import MovingAverage
from fpn_det.engine.precision import loss_scaler
from fpn_det.engine.profile import StepProfiler
from fpn_det.engine.runlog import RunLog
from fpn_det.engine.train import train
from fpn_det.files import write_text
from fpn_det.finetune import load_start_weights
from fpn_det.models.faster_rcnn import DetectionModel
from fpn_det.overfit import overfit, overrides
from fpn_det.snapshots import draw_training, draw_validation
from fpn_det.structures import Batch, InputError


def main() -> None:
    """Read the command line and train."""
    parser = config_parser(__doc__)
    parser.add_argument("--output-dir", type=Path, help="folder of the run (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    parser.add_argument(
        "--profile", action="store_true", help="profile ten steps: the top operators in the log, trace.json.gz"
    )
    parser.add_argument(
        "--overfit", type=int, metavar="N", help="train on N images until AP > 0.9, or say why that fails"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    args = parser.parse_intermixed_args()
    with user_errors():
        config = load_config(args.config, args.overrides)
        if args.overfit is not None:
            if args.overfit < 1:
                raise InputError(f"--overfit {args.overfit}: must be at least 1; 8 is common")
            if args.resume or args.profile:
                raise InputError("--overfit starts anew each time: leave out --resume and --profile")
            config = load_config(args.config, overrides(config, args.overfit, args.overrides))
        if args.print_config:
            print(dump_config(config), end="")
            return
        folder = args.output_dir or Path("runs") / config.name
        with launched_process(timeout=timedelta(minutes=config.runtime.timeout_minutes)) as process:
            if args.overfit is not None:
                folder = args.output_dir or folder.with_name(f"{folder.name}_overfit")
                sys.exit(0 if overfit(config, folder, num_images=args.overfit, process=process) else 1)
            run(config, folder, resume=args.resume, profile=args.profile, process=process)


def run(config: Config, folder: Path, *, resume: bool, profile: bool = False, process: Process) -> None:
    """One training run in `folder`, from the data to metrics.json."""
    train_data, val_data = build.load_train_data(config), build.load_val_data(config)
    truth = build.load_ground_truth(config)
    check_same_categories(train_data, val_data)
    with ExitStack() as stack:
        # The main process has the lock, reads and writes for all.
        state, notes = process.from_main(lambda: stack.enter_context(run_folder.opened_run(folder, resume=resume)))
        train_on(config, folder, train_data, val_data, truth, state, notes, profile=profile, process=process)


def train_on(
    config: Config,
    folder: Path,
    train_data: CocoAnnotations,
    val_data: CocoAnnotations,
    truth: GroundTruth,
    state: checkpoint.State | None,
    notes: Sequence[str],
    *,
    profile: bool,
    process: Process,
) -> None:
    """Train and evaluate in a folder that belongs to this run, from `state` on; `notes` are for the log."""
    stream = check_stream(config, train_data, process)
    categories = train_data.categories
    num_steps = build.num_steps(config, len(train_data))
    torch.manual_seed(config.seed)
    model = build.build_model(config, len(categories), pretrained=state is None)
    origin = ""
    if state is None and config.model.weights is not None:
        origin = load_start_weights(config, model, categories)
    build.place(config, model, process.device)
    optimizer = build.build_optimizer(config, model)
    scaler = loss_scaler(process.device, config.train.precision)
    decay = config.train.ema_decay
    start_step = state["step"] if state is not None else 0
    ema = MovingAverage(model, decay=decay, num_updates=start_step) if decay else None
    resumed = state if state is not None else {}
    skipped = SkippedSteps(limit=build.max_skipped(config, num_steps), state=resumed.get("skipped"))
    unreadable = UnreadableImages(train_data, drop_limit=config.data.drop_limit, known=resumed.get("unreadable"))
    if state is not None:
        source = run_folder.step_path(folder, start_step)
        if start_step > num_steps:
            raise InputError(
                f"{source} is beyond the end of the run: train.steps or train.epochs give {num_steps}; raise it"
            )
        checkpoint.check_categories(state, source, categories, train_data.source)
        checkpoint.load_weights(model, state["model"], source)
        checkpoint.load_optimizer(optimizer, state["optimizer"], source)
        if ema is not None:
            checkpoint.load_weights(ema.module, state.get("ema") or state["model"], source)
        if scaler.is_enabled() and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
    detector: DetectionModel = build.place(config, ema.module, process.device) if ema is not None else model  # type: ignore[arg-type]

    # Only the main process reports: comparing two sets of COCO's size takes seconds.
    between = compare_splits(train_data, val_data) if process.is_main else []
    report_path = folder / "data_report.json"
    if process.is_main:
        write_text(folder / "config.yaml", dump_config(config))
        write_report(report_path, {"train": unreadable.without(), "val": val_data}, between=between)
    val_loader = build.build_val_loader(config, val_data, process=process)
    proposals_only = config.model.kind == "rpn"
    pictures = list(range(min(config.eval.tensorboard_images, len(val_data))))
    best, headline = folder / "best.pth", "AR1000" if proposals_only else "AP"
    evaluate_every = build.interval(config.eval.every, num_steps)

    with RunLog(folder if process.is_main else None, start_step=start_step, num_steps=num_steps) as log:
        for note in notes:
            log.message(note)
        best_value = value_to_beat(best, headline, log) if process.is_main else -1.0
        for data in (train_data, val_data):
            log.message(data.summary())
            if data.problems:
                log.message(format_problems(data.problems))
        if between:
            log.message(f"images of both splits:\n{format_problems(between)}")
        log.text(start_step, "config", dump_config(config))
        log.message(describe(config, model, train_data, num_steps, start_step, process))
        if origin:
            log.message(origin)
        if state is not None:
            log.message(what_changed(state, config, stream) or "nothing has changed since that checkpoint")
            state.clear()  # the weights need not be in memory twice

        def weights_for_use(step: int) -> checkpoint.State:
            return {
                "model": detector.state_dict(),
                "categories": categories.state_dict(),
                "config": dump_config(config),
                "step": step,
                "versions": checkpoint.versions(),
            }

        def save(step: int) -> None:
            if process.is_main:
                resumable: checkpoint.State = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "stream": stream,
                    "skipped": skipped.state_dict(),
                    "unreadable": unreadable.state_dict(),
                }
                if ema is not None:
                    resumable["ema"] = ema.module.state_dict()
                if scaler.is_enabled():
                    resumable["scaler"] = scaler.state_dict()
                checkpoint.save_checkpoint(run_folder.step_path(folder, step), weights_for_use(step) | resumable)
                run_folder.prune_checkpoints(folder, config.train.keep_checkpoints)

        def evaluate_at(step: int) -> bool:
            process.share_buffers(detector)
            if proposals_only:
                recalls = build.evaluate_model_proposals(config, detector, val_loader, truth, process=process)
                if recalls is not None:
                    record(step, recalls, PROPOSAL_METRIC_NAMES, format_proposal_table(recalls))
                return False
            views = [View(batches=val_loader)]
            evaluated = build.evaluate_model(config, detector, views, truth, categories, process=process)
            if evaluated is None:
                return False
            metrics, results = evaluated
            record(step, metrics, METRIC_NAMES, format_table(metrics))
            for index in pictures:
                log.image(step, f"images/val/{index}", draw_validation(val_data, index, results))
            if step == num_steps:
                write_results(folder / "predictions.json", results)
            return False

        def record(step: int, metrics: Metrics | ProposalMetrics, names: Sequence[str], table: str) -> None:
            nonlocal best_value
            log.message(f"step {step}:\n{table}")
            for line in explain_unreadable(val_data, metrics.get("unreadable_images", [])):
                log.message(line)
            numbers: dict[str, Any] = {**metrics, "step": step}
            if numbers[headline] > best_value:
                best_value = numbers[headline]
                checkpoint.save_checkpoint(best, weights_for_use(step) | {headline: best_value})
            scalars = {f"val/{name}": numbers[name] for name in names}
            if config.eval.tensorboard_classes:
                scalars |= {f"val_classes/{name}": of["AP"] for name, of in numbers.get("per_class", {}).items()}
            log.scalars(step, scalars)  # which says that this step is evaluated
            if step == num_steps:
                checkpoint.save_checkpoint(folder / "final.pth", weights_for_use(step))
                log.write_json("metrics.json", numbers)

        def shown_first(batches: Iterable[Batch]) -> Iterator[Batch]:
            for i, batch in enumerate(batches):
                if i == 0 and start_step == 0:
                    for index in range(min(config.eval.tensorboard_images, len(batch.images))):
                        picture = draw_training(batch, index, categories.names)
                        log.image(1, f"images/train/{index}", picture)
                yield batch

        def note_unreadable(image_ids: list[int]) -> None:
            lines = unreadable.note(image_ids)
            for line in lines:
                log.message(line)
            if lines:
                write_report(report_path, {"train": unreadable.without(), "val": val_data}, between=between)
            if refusal := unreadable.refusal():
                raise InputError(refusal)

        done = start_step
        if start_step < num_steps:
            is_due = start_step > 0 and evaluate_every > 0 and start_step % evaluate_every == 0
            if is_due and process.from_main(lambda: not was_evaluated(log, start_step)):
                process.doing("evaluating", start_step)
                evaluate_at(start_step)  # stopped between saving and evaluating
            with StepProfiler(folder, log) if profile and process.is_main else nullcontext() as profiler:
                done = train(
                    model,
                    shown_first(build.build_train_loader(config, train_data, start_step=start_step, process=process)),
                    optimizer=optimizer,
                    scaler=scaler,
                    lr_at=build.build_schedule(config, num_steps),
                    start_step=start_step,
                    num_steps=num_steps,
                    seed=config.seed,
                    process=process,
                    log=log,
                    skipped=skipped,
                    note_unreadable=note_unreadable,
                    save=save,
                    evaluate=evaluate_at,
                    accumulate=config.train.accumulate,
                    precision=config.train.precision,
                    clip_norm=config.optim.clip_norm,
                    ema=ema,
                    profiler=profiler,
                    log_every=config.train.log_every,
                    save_every=build.interval(config.train.save_every, num_steps),
                    evaluate_every=evaluate_every,
                )
        if done < num_steps:
            log.message(f"stopped at step {done} of {num_steps}, saved; add --resume to the same command to go on")
            return
        process.doing("evaluating", num_steps)
        evaluate_at(num_steps)
        written = ("final.pth", "metrics.json") if proposals_only else ("final.pth", "metrics.json", "predictions.json")
        log.message(f"done: {', '.join(f'{folder}/{name}' for name in written)}")


def check_stream(config: Config, data: CocoAnnotations, process: Process) -> checkpoint.State:
    """What determines which images make up which step, for the checkpoint; the same in all processes or refused."""
    stream = {"data_sha256": data.sha256(), "batch_size": config.train.batch_size, "seed": config.seed}
    streams = process.gather(stream)

    def compare() -> None:
        others = [str(rank) for rank, of_process in enumerate(streams) if of_process != stream]
        if others:
            raise InputError(
                f"{data.source}: the processes {', '.join(others)} read other training data than the main process; "
                "copy the same files to all machines"
            )

    process.from_main(compare)
    return stream


def what_changed(state: checkpoint.State, config: Config, stream: checkpoint.State) -> str:
    """What is not as it was when the checkpoint was written, in words; empty if nothing."""
    parts = []
    if state["config"] != dump_config(config):
        parts.append(f"the config changed since that checkpoint:\n{changes(state['config'], dump_config(config))}")
    then, now = state.get("stream", stream)["data_sha256"], stream["data_sha256"]
    if then != now:
        parts.append("the training data changed since that checkpoint: other images come next than would have come")
    versions = checkpoint.versions()
    other = [
        f"{k} {v}, now {versions.get(k)}" for k, v in state.get("versions", versions).items() if versions.get(k) != v
    ]
    if other:
        parts.append(f"written with {', '.join(other)}: the run goes on, but not to the same bits")
    return "\n".join(parts)


def value_to_beat(best: Path, headline: str, log: RunLog) -> float:
    """The metric of the best checkpoint so far; below all values if there is none."""
    if not best.exists():
        return -1.0
    try:
        value: float = checkpoint.load_checkpoint(best).get(headline, -1.0)
    except checkpoint.DamagedCheckpoint as error:
        damaged = best.rename(best.with_name(f"{best.name}.damaged"))
        log.message(f"{error}\nrenamed to {damaged.name}; the next evaluation counts as the best so far")
        return -1.0
    return value


def was_evaluated(log: RunLog, step: int) -> bool:
    """Whether the log of the interrupted run has an evaluation after `step` steps."""
    return any(record["step"] == step and any(name.startswith("val/") for name in record) for record in log.kept)


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


if __name__ == "__main__":
    main()
