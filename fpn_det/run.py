"""One training run, from the data to metrics.json: what happens around the loop of `engine.train`."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from fpn_det import build
from fpn_det.config import Config, dump_config
from fpn_det.data.checks import UnreadableImages, check_same_categories, compare_splits
from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.loader import explain_unreadable
from fpn_det.data.problems import format_problems
from fpn_det.data.report import write_report
from fpn_det.engine import checkpoint, run_folder
from fpn_det.engine.checkpoint import State
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
from fpn_det.engine.distributed import Process
from fpn_det.engine.evaluate import View
from fpn_det.engine.profile import StepProfiler
from fpn_det.engine.runlog import RunLog
from fpn_det.engine.train import train
from fpn_det.files import write_text
from fpn_det.learner import Learner
from fpn_det.snapshots import draw_training, draw_validation
from fpn_det.structures import Batch, InputError


def run(config: Config, folder: Path, *, resume: bool, profile: bool = False, process: Process) -> None:
    """Train and evaluate (collective).

    Args:
        config: of the run.
        folder: gets all that the run writes.
        resume: whether to go on from the newest checkpoint there.
        profile: whether to profile ten steps.
        process: this process among all.

    Raises:
        InputError: of the data, the config, the folder or a checkpoint; `Diverged` if training did.
    """
    train_data, val_data = build.load_train_data(config), build.load_val_data(config)
    truth = build.load_ground_truth(config)
    check_same_categories(train_data, val_data)
    with ExitStack() as stack:
        # The main process has the lock, reads and writes for all.
        state, notes = process.from_main(lambda: stack.enter_context(run_folder.opened_run(folder, resume=resume)))
        Training(config, folder, train_data, val_data, truth, state, process).run(notes, profile=profile)


class Training:
    """A run in a folder of its own: what learns, from what, and all that is told and written of it.

    Args:
        config: of the run.
        folder: opened by this run.
        train_data, val_data: of the same classes.
        truth: what evaluations compare with.
        state: the checkpoint to go on from, emptied here; None for a fresh run.
        process: this process among all.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        train_data: CocoAnnotations,
        val_data: CocoAnnotations,
        truth: GroundTruth,
        state: State | None,
        process: Process,
    ) -> None:
        self.config, self.folder, self.process = config, folder, process
        self.train_data, self.val_data, self.truth = train_data, val_data, truth
        self.categories = train_data.categories
        self.num_steps = build.num_steps(config, len(train_data))
        self.evaluate_every = build.interval(config.eval.every, self.num_steps)
        self.proposals_only = config.model.kind == "rpn"
        self.headline = "AR1000" if self.proposals_only else "AP"
        self.best_value = -1.0  # of the headline, in best.pth; below all values

        self.stream = check_stream(config, train_data, process)
        self.learner = Learner(config, self.categories, device=process.device, pretrained=state is None)
        self.origin = self.learner.origin
        known = state or {}
        self.start_step: int = known.get("step", 0)
        self.skipped = SkippedSteps(limit=build.max_skipped(config, self.num_steps), state=known.get("skipped"))
        self.unreadable = UnreadableImages(train_data, drop_limit=config.data.drop_limit, known=known.get("unreadable"))
        if state is not None:
            self.load(state)

        # Only the main process reports: comparing two sets of COCO's size takes seconds.
        self.between = compare_splits(train_data, val_data) if process.is_main else []
        if process.is_main:
            write_text(folder / "config.yaml", dump_config(config))
            self.write_data_report()
        self.val_batches = build.build_val_loader(config, val_data, process=process)
        self.log = RunLog(folder if process.is_main else None, start_step=self.start_step, num_steps=self.num_steps)

    def load(self, state: State) -> None:
        """Go on from a checkpoint of this folder."""
        source = run_folder.step_path(self.folder, self.start_step)
        if self.start_step > self.num_steps:
            raise InputError(
                f"{source} is beyond the end of the run: train.steps or train.epochs give {self.num_steps}; raise it"
            )
        checkpoint.check_categories(state, source, self.categories, self.train_data.source)
        self.learner.load_state_dict(state, source)
        self.origin = what_changed(state, self.config, self.stream) or "nothing has changed since that checkpoint"
        state.clear()  # the weights need not be in memory twice

    def run(self, notes: Sequence[str], *, profile: bool) -> None:
        """Train and evaluate, or as much of it as a signal allows; `notes` are about the folder, for the log."""
        with self.log:
            self.introduce(notes)
            done = self.start_step
            if done < self.num_steps:
                self.make_up_for_evaluation()
                done = self.take_steps(profile=profile)
            if done < self.num_steps:
                self.log.message(
                    f"stopped at step {done} of {self.num_steps}, saved; add --resume to the same command to go on"
                )
                return
            self.process.doing("evaluating", self.num_steps)
            self.evaluate(self.num_steps)
            written = ["final.pth", "metrics.json", *([] if self.proposals_only else ["predictions.json"])]
            self.log.message(f"done: {', '.join(f'{self.folder}/{name}' for name in written)}")
            if not self.proposals_only:
                best = shlex.quote(f"{self.folder}/best.pth")
                self.log.message(f"what it gets wrong: python tools/eval.py --checkpoint {best} --report")

    def introduce(self, notes: Sequence[str]) -> None:
        """Begin the log: what was found in the folder and in the data, and what is about to happen."""
        for note in notes:
            self.log.message(note)
        if self.process.is_main:
            self.best_value = value_to_beat(self.folder / "best.pth", self.headline, self.log)
        for data in (self.train_data, self.val_data):
            self.log.message(data.summary())
            if data.problems:
                self.log.message(format_problems(data.problems))
        if self.between:
            self.log.message(f"images of both splits:\n{format_problems(self.between)}")
        self.log.text(self.start_step, "config", dump_config(self.config))
        self.log.message(self.plan())
        if self.origin:
            self.log.message(self.origin)

    def plan(self) -> str:
        """What is about to happen, in words."""
        config, model = self.config, self.learner.model
        total = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        optim, batch_size = config.optim, config.train.batch_size
        scale = f"= {optim.lr:g} x {batch_size} / {optim.base_batch_size}" if optim.scale_lr else "(optim.scale_lr off)"
        begin = f"resuming at step {self.start_step} of" if self.start_step else "training"
        epochs = self.num_steps * batch_size / len(self.train_data)
        return (
            f"{total / 1e6:.1f} M parameters, {trainable / 1e6:.1f} M trained\n"
            f"{begin} {self.num_steps:,} steps of {batch_size} images ({epochs:.1f} epochs) on "
            f"{self.process.world_size} x {self.process.device.type}, {config.train.precision}\n"
            f"learning rate {build.peak_lr(config):g} {scale}, "
            f"{build.warmup_steps(config, self.num_steps)} steps of warm-up"
        )

    def make_up_for_evaluation(self) -> None:
        """Evaluate if the run was stopped between saving and evaluating."""
        step, every = self.start_step, self.evaluate_every
        is_due = step > 0 and every > 0 and step % every == 0
        if is_due and self.process.from_main(lambda: not was_evaluated(self.log, step)):
            self.process.doing("evaluating", step)
            self.evaluate(step)

    def take_steps(self, *, profile: bool) -> int:
        """Take the steps that are left, or as many as a signal allows; returns the number of steps done in all."""
        config, process = self.config, self.process
        with StepProfiler(self.folder, self.log) if profile and process.is_main else nullcontext() as profiler:
            batches = build.build_train_loader(config, self.train_data, start_step=self.start_step, process=process)
            return train(
                self.learner.model,
                self.shown_first(batches),
                optimizer=self.learner.optimizer,
                scaler=self.learner.scaler,
                lr_at=build.build_schedule(config, self.num_steps),
                start_step=self.start_step,
                num_steps=self.num_steps,
                seed=config.seed,
                process=process,
                log=self.log,
                skipped=self.skipped,
                note_unreadable=self.note_unreadable,
                save=self.save,
                evaluate=self.evaluate,
                accumulate=config.train.accumulate,
                precision=config.train.precision,
                clip_norm=config.optim.clip_norm,
                ema=self.learner.ema,
                profiler=profiler,
                log_every=config.train.log_every,
                save_every=build.interval(config.train.save_every, self.num_steps),
                evaluate_every=self.evaluate_every,
            )

    def shown_first(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; a fresh run shows images of the first one in TensorBoard."""
        for i, batch in enumerate(batches):
            if i == 0 and self.start_step == 0:
                for index in range(min(self.config.eval.tensorboard_images, len(batch.images))):
                    self.log.image(1, f"images/train/{index}", draw_training(batch, index, self.categories.names))
            yield batch

    def note_unreadable(self, image_ids: list[int]) -> None:
        """Tell of training images that were replaced by others, and end the run if they are too many."""
        lines = self.unreadable.note(image_ids)
        for line in lines:
            self.log.message(line)
        if lines:
            self.write_data_report()
        if refusal := self.unreadable.refusal():
            raise InputError(refusal)

    def write_data_report(self) -> None:
        """Write what is wrong with the data, as far as it is known."""
        splits = {"train": self.unreadable.without(), "val": self.val_data}
        write_report(self.folder / "data_report.json", splits, between=self.between)

    def save(self, step: int) -> None:
        """Write the checkpoint to resume from after `step` steps."""
        if self.process.is_main:
            state = {
                **self.weights_for_use(step),
                **self.learner.state_dict(),  # whose model is the one that is trained, not its average
                "stream": self.stream,
                "skipped": self.skipped.state_dict(),
                "unreadable": self.unreadable.state_dict(),
            }
            checkpoint.save_checkpoint(run_folder.step_path(self.folder, step), state)
            run_folder.prune_checkpoints(self.folder, self.config.train.keep_checkpoints)

    def weights_for_use(self, step: int) -> State:
        """The content of a checkpoint to detect with."""
        return {
            "model": self.learner.detector.state_dict(),
            "categories": self.categories.state_dict(),
            "config": dump_config(self.config),
            "step": step,
            "versions": checkpoint.versions(),
        }

    def evaluate(self, step: int) -> bool:
        """Evaluate after `step` steps, and keep what comes of it (collective); the training goes on: False."""
        config, detector, truth, process = self.config, self.learner.detector, self.truth, self.process
        process.share_buffers(detector)
        if self.proposals_only:
            recalls = build.evaluate_model_proposals(config, detector, self.val_batches, truth, process=process)
            if recalls is not None:
                self.record(step, recalls, PROPOSAL_METRIC_NAMES, format_proposal_table(recalls))
            return False
        views = [View(batches=self.val_batches)]
        evaluated = build.evaluate_model(config, detector, views, truth, self.categories, process=process)
        if evaluated is not None:
            metrics, results = evaluated
            self.record(step, metrics, METRIC_NAMES, format_table(metrics))
            for index in range(min(config.eval.tensorboard_images, len(self.val_data))):
                self.log.image(step, f"images/val/{index}", draw_validation(self.val_data, index, results))
            if step == self.num_steps:
                write_results(self.folder / "predictions.json", results)
        return False

    def record(self, step: int, metrics: Metrics | ProposalMetrics, names: Sequence[str], table: str) -> None:
        """Tell and write the metrics after `step` steps, and the weights if they are the best or the last."""
        self.log.message(f"step {step}:\n{table}")
        for line in explain_unreadable(self.val_data, metrics.get("unreadable_images", [])):
            self.log.message(line)
        numbers: dict[str, Any] = {**metrics, "step": step}
        if numbers[self.headline] > self.best_value:
            self.best_value = numbers[self.headline]
            best = self.weights_for_use(step) | {self.headline: self.best_value}
            checkpoint.save_checkpoint(self.folder / "best.pth", best)
        scalars = {f"val/{name}": numbers[name] for name in names}
        if self.config.eval.tensorboard_classes:
            scalars |= {f"val_classes/{name}": of["AP"] for name, of in numbers.get("per_class", {}).items()}
        self.log.scalars(step, scalars)  # which says that this step is evaluated
        if step == self.num_steps:
            checkpoint.save_checkpoint(self.folder / "final.pth", self.weights_for_use(step))
            self.log.write_json("metrics.json", numbers)


def check_stream(config: Config, data: CocoAnnotations, process: Process) -> State:
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


def what_changed(state: State, config: Config, stream: State) -> str:
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


def changes(before: str, after: str) -> str:
    """The lines that differ between two configs."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "then", "now", lineterm="", n=0)
    return "\n".join(line for line in lines if line.startswith(("-", "+")))


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
