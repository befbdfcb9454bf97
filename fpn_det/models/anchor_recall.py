"""How well anchors can cover ground-truth boxes, and which sizes would cover them better.

The first stage learns from anchors that overlap a box by `positive_iou` or more, and a box that no anchor overlaps so
much is hard to propose (Faster R-CNN, arXiv 1506.01497, section 3.1.2). What is measured here is the best that any
training could reach.

Of the anchors of one shape, the one at the grid point nearest to a box' centre overlaps it most, as overlap shrinks
with the distance of the centres along each axis. So a box is compared with one anchor per shape and level, 15 instead
of 260,000, and the result is exact.

Dimensions: B boxes, A anchors per location, M candidates for the size of a level, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fpn_det.models.anchors import Anchors
from fpn_det.models.matching import pairwise_iou

STRIDE_MULTIPLES = (2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16)
"""What a suggested size may be of its level's stride. 8 is FPN's (32 pixels on stride 4): smaller anchors leave gaps
between them, larger ones see no more than a part of their box in the cells around them."""

CHUNK = 1 << 18
"""Boxes that are compared at a time: what is in between stays in the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BestAnchors:
    """The best anchor of each box.

    Attributes:
        iou: (B,) float32, its IoU; 0 where no anchor overlaps the box.
        level: (B,) int64, its level, the finest of equals.
    """

    iou: Tensor
    level: Tensor


@torch.no_grad()
def best_anchors(anchors: Anchors, boxes: Tensor, sizes: Tensor) -> BestAnchors:
    """Find the best of all anchors for each box.

    Args:
        anchors: of all levels.
        boxes: (B, 4) float32 XYXY, in pixels of the resized image.
        sizes: (B, 2) int64, (h, w) of the padded image that each box lies in.
    """
    ious = torch.zeros(len(boxes))
    levels = torch.zeros(len(boxes), dtype=torch.int64)
    for start in range(0, len(boxes), CHUNK):
        part = slice(start, start + CHUNK)
        iou = _iou_by_shape(anchors, boxes[part], sizes[part]).amax(1)  # (L, chunk)
        ious[part], levels[part] = iou.max(0)
    return BestAnchors(iou=ious, level=levels)


@torch.no_grad()
def suggest_sizes(
    anchors: Anchors,
    boxes: Tensor,
    sizes: Tensor,
    *,
    present: Sequence[Sequence[float]],
    ratios: Sequence[float],
    positive_iou: float,
) -> list[tuple[float, ...]]:
    """Find anchor sizes that cover the boxes better, whole or half multiples of the strides (`STRIDE_MULTIPLES`).

    What is maximised is the mean over the boxes of what their best anchor is worth: its IoU up to `positive_iou`, as a
    fraction of that, and as much again from there on. The first keeps small boxes covered, the second alone would give
    them up for others. Each size in turn is set to the best candidate while the others stay, until none moves; sizes
    ascend from level to level throughout. This starts from the present sizes and from 2, 3, 4, 6 and 8 strides on every
    level, and the best outcome counts. Sizes that make no difference stay near the present.

    Args:
        anchors: whose strides and rounding to keep.
        boxes: (B, 4) float32 XYXY, in pixels of the resized image; some 10,000 are enough.
        sizes: (B, 2) int64, (h, w) of the padded image that each box lies in.
        present: the present sizes of each level; as many are suggested.
        ratios: height / width of the anchors.
        positive_iou: of the RPN.

    Returns:
        The sizes of each level.
    """
    # One level alone takes the sizes of all scales, as Faster R-CNN before FPN did: 128 to 512 pixels on stride 16.
    multiples = [*STRIDE_MULTIPLES, *((20, 24, 32, 48, 64, 96, 128) if len(anchors.strides) == 1 else ())]
    candidates = [
        [*(stride * multiple for multiple in multiples), *level]
        for stride, level in zip(anchors.strides, present, strict=True)
    ]
    every = Anchors(
        sizes=candidates,
        ratios=ratios,
        strides=anchors.strides,
        rounded=anchors.rounded,
        inferred_strides=anchors.inferred_strides,
    )
    iou = _iou_by_shape(every, boxes, sizes).unflatten(1, (-1, len(ratios))).amax(2)  # (L, M, B)
    worth = ((iou / positive_iou).clamp_(max=1) + (iou >= positive_iou)) / 2
    num = len(present[0])
    levels = [level for level in range(len(present)) for _ in range(num)]
    firsts = [multiples.index(start) for start in (2, 3, 4, 6, 8)]
    outcomes = [(0.0, [len(multiples) + i for _ in present for i in range(num)])]
    for first in (len(multiples), *firsts):  # the present sizes come after the multiples
        start = [first + i for _ in present for i in range(num)]
        sizes_of_start = [candidates[level][m] for level, m in zip(levels, start, strict=True)]
        if all(low < high for low, high in pairwise(sizes_of_start)):
            outcomes.append(_ascend(worth, levels, candidates, start, [size for level in present for size in level]))
    _, best = max(outcomes, key=lambda outcome: outcome[0])
    chosen = [candidates[level][m] for level, m in zip(levels, best, strict=True)]
    return [tuple(chosen[i : i + num]) for i in range(0, len(chosen), num)]


def _ascend(
    worth: Tensor,
    levels: Sequence[int],
    candidates: Sequence[Sequence[float]],
    start: Sequence[int],
    present: Sequence[float],
) -> tuple[float, list[int]]:
    """Move one choice after the other to the best candidate, until none moves.

    Args:
        worth: (L, M, B) of the nearest anchor of each candidate.
        levels: of each choice, ascending.
        candidates: (L, M) sizes in pixels.
        start: the candidate that each choice starts from; their sizes ascend.
        present: the size of each choice to stay near to.

    Returns:
        The mean over the boxes, and the candidate of each choice.
    """
    choice, score, moved = list(start), -1.0, True
    while moved:
        moved = False
        for i, level in enumerate(levels):
            others = [worth[levels[j], choice[j]] for j in range(len(levels)) if j != i]
            rest = torch.stack(others).amax(0) if others else torch.zeros(worth.shape[2])
            low = candidates[levels[i - 1]][choice[i - 1]] if i > 0 else 0
            high = candidates[levels[i + 1]][choice[i + 1]] if i + 1 < len(levels) else math.inf
            allowed = [m for m, size in enumerate(candidates[level]) if low < size < high]
            means = {m: torch.maximum(worth[level, m], rest).double().mean().item() for m in allowed}
            near = {m: -abs(math.log(candidates[level][m] / present[i])) for m in allowed}
            best = max(allowed, key=lambda m: (means[m], near[m]))
            moved |= means[best] > score + 1e-9
            choice[i], score = best, means[best]
    return score, choice


def _iou_by_shape(anchors: Anchors, boxes: Tensor, sizes: Tensor) -> Tensor:
    """(L, A, B) float32: IoU of each box with the nearest anchor of each shape."""
    corners = boxes.T.contiguous()
    center = (corners[:2] + corners[2:]) / 2  # (2, B): (x, y)
    shapes = [-(-sizes.T.flip(0) // stride) for stride in anchors.strides]  # (2, B) in cells: (w, h)
    ious = []
    for cells, shape, stride in zip(anchors.cells, shapes, anchors.strides, strict=True):
        step = anchors.strides[0] * shapes[0] // shape if anchors.inferred_strides else stride
        place = torch.minimum((center / step).round_().clamp_(min=0), shape - 1) * step
        for cell in cells:
            nearest = place.repeat(2, 1) + cell[:, None]
            ious.append(pairwise_iou(nearest.T[:, None], boxes[:, None]).flatten())
    return torch.stack(ious).unflatten(0, anchors.cells.shape[:2])
