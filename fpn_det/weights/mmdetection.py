"""Weights of MMDetection 2.x and 3.x: Faster R-CNN, Fast R-CNN and RPN with an FPN.

Their files carry the text of the config that they were trained with, which is parsed, never executed. Its conventions
are in `_convert`; their source: mmdet/models, mmcv/ops and configs/_base_/models/faster-rcnn_r50_fpn.py.

Dimensions: K classes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from fpn_det.structures import Categories, InputError
from fpn_det.weights.architecture import detector_architecture
from fpn_det.weights.body_input import FAIR_RESNEXT, MSRA, TORCHVISION, BodyInput
from fpn_det.weights.coco_classes import COCO_CATEGORIES
from fpn_det.weights.read import WeightFile
from fpn_det.weights.rename import Converted, Rule, rename

Style = Literal["auto", "caffe", "pytorch"]

_FAMILY = ("rpn_head.", "neck.lateral_convs.", "neck.fpn_convs.", "roi_head.bbox_head.", "bbox_head.", "mask_head.")
_UNSUPPORTED = (
    (r"roi_head\.mask_.*", "a Mask R-CNN"),
    (r"roi_head\.bbox_head\.0\..*", "a Cascade R-CNN"),
    (r"bbox_head\.(fc_cls|fc_reg|0)\..*", "of MMDetection 1.x, which counts the background as class 0"),
    (r"bbox_head\..*", "a one-stage detector"),
    (r"roi_head\.(shared_head|semantic_head|grid_head|track_head)\..*", "a detector without an FPN or with more heads"),
    (r"neck\.(downsample_convs|pafpn_convs)\..*", "a detector with a PAFPN"),
    (r"backbone\.(stages|patch_embed|stem)\..*", "a detector whose body is not a plain ResNet or ResNeXt"),
    (r"backbone\..*conv2(_offset|\.conv_offset)\..*", "a detector with deformable convolutions"),
)
_IMPORTABLE = "Faster R-CNN, Fast R-CNN and RPN of MMDetection 2.x and 3.x with a ResNet or ResNeXt and an FPN can be"


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of MMDetection, also of its models that cannot be imported."""
    return any(name.startswith(_FAMILY) for name in tensors)


def convert(file: WeightFile, *, style: Style = "auto") -> Converted:
    """Rename, bring the input to RGB, and state the conventions.

    Args:
        file: a `.pth` of the model zoo or of training.
        style: `caffe`: the body takes BGR of standard deviation 1 and has the stride in the 1x1; `pytorch`: RGB and the
            stride in the 3x3; `auto`: what the config in the file says, else the name of a file of the model zoo.

    Raises:
        InputError: another model, tensors of no known layer, a config that ours cannot follow, or a style that cannot
            be told.
    """
    for pattern, what in _UNSUPPORTED:
        if any(re.fullmatch(pattern, name) for name in file.tensors):
            raise InputError(f"{file.path}: this is {what}. {_IMPORTABLE} imported")
    config = _config_of(file)
    # Its norms are evaluated with constant statistics while it trains, unless the config says otherwise.
    constant_norm = _get(config, "model", "backbone", "norm_eval") is not False
    state_dict, rows = rename(file.tensors, _rules(file.tensors, constant_norm), source=file.path)
    anchors = _anchors(config, file)
    num_anchors = len(anchors["sizes"][0]) * len(anchors["ratios"])
    model = detector_architecture(state_dict, source=file.path, num_anchors=num_anchors)
    body_input = _body_input(file, style, config, model["backbone"]["name"])
    body_input.to_rgb("backbone.stem.0.weight", state_dict, rows)
    model |= {**body_input.config(), "delta_clamp": "both"}
    model["backbone"]["stride_in_1x1"] = body_input.stride_in_1x1
    remarks = [body_input.remark()]
    if config is None:
        remarks.append("the file has no config: the settings of detection are those of MMDetection's base config")
    if "rpn" in model:
        # configs/_base_/models/rpn_r50_fpn.py has 2000 per level, that of Faster R-CNN 1000.
        per_level = 2000 if model["kind"] == "rpn" else 1000
        model["rpn"] |= {"pre_nms_top_k_test": per_level, "post_nms_top_k_test": 1000, "min_match_iou": 0.3}
        model["rpn"] |= _rpn_settings(config)
        model["anchors"] = {**anchors, "sizes": [s[0] if len(s) == 1 else s for s in anchors["sizes"]]}
    categories = None
    if "roi_head" in model:
        # floor(log2(s / 56 + 1e-6)) there equals floor(4 + log2(s / 224 + 2.5e-7)) - 2 here.
        model["roi_head"] |= {"sampling_ratio": 0, "aligned": True, "level_eps": 2.5e-7, "background_rows": 1}
        model["roi_head"] |= _roi_head_settings(config, remarks)
        categories = _categories(file, len(state_dict["roi_head.class_logits.bias"]) - 1, remarks)
    return Converted(
        kind="detector",
        state_dict=state_dict,
        config={"model": model, "data": {"resize": "opencv", **_sizes(config)}, "eval": {"batch_size": 1}},
        rows=rows,
        categories=categories,
        remarks=tuple(remarks),
    )


def _rules(tensors: Mapping[str, Tensor], constant_norm: bool) -> list[Rule]:
    counter = None if constant_norm else r"backbone.\1.num_batches_tracked"
    statistics = r"(weight|bias|running_mean|running_var)"
    norm = r"layer[1-4]\.\d+\.(?:bn[123]|downsample\.1)"
    rules = [
        Rule(r"backbone\.conv1\.weight", "backbone.stem.0.weight"),
        Rule(rf"backbone\.bn1\.{statistics}", r"backbone.stem.1.\1"),
        Rule(rf"backbone\.({norm})\.{statistics}", r"backbone.\1.\2"),
        Rule(rf"backbone\.({norm})\.num_batches_tracked", counter, "the statistics are constants" * constant_norm),
        Rule(
            r"backbone\.bn1\.num_batches_tracked",
            None if constant_norm else "backbone.stem.1.num_batches_tracked",
            "the statistics are constants" * constant_norm,
        ),
        Rule(r"backbone\.(layer[1-4]\.\d+\.(?:conv[123]|downsample\.0)\.weight)", r"backbone.\1"),
        Rule(r"rpn_head\.rpn_conv\.(weight|bias)", r"rpn.head.convs.0.\1"),
        Rule(r"rpn_head\.rpn_conv\.(\d+)\.conv\.(weight|bias)", r"rpn.head.convs.\1.\2"),
        Rule(r"rpn_head\.rpn_cls\.(weight|bias)", r"rpn.head.objectness.\1"),
        Rule(r"rpn_head\.rpn_reg\.(weight|bias)", r"rpn.head.deltas.\1"),
        Rule(r"roi_head\.bbox_head\.shared_fcs\.(\d+)\.(weight|bias)", r"roi_head.box_head.fcs.\1.\2"),
        Rule(r"roi_head\.bbox_head\.fc_cls\.(weight|bias)", r"roi_head.class_logits.\1"),
        Rule(r"roi_head\.bbox_head\.fc_reg\.(weight|bias)", r"roi_head.box_deltas.\1"),
        Rule(r"ema_.*", None, "the raw weights: the file's others are their moving average"),
    ]
    for theirs, ours in (
        ("neck.lateral_convs", "neck.lateral"),
        ("neck.fpn_convs", "neck.output"),
        ("roi_head.bbox_head.shared_convs", "roi_head.box_head.convs"),
    ):
        pattern = theirs.replace(".", r"\.")
        if any(re.fullmatch(rf"{pattern}\.0\.(bn|gn)\.weight", name) for name in tensors):
            rules.append(Rule(rf"{pattern}\.(\d+)\.conv\.weight", rf"{ours}.\1.0.weight"))
            rules.append(Rule(rf"{pattern}\.(\d+)\.[bg]n\.(\w+)", rf"{ours}.\1.1.\2"))
        else:
            rules.append(Rule(rf"{pattern}\.(\d+)\.conv\.(weight|bias)", rf"{ours}.\1.\2"))
    return rules


# --- What the file says of itself ---


def _config_of(file: WeightFile) -> dict[str, Any] | None:
    """The assignments of the config text in the file (2.x: meta.config, 3.x: meta.cfg); None without one."""
    meta = file.meta.get("meta")
    text = (meta.get("cfg") or meta.get("config")) if isinstance(meta, dict) else None
    if not isinstance(text, str):
        return None
    try:
        module = ast.parse(text)
        found = {
            target.id: _value(statement.value)
            for statement in module.body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return found if isinstance(found.get("model"), dict) else None


def _value(node: ast.expr) -> Any:
    """The value of a literal or a call dict(key=literal); None for anything else, which is not evaluated."""
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple():
            return [_value(element) for element in node.elts]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Dict():
            return {
                _value(k): _value(v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)
            }
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    return None


def _get(config: Any, *path: str) -> Any:
    """What lies at a path of keys in nested dicts; None without it."""
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _section(config: Any, *path: str) -> dict[str, Any]:
    """The dict at a path of keys; empty without one."""
    found = _get(config, *path)
    return found if isinstance(found, dict) else {}


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    """All dicts in a nested value, outer ones first."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dicts(child)


def _body_input(file: WeightFile, style: Style, config: dict[str, Any] | None, name: str) -> BodyInput:
    """How the body takes an image: as asked for, as the file's config says, or as the model zoo names its files."""
    if style != "auto":
        return MSRA if style == "caffe" else TORCHVISION
    for norm in _dicts(config):
        # 2.x: the transform Normalize, 3.x: the data preprocessor. Images are read as BGR.
        to_rgb = norm.get("to_rgb", norm.get("bgr_to_rgb"))
        if "mean" in norm and "std" in norm and isinstance(to_rgb, bool):
            return BodyInput(
                bgr=not to_rgb,
                mean=_three(norm["mean"], file),
                std=_three(norm["std"], file),
                stride_in_1x1=_get(config, "model", "backbone", "style") == "caffe",
                reason="the config in the file",
            )
    if re.match(r"(?:fast|faster)[-_]rcnn_|rpn_", file.path.name) and re.search(r"-[0-9a-f]{8}\.pth$", file.path.name):
        reason = "the name of the file, one of the model zoo"
        if "caffe" in file.path.name:
            return replace(MSRA, reason=reason)
        return replace(FAIR_RESNEXT if name == "resnext101_32x8d" else TORCHVISION, reason=reason)
    raise InputError(
        f"{file.path}: neither a config in the file nor its name tells how the body takes images; state the --style, "
        "caffe or pytorch"
    )


def _three(values: Any, file: WeightFile) -> tuple[float, float, float]:
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        raise InputError(f"{file.path}: its config normalises images with {values}; state the --style")
    return float(values[0]), float(values[1]), float(values[2])


def _rpn_settings(config: dict[str, Any] | None) -> dict[str, Any]:
    test = _section(config, "model", "test_cfg", "rpn") or _section(config, "test_cfg", "rpn")
    found = {
        "pre_nms_top_k_test": test.get("nms_pre"),
        "post_nms_top_k_test": test.get("max_per_img", test.get("max_num")),  # the latter before 2.9
        "nms_thresh": _get(test, "nms", "iou_threshold") or test.get("nms_thr"),
        "min_size": test.get("min_bbox_size"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _roi_head_settings(config: dict[str, Any] | None, remarks: list[str]) -> dict[str, Any]:
    test = _section(config, "model", "test_cfg", "rcnn") or _section(config, "test_cfg", "rcnn")
    layer = _section(config, "model", "roi_head", "bbox_roi_extractor", "roi_layer")
    stds = _get(config, "model", "roi_head", "bbox_head", "bbox_coder", "target_stds")
    suppression = _get(test, "nms", "type")
    if suppression not in (None, "nms"):
        remarks.append(
            f"its config asks for {suppression}, which is not to be had here: detections go through plain NMS"
        )
    found = {
        "score_thresh": test.get("score_thr"),
        "nms_thresh": _get(test, "nms", "iou_threshold") or _get(test, "nms", "iou_thr"),
        "detections_per_image": test.get("max_per_img"),
        "sampling_ratio": layer.get("sampling_ratio"),
        "aligned": layer.get("aligned"),
        "box_weights": [round(1 / std, 6) for std in stds] if stds else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _anchors(config: dict[str, Any] | None, file: WeightFile) -> dict[str, Any]:
    generator = _section(config, "model", "rpn_head", "anchor_generator")
    if not generator:
        return {"sizes": [[32], [64], [128], [256], [512]], "ratios": [0.5, 1, 2]}
    kind, scales, strides = generator.get("type"), generator.get("scales"), generator.get("strides")
    if kind != "AnchorGenerator" or not scales or strides != [4, 8, 16, 32, 64] or generator.get("center_offset"):
        raise InputError(
            f"{file.path}: its config makes anchors with {generator}; only an AnchorGenerator with scales, strides 4 "
            "to 64 and no offset can be followed"
        )
    sizes = [[scale * stride for scale in scales] for stride in strides]
    return {"sizes": sizes, "ratios": generator.get("ratios") or [0.5, 1, 2]}


def _sizes(config: dict[str, Any] | None) -> dict[str, Any]:
    """Sides of a resized image: `img_scale` of the test pipeline of 2.x, `scale` of its Resize in 3.x."""
    pipeline = _get(config, "test_pipeline") or _get(config, "data", "test", "pipeline")
    for transform in _dicts(pipeline):
        scale = transform.get("img_scale") if transform.get("type") == "MultiScaleFlipAug" else None
        scale = transform.get("scale") if transform.get("type") == "Resize" else scale
        if isinstance(scale, list) and len(scale) == 2 and all(isinstance(side, int) for side in scale):
            return {"short_sides": [min(scale)], "test_short_side": min(scale), "long_side": max(scale)}
    return {}


def _categories(file: WeightFile, num_classes: int, remarks: list[str]) -> Categories | None:
    """The classes that the file names (2.x: meta.CLASSES, 3.x: meta.dataset_meta.classes), or COCO's for 80."""
    meta = file.meta.get("meta")
    dataset = _section(meta, "dataset_meta")
    names = _get(meta, "CLASSES") or dataset.get("classes") or dataset.get("CLASSES")
    if isinstance(names, list | tuple) and len(names) == num_classes and all(isinstance(name, str) for name in names):
        if tuple(names) == COCO_CATEGORIES.names:
            return COCO_CATEGORIES
        remarks.append("the ids of the classes are not in the file: they are 1.. here; --categories states others")
        return Categories(tuple(range(1, num_classes + 1)), tuple(names))
    if num_classes == len(COCO_CATEGORIES):
        remarks.append("80 classes, taken to be COCO's")
        return COCO_CATEGORIES
    remarks.append(f"{num_classes} classes of unknown names; --categories names them")
    return None
