"""Runs that start from a whole detector: what they start with, what is refused; resuming does not start anew."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d

from fpn_det import build
from fpn_det.config import Config, load_config
from fpn_det.engine.checkpoint import load_checkpoint, save_checkpoint
from fpn_det.finetune import BODY_KEYS, PART_KEYS, differences, load_start_weights
from fpn_det.structures import Categories, InputError
from fpn_det.weights import torchvision as torchvision_weights
from fpn_det.weights.read import WeightFile
from tests.weights.importing import blank, parse

FROZEN = ["model.backbone.norm=frozen_bn", "model.backbone.frozen_stages=2"]  # without backbone.weights
NO_CHANGE = ["train.steps=1", "optim.lr=1e-30", "eval.every=0", *FROZEN]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def source(tool, tiny, tmp_path_factory) -> Path:
    """Folder of a run of 8 steps on five classes, with a moving average."""
    folder = tmp_path_factory.mktemp("source")
    outcome = tool("train", *tiny, "train.ema_decay=0.5", "eval.every=0", "--output-dir", folder)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="module")
def theirs(tool, tmp_path_factory) -> Path:
    """A small detector of torchvision with random weights, imported: theirs.pth beside theirs.yaml."""
    folder = tmp_path_factory.mktemp("imported")
    torch.manual_seed(0)
    body = torchvision.models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = BackboneWithFPN(body, layers, in_channels_list=[64, 128, 256, 512], out_channels=16)
    model = FasterRCNN(backbone, box_head=TwoMLPHead(16 * 49, 32), box_predictor=FastRCNNPredictor(32, 91))
    torch.save(model.state_dict(), folder / "source.pth")
    outcome = tool("import_weights", folder / "source.pth", folder / "theirs.pth", "--norm-eps", "0")
    assert outcome.code == 0, outcome.err
    return folder / "theirs.pth"


def start(tiny: list[str], *overrides: str, categories: Categories) -> tuple[Config, torch.nn.Module, str]:
    config = load_config(Path(tiny[1]), [*tiny[2:], *overrides])
    torch.manual_seed(1)
    model = build.build_model(config, len(categories), pretrained=True)
    return config, model, load_start_weights(config, model, categories)


def test_with_the_same_classes_training_starts_as_the_source_ended(tool, tiny, source, tmp_path):
    """From the moving average; stages may be frozen although `model.backbone.weights` is none."""
    weights = f"model.weights={source / 'step_00000008.pth'}"
    options = [*NO_CHANGE, "model.backbone.norm=bn", "model.backbone.frozen_stages=5"]
    outcome = tool("train", *tiny, weights, *options, "--output-dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "trained on 5 classes" in outcome.out
    assert "new rows (0): none" in outcome.out
    before, after = (load_checkpoint(folder / "final.pth")["model"] for folder in (source, tmp_path))
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert (tmp_path / "predictions.json").read_bytes() == (source / "predictions.json").read_bytes()

    resume = ["train.steps=2", "--resume", "--output-dir", tmp_path]
    outcome = tool("train", *tiny, "model.weights=deleted.pth", *options, *resume)
    assert outcome.code == 0, outcome.err  # what resuming goes on from is its own checkpoint
    assert "trained on 5 classes" not in outcome.out


def test_a_subset_of_the_classes_keeps_its_rows(tool, tiny, shapes, source, tmp_path):
    overrides = []
    for split in ("train", "val"):
        content = json.loads((shapes / f"annotations/{split}.json").read_text())
        for category in content["categories"]:
            category["name"] = {"circle": "Circle", "square": "brick"}.get(category["name"], category["name"])
        content["categories"] = [c for c in content["categories"] if c["name"] != "triangle"]
        ids = {c["id"] for c in content["categories"]}
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] in ids]
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
        overrides.append(f"data.{split}.annotations={tmp_path / split}.json")
    outcome = tool("train", *tiny, *overrides, f"model.weights={source / 'final.pth'}", *NO_CHANGE)
    assert outcome.code == 0, outcome.err
    assert "rows kept (2): cross, ring" in outcome.out
    assert "new rows (2): Circle, brick" in outcome.out
    assert "'Circle' is a new class, though 'circle' is known" in outcome.out
    before, after = load_checkpoint(source / "final.pth"), load_checkpoint(Path("runs/quickstart/final.pth"))
    rows = {}
    for state in (before, after):
        weight, k = state["model"]["roi_head.class_logits.weight"], len(state["categories"])
        rows[k] = {c["name"]: weight[c["index"]] for c in state["categories"]} | {"background": weight[k]}
    for name in ("cross", "ring", "background"):
        assert torch.equal(rows[4][name], rows[5][name]), name
    assert not torch.equal(rows[4]["Circle"], rows[5]["circle"])


def test_a_detector_of_torchvision_is_fine_tuned(tool, tiny, theirs, tmp_path):
    """The refusal and the remark give the lines that the config lacks; the extra background rows stay behind."""
    weights = f"model.weights={theirs}"
    refused = tool("train", *tiny, weights, *FROZEN, "--output-dir", tmp_path / "refused")
    assert (refused.code, "Traceback" in refused.err) == (2, False)
    assert "trained under other values of model.backbone.norm_eps" in refused.err
    assert refused.err.endswith("model:\n  backbone:\n    norm_eps: 0.0\n")
    outcome = tool("train", *tiny, weights, *FROZEN, "model.backbone.norm_eps=0.0", "--output-dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "rows of 0 classes and background (1 of 11 rows there, 1 here)" in outcome.out
    assert "new rows (5): circle, square, triangle, cross, ring" in outcome.out
    _, _, lines = outcome.out.partition("As they were:\n")
    yaml = lines[: lines.index("step 1/8")].rstrip()
    assert {"    aligned: false", "    rounded: true", "  resize: float"} <= set(yaml.splitlines())
    (tmp_path / "same.yaml").write_text(yaml)  # pasted into a config, they leave nothing to remark
    same = load_config(tmp_path / "same.yaml")
    overrides = [
        *FROZEN,
        "model.backbone.norm_eps=0",
        f"model.anchors={{sizes: {list(same.model.anchors.sizes)}, rounded: true, inferred_strides: true}}",
        f"model.roi_head={{aligned: false, sampling_ratio: 2, canonical_size: {same.model.roi_head.canonical_size}}}",
        "data.resize=float",
    ]
    _, model, text = start(tiny, weights, *overrides, categories=Categories((1, 2), ("person", "shape")))
    assert "As they were" not in text
    assert "rows kept (1): person" in text
    source = load_checkpoint(theirs)["model"]["roi_head.box_deltas.weight"]
    assert torch.equal(model.roi_head.box_deltas.weight[:4], source[:4])


def test_stages_of_training_build_on_each_other(tiny, source, tmp_path):
    """A proposal network takes its parts from a detector, and a detector from a proposal network."""
    categories = Categories((1, 2), ("circle", "square"))
    weights = f"model.weights={source / 'final.pth'}"
    _, rpn, text = start(tiny, weights, "model.kind=rpn", categories=categories)
    assert re.search(r"^roi_head\.box_head +not used: 4 tensors there$", text, re.MULTILINE)
    state = load_checkpoint(source / "final.pth")
    save_checkpoint(tmp_path / "rpn.pth", state | {"model": rpn.state_dict()})
    _, detector, text = start(tiny, f"model.weights={tmp_path / 'rpn.pth'}", categories=categories)
    assert re.search(r"^roi_head\.box_head +0 of 4 +initialised \(not there\)$", text, re.MULTILINE)
    assert torch.equal(detector.rpn.head.deltas.weight, state["model"]["rpn.head.deltas.weight"])
    _, other, text = start(tiny, weights, "model.anchors.ratios=[1]", categories=categories)
    assert "initialised ((3, 16, 1, 1) there, (1, 16, 1, 1) here)" in text
    assert "model.anchors.ratios. As they were:\nmodel:\n  anchors:\n    ratios: [0.5, 1.0, 2.0]" in text
    assert other.rpn.head.objectness.weight.std() < 0.02  # as initialised


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.backbone.name=resnet34"], "model.backbone.name; set them as they were there:\nmodel:\n"),
        (["model.pixel_mean=[0, 0, 0]", "model.pixel_std=[1, 1, 1]"], "pixel_mean, model.pixel_std; set"),
        (["model.backbone.norm=gn"], "    norm: bn"),
        (["model.neck.norm=frozen_bn"], "has nothing for neck.* frozen norms would never normalise"),
    ],
)
def test_what_cannot_work_is_refused(tiny, source, overrides, message):
    weights = f"model.weights={source / 'final.pth'}"
    with pytest.raises(InputError, match=message.replace(".", r"\.").replace(r"\.*", ".*")):
        start(tiny, weights, *overrides, categories=Categories((1,), ("circle",)))


def test_files_that_are_no_detector(tiny, source, tmp_path):
    categories = Categories((1,), ("circle",))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "body.pth")
    with pytest.raises(InputError, match=r"model\.weights: .*body\.pth: not a checkpoint .*model\.backbone\.weights"):
        start(tiny, f"model.weights={tmp_path / 'body.pth'}", categories=categories)
    with pytest.raises(InputError, match=r"model\.weights: .*no such checkpoint"):
        start(tiny, f"model.weights={tmp_path / 'absent.pth'}", categories=categories)
    shutil.copy(source / "final.pth", tmp_path / "torn.pth")
    with (tmp_path / "torn.pth").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match=r"model\.weights: .*damaged"):
        start(tiny, f"model.weights={tmp_path / 'torn.pth'}", categories=categories)


def test_the_shipped_config_suits_the_weights_that_it_names():
    """Those of torchvision's COCO_V1, as the import describes them: nothing is refused or remarked."""
    with torch.device("meta"):
        model = get_model("fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None, num_classes=91)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors = blank({name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")})
    then = parse(torchvision_weights.convert(WeightFile(tensors, {}, Path("theirs.pth")), norm_eps=0.0))
    now = load_config(Path(__file__).parent.parent / "configs/finetune.yaml")
    keys = [*BODY_KEYS, *(key for keys in PART_KEYS.values() for key in keys)]
    assert differences(then, now, keys) == []
    assert differences(then, Config(), keys) != []
