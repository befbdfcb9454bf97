"""The tools on a GPU: they take one where there is one, and leave what they leave on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpn_det import Detector

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tool, tiny, tmp_path_factory) -> Path:
    """Folder of a run in bf16 with a moving average and loader workers, stopped in the middle and resumed."""
    folder = tmp_path_factory.mktemp("runs") / "cuda"
    options = ("train.precision=bf16", "train.ema_decay=0.9", "data.num_workers=2", "train.save_every=4")
    assert tool("train", *tiny, *options, "--output-dir", folder).code == 0
    (folder / "final.pth").unlink()
    outcome = tool("train", *tiny, *options, "--output-dir", folder, "--resume")
    assert (outcome.code, outcome.err) == (0, "")
    return folder


def test_training_runs_there_and_says_what_it_took(trained: Path) -> None:
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    peaks = [record["memory/gpu_peak_gib"] for record in records if "memory/gpu_peak_gib" in record]
    assert peaks
    assert min(peaks) > 0


@pytest.mark.parametrize("options", [["train.precision=fp16"], ["runtime.compile=true"], ["optim.kind=adamw"]])
def test_other_ways_to_train(tool, tiny, tmp_path, options: list[str]) -> None:
    outcome = tool("train", *tiny, *options, "--output-dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "loss/total" in (tmp_path / "run/log.jsonl").read_text()


def test_evaluation_gives_nearly_what_a_cpu_gives(tiny, trained, tmp_path) -> None:
    scores = []
    for visible in ("0", ""):
        folder = tmp_path / f"gpu{visible}"
        command = [sys.executable, "tools/eval.py", *tiny, "--checkpoint", str(trained / "final.pth")]
        command += ["--output-dir", str(folder), "train.precision=fp32", "runtime.tf32=false"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert ended.returncode == 0, ended.stderr
        records = json.loads((folder / "predictions.json").read_text())
        scores.append(sorted(record["score"] for record in records))
    on_gpu, on_cpu = scores
    assert len(on_gpu) == pytest.approx(len(on_cpu), rel=0.02)
    assert on_gpu[-20:] == pytest.approx(on_cpu[-20:], abs=1e-3)


def test_the_detector(trained: Path, shapes: Path) -> None:
    image = next((shapes / "val").glob("*.*"))
    on_gpu, on_cpu = (Detector.load(trained / "final.pth", device=device) for device in ("cuda", "cpu"))
    found, expected = (detector.predict(image, score_thresh=0.0) for detector in (on_gpu, on_cpu))
    assert len(found.scores) > 0
    assert found.scores[:5].tolist() == pytest.approx(expected.scores[:5].tolist(), abs=0.05)


def test_a_job_of_torchrun_by_nccl(tiny, tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "tools/train.py", *tiny]
    command += ["--output-dir", str(tmp_path / "run"), "model.backbone.norm=sync_bn", "train.accumulate=2"]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run/final.pth").exists()
