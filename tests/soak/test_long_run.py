"""Two thousand steps, with evaluations, checkpoints and workers: neither memory nor open files grow."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest

from tests.soak.conftest import TRAIN, Show

NUM_STEPS = 2000
SETTLED = 200
"""Steps after which nothing may grow."""


def memory_mb(pid: int) -> float:
    """Private memory of a process: shared pages of batches under way come and go."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")) / 1000


def family(pid: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_and_open_files_stay(start, tiny, tmp_path, show: Show, num_workers):
    run = [f"train.steps={NUM_STEPS}", "train.log_every=20", "eval.tensorboard_images=2", "train.ema_decay=0.99"]
    workers = [f"data.num_workers={num_workers}"]
    job = start(TRAIN, *tiny, *run, *workers, "--output-dir", tmp_path / "run")
    samples: list[tuple[int, float, int, float]] = []  # step, memory of the main process, its files, memory of workers
    while job.process.poll() is None:
        steps = [line for line in job.text().splitlines() if line.startswith("step ") and " eta " in line]
        if steps:
            step = int(steps[-1].split()[1].split("/")[0])
            try:
                main, *others = family(job.process.pid)
                files = len(list(Path(f"/proc/{main}/fd").iterdir()))
                samples.append((step, memory_mb(main), files, sum(map(memory_mb, others))))
            except OSError:  # it ends
                break
        time.sleep(0.5)
    assert job.wait() == 0, job.text()

    early = [s for s in samples if SETTLED <= s[0] < SETTLED + 300]
    late = [s for s in samples if s[0] >= NUM_STEPS - 300]
    assert len(early) > 5
    assert len(late) > 5
    before, after = ([statistics.median(column) for column in zip(*part, strict=True)] for part in (early, late))
    show(
        f"{NUM_STEPS} steps, {num_workers} workers: memory {before[1]:.1f} -> {after[1]:.1f} MB "
        f"({100 * (after[1] / before[1] - 1):+.2f} %), open files {before[2]:.0f} -> {after[2]:.0f}, "
        f"workers {before[3]:.1f} -> {after[3]:.1f} MB"
    )
    assert after[1] < 1.01 * before[1]
    assert max(s[2] for s in late) <= max(s[2] for s in early)
    assert after[3] <= max(1.01 * before[3], 1)
