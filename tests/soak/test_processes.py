"""Jobs of several processes that lose one: killed, stopped, or a whole machine of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fpn_det.engine.checkpoint import load_checkpoint
from tests.soak.conftest import ROOT, TRAIN, Job, Show, torchrun, until

NUM_STEPS = 40


@pytest.fixture
def options(tiny, tmp_path) -> list[str]:
    run = [f"train.steps={NUM_STEPS}", "train.save_every=5", "eval.every=0", "--output-dir", str(tmp_path / "run")]
    return [*tiny, *run]


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step, none missing and none twice."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [(r["step"], r["loss/total"]) for r in records if "loss/total" in r]
    assert [step for step, _ in found] == list(range(1, NUM_STEPS + 1))
    return dict(found)


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory) -> dict[int, float]:
    """The losses of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    run = [f"train.steps={NUM_STEPS}", "eval.every=0", "--output-dir", folder / "run"]
    with Job(torchrun("--standalone", "--nproc-per-node=2", TRAIN, *tiny, *run), folder / "output.txt") as job:
        assert job.wait() == 0, job.text()
    return losses(folder / "run")


@pytest.mark.parametrize("launcher", [["--standalone"], ["--master-port=0"]], ids=["standalone", "static"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_again_and_the_job_goes_on(
    start, options, straight, tmp_path, show: Show, rank, launcher
):
    if launcher == ["--master-port=0"]:
        launcher = [f"--master-port={free_port()}"]
    job = start(*torchrun(*launcher, "--nproc-per-node=2", "--max-restarts=2", TRAIN, *options))
    job.wait_for(f"step 12/{NUM_STEPS}")
    os.kill(job.ranks()[rank], signal.SIGKILL)
    assert job.wait() == 0, job.text()
    [resumed] = re.findall(r"resuming at step (\d+)", job.text())
    assert int(resumed) >= 10
    assert load_checkpoint(tmp_path / "run/final.pth")["step"] == NUM_STEPS
    assert losses(tmp_path / "run") == straight
    show(f"rank {rank} killed after step 12: resumed at step {resumed}, finished all {NUM_STEPS}")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_stands_still_is_named(start, options, show: Show, rank):
    """Stopped, not killed: nothing breaks, so all others would wait."""
    job = start(*torchrun("--standalone", "--nproc-per-node=2", TRAIN, *options, "runtime.timeout_minutes=0.1"))
    job.wait_for(f"step 12/{NUM_STEPS}")
    stopped = job.ranks()[rank]
    os.kill(stopped, signal.SIGSTOP)
    job.wait_for("Held up by", seconds=30)
    os.kill(stopped, signal.SIGKILL)
    assert job.wait(seconds=60) != 0
    [message] = re.findall(r"error \(rank \d\): no progress.*", job.text())
    assert re.search(rf"rank {1 - rank}\): no progress for \d+ s while training in step \d+", message)
    assert re.search(rf"Held up by rank {rank} on \S+, \w.* in step \d+ \(it does not answer\)", message)
    show(message[:150])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize("lost", [0, 1])
def test_two_machines_train_together_and_survive_the_loss_of_a_process(start, options, tmp_path, show: Show, lost):
    """Two agents of torchrun that meet at an endpoint, as on two machines."""
    endpoint = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=job"]
    machine = torchrun("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", *endpoint, TRAIN, *options)
    jobs = [start(*machine), start(*machine)]

    def printed() -> str:
        return "".join(job.text() for job in jobs)

    until(lambda: f"step 12/{NUM_STEPS}" in printed(), seconds=120)
    ranks = jobs[0].ranks() | jobs[1].ranks()
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[lost], signal.SIGKILL)
    assert [job.wait() for job in jobs] == [0, 0], printed()
    [resumed] = re.findall(r"resuming at step (\d+)", printed())
    assert int(resumed) >= 10
    assert load_checkpoint(tmp_path / "run/final.pth")["step"] == NUM_STEPS
    show(f"two agents, rank {lost} killed after step 12: both resumed at step {resumed}, finished all {NUM_STEPS}")


def test_two_jobs_cannot_write_one_folder(start, options):
    job = start(TRAIN, *options)
    job.wait_for("step 2/")
    second = start(TRAIN, *options, "--resume")
    assert second.wait() == 2
    assert "another run writes there" in second.text()
    assert job.wait() == 0, job.text()
    assert Path(options[-1], "final.pth").exists()


def test_the_slurm_script(start, options, tmp_path):
    """With commands in the place of Slurm's that say and do what those would on one machine."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in {
        "scontrol": "echo 127.0.0.1; echo other",
        "srun": 'exec "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    variables = {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "1"}
    environment = os.environ | variables | {"SLURM_GPUS_ON_NODE": "2", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{commands}:{environment['PATH']}"
    script = ["bash", str(ROOT / "tools/train.sbatch"), *options, "train.steps=4"]
    for expected in ("training 4 steps", "resuming at step 4 of 4 steps"):
        done = subprocess.run(script, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert expected in done.stdout
        assert "on 2 x cpu" in done.stdout


def test_sigterm_to_the_job_saves(start, options, tmp_path, show: Show):
    """As a scheduler sends it: torchrun passes it on, and the processes save before it loses patience."""
    job = start(*torchrun("--standalone", "--nproc-per-node=2", TRAIN, *options, "train.save_every=1000"))
    job.wait_for(f"step 12/{NUM_STEPS}")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(seconds=60) != 0  # torchrun's own
    [path] = (tmp_path / "run").glob("step_*.pth")
    assert load_checkpoint(path)["step"] >= 12
    assert "saved; add --resume" in job.text()
    show(f"SIGTERM to torchrun after step 12: saved at step {load_checkpoint(path)['step']}")
