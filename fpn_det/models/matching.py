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
    boxes = boxes.expand(n, -1, -1)
    iou = boxes.new_zeros(n, boxes.shape[1])
    gt_index = torch.zeros_like(iou, dtype=torch.int64)
    is_best = torch.zeros_like(iou, dtype=torch.bool)
    chunk = max(1, IOU_CHUNK_ELEMENTS // max(1, iou.numel()))
    for start in range(0, g, chunk):
        gt_boxes, gt_valid = targets.boxes[:, start : start + chunk], targets.valid[:, start : start + chunk]
        chunk_iou = pairwise_iou(gt_boxes, boxes) * gt_valid[:, :, None]
        best_of_gt = chunk_iou.amax(dim=2, keepdim=True)
        counts = (best_of_gt > 0) & (best_of_gt >= min_best_iou)
        is_best |= ((chunk_iou == best_of_gt) & counts).any(dim=1)
        chunk_best, chunk_index = chunk_iou.max(dim=1)
        better = chunk_best > iou
        iou = torch.where(better, chunk_best, iou)
        gt_index = torch.where(better, chunk_index + start, gt_index)
    return Matches(gt_index=gt_index, iou=iou, is_best=is_best)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of (N, A, 4) against (N, B, 4) XYXY boxes of each image: (N, A, B) float32; 0 for boxes without area."""
    overlap_min = torch.maximum(a[:, :, None, :2], b[:, None, :, :2])
    overlap_max = torch.minimum(a[:, :, None, 2:], b[:, None, :, 2:])
    intersection = (overlap_max - overlap_min).clamp_(min=0).prod(dim=-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(dim=-1) for x in (a, b))
    union = area_a[:, :, None] + area_b[:, None, :] - intersection
    return torch.where(union > 0, intersection / union, 0)


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
