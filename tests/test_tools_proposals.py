"""tools/proposals.py, and what a second stage makes of its file: from an RPN over fixed proposals to metrics."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fpn_det import build
from fpn_det.config import Config, load_config
from fpn_det.data.coco import CocoAnnotations, load_coco
from fpn_det.data.loader import collate
from fpn_det.data.proposals import FixedProposals, read_proposals
from fpn_det.data.shapes import CATEGORIES
from fpn_det.engine.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
RPN = ("model.kind=rpn", "optim.lr=0.01")
FAST_RCNN = ("model.kind=fast_rcnn", "optim.lr=0.01")


@pytest.fixture(scope="module")
def trained_rpn(tool, tiny, tmp_path_factory) -> Path:
    """Checkpoint of an RPN after 8 steps."""
    folder = tmp_path_factory.mktemp("runs") / "rpn"
    outcome = tool("train", *tiny, *RPN, "--output-dir", folder)
    assert (outcome.code, outcome.err) == (0, "")
    return folder / "final.pth"


@pytest.fixture(scope="module")
def files(tool, tiny, trained_rpn, tmp_path_factory) -> dict[str, Path]:
    """Proposals of both splits."""
    folder = tmp_path_factory.mktemp("proposals") / "new"
    files = {split: folder / f"{split}.npz" for split in ("train", "val")}
    for split, file in files.items():
        outcome = tool("proposals", *tiny, *RPN, "--checkpoint", trained_rpn, "--split", split, "--output", file)
        assert (outcome.code, outcome.err) == (0, "")
        assert str(file) in outcome.out
    return files


def test_an_unreadable_image_gets_no_proposals_and_is_named(tool, tiny, shapes, trained_rpn, files, tmp_path):
    entries = json.loads((shapes / "annotations/val.json").read_text())["images"]
    shutil.copytree(shapes / "val", tmp_path / "broken")
    for entry in entries[1:3]:
        (tmp_path / "broken" / entry["file_name"]).write_bytes(b"")
    output = tmp_path / "p.npz"
    arguments = ["--checkpoint", trained_rpn, "--split", "val", "--output", output]
    outcome = tool("proposals", *tiny, *RPN, f"data.val.images={tmp_path / 'broken'}", *arguments)
    assert outcome.code == 1
    for line, entry in zip(outcome.err.splitlines(), entries[1:3], strict=True):
        assert line.startswith(f"unreadable: {tmp_path / 'broken' / entry['file_name']}: cannot decode the image")
    found, expected = read_proposals(output), read_proposals(files["val"])
    assert torch.equal(found.image_ids, expected.image_ids)
    for image_id in found.image_ids.tolist():
        boxes, _ = found.of(image_id)
        if image_id in {entry["id"] for entry in entries[1:3]}:
            assert len(boxes) == 0
        else:
            assert torch.equal(boxes, expected.of(image_id)[0])


@pytest.fixture
def fast_rcnn(tiny, files) -> list[str]:
    """Arguments of a second stage on them."""
    return [*tiny, *FAST_RCNN, *(f"data.{split}.proposals={file}" for split, file in files.items())]


def config_of(arguments: list[str]) -> Config:
    return load_config(Path(arguments[1]), arguments[2:])


def assert_proposed(found: FixedProposals, config: Config, data: CocoAnnotations, weights: Path) -> None:
    """What the model gives for every image, best first, in the frame of the image file (64 pixels)."""
    model = build.build_model(config, len(CATEGORIES), pretrained=False)
    model.load_state_dict(load_checkpoint(weights)["model"])
    model.eval()
    assert found.image_ids.tolist() == sorted(data.image_ids.tolist())
    for batch in build.build_val_loader(config, data):
        expected = model.propose(batch)
        for i, image_id in enumerate(batch.image_ids.tolist()):
            boxes, scores = found.of(image_id)
            assert 5 < len(boxes) <= 50
            assert (scores.diff() <= 0).all()
            valid = expected.valid[i]
            in_file = expected.boxes[i][valid] * 64 / config.data.test_short_side
            torch.testing.assert_close(boxes, in_file, atol=0.01, rtol=0)
            torch.testing.assert_close(scores, expected.scores[i][valid], atol=1e-3, rtol=0)


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_image_has_the_proposals_of_the_model(tiny, files, trained_rpn, shapes, split):
    found = read_proposals(files[split])
    assert found.config == "quickstart"
    assert found.checkpoint_sha256 == hashlib.sha256(trained_rpn.read_bytes()).hexdigest()
    data = load_coco(shapes / f"annotations/{split}.json", shapes / split)
    assert_proposed(found, config_of([*tiny, *RPN]), data, trained_rpn)


def test_boxes_are_in_the_frame_of_the_file_whatever_the_model_sees(tool, tiny, trained_rpn, shapes, tmp_path):
    doubled = [*tiny, *RPN, "data.test_short_side=128", "data.long_side=128"]
    arguments = ("--checkpoint", trained_rpn, "--split", "val", "--output", tmp_path / "p.npz")
    assert tool("proposals", *doubled, *arguments).code == 0
    data = load_coco(shapes / "annotations/val.json", shapes / "val")
    assert_proposed(read_proposals(tmp_path / "p.npz"), config_of(doubled), data, trained_rpn)


def test_top_k_keeps_the_best(tool, tiny, files, trained_rpn, tmp_path):
    arguments = ("--split", "val", "--output", tmp_path / "p.npz", "--top-k", 4)
    assert tool("proposals", *tiny, *RPN, *arguments, "--checkpoint", trained_rpn).code == 0
    found, all_of_them = read_proposals(tmp_path / "p.npz"), read_proposals(files["val"])
    for image_id in all_of_them.image_ids.tolist():
        for kept, everything in zip(found.of(image_id), all_of_them.of(image_id), strict=True):
            assert torch.equal(kept, everything[:4])


def test_two_processes_write_the_same_file(tiny, files, trained_rpn, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [*RPN, "--checkpoint", str(trained_rpn), "--split", "train", "--output", str(tmp_path / "p.npz")]
    done = subprocess.run(
        [*launcher, str(ROOT / "tools/proposals.py"), *tiny, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("24 images") == 1  # one process talks
    with np.load(tmp_path / "p.npz") as two, np.load(files["train"]) as one:
        for name in one:
            assert np.array_equal(two[name], one[name]), name


def test_a_second_stage_trains_and_detects_on_them(tool, tiny, fast_rcnn, trained_rpn, tmp_path):
    folder = tmp_path / "fast"
    outcome = tool("train", *fast_rcnn, "--output-dir", folder)
    assert (outcome.code, outcome.err) == (0, "")
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [r for r in logged if "loss/total" in r]
    assert len(losses) == 8
    assert "loss/roi_box" in losses[0]
    assert not any("rpn" in key for key in losses[0])

    outcome = tool("eval", *fast_rcnn, "--checkpoint", folder / "final.pth", "--output-dir", tmp_path / "eval")
    assert (outcome.code, outcome.err) == (0, "")
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (folder, tmp_path / "eval")]
    assert metrics[0] == metrics[1]
    assert -1 <= metrics[0]["AP"] <= 1

    # Their recall is that of the model they are from.
    for name, arguments in (("fast", fast_rcnn), ("rpn", [*tiny, *RPN])):
        weights = folder / "final.pth" if name == "fast" else trained_rpn
        outcome = tool("eval", *arguments, "--proposals", "--checkpoint", weights, "--output-dir", tmp_path / name)
        assert (outcome.code, outcome.err) == (0, "")
    files = ("fast/proposal_metrics.json", "rpn/metrics.json")
    recalls = [json.loads((tmp_path / name).read_text())["AR1000"] for name in files]
    assert recalls[0] == pytest.approx(recalls[1], abs=0.01)
    assert recalls[1] > 0.02

    # The same weights on no proposals detect nothing: there is no other source of boxes.
    config = config_of(fast_rcnn)
    model = build.build_model(config, len(CATEGORIES), pretrained=False)
    model.load_state_dict(load_checkpoint(folder / "final.pth")["model"])
    model.eval().roi_head.score_thresh = 0
    loader = build.build_val_loader(config, build.load_val_data(config))
    samples = [loader.dataset[0, 0], loader.dataset[1, 0]]
    assert all(len(found) for found in model.predict(collate(samples)))
    for sample in samples:
        object.__setattr__(sample, "proposals", sample.proposals[:0])
        object.__setattr__(sample, "proposal_scores", sample.proposal_scores[:0])
    assert not any(len(found) for found in model.predict(collate(samples)))


def test_batches_carry_them(fast_rcnn, files):
    """Training batches mirrored or not, always inside the image, always as many as the file has."""
    config = config_of(fast_rcnn)
    data = build.load_train_data(config)
    found = read_proposals(files["train"])
    loader = iter(build.build_train_loader(config, data))
    for _ in range(3):
        batch = next(loader)
        for i, image_id in enumerate(batch.image_ids.tolist()):
            boxes, scores = found.of(image_id)
            valid = batch.proposals.valid[i]
            assert valid.sum() == len(boxes)
            assert torch.equal(batch.proposals.scores[i][valid], scores)
            mirrored = torch.stack([64 - boxes[:, 2], boxes[:, 1], 64 - boxes[:, 0], boxes[:, 3]], 1)
            assert any(torch.allclose(batch.proposals.boxes[i][valid], b, atol=1e-5) for b in (boxes, mirrored))


# Errors


def refused(outcome, *parts: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for part in parts:
        assert part in outcome.err


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_file_of_proposals_is_named_with_the_command(tool, fast_rcnn, split, tmp_path):
    arguments = [a for a in fast_rcnn if not a.startswith(f"data.{split}.proposals")]
    outcome = tool("train", *arguments, "--output-dir", tmp_path / "run")
    command = f"python tools/proposals.py --config RPN.yaml --checkpoint RPN.pth --split {split} --output"
    refused(outcome, f"data.{split}.proposals", "fast_rcnn", command)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["faster_rcnn", "rpn"])
def test_proposals_that_would_be_ignored(tool, fast_rcnn, kind, split, tmp_path):
    arguments = [a for a in fast_rcnn if a.startswith(f"data.{split}.proposals") or "proposals=" not in a]
    outcome = tool("train", *arguments, f"model.kind={kind}", "--output-dir", tmp_path / "run")
    refused(outcome, f"data.{split}.proposals is ", f"model.kind {kind}", "remove the key")


def test_proposals_of_the_other_split(tool, fast_rcnn, files, tmp_path):
    outcome = tool("train", *fast_rcnn, f"data.train.proposals={files['val']}", "--output-dir", tmp_path / "run")
    refused(outcome, str(files["val"]), "no proposals for", "tools/proposals.py")


def test_a_file_that_is_none(tool, fast_rcnn, tmp_path):
    outcome = tool("train", *fast_rcnn, "data.val.proposals=/nowhere/p.npz", "--output-dir", tmp_path / "run")
    refused(outcome, "/nowhere/p.npz: no such file of proposals")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("model.kind=fast_rcnn",), ("fast_rcnn has no RPN; give the config and checkpoint of an rpn",)),
        (("--top-k", "51"), ("--top-k 51", "at most 50", "model.rpn.post_nms_top_k_test=51")),
        (("model.kind=faster_rcnn",), ("another architecture",)),
        (("data.val.proposals=p.npz",), ("data.val.proposals is p.npz", "makes its own")),
        (("--output", "."), (".: is a folder",)),
    ],
)
def test_errors_of_the_tool(tool, tiny, trained_rpn, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    arguments = ("--checkpoint", trained_rpn, "--split", "val", "--output", "p.npz", *arguments)
    refused(tool("proposals", *tiny, *RPN, *arguments), *parts)
    assert not (tmp_path / "p.npz").exists()


def test_top_k_must_be_positive(tool, tiny, trained_rpn):
    arguments = ("--checkpoint", trained_rpn, "--split", "val", "--output", "p.npz", "--top-k", "0")
    outcome = tool("proposals", *tiny, *RPN, *arguments)
    assert outcome.code == 2
    assert "--top-k: must be at least 1, not 0" in outcome.err
