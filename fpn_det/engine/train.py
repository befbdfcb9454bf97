"""The training loop, in the open: one function, read from top to bottom."""

from __future__ import annotations

import inspect
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fpn_det.engine.diagnosis import Diverged, FailedStep, SkippedSteps, merged
from fpn_det.engine.distributed import Process
from fpn_det.engine.memory import explained_memory_errors, peak_memory_gib
from fpn_det.engine.optim import MovingAverage, RunningStatistics, step_if
from fpn_det.engine.precision import Precision, autocast
from fpn_det.engine.profile import StepProfiler
from fpn_det.engine.runlog import RunLog, short_name
from fpn_det.structures import Batch


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    lr_at: Callable[[int], float],
    start_step: int,
    num_steps: int,
    seed: int,
    process: Process,
    log: RunLog,
    skipped: SkippedSteps,
    note_unreadable: Callable[[list[int]], None],
    save: Callable[[int], None],
    evaluate: Callable[[int], bool],
    accumulate: int = 1,
    precision: Precision = "fp32",
    clip_norm: float | None = None,
    ema: MovingAverage | None = None,
    profiler: StepProfiler | None = None,
    log_every: int = 20,
    save_every: int = 5000,
    evaluate_every: int = 0,
) -> int:
    """Train from `start_step` to `num_steps`, or until a signal or `evaluate` asks to stop.

    A step whose loss or gradient is not finite in any process changes no weight, no moment and no running statistic. It
    is counted in `skipped`.

    Args:
        model: returns losses and stats for a batch, on the device of `process`.
        batches: micro-batches of this process from `start_step` on, without end.
        optimizer: over the parameters of `model`.
        scaler: of the loss; enabled for `fp16` only.
        lr_at: learning rate at a step.
        start_step, num_steps: first step, and the step to stop before.
        seed: of the run; the randomness of a step depends on (seed, step, rank) alone, so resuming needs no state.
        process: this process among all.
        log: where scalars go.
        skipped: counts the steps that are not finite, and ends the run beyond its limit.
        note_unreadable: called on the main process with the ids of images that could not be read and were replaced; may
            end the run by an `InputError`.
        save: called with the number of steps done, in every process, every `save_every` steps, before evaluations and
            before stopping.
        evaluate: called likewise every `evaluate_every` steps (0: never) but not at the end; saving comes first. The
            training ends there if it returns True, in all processes.
        accumulate: micro-batches per step.
        precision: of the forward pass.
        clip_norm: upper bound of the gradient's norm.
        ema: moving average of the weights, updated after each step.
        profiler: told of each step.
        log_every: steps between two log records.

    Returns:
        The number of steps done; less than `num_steps` after SIGINT or SIGTERM, or if `evaluate` ended it.

    Raises:
        Diverged: too many steps were skipped.
        InputError: a batch does not fit into memory.
    """
    device = process.device
    network = model
    if process.world_size > 1:
        # Buffers need no sharing at each step: those of the main process are the ones saved and evaluated.
        # Parts that are compiled are graphs of their own already; cut at its buckets, they would be many more.
        torch._dynamo.config.optimize_ddp = False
        parameters = inspect.signature(DistributedDataParallel).parameters
        sharing = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
        options: dict[str, Any] = {sharing: False, "gradient_as_bucket_view": True}
        network = DistributedDataParallel(model, **options)
    parts = trained_parts(model)
    running_statistics = RunningStatistics(model)
    remedy = (
        "Lower train.batch_size, raise train.accumulate (now "
        f"{accumulate}), lower data.short_sides and data.long_side, or set train.precision=bf16"
    )
    window = Window(["total", *parts])
    stream = iter(batches)
    overdue = False  # whether a checkpoint waits for a step that is not skipped
    model.train()
    with StopSignal("stopping after this step and saving" if process.is_main else "") as stop:
        for step in range(start_step, num_steps):
            done = step + 1  # steps done at the end of this one: the number by which it is spoken of
            torch.manual_seed(step_seed(seed, step, process.rank))
            lr = lr_at(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            running_statistics.keep()
            for micro in range(accumulate):
                process.doing("waiting for data", done)
                waiting_since = time.perf_counter()
                batch = next(stream)
                window.waited(time.perf_counter() - waiting_since)
                process.doing("training", done)
                with explained_memory_errors(batch, device, remedy=remedy):
                    on_device = batch.to(device, non_blocking=True)
                    # Gradients are averaged over the processes once per step, with the last micro-batch.
                    is_last = micro == accumulate - 1
                    with nullcontext() if network is model or is_last else network.no_sync():  # type: ignore[operator]
                        with autocast(device, precision):
                            losses, stats = network(on_device)
                            loss = torch.stack(list(losses.values())).sum()
                        # A loss that is not finite makes the whole gradient so: then every process sees it.
                        weight = torch.where(loss.detach().isfinite(), 1 / accumulate, torch.nan)
                        scaler.scale(loss * weight).backward()
                window.add(batch, grouped(loss, losses, stats))
            loss_scale = scaler.scale(torch.ones((), device=device))
            scaler.unscale_(optimizer)
            part_norms = gradient_norms(parts, device)
            grad_norm = part_norms.norm()
            if clip_norm is not None:
                nn.utils.clip_grads_with_norm_([p for ps in parts.values() for p in ps], clip_norm, grad_norm)
            finite = grad_norm.isfinite()
            with explained_memory_errors(batch, device, remedy=remedy):  # the moments of AdamW come with its first step
                step_if(finite, optimizer)
            scaler.update()
            running_statistics.restore_unless(finite)
            if ema is not None:
                ema.update(model)
            window.end_step(
                done, lr=lr, norms=torch.cat([grad_norm[None], part_norms]), finite=finite, loss_scale=loss_scale
            )

            log.advance()
            if profiler is not None:
                profiler.step()
            # Asking all processes costs a synchronisation: done at every step only where there is one process.
            may_stop = process.world_size == 1 or done % min(log_every, 5) == 0
            stopping = may_stop and process.any(stop.requested)
            evaluating = bool(evaluate_every) and done % evaluate_every == 0 and done < num_steps
            saving = done % save_every == 0 or done == num_steps or stopping or evaluating or overdue
            if done % log_every == 0 or saving or evaluating:  # nothing is saved before it proved finite
                scalars, failed, unreadable = window.close(process)
                if unreadable is not None:
                    process.from_main(partial(note_unreadable, unreadable))
                # Weights that make a step fail may have made all fail: better to resume from before, if any come after.
                overdue = saving and bool(failed) and failed[-1].step == done and not (stopping or done == num_steps)
                saving = saving and not overdue
                if failed:
                    finite_weights = all(bool(p.isfinite().all()) for ps in parts.values() for p in ps)
                    judge = partial(
                        judge_failed_steps, skipped, log, precision=precision, weights_finite=finite_weights
                    )
                    process.from_main(partial(judge, process.gather(failed)))
                if skipped.count:
                    scalars["train/skipped_steps"] = skipped.count
                if "loss/total" in scalars:
                    skipped.note(done, loss=scalars["loss/total"], grad_norm=scalars["train/grad_norm"])
                eta = (num_steps - done) * scalars["speed/s_per_step"]
                log.training(done, {**scalars, "train/lr": lr, "speed/eta_h": eta / 3600}, eta=format_seconds(eta))
            with profiler.paused() if profiler is not None and (saving or evaluating) else nullcontext():
                if saving:
                    process.doing("saving")
                    save(done)
                if stopping:
                    return done
                if evaluating:
                    process.doing("evaluating")
                    if evaluate(done):
                        return done
                    if process.any(stop.requested) and not overdue:  # else after the next step, which saves
                        return done
                    window.restart()
    return num_steps


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one step of one process."""
    return int(np.random.SeedSequence((seed, 3, step, rank)).generate_state(1, np.uint64)[0]) >> 1


def judge_failed_steps(
    skipped: SkippedSteps,
    log: RunLog,
    of_processes: list[list[FailedStep]],
    *,
    precision: Precision,
    weights_finite: bool,
) -> None:
    """Say which steps were skipped and count them (on the main process).

    Raises:
        Diverged: there are too many; diagnosis.json is written.
    """
    failed = merged(of_processes)
    for failure in failed:
        log.message(failure.summary())
    try:
        skipped.add(failed, precision=precision, weights_finite=weights_finite)
    except Diverged as error:
        log.write_json("diagnosis.json", error.diagnosis)
        raise


def trained_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters by the first part of their names: backbone, neck, rpn, roi_head."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(name.partition(".")[0], []).append(parameter)
    return parts


def grouped(loss: Tensor, losses: dict[str, Tensor], stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scalars of a micro-batch under their names in the log, by groups of curves: `loss/total`, `train/..`."""
    parts = {f"loss/{name}": value for name, value in losses.items()}
    return {"loss/total": loss, **parts, **{f"train/{name}": value for name, value in stats.items()}}


def gradient_norms(parts: dict[str, list[nn.Parameter]], device: torch.device) -> Tensor:
    """(parts,) the norm of the gradient of each part."""
    grads = [[p.grad for p in parameters if p.grad is not None] for parameters in parts.values()]
    return torch.stack([nn.utils.get_total_norm(g) if g else torch.zeros((), device=device) for g in grads])


class Window:
    """What the steps since the last log record gave; numbers stay on the device until then.

    Args:
        norm_names: of the gradient's norms.
    """

    def __init__(self, norm_names: list[str]) -> None:
        self.norm_names = norm_names
        self._names: list[str] = []
        self._micro: list[Tensor] = []
        self._batches: list[Batch] = []
        self.restart()

    def __len__(self) -> int:
        return len(self._rows)

    def restart(self) -> None:
        """Forget everything and start the clock."""
        self._steps: list[tuple[int, float, list[Batch]]] = []
        self._rows: list[Tensor] = []
        self._unreadable: list[int] = []
        self._num_images = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def add(self, batch: Batch, values: dict[str, Tensor]) -> None:
        """Add scalars of a micro-batch; `batch` is the one on the CPU."""
        self._names = list(values)
        self._micro.append(torch.stack([value.detach().float() for value in values.values()]))
        self._batches.append(batch.without_pixels())
        self._unreadable += batch.unreadable.tolist()
        self._num_images += len(batch.images)

    def end_step(self, step: int, *, lr: float, norms: Tensor, finite: Tensor, loss_scale: Tensor) -> None:
        """Add what is known once the gradient is."""
        values = self._micro[0] if len(self._micro) == 1 else torch.stack(self._micro).mean(0)
        self._rows.append(torch.cat([torch.stack([finite.float(), loss_scale]), values, norms]))
        self._steps.append((step, lr, self._batches))
        self._micro, self._batches = [], []

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for data."""
        self._waited += seconds

    def close(self, process: Process) -> tuple[dict[str, float], list[FailedStep], list[int] | None]:
        """Sum up, and restart (collective).

        Returns:
            scalars: means over the finite steps and the processes, and throughput.
            failed: the other steps, as this process saw them.
            unreadable: on the main process, ids of images that some process could not read; None if all could be read.
        """
        rows = torch.stack(self._rows)
        finite = rows[:, 0] > 0
        sums = torch.where(finite[:, None], rows, 0).sum(0)
        sums[1] = len(self._unreadable)  # in the place of the loss scale, whose mean nobody needs
        sums = process.mean(sums)
        num_finite, unreadable_share, *totals = torch.cat([finite.sum()[None], sums[1:]]).tolist()  # waits, once
        unreadable = None
        if unreadable_share:
            unreadable = sorted({image_id for ids in process.gather(self._unreadable) for image_id in ids})
        elapsed = time.perf_counter() - self._since
        scalars: dict[str, float] = {}
        num_values = len(self._names)
        if num_finite:
            means = [total / num_finite for total in totals]
            scalars = dict(zip(self._names, means[:num_values], strict=True))
            scalars["train/grad_norm"] = means[num_values]
        scalars["speed/images_per_s"] = self._num_images * process.world_size / elapsed
        scalars["speed/s_per_step"] = elapsed / len(self._rows)
        scalars["speed/data_wait_share"] = self._waited / elapsed
        scalars |= {f"memory/{where}_peak_gib": peak for where, peak in peak_memory_gib(process.device).items()}
        failed = self._failed(rows) if num_finite < len(self._rows) else []
        self.restart()
        return scalars, failed, unreadable

    def _failed(self, rows: Tensor) -> list[FailedStep]:
        failed = []
        for (step, lr, batches), (finite, loss_scale, *values) in zip(self._steps, rows.tolist(), strict=True):
            if not finite:
                losses = dict(zip(map(short_name, self._names), values, strict=False))
                norms = dict(zip(self.norm_names, values[len(self._names) :], strict=True))
                failed.append(
                    FailedStep(
                        step=step,
                        lr=lr,
                        losses=losses,
                        gradient_norms=norms,
                        loss_scale=loss_scale,
                        counts=loss_scale <= 1,
                        batches=batches,
                    )
                )
        return failed


class StopSignal:
    """Notes SIGINT and SIGTERM while it is entered, and says so; a second signal acts as usual.

    Args:
        says: what it says; nothing if it is for another process to speak.
    """

    def __init__(self, says: str = "") -> None:
        self.requested = False
        self.says = says

    def __enter__(self) -> Self:
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._previous[signal.Signals(number)])
        if self.says:
            with suppress(OSError):  # a console that is gone: Ctrl-C ends the `tee` of a pipe, too
                # Past the buffer of sys.stderr, which may be in use at this moment.
                os.write(2, f"\n{self.says}; once more to stop at once\n".encode())


def format_seconds(seconds: float) -> str:
    """Hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
