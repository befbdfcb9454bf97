"""Files of MMDetection in their exact layout; each convention against its formula, written from its source."""

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from importing import assert_builds, assert_same_detections, blank, draw, parse, predict
from reference import Source, random_body, random_rest
from torch import Tensor

from fpn_det import boxes as box_ops
from fpn_det.build import build_model
from fpn_det.models.fpn import Upsample
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.structures import Categories, InputError
from fpn_det.weights.coco_classes import COCO_CATEGORIES
from fpn_det.weights.mmdetection import convert, recognises
from fpn_det.weights.read import WeightFile, read_weights

RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BGR_MEAN = RGB_MEAN[::-1]
ZOO = "faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def conv_name(stage: int, block: int, part: str) -> str:
    if stage == 0:
        return "backbone.conv1"
    return f"backbone.layer{stage}.{block}.{part.replace('shortcut', 'downsample.0')}"


def norm_name(stage: int, block: int, part: str) -> str:
    if stage == 0:
        return "backbone.bn1"
    return f"backbone.layer{stage}.{block}.{part.replace('shortcut', 'downsample.1').replace('conv', 'bn')}"


def source(**changes: Any) -> Source:
    """R50-FPN, pytorch style."""
    options = {"mean": RGB_MEAN, "std": RGB_STD, "bgr": False, "stride_in_1x1": False, "two_sided": True, **changes}
    return Source(
        tensors={},
        conv=conv_name,
        norm=norm_name,
        lateral=lambda i: f"neck.lateral_convs.{i - 2}.conv",
        output=lambda i: f"neck.fpn_convs.{i - 2}.conv",
        rpn=("rpn_head.rpn_conv", "rpn_head.rpn_cls", "rpn_head.rpn_reg"),
        head=tuple(f"roi_head.bbox_head.{k}" for k in ("shared_fcs.0", "shared_fcs.1", "fc_cls", "fc_reg")),
        **options,
    )


def with_counters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """PyTorch's BatchNorm counts its updates."""
    counters = {k.replace("running_var", "num_batches_tracked"): torch.tensor(7) for k in tensors if "running_var" in k}
    return {**tensors, **counters}


CAFFE = {"mean": BGR_MEAN, "std": (1.0, 1.0, 1.0), "bgr": True, "stride_in_1x1": True}


def config_2x(*, style: str = "pytorch", mean: Any = RGB_MEAN, std: Any = RGB_STD, to_rgb: bool = True) -> str:
    """Config.pretty_text of 2.x, abridged."""
    norm = f"mean={list(mean)}, std={list(std)}, to_rgb={to_rgb}"
    return f"""
model = dict(
    type='FasterRCNN',
    pretrained='torchvision://resnet50',
    backbone=dict(type='ResNet', depth=50, norm_eval=True, style='{style}'),
    rpn_head=dict(
        type='RPNHead',
        anchor_generator=dict(
            type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64])),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0)),
        bbox_head=dict(bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]))))
test_cfg = dict(
    rpn=dict(nms_across_levels=False, nms_pre=1000, nms_post=1000, max_num=1000, nms_thr=0.7, min_bbox_size=0),
    rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
img_norm_cfg = dict({norm})
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(240, 160), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True), dict(type='Normalize', {norm}), dict(type='Pad', size_divisor=32)])
]
"""


def config_3x(*, style: str = "pytorch", mean: Any = RGB_MEAN, std: Any = RGB_STD, to_rgb: bool = True) -> str:
    """Config.pretty_text of 3.x, abridged."""
    return f"""
custom_hooks = []
model = dict(
    backbone=dict(depth=50, norm_eval=True, style='{style}', type='ResNet'),
    data_preprocessor=dict(
        bgr_to_rgb={to_rgb}, mean=[{mean[0]}, {mean[1]}, {mean[2]}], std=[{std[0]}, {std[1]}, {std[2]}],
        pad_size_divisor=32, type='DetDataPreprocessor'),
    test_cfg=dict(
        rcnn=dict(max_per_img=100, nms=dict(iou_threshold=0.5, type='nms'), score_thr=0.05),
        rpn=dict(max_per_img=1000, min_bbox_size=0, nms=dict(iou_threshold=0.7, type='nms'), nms_pre=1000)),
    type='FasterRCNN')
test_pipeline = [
    dict(backend_args=None, type='LoadImageFromFile'),
    dict(keep_ratio=True, scale=(240, 160), type='Resize'),
]
"""


def config_with(name: str, value: Any) -> str:
    """`config_2x` with one more setting, or another value of it."""
    config: dict[str, Any] = {}
    exec(config_2x(), {}, config)
    section = config
    *keys, last = name.split(".")
    for key in keys:
        section = section.setdefault(key, {})
    section[last] = value
    return "".join(f"{key} = {value!r}\n" for key, value in config.items())


def resize_as_mmdetection(path: Path, long_edge: int, short_edge: int) -> tuple[Tensor, tuple[int, int]]:
    """LoadImageFromFile (OpenCV, BGR) and mmcv.imrescale; given back as RGB."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    h, w = image.shape[:2]
    scale = min(long_edge / max(h, w), short_edge / min(h, w))
    size = int(w * float(scale) + 0.5), int(h * float(scale) + 0.5)
    resized = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(resized[..., ::-1].copy()).permute(2, 0, 1), (h, w)


@pytest.mark.parametrize("style", ["pytorch", "caffe"])
def test_detections_equal_those_of_mmdetection(tmp_path: Path, style: str) -> None:
    """The whole way: a file of each major version, image files through each side's own resize, detections."""
    theirs = source() if style == "pytorch" else source(**CAFFE)
    random_body(theirs)
    random_rest(theirs, torch.randint(0, 256, (3, 96, 128)), channels=16, fc_dim=32, num_classes=80)
    for name in ("weight", "bias"):  # log sizes beyond the clamp, on its lower side
        theirs.tensors[f"rpn_head.rpn_reg.{name}"][2:4] *= 40
    checkpoint = tmp_path / "epoch_12.pth"
    if style == "pytorch":
        meta: dict[str, Any] = {"config": config_2x(), "CLASSES": COCO_CATEGORIES.names, "mmdet_version": "2.25.0"}
    else:
        text = config_3x(style="caffe", mean=BGR_MEAN, std=(1.0, 1.0, 1.0), to_rgb=False)
        meta = {"cfg": text, "dataset_meta": {"classes": COCO_CATEGORIES.names}, "mmengine_version": "0.10.4"}
    torch.save({"meta": meta, "state_dict": with_counters(theirs.tensors), "optimizer": {"state": {}}}, checkpoint)
    converted = convert(read_weights(checkpoint))
    config = parse(converted)
    assert converted.categories == COCO_CATEGORIES
    model = build_model(config, 80, pretrained=False)
    model.load_state_dict(converted.state_dict)
    counts = []
    for width, height in [(213, 160), (100, 141), (320, 240), (97, 61), (300, 101), (160, 160)]:
        path = tmp_path / f"{width}x{height}.png"
        draw(path, width, height)
        image, original = resize_as_mmdetection(path, 240, 160)
        expected = theirs.detect(image, original)
        assert_same_detections(predict(model, config, path), expected)
        counts.append(len(expected[1]))
    assert max(counts) == 100
    assert min(counts) >= 20


# --- Names and shapes without memory ---


def names_of(model: Source, *, width: int = 64, num_classes: int = 80, channels: int = 8) -> dict[str, Tensor]:
    with torch.device("meta"):
        random_body(model, width=width)
    shapes = {name: tuple(value.shape) for name, value in model.tensors.items()}
    for i in range(4):
        shapes |= {f"neck.lateral_convs.{i}.conv.weight": (channels, 256 * 2**i, 1, 1)}
        shapes |= {f"neck.lateral_convs.{i}.conv.bias": (channels,), f"neck.fpn_convs.{i}.conv.bias": (channels,)}
        shapes |= {f"neck.fpn_convs.{i}.conv.weight": (channels, channels, 3, 3)}
    for name, out, size in (("rpn_conv", channels, 3), ("rpn_cls", 3, 1), ("rpn_reg", 12, 1)):
        shapes |= {f"rpn_head.{name}.weight": (out, channels, size, size), f"rpn_head.{name}.bias": (out,)}
    layers = {"shared_fcs.0": (16, channels * 49), "shared_fcs.1": (16, 16)}
    layers |= {"fc_cls": (num_classes + 1, 16), "fc_reg": (num_classes * 4, 16)}
    for name, shape in layers.items():
        shapes |= {f"roi_head.bbox_head.{name}.weight": shape, f"roi_head.bbox_head.{name}.bias": shape[:1]}
    return with_counters(blank(shapes))


@pytest.fixture(scope="module")
def r50() -> dict[str, Tensor]:
    return names_of(source())


def weight_file(tensors: dict[str, Tensor], name: str = ZOO, **meta: Any) -> WeightFile:
    return WeightFile(dict(tensors), {"meta": meta} if meta else {}, Path(name))


def test_conventions(r50: dict[str, Tensor]) -> None:
    converted = convert(weight_file(r50, config=config_2x()))
    config = assert_builds(converted)
    assert config.data.resize == "opencv"
    assert (config.data.test_short_side, config.data.long_side) == (160, 240)
    assert config.model.delta_clamp == "both"
    assert config.model.backbone.norm == "frozen_bn"
    rpn, head = config.model.rpn, config.model.roi_head
    assert (rpn.pre_nms_top_k_test, rpn.post_nms_top_k_test, rpn.nms_thresh, rpn.min_size) == (1000, 1000, 0.7, 0)
    assert rpn.min_match_iou == 0.3
    assert (head.aligned, head.sampling_ratio, head.level_eps, head.background_rows) == (True, 0, 2.5e-7, 1)
    assert head.box_weights == (10, 10, 5, 5)
    assert head.min_size == -1  # its NMS looks at no sizes
    left_out = [row for row in converted.rows if row.action == "left out"]
    assert len(left_out) == 53
    assert all(row.source.endswith("num_batches_tracked") and row.note for row in left_out)


@pytest.mark.parametrize("key", ["config", "cfg"])
@pytest.mark.parametrize("style", ["pytorch", "caffe"])
def test_input_of_the_body_from_the_config(r50: dict[str, Tensor], key: str, style: str) -> None:
    text = {"config": config_2x, "cfg": config_3x}[key]
    options: Any = {"style": "caffe", "mean": BGR_MEAN, "std": (1.0, 1.0, 1.0), "to_rgb": False}
    converted = convert(weight_file(r50, **{key: text(**options) if style == "caffe" else text()}))
    config = parse(converted)
    assert config.model.pixel_mean == RGB_MEAN
    assert config.model.pixel_std == ((1, 1, 1) if style == "caffe" else RGB_STD)
    assert config.model.backbone.stride_in_1x1 == (style == "caffe")
    assert any(row.action == "permuted" for row in converted.rows) == (style == "caffe")


def test_stem_takes_rgb_as_theirs_takes_bgr(r50: dict[str, Tensor]) -> None:
    stem = torch.randn(64, 3, 7, 7)
    image = torch.rand(1, 3, 32, 32)
    tensors = {**r50, "backbone.conv1.weight": stem}
    for style, theirs in (("caffe", F.conv2d(image.flip(1), stem)), ("pytorch", F.conv2d(image, stem))):
        ours = convert(weight_file(tensors), style=style).state_dict["backbone.stem.0.weight"]  # type: ignore[arg-type]
        torch.testing.assert_close(F.conv2d(image, ours), theirs)


def test_x101_32x8d_has_the_input_of_caffe2_and_the_stride_in_the_3x3() -> None:
    tensors = names_of(source(groups=32, blocks=(3, 4, 23, 3)), width=256)
    name = "faster_rcnn_x101_32x8d_fpn_mstrain_3x_coco_20210604_182954-002e082a.pth"
    text = config_2x(mean=BGR_MEAN, std=RGB_STD[::-1], to_rgb=False)
    for file in (weight_file(tensors, name), weight_file(tensors, "mine.pth", config=text)):
        converted = convert(file)
        config = assert_builds(converted)
        assert config.model.backbone.name == "resnext101_32x8d"
        assert (config.model.pixel_mean, config.model.pixel_std) == (RGB_MEAN, RGB_STD)
        assert not config.model.backbone.stride_in_1x1
        assert sum(row.action == "permuted" for row in converted.rows) == 1


@pytest.mark.parametrize(("groups", "width", "name"), [(32, 128, "resnext101_32x4d"), (64, 256, "resnext101_64x4d")])
def test_other_x101(groups: int, width: int, name: str) -> None:
    tensors = names_of(source(groups=groups, blocks=(3, 4, 23, 3)), width=width)
    config = assert_builds(convert(weight_file(tensors)))
    assert config.model.backbone.name == name
    assert config.model.pixel_std == RGB_STD


def test_style_without_a_config(r50: dict[str, Tensor]) -> None:
    for name in ("faster_rcnn_r50_caffe_fpn_mstrain_1x_coco_bbox_mAP-0.378_20200504_180032-c5925ee5.pth", ZOO):
        converted = convert(weight_file(r50, name))
        assert parse(converted).model.backbone.stride_in_1x1 == ("caffe" in name)
        assert any("no config" in remark for remark in converted.remarks)
    for broken in ("model = dict(", "model = 3", "x = " + "(" * 5000, config_2x().replace("dict(", "build(")):
        with pytest.raises(InputError, match=r"epoch_12\.pth: neither a config in the file nor its name.*--style"):
            convert(weight_file(r50, "epoch_12.pth", config=broken))
    assert parse(convert(weight_file(r50, "epoch_12.pth"), style="caffe")).model.backbone.stride_in_1x1


def test_config_text_is_not_executed(r50: dict[str, Tensor], tmp_path: Path) -> None:
    target = tmp_path / "executed"
    evil = f"model = dict(a=open({str(target)!r}, 'w'), b=__import__('os').system('touch {target}'))\n" + config_2x()
    convert(weight_file(r50, config=evil))
    convert(weight_file(r50, config=config_2x() + f"x = open({str(target)!r}, 'w')\n"))
    assert not target.exists()


def test_settings_of_detection_follow_the_config(r50: dict[str, Tensor]) -> None:
    text = config_3x().replace("nms_pre=1000", "nms_pre=700").replace("max_per_img=1000", "max_per_img=300")
    text = text.replace("score_thr=0.05", "score_thr=0.01").replace("max_per_img=100,", "max_per_img=50,")
    text = text.replace("iou_threshold=0.5, type='nms'", "iou_threshold=0.6, type='soft_nms'")
    text = text.replace("(240, 160)", "(1333, 800)")
    roi = "bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=2, aligned=False))"
    roi += ", bbox_head=dict(bbox_coder=dict(target_stds=[.05, .05, .1, .1]))"
    text = text.replace("model = dict(", f"model = dict(roi_head=dict({roi}),")
    converted = convert(weight_file(r50, cfg=text))
    config = parse(converted)
    assert (config.model.rpn.pre_nms_top_k_test, config.model.rpn.post_nms_top_k_test) == (700, 300)
    head = config.model.roi_head
    assert (head.score_thresh, head.nms_thresh, head.detections_per_image) == (0.01, 0.6, 50)
    assert (head.sampling_ratio, head.aligned, head.box_weights) == (2, False, (20, 20, 10, 10))
    assert (config.data.test_short_side, config.data.long_side) == (800, 1333)
    assert any("soft_nms" in remark for remark in converted.remarks)


def test_sizes_are_those_of_the_pipeline_that_tests(r50: dict[str, Tensor]) -> None:
    """A config can change the pipeline of the data and leave the variable `test_pipeline` behind."""
    pipeline = "pipeline=[dict(type='LoadImageFromFile'), dict(keep_ratio=True, scale=(500, 300), type='Resize')]"
    for text in (
        config_3x() + f"test_dataloader = dict(batch_size=1, dataset=dict({pipeline}))\n",
        config_2x() + f"data = dict(test=dict({pipeline}))\n",
    ):
        data = parse(convert(weight_file(r50, config=text))).data
        assert (data.test_short_side, data.long_side) == (300, 500)


def test_anchors_follow_the_config(r50: dict[str, Tensor]) -> None:
    text = config_2x().replace("scales=[8], ratios=[0.5, 1.0, 2.0]", "scales=[4, 8], ratios=[1.0]")
    with pytest.raises(InputError, match="3 anchors per cell, expected 2"):
        convert(weight_file(r50, config=text))
    two = r50 | blank({"rpn_head.rpn_cls.weight": (2, 8, 1, 1), "rpn_head.rpn_cls.bias": (2,)})
    two |= blank({"rpn_head.rpn_reg.weight": (8, 8, 1, 1), "rpn_head.rpn_reg.bias": (8,)})
    config = assert_builds(convert(weight_file(two, config=text)))
    assert config.model.anchors.level_sizes == [(16, 32), (32, 64), (64, 128), (128, 256), (256, 512)]
    assert config.model.anchors.ratios == (1.0,)
    based = config_with("model.rpn_head.anchor_generator.base_sizes", [5, 9, 17, 33, 65])
    assert parse(convert(weight_file(r50, config=based))).model.anchors.level_sizes == [
        (40,),
        (72,),
        (136,),
        (264,),
        (520,),
    ]


def proposals_of(
    rpn: dict[str, Tensor], x: Tensor, *, stride: int, scales: list[int], ratios: list[float], scale_major: bool
) -> tuple[Tensor, Tensor]:
    """Boxes (A, 4) and logits (A,) of a level, of RPNHead, AnchorGenerator and delta2bbox in mmdet 3.3.0."""
    hidden = F.conv2d(x, rpn["rpn_conv.weight"], rpn["rpn_conv.bias"], padding=1).relu()
    logits = F.conv2d(hidden, rpn["rpn_cls.weight"], rpn["rpn_cls.bias"])[0].permute(1, 2, 0).flatten()
    deltas = F.conv2d(hidden, rpn["rpn_reg.weight"], rpn["rpn_reg.bias"])[0].permute(1, 2, 0).reshape(-1, 4)
    # gen_single_level_base_anchors: w * w_ratios[:, None] * scales[None, :], or scales first.
    shapes = [(ratio, scale) for ratio in ratios for scale in scales]
    if not scale_major:
        shapes = [(ratio, scale) for scale in scales for ratio in ratios]
    boxes = []
    for i, (dx, dy, dw, dh) in enumerate(deltas.tolist()):
        cell, anchor = divmod(i, len(shapes))
        row, column = divmod(cell, x.shape[-1])
        ratio, scale = shapes[anchor]
        w, h = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
        cx, cy = column * stride + dx * w, row * stride + dy * h
        w, h = w * math.exp(dw), h * math.exp(dh)
        boxes.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    return torch.tensor(boxes), logits


@pytest.mark.parametrize("scale_major", [True, False])
def test_anchors_of_several_scales_and_ratios(r50: dict[str, Tensor], scale_major: bool) -> None:
    """Theirs are ordered by ratio, then scale, unless scale_major is False; every box must come off its own anchor."""
    scales, ratios = [4, 9], [0.5, 1.0, 3.0]
    text = config_2x().replace("scales=[8], ratios=[0.5, 1.0, 2.0]", f"scales={scales}, ratios={ratios}")
    text = text if scale_major else text.replace("scales=[4", "scale_major=False, scales=[4")
    rpn = {"rpn_conv.weight": torch.randn(8, 8, 3, 3) / 6, "rpn_conv.bias": torch.randn(8) / 6}
    rpn |= {"rpn_cls.weight": torch.randn(6, 8, 1, 1), "rpn_cls.bias": torch.randn(6)}
    rpn |= {"rpn_reg.weight": torch.randn(24, 8, 1, 1) / 9, "rpn_reg.bias": torch.randn(24) / 9}
    others = {name: value for name, value in r50.items() if not name.startswith(("rpn_head.", "roi_head."))}
    converted = convert(weight_file(others | {f"rpn_head.{k}": v for k, v in rpn.items()}, config=text))
    permuted = [row for row in converted.rows if row.action == "permuted"]
    assert len(permuted) == (4 if scale_major else 0)
    assert all("ratio" in row.note for row in permuted)

    ours = build_model(parse(converted), 1, pretrained=False).rpn
    ours.load_state_dict({k.removeprefix("rpn."): v for k, v in converted.state_dict.items() if k.startswith("rpn.")})
    levels = [torch.randn(1, 8, 5 - i, 6 - i) for i in range(5)]
    with torch.no_grad():
        for i, (logits, deltas, anchors) in enumerate(zip(*ours(levels), strict=True)):
            boxes, expected = proposals_of(
                rpn, levels[i], stride=4 * 2**i, scales=scales, ratios=ratios, scale_major=scale_major
            )
            order, expected_order = logits[0].argsort(), expected.argsort()
            torch.testing.assert_close(logits[0][order], expected[expected_order])
            decoded = box_ops.decode(deltas[0], anchors, delta_clamp="both")
            torch.testing.assert_close(decoded[order], boxes[expected_order], rtol=1e-4, atol=1e-3)


def test_wrong_numbers_of_anchors_are_named(r50: dict[str, Tensor]) -> None:
    text = config_2x().replace("scales=[8]", "scales=[4, 8]")
    for shape in ((3, 8, 1, 1), (5, 8, 1, 1)):
        with pytest.raises(InputError, match=f"{shape[0]} anchors per cell, expected 6"):
            convert(weight_file(r50 | blank({"rpn_head.rpn_cls.weight": shape}), config=text))


@pytest.mark.parametrize("finest_scale", [56, 112])
def test_levels_of_rois(finest_scale: int) -> None:
    """floor(log2(s / 56 + 1e-6)) there; ours uses level_eps. Sizes a rounding away from a switch are left out."""
    ours = MultiLevelRoIAlign(strides=(4, 8, 16, 32), canonical_size=4 * finest_scale, level_eps=2.5e-7)
    without = MultiLevelRoIAlign(strides=(4, 8, 16, 32), canonical_size=4 * finest_scale)
    differ = 0
    for boundary in (2.0 * finest_scale, 4.0 * finest_scale, 8.0 * finest_scale):
        side = np.float32(boundary) * (1 - np.arange(60) * np.float32(3e-8))
        boxes = F.pad(torch.from_numpy(side)[:, None].expand(-1, 2), (2, 0))
        size = boxes[:, 2:].prod(dim=1).sqrt()
        theirs = torch.floor(torch.log2(size / finest_scale + 1e-6)).clamp(min=0, max=3).long()
        switch = boundary * (1 - 1e-6 * finest_scale / boundary)
        clear = (size.double() / switch - 1).abs() > 3e-7
        assert torch.equal(ours.assign_levels(boxes)[clear], theirs[clear])
        differ += int((without.assign_levels(boxes) != theirs)[clear].sum())
    assert differ > 0


def test_settings_that_have_a_key(r50: dict[str, Tensor]) -> None:
    extractor = "model.roi_head.bbox_roi_extractor"
    for name, value, key, expected in (
        (f"{extractor}.finest_scale", 112, "roi_head.canonical_size", 448),
        (f"{extractor}.roi_layer", {"type": "RoIAlign", "out_size": 7, "sample_num": 2}, "roi_head.sampling_ratio", 2),
        (f"{extractor}.roi_layer.output_size", [7, 7], "roi_head.pool_size", 7),
        ("model.roi_head.bbox_head.bbox_coder", {"type": "DeltaXYWHBBoxCoder"}, "roi_head.box_weights", (1, 1, 1, 1)),
        ("model.neck.upsample_cfg", {"mode": "bilinear"}, "neck.upsample", "bilinear"),
        ("model.neck.upsample_cfg", {"mode": "nearest", "scale_factor": 2}, "neck.upsample", "nearest"),
        ("model.backbone.norm_cfg", {"type": "BN", "eps": 1e-3}, "backbone.norm_eps", 1e-3),
    ):
        found: Any = assert_builds(convert(weight_file(r50, config=config_with(name, value)))).model
        for part in key.split("."):
            found = getattr(found, part)
        assert found == expected, name


def test_bilinear_upsampling_is_theirs() -> None:
    """F.interpolate(x, size=.., mode='bilinear') in mmdet/models/necks/fpn.py."""
    x = torch.randn(1, 4, 5, 7)
    for size in ((10, 14), (9, 13)):
        theirs = F.interpolate(x, size=size, mode="bilinear")
        assert torch.equal(Upsample(channels=4, kind="bilinear")(x, size), theirs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backbone.type", "ResNetV1d"),
        ("backbone.style", "tensorflow"),
        ("backbone.strides", (1, 2, 2, 1)),
        ("backbone.dilations", (1, 1, 1, 2)),
        ("backbone.dcn", {"type": "DCN", "deform_groups": 1}),
        ("backbone.plugins", [{"cfg": {"type": "ContextBlock"}}]),
        ("backbone.conv_cfg", {"type": "ConvWS"}),
        ("neck.type", "PAFPN"),
        ("neck.act_cfg", {"type": "ReLU"}),
        ("neck.conv_cfg.type", "ConvWS"),
        ("neck.norm_cfg", {"type": "GN", "num_groups": 16}),
        ("neck.norm_cfg.eps", 1e-3),
        ("neck.upsample_cfg.mode", "bicubic"),
        ("neck.upsample_cfg.align_corners", True),
        ("neck.upsample_cfg.scale_factor", 4),
        ("rpn_head.type", "GARPNHead"),
        ("rpn_head.anchor_generator.type", "LegacyAnchorGenerator"),
        ("rpn_head.anchor_generator.strides", [8, 16, 32, 64, 128]),
        ("rpn_head.anchor_generator.octave_base_scale", 4),
        ("rpn_head.anchor_generator.centers", [(0.0, 0.0)] * 5),
        ("rpn_head.anchor_generator.center_offset", 0.5),
        ("rpn_head.bbox_coder.type", "TBLRBBoxCoder"),
        ("rpn_head.bbox_coder.target_means", [0.0, 0.0, 0.1, 0.1]),
        ("rpn_head.bbox_coder.target_stds", [0.1, 0.1, 0.2, 0.2]),
        ("test_cfg.rpn.nms", {"type": "soft_nms", "iou_threshold": 0.7}),
        ("test_cfg.rpn.nms_across_levels", True),
        ("test_cfg.rcnn.nms.class_agnostic", True),
        ("roi_head.bbox_roi_extractor.type", "GenericRoIExtractor"),
        ("roi_head.bbox_roi_extractor.featmap_strides", [4, 8, 16]),
        ("roi_head.bbox_roi_extractor.roi_layer.type", "RoIPool"),
        ("roi_head.bbox_roi_extractor.roi_layer.pool_mode", "max"),
        ("roi_head.bbox_roi_extractor.roi_layer.output_size", 14),
        ("roi_head.bbox_head.bbox_coder.type", "LegacyDeltaXYWHBBoxCoder"),
        ("roi_head.bbox_head.bbox_coder.target_means", [0.0, 0.0, 0.1, 0.1]),
        ("roi_head.bbox_head.bbox_coder.clip_border", False),
        ("roi_head.bbox_head.bbox_coder.add_ctr_clamp", True),
        ("roi_head.bbox_head.cls_predictor_cfg", {"type": "NormedLinear"}),
    ],
)
def test_settings_that_ours_cannot_follow(r50: dict[str, Tensor], name: str, value: Any) -> None:
    """Each changes the boxes, and none the names or shapes of the tensors."""
    with pytest.raises(InputError, match=rf"its config has model\.{name}.*; only .* can be imported"):
        convert(weight_file(r50, config=config_with(f"model.{name}", value)))


@pytest.mark.parametrize(
    ("name", "value", "supported"),
    [
        ("roi_head.bbox_head.bbox_coder.target_stds", [0.1, 0.1, 0.2, 0], "a list of 4, each a number above 0"),
        ("roi_head.bbox_head.bbox_coder.target_stds", 0.1, "a list of 4"),
        ("roi_head.bbox_head.bbox_coder.target_stds", [0.1, 0.2], "a list of 4"),
        ("rpn_head.anchor_generator.scales", 8, "a list of one or more"),
        ("rpn_head.anchor_generator.scales", ["8"], "a list of one or more"),
        ("rpn_head.anchor_generator.ratios", [], "a list of one or more"),
        ("rpn_head.anchor_generator.ratios", [0.5, -1], "a list of one or more, each a number above 0"),
        ("rpn_head.anchor_generator.base_sizes", [4, 8], "a list of 5"),
        ("backbone.norm_cfg.eps", -1, "a number from 0"),
        ("test_cfg.rpn.nms_pre", -1, "a whole number above 0"),
        ("test_cfg.rpn.max_num", 1000.5, "a whole number above 0"),
        ("test_cfg.rpn.min_bbox_size", "0", "a number from 0"),
        ("test_cfg.rpn.nms_thr", 7, "a number from 0 to 1"),
        ("test_cfg.rcnn.score_thr", "x", "a number from 0 to 1"),
        ("test_cfg.rcnn.max_per_img", True, "a whole number above 0"),
        pytest.param("test_cfg.rcnn.nms.iou_threshold", 10**400, "a number from 0 to 1", id="huge"),
        ("roi_head.bbox_roi_extractor.finest_scale", 0, "a number above 0"),
        ("roi_head.bbox_roi_extractor.roi_layer.sampling_ratio", -1, "a whole number from 0"),
        ("roi_head.bbox_roi_extractor.roi_layer.aligned", 1, "True or False"),
    ],
)
def test_odd_values_are_named(r50: dict[str, Tensor], name: str, value: Any, supported: str) -> None:
    with pytest.raises(InputError) as raised:
        convert(weight_file(r50, config=config_with(f"model.{name}", value)))
    assert f"its config has model.{name} {value!r:.80}; only {supported}" in str(raised.value)
    assert ZOO in str(raised.value)


def test_values_that_are_not_literals_are_shown_not_dropped(r50: dict[str, Tensor]) -> None:
    text = config_2x().replace("scales=[8]", "scales=anchor_scales()")
    with pytest.raises(InputError, match=r"anchor_generator\.scales 'anchor_scales\(\)'; only a list"):
        convert(weight_file(r50, config=text))


def test_resize_of_the_pipeline(r50: dict[str, Tensor]) -> None:
    for text in (
        config_2x().replace("keep_ratio=True", "keep_ratio=False"),
        config_3x().replace("keep_ratio=True", "keep_ratio=False"),
        config_3x().replace("keep_ratio=True, ", ""),  # False by default since 3.0
    ):
        with pytest.raises(InputError, match=r"test_pipeline: Resize\.keep_ratio False; only True can be imported"):
            convert(weight_file(r50, cfg=text))
    convert(weight_file(r50, config=config_2x().replace("keep_ratio=True", "")))  # True by default before
    for scale in ("[(240, 160), (480, 320)]", "240", "(240, 160.5)", "(240, 0)"):
        with pytest.raises(InputError, match=r"test_pipeline: scale of Resize .*only a list of 2, each a whole number"):
            convert(weight_file(r50, cfg=config_3x().replace("(240, 160)", scale)))


def test_remarks_on_padding_and_on_a_config_without_sizes(r50: dict[str, Tensor]) -> None:
    def remarks(text: str) -> str:
        return " ".join(convert(weight_file(r50, config=text)).remarks)

    for text in (config_2x(), config_3x()):
        assert "multiples" not in remarks(text)
        assert "no size" not in remarks(text)
    assert "multiples of 64" in remarks(config_2x().replace("size_divisor=32", "size_divisor=64"))
    assert "multiples of 16" in remarks(config_3x().replace("pad_size_divisor=32", "pad_size_divisor=16"))
    assert "multiples of 1," in remarks(config_3x().replace("pad_size_divisor=32, ", ""))  # its default
    assert "no size of images in test_pipeline" in remarks(config_3x().replace("type='Resize'", "type='Rescale'"))


def test_rpn_alone_and_fast_rcnn(r50: dict[str, Tensor]) -> None:
    rpn = {name: value for name, value in r50.items() if not name.startswith("roi_head.")}
    config = assert_builds(convert(weight_file(rpn, "rpn_r50_fpn_1x_coco_20200218-5525fa2e.pth")), 1)
    assert (config.model.kind, config.model.rpn.pre_nms_top_k_test) == ("rpn", 2000)
    since_3 = {name.replace("rpn_head.", "bbox_head."): value for name, value in rpn.items()}
    assert recognises(since_3)
    renamed = convert(weight_file(since_3, cfg=config_3x()))
    assert assert_builds(renamed, 1).model.kind == "rpn"
    with_config = convert(weight_file(rpn, config=config_2x().replace("nms_pre=1000", "nms_pre=500")))
    assert parse(with_config).model.rpn.pre_nms_top_k_test == 500
    fast = {name: value for name, value in r50.items() if not name.startswith("rpn_head.")}
    assert assert_builds(convert(weight_file(fast))).model.kind == "fast_rcnn"


def test_strong_baseline_norms_everywhere(r50: dict[str, Tensor]) -> None:
    """configs/strong_baselines: SyncBN in body, neck and 4conv1fc head, two convolutions in the RPN."""
    replaced = ("neck.", "roi_head.bbox_head.shared", "rpn_head.rpn_conv")
    tensors = {name: value for name, value in r50.items() if not name.startswith(replaced)}
    norm = {"weight": (32,), "bias": (32,), "running_mean": (32,), "running_var": (32,), "num_batches_tracked": ()}
    convs = {f"neck.lateral_convs.{i}": (32, 256 * 2**i, 1, 1) for i in range(4)}
    convs |= {f"neck.fpn_convs.{i}": (32, 32, 3, 3) for i in range(4)}
    convs |= {f"roi_head.bbox_head.shared_convs.{i}": (32, 32, 3, 3) for i in range(4)}
    for name, shape in convs.items():
        tensors |= blank({f"{name}.conv.weight": shape, **{f"{name}.bn.{k}": v for k, v in norm.items()}})
    tensors |= blank({f"rpn_head.rpn_conv.{i}.conv.weight": (32, 32, 3, 3) for i in (0, 1)})
    tensors |= blank({f"rpn_head.rpn_conv.{i}.conv.bias": (32,) for i in (0, 1)})
    tensors |= blank({"rpn_head.rpn_cls.weight": (3, 32, 1, 1), "rpn_head.rpn_reg.weight": (12, 32, 1, 1)})
    fcs = {"roi_head.bbox_head.shared_fcs.0.weight": (16, 32 * 49), "roi_head.bbox_head.shared_fcs.0.bias": (16,)}
    tensors |= blank(fcs)
    converted = convert(weight_file(tensors, config=config_2x().replace("norm_eval=True", "norm_eval=False")))
    config = assert_builds(converted)
    assert config.model.backbone.norm == "bn"
    assert (config.model.neck.norm, config.model.roi_head.box_head.norm) == ("bn", "bn")
    assert (config.model.rpn.num_convs, config.model.roi_head.box_head.num_convs) == (2, 4)
    assert not [row for row in converted.rows if row.action == "left out"]


def test_classes(r50: dict[str, Tensor]) -> None:
    three = r50 | blank({"roi_head.bbox_head.fc_cls.weight": (4, 16), "roi_head.bbox_head.fc_cls.bias": (4,)})
    three |= blank({"roi_head.bbox_head.fc_reg.weight": (12, 16), "roi_head.bbox_head.fc_reg.bias": (12,)})
    named = Categories((1, 2, 3), ("red", "white", "platelet"))
    metas: list[dict[str, Any]] = [{"CLASSES": named.names}, {"dataset_meta": {"CLASSES": named.names}}]
    for meta in [*metas, {"dataset_meta": {"classes": named.names}}]:
        converted = convert(weight_file(three, config=config_2x(), **meta))
        assert converted.categories == named
        assert any("ids" in remark for remark in converted.remarks)
        assert_builds(converted, 3)
    assert convert(weight_file(three)).categories is None
    assert convert(weight_file(r50)).categories == COCO_CATEGORIES
    old = tuple(name.replace(" ", "_") for name in COCO_CATEGORIES.names)  # mmdet/datasets/coco.py of 1.x
    assert convert(weight_file(r50, CLASSES=old)).categories == COCO_CATEGORIES
    assert convert(weight_file(three, CLASSES=("two", "names"))).categories is None


def test_raw_weights_beside_their_average_are_left_out(r50: dict[str, Tensor]) -> None:
    converted = convert(weight_file({**r50, "ema_backbone_conv1_weight": torch.zeros(64, 3, 7, 7)}))
    [row] = [row for row in converted.rows if row.source.startswith("ema_")]
    assert row.action == "left out"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("roi_head.mask_head.convs.0.conv.weight", "a Mask R-CNN"),
        ("roi_head.bbox_head.0.fc_cls.weight", "a Cascade R-CNN"),
        ("bbox_head.fc_cls.weight", r"of MMDetection 1\.x"),
        ("bbox_head.retina_cls.weight", "a one-stage detector"),
        ("roi_head.shared_head.layer4.0.conv1.weight", "a detector without an FPN"),
        ("neck.pafpn_convs.0.conv.weight", "a PAFPN"),
        ("backbone.patch_embed.projection.weight", "not a plain ResNet"),
        ("backbone.layer2.0.conv2.conv_offset.weight", "deformable"),
    ],
)
def test_other_models_are_named(r50: dict[str, Tensor], name: str, what: str) -> None:
    with pytest.raises(InputError, match=rf"{what}.*can be imported"):
        convert(weight_file({**r50, name: torch.zeros(1)}))


def test_unknown_tensors_are_errors_and_others_are_not_recognised(r50: dict[str, Tensor]) -> None:
    assert recognises(r50)
    with pytest.raises(InputError, match=r"1 of .* tensors are of no known layer: rpn_head.extra"):
        convert(weight_file({**r50, "rpn_head.extra": torch.zeros(2)}))
    for name in ("backbone.stem.0.weight", "rpn.head.convs.0.weight", "backbone.body.conv1.weight", "conv1.weight"):
        assert not recognises({name: torch.zeros(1)})
