"""Losses of predicted boxes: (smooth) L1 on the deltas, or IoU-type losses on the decoded boxes.

Dimensions: leading dimensions `...` of anchors or RoIs, images included.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from fpn_det import boxes as box_ops

BoxLoss = Literal["smooth_l1", "giou", "diou", "ciou"]
"""Smooth L1 (arXiv 1504.08083), GIoU (arXiv 1902.09630), DIoU and CIoU (arXiv 1911.08287)."""

EPS = 1e-7
"""Added to denominators."""


def box_loss(
    deltas: Tensor,
    reference: Tensor,
    gt_boxes: Tensor,
    is_positive: Tensor,
    *,
    kind: BoxLoss = "smooth_l1",
    beta: float = 0.0,
    weights: box_ops.Weights = (1.0, 1.0, 1.0, 1.0),
    delta_clamp: box_ops.DeltaClamp = "upper",
) -> Tensor:
    """The loss summed over the positives.

    Args:
        deltas: (..., 4) float32, predicted.
        reference: (..., 4) float32 XYXY, the anchors or RoIs that they refer to.
        gt_boxes: (..., 4) float32 XYXY; where not positive they are not used.
        is_positive: (...) bool.
        kind: which loss.
        beta: where smooth L1 turns from quadratic to linear; 0 is L1.
        weights: multipliers of the encoded deltas.
        delta_clamp: on which sides dw and dh are clamped where boxes are decoded.

    Returns:
        Scalar float32; 0, with zero gradient, without positives.
    """
    mask = is_positive[..., None]
    if kind == "smooth_l1":
        # The targets of the others may be infinite: replaced, since infinity * 0 is NaN.
        target = torch.where(mask, box_ops.encode(gt_boxes, reference, weights), 0)
        return (smooth_l1_loss(deltas, target, beta=beta, reduction="none") * mask).sum()
    # Padding has no width, at which these losses have no gradient: any box of some size takes its place.
    anywhere = torch.arange(4, device=reference.device, dtype=reference.dtype)  # (0, 1, 2, 3)
    reference, gt_boxes = torch.where(mask, reference, anywhere), torch.where(mask, gt_boxes, anywhere)
    pred = box_ops.decode(torch.where(mask, deltas, 0), reference, weights, delta_clamp=delta_clamp)
    return (iou_loss(pred, gt_boxes, kind=kind) * is_positive).sum()


def iou_loss(pred: Tensor, gt_boxes: Tensor, *, kind: Literal["giou", "diou", "ciou"]) -> Tensor:
    """1 - IoU and a penalty: (..., 4) XYXY boxes -> (...).

    As `torchvision.ops.generalized_box_iou_loss`, `distance_box_iou_loss` and `complete_box_iou_loss`, which index by
    masks, for which the host waits on CUDA.
    """
    x1, y1, x2, y2 = pred.unbind(-1)
    gt_x1, gt_y1, gt_x2, gt_y2 = gt_boxes.unbind(-1)
    width, height, gt_width, gt_height = x2 - x1, y2 - y1, gt_x2 - gt_x1, gt_y2 - gt_y1
    intersection = (torch.minimum(x2, gt_x2) - torch.maximum(x1, gt_x1)).relu()
    intersection = intersection * (torch.minimum(y2, gt_y2) - torch.maximum(y1, gt_y1)).relu()
    union = width * height + gt_width * gt_height - intersection
    iou = intersection / (union + EPS)
    hull_width = torch.maximum(x2, gt_x2) - torch.minimum(x1, gt_x1)
    hull_height = torch.maximum(y2, gt_y2) - torch.minimum(y1, gt_y1)
    if kind == "giou":
        hull = hull_width * hull_height
        return 1 - (iou - (hull - union) / (hull + EPS))
    distance = ((x2 + x1) / 2 - (gt_x1 + gt_x2) / 2) ** 2 + ((y2 + y1) / 2 - (gt_y1 + gt_y2) / 2) ** 2
    loss = 1 - iou + distance / (hull_width**2 + hull_height**2 + EPS)
    if kind == "diou":
        return loss
    v = 4 / math.pi**2 * (torch.atan(gt_width / gt_height) - torch.atan(width / height)) ** 2
    with torch.no_grad():
        alpha = v / (1 - iou + v + EPS)
    return loss + alpha * v
