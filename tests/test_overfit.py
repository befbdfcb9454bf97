"""`tools/train.py --overfit`: images that are learned by heart, and a diagnosis where they cannot be."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from fpn_det import build
from fpn_det.config import load_config
from fpn_det.engine.coco_eval import GroundTruth, read_ground_truth
from fpn_det.overfit import Overfitting, anchor_shapes, ground_truth, overrides

QUICK = [
    "train.steps=160",
    "train.batch_size=1",
    "train.log_every=20",
    "optim.lr=1.2e-2",
    "optim.warmup_steps=16",
    "model.neck.channels=32",
    "model.roi_head.box_head.fc_dim=128",
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


def test_an_image_is_learned_by_heart(tool, tiny):
    Path("runs/quickstart").mkdir(parents=True)
    outcome = tool("train", *tiny, *QUICK, "--overfit", 1)
    assert (outcome.code, outcome.err) == (0, ""), outcome.out
    assert "1 of the images" in outcome.out
    assert "learned by heart: AP" in outcome.out
    evaluated = re.findall(r"step (\d+): AP", outcome.out)
    assert len(set(evaluated)) == len(evaluated) > 0
    folder = Path("runs/quickstart_overfit")
    result = json.loads((folder / "overfit.json").read_text())
    assert result["fitted"]
    assert result["AP"] > 0.9
    assert len(result["image_ids"]) == len(list((folder / "pictures").glob("*.png"))) == 1
    assert not list(folder.glob("*.pth"))
    assert not list(Path("runs/quickstart").iterdir())
    config = load_config(folder / "config.yaml")
    assert (config.optim.schedule, config.train.steps) == ("cosine", 160)


def test_an_interrupted_check_gives_no_diagnosis(tool, tiny, monkeypatch):
    evaluate = Overfitting.evaluate

    def interrupted(self, step: int) -> bool:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, step)

    monkeypatch.setattr(Overfitting, "evaluate", interrupted)
    outcome = tool("train", *tiny, *QUICK, "eval.every=2", "--overfit", 1)
    assert outcome.code == 1
    assert "not learned" not in outcome.out
    assert "interrupted: AP" in outcome.out.splitlines()[-1]
    result = json.loads(Path("runs/quickstart_overfit/overfit.json").read_text())
    assert result["findings"] == []
    assert f".jpg (id {result['image_ids'][0]})" in outcome.out  # the name of its picture


def test_repeated_boxes_are_the_diagnosis(tool, tiny, shapes, tmp_path):
    """NMS keeps one of two equal boxes, so no training helps; said before the first step, and in the end."""
    content = json.loads((shapes / "annotations/train.json").read_text())
    boxes = [a for a in content["annotations"] if not a["iscrowd"]]
    content["annotations"] = boxes + [a | {"id": 10_000_000 + a["id"]} for a in boxes]
    (tmp_path / "twice.json").write_text(json.dumps(content))
    options = [f"data.train.annotations={tmp_path / 'twice.json'}", "train.steps=4"]
    for _ in range(2):  # the check may be repeated in its folder
        outcome = tool("train", *tiny, *options, "--overfit", 2, "--output-dir", tmp_path / "check")
        assert (outcome.code, outcome.err) == (1, "")
    result = json.loads((tmp_path / "check/overfit.json").read_text())
    assert not result["fitted"]
    assert "repeated: another of the same class overlaps it" in result["findings"][0]["what"]
    assert "1. " + result["findings"][0]["what"] in outcome.out
    assert outcome.out.index("repeated") < outcome.out.index("step 1/4") < outcome.out.rindex("repeated")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--overfit", "0"], "--overfit 0: must be at least 1"),
        (["--overfit", "2", "--resume"], "leave out --resume"),
        (["--overfit", "2", "model.kind=rpn"], "model.kind rpn gives none"),
    ],
)
def test_what_the_check_refuses(tool, tiny, options, message):
    outcome = tool("train", *tiny, *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert not Path("runs").exists()


def test_its_ground_truth_is_what_the_evaluation_reads(tiny, shapes):
    """Of images in any order, with images without boxes; crowd boxes are not trained on, so they are not there."""
    config = load_config(Path(tiny[1]), tiny[2:])
    data = build.load_train_data(config)
    own, read = ground_truth(data.only(range(len(data)))), read_ground_truth(config.data.train.annotations)
    assert (own.image_ids == read.image_ids).all()
    assert (own.category_ids == read.category_ids).all()

    def rows(truth: GroundTruth) -> list[tuple]:
        columns = (truth.images, truth.classes, truth.boxes.round(3))
        rows = zip(*(column[~truth.crowd].tolist() for column in columns), strict=True)
        return sorted(rows)

    assert rows(own) == rows(read)
    assert read.crowd.any()
    picked = data.only([5, 2])
    assert picked.image_ids.tolist() == data.image_ids[[2, 5]].tolist()
    assert torch.equal(picked.boxes, torch.cat([data.targets(2)[0], data.targets(5)[0]]))


def test_what_the_command_line_says_wins(tiny):
    config = load_config(Path(tiny[1]), tiny[2:])
    for given, steps, epochs in ([], 400, None), (["train.epochs=3"], None, 3), (["train.steps=7"], 7, None):
        check = load_config(Path(tiny[1]), overrides(config, 2, given))
        assert (check.train.steps, check.train.epochs, check.train.batch_size) == (steps, epochs, 2)
        assert check.optim.schedule == "cosine"


def test_shapes_of_anchors(tiny):
    config = load_config(Path(tiny[1]), [*tiny[2:], "model.anchors.sizes=[1,2,3,4,8]", "model.anchors.ratios=[4]"])
    assert anchor_shapes(config).tolist() == [[0.5, 2.0], [1.0, 4.0], [1.5, 6.0], [2.0, 8.0], [4.0, 16.0]]
