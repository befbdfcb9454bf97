"""Weights of torchvision: Faster R-CNN with an FPN (both generations, both layouts of names), and ResNet classifiers.

Its conventions that differ from ours are in `_convert_detector`; their source: torchvision/models/detection.

Dimensions: L labels of the file, of which 0 is background; K classes here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fpn_det.structures import Categories, InputError
from fpn_det.weights.architecture import detector_architecture, norm_kind, resnet_architecture, shape_of
from fpn_det.weights.body_input import MSRA, TORCHVISION
from fpn_det.weights.coco_classes import COCO_CATEGORIES
from fpn_det.weights.read import WeightFile
from fpn_det.weights.rename import Converted, Rule, rename

Style = Literal["auto", "caffe", "pytorch"]

COCO_LABELS = 91
SHA256_OF_EPS_0 = "258fb6c6"
"""Start of the hash of fasterrcnn_resnet50_fpn_coco-258fb6c6.pth, whose norms torchvision builds with eps 0."""

_UNSUPPORTED = (
    ("roi_heads.mask_", "a Mask R-CNN"),
    ("roi_heads.keypoint_", "a Keypoint R-CNN"),
    ("head.classification_head.", "a one-stage detector (RetinaNet, FCOS or SSD)"),
    ("backbone.body.0.", "a detector with a MobileNet body"),
    ("features.", "a classifier that is not a ResNet (MobileNet, EfficientNet, VGG ..)"),
)
_FAMILY = ("backbone.body.", "backbone.fpn.inner_blocks.", "head.classification_head.", "features.")
_IMPORTABLE = "Torchvision's Faster R-CNN with a ResNet and an FPN, and its ResNet classifiers, can be imported"
_NO_CONFIG = "the file has no config: the anchors, pooling and thresholds are torchvision's defaults"
_NORM = "(weight|bias|running_mean|running_var|num_batches_tracked)"


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of torchvision, also of its models that cannot be imported."""
    return _is_classifier(tensors) or any(name.startswith(_FAMILY) for name in tensors)


def convert(
    file: WeightFile,
    *,
    style: Style = "auto",
    sha256: str = "",
    norm_eps: float | None = None,
    categories: Categories | None = None,
) -> Converted:
    """Rename, reorder the classes, and state the conventions.

    Args:
        file: a state dict that torchvision saved, or a body in its names.
        style: of a body alone: `caffe` if it takes BGR of standard deviation 1 and has the stride in the 1x1, as those
            of MSRA that MMDetection offers in torchvision's names; `auto` is `pytorch` unless the file's name says so.
        sha256: of the file, in hexadecimal; tells torchvision's own weights with norm_eps 0 from others.
        norm_eps: added to the variance in the norms of the body; None takes 0 for those weights, 1e-5 for all others.
        categories: of the data set that the model was trained on. If their largest id is L - 1, labels are ids, and
            ids that do not exist count as background; else, if there are L - 1, labels are positions + 1.
            None takes COCO's for 91 labels.

    Raises:
        InputError: another model, tensors of no known layer, or another number of classes.
    """
    for prefix, what in _UNSUPPORTED:
        if any(name.startswith(prefix) for name in file.tensors):
            raise InputError(f"{file.path}: this is {what}. {_IMPORTABLE}")
    if _is_classifier(file.tensors):
        return _convert_body(file, style)
    if style != "auto":
        raise InputError(f"{file.path}: --style {style} does not apply to detectors of torchvision; leave it out")
    return _convert_detector(file, sha256=sha256, norm_eps=norm_eps, categories=categories)


def _is_classifier(tensors: Mapping[str, Tensor]) -> bool:
    return {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= tensors.keys()


def _convert_body(file: WeightFile, style: Style) -> Converted:
    if style == "auto" and re.search("caffe|msra", file.path.name, re.IGNORECASE):
        raise InputError(
            f"{file.path}: a body by torchvision's names, of MSRA by the file's; give --style caffe or pytorch"
        )
    rules = [
        Rule(r"(conv1|bn1|layer[1-4])\.(.+)", r"\1.\2"),
        Rule(r"fc\.(weight|bias)", None, "the classifier of images"),
    ]
    state_dict, rows = rename(file.tensors, rules, source=file.path)
    name = resnet_architecture(state_dict, source=file.path)
    body_input = MSRA if style == "caffe" else replace(TORCHVISION, reason="torchvision's names")
    body_input.to_rgb("conv1.weight", state_dict, rows)
    backbone = {"name": name, "norm": "frozen_bn", "stride_in_1x1": body_input.stride_in_1x1}
    return Converted(
        kind="body",
        state_dict=state_dict,
        config={"model": {**body_input.config(), "backbone": backbone}},
        rows=rows,
        remarks=(
            body_input.remark(),
            "the body's norms are constants while training (norm frozen_bn); bn and sync_bn fit too",
        ),
    )


def _convert_detector(
    file: WeightFile, *, sha256: str, norm_eps: float | None, categories: Categories | None
) -> Converted:
    predictor = [f"roi_heads.box_predictor.{layer}" for layer in ("cls_score", "bbox_pred")]
    needed = {"backbone.body.conv1.weight", *(f"{layer}.{part}" for layer in predictor for part in ("weight", "bias"))}
    if not needed <= file.tensors.keys():
        raise InputError(
            f"{file.path}: no Faster R-CNN with a ResNet body: it lacks backbone.body.conv1 or roi_heads.box_predictor "
            f"with cls_score and bbox_pred. {_IMPORTABLE}"
        )
    [num_labels] = shape_of(file.tensors, f"{predictor[0]}.bias", ndim=1, source=file.path)
    for layer, rows_per_label in zip(predictor, (1, 4), strict=True):
        for part, ndim in (("bias", 1), ("weight", 2)):
            found = shape_of(file.tensors, f"{layer}.{part}", ndim=ndim, source=file.path)[0]
            if found != rows_per_label * num_labels:
                raise InputError(
                    f"{file.path}: {layer}.{part} has {found} rows for {num_labels} labels; expected {rows_per_label} "
                    "for each"
                )
    labels, class_remark = _labels(num_labels, categories, file)
    state_dict, rows = rename(file.tensors, _detector_rules(file.tensors, labels, num_labels), source=file.path)
    model = detector_architecture(state_dict, source=file.path, background_rows=num_labels - len(labels))
    if "gn" in (model["backbone"]["norm"], model["neck"]["norm"], model["roi_head"]["box_head"].get("norm")):
        raise InputError(f"{file.path}: group norm, whose number of groups is not in the file, cannot be imported")
    eps, eps_remark = _norm_eps(norm_eps, sha256, model["backbone"]["norm"])
    model["backbone"]["norm_eps"] = eps
    model["anchors"] = {"rounded": True, "inferred_strides": True}
    model["delta_clamp"] = "upper"
    model["rpn"] |= {"smooth_l1_beta": 1 / 9, "post_nms_top_k_train": 2000, "min_size": 1e-3}
    model["roi_head"] |= {
        "sampling_ratio": 2,
        "aligned": False,
        "level_bias": 1e-6,
        "smooth_l1_beta": 1 / 9,
        "min_size": 1e-2,
    }
    return Converted(
        kind="detector",
        state_dict=state_dict,
        # Batches of one: in others, the inferred strides and what borders on an image depend on the images beside it.
        config={"model": model, "data": {"resize": "float"}, "eval": {"batch_size": 1}},
        rows=rows,
        categories=categories or (COCO_CATEGORIES if num_labels == COCO_LABELS else None),
        remarks=(class_remark, eps_remark, _NO_CONFIG),
    )


def _labels(num_labels: int, categories: Categories | None, file: WeightFile) -> tuple[list[int], str]:
    """The file's label of each class, and in words how they were found."""
    if num_labels < 2:
        raise InputError(f"{file.path}: its one label is the background; a detector has one class or more")
    positions = list(range(1, num_labels))
    if categories is None and num_labels != COCO_LABELS:
        return positions, f"{len(positions)} classes of unknown names; --categories names them"
    source = "the given categories" if categories else "COCO's categories"
    categories = categories or COCO_CATEGORIES
    if categories.ids[0] >= 1 and categories.ids[-1] == num_labels - 1:
        unused = num_labels - 1 - len(categories)
        holes = f"; {unused} labels without a category count as background" if unused else ""
        return list(categories.ids), f"{len(categories)} classes: {source}, whose ids are the labels{holes}"
    if len(categories) == num_labels - 1:
        return positions, f"{len(categories)} classes: {source} in the order of their ids"
    raise InputError(
        f"{file.path}: {num_labels - 1} labels besides background, but {len(categories)} categories with ids "
        f"{categories.ids[0]}..{categories.ids[-1]}. Give --categories with the file that the model was trained on"
    )


def _norm_eps(asked: float | None, sha256: str, norm: str | None) -> tuple[float, str]:
    """Of the body's norms, and in words why."""
    if asked is not None:
        return asked, f"norm_eps {asked:g}, as asked for"
    if sha256.startswith(SHA256_OF_EPS_0):
        return 0.0, "norm_eps 0, which torchvision sets for these weights (FasterRCNN_ResNet50_FPN_Weights.COCO_V1)"
    if norm == "bn":
        return 1e-5, "norm_eps 1e-5, as in every batch norm of torchvision that is trained"
    return 1e-5, (
        "norm_eps 1e-5, as in every model but torchvision's COCO_V1; the file does not tell: give --norm-eps 0 if it "
        "was fine-tuned from those weights"
    )


def _detector_rules(tensors: Mapping[str, Tensor], labels: Sequence[int], num_labels: int) -> list[Rule]:
    background = [i for i in range(num_labels) if i not in set(labels)]
    moved, dropped = "background", "background's"
    if len(background) > 1:
        holes = ", ".join(map(str, background[1:]))
        moved, dropped = f"background, labels without a class ({holes})", f"background's and those of labels {holes}"
    predictor = r"roi_heads\.box_predictor"
    rules = [
        Rule(r"backbone\.body\.conv1\.weight", "backbone.stem.0.weight"),
        Rule(rf"backbone\.body\.bn1\.{_NORM}", r"backbone.stem.1.\1"),
        Rule(r"backbone\.body\.(layer[1-4]\..+)", r"backbone.\1"),
        Rule(r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.convs.0.\1"),
        Rule(r"rpn\.head\.conv\.(\d+)\.0\.(weight|bias)", r"rpn.head.convs.\1.\2"),
        Rule(r"rpn\.head\.cls_logits\.(weight|bias)", r"rpn.head.objectness.\1"),
        Rule(r"rpn\.head\.bbox_pred\.(weight|bias)", r"rpn.head.deltas.\1"),
        Rule(r"roi_heads\.box_head\.fc6\.(weight|bias)", r"roi_head.box_head.fcs.0.\1"),
        Rule(r"roi_heads\.box_head\.fc7\.(weight|bias)", r"roi_head.box_head.fcs.1.\1"),
        Rule(
            rf"{predictor}\.cls_score\.(weight|bias)",
            r"roi_head.class_logits.\1",
            f"rows: classes, then {moved}",
            partial(_select, labels=[*labels, *background], rows_per_label=1),
        ),
        Rule(
            rf"{predictor}\.bbox_pred\.(weight|bias)",
            r"roi_head.box_deltas.\1",
            f"rows: classes; {dropped} left out",
            partial(_select, labels=labels, rows_per_label=4),
        ),
    ]
    for i in range(4):
        rules += _conv_rules(tensors, f"backbone.fpn.inner_blocks.{i}", f"neck.lateral.{i}")
        rules += _conv_rules(tensors, f"backbone.fpn.layer_blocks.{i}", f"neck.output.{i}")
    return rules + _box_head_rules(tensors)


def _conv_rules(tensors: Mapping[str, Tensor], theirs: str, ours: str) -> list[Rule]:
    """Of a convolution: by itself, in a block, or in a block with its norm."""
    pattern = theirs.replace(".", r"\.")
    if norm_kind(tensors, f"{theirs}.1.") is None:
        return [Rule(rf"{pattern}(?:\.0)?\.(weight|bias)", rf"{ours}.\1")]
    return [Rule(rf"{pattern}\.0\.weight", f"{ours}.0.weight"), Rule(rf"{pattern}\.1\.{_NORM}", rf"{ours}.1.\1")]


def _box_head_rules(tensors: Mapping[str, Tensor]) -> list[Rule]:
    """Of `FastRCNNConvFCHead`: one sequence of convolution blocks, a flattening, fully connected layers and ReLUs."""
    rules: list[Rule] = []
    num_convs = num_fcs = 0
    for i in range(64):
        if f"roi_heads.box_head.{i}.0.weight" in tensors:
            rules += _conv_rules(tensors, f"roi_heads.box_head.{i}", f"roi_head.box_head.convs.{num_convs}")
            num_convs += 1
        elif f"roi_heads.box_head.{i}.weight" in tensors:
            rules.append(Rule(rf"roi_heads\.box_head\.{i}\.(weight|bias)", rf"roi_head.box_head.fcs.{num_fcs}.\1"))
            num_fcs += 1
    return rules


def _select(values: Tensor, *, labels: Sequence[int], rows_per_label: int) -> Tensor:
    """(L * rows_per_label, ...) -> the rows of `labels`, in that order."""
    return values.unflatten(0, (-1, rows_per_label))[torch.tensor(labels)].flatten(0, 1)
