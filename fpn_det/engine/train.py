"""The training loop, in the open: one function, read from top to bottom."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import FrameType, TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fpn_det.engine.distributed import Process
from fpn_det.engine.optim import MovingAverage
from fpn_det.engine.profile import StepProfiler
from fpn_det.engine.runlog import RunLog
from fpn_det.structures import Batch, InputError


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    optimizer: torch.optim.Optimizer,
    lr_at: Callable[[int], float],
    start_step: int,
    num_steps: int,
    seed: int,
    process: Process,
    log: RunLog,
    save: Callable[[int], None],
    evaluate: Callable[[int], None],
    accumulate: int = 1,
    precision: str = "fp32",
    clip_norm: float | None = None,
    ema: MovingAverage | None = None,
    profiler: StepProfiler | None = None,
    log_every: int = 20,
    save_every: int = 5000,
    evaluate_every: int = 0,
) -> int:
    """Train from `start_step` to `num_steps`, or until a signal asks to stop.

    Args:
        model: returns losses and stats for a batch, on the device of `process`.
        batches: micro-batches of this process from `start_step` on, without end.
        optimizer: over the parameters of `model`.
        lr_at: learning rate at a step.
        start_step, num_steps: first step, and the step to stop before.
        seed: of the run; the randomness of a step depends on (seed, step, rank) alone, so resuming needs no state.
        process: this process among all.
        log: where scalars go.
        save: called with the number of steps done, in every process, every `save_every` steps and before stopping.
        evaluate: called likewise every `evaluate_every` steps (0: never) but not at the end; saving comes first.
        accumulate: micro-batches per step.
        precision: `fp32`, or `bf16` for autocast.
        clip_norm: upper bound of the gradient's norm.
        ema: moving average of the weights, updated after each step.
        profiler: told of each step.
        log_every: steps between two log records.

    Returns:
        The number of steps done; less than `num_steps` after SIGINT or SIGTERM.

    Raises:
        InputError: the loss or the gradient is not finite.
    """
    device = process.device
    network = model
    if process.world_size > 1:
        # Buffers need no sharing at each step: those of the main process are the ones saved and evaluated.
        # Parts that are compiled are graphs of their own already; cut at its buckets, they would be many more.
        torch._dynamo.config.optimize_ddp = False
        network = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    window = Window()
    stream = iter(batches)
    model.train()
    with StopSignal() as stop:
        for step in range(start_step, num_steps):
            torch.manual_seed(step_seed(seed, step, process.rank))
            lr = lr_at(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            for micro in range(accumulate):
                waiting_since = time.perf_counter()
                batch = next(stream)
                window.waited(time.perf_counter() - waiting_since)
                batch = batch.to(device, non_blocking=True)
                # Gradients are averaged over the processes once per step, with the last micro-batch.
                is_last = micro == accumulate - 1
                with nullcontext() if network is model or is_last else network.no_sync():  # type: ignore[operator]
                    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                        losses, stats = network(batch)
                        loss = torch.stack(list(losses.values())).sum()
                    (loss / accumulate).backward()
                window.add({"loss": loss, **losses, **stats}, num_images=len(batch.images))
            grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if clip_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, clip_norm, grad_norm)
            optimizer.step()
            if ema is not None:
                ema.update(model)
            window.add({"grad_norm": grad_norm})

            done = step + 1
            log.advance()
            if profiler is not None:
                profiler.step()
            # Asking all processes costs a synchronisation: done at every step only where there is one process.
            may_stop = process.world_size == 1 or done % log_every == 0
            stopping = may_stop and process.any(stop.requested)
            saving = done % save_every == 0 or done == num_steps or stopping
            evaluating = bool(evaluate_every) and done % evaluate_every == 0 and done < num_steps
            if done % log_every == 0 or saving or evaluating:  # nothing is saved before it proved finite
                scalars = window.close(process)
                eta = format_seconds((num_steps - done) * scalars["speed/s_per_step"])
                log.training(done, {**scalars, "train/lr": lr}, eta=eta)
                loss_mean, norm_mean = scalars["train/loss"], scalars["train/grad_norm"]
                if not math.isfinite(loss_mean + norm_mean):
                    raise InputError(
                        f"the loss is {loss_mean}, the gradient's norm {norm_mean} at step {done}: training diverged. "
                        f"Lower optim.lr (now {lr:.3g}), lengthen optim.warmup_steps or set optim.clip_norm; "
                        "the last checkpoint is kept"
                    )
            with profiler.paused() if profiler is not None and (saving or evaluating) else nullcontext():
                if saving:
                    save(done)
                if stopping:
                    return done
                if evaluating:
                    evaluate(done)
                    window.restart()
    return num_steps


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one step of one process."""
    return int(np.random.SeedSequence((seed, 3, step, rank)).generate_state(1, np.uint64)[0]) >> 1


class Window:
    """Means over the steps since the last log record; tensors stay on the device until then."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget everything and start the clock."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._num_images = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def add(self, values: dict[str, Tensor], num_images: int = 0) -> None:
        """Add scalars of a step or micro-batch."""
        for name, value in values.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._num_images += num_images

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for data."""
        self._waited += seconds

    def close(self, process: Process) -> dict[str, float]:
        """The means over steps and processes, with throughput; restarts the window (collective)."""
        names = list(self._sums)
        means = process.mean(torch.stack([self._sums[n].float() / self._counts[n] for n in names])).tolist()
        elapsed = time.perf_counter() - self._since
        scalars = {f"train/{name}": mean for name, mean in zip(names, means, strict=True)}
        scalars["speed/images_per_s"] = self._num_images * process.world_size / elapsed
        scalars["speed/s_per_step"] = elapsed / self._counts["grad_norm"]
        scalars["speed/data_wait_share"] = self._waited / elapsed
        if process.device.type == "cuda":
            scalars["speed/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.restart()
        return scalars


class StopSignal:
    """Notes SIGINT and SIGTERM while it is entered; a second signal acts as usual."""

    def __init__(self) -> None:
        self.requested = False

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


def format_seconds(seconds: float) -> str:
    """Hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
