"""The profile of a run: the right steps, and a word where there is none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from fpn_det.engine.profile import StepProfiler
from fpn_det.engine.runlog import RunLog


def run(folder: Path, num_steps: int) -> str:
    """Steps of one matrix product each, and between them others that do not count; the log."""
    with (
        RunLog(folder, start_step=0, num_steps=num_steps) as log,
        StepProfiler(folder, log) as profiler,
    ):
        for step in range(num_steps):
            torch.mm(torch.ones(step + 1, 8), torch.ones(8, 8))
            profiler.step()
            with profiler.paused():
                torch.mm(torch.ones(8, 8), torch.ones(8, 8))
    return (folder / "log.txt").read_text()


@pytest.mark.parametrize(("num_steps", "profiled"), [(17, range(5, 15)), (8, range(5, 8))])
def test_steps_after_the_first_five(tmp_path: Path, num_steps: int, profiled: range) -> None:
    text = run(tmp_path, num_steps)
    assert f"profile of {len(profiled)} steps" in text
    assert "ProfilerStep" not in text
    [line] = [line.split() for line in text.splitlines() if line.split()[:1] == ["aten::mm"]]
    assert line[-1] == str(len(profiled))
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == len(profiled)


@pytest.mark.parametrize("num_steps", [0, 3, 4, 5])
def test_too_short_a_run(tmp_path: Path, num_steps: int) -> None:
    text = run(tmp_path, num_steps)
    assert f"no profile: it begins after 5 steps, the run ended after {num_steps}" in text
    assert "profile of" not in text
    assert not (tmp_path / "trace.json.gz").exists()
