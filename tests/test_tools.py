"""The command line, end to end: what a user types, what lies in the folders then, and how errors read."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from fpn_det import build
from fpn_det.config import dump_config, load_config
from fpn_det.data.shapes import CATEGORIES
from fpn_det.engine.checkpoint import load_checkpoint, save_checkpoint
from fpn_det.engine.coco_eval import METRIC_NAMES, PROPOSAL_METRIC_NAMES
from fpn_det.engine.run_folder import opened_run

ROOT = Path(__file__).parent.parent
RUN = ("train.save_every=2", "train.accumulate=2", "train.ema_decay=0.9", "optim.lr=0.01", "eval.every=4")
"""What the run `finished` adds to `tiny`."""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path_factory):
    """The tools write to runs/ of the current folder, where a user may have runs already."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def finished(tool, tiny, tmp_path_factory) -> Path:
    """Folder of a complete run of 8 steps, its console output beside it in out.txt."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    outcome = tool("train", *tiny, *RUN, "--output-dir", folder)
    assert (outcome.code, outcome.err) == (0, "")
    folder.with_name("out.txt").write_text(outcome.out)
    return folder


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(one: object, other: object) -> None:
    """Equal to the last bit, through dicts and lists of tensors and plain values."""
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def assert_same_outcome(folder: Path, expected: Path) -> None:
    """Two runs ended with the same weights, optimiser, moving average, losses, detections and metrics."""
    for name in ("step_00000008.pth", "final.pth"):
        one, other = load_checkpoint(folder / name), load_checkpoint(expected / name)
        assert_same(*({k: v for k, v in state.items() if k != "config"} for state in (one, other)))
    for name in ("predictions.json", "metrics.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    losses, expected_losses = (
        {r["step"]: r["loss/total"] for r in records(f) if "loss/total" in r} for f in (folder, expected)
    )
    assert losses == expected_losses
    steps = [(r["step"], "val/AP" in r) for r in records(folder)]
    assert len(steps) == len(set(steps))


# Training


def test_run_folder(finished, tiny, shapes):
    names = {p.name for p in finished.iterdir()}
    assert names == {
        ".lock",
        "data_report.json",
        "best.pth",
        "config.yaml",
        "final.pth",
        "log.jsonl",
        "log.txt",
        "metrics.json",
        "predictions.json",
        "step_00000004.pth",  # the last 3
        "step_00000006.pth",
        "step_00000008.pth",
        "tensorboard",
    }
    assert load_config(finished / "config.yaml") == load_config(Path(tiny[1]), [*tiny[2:], *RUN])
    assert list((finished / "tensorboard").glob("events.*"))

    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) == {*METRIC_NAMES, "max_detections", "per_class", "step"}
    assert metrics["step"] == 8
    assert all(-1 <= metrics[name] <= 1 for name in METRIC_NAMES)

    training = [r for r in records(finished) if "loss/total" in r]
    assert [r["step"] for r in training] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {"train/lr", "train/grad_norm", "train/rpn_positives", "loss/rpn_box", "speed/images_per_s"} <= training[
        0
    ].keys()
    validation = [r for r in records(finished) if "val/AP" in r]
    assert [r["step"] for r in validation] == [4, 8]
    assert validation[-1]["val/AP50"] == metrics["AP50"]
    for step, record in enumerate(training):  # cosine, lr 0.01 at batch 8, here 4; a tenth of 8 steps is no warm-up
        assert record["train/lr"] == pytest.approx(0.005 * 0.5 * (1 + math.cos(math.pi * step / 8)))

    truth = COCO(str(shapes / "annotations/val.json"))
    found = truth.loadRes(str(finished / "predictions.json"))
    assert set(found.getImgIds()) <= set(truth.getImgIds())
    assert len(found.anns) > 8


def curves(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()


def test_tensorboard_has_groups_and_pictures(finished):
    events = curves(finished)
    scalars = set(events.Tags()["scalars"])
    losses = {"total", "rpn_objectness", "rpn_box", "roi_class", "roi_box"}
    assert {name for name in scalars if name.startswith("loss/")} == {f"loss/{name}" for name in losses}
    assert {name for name in scalars if name.startswith("val/")} == {f"val/{name}" for name in METRIC_NAMES}
    assert {"train/lr", "train/grad_norm", "train/rpn_positives", "train/roi_positives"} <= scalars
    assert {"speed/images_per_s", "speed/eta_h", "speed/data_wait_share", "memory/host_peak_gib"} <= scalars
    assert {name.partition("/")[0] for name in scalars} == {"loss", "train", "speed", "memory", "val"}  # no classes
    assert set(events.Tags()["images"]) == {"images/train/0", "images/val/0"}
    assert [e.step for e in events.Images("images/val/0")] == [4, 8]
    augmented, compared = events.Images("images/train/0")[0], events.Images("images/val/0")[0]
    assert min(augmented.width, augmented.height) == 320 + 16  # 48 pixels, enlarged by 7
    assert compared.width > 2 * 320  # ground truth beside detections
    [text] = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary")]
    assert "".join(line.removeprefix("    ") for line in text.splitlines(keepends=True)) == dump_config(
        load_config(finished / "config.yaml")
    )


def test_console_output(finished):
    out = finished.with_name("out.txt").read_text()
    assert out == (finished / "log.txt").read_text()
    assert "learning rate 0.005 = 0.01 x 4 / 8" in out
    assert "24 images" in out
    assert "8 steps of 4 images" in out
    assert f"done: {finished}/final.pth" in out


def test_checkpoints(finished, shapes):
    final, last = (load_checkpoint(finished / name) for name in ("final.pth", "step_00000008.pth"))
    used = {c["category_id"] for c in json.loads((shapes / "annotations/train.json").read_text())["annotations"]}
    assert used <= {c["id"] for c in final["categories"]}
    assert all(CATEGORIES[c["name"]] == c["id"] for c in final["categories"])
    assert [c["index"] for c in final["categories"]] == list(range(len(final["categories"])))
    assert final["config"] == (finished / "config.yaml").read_text()
    assert final.keys() == {"model", "categories", "config", "step", "versions"}
    assert last.keys() == final.keys() | {"optimizer", "ema", "stream", "skipped", "unreadable"}
    assert_same(final["model"], last["ema"])
    moved = [k for k, v in last["model"].items() if not torch.equal(v, last["ema"][k])]
    assert len(moved) > 50
    best = load_checkpoint(finished / "best.pth")
    assert best["AP"] == max(r["val/AP"] for r in records(finished) if "val/AP" in r)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resuming_equals_the_straight_run(tool, tiny, finished, tmp_path, num_workers):
    for name in ("step_00000004.pth", "log.jsonl", "log.txt"):  # as if killed in step 8, before saving
        shutil.copy(finished / name, tmp_path)
    workers = f"data.num_workers={num_workers}"
    outcome = tool("train", *tiny, *RUN, workers, "--output-dir", tmp_path, "--resume")
    assert (outcome.code, outcome.err) == (0, "")
    assert "resuming at step 4 of 8 steps" in outcome.out
    assert_same_outcome(tmp_path, finished)


def test_resuming_continues_the_curves_and_may_add_those_of_classes(tool, tiny, finished, tmp_path):
    for name in ("step_00000004.pth", "log.jsonl"):
        shutil.copy(finished / name, tmp_path)
    shutil.copytree(finished / "tensorboard", tmp_path / "tensorboard")
    options = [*RUN, "eval.tensorboard_classes=true", "--resume", "--output-dir", tmp_path]
    assert tool("train", *tiny, *options).code == 0
    events, before = curves(tmp_path), curves(finished)
    for name in ("loss/total", "train/lr", "val/AP"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(e.step, e.value) for e in before.Scalars(name)]
    assert [e.step for e in events.Images("images/train/0")] == [1]
    classes = {name for name in events.Tags()["scalars"] if name.startswith("val_classes/")}
    assert classes == {f"val_classes/{name}" for name in CATEGORIES}
    of_class = json.loads((tmp_path / "metrics.json").read_text())["per_class"]["circle"]["AP"]
    assert [(e.step, e.value) for e in events.Scalars("val_classes/circle")] == [(8, pytest.approx(of_class))]


@pytest.mark.parametrize(("number", "num_workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_signal_saves_and_resuming_completes(tool, tiny, finished, tmp_path, number, num_workers):
    options = [*tiny, *RUN, "train.save_every=100", f"data.num_workers={num_workers}", "--output-dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/train.py"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    shown = ""
    while "step 2/8" not in shown:
        line = process.stdout.readline()
        assert line, process.communicate()
        shown += line
    os.killpg(process.pid, number)  # a terminal sends Ctrl-C to the loader workers too
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "\nstopping after this step and saving; once more to stop at once\n")
    assert "--resume" in out.splitlines()[-1]
    [saved] = tmp_path.glob("*.pth")
    assert 2 <= load_checkpoint(saved)["step"] < 8
    assert not (tmp_path / "metrics.json").exists()

    assert tool("train", *options, "--resume").code == 0
    assert_same_outcome(tmp_path, finished)


def test_an_existing_run_is_not_overwritten(tool, tiny, finished, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in finished.iterdir()}
    fails(tool("train", *tiny, *RUN, "--output-dir", finished), str(finished), "step_00000008.pth", "--resume")
    assert before == {p: p.stat().st_mtime_ns for p in finished.iterdir()}
    shutil.copy(finished / "final.pth", tmp_path)  # a run whose owner made room
    fails(tool("train", *tiny, *RUN, "--output-dir", tmp_path), "final.pth", "--output-dir")
    fails(tool("train", *tiny, *RUN, "--output-dir", tmp_path, "--resume"), "no step_*.pth", "--output-dir")


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tool, tiny, finished, tmp_path):
    for name in ("step_00000004.pth", "step_00000006.pth", "best.pth", "log.jsonl"):
        shutil.copy(finished / name, tmp_path)
    for name in ("step_00000006.pth", "best.pth"):
        content = bytearray((tmp_path / name).read_bytes())
        content[len(content) // 3] ^= 16
        (tmp_path / name).write_bytes(content)
    outcome = tool("train", *tiny, *RUN, "--output-dir", tmp_path, "--resume")
    assert (outcome.code, outcome.err) == (0, "")
    assert "step_00000006.pth: damaged" in outcome.out
    assert "best.pth: damaged" in outcome.out
    assert "resuming at step 4 of 8 steps" in outcome.out
    assert_same_outcome(tmp_path, finished)
    assert (tmp_path / "step_00000006.pth.damaged").exists()
    assert load_checkpoint(tmp_path / "best.pth")["step"] in (4, 8)


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(tool, tiny, finished, tmp_path):
    """Killed between saving step 4 and evaluating it; and once more after the evaluation, which is not repeated."""
    shutil.copy(finished / "step_00000004.pth", tmp_path)
    lines = (finished / "log.jsonl").read_text().splitlines(keepends=True)
    before = [line for line in lines if json.loads(line)["step"] <= 4]
    assert "val/AP" in before[-1]
    for kept, expected in ((before[:-1], 1), (before, 0)):
        (tmp_path / "log.jsonl").write_text("".join(kept))
        outcome = tool("train", *tiny, *RUN, "--output-dir", tmp_path, "--resume")
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.count("step 4:\nbox metrics") == expected
        assert (tmp_path / "log.jsonl").read_bytes().count(b"val/AP50") == 2
        assert_same_outcome(tmp_path, finished)
        for path in tmp_path.glob("*.pth"):
            if path.name != "step_00000004.pth":
                path.unlink()


def test_what_changed_since_the_checkpoint_is_said(tool, tiny, finished, altered, tmp_path):
    def other_images(content: dict) -> None:
        content["images"].reverse()

    shutil.copy(finished / "step_00000006.pth", tmp_path)
    state = load_checkpoint(tmp_path / "step_00000006.pth")
    save_checkpoint(tmp_path / "step_00000006.pth", state | {"versions": {**state["versions"], "torch": "2.0.0"}})
    change = altered("train", other_images)
    outcome = tool("train", *tiny, *RUN, change, "optim.lr=0.02", "--output-dir", tmp_path, "--resume")
    assert outcome.code == 0, outcome.err
    assert "+  lr: 0.02" in outcome.out
    assert "the training data changed since that checkpoint" in outcome.out
    assert f"written with torch 2.0.0, now {torch.__version__}" in outcome.out
    again = tool("train", *tiny, *RUN, "--output-dir", finished, "--resume")
    assert "nothing has changed since that checkpoint" in again.out


def test_a_second_run_into_a_folder_is_refused(tool, tiny, tmp_path):
    with opened_run(tmp_path, resume=False):
        code = "import sys; sys.argv = sys.argv[1:]; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-c", code, str(ROOT / "tools/train.py"), *tiny, "--output-dir", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 2
        assert f"another run writes there (process {os.getpid()}" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_short_number_formats_train(tool, tiny, finished, tmp_path, precision):
    """With fp16 the first steps may be skipped until the loss scale fits."""
    options = [*tiny, f"train.precision={precision}", "train.steps=40", "train.max_skipped=0", "eval.every=0"]
    outcome = tool("train", *options, "--output-dir", tmp_path)
    assert outcome.code == 0, outcome.err
    losses = [r["loss/total"] for r in records(tmp_path) if "loss/total" in r]
    assert len(losses) > 20
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    state = load_checkpoint(tmp_path / "step_00000040.pth")
    assert ("scaler" in state) == (precision == "fp16")
    assert all(v.dtype == torch.float32 for v in state["model"].values() if v.is_floating_point())
    resumed = tool("train", *options, "train.steps=42", "--output-dir", tmp_path, "--resume")
    assert resumed.code == 0, resumed.err
    evaluated = tool("eval", *options, "--checkpoint", tmp_path / "final.pth", "--output-dir", tmp_path / "eval")
    assert evaluated.code == 0, evaluated.err


def test_resuming_a_finished_run_only_evaluates(tool, tiny, finished):
    kept = ("predictions.json", "metrics.json", "log.jsonl")
    contents = {name: (finished / name).read_bytes() for name in kept}
    before = {p.name: p.stat().st_mtime_ns for p in finished.iterdir()}
    outcome = tool("train", *tiny, *RUN, "--output-dir", finished, "--resume")
    assert outcome.code == 0
    assert "eta" not in outcome.out
    assert {name: (finished / name).read_bytes() for name in kept} == contents
    assert (finished / "metrics.json").stat().st_mtime_ns > before["metrics.json"]
    assert (finished / "step_00000008.pth").stat().st_mtime_ns == before["step_00000008.pth"]


def test_resume_without_a_run_starts_one_in_the_named_folder(tool, tiny, tmp_path, monkeypatch):
    """Without --output-dir it is runs/NAME; overrides may stand anywhere; bf16 on the way."""
    monkeypatch.chdir(tmp_path)
    arguments = ["name=mine", *tiny, "--resume", "train.steps=2", "train.precision=bf16"]
    outcome = tool("train", *arguments, "eval.backend=hotcoco", "optim.scale_lr=false", "data.keep_empty=false")
    assert outcome.code == 0, outcome.err
    assert "learning rate 0.002 (optim.scale_lr off)" in outcome.out
    assert "training 2 steps of 4 images" in outcome.out
    assert "bf16" in outcome.out
    folder = tmp_path / "runs/mine"
    assert (folder / "metrics.json").exists()
    assert all(math.isfinite(r["loss/total"]) for r in records(folder) if "loss/total" in r)
    assert all(v.dtype != torch.bfloat16 for v in load_checkpoint(folder / "final.pth")["model"].values())


def test_print_config_loads_back(tool, tiny, tmp_path):
    outcome = tool("train", *tiny, "--print-config", "optim.lr=3e-4")
    assert outcome.code == 0
    path = tmp_path / "other_name.yaml"
    path.write_text(outcome.out)
    config = load_config(path)
    assert config == load_config(Path(tiny[1]), [*tiny[2:], "optim.lr=3e-4"])
    assert (config.name, config.train.steps, config.optim.lr) == ("quickstart", 8, 3e-4)


def test_divergence_stops_the_run_before_it_spoils_a_checkpoint(tool, tiny, tmp_path):
    options = ["optim.kind=sgd", "optim.lr=1e18", "optim.clip_norm=null", "train.save_every=1", "train.log_every=20"]
    outcome = tool("train", *tiny, *options, "--output-dir", tmp_path)
    fails(outcome, "diverged", "optim.lr", "step")
    for path in tmp_path.glob("*.pth"):
        assert all(v.isfinite().all() for v in load_checkpoint(path)["model"].values()), path
    diagnosis = json.loads((tmp_path / "diagnosis.json").read_text())
    assert diagnosis["likely_causes"][0]["cause"] == "a learning rate that is too high"
    assert {"backbone", "neck", "rpn", "roi_head", "total"} == diagnosis["failed_steps"][0]["gradient_norms"].keys()
    assert len(diagnosis["failed_steps"][0]["images"]) == 4


# Evaluation


def test_eval_gives_the_numbers_of_training(tool, tiny, finished, tmp_path):
    outcome = tool("eval", *tiny, "--checkpoint", finished / "final.pth", "--output-dir", tmp_path / "new")
    assert outcome.code == 0, outcome.err
    for name in ("metrics.json", "predictions.json"):
        assert (tmp_path / "new" / name).read_bytes() == (finished / name).read_bytes()
    ap50 = json.loads((finished / "metrics.json").read_text())["AP50"]
    assert f"{100 * ap50:.1f}" in outcome.out
    # The step file holds the raw weights and the average; the average detects.
    outcome = tool("eval", *tiny, "--checkpoint", finished / "step_00000008.pth", "--output-dir", tmp_path / "step")
    assert (tmp_path / "step/predictions.json").read_bytes() == (finished / "predictions.json").read_bytes()


def test_eval_of_results(tool, tiny, finished, tmp_path):
    shutil.copy(finished / "predictions.json", tmp_path)
    outcome = tool("eval", *tiny, "--predictions", tmp_path / "predictions.json")
    assert outcome.code == 0, outcome.err
    expected = json.loads((finished / "metrics.json").read_text())
    del expected["step"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == expected


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
def test_eval_of_real_results(tool, tiny, test_data, tmp_path, backend):
    folder = test_data / "coco_eval"
    truth = f"data.val.annotations={folder / 'gt.json'}"
    arguments = [*tiny, truth, f"eval.backend={backend}", "--predictions", folder / "detections.json"]
    assert tool("eval", *arguments, "--output-dir", tmp_path).code == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    assert {name: metrics[name] for name in METRIC_NAMES} == pytest.approx(
        {name: expected[name] for name in METRIC_NAMES}, abs=1e-9
    )


def test_eval_of_proposals(tool, tiny, finished, tmp_path):
    arguments = ["--checkpoint", finished / "final.pth", "--proposals", "--output-dir"]
    outcomes = [
        tool("eval", *tiny, f"eval.backend={backend}", *arguments, tmp_path / backend)
        for backend in ("pycocotools", "hotcoco")
    ]
    assert [outcome.code for outcome in outcomes] == [0, 0]
    written = [json.loads((tmp_path / b / "proposal_metrics.json").read_text()) for b in ("pycocotools", "hotcoco")]
    assert list(written[0]) == [*PROPOSAL_METRIC_NAMES, "step"]
    assert written[1] == pytest.approx(written[0], abs=1e-9)
    assert 0 < written[0]["AR100"] == written[0]["AR1000"] < 1  # 50 proposals per image
    assert f"{100 * written[0]['AR100']:.1f}" in outcomes[0].out
    assert [p.name for p in (tmp_path / "hotcoco").iterdir()] == ["proposal_metrics.json"]


def test_a_proposal_network_is_judged_by_its_recall(tool, tiny, shapes, tmp_path):
    rpn, folder = [*tiny, "model.kind=rpn", "eval.every=4"], tmp_path / "run"
    outcome = tool("train", *rpn, "--output-dir", folder)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.rstrip().endswith(f"done: {folder}/final.pth, {folder}/metrics.json")
    assert {p.name for p in folder.glob("*.json")} == {"metrics.json", "data_report.json"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics) == [*PROPOSAL_METRIC_NAMES, "step"]
    evaluations = [r for r in records(folder) if "val/AR1000" in r]
    assert [r["step"] for r in evaluations] == [4, 8]
    assert {name.removeprefix("val/") for name in evaluations[1] if "val/" in name} == set(PROPOSAL_METRIC_NAMES)
    best = load_checkpoint(folder / "best.pth")
    assert best["AR1000"] == max(r["val/AR1000"] for r in evaluations) > 0

    arguments = ["--checkpoint", folder / "final.pth", "--output-dir", tmp_path / "again"]
    assert tool("eval", *rpn, *arguments).code == 0
    assert (tmp_path / "again/metrics.json").read_bytes() == (folder / "metrics.json").read_bytes()
    fails(tool("eval", *rpn, "eval.tta={}", *arguments), "eval.tta merges detections", "set eval.tta to none")


@pytest.fixture
def broken_val(shapes, tmp_path) -> tuple[str, Path, int]:
    """An override that names a copy of the validation images, one of them truncated, its path and its id."""
    images = json.loads((shapes / "annotations/val.json").read_text())["images"]
    shutil.copytree(shapes / "val", tmp_path / "broken")
    path = tmp_path / "broken" / images[3]["file_name"]
    path.write_bytes(path.read_bytes()[:-100])
    return f"data.val.images={tmp_path / 'broken'}", path, images[3]["id"]


@pytest.mark.parametrize("proposals", [False, True])
def test_eval_counts_an_unreadable_image_as_one_without_detections(
    tool, tiny, finished, broken_val, tmp_path, proposals
):
    override, path, image_id = broken_val
    options = [*tiny, "model.roi_head.score_thresh=0", "--checkpoint", finished / "final.pth"]
    outcome = tool("eval", *options, override, "--output-dir", tmp_path, *["--proposals"] * proposals)
    assert outcome.code == 1
    assert outcome.err.startswith(f"unreadable: {path}: cannot decode the image (OSError: image file is truncated")
    assert outcome.err.count("\n") == 1
    assert f"nothing was found there: 1 (ids {image_id})" in outcome.out
    if proposals:
        assert json.loads((tmp_path / "proposal_metrics.json").read_text())["unreadable_images"] == [image_id]
        return
    assert json.loads((tmp_path / "metrics.json").read_text())["unreadable_images"] == [image_id]
    assert tool("eval", *options, "--output-dir", tmp_path / "whole").code == 0
    expected = json.loads((tmp_path / "whole/predictions.json").read_text())
    others = [r for r in expected if r["image_id"] != image_id]
    assert len(others) < len(expected)
    assert json.loads((tmp_path / "predictions.json").read_text()) == others


def test_an_unreadable_validation_image_does_not_end_a_training(tool, tiny, broken_val, tmp_path):
    override, _, image_id = broken_val
    outcome = tool("train", *tiny, override, "train.steps=2", "--output-dir", tmp_path / "run")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"nothing was found there: 1 (ids {image_id})" in (tmp_path / "run/log.txt").read_text()
    assert json.loads((tmp_path / "run/metrics.json").read_text())["unreadable_images"] == [image_id]


def test_eval_of_several_views(tool, tiny, finished, shapes, tmp_path):
    options = [*tiny, "model.roi_head.score_thresh=0", "--checkpoint", finished / "final.pth"]
    assert tool("eval", *options, "--output-dir", tmp_path / "plain").code == 0
    once = "eval.tta={short_sides: [64], long_side: 64, horizontal_flip: false}"
    assert tool("eval", *options, once, "--output-dir", tmp_path / "once").code == 0
    for name in ("metrics.json", "predictions.json"):
        assert (tmp_path / "once" / f"tta_{name}").read_bytes() == (tmp_path / "plain" / name).read_bytes()

    views = "eval.tta={short_sides: [48, 64], long_side: 64}"  # the plain one among them
    assert tool("eval", *options, views, "--output-dir", tmp_path / "views").code == 0
    files = ("views/tta_predictions.json", "plain/predictions.json")
    merged, plain = (json.loads((tmp_path / name).read_text()) for name in files)
    ids = {r["image_id"] for r in plain}
    assert len(ids) == 8
    best = [[max(r["score"] for r in found if r["image_id"] == i) for found in (plain, merged)] for i in ids]
    assert all(seen_often >= seen_once for seen_once, seen_often in best)
    assert any(seen_often > seen_once for seen_once, seen_often in best)

    image = json.loads((shapes / "annotations/val.json").read_text())["images"][3]
    predict = ["--input", shapes / "val" / image["file_name"], "--output", tmp_path]
    assert tool("predict", *options, views, *predict).code == 0
    found = json.loads((tmp_path / "predictions.json").read_text())
    expected = [r for r in merged if r["image_id"] == image["id"]]
    assert [r["score"] for r in found] == pytest.approx([r["score"] for r in expected], abs=1e-5)
    assert np.array([r["bbox"] for r in found]) == pytest.approx(np.array([r["bbox"] for r in expected]), abs=1e-2)


def test_evaluations_that_do_not_go_together(tool, tiny, finished):
    arguments = ["--checkpoint", finished / "final.pth"]
    fails(tool("eval", *tiny, "eval.tta={}", "--proposals", *arguments), "eval.tta merges detections")
    sides = "eval.tta={short_sides: [400, 800], long_side: 500}"
    fails(tool("eval", *tiny, sides, *arguments), "eval.tta: long_side 500 is less than the largest short side 800")
    both = tool("eval", *tiny, "--proposals", "--predictions", finished / "predictions.json")
    assert both.code == 2
    assert "--proposals goes with --checkpoint" in both.err


# Prediction


def test_predict_a_folder_with_odd_files(tool, tiny, finished, shapes, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out/pictures"
    photos.mkdir()
    source = sorted((shapes / "val").glob("*.jpg"))[0]
    shutil.copy(source, photos / "a.jpg")
    image = Image.open(source)
    image.convert("L").resize((400, 330)).save(photos / "b.gray.png")
    image.convert("RGBA").save(photos / "c.PNG")
    (photos / "d.jpg").write_bytes(source.read_bytes()[:100])
    image.convert("P").save(photos / "e.gif")
    (photos / "notes.txt").write_text("not an image")

    arguments = ["--checkpoint", finished / "final.pth", "--input", photos, "--output", output]
    tool("predict", *tiny, "model.roi_head.score_thresh=0", *arguments)
    found = json.loads((output / "predictions.json").read_text())
    threshold = sorted(r["score"] for r in found if r["file_name"] == "b.gray.png")[-5]
    outcome = tool("predict", *tiny, "model.roi_head.score_thresh=0", *arguments, "--score-thresh", threshold)
    assert outcome.code == 1
    [skipped] = [line for line in outcome.err.splitlines() if line]
    assert skipped.startswith(f"skipped: {photos / 'd.jpg'}: ")
    pictures = {p.name for p in output.glob("*.png")}
    assert pictures == {"a.jpg.png", "b.gray.png.png", "c.PNG.png", "e.gif.png"}

    found = json.loads((output / "predictions.json").read_text())
    assert {(r["image_id"], r["file_name"]) for r in found} == {
        (1, "a.jpg"),
        (2, "b.gray.png"),
        (3, "c.PNG"),
        (5, "e.gif"),
    }
    assert {r["category_id"] for r in found} <= set(CATEGORIES.values())
    drawn = sum(r["score"] >= threshold for r in found)
    assert 5 <= drawn < len(found)
    assert f"4 images, {len(found)} detections, {drawn} of them drawn" in outcome.out
    for r in found:
        x, y, w, h = r["bbox"]
        width, height = (400, 330) if r["file_name"] == "b.gray.png" else image.size
        assert x >= 0
        assert y >= 0
        assert x + w <= width + 1e-3
        assert y + h <= height + 1e-3
    # Nothing is enlarged at 400x330: the picture is the image but for the boxes and their labels.
    drawn = np.asarray(Image.open(output / "b.gray.png.png")).astype(int)
    plain = np.asarray(Image.open(photos / "b.gray.png").convert("RGB")).astype(int)
    assert drawn.shape == plain.shape
    coloured = np.ptp(drawn, axis=2) > 0
    assert coloured.mean() > 0.005
    assert (drawn == plain)[~coloured].mean() > 0.9


def test_predict_one_image_as_the_evaluation_does(tool, tiny, finished, shapes, tmp_path):
    truth = json.loads((shapes / "annotations/val.json").read_text())["images"][3]
    arguments = ["--checkpoint", finished / "final.pth", "--input", shapes / "val" / truth["file_name"]]
    outcome = tool("predict", *tiny, *arguments, "--output", tmp_path, "--score-thresh", "0.99")
    assert (outcome.code, outcome.err) == (0, "")
    assert "0 of them drawn" in outcome.out
    found = json.loads((tmp_path / "predictions.json").read_text())
    expected = [r for r in json.loads((finished / "predictions.json").read_text()) if r["image_id"] == truth["id"]]
    assert [r["category_id"] for r in found] == [r["category_id"] for r in expected]
    assert np.array([r["bbox"] for r in found]) == pytest.approx(np.array([r["bbox"] for r in expected]), abs=1e-2)
    assert [r["score"] for r in found] == pytest.approx([r["score"] for r in expected], abs=1e-5)


# Errors: exit code 2 and one line that names the thing and the way out


def fails(outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    lines = [line for line in outcome.err.splitlines() if line]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture
def altered(shapes, tmp_path):
    """A copy of one split's annotations with changes; returns the override that selects it."""

    def alter(split: str, change) -> str:
        content = json.loads((shapes / f"annotations/{split}.json").read_text())
        content = change(content) or content
        path = tmp_path / f"{split}_altered.json"
        path.write_text(json.dumps(content))
        return f"data.{split}.annotations={path}"

    return alter


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config=configs/nothing.yaml", ["configs/nothing.yaml: no such file"]),
        ("optim.learning_rate=1", ["command line: optim.learning_rate: unknown key; did you mean"]),
        ("train.steps=many", ["command line: train.steps", '"many"']),
        ("steps", ["command line: 'steps': must be key=value"]),
        ("data.train.images=no/such/folder", ["no/such/folder", "data.train.images"]),
        ("data.val.images=no/such/folder", ["no/such/folder", "data.val.images"]),
        ("data.train.annotations=no/such.json", ["no/such.json", "data.train.annotations"]),
        ("data.val.annotations=no/such.json", ["no/such.json", "data.val.annotations"]),
        ("data.train.annotations=.", ["annotation file", "data.train.annotations"]),
        ("model.num_classes=7", ["model.num_classes is 7", "data set has", "Remove model.num_classes"]),
        ("train.accumulate=3", ["accumulate 3 does not divide batch_size 4"]),
        ("model.backbone.weights=IMAGENET1K_V9", ["model.backbone.weights: 'IMAGENET1K_V9' is neither a file"]),
        ("model.backbone.weights=no/such.pth", ["model.backbone.weights: 'no/such.pth' is neither a file"]),
        (f"model.backbone.weights={__file__}", ["model.backbone.weights", "test_tools.py is not a file of PyTorch"]),
        (f"--output-dir={__file__}", ["test_tools.py"]),
        (f"--output-dir={__file__}/run", ["test_tools.py/run"]),
    ],
)
def test_errors_before_training(tool, tiny, tmp_path, override, words):
    fails(tool("train", *tiny, "--output-dir", tmp_path / "run", override), *words)
    assert not list((tmp_path / "run").glob("*"))


def nothing_but_empty_images(content: dict) -> None:
    content["annotations"] = []


def one_class_less(content: dict) -> None:
    gone = content["categories"].pop()["id"]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != gone]


def box_of_another_image(content: dict) -> None:
    content["annotations"][4]["image_id"] = 999


def box_of_text(content: dict) -> None:
    content["annotations"][4]["bbox"] = ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("split", "change", "words"),
    [
        ("train", lambda content: [content], ["train_altered.json", "JSON object"]),
        ("train", lambda content: {"images": []}, ["train_altered.json", "annotations", "keys ['images']"]),
        ("train", nothing_but_empty_images, ["train_altered.json", "no usable box", "data.train.annotations"]),
        ("train", one_class_less, ["train_altered.json", "val.json", "different categories", "Give both"]),
        ("val", lambda content: content["images"].clear(), ["val_altered.json", "'images' is empty"]),
        # What only the evaluation refuses must not wait for the end of the training.
        ("val", box_of_another_image, ["val_altered.json: annotations[4]", "image_id", "999"]),
        ("val", box_of_text, ["val_altered.json: annotations[4]", "bbox", "'1'"]),
    ],
)
def test_unusable_annotations(tool, tiny, altered, tmp_path, split, change, words):
    fails(tool("train", *tiny, "--output-dir", tmp_path / "run", altered(split, change)), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "words"), [("", "the file is empty"), ('{"images": [', "it ends at byte 12")])
def test_annotation_files_that_are_no_json(tool, tiny, tmp_path, text, words):
    path = tmp_path / "broken.json"
    path.write_text(text)
    fails(tool("train", *tiny, f"data.train.annotations={path}"), str(path), words)
    fails(tool("eval", *tiny, f"data.val.annotations={path}", "--predictions", path), str(path))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_images_in_training(tool, tiny, shapes, tmp_path, num_workers):
    """One is replaced, named and counted; the whole is the same after an interruption. Too many end the run."""
    images, run = tmp_path / "train", tmp_path / "run"
    shutil.copytree(shapes / "train", images)
    paths = sorted(images.iterdir())
    paths[3].write_bytes(paths[3].read_bytes()[:200])
    options = [*tiny, f"data.train.images={images}", f"data.num_workers={num_workers}", "train.save_every=4"]
    outcome = tool("train", *options, "--output-dir", run)
    assert (outcome.code, outcome.err) == (0, "")
    [line] = [line for line in outcome.out.splitlines() if line.startswith("replaced by another image")]
    assert f"{paths[3]}: cannot decode the image" in line
    report = json.loads((run / "data_report.json").read_text())["splits"]["train"]
    [problem] = [p for p in report["problems"] if p["what"] == "image"]
    assert (problem["defect"], str(paths[3]) in problem["value"]) == ("IMAGE_UNREADABLE", True)
    assert report["num_images"]["left_out"] == 1

    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(run / "step_00000004.pth", resumed)
    assert tool("train", *options, "--output-dir", resumed, "--resume").code == 0
    assert_same(load_checkpoint(run / "final.pth")["model"], load_checkpoint(resumed / "final.pth")["model"])

    fails(tool("train", *options, "data.on_error=fail", "--output-dir", tmp_path / "strict"), f"{paths[3]}: cannot")
    outcome = tool("train", *options, "data.drop_limit=0.04", "--output-dir", tmp_path / "limited")
    fails(outcome, "1 of the 24 images (4.2%) cannot be used", "during training", "data.drop_limit 0.04")
    for path in paths:
        path.write_bytes(path.read_bytes()[:200])
    fails(tool("train", *options, "--output-dir", tmp_path / "none"), str(images), "11 images in a row", "file system")


def test_checkpoints_that_do_not_fit(tool, tiny, finished, shapes, altered, tmp_path):
    final, missing = finished / "final.pth", tmp_path / "final.pth"
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(final.read_bytes()[:1000])
    fewer = altered("val", one_class_less)
    evaluate, predict = ["eval", *tiny], ["predict", *tiny, "--input", shapes / "val", "--output", tmp_path / "out"]
    for command in (evaluate, predict):
        fails(tool(*command, "--checkpoint", missing), f"{missing}: no such checkpoint")
        fails(tool(*command, "--checkpoint", final, "model.num_classes=7"), "model.num_classes is 7")
        other = tool(*command, "--checkpoint", final, "model.neck.channels=8")
        fails(other, str(final), "another architecture", "config.yaml")
    fails(tool(*evaluate, "--checkpoint", finished), "best.pth, final.pth")
    fails(tool(*evaluate, "--checkpoint", damaged), f"{damaged}: damaged")
    outcome = tool("eval", *tiny, fewer, "--checkpoint", final, "--output-dir", tmp_path)
    fails(outcome, str(final), "val_altered.json", "same categories")
    assert not (tmp_path / "metrics.json").exists()


def test_resuming_with_what_does_not_fit(tool, tiny, finished, altered):
    resume = ["train", *tiny, *RUN, "--output-dir", finished, "--resume"]
    fewer = [altered("train", one_class_less), altered("val", one_class_less)]
    fails(tool(*resume, *fewer), "step_00000008.pth", "train_altered.json", "same categories")
    fails(tool(*resume, "train.steps=4"), "step_00000008.pth is beyond the end")
    fails(tool(*resume, "train.steps=9", "optim.kind=sgd"), "step_00000008.pth", "optim.kind")
    fails(tool(*resume, "train.steps=9", "model.neck.channels=32"), "step_00000008.pth", "another architecture")


def test_unusable_input_of_predict_and_eval(tool, tiny, finished, tmp_path):
    predict = ["predict", *tiny, "--checkpoint", finished / "final.pth", "--output", tmp_path / "out"]
    fails(tool(*predict, "--input", tmp_path / "nothing"), str(tmp_path / "nothing"), "no such image or folder")
    (tmp_path / "a.txt").write_text("hello")
    fails(tool(*predict, "--input", tmp_path), str(tmp_path), "no image in this folder", ".jpg")
    fails(tool(*predict, "--input", tmp_path / "a.txt"), "a.txt: cannot decode the image")
    fails(tool("eval", *tiny, "--predictions", tmp_path / "none.json"), "none.json")
    unknown = tmp_path / "unknown.json"
    unknown.write_text('[{"image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}]')
    fails(tool("eval", *tiny, "--predictions", unknown), "image_id not in", "another data set")
    assert tool(*predict, "--input", tmp_path, "--score-thresh", "7").code == 2
    assert tool("eval", *tiny).code == 2


def test_an_interrupted_start_leaves_no_traceback(tool, tiny, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "load_train_data", interrupt)
    outcome = tool("train", *tiny)
    assert (outcome.code, outcome.err) == (130, "interrupted\n")


# The generated data set


def test_make_shapes(tool, tmp_path):
    options = ["--output", tmp_path / "data", "--num-train", "2", "--num-val", "1", "--size", "64"]
    assert tool("make_shapes", *options).code == 0
    content = json.loads((tmp_path / "data/annotations/train.json").read_text())
    assert [(tmp_path / "data/train" / i["file_name"]).is_file() for i in content["images"]] == [True, True]
    assert "nothing to do" in tool("make_shapes", *options).out
    fails(tool("make_shapes", *options, "--seed", "1"), "train.json belongs to another data set", "delete the folder")
    fails(tool("make_shapes", *options, "--size", "10"), "size is 10", "64 to 512")
    (tmp_path / "file").touch()
    fails(tool("make_shapes", "--output", tmp_path / "file", "--num-train", "1"), "file")
