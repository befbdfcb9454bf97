"""Weights of MMDetection 2.x and 3.x: Faster R-CNN, Fast R-CNN and RPN with an FPN.

Their files carry the text of the config that they were trained with, which is parsed, never executed. Its conventions
are in `_convert`; their source: mmdet/models, mmcv/ops and configs/_base_/models/faster-rcnn_r50_fpn.py.

Dimensions: K classes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
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
    (r"bbox_head\.(?!rpn_).*", "a one-stage detector"),
    (r"roi_head\.(shared_head|semantic_head|grid_head|track_head)\..*", "a detector without an FPN or with more heads"),
    (r"neck\.(downsample_convs|pafpn_convs)\..*", "a detector with a PAFPN"),
    (r"backbone\.(stages|patch_embed|stem)\..*", "a detector whose body is not a plain ResNet or ResNeXt"),
    (r"backbone\..*conv2(_offset|\.conv_offset)\..*", "a detector with deformable convolutions"),
)
_GENERATOR = "model.rpn_head.anchor_generator"
# What a config may say of settings that ours has no key for; one that is absent or None is accepted too.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model.backbone.type": ("ResNet", "ResNeXt"),
    "model.backbone.style": ("pytorch", "caffe"),
    "model.backbone.strides": ([1, 2, 2, 2],),
    "model.backbone.dilations": ([1, 1, 1, 1],),
    "model.backbone.dcn": (),
    "model.backbone.plugins": (),
    "model.neck.type": ("FPN",),
    "model.neck.act_cfg": (),
    "model.neck.upsample_cfg.mode": ("nearest", "bilinear"),
    "model.neck.upsample_cfg.scale_factor": (2,),
    "model.neck.upsample_cfg.align_corners": (False,),
    "model.rpn_head.type": ("RPNHead",),
    f"{_GENERATOR}.type": ("AnchorGenerator",),
    f"{_GENERATOR}.strides": ([4, 8, 16, 32, 64],),
    f"{_GENERATOR}.octave_base_scale": (),
    f"{_GENERATOR}.centers": (),
    f"{_GENERATOR}.center_offset": (0,),
    "model.rpn_head.bbox_coder.target_stds": ([1, 1, 1, 1],),
    "model.test_cfg.rpn.nms.type": ("nms",),
    "model.test_cfg.rpn.nms.class_agnostic": (False,),
    "model.test_cfg.rpn.nms_across_levels": (False,),
    "model.test_cfg.rcnn.nms.class_agnostic": (False,),
    "model.roi_head.bbox_roi_extractor.type": ("SingleRoIExtractor",),
    "model.roi_head.bbox_roi_extractor.featmap_strides": ([4, 8, 16, 32],),
    "model.roi_head.bbox_roi_extractor.roi_layer.type": ("RoIAlign",),
    "model.roi_head.bbox_roi_extractor.roi_layer.pool_mode": ("avg",),
    "model.roi_head.bbox_head.cls_predictor_cfg.type": ("Linear",),
    "model.roi_head.bbox_head.reg_predictor_cfg.type": ("Linear",),
}
for _head in ("model.rpn_head", "model.roi_head.bbox_head"):
    _SUPPORTED[f"{_head}.bbox_coder.type"] = ("DeltaXYWHBBoxCoder",)
    _SUPPORTED[f"{_head}.bbox_coder.target_means"] = ([0, 0, 0, 0],)
    _SUPPORTED[f"{_head}.bbox_coder.clip_border"] = (True,)
    _SUPPORTED[f"{_head}.bbox_coder.add_ctr_clamp"] = (False,)
for _part in ("model.backbone", "model.neck", "model.roi_head.bbox_head"):
    _SUPPORTED[f"{_part}.conv_cfg.type"] = ("Conv", "Conv2d")  # others standardise the weights, under the same names
    _SUPPORTED[f"{_part}.norm_cfg.num_groups"] = (32,)
for _part in ("model.neck", "model.roi_head.bbox_head"):
    _SUPPORTED[f"{_part}.norm_cfg.eps"] = (1e-5,)
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
    settings = _Settings(file.path, _config_of(file))
    for name, values in _SUPPORTED.items():
        settings.take(_one_of(*values), name)
    # Its norms are evaluated with constant statistics while it trains, unless the config says otherwise.
    constant_norm = settings.get("model.backbone.norm_eval") is not False
    anchors = _anchors(settings)
    num_sizes, num_ratios = len(anchors["sizes"][0]), len(anchors["ratios"])
    by_size = None
    if num_sizes > 1 and num_ratios > 1 and settings.take(_FLAG, f"{_GENERATOR}.scale_major") is not False:
        by_size = partial(_by_size, num_sizes=num_sizes, num_ratios=num_ratios)
    state_dict, rows = rename(file.tensors, _rules(file.tensors, constant_norm, by_size), source=file.path)
    model = detector_architecture(state_dict, source=file.path, num_anchors=num_sizes * num_ratios)
    body_input = _body_input(file, style, settings, model["backbone"]["name"])
    body_input.to_rgb("backbone.stem.0.weight", state_dict, rows)
    model |= {**body_input.config(), "delta_clamp": "both"}
    model["backbone"]["stride_in_1x1"] = body_input.stride_in_1x1
    model["backbone"] |= _given(norm_eps=settings.take(_FROM_0, "model.backbone.norm_cfg.eps"))
    model["neck"] |= _given(upsample=settings.get("model.neck.upsample_cfg.mode"))
    remarks = [body_input.remark()]
    if not settings.config:
        remarks.append("the file has no config: the settings of detection are those of MMDetection's base config")
    if "rpn" in model:
        # configs/_base_/models/rpn_r50_fpn.py has 2000 per level, that of Faster R-CNN 1000.
        per_level = 2000 if model["kind"] == "rpn" else 1000
        model["rpn"] |= {"pre_nms_top_k_test": per_level, "post_nms_top_k_test": 1000, "min_match_iou": 0.3}
        model["rpn"] |= _rpn_settings(settings)
        model["anchors"] = {**anchors, "sizes": [s[0] if len(s) == 1 else s for s in anchors["sizes"]]}
    categories = None
    if "roi_head" in model:
        # floor(log2(s / 56 + 1e-6)) there equals floor(4 + log2(s / 224 + 2.5e-7)) - 2 here.
        model["roi_head"] |= {"sampling_ratio": 0, "aligned": True, "level_eps": 2.5e-7, "background_rows": 1}
        model["roi_head"]["min_size"] = -1
        model["roi_head"] |= _roi_head_settings(settings, model["roi_head"]["pool_size"], remarks)
        categories = _categories(file, len(state_dict["roi_head.class_logits.bias"]) - 1, remarks)
    return Converted(
        kind="detector",
        state_dict=state_dict,
        config={"model": model, "data": {"resize": "opencv", **_sizes(settings, remarks)}, "eval": {"batch_size": 1}},
        rows=rows,
        categories=categories,
        remarks=tuple(remarks),
    )


def _by_size(values: Tensor, *, num_sizes: int, num_ratios: int) -> Tensor:
    """Rows in the order (ratio, size, ..) -> (size, ratio, ..); as they are if the anchors do not divide them."""
    if values.ndim == 0 or len(values) % (num_ratios * num_sizes):
        return values  # refused later, where the number of anchors is checked
    return values.unflatten(0, (num_ratios, num_sizes, -1)).transpose(0, 1).flatten(0, 2)


def _rules(
    tensors: Mapping[str, Tensor], constant_norm: bool, by_size: Callable[[Tensor], Tensor] | None
) -> list[Rule]:
    counter = None if constant_norm else r"backbone.\1.num_batches_tracked"
    statistics = r"(weight|bias|running_mean|running_var)"
    norm = r"layer[1-4]\.\d+\.(?:bn[123]|downsample\.1)"
    rpn = r"(?:rpn_head|bbox_head)"  # the latter in an RPN by itself since 3.0, where it counts as a one-stage detector
    order = "rows: anchors by size, then ratio, instead of by ratio, then size" if by_size else ""
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
        Rule(rf"{rpn}\.rpn_conv\.(weight|bias)", r"rpn.head.convs.0.\1"),
        Rule(rf"{rpn}\.rpn_conv\.(\d+)\.conv\.(weight|bias)", r"rpn.head.convs.\1.\2"),
        Rule(rf"{rpn}\.rpn_cls\.(weight|bias)", r"rpn.head.objectness.\1", order, by_size),
        Rule(rf"{rpn}\.rpn_reg\.(weight|bias)", r"rpn.head.deltas.\1", order, by_size),
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


def _config_of(file: WeightFile) -> dict[str, Any]:
    """The assignments of the config text in the file (2.x: meta.config, 3.x: meta.cfg); empty without one."""
    meta = file.meta.get("meta")
    text = (meta.get("cfg") or meta.get("config")) if isinstance(meta, dict) else None
    if not isinstance(text, str):
        return {}
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
        return {}
    if not isinstance(found.get("model"), dict):
        return {}
    found["model"].setdefault("test_cfg", found.get("test_cfg"))  # where the first configs of 2.x had it
    return found


def _value(node: ast.expr) -> Any:
    """The value of a literal or a call dict(key=literal); the text of anything else, which is not evaluated."""
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
    return ast.unparse(node)


def _get(config: Any, *path: str) -> Any:
    """What lies at a path of keys in nested dicts; None without it."""
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config


_Kind = tuple[str, Callable[[Any], bool]]
"""What a setting may be: in words, and as a test."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9  # nor inf


def _one_of(*values: Any) -> _Kind:
    return " or ".join(map(repr, values)) or "None", lambda value: value in values


_FLAG: _Kind = "True or False", lambda value: isinstance(value, bool)
_COUNT: _Kind = "a whole number above 0", lambda value: type(value) is int and value > 0
_COUNT_FROM_0: _Kind = "a whole number from 0", lambda value: type(value) is int and value >= 0
_FROM_0: _Kind = "a number from 0", lambda value: _is_number(value) and value >= 0
_ABOVE_0: _Kind = "a number above 0", lambda value: _is_number(value) and value > 0
_FRACTION: _Kind = "a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1


def _list_of(kind: _Kind, length: int | None = None) -> _Kind:
    """A list of `length` items of a kind; of one or more."""
    words, fits = kind

    def all_fit(value: Any) -> bool:
        return isinstance(value, list) and len(value) == (length or len(value) or 1) and all(map(fits, value))

    return f"a list of {length or 'one or more'}, each {words},", all_fit


@dataclass(frozen=True)
class _Settings:
    """The config in a file. A setting is named by its keys, `model.backbone.type`; one that is absent is None.

    Attributes:
        path: of the file, for the errors.
        config: the assignments; empty without a config.
    """

    path: Path
    config: dict[str, Any]

    def get(self, name: str) -> Any:
        return _get(self.config, *name.split("."))

    def take(self, kind: _Kind, *names: str) -> Any:
        """The first of the settings that is there; `InputError` if it is of another kind."""
        for name in names:
            value = self.get(name)
            if value is not None:
                self.check(kind, name, value)
                return value
        return None

    def check(self, kind: _Kind, name: str, value: Any) -> None:
        supported, fits = kind
        if not fits(value):
            raise InputError(f"{self.path}: its config has {name} {value!r:.80}; only {supported} can be imported")


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    """All dicts in a nested value, outer ones first."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dicts(child)


def _body_input(file: WeightFile, style: Style, settings: _Settings, name: str) -> BodyInput:
    """How the body takes an image: as asked for, as the file's config says, or as the model zoo names its files."""
    if style != "auto":
        return MSRA if style == "caffe" else TORCHVISION
    for norm in _dicts(settings.config):
        # 2.x: the transform Normalize, 3.x: the data preprocessor. Images are read as BGR.
        to_rgb = norm.get("to_rgb", norm.get("bgr_to_rgb"))
        if "mean" in norm and "std" in norm and isinstance(to_rgb, bool):
            return BodyInput(
                bgr=not to_rgb,
                mean=_three(norm["mean"], file),
                std=_three(norm["std"], file),
                stride_in_1x1=settings.get("model.backbone.style") == "caffe",
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
    if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
        raise InputError(f"{file.path}: its config normalises images with {values}; state the --style")
    return float(values[0]), float(values[1]), float(values[2])


def _rpn_settings(settings: _Settings) -> dict[str, Any]:
    test = "model.test_cfg.rpn"
    return _given(
        pre_nms_top_k_test=settings.take(_COUNT, f"{test}.nms_pre"),
        post_nms_top_k_test=settings.take(_COUNT, f"{test}.max_per_img", f"{test}.max_num"),  # the latter before 2.9
        nms_thresh=settings.take(_FRACTION, f"{test}.nms.iou_threshold", f"{test}.nms_thr"),
        min_size=settings.take(_FROM_0, f"{test}.min_bbox_size"),
    )


def _roi_head_settings(settings: _Settings, pool_size: int, remarks: list[str]) -> dict[str, Any]:
    test, extractor = "model.test_cfg.rcnn", "model.roi_head.bbox_roi_extractor"
    layer = f"{extractor}.roi_layer"
    suppression = settings.get(f"{test}.nms.type")
    if suppression not in (None, "nms"):
        remarks.append(
            f"its config asks for {suppression}, which is not to be had here: detections go through plain NMS"
        )
    settings.take(_one_of(pool_size, [pool_size, pool_size]), f"{layer}.output_size", f"{layer}.out_size")
    stds = settings.take(_list_of(_ABOVE_0, 4), "model.roi_head.bbox_head.bbox_coder.target_stds")
    if stds is None and settings.get("model.roi_head.bbox_head.bbox_coder"):
        stds = [1, 1, 1, 1]  # that class's default
    finest_scale = settings.take(_ABOVE_0, f"{extractor}.finest_scale")
    return _given(
        score_thresh=settings.take(_FRACTION, f"{test}.score_thr"),
        nms_thresh=settings.take(_FRACTION, f"{test}.nms.iou_threshold", f"{test}.nms.iou_thr"),
        detections_per_image=settings.take(_COUNT, f"{test}.max_per_img"),
        sampling_ratio=settings.take(_COUNT_FROM_0, f"{layer}.sampling_ratio", f"{layer}.sample_num"),
        aligned=settings.take(_FLAG, f"{layer}.aligned"),
        canonical_size=None if finest_scale is None else 4 * finest_scale,  # that of P2 there, of P4 here
        box_weights=None if stds is None else [round(1 / std, 6) for std in stds],
    )


def _anchors(settings: _Settings) -> dict[str, Any]:
    scales = settings.take(_list_of(_ABOVE_0), f"{_GENERATOR}.scales") or [8]
    base_sizes = settings.take(_list_of(_ABOVE_0, 5), f"{_GENERATOR}.base_sizes") or [4, 8, 16, 32, 64]
    ratios = settings.take(_list_of(_ABOVE_0), f"{_GENERATOR}.ratios") or [0.5, 1, 2]
    return {"sizes": [[scale * base for scale in scales] for base in base_sizes], "ratios": ratios}


def _sizes(settings: _Settings, remarks: list[str]) -> dict[str, Any]:
    """Sides of a resized image: `img_scale` of the test pipeline of 2.x, `scale` of its Resize in 3.x."""
    names = ("test_dataloader.dataset.pipeline", "data.test.pipeline", "test_pipeline")
    name = next((name for name in names if settings.get(name)), names[-1])
    transforms = list(_dicts(settings.get(name)))
    padding = settings.get("model.data_preprocessor")  # of 3.x
    if not isinstance(padding, dict):
        padding = next((transform for transform in transforms if transform.get("type") == "Pad"), {})
    divisor = padding.get("pad_size_divisor", padding.get("size_divisor", 1))
    if transforms and divisor != 32:
        remarks.append(
            f"its config pads images to multiples of {divisor}, not of 32 as here: boxes can differ a little"
        )
    found = None
    for transform in transforms:
        if transform.get("type") == "Resize":  # which keeps the ratio by default in 2.x only
            kept = transform.get("keep_ratio", "scale" not in transform)
            settings.check(_one_of(True), f"{name}: Resize.keep_ratio", kept)
        if transform.get("type") in ("Resize", "MultiScaleFlipAug") and found is None:
            found = transform.get("scale", transform.get("img_scale"))
    if found is None:
        if settings.config:
            remarks.append(f"its config has no size of images in {name}: the sides are those of the base config")
        return {}
    settings.check(_list_of(_COUNT, 2), f"{name}: scale of Resize", found)
    short, long = sorted(found)
    return {"short_sides": [short], "test_short_side": short, "long_side": long}


def _categories(file: WeightFile, num_classes: int, remarks: list[str]) -> Categories | None:
    """The classes that the file names (2.x: meta.CLASSES, 3.x: meta.dataset_meta.classes), or COCO's for 80."""
    meta = file.meta.get("meta")
    names = _get(meta, "CLASSES") or _get(meta, "dataset_meta", "classes") or _get(meta, "dataset_meta", "CLASSES")
    if isinstance(names, list | tuple) and len(names) == num_classes and all(isinstance(name, str) for name in names):
        if tuple(name.replace("_", " ") for name in names) == COCO_CATEGORIES.names:  # "traffic_light" in old files
            return COCO_CATEGORIES
        remarks.append("the ids of the classes are not in the file: they are 1.. here; --categories states others")
        return Categories(tuple(range(1, num_classes + 1)), tuple(names))
    if num_classes == len(COCO_CATEGORIES):
        remarks.append("80 classes, taken to be COCO's")
        return COCO_CATEGORIES
    remarks.append(f"{num_classes} classes of unknown names; --categories names them")
    return None
