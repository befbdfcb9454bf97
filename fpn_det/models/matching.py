"""Which box belongs to which ground truth, and which of them are trained on in a step.

Everything is batched over images and of fixed shape: no loop over images, no synchronisation with the host.

The choice is random, but a pure function of the image's seed: it does not depend on the other images of the batch, so
many processes and micro-batches train on the samples that one process would.

Dimensions: N images, G ground-truth boxes, B boxes to be matched (anchors or proposals), S samples per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fpn_det import kernels
from fpn_det.structures import Targets

IOU_CHUNK_ELEMENTS = 1 << 24
"""Ground truth is visited in chunks so that no IoU matrix exceeds this many elements (64 MiB)."""


ANCHORS, PROPOSALS, GROUND_TRUTH = 1, 2, 3
"""Salts of `noise`: what the boxes are that a choice is made among."""


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
def sample(
    positive: Tensor, negative: Tensor, noise: Tensor, *, num: int, positive_fraction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose boxes to train on at random: at most `num * positive_fraction` positives, filled up with negatives.

    Args:
        positive, negative: (N, B) bool, disjoint.
        noise: (N, B) float32 in 0..1; of each kind, the boxes of least noise are chosen.
        num: samples per image.
        positive_fraction: upper bound of the share of positives.

    Returns:
        index: (N, S) int64 into B, S = min(num, B), positives first.
        is_positive: (N, S) bool.
        valid: (N, S) bool; False where there were not enough boxes.
    """
    max_positive = min(int(num * positive_fraction), positive.shape[1])
    # Keys below 0 for the chosen positives, 0..1 for negatives, infinity for the rest: one sort takes the samples.
    chosen = torch.zeros_like(positive)
    if max_positive > 0:
        key, index = torch.where(positive, noise, torch.inf).topk(max_positive, dim=1, largest=False)
        chosen.scatter_(1, index, key < torch.inf)
    key = torch.where(chosen, noise - 2, torch.where(negative, noise, torch.inf))
    key, index = key.topk(min(num, key.shape[1]), dim=1, largest=False)
    return index, key < 0, key < torch.inf


@torch.no_grad()
def noise(seeds: Tensor, num: int, *, salt: int) -> Tensor:
    """A random number for each box of each image: a hash of the image's seed, the salt and the box's position.

    Unlike numbers of a generator it does not depend on the other images, on the number of boxes, or on the device.

    Args:
        seeds: (N,) int64.
        num: B, boxes per image.
        salt: one of the constants above.

    Returns:
        (N, B) float32, uniform in 0..1, in steps of 2**-31 near 0, where `sample` looks.
    """
    if kernels.serve(seeds):
        from fpn_det.kernels.noise import noise as fused

        return fused(seeds, num, salt=salt)
    low, high = seeds.to(torch.int32), (seeds >> 32).to(torch.int32)
    key = _mix(_mix(_mix(torch.full_like(low, salt)) ^ low) ^ high)
    position = _mix(torch.arange(num, dtype=torch.int32, device=seeds.device))
    return _mix(key[:, None] ^ position).bitwise_and_(0x7FFFFFFF).float().mul_(2**-31)


def _mix(x: Tensor) -> Tensor:
    """Hash int32 words, in place (`lowbias32` of Wellons' Hash Function Prospector): each bit depends on all others.

    In int32, since neither CPUs nor GPUs multiply vectors of int64 fast. Masks make the right shifts logical.
    """
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x
