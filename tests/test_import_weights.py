import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d

from fpn_det.build import build_model
from fpn_det.config import dump_config, load_config
from fpn_det.engine.checkpoint import load_checkpoint
from fpn_det.structures import Categories
from fpn_det.weights import torchvision as torchvision_weights
from fpn_det.weights.coco_classes import COCO_CATEGORIES


@pytest.fixture(scope="module")
def state_dict() -> dict[str, Tensor]:
    """A small Faster R-CNN of torchvision for five classes."""
    torch.manual_seed(0)
    body = torchvision.models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = BackboneWithFPN(body, layers, in_channels_list=[64, 128, 256, 512], out_channels=16)
    model = FasterRCNN(backbone, box_head=TwoMLPHead(16 * 49, 32), box_predictor=FastRCNNPredictor(32, 6))
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight)
    return model.state_dict()


@pytest.fixture
def source(state_dict: dict[str, Tensor], tmp_path: Path) -> Path:
    torch.save(state_dict, tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth"


@pytest.fixture
def fails(tool: Callable) -> Callable:
    """Run the tool, which must fail with one line and leave nothing behind; returns the line."""

    def run(*arguments: object) -> str:
        destination = Path(str(arguments[1]))
        before = sorted(destination.parent.iterdir())
        outcome = tool("import_weights", *arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        assert sorted(destination.parent.iterdir()) == before
        return outcome.err

    return run


def test_detector_becomes_checkpoint_and_config(
    source: Path, state_dict: dict[str, Tensor], tool, tmp_path: Path
) -> None:
    outcome = tool("import_weights", source, tmp_path / "new folder/ours.pth")
    assert outcome.code == 0, outcome.err
    checkpoint, config_path = tmp_path / "new folder/ours.pth", tmp_path / "new folder/ours.yaml"

    lines = outcome.out.splitlines()
    for name in state_dict:  # every tensor has its line
        assert sum(line.split()[0] == name for line in lines if line) == 1, name
    assert sum(" taken" in line for line in lines) == len(state_dict) - 4
    assert sum(" permuted (rows: " in line for line in lines) == 4
    assert "5 classes of unknown names; --categories names them" in lines
    assert any("--norm-eps 0 if it was fine-tuned" in line for line in lines)
    pair = f"--config {shlex.quote(str(config_path))} --checkpoint {shlex.quote(str(checkpoint))}"
    assert lines[-2] == f"  python tools/eval.py {pair}"
    assert lines[-1].startswith(f"  python tools/predict.py {pair} --input")

    text = config_path.read_text()
    header = [line for line in text.splitlines() if line.startswith("# ")]
    assert header[0] == "# Imported from torchvision: theirs.pth"
    assert header[1].split()[:2] == ["#", "sha256"]
    assert len(header[1].split()[2]) == 64
    config = load_config(config_path)
    assert config.model.roi_head.box_head.fc_dim == 32
    assert config.model.neck.channels == 16
    assert (config.data.resize, config.eval.batch_size) == ("float", 1)

    state = load_checkpoint(checkpoint)
    assert state["config"] == dump_config(config)
    assert state["step"] == 0
    assert Categories.from_state_dict(state["categories"]).names == tuple(f"class_{i}" for i in range(1, 6))
    assert torch.equal(state["model"]["backbone.stem.0.weight"], state_dict["backbone.body.conv1.weight"])

    model = build_model(config, 5, pretrained=True)  # training starts from the imported body, not from torchvision's
    assert torch.equal(model.backbone.layer4[1].conv2.weight, state_dict["backbone.body.layer4.1.conv2.weight"])


def test_names_can_neither_write_the_config_nor_steer_the_terminal(source: Path, tool, tmp_path: Path) -> None:
    evil = source.rename(tmp_path / "theirs\nseed: 7\n\x1b[2J.pth")
    outcome = tool("import_weights", evil, tmp_path / "ours.pth")
    assert outcome.code == 0, outcome.err
    assert all(line.isprintable() for line in outcome.out.split("\n"))
    assert (tmp_path / "ours.yaml").read_text().startswith(r"# Imported from torchvision: theirs\nseed: 7\n\x1b[2J.pth")
    assert load_config(tmp_path / "ours.yaml").seed == 0


def test_half_precision_is_stored_as_the_model_has_it(state_dict: dict[str, Tensor], tool, tmp_path: Path) -> None:
    torch.save({k: v.half() for k, v in state_dict.items()}, tmp_path / "half.pth")
    assert tool("import_weights", tmp_path / "half.pth", tmp_path / "ours.pth").code == 0
    model = load_checkpoint(tmp_path / "ours.pth")["model"]
    assert {v.dtype for v in model.values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_the_pair_evaluates_and_predicts_with_nothing_else(
    source: Path, shapes: Path, tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    categories = shapes / "annotations/val.json"
    assert tool("import_weights", source, tmp_path / "ours", "--categories", categories).code == 0
    pair = ["--config", tmp_path / "ours.yaml", "--checkpoint", tmp_path / "ours.pth"]
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    outcome = tool("predict", *pair, "--input", folder, "--output", tmp_path / "predictions")
    assert outcome.code == 0, outcome.err
    records = json.loads((tmp_path / "predictions/predictions.json").read_text())
    ids = {c["id"] for c in json.loads(categories.read_text())["categories"]}
    assert records
    assert {r["category_id"] for r in records} <= ids

    # Where configs look for COCO, relative to the current folder.
    (tmp_path / "data/coco/annotations").mkdir(parents=True)
    few = json.loads(categories.read_text())
    few["images"] = few["images"][:1]
    few["annotations"] = [a for a in few["annotations"] if a["image_id"] == few["images"][0]["id"]]
    (tmp_path / "data/coco/annotations/instances_val2017.json").write_text(json.dumps(few))
    (tmp_path / "data/coco/val2017").symlink_to(shapes / "val")
    monkeypatch.chdir(tmp_path)
    outcome = tool("eval", *pair)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "metrics.json").is_file()


def test_categories_of_another_count(source: Path, tmp_path: Path, fails) -> None:
    entries = {"images": [{}], "annotations": [], "categories": [{"id": i, "name": f"n{i}"} for i in (4, 9)]}
    (tmp_path / "two.json").write_text(json.dumps(entries))
    message = fails(source, tmp_path / "ours.pth", "--categories", tmp_path / "two.json")
    assert "theirs.pth: 5 labels besides background, but 2 categories with ids 4..9" in message


def proposals_in_detectron2(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The body, FPN and RPN of a model of torchvision in Detectron2's names."""
    renamed = {}
    for name, value in state_dict.items():
        name = re.sub(r"backbone\.body\.(conv1|bn1)\.", r"backbone.body.stem.\1.", name)
        name = re.sub(r"\.layer(\d)\.", lambda m: f".res{int(m[1]) + 1}.", name)
        name = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        name = re.sub(r"fpn\.(inner|layer)_blocks\.(\d)\.0", lambda m: f"fpn_{m[1]}{int(m[2]) + 2}", name)
        name = name.replace("fpn_inner", "fpn_lateral").replace("fpn_layer", "fpn_output")
        name = name.replace("rpn.head.conv.0.0", "proposal_generator.rpn_head.conv")
        name = name.replace("rpn.head.cls_logits", "proposal_generator.rpn_head.objectness_logits")
        name = name.replace("rpn.head.bbox_pred", "proposal_generator.rpn_head.anchor_deltas")
        if not name.startswith("roi_heads."):
            renamed[name.replace("backbone.body.", "backbone.bottom_up.")] = value
    return renamed


def test_proposal_network_evaluates_on_coco(state_dict: dict[str, Tensor], tool, tmp_path: Path) -> None:
    torch.save({"model": proposals_in_detectron2(state_dict)}, tmp_path / "rpn.pth")
    outcome = tool("import_weights", tmp_path / "rpn.pth", tmp_path / "ours.pth")
    assert outcome.code == 0, outcome.err
    assert "Imported from detectron2: rpn.pth" in outcome.out
    config, state = load_config(tmp_path / "ours.yaml"), load_checkpoint(tmp_path / "ours.pth")
    assert config.model.kind == "rpn"
    assert Categories.from_state_dict(state["categories"]) == COCO_CATEGORIES
    assert torch.equal(state["model"]["rpn.head.objectness.bias"], state_dict["rpn.head.cls_logits.bias"])


def test_classifier_becomes_a_body(tool, tmp_path: Path) -> None:
    classifier = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(classifier, tmp_path / "resnet18.pth")
    outcome = tool("import_weights", tmp_path / "resnet18.pth", tmp_path / "body.pth")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert sum("left out (the classifier of images)" in line for line in lines) == 2
    assert lines[-1] == f"  python tools/train.py --config {tmp_path / 'body.yaml'}"
    config = load_config(tmp_path / "body.yaml")
    assert (config.model.backbone.name, config.model.backbone.weights) == ("resnet18", str(tmp_path / "body.pth"))
    model = build_model(config, 2, pretrained=True)
    assert torch.equal(model.backbone.layer4[1].conv2.weight, classifier["layer4.1.conv2.weight"])
    assert torch.equal(model.backbone.stem[1].running_var, classifier["bn1.running_var"])


@pytest.mark.parametrize("option", ["--norm-eps", "--categories"])
def test_options_of_detectors_do_not_apply_to_a_body(shapes: Path, tmp_path: Path, fails, option: str) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "body.pth")
    value = "0" if option == "--norm-eps" else shapes / "annotations/val.json"
    assert "body.pth: an ImageNet classifier" in fails(tmp_path / "body.pth", tmp_path / "ours.pth", option, value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((64,), torch.nan), "layer1.0.bn1.bias has values that are not finite"),
        (torch.zeros(64, dtype=torch.int64), "layer1.0.bn1.bias is of torch.int64"),
    ],
)
def test_values_of_a_body_must_be_numbers(tmp_path: Path, fails, value: Tensor, message: str) -> None:
    body = torchvision.models.resnet18(weights=None).state_dict() | {"layer1.0.bn1.bias": value}
    torch.save(body, tmp_path / "body.pth")
    assert message in fails(tmp_path / "body.pth", tmp_path / "ours.pth")


def test_style_caffe_needs_bottlenecks(tmp_path: Path, fails) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "body.pth")
    message = fails(tmp_path / "body.pth", tmp_path / "ours.pth", "--style", "caffe")
    assert "body.pth: --style caffe has the stride in the first 1x1 convolution of a block, and resnet18" in message


def test_a_checkpoint_of_ours_is_no_source(source: Path, tool, tmp_path: Path, fails) -> None:
    assert tool("import_weights", source, tmp_path / "ours.pth").code == 0
    message = fails(tmp_path / "ours.pth", tmp_path / "again.pth")
    assert "ours.pth: is already a checkpoint of fpn_det" in message


def test_a_folder_is_no_destination(source: Path, tmp_path: Path, fails, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{tmp_path}: is a folder" in fails(source, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert ".: is a folder" in fails(source, ".")


def test_errors_of_the_derived_config_name_the_source(
    source: Path, tmp_path: Path, fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No config has been written yet that the user could mend."""
    monkeypatch.setattr(torchvision_weights, "_norm_eps", lambda *_: (-1.0, "wrong"))
    message = fails(source, tmp_path / "ours.pth")
    assert f"the config derived from {source}: model.backbone.norm_eps" in message


def test_destination_without_suffix(source: Path, tool, tmp_path: Path) -> None:
    assert tool("import_weights", source, tmp_path / "r18.v1").code == 0
    assert {"r18.v1.pth", "r18.v1.yaml"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("existing", ["ours.pth", "ours.yaml"])
def test_nothing_is_overwritten_unasked(source: Path, tool, tmp_path: Path, fails, existing: str) -> None:
    (tmp_path / existing).write_text("precious")
    message = fails(source, tmp_path / "ours.pth")
    assert f"{existing} exists" in message
    assert "--overwrite" in message
    assert (tmp_path / existing).read_text() == "precious"
    assert tool("import_weights", source, tmp_path / "ours.pth", "--overwrite").code == 0
    assert load_checkpoint(tmp_path / "ours.pth")["step"] == 0


def test_the_source_is_never_overwritten(source: Path, fails) -> None:
    content = source.read_bytes()
    assert "theirs.pth exists; give another DST" in fails(source, source, "--overwrite")
    assert source.read_bytes() == content


def altered(state_dict: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    changed = dict(state_dict)
    match change:
        case "missing":
            del changed["backbone.body.layer3.0.bn2.bias"], changed["rpn.head.bbox_pred.bias"]
        case "unknown":
            changed["backbone.body.layer5.weight"] = torch.zeros(2)
            changed["roi_heads.box_head.fc8.bias"] = torch.zeros(3)
        case "surplus":
            changed["backbone.body.layer1.0.extra"] = torch.zeros(2)
        case "misshapen":
            changed["backbone.body.layer3.0.bn2.bias"] = torch.zeros(7)
        case "integers":
            changed = {k: v.long() for k, v in changed.items()}
        case "too large":
            changed["backbone.body.layer3.0.bn2.bias"] = torch.full((256,), 1e39, dtype=torch.float64)
        case "infinite":
            changed["backbone.body.layer3.0.bn2.bias"] = torch.full((256,), torch.inf)
    return changed


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("missing", ["backbone.layer3.0.bn2.bias (256,) is missing", "rpn.head.deltas.bias (12,) is missing"]),
        ("unknown", ["2 of 132 tensors", "backbone.body.layer5.weight (2,)", "roi_heads.box_head.fc8.bias (3,)"]),
        ("surplus", ["backbone.layer1.0.extra (2,) has no place in the model"]),
        ("misshapen", ["backbone.layer3.0.bn2.bias is (7,), the model has (256,)"]),
        ("integers", ["tensors are not of finite floating-point", "backbone.stem.0.weight is of torch.int64"]),
        ("too large", ["backbone.layer3.0.bn2.bias has values that are not finite"]),
        ("infinite", ["backbone.layer3.0.bn2.bias has values that are not finite"]),
    ],
)
def test_every_tensor_must_fit(
    state_dict: dict[str, Tensor], tmp_path: Path, fails, change: str, parts: list[str]
) -> None:
    torch.save(altered(state_dict, change), tmp_path / "altered.pth")
    message = fails(tmp_path / "altered.pth", tmp_path / "ours.pth")
    assert "altered.pth: " in message
    for part in parts:
        assert part in message


def test_unknown_names_ask_for_the_framework(tmp_path: Path, fails) -> None:
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "x.pth")
    message = fails(tmp_path / "x.pth", tmp_path / "ours.pth")
    assert "x.pth: by their names the tensors are of none of torchvision, detectron2, mmdetection" in message
    assert "encoder.weight" in message


def test_the_stated_framework_is_believed(source: Path, tmp_path: Path, fails) -> None:
    assert "theirs.pth" in fails(source, tmp_path / "ours.pth", "--from", "detectron2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--style", "caffe"], "--style caffe does not apply to detectors of torchvision"),
        (["--from", "detectron2", "--norm-eps", "0"], "--norm-eps 0: only torchvision's detectors"),
        (["--norm-eps", "-1"], "--norm-eps -1: must not be negative"),
    ],
)
def test_options_that_do_not_apply(source: Path, tmp_path: Path, fails, options: list[str], message: str) -> None:
    assert message in fails(source, tmp_path / "ours.pth", *options)
