"""Disks that fill up, become read-only or vanish under a run: one clear error, and the checkpoints stay whole.

Needs Linux and the right to mount (root): each disk is a file system in memory, in a name space of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fpn_det.engine.checkpoint import load_checkpoint
from tests.soak.conftest import TRAIN, Show

MOUNT = ["unshare", "--mount", "bash", "-c"]


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = "mount -t tmpfs -o size=1m none /mnt"
    return subprocess.run([*MOUNT, command], capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs the right to mount a file system")


def on_a_disk(tmp_path: Path, script: str) -> str:
    """Run a script whose $D is a disk of 420 MB and $T the training on it; copies to $KEEP what the disk holds then."""
    disk, keep = tmp_path / "disk", tmp_path / "keep"
    disk.mkdir()
    keep.mkdir()
    command = f"mount -t tmpfs -o size=420m none {disk} || exit 9; {script}; cp -r {disk}/. {keep} 2>/dev/null; exit 0"
    done = subprocess.run(
        [*MOUNT, command],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "D": str(disk), "KEEP": str(keep), "PYTHON": sys.executable},
    )
    return done.stdout + done.stderr


@pytest.fixture
def train(tiny) -> str:
    """The command, to be followed by further overrides; checkpoints are 180 MB."""
    run = ["train.steps=400", "train.ema_decay=0.99", "train.save_every=4", "eval.every=0", "--output-dir", "$D/run"]
    return " ".join(["$PYTHON", str(TRAIN), *(f"'{a}'" if "[" in a else a for a in [*tiny, *run])])


def assert_one_error(text: str, words: str) -> None:
    assert "Traceback" not in text, text
    [error] = [line for line in text.splitlines() if line.startswith("error: ")]
    assert words in error
    assert ("--resume" in error) == ("No such file" not in words)


@needs_mount
def test_a_disk_that_fills_up(tmp_path, train, show: Show):
    """Two checkpoints fit, a third does not."""
    text = on_a_disk(tmp_path, f"{train}; echo exit code $?")
    assert "exit code 2" in text
    assert_one_error(text, "No space left on device")
    kept = sorted((tmp_path / "keep/run").glob("step_*.pth"))
    assert [load_checkpoint(path)["step"] for path in kept] == [4, 8]
    assert not list((tmp_path / "keep/run").glob(".*.tmp"))
    show(next(line for line in text.splitlines() if line.startswith("error"))[:150])


@needs_mount
def test_a_folder_that_becomes_read_only(tmp_path, train):
    """A mount over the folder stands for the file system, which cannot be made read-only while files are open on it."""
    wait = "until [ -e $D/run/step_00000004.pth ]; do sleep 0.1; done"
    change = "mount --bind $D/run $D/run && mount -o remount,bind,ro $D/run"
    text = on_a_disk(tmp_path, f"{train} train.keep_checkpoints=1 & {wait}; {change}; wait; umount $D/run")
    assert_one_error(text, "Read-only file system")
    assert load_checkpoint(next((tmp_path / "keep/run").glob("step_*.pth")))["step"] >= 4


@needs_mount
def test_a_folder_that_is_read_only_from_the_start(tmp_path, train):
    text = on_a_disk(tmp_path, f"mount -o remount,ro $D; {train}; echo exit code $?")
    assert "exit code 2" in text
    assert_one_error(text, "Read-only file system")


def test_a_folder_that_vanishes(start, tiny, tmp_path):
    options = ["train.steps=400", "train.save_every=4", "eval.every=0", "--output-dir", str(tmp_path / "run")]
    job = start(TRAIN, *tiny, *options)
    job.wait_for("step 5/")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert job.wait() == 2
    assert_one_error(job.text(), "No such file or directory")
    assert load_checkpoint(tmp_path / "elsewhere/step_00000004.pth")["step"] == 4
    assert not (tmp_path / "run").exists()
