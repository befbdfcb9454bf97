"""A run that is killed again and again ends with the bits of the run that was left alone."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from fpn_det.engine.checkpoint import load_checkpoint
from tests.soak.conftest import TRAIN, Job, Show

NUM_STEPS = 240
KILLS = ["writing"] * 8 + ["moment"] * 12
"""SIGKILL while a checkpoint is being written, and at a random moment from the start on."""
STOPS = 5
"""SIGTERM at a random moment."""


@pytest.fixture
def options(tiny) -> list[str]:
    """A checkpoint of 180 MB every 3 steps of 2 micro-batches, so that a kill often falls into writing one."""
    run = ["train.accumulate=2", "train.ema_decay=0.99", "train.save_every=3", "train.keep_checkpoints=2"]
    return [*tiny, *run, f"train.steps={NUM_STEPS}", "train.log_every=1", "eval.every=40", "eval.tensorboard_images=0"]


def train(options: list[str], folder: Path, number: int) -> Job:
    arguments = [TRAIN, *options, f"data.num_workers={number % 3}", "--output-dir", folder, "--resume"]
    return Job(arguments, folder.parent / f"{folder.name}_{number}.txt")


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = Counter((r["step"], "val/AP" in r) for r in records)
    assert set(steps.values()) == {1}  # none missing, none twice
    assert sum(is_evaluation for _, is_evaluation in steps) == NUM_STEPS // 40
    return {r["step"]: r["loss/total"] for r in records if "loss/total" in r}


def test_twenty_kills_and_five_stops(options, tmp_path, show: Show):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    with train(options, straight, 0) as job:
        assert job.wait() == 0, job.text()

    dice = random.Random(0)
    ways = KILLS + ["stop"] * STOPS
    dice.shuffle(ways)
    resumed_at, during_write = [], 0
    for number, way in enumerate(ways, start=1):
        with train(options, killed, number) as job:
            if way == "writing":
                job.wait_for(" eta ")
                time.sleep(dice.uniform(0, 4))  # the first checkpoint, or a later one
                while not list(killed.glob(".step_*.tmp")):
                    assert job.process.poll() is None, job.text()
                time.sleep(dice.uniform(0, 0.1))
            elif way == "stop" or dice.random() < 0.8:
                job.wait_for(" eta ")
                time.sleep(dice.uniform(0, 1.5))
            else:
                time.sleep(dice.uniform(0, 5))  # while it starts
            assert job.process.poll() is None, job.text()
            job.process.send_signal(signal.SIGTERM if way == "stop" else signal.SIGKILL)
            code = job.wait(seconds=60)
            assert code == (0 if way == "stop" else -signal.SIGKILL), job.text()
            during_write += bool(list(killed.glob(".step_*.tmp")))
            assert "Traceback" not in job.text()
            resumed_at += [line.split()[3] for line in job.text().splitlines() if line.startswith("resuming at step")]
    with train(options, killed, len(ways) + 1) as job:
        assert job.wait() == 0, job.text()

    for name in (f"step_{NUM_STEPS:08d}.pth", "final.pth", "best.pth"):
        one, other = (load_checkpoint(folder / name) for folder in (killed, straight))
        weights = [(state["model"], state.get("ema", {})) for state in (one, other)]
        for parts in zip(*weights, strict=True):
            assert parts[0].keys() == parts[1].keys()
            assert all(torch.equal(parts[0][key], parts[1][key]) for key in parts[0])
        assert one["step"] == other["step"]
    for name in ("metrics.json", "predictions.json"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    assert losses(killed) == losses(straight)
    assert not list(killed.glob("*.tmp")) + list(killed.glob("*.damaged"))
    assert during_write >= 3
    show(
        f"{len(KILLS)} SIGKILL, {during_write} of them while a checkpoint was being written, and {STOPS} SIGTERM: "
        f"{NUM_STEPS} steps to the same bits, resumed at steps {', '.join(resumed_at)}"
    )
