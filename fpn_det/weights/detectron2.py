"""Weights of Detectron2: Faster R-CNN, Fast R-CNN and RPN with an FPN, and the ImageNet bodies that they start from.

Its conventions are in `_convert_detector` and `_body_input`; their source: layers/batch_norm.py, the folder checkpoint,
configs/Base-RCNN-FPN.yaml and configs/COCO-Detection.

Dimensions: K classes, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fpn_det.structures import InputError
from fpn_det.weights.architecture import detector_architecture, norm_kind, resnet_architecture
from fpn_det.weights.body_input import FAIR_RESNEXT, MSRA, TORCHVISION, BodyInput, Channels
from fpn_det.weights.coco_classes import COCO_CATEGORIES
from fpn_det.weights.read import WeightFile
from fpn_det.weights.rename import Converted, Row, Rule, rename

Style = Literal["auto", "caffe", "pytorch"]

_FAMILY = ("backbone.bottom_up.", "backbone.stem.", "backbone.res", "backbone.fpn_", "proposal_generator.")
_BODY_FAMILY = ("stem.conv1.", "res2.0.", "res2_0_branch")  # without a prefix; the last are Caffe2's names
_UNSUPPORTED = (
    ("roi_heads.mask_", "a Mask R-CNN"),
    ("roi_heads.keypoint_", "a Keypoint R-CNN"),
    ("sem_seg_head.", "a segmentation model"),
    ("roi_heads.box_predictor.0.", "a Cascade R-CNN"),
    ("head.cls_subnet.", "a RetinaNet"),
    ("roi_heads.res5.", "a detector on C4"),
    ("backbone.res", "a detector without an FPN (DC5 or C4)"),
    ("conv_rpn", "a detector of Detectron 1 (Caffe2), whose boxes are defined otherwise"),
    ("fpn_inner_", "a detector of Detectron 1 (Caffe2), whose boxes are defined otherwise"),
)
_IMPORTABLE = (
    "Detectron2's Faster R-CNN, Fast R-CNN and RPN with a ResNet or ResNeXt and an FPN, and ImageNet bodies in its or "
    "Caffe2's names, can be imported"
)
_NO_CONFIG = "the file has no config: the anchors, pooling and thresholds are those of Detectron2's Base-RCNN-FPN.yaml"


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of Detectron2, also of its models that cannot be imported."""
    families = (*_FAMILY, *_BODY_FAMILY, "head.cls_subnet.", "conv_rpn", "fpn_inner_")
    # `backbone.stem.0.weight` is ours.
    return any(name.startswith(families) for name in tensors) and "backbone.stem.0.weight" not in tensors


def convert(file: WeightFile, *, style: Style = "auto") -> Converted:
    """Rename, bring the input to RGB, and state the conventions.

    Args:
        file: a `.pkl` of the model zoo or a `.pth` of training.
        style: `caffe`: the body takes BGR of standard deviation 1 and has the stride in the 1x1 (MSRA's); `pytorch`:
            RGB and the stride in the 3x3 (torchvision's); `auto`: as in Detectron2's config for that body.

    Raises:
        InputError: another model, tensors of no known layer, or a style that cannot be told.
    """
    for prefix, what in _UNSUPPORTED:
        if any(name.startswith(prefix) for name in file.tensors):
            raise InputError(f"{file.path}: this is {what}. {_IMPORTABLE}")
    if any("conv2_offset" in name for name in file.tensors):
        raise InputError(f"{file.path}: its body has deformable convolutions. {_IMPORTABLE}")
    if any(name.startswith(_FAMILY) for name in file.tensors):
        return _convert_detector(file, style)
    return _convert_body(file, style)


def _convert_detector(file: WeightFile, style: Style) -> Converted:
    state_dict, rows = rename(file.tensors, _detector_rules(file.tensors), source=file.path)
    _check_anchors(file)
    model = detector_architecture(state_dict, source=file.path)
    body_input = _body_input(file, style, **model["backbone"])
    body_input.to_rgb("backbone.stem.0.weight", state_dict, rows)
    model |= body_input.config()
    model["backbone"]["stride_in_1x1"] = body_input.stride_in_1x1
    model["delta_clamp"] = "upper"
    if "rpn" in model:
        # configs/COCO-Detection/rpn_R_50_FPN_1x.yaml asks for 2000, the base config for 1000.
        model["rpn"] |= {"pre_nms_top_k_test": 1000, "post_nms_top_k_test": 2000 if model["kind"] == "rpn" else 1000}
    categories = None
    remarks = [body_input.remark(), _NO_CONFIG]
    if "roi_head" in model:
        model["roi_head"] |= {"sampling_ratio": 0, "aligned": True, "level_eps": 1e-8, "background_rows": 1}
        model["roi_head"]["min_size"] = None
        num_classes = len(state_dict["roi_head.class_logits.bias"]) - 1
        categories = COCO_CATEGORIES if num_classes == len(COCO_CATEGORIES) else None
        remarks.append(
            "80 classes, taken to be COCO's"
            if categories
            else f"{num_classes} classes of unknown names; --categories names them"
        )
    return Converted(
        kind="detector",
        state_dict=state_dict,
        config={"model": model, "data": {"resize": "pillow"}, "eval": {"batch_size": 1}},
        rows=rows,
        categories=categories,
        remarks=tuple(remarks),
    )


def _convert_body(file: WeightFile, style: Style) -> Converted:
    """Layers C1..C5 in torchvision's names, which is what `model.backbone.weights` reads."""
    rules = [
        *_body_rules("", "", stem=("conv1", "bn1")),
        *_caffe2_rules(),
        Rule(r"(?:stem\.fc|linear|fc1000)\.(?:weight|bias)", None, "the classifier of images"),
    ]
    state_dict, rows = rename(file.tensors, rules, source=file.path)
    if "conv1.weight" not in state_dict:
        raise InputError(f"{file.path}: the body has no stem (conv1_w, stem.conv1.weight). Is the file complete?")
    norm = norm_kind(state_dict, "bn1.")
    if norm == "gn" and not any("_gn_" in name for name in file.tensors):
        _add_identity_statistics(state_dict, rows)
        norm = "frozen_bn"
    if norm == "bn":
        norm = "frozen_bn"  # of a classifier: its trained statistics are constants
    name = resnet_architecture(state_dict, source=file.path)
    body_input = _body_input(file, style, name=name, norm=norm)
    body_input.to_rgb("conv1.weight", state_dict, rows)
    backbone = {"name": name, "norm": norm, "stride_in_1x1": body_input.stride_in_1x1}
    return Converted(
        kind="body",
        state_dict=state_dict,
        config={"model": {**body_input.config(), "backbone": backbone}},
        rows=rows,
        remarks=(body_input.remark(),),
    )


def _body_input(file: WeightFile, style: Style, *, name: str, norm: str | None) -> BodyInput:
    """How the body takes an image: as asked for, as the file says, or as in Detectron2's config with such a body."""
    is_resnet = name in ("resnet50", "resnet101", "resnet152")
    if style != "auto":
        known = MSRA if style == "caffe" else TORCHVISION
    elif file.meta.get("__author__") == "torchvision" or name in ("resnet18", "resnet34"):
        known = replace(TORCHVISION, reason="a body of torchvision")
    elif name.startswith("resnext"):
        known = replace(FAIR_RESNEXT, reason="Detectron2's config of X-101")
    elif is_resnet and norm == "gn":
        known = replace(MSRA, stride_in_1x1=False, reason="Detectron2's configs with group norm")
    elif is_resnet:
        known = replace(MSRA, reason="Detectron2's configs with bodies of MSRA")
    else:
        raise InputError(f"{file.path}: Detectron2 has no config with a {name}; state the --style, caffe or pytorch")
    if "pixel_mean" not in file.tensors or "pixel_std" not in file.tensors:
        return known
    mean, std = _channels(file, "pixel_mean"), _channels(file, "pixel_std")
    if style != "auto":
        return replace(known, mean=mean, std=std)
    # The order of the channels is not in the file. That of ImageNet's means, blue < green < red, shows it.
    if not (mean[0] < mean[1] < mean[2] or mean[0] > mean[1] > mean[2]):
        raise InputError(f"{file.path}: its pixel_mean {mean} does not tell BGR from RGB; state the --style")
    bgr = mean[0] < mean[2]
    return BodyInput(
        bgr=bgr,
        mean=mean,
        std=std,
        stride_in_1x1=is_resnet and norm != "gn" and bgr and std == MSRA.std,
        reason="the file's pixel_mean and pixel_std, and Detectron2's config with such a body",
    )


def _channels(file: WeightFile, name: str) -> Channels:
    values = [round(float(value), 5) for value in file.tensors[name].flatten()]
    if len(values) != 3:
        raise InputError(f"{file.path}: its {name} {values} is not of three channels; only those can be imported")
    return values[0], values[1], values[2]


def _detector_rules(tensors: Mapping[str, Tensor]) -> list[Rule]:
    rpn, head = r"proposal_generator\.rpn_head", r"roi_heads\.box_head"
    rules = [
        *_body_rules(r"backbone\.bottom_up\.", "backbone.", stem=("stem.0", "stem.1")),
        Rule(rf"{rpn}\.conv\.(weight|bias)", r"rpn.head.convs.0.\1"),
        Rule(rf"{rpn}\.conv\.conv(\d+)\.(weight|bias)", r"rpn.head.convs.\1.\2"),
        Rule(rf"{rpn}\.objectness_logits\.(weight|bias)", r"rpn.head.objectness.\1"),
        Rule(rf"{rpn}\.anchor_deltas\.(weight|bias)", r"rpn.head.deltas.\1"),
        Rule(r"(?:proposal_generator\.)?anchor_generator\.cell_anchors\.[0-4]", None, "equal to ours"),
        Rule(r"pixel_(?:mean|std)", None, "in the config"),
        Rule(r"roi_heads\.box_predictor\.cls_score\.(weight|bias)", r"roi_head.class_logits.\1"),
        Rule(r"roi_heads\.box_predictor\.bbox_pred\.(weight|bias)", r"roi_head.box_deltas.\1"),
    ]
    for i in range(4):
        for conv in ("lateral", "output"):
            rules += _conv_rules(tensors, f"backbone.fpn_{conv}{i + 2}", f"neck.{conv}.{i}")
    for i in range(16):
        rules += _conv_rules(tensors, f"roi_heads.box_head.conv{i + 1}", f"roi_head.box_head.convs.{i}")
        rules.append(Rule(rf"{head}\.fc{i + 1}\.(weight|bias)", rf"roi_head.box_head.fcs.{i}.\1"))
    return rules


def _conv_rules(tensors: Mapping[str, Tensor], theirs: str, ours: str) -> list[Rule]:
    """Of a convolution, with its norm if it has one."""
    pattern = theirs.replace(".", r"\.")
    if f"{theirs}.norm.weight" not in tensors:
        return [Rule(rf"{pattern}\.(weight|bias)", rf"{ours}.\1")]
    return [Rule(rf"{pattern}\.weight", f"{ours}.0.weight"), Rule(rf"{pattern}\.norm\.(\w+)", rf"{ours}.1.\1")]


def _body_rules(theirs: str, ours: str, *, stem: tuple[str, str]) -> list[Rule]:
    """Of a body in Detectron2's names; `stem`: our names of its convolution and norm."""
    rules = [
        Rule(rf"{theirs}stem\.conv1\.weight", f"{ours}{stem[0]}.weight"),
        Rule(rf"{theirs}stem\.conv1\.norm\.(\w+)", rf"{ours}{stem[1]}.\1"),
    ]
    for i in (1, 2, 3, 4):
        block = rf"{theirs}res{i + 1}\.(\d+)\."
        rules += [
            Rule(rf"{block}conv([123])\.weight", rf"{ours}layer{i}.\1.conv\2.weight"),
            Rule(rf"{block}conv([123])\.norm\.(\w+)", rf"{ours}layer{i}.\1.bn\2.\3"),
            Rule(rf"{block}shortcut\.weight", rf"{ours}layer{i}.\1.downsample.0.weight"),
            Rule(rf"{block}shortcut\.norm\.(\w+)", rf"{ours}layer{i}.\1.downsample.1.\2"),
        ]
    return rules


def _caffe2_rules() -> list[Rule]:
    """Of a body in Caffe2's names; a norm is there `bn` or `gn` with scale `s` and shift `b`."""
    rules = [
        Rule(r"conv1_w", "conv1.weight"),
        Rule(r"conv1_b", None, "Detectron leaves it out: the norm that follows has the shift"),
        Rule(r"(?:fc1000|pred)_[wb]", None, "the classifier of images"),
        Rule(r".*_momentum", None, "state of the optimiser"),
        Rule(r"lr", None, "state of the optimiser"),
    ]
    parts = {"s": "weight", "gamma": "weight", "b": "bias", "beta": "bias"}
    parts |= {"rm": "running_mean", "running_mean": "running_mean", "riv": "running_var", "running_var": "running_var"}
    for suffix, part in parts.items():
        rules.append(Rule(rf"(?:res_)?conv1_[bg]n_{suffix}", f"bn1.{part}"))
    for i in (1, 2, 3, 4):
        for branch, conv, norm in (
            ("1", "downsample.0", "downsample.1"),
            ("2a", "conv1", "bn1"),
            ("2b", "conv2", "bn2"),
            ("2c", "conv3", "bn3"),
        ):
            rules.append(Rule(rf"res{i + 1}_(\d+)_branch{branch}_w", rf"layer{i}.\1.{conv}.weight"))
            for suffix, part in parts.items():
                rules.append(Rule(rf"res{i + 1}_(\d+)_branch{branch}_[bg]n_{suffix}", rf"layer{i}.\1.{norm}.{part}"))
    return rules


def _add_identity_statistics(state_dict: dict[str, Tensor], rows: list[Row]) -> None:
    """Statistics for norms that have only scale and shift: those that Detectron2's FrozenBatchNorm2d adds in loading.

    It adds its eps to the variance of 1 all the same, so the scale is 5e-6 smaller than in Caffe2; so is ours.
    """
    for name in [name for name in state_dict if name.endswith(".bias")]:
        prefix, shift = name.removesuffix("bias"), state_dict[name]
        state_dict[f"{prefix}running_mean"] = torch.zeros_like(shift)
        state_dict[f"{prefix}running_var"] = torch.ones_like(shift)
        note = "the norm is scale and shift alone"
        rows.append(Row("-", f"{prefix}running_mean", "added", f"0: {note}"))
        rows.append(Row("-", f"{prefix}running_var", "added", f"1: {note}"))


def _check_anchors(file: WeightFile) -> None:
    """Refuse anchors, which older files contain, other than ours (one size per level, ratios 0.5, 1, 2)."""
    for name, anchors in file.tensors.items():
        if "anchor_generator.cell_anchors." not in name:
            continue
        size = 32 * 2 ** int(name.rpartition(".")[2])
        width = size / torch.tensor([0.5, 1.0, 2.0]).sqrt()
        half = torch.stack([width, size * size / width], dim=1) / 2
        if anchors.shape != (3, 4) or not torch.allclose(anchors.float(), torch.cat([-half, half], dim=1), rtol=1e-4):
            raise InputError(
                f"{file.path}: {name} is {anchors.tolist()}, not the anchors of the standard FPN (size {size}, ratios "
                "0.5, 1, 2). Only those can be imported"
            )
