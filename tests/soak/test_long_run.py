"""Two thousand steps, with evaluations, checkpoints and workers: neither memory nor open files grow."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.soak.conftest import TRAIN, Show

NUM_STEPS = 2000
SETTLED = 200
"""Steps after which nothing may grow."""


def memory_mb(pid: int) -> float:
    """What a process has allocated; of what it shares with its workers its part, so that the sum is all."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Pss_Anon"].split()[0]) / 1000  # not Pss_File: libraries, which other programs share, too


def family(pid: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_and_open_files_stay(start, tiny, tmp_path, show: Show, num_workers):
    run = [f"train.steps={NUM_STEPS}", "train.log_every=20", "eval.tensorboard_images=2", "train.ema_decay=0.99"]
    workers = [f"data.num_workers={num_workers}"]
    job = start(TRAIN, *tiny, *run, *workers, "--output-dir", tmp_path / "run")
    samples: list[tuple[int, float, int]] = []  # step, memory of all processes, open files of the main one
    while job.process.poll() is None:
        steps = [line for line in job.text().splitlines() if line.startswith("step ") and " eta " in line]
        if steps:
            step = int(steps[-1].split()[1].split("/")[0])
            try:
                processes = family(job.process.pid)
                files = len(list(Path(f"/proc/{job.process.pid}/fd").iterdir()))
                samples.append((step, sum(map(memory_mb, processes)), files))
            except OSError:  # it ends
                break
        time.sleep(0.1)
    assert job.wait() == 0, job.text()

    early = [s for s in samples if SETTLED <= s[0] < SETTLED + 300]
    late = [s for s in samples if NUM_STEPS - 300 <= s[0] < NUM_STEPS]  # not the end, when all is given back
    assert min(len(early), len(late)) > 20
    # The least of many samples: what a step takes for a moment is not what stays.
    (before, files_before), (after, files_after) = (
        (min(memory for _, memory, _ in part), min(files for _, _, files in part)) for part in (early, late)
    )
    show(
        f"{NUM_STEPS} steps, {num_workers} workers: memory of all processes {before:.1f} -> {after:.1f} MB "
        f"({100 * (after / before - 1):+.2f} %), open files {files_before} -> {files_after}"
    )
    assert after < 1.01 * before
    assert files_after <= files_before
