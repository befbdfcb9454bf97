"""Files of Detectron2 in their exact layout; each convention against Detectron2's formula, written from its source."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from importing import assert_builds, assert_same_detections, blank, draw, parse, predict
from PIL import Image
from reference import Source, random_body, random_rest
from torch import Tensor

from fpn_det.build import build_backbone, build_model
from fpn_det.structures import InputError
from fpn_det.weights.coco_classes import COCO_CATEGORIES
from fpn_det.weights.detectron2 import convert, recognises
from fpn_det.weights.read import WeightFile, read_weights

BGR_MEAN = (103.53, 116.28, 123.675)
PREFIX = "backbone.bottom_up."


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def conv_name(stage: int, block: int, part: str, prefix: str = PREFIX) -> str:
    return f"{prefix}stem.conv1" if stage == 0 else f"{prefix}res{stage + 1}.{block}.{part}"


def source(**changes: Any) -> Source:
    """R50-FPN of the model zoo: BGR, std 1, stride in the 1x1."""
    options = {"mean": BGR_MEAN, "std": (1.0, 1.0, 1.0), "bgr": True, "stride_in_1x1": True, **changes}
    return Source(
        tensors={},
        conv=conv_name,
        norm=lambda *part: f"{conv_name(*part)}.norm",
        lateral=lambda i: f"backbone.fpn_lateral{i}",
        output=lambda i: f"backbone.fpn_output{i}",
        rpn=tuple(f"proposal_generator.rpn_head.{k}" for k in ("conv", "objectness_logits", "anchor_deltas")),
        head=(
            *(f"roi_heads.box_head.fc{i}" for i in (1, 2)),
            *(f"roi_heads.box_predictor.{k}" for k in ("cls_score", "bbox_pred")),
        ),
        **options,
    )


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """R50-FPN with thin FPN and head, of 80 classes."""
    torch.manual_seed(0)
    model = source()
    random_body(model)
    random_rest(model, torch.randint(0, 256, (3, 96, 128)), channels=16, fc_dim=32, num_classes=80)
    return model.tensors


def weight_file(tensors: dict[str, Tensor], name: str = "model_final_280758.pkl", **meta: Any) -> WeightFile:
    return WeightFile(dict(tensors), meta, Path(name))


def resize_as_detectron2(path: Path, short_side: int, max_size: int) -> tuple[Tensor, tuple[int, int]]:
    """read_image, ResizeShortestEdge, ResizeTransform."""
    image = np.asarray(Image.open(path).convert("RGB"))
    h, w = image.shape[:2]
    scale = short_side * 1.0 / min(h, w)
    new_h, new_w = (short_side, scale * w) if h < w else (scale * h, short_side)
    if max(new_h, new_w) > max_size:
        scale = max_size * 1.0 / max(new_h, new_w)
        new_h, new_w = new_h * scale, new_w * scale
    new_h, new_w = int(new_h + 0.5), int(new_w + 0.5)
    resized = np.asarray(Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BILINEAR))
    return torch.from_numpy(resized.copy()).permute(2, 0, 1), (h, w)


def test_detections_equal_those_of_detectron2(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """The whole way: the file as written by the model zoo, image files through each side's own resize, detections."""
    checkpoint = tmp_path / "model_final_280758.pkl"
    arrays = {name: value.numpy() for name, value in tensors.items()}
    checkpoint.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    converted = convert(read_weights(checkpoint))
    converted.config["data"] |= {"test_short_side": 160, "long_side": 240, "short_sides": [160]}
    config = parse(converted)
    model = build_model(config, 80, pretrained=False)
    model.load_state_dict(converted.state_dict)
    theirs = source()
    theirs.tensors = tensors
    counts = []
    for width, height in [(213, 160), (100, 141), (320, 240), (97, 61), (300, 101), (160, 160)]:
        path = tmp_path / f"{width}x{height}.png"
        draw(path, width, height)
        image, original = resize_as_detectron2(path, 160, 240)
        expected = theirs.detect(image, original)
        assert_same_detections(predict(model, config, path), expected)
        counts.append(len(expected[1]))
    assert max(counts) == 100
    assert min(counts) >= 20


def test_stem_takes_rgb_as_theirs_takes_bgr(tensors: dict[str, Tensor]) -> None:
    converted = convert(weight_file(tensors))
    image = torch.rand(1, 3, 32, 32)
    theirs = F.conv2d(image.flip(1), tensors[f"{PREFIX}stem.conv1.weight"])
    torch.testing.assert_close(F.conv2d(image, converted.state_dict["backbone.stem.0.weight"]), theirs)
    [row] = [row for row in converted.rows if row.target == "backbone.stem.0.weight"]
    assert (row.action, row.note) == ("permuted", "input channels BGR -> RGB")
    assert sum(row.action == "permuted" for row in converted.rows) == 1
    assert len(converted.rows) == len(tensors)


def test_conventions_of_the_model_zoo(tensors: dict[str, Tensor]) -> None:
    converted = convert(weight_file(tensors))
    config = parse(converted)
    assert config.data.resize == "pillow"
    assert config.model.pixel_mean == BGR_MEAN[::-1]
    assert config.model.pixel_std == (1, 1, 1)
    assert config.model.delta_clamp == "upper"
    backbone, rpn, head = config.model.backbone, config.model.rpn, config.model.roi_head
    assert (backbone.name, backbone.norm, backbone.stride_in_1x1) == ("resnet50", "frozen_bn", True)
    assert (rpn.pre_nms_top_k_test, rpn.post_nms_top_k_test, rpn.smooth_l1_beta) == (1000, 1000, 0)
    assert (head.aligned, head.sampling_ratio, head.level_eps, head.background_rows) == (True, 0, 1e-8, 1)
    assert head.min_size is None
    assert converted.categories == COCO_CATEGORIES
    assert any("no config" in remark for remark in converted.remarks)


def resnext(num_classes: int = 80) -> dict[str, Tensor]:
    model = source(groups=32, blocks=(3, 4, 23, 3))
    random_body_names(model, width=256)
    return {**model.tensors, **rest(num_classes)}


def random_body_names(model: Source, width: int = 64, statistics: bool = True) -> None:
    """Names and shapes of a body alone, without memory."""
    with torch.device("meta"):
        random_body(model, width=width, statistics=statistics)
    model.tensors = blank({name: tuple(value.shape) for name, value in model.tensors.items()})


def rest(num_classes: int = 80, channels: int = 8, fc_dim: int = 16) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(2, 6):
        shapes |= {f"backbone.fpn_lateral{i}.weight": (channels, 256 * 2 ** (i - 2), 1, 1)}
        shapes |= {f"backbone.fpn_lateral{i}.bias": (channels,), f"backbone.fpn_output{i}.bias": (channels,)}
        shapes |= {f"backbone.fpn_output{i}.weight": (channels, channels, 3, 3)}
    for name, out, size in (("conv", channels, 3), ("objectness_logits", 3, 1), ("anchor_deltas", 12, 1)):
        shapes[f"proposal_generator.rpn_head.{name}.weight"] = (out, channels, size, size)
        shapes[f"proposal_generator.rpn_head.{name}.bias"] = (out,)
    layers = {"box_head.fc1": (fc_dim, channels * 49), "box_head.fc2": (fc_dim, fc_dim)}
    layers["box_predictor.cls_score"] = num_classes + 1, fc_dim
    layers["box_predictor.bbox_pred"] = num_classes * 4, fc_dim
    for name, shape in layers.items():
        shapes |= {f"roi_heads.{name}.weight": shape, f"roi_heads.{name}.bias": shape[:1]}
    return blank(shapes)


def r50(**changes: Any) -> dict[str, Tensor]:
    model = source()
    random_body_names(model)
    return {**model.tensors, **rest(**changes)}


def test_x101_has_std_and_stride_in_the_3x3() -> None:
    config = assert_builds(convert(weight_file(resnext())))
    assert config.model.backbone.name == "resnext101_32x8d"
    assert config.model.pixel_std == (58.395, 57.12, 57.375)
    assert config.model.pixel_mean == BGR_MEAN[::-1]
    assert not config.model.backbone.stride_in_1x1
    [row] = [row for row in convert(weight_file(resnext())).rows if row.target == "backbone.stem.0.weight"]
    assert row.action == "permuted"


def test_rpn_alone_and_fast_rcnn() -> None:
    rpn = {name: value for name, value in r50().items() if not name.startswith("roi_heads.")}
    config = assert_builds(convert(weight_file(rpn)), 1)
    assert config.model.kind == "rpn"
    assert config.model.rpn.post_nms_top_k_test == 2000
    fast = {name: value for name, value in r50().items() if not name.startswith("proposal_generator.")}
    assert assert_builds(convert(weight_file(fast))).model.kind == "fast_rcnn"


def test_other_heads_and_class_counts() -> None:
    converted = convert(weight_file(r50(num_classes=3, fc_dim=24, channels=12)))
    config = assert_builds(converted, 3)
    assert (config.model.neck.channels, config.model.roi_head.box_head.fc_dim) == (12, 24)
    assert converted.categories is None
    assert any("3 classes of unknown names" in remark for remark in converted.remarks)
    deltas = "roi_heads.box_predictor.bbox_pred"
    agnostic = r50() | blank({f"{deltas}.weight": (4, 16), f"{deltas}.bias": (4,)})
    assert assert_builds(convert(weight_file(agnostic))).model.roi_head.class_agnostic
    two_convs = r50()
    for part in ("weight", "bias"):
        value = two_convs.pop(f"proposal_generator.rpn_head.conv.{part}")
        two_convs |= {f"proposal_generator.rpn_head.conv.conv{i}.{part}": value for i in (0, 1)}
    assert assert_builds(convert(weight_file(two_convs))).model.rpn.num_convs == 2


@pytest.mark.parametrize(("norm", "parts"), [("gn", 2), ("frozen_bn", 4), ("bn", 5)])
def test_norms_of_neck_and_4conv1fc_head(norm: str, parts: int) -> None:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")[:parts]
    biases = [f"backbone.fpn_{kind}{i}.bias" for kind in ("lateral", "output") for i in range(2, 6)]
    without = ("roi_heads.box_head.", *biases)
    tensors = {name: value for name, value in r50(channels=32).items() if not name.startswith(without)}
    layers = [f"backbone.fpn_{kind}{i}" for kind in ("lateral", "output") for i in range(2, 6)]
    for i in range(1, 5):
        tensors |= blank({f"roi_heads.box_head.conv{i}.weight": (32, 32, 3, 3)})
        layers.append(f"roi_heads.box_head.conv{i}")
    tensors |= blank({"roi_heads.box_head.fc1.weight": (16, 32 * 49), "roi_heads.box_head.fc1.bias": (16,)})
    tensors |= blank({f"{k}.norm.{n}": () if n == "num_batches_tracked" else (32,) for k in layers for n in names})
    config = assert_builds(convert(weight_file(tensors)))
    assert (config.model.neck.norm, config.model.roi_head.box_head.norm) == (norm, norm)
    assert (config.model.roi_head.box_head.num_convs, config.model.roi_head.box_head.num_fcs) == (4, 1)


def test_older_files_carry_pixel_statistics_and_anchors() -> None:
    cells = {}
    for i, size in enumerate((32, 64, 128, 256, 512)):
        shapes = [((size * size / ratio) ** 0.5, (size * size * ratio) ** 0.5) for ratio in (0.5, 1, 2)]
        rows = [[-w / 2, -h / 2, w / 2, h / 2] for w, h in shapes]
        cells[f"proposal_generator.anchor_generator.cell_anchors.{i}"] = torch.tensor(rows)
    statistics = {"pixel_mean": torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)}
    statistics["pixel_std"] = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    converted = convert(weight_file({**r50(), **cells, **statistics}))
    config = assert_builds(converted)
    assert config.model.pixel_mean == BGR_MEAN[::-1]  # RGB as it is
    assert config.model.pixel_std == (58.395, 57.12, 57.375)
    assert not config.model.backbone.stride_in_1x1
    assert not any(row.action == "permuted" for row in converted.rows)
    assert sum(row.action == "left out" for row in converted.rows) == 7
    caffe = {"pixel_mean": torch.tensor(BGR_MEAN).view(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    config = parse(convert(weight_file({**r50(), **caffe})))
    assert config.model.backbone.stride_in_1x1
    assert config.model.pixel_mean == BGR_MEAN[::-1]
    grey = {"pixel_mean": torch.full((3, 1, 1), 127.5), "pixel_std": torch.ones(3, 1, 1)}
    with pytest.raises(InputError, match=r"pixel_mean \(127.5, 127.5, 127.5\) does not tell BGR from RGB"):
        convert(weight_file({**r50(), **grey}))
    with pytest.raises(InputError, match=r"no known layer: proposal_generator.anchor_generator.cell_anchors.5"):
        convert(weight_file({**r50(), "proposal_generator.anchor_generator.cell_anchors.5": torch.zeros(3, 4)}))
    cells["proposal_generator.anchor_generator.cell_anchors.2"] *= 2
    with pytest.raises(InputError, match=r"cell_anchors.2 is .* not the anchors"):
        convert(weight_file({**r50(), **cells}))


def test_style_overrides() -> None:
    config = parse(convert(weight_file(r50()), style="pytorch"))
    assert not config.model.backbone.stride_in_1x1
    assert config.model.pixel_std == (58.395, 57.12, 57.375)
    assert config.model.pixel_mean == (123.675, 116.28, 103.53)
    assert parse(convert(weight_file(resnext()), style="caffe")).model.backbone.stride_in_1x1


# --- Bodies ---


def caffe2_names(norm: str = "bn") -> dict[str, str]:
    """Caffe2's name of each tensor of a torchvision ResNet-50, but running statistics."""
    names = {"conv1.weight": "conv1_w", "bn1.weight": f"res_conv1_{norm}_s", "bn1.bias": f"res_conv1_{norm}_b"}
    branches = {"downsample.0": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    norms = {"downsample.1": "branch1", "bn1": "branch2a", "bn2": "branch2b", "bn3": "branch2c"}
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            for ours, branch in branches.items():
                if ours != "downsample.0" or block == 0:
                    names[f"layer{stage}.{block}.{ours}.weight"] = f"res{stage + 1}_{block}_{branch}_w"
            for ours, branch in norms.items():
                if ours != "downsample.1" or block == 0:
                    names[f"layer{stage}.{block}.{ours}.weight"] = f"res{stage + 1}_{block}_{branch}_{norm}_s"
                    names[f"layer{stage}.{block}.{ours}.bias"] = f"res{stage + 1}_{block}_{branch}_{norm}_b"
    return names


def classifier() -> Source:
    """A ResNet-50 in torchvision's names."""
    model = source()
    model.conv = lambda stage, block, part: (
        "conv1" if stage == 0 else f"layer{stage}.{block}.{part.replace('shortcut', 'downsample.0')}"
    )
    model.norm = lambda stage, block, part: (
        "bn1"
        if stage == 0
        else f"layer{stage}.{block}.{part.replace('shortcut', 'downsample.1').replace('conv', 'bn')}"
    )
    return model


def test_msra_body_in_caffe2_names(tmp_path: Path) -> None:
    """R-50.pkl: the norm is scale and shift alone, to which Detectron2's FrozenBatchNorm2d adds its eps."""
    model = classifier()
    random_body(model, statistics=False)
    names = caffe2_names()
    assert names.keys() == model.tensors.keys()
    blobs = {names[name]: value.numpy() for name, value in model.tensors.items()}
    blobs |= {"fc1000_w": np.zeros((1000, 2048), np.float32), "fc1000_b": np.zeros(1000, np.float32)}
    blobs |= {"conv1_b": np.zeros(64, np.float32), "conv1_w_momentum": np.zeros((64, 3, 7, 7), np.float32)}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(blobs, 2))
    converted = convert(read_weights(path))
    assert converted.kind == "body"
    actions = [row.action for row in converted.rows]
    assert actions.count("left out") == 4
    assert actions.count("added") == 2 * 53
    config = parse(converted)
    assert config.model.backbone.stride_in_1x1
    assert (config.model.pixel_mean, config.model.pixel_std) == (BGR_MEAN[::-1], (1, 1, 1))
    ours = build_backbone(config).eval()
    ours.load_classifier(converted.state_dict)
    # FrozenBatchNorm2d._load_from_state_dict: a file without statistics gets variance 1, not the 1 - eps of __init__.
    for name in [name for name in model.tensors if name.endswith(".bias")]:
        model.tensors[name.replace("bias", "running_mean")] = torch.zeros_like(model.tensors[name])
        model.tensors[name.replace("bias", "running_var")] = torch.ones_like(model.tensors[name])
    image = torch.randn(1, 3, 64, 96) * 50
    for a, b in zip(ours(image), model.body(image.flip(1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    scale = model.tensors["bn1.weight"][:, None, None]
    shift = model.tensors["bn1.bias"][:, None, None]
    x = torch.randn(1, 64, 5, 5) * 1000
    expected = x * scale / (1 + 1e-5) ** 0.5 + shift  # eps makes 5e-6
    torch.testing.assert_close(ours.stem[1](x), expected, rtol=1e-6, atol=1e-6)


def test_msra_body_with_statistics_in_caffe2_names() -> None:
    """The R-50.pkl of Detectron2, which unlike Detectron's has not fused the statistics into the affine layer."""
    model = classifier()
    random_body_names(model)
    parts = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}
    blobs = {}
    for ours, theirs in caffe2_names().items():
        if not theirs.endswith(("_s", "_b")):
            blobs[theirs] = model.tensors[ours]
        elif theirs.endswith("_s"):
            for part, suffix in parts.items():
                name = f"{theirs.removesuffix('s').removeprefix('res_')}{suffix}"
                blobs[name] = model.tensors[ours.replace("weight", part)]
    converted = convert(weight_file(blobs, __author__="Caffe2"))
    assert converted.state_dict.keys() == model.tensors.keys()
    assert not any(row.action == "added" for row in converted.rows)
    config = parse(converted)
    build_backbone(config).load_classifier(converted.state_dict)
    assert (config.model.backbone.norm, config.model.backbone.stride_in_1x1) == ("frozen_bn", True)


def test_gn_body_in_caffe2_names() -> None:
    model = classifier()
    random_body_names(model, statistics=False)
    names = caffe2_names("gn")
    converted = convert(weight_file({names[name]: value for name, value in model.tensors.items()}))
    config = parse(converted)
    assert (config.model.backbone.norm, config.model.backbone.stride_in_1x1) == ("gn", False)
    assert converted.state_dict.keys() == model.tensors.keys()


@pytest.mark.parametrize("author", ["torchvision", "MSRA"])
def test_body_in_detectron2_names(author: str) -> None:
    """ImageNetPretrained/torchvision/R-50.pkl, as tools/convert-torchvision-to-d2.py writes it."""
    model = source()
    random_body_names(model)
    tensors = {name.removeprefix(PREFIX): value for name, value in model.tensors.items()}
    tensors |= blank({"stem.fc.weight": (1000, 2048), "stem.fc.bias": (1000,)})
    converted = convert(weight_file(tensors, __author__=author))
    config = parse(converted)
    build_backbone(config).load_classifier(converted.state_dict)
    assert config.model.backbone.stride_in_1x1 == (author == "MSRA")
    assert config.model.pixel_std == ((1, 1, 1) if author == "MSRA" else (58.395, 57.12, 57.375))
    assert any(row.action == "permuted" for row in converted.rows) == (author == "MSRA")


# --- What is refused ---


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("roi_heads.mask_head.mask_fcn1.weight", "a Mask R-CNN"),
        ("roi_heads.keypoint_head.conv_fcn1.weight", "a Keypoint R-CNN"),
        ("sem_seg_head.p2.0.weight", "a segmentation model"),
        ("roi_heads.box_predictor.0.cls_score.weight", "a Cascade R-CNN"),
        ("head.cls_subnet.0.weight", "a RetinaNet"),
        ("roi_heads.res5.0.conv1.weight", "a detector on C4"),
        ("backbone.res5.0.conv1.weight", r"a detector without an FPN"),
        ("conv_rpn_fpn2_w", "a detector of Detectron 1"),
        (f"{PREFIX}res5.0.conv2_offset.weight", "deformable convolutions"),
    ],
)
def test_other_models_are_named(name: str, what: str) -> None:
    tensors = {**r50(), name: torch.zeros(1)}
    assert recognises(tensors)
    with pytest.raises(InputError, match=rf"model_final_280758.pkl: .*{what}.*can be imported"):
        convert(weight_file(tensors))


def test_unknown_and_missing_tensors_are_errors() -> None:
    with pytest.raises(InputError, match=r"1 of .* tensors are of no known layer: extra.weight"):
        convert(weight_file({**r50(), "extra.weight": torch.zeros(2)}))
    tensors = r50()
    del tensors["roi_heads.box_predictor.bbox_pred.weight"]
    with pytest.raises(InputError, match=r"roi_head.box_deltas.weight"):
        convert(weight_file(tensors))
    tensors = r50() | blank({"proposal_generator.rpn_head.objectness_logits.weight": (9, 8, 1, 1)})
    with pytest.raises(InputError, match=r"9 anchors per cell, expected 3"):
        convert(weight_file(tensors))
    tensors = r50()
    del tensors[f"{PREFIX}stem.conv1.weight"]
    with pytest.raises(InputError, match=r"can do without .*stem\.0\.weight|can do without conv1\.weight"):
        convert(weight_file(tensors))
    for logits, message in ((torch.zeros(()), r"class_logits\.bias has the shape \(\)"), (torch.zeros(1), "one class")):
        with pytest.raises(InputError, match=message):
            convert(weight_file(r50() | {"roi_heads.box_predictor.cls_score.bias": logits}))


def test_recognises_its_own_alone() -> None:
    assert recognises(r50())
    assert recognises(dict.fromkeys(caffe2_names().values(), torch.zeros(1)))
    assert recognises({"stem.conv1.weight": torch.zeros(1)})
    others = ("backbone.stem.0.weight", "backbone.body.conv1.weight", "backbone.layer1.0.conv1.weight", "conv1.weight")
    for name in others:
        assert not recognises({name: torch.zeros(1), "roi_heads.box_predictor.cls_score.weight": torch.zeros(1)})
