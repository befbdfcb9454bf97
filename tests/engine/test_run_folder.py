"""The folder of a run: who may write there, and what a run goes on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fpn_det.engine import run_folder
from fpn_det.engine.checkpoint import save_checkpoint
from fpn_det.engine.run_folder import opened_run, prune_checkpoints, step_path
from fpn_det.structures import InputError


def put(folder: Path, *steps: int) -> None:
    for step in steps:
        state = {"model": {"w": torch.full((100,), float(step))}, "categories": [], "config": "", "step": step}
        save_checkpoint(step_path(folder, step), state)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_fresh_folder(tmp_path):
    folder = tmp_path / "runs/mine"
    with opened_run(folder, resume=False) as (state, notes):
        assert (state, notes) == (None, [])
        (folder / "log.txt").touch()
    assert names(folder) == {".lock", "log.txt"}
    with opened_run(tmp_path / "other", resume=True) as (state, _):
        assert state is None
    assert names(tmp_path / "other") == set()  # nothing came of it


def test_a_run_is_resumed_only_if_asked_to(tmp_path):
    put(tmp_path, 5, 900, 100_000, 90)
    with (
        pytest.raises(InputError, match=r"holds a run already \(step_00100000\.pth\); add --resume"),
        opened_run(tmp_path, resume=False),
    ):
        pass
    with opened_run(tmp_path, resume=True) as (state, notes):
        assert (state["step"], notes) == (100_000, [])


def test_the_newest_whole_checkpoint_is_taken_and_the_damaged_ones_are_named(tmp_path):
    put(tmp_path, 10, 20, 30, 40)
    damage(step_path(tmp_path, 30))
    step_path(tmp_path, 40).write_bytes(step_path(tmp_path, 40).read_bytes()[:-50])
    with opened_run(tmp_path, resume=True) as (state, notes):
        assert state["step"] == 20
        assert state["model"]["w"].tolist() == [20.0] * 100
    assert len(notes) == 2
    for step, note in zip((40, 30), notes, strict=True):
        assert f"step_000000{step}.pth: damaged" in note
        assert "resuming from" in note
    assert names(tmp_path) >= {"step_00000030.pth.damaged", "step_00000040.pth.damaged", "step_00000020.pth"}
    put(tmp_path, 25)
    prune_checkpoints(tmp_path, keep=1)  # the damaged ones do not count
    assert {p.name for p in tmp_path.glob("*.pth")} == {"step_00000025.pth"}


def test_nothing_whole_to_resume_from(tmp_path):
    put(tmp_path, 10)
    damage(step_path(tmp_path, 10))
    with (
        pytest.raises(InputError, match=r"no step_\*\.pth to resume from that is whole.*\n.*damaged"),
        opened_run(tmp_path, resume=True),
    ):
        pass
    assert "step_00000010.pth" in names(tmp_path)  # nothing is renamed where nothing is gained
    step_path(tmp_path, 10).rename(tmp_path / "final.pth")
    with pytest.raises(InputError, match=r"holds final\.pth, but no step"), opened_run(tmp_path, resume=True):
        pass


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    put(tmp_path, 10)
    (tmp_path / ".step_00000020.pth.tmp").write_bytes(b"half")
    with opened_run(tmp_path, resume=True) as (state, _):
        assert state["step"] == 10
    assert names(tmp_path) == {".lock", "step_00000010.pth"}


HOLD = """
import sys, time
from pathlib import Path
from fpn_det.engine.run_folder import opened_run
with opened_run(Path(sys.argv[1]), resume=True):
    print("has it", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_ends_however_it_ends(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "has it\n"
    put(tmp_path, 10)
    with (
        pytest.raises(InputError, match=rf"another run writes there \(process {first.pid} on .* since \d"),
        opened_run(tmp_path, resume=True),
    ):
        pass
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == first.pid
    first.kill()
    first.wait()
    with opened_run(tmp_path, resume=True) as (state, _):
        assert state["step"] == 10


def test_a_job_that_torchrun_restarts_goes_on_and_another_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-a")
    with opened_run(tmp_path, resume=False) as (state, _):
        put(tmp_path, 10)
    with opened_run(tmp_path, resume=False) as (state, _):
        assert state["step"] == 10
    # A later job that happens to have the same id.
    with monkeypatch.context() as later:
        later.setattr(run_folder, "_launched_at", lambda: time.time() + 1)
        with pytest.raises(InputError, match="add --resume"), opened_run(tmp_path, resume=False):
            pass
    # Another job, which was refused at first, does not take the run over when it is started again.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-b")
    for _ in range(2):
        with pytest.raises(InputError, match="add --resume"), opened_run(tmp_path, resume=False):
            pass
    # Without an id, the process that starts the others tells.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with opened_run(tmp_path, resume=True):
        pass
    with opened_run(tmp_path, resume=False) as (state, _):
        assert state["step"] == 10
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(InputError, match="add --resume"), opened_run(tmp_path, resume=False):
        pass
    # Without torchrun nothing goes on by itself.
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for _ in range(2):
        with pytest.raises(InputError, match="add --resume"), opened_run(tmp_path, resume=False):
            pass


def test_when_the_parent_started():
    parent = subprocess.run(["ps", "-o", "etimes=", "-p", str(os.getppid())], capture_output=True, text=True)
    assert time.time() - run_folder._launched_at() == pytest.approx(float(parent.stdout), abs=2)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"job": 5}'])
def test_a_lock_file_of_any_content(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with opened_run(tmp_path, resume=False) as (state, _):
        assert state is None


def test_pruning(tmp_path):
    put(tmp_path, 90, 5, 100_000, 900, 10)
    (tmp_path / "final.pth").touch()
    (tmp_path / "best.pth").touch()
    prune_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == {"best.pth", "final.pth", "step_00000900.pth", "step_00100000.pth"}
    prune_checkpoints(tmp_path, keep=5)
    assert len(list(tmp_path.glob("step_*.pth"))) == 2
