"""What the names and shapes of tensors tell: the name of a ResNet body, the architecture of a detector."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fpn_det.structures import InputError

# name -> bottleneck, blocks of layer1..layer4, width of layer1's 3x3 (its output channels), groups of the 3x3
ARCHITECTURES = {
    "resnet18": (False, (2, 2, 2, 2), 64, 1),
    "resnet34": (False, (3, 4, 6, 3), 64, 1),
    "resnet26": (True, (2, 2, 2, 2), 64, 1),
    "resnet50": (True, (3, 4, 6, 3), 64, 1),
    "resnet101": (True, (3, 4, 23, 3), 64, 1),
    "resnet152": (True, (3, 8, 36, 3), 64, 1),
    "resnext50_32x4d": (True, (3, 4, 6, 3), 128, 32),
    "resnext101_32x4d": (True, (3, 4, 23, 3), 128, 32),
    "resnext101_32x8d": (True, (3, 4, 23, 3), 256, 32),
    "resnext101_64x4d": (True, (3, 4, 23, 3), 256, 64),
    "wide_resnet50_2": (True, (3, 4, 6, 3), 128, 1),
    "wide_resnet101_2": (True, (3, 4, 23, 3), 128, 1),
}


def resnet_architecture(tensors: Mapping[str, Tensor], *, source: Path | str = "the weights") -> str:
    """The name of the body that has these tensors.

    Args:
        tensors: of a body, in torchvision's names (`layer1.0.conv1.weight`), any prefix stripped; only shapes are read.
        source: the file, for the error.

    Raises:
        InputError: none of `ARCHITECTURES` has these blocks and widths, or there is no stem.
    """
    blocks = tuple(_count(tensors, layer) for layer in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in tensors
    if "layer1.0.conv2.weight" not in tensors or not all(blocks):
        raise InputError(
            f"{source}: not the tensors of a ResNet: expected layer1.0.conv1.weight and so on, found "
            f"{', '.join(sorted(tensors)[:4]) or 'none'}. Import a Faster R-CNN with a ResNet or ResNeXt body"
        )
    shape_of(tensors, "conv1.weight", "stem.0.weight", ndim=4, source=source)
    width, per_group = shape_of(tensors, "layer1.0.conv2.weight", ndim=4, source=source)[:2]
    found = (bottleneck, blocks, width, width // per_group)
    for name, shape in ARCHITECTURES.items():
        if found == shape:
            return name
    block = "bottleneck" if bottleneck else "basic"
    raise InputError(
        f"{source}: no body of ours has {block} blocks {list(blocks)} of width {width} in {found[3]} groups; there are "
        f"{', '.join(ARCHITECTURES)}"
    )


def shape_of(tensors: Mapping[str, Tensor], *names: str, ndim: int, source: Path | str) -> tuple[int, ...]:
    """The shape of the first of `names` that is there: `ndim` sizes, none of them 0.

    Raises:
        InputError: none is there, or its shape is another.
    """
    for name in names:
        if name in tensors:
            shape = tuple(tensors[name].shape)
            if len(shape) != ndim or 0 in shape:
                raise InputError(f"{source}: {name} has the shape {shape}; expected a {ndim}-dimensional one without 0")
            return shape
    wanted = " or ".join(names)
    raise InputError(f"{source}: no model of this kind can do without {wanted} (our names). Is it complete?")


def _count(tensors: Mapping[str, Tensor], layer: int) -> int:
    return len({m[1] for name in tensors if (m := re.match(rf"layer{layer}\.(\d+)\.conv1\.weight$", name))})


def detector_architecture(
    state_dict: Mapping[str, Tensor], *, source: Path | str, num_anchors: int = 3, background_rows: int = 1
) -> dict[str, Any]:
    """The keys of the config's section `model` that the names and shapes of a detector with an FPN settle.

    Args:
        state_dict: in our names.
        source: the file, for the errors.
        num_anchors: per cell.
        background_rows: rows of the class logits after those of the classes.

    Raises:
        InputError: a part is missing or misshapen, the body is unknown, it has another number of anchors or no class.
    """
    shape = partial(shape_of, state_dict, source=source)
    body = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    channels = shape("neck.lateral.0.weight", "neck.lateral.0.0.weight", ndim=4)[0]
    parts = {name.split(".")[0] for name in state_dict}
    kind = "rpn" if "roi_head" not in parts else "fast_rcnn" if "rpn" not in parts else "faster_rcnn"
    model: dict[str, Any] = {
        "kind": kind,
        "backbone": {"name": resnet_architecture(body, source=source), "norm": norm_kind(body, "stem.1.")},
        "neck": {"kind": "fpn", "channels": channels, "norm": norm_kind(state_dict, "neck.lateral.0.1.")},
    }
    if kind != "fast_rcnn":
        found = shape("rpn.head.objectness.weight", ndim=4)[0]
        if found != num_anchors:
            raise InputError(
                f"{source}: {found} anchors per cell, expected {num_anchors}; their sizes and ratios are not among the "
                "tensors, so no others can be imported"
            )
        model["rpn"] = {
            "num_convs": _children(state_dict, "rpn.head.convs."),
            "channels": shape("rpn.head.convs.0.weight", ndim=4)[0],
        }
    if kind != "rpn":
        num_convs = _children(state_dict, "roi_head.box_head.convs.")
        box_head: dict[str, Any] = {"kind": "conv_fc", "num_convs": num_convs}
        box_head["num_fcs"] = _children(state_dict, "roi_head.box_head.fcs.")
        if num_convs:
            channels = shape("roi_head.box_head.convs.0.weight", "roi_head.box_head.convs.0.0.weight", ndim=4)[0]
            box_head |= {"conv_channels": channels, "norm": norm_kind(state_dict, "roi_head.box_head.convs.0.1.")}
        box_head["fc_dim"], inputs = shape("roi_head.box_head.fcs.0.weight", ndim=2)
        num_classes = shape("roi_head.class_logits.bias", ndim=1)[0] - background_rows
        num_deltas = shape("roi_head.box_deltas.weight", ndim=2)[0]
        if num_classes < 1:
            raise InputError(f"{source}: its logits are of the background alone; a detector has one class or more")
        if num_deltas not in (4, 4 * num_classes):
            raise InputError(
                f"{source}: {num_deltas} rows of box deltas for {num_classes} classes; expected 4 for all or 4 for each"
            )
        model["roi_head"] = {
            "kind": "standard",
            "background_rows": background_rows,
            "pool_size": math.isqrt(inputs // channels),
            "class_agnostic": num_deltas == 4 and num_classes > 1,
            "box_head": box_head,
        }
    return model


def norm_kind(tensors: Mapping[str, Tensor], prefix: str) -> str | None:
    """The kind of the normalisation whose tensors start with `prefix`; None without any."""
    names = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    if not names:
        return None
    if "running_mean" not in names:
        return "gn"
    return "bn" if "num_batches_tracked" in names else "frozen_bn"  # FrozenBatchNorm2d has no counter


def _children(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
