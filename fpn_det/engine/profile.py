"""Where the time of a training step goes: a trace of ten steps, and the operators that take most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fpn_det.engine.runlog import RunLog

SKIPPED_STEPS = 5
"""The first steps allocate memory and choose algorithms."""
PROFILED_STEPS = 10


class StepProfiler:
    """Profiles `PROFILED_STEPS` steps of a run after its first few, and reports them; the run goes on.

    Args:
        folder: `trace.json.gz` goes there, for chrome://tracing or ui.perfetto.dev.
        log: takes the table of the operators.
    """

    def __init__(self, folder: Path, log: RunLog) -> None:
        self.path = folder / "trace.json.gz"
        self.log = log
        has_gpu = torch.cuda.is_available()
        self.num_steps = 0
        self.sort_by = "self_device_time_total" if has_gpu else "self_cpu_time_total"
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu else [])]
        self._profile = profile(
            activities=self._activities,
            schedule=schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=PROFILED_STEPS, repeat=1),
            on_trace_ready=self._report,
        )

    def __enter__(self) -> Self:
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)
        if self.num_steps <= SKIPPED_STEPS:
            self.log.message(f"no profile: it begins after {SKIPPED_STEPS} steps, the run ended after {self.num_steps}")

    def step(self) -> None:
        """Say that a step is done."""
        self.num_steps += 1
        self._profile.step()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens within, such as an evaluation between two steps."""
        recording = SKIPPED_STEPS <= self.num_steps < SKIPPED_STEPS + PROFILED_STEPS
        if recording:
            self._profile.toggle_collection_dynamic(False, self._activities)
        try:
            yield
        finally:
            if recording:
                self._profile.toggle_collection_dynamic(True, self._activities)

    def _report(self, profiled: profile) -> None:
        num_profiled = min(self.num_steps - SKIPPED_STEPS, PROFILED_STEPS)
        if num_profiled <= 0:
            return
        profiled.export_chrome_trace(str(self.path))
        operators = profiled.key_averages()
        operators[:] = [row for row in operators if not row.key.startswith("ProfilerStep")]  # these contain the pauses
        table = operators.table(sort_by=self.sort_by, row_limit=20, max_name_column_width=50).strip()
        self.log.message(f"profile of {num_profiled} steps, all of them together:\n{table}\ntrace: {self.path}")
