"""Which box belongs to which ground truth, and which of them are trained on in a step.

Everything is batched over images and of fixed shape: no loop over images, no synchronisation with the host.

Dimensions: N images, G ground-truth boxes, B boxes to be matched (anchors or proposals), S samples per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fpn_det.structures import Targets

IOU_CHUNK_ELEMENTS = 1 << 24
"""Ground truth is visited in chunks so that no IoU matrix exceeds this many elements (64 MiB)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matches:
    """Assignment of boxes to ground truth.

    Attributes:
        gt_index: (N, B) int64, the ground truth of highest IoU (the first of equals); 0 where there is none.
        iou: (N, B) float32, that IoU; 0 where there is no ground truth.
        is_best: (N, B) bool, whether the box is the best (ties included) of some ground truth.
    """

    gt_index: Tensor
    iou: Tensor
    is_best: Tensor


@torch.no_grad()
def match(boxes: Tensor, targets: Targets, *, min_best_iou: float = 0.0) -> Matches:
    """Assign each box to the ground truth that it overlaps most (Faster R-CNN, arXiv 1506.01497, section 3.1.2).

    Memory is bounded by `IOU_CHUNK_ELEMENTS`, however many boxes and ground truths there are.

    Args:
        boxes: (B, 4) shared by all images, or (N, B, 4); float32 XYXY.
        targets: ground truth of N images.
        min_best_iou: a ground truth's best boxes count as such only from this IoU on. A ground truth that overlaps
            nothing has no best box (else every box would tie at zero).
    """
    n, g = targets.valid.shape
    gt_boxes = torch.where(targets.valid[:, :, None], targets.boxes, 0)  # without area: overlaps nothing
    boxes = boxes.mT.contiguous().mT.expand(n, -1, -1)  # each coordinate contiguous
    iou = boxes.new_zeros(n, boxes.shape[1])
    gt_index = torch.zeros_like(iou, dtype=torch.int64)
    is_best = torch.zeros_like(iou, dtype=torch.bool)
    chunk = max(1, IOU_CHUNK_ELEMENTS // max(1, iou.numel()))
    for start in range(0, g, chunk):
        chunk_iou = pairwise_iou(gt_boxes[:, start : start + chunk], boxes)
        best_of_gt = chunk_iou.amax(dim=2, keepdim=True)
        counts = (best_of_gt > 0) & (best_of_gt >= min_best_iou)
        is_best |= (chunk_iou == torch.where(counts, best_of_gt, torch.inf)).any(dim=1)
        chunk_best, chunk_index = chunk_iou.max(dim=1)
        gt_index = torch.where(chunk_best > iou, chunk_index.add_(start), gt_index)
        iou = torch.maximum(chunk_best, iou)
    return Matches(gt_index=gt_index, iou=iou, is_best=is_best)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of (N, A, 4) against (N, B, 4) XYXY boxes of each image: (N, A, B) float32; 0 for boxes without area.

    In place and by coordinate: three (N, A, B) buffers at a time.
    """
    a_x1, a_y1, a_x2, a_y2 = a[:, :, None].unbind(-1)
    b_x1, b_y1, b_x2, b_y2 = b[:, None].unbind(-1)
    intersection = torch.minimum(a_x2, b_x2).sub_(torch.maximum(a_x1, b_x1)).clamp_(min=0)
    intersection.mul_(torch.minimum(a_y2, b_y2).sub_(torch.maximum(a_y1, b_y1)).clamp_(min=0))
    union = (a_x2 - a_x1) * (a_y2 - a_y1) + (b_x2 - b_x1) * (b_y2 - b_y1)
    return intersection.div_(union.sub_(intersection)).nan_to_num_(nan=0)  # 0 / 0 of two boxes without area


@torch.no_grad()
def sample(positive: Tensor, negative: Tensor, *, num: int, positive_fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """Choose boxes to train on at random: at most `num * positive_fraction` positives, filled up with negatives.

    Args:
        positive, negative: (N, B) bool, disjoint.
        num: samples per image.
        positive_fraction: upper bound of the share of positives.

    Returns:
        index: (N, S) int64 into B, S = min(num, B), positives first.
        is_positive: (N, S) bool.
        valid: (N, S) bool; False where there were not enough boxes.
    """
    noise = torch.rand(positive.shape, device=positive.device)
    max_positive = min(int(num * positive_fraction), positive.shape[1])
    # Keys in 2..3 for the chosen positives, 0..1 for negatives, below 0 for the rest: one sort takes the samples.
    chosen = torch.zeros_like(positive)
    if max_positive > 0:
        key, index = torch.where(positive, noise, -1.0).topk(max_positive, dim=1)
        chosen.scatter_(1, index, key >= 0)
    key = torch.where(chosen, noise + 2, torch.where(negative, noise, -1.0))
    key, index = key.topk(min(num, key.shape[1]), dim=1)
    return index, key >= 2, key >= 0
