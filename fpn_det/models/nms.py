"""Greedy non-maximum suppression of several images, with results of fixed shape.

Implementations that keep the same boxes. On the CPU `torchvision.ops.nms` per image and group. Elsewhere each of its
calls would wait for the device, so all images and groups run at once on fixed shapes: a box stays unless a better one
that stays overlaps it, keep = valid & ~any(overlaps & keep), and iterating that reaches the one solution. Where
`fpn_det.kernels` serve, one of them does so in two launches without waiting.

All compare the IoU of the boxes as they are. (`torchvision.ops.batched_nms` shifts the groups apart by adding
multiples of the largest coordinate, and so rounds the coordinates to as little as 1/128 pixel.)

Dimensions: N images, L levels, B boxes of an image, M = problems solved at once (images x levels), C = boxes of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import nms

from fpn_det import kernels

ITERATIONS_BEFORE_CHECK = 16
"""Iterations before the first check for convergence, which waits for the device; then twice as many, and so on.

More than chains of boxes in which each decides about the next are long: 4 to 9 in 2000 proposals of a level of a
photograph. On a blank page, where neighbouring anchors score the same, they are as long as a row has cells.
"""

BLOCK_ELEMENTS = 1 << 24
"""IoUs computed at once (64 MiB, three such buffers)."""

MAX_FIXED_SHAPE_BOXES = 8192
"""Beyond this number of boxes above the score threshold in one image (an untrained network: all of them), the
overlaps (8 MiB per image at the limit) grow too costly, and images are handled one by one."""


@torch.no_grad()
def nms_per_level(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    *,
    level_sizes: Sequence[int],
    iou_thresh: float,
    top_k: int,
    fixed_shape: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """NMS within each level, then the best of all levels.

    Args:
        boxes: (N, B, 4) float32 XYXY, level by level, by descending score within each level.
        scores: (N, B), finite where valid.
        valid: (N, B) bool, which boxes take part.
        level_sizes: how many boxes each level has; their sum is B.
        iou_thresh: a box is dropped if it overlaps a better one of its level by more.
        top_k: how many are kept per image, over all levels.
        fixed_shape: which implementation; None: the faster one on this device.

    Returns:
        index, kept: as of `best`.
    """
    sizes = list(level_sizes)
    if fixed_shape if fixed_shape is not None else prefers_fixed_shape(boxes.device):
        keep = solve(boxes, valid, level_sizes=sizes, iou_thresh=iou_thresh)
    else:
        keep = torch.zeros_like(valid)
        for i in range(len(boxes)):
            levels = zip(*(x[i].split(sizes) for x in (boxes, scores, valid, keep)), strict=True)
            for boxes_of, scores_of, valid_of, keep_of in levels:  # views
                chosen = valid_of.nonzero().squeeze(1)
                keep_of[chosen[nms(boxes_of[chosen], scores_of[chosen], iou_thresh)]] = True
    return best(scores, keep, top_k=top_k)


@torch.no_grad()
def nms_per_class(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    valid: Tensor,
    *,
    iou_thresh: float,
    top_k: int,
    fixed_shape: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """NMS within each class, then the best of all classes. Of equal scores the first comes first.

    Args:
        boxes: (N, B, 4) float32 XYXY, in any order.
        scores: (N, B), finite where valid.
        labels: (N, B) int64.
        valid: (N, B) bool, which boxes take part; few of them as a rule.
        iou_thresh, top_k, fixed_shape: as of `nms_per_level`.

    Returns:
        index, kept: as of `best`, or narrower where no image has as many valid boxes.
    """
    if fixed_shape if fixed_shape is not None else prefers_fixed_shape(boxes.device):
        count = int(valid.sum(1).max()) if valid.numel() else 0  # waits for the device, once for all images
        if count <= MAX_FIXED_SHAPE_BOXES:
            index, chosen = best(scores, valid, top_k=count)
            chosen_boxes = boxes.gather(1, index[:, :, None].expand(-1, -1, 4))
            stays = solve(chosen_boxes, chosen, iou_thresh=iou_thresh, labels=labels.gather(1, index))
            position, kept = best(scores.gather(1, index), stays, top_k=top_k)
            return torch.where(kept, index.gather(1, position), 0), kept
    index = torch.zeros((len(boxes), min(top_k, boxes.shape[1])), dtype=torch.int64, device=boxes.device)
    kept = torch.zeros_like(index, dtype=torch.bool)
    for i in range(len(boxes)):
        chosen = valid[i].nonzero().squeeze(1)
        by_label = labels[i, chosen].sort(stable=True)
        chosen = chosen[by_label.indices]
        counts = [count for count in by_label.values.bincount().tolist() if count > 0]
        keep = torch.zeros_like(chosen, dtype=torch.bool)
        classes = zip(*(x.split(counts) for x in (boxes[i, chosen], scores[i, chosen], keep)), strict=True)
        for boxes_of, scores_of, keep_of in classes:  # views
            keep_of[nms(boxes_of, scores_of, iou_thresh)] = True
        chosen = chosen[keep].sort().values  # so that the first of equals comes first
        position, _ = best(scores[i, chosen][None], torch.ones_like(chosen, dtype=torch.bool)[None], top_k=top_k)
        index[i, : position.shape[1]] = chosen[position[0]]
        kept[i, : position.shape[1]] = True
    return index, kept


def prefers_fixed_shape(device: torch.device) -> bool:
    """Whether waiting for the device costs more there than the overlaps of all pairs."""
    return device.type != "cpu"


def best(scores: Tensor, keep: Tensor, *, top_k: int) -> tuple[Tensor, Tensor]:
    """The best of (N, B) scores where `keep`, the first of equals first.

    Returns:
        index: (N, min(top_k, B)) int64 into B; 0 where there are no more.
        kept: (N, min(top_k, B)) bool, whether there is one; these come first.
    """
    key, index = torch.where(keep, scores, -torch.inf).sort(dim=1, descending=True, stable=True)
    kept = key[:, :top_k] > -torch.inf
    return torch.where(kept, index[:, :top_k], 0), kept


def solve(
    boxes: Tensor,
    valid: Tensor,
    *,
    iou_thresh: float,
    level_sizes: Sequence[int] | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Greedy NMS of all images and levels at once: which boxes stay, (N, B) bool.

    Two launches without waiting for the device where `fpn_det.kernels` serve, else as of `iterate`.

    Args:
        boxes: (N, B, 4) float32 XYXY by descending score, within each level if there are several.
        valid: (N, B) bool.
        iou_thresh: see `nms_per_level`.
        level_sizes: how many boxes each level has; boxes of different levels do not compete. None: one level.
        labels: (N, B) int64; boxes of different labels do not compete. None: all do.
    """
    sizes = [boxes.shape[1]] if level_sizes is None else list(level_sizes)
    if kernels.serve(boxes):
        from fpn_det.kernels import nms as kernel  # imports Triton, which not every machine has

        thresh = largest_float32_up_to(iou_thresh)
        return kernel.solve(boxes, valid, level_sizes=sizes, iou_thresh=thresh, labels=labels)
    level_labels = None if labels is None else per_level(labels, sizes)
    stays = iterate(per_level(boxes, sizes), per_level(valid, sizes), iou_thresh=iou_thresh, labels=level_labels)
    stays = stays.unflatten(0, (len(boxes), len(sizes)))
    return torch.cat([stays[:, i, :size] for i, size in enumerate(sizes)], dim=1)


def per_level(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """(N, B, ...), level by level -> (N * L, C, ...), each level padded with zeros to the size of the largest."""
    most = max(sizes)
    padding = (0, 0) * (x.ndim - 2)
    levels = [pad(part, (*padding, 0, most - part.shape[1])) for part in x.split(list(sizes), dim=1)]
    return torch.stack(levels, dim=1).flatten(0, 1)


def iterate(boxes: Tensor, valid: Tensor, *, iou_thresh: float, labels: Tensor | None = None) -> Tensor:
    """Greedy NMS of M problems at once in plain PyTorch: which boxes stay, (M, C) bool.

    A box's fate is right after as many iterations as the chain of boxes that decide about it is long; none changes any
    more once all are. Waits for the device as often as `ITERATIONS_BEFORE_CHECK` must be doubled for that, as a rule
    once: 16 images of 5 levels of 2000 boxes take some 750 kernels, 8 per iteration, and 200 to 270 MiB.

    Args:
        boxes: (M, C, 4) float32 XYXY by descending score.
        valid: (M, C) bool.
        iou_thresh: see `nms_per_level`.
        labels: (M, C) int64; boxes of different labels do not compete. None: all do.
    """
    missing = -boxes.shape[1] % 64 if boxes.shape[1] else 64
    boxes, valid = pad(boxes, (0, 0, 0, missing)), pad(valid, (0, missing))
    labels = None if labels is None else pad(labels, (0, missing))
    overlaps = better_overlaps(boxes, labels, iou_thresh=iou_thresh)
    keep = valid
    iterations = ITERATIONS_BEFORE_CHECK
    while True:
        for _ in range(iterations):
            previous = keep
            keep = valid & ~(overlaps & pack(keep)[:, None]).any(dim=2)
        if not (keep != previous).any():
            return keep[:, : keep.shape[1] - missing]
        iterations *= 2


def better_overlaps(boxes: Tensor, labels: Tensor | None, *, iou_thresh: float) -> Tensor:
    """Which boxes are better than each and overlap it: (M, C, C / 64) int64, packed as by `pack`.

    In blocks of rows, each against the boxes up to its last row only: 18 kernels per block, 20 with labels.
    """
    m, c = boxes.shape[:2]
    thresh = largest_float32_up_to(iou_thresh)
    x1, y1, x2, y2 = boxes.mT.contiguous().unbind(1)
    area = (x2 - x1) * (y2 - y1)
    packed = torch.zeros((m, c, c // 64), dtype=torch.int64, device=boxes.device)
    step = max(64, BLOCK_ELEMENTS // max(1, m * c) // 64 * 64)
    for start in range(0, c, step):
        end = min(start + step, c)
        row, column = (slice(None), slice(start, end), None), (slice(None), None, slice(0, end))
        # In float32 and in this order as in torchvision's kernels. A negative height makes for a negative IoU: fine.
        overlap = torch.minimum(x2[row], x2[column]).sub_(torch.maximum(x1[row], x1[column])).clamp_(min=0)
        overlap.mul_(torch.minimum(y2[row], y2[column]).sub_(torch.maximum(y1[row], y1[column])))
        suppresses = overlap.div_((area[row] + area[column]).sub_(overlap)) > thresh
        suppresses[:, :, start:].tril_(-1)
        if labels is not None:
            suppresses.logical_and_(labels[row] == labels[column])
        packed[:, start:end, : end // 64] = pack(suppresses)
    return packed


def pack(mask: Tensor) -> Tensor:
    """(..., C) bool, C a multiple of 64 -> (..., C / 64) int64 of 64 bits each."""
    # A product gathers the bits of eight bytes in the highest one: bit 8 i moves to bit 8 i + (56 - 7 i) = 56 + i,
    # and no two others meet, so that nothing is carried.
    eight = (mask.contiguous().view(torch.int64) * 0x0102040810204080) >> 56 & 0xFF
    return eight.to(torch.uint8).view(torch.int64)


def largest_float32_up_to(x: float) -> float:
    """A float32 exceeds this if and only if it exceeds `x` in float64, as torchvision compares on the CPU."""
    rounded = np.float32(x)
    return float(rounded if float(rounded) <= x else np.nextafter(rounded, np.float32(-np.inf)))
