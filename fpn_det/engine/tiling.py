"""Detection in tiles of a large image: where the tiles are, and one detection per object out of those of all tiles.

An object at the border of a tile is seen in part there, and wholly, or its other part, in a neighbour. Two detections
of different windows (tiles, or the whole image) show the same object if they coincide in what both windows see: for a
part and the whole, and for the two parts of an object larger than the overlap, that is the same question. Two more
signs tell a part from an object of its own: it lies within the whole, for the tip of a triangle does not fill the box
of what a window shows of it; and that holds of other classes, too, for half a circle looks like something else.

Dimensions: T windows, D detections of all windows, C of them cut off by a window's border. Boxes and windows are XYXY
in pixels of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import nms

from fpn_det.structures import Detections

Window = tuple[int, int, int, int]
"""XYXY in whole pixels of the image."""

BORDER_FRACTION = 0.05
"""So near to the border of its window, as a fraction of its own width or height, a box is taken for cut off."""

BORDER_PX = 4
""".. and so near in any case."""

COVERED = 0.8
"""A box of which more than this share lies in another may be a part of what that shows."""

RIVAL_SCORE = 0.5
"""A part is of another class than its whole only if the whole scores at least this times as well."""

BLOCK_ELEMENTS = 1 << 22
"""Pairs of detections compared at once."""


def windows_of(size: tuple[int, int], *, tile_size: int | None, overlap: float) -> list[Window]:
    """The windows to look at an image through: all of it, and tiles that cover it.

    Args:
        size: (h, w) of the image.
        tile_size: side of a tile in pixels, less where the image is smaller; None for no tiles.
        overlap: of neighbours, as a fraction of `tile_size`, at least; the tiles are spread evenly.

    Returns:
        The whole image first, then the tiles by row, all of one size; the whole alone if it fits into one tile.
    """
    h, w = size
    whole = (0, 0, w, h)
    if tile_size is None or max(size) <= tile_size:
        return [whole]
    rows, columns = (_starts(length, tile_size, overlap) for length in size)
    return [
        whole,
        *((x, y, min(x + tile_size, w), min(y + tile_size, h)) for y in rows for x in columns),
    ]


def _starts(length: int, tile_size: int, overlap: float) -> list[int]:
    """Where tiles begin along a side."""
    if length <= tile_size:
        return [0]
    shared = round(tile_size * overlap)
    steps = math.ceil((length - tile_size) / max(tile_size - shared, 1))
    return [round(i * (length - tile_size) / steps) for i in range(steps + 1)]


def merge_windows(
    detections: Sequence[Detections], windows: Sequence[Window], *, size: tuple[int, int], iou_thresh: float
) -> Detections:
    """Detections in several windows of an image as those of one.

    Boxes that their window shows wholly go through NMS within each class. A box that is cut off by the border of its
    window is dropped if such a one shows its object; boxes of a class that are all cut off become the box around them.

    Args:
        detections: T detections, each in the frame of its window.
        windows: T windows.
        size: (h, w) of the image.
        iou_thresh: of the NMS, and above which two boxes coincide in what both their windows see.

    Returns:
        Detections in the frame of the image, best first. No limit holds for their number: large images have many.
    """
    if len(windows) == 1:
        return detections[0]
    frames = torch.tensor(windows, dtype=torch.float32).repeat_interleave(
        torch.tensor([len(d) for d in detections]), dim=0
    )
    seen = _Seen(
        boxes=torch.cat([d.boxes for d in detections]) + frames[:, :2].repeat(1, 2),
        scores=torch.cat([d.scores for d in detections]),
        labels=torch.cat([d.labels for d in detections]),
        frames=frames,
    )
    cut = _is_cut(seen.boxes, frames, size)
    whole, parts = seen.at(~cut), seen.at(cut)
    whole = whole.at(_nms_per_class(whole.boxes, whole.scores, whole.labels, iou_thresh))
    shown_wholly = _pairs(parts, whole, iou_thresh=iou_thresh, covered=True)[:, 0]
    parts = parts.at(~torch.isin(torch.arange(len(parts.boxes)), shown_wholly))
    joined = _join(parts, iou_thresh=iou_thresh)
    boxes, scores, labels = (
        torch.cat([getattr(whole, name), getattr(joined, name)]) for name in ("boxes", "scores", "labels")
    )
    keep = _nms_per_class(boxes, scores, labels, iou_thresh)
    keep = keep[scores[keep].sort(descending=True, stable=True).indices]
    return Detections(boxes=boxes[keep], scores=scores[keep], labels=labels[keep])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """Detections and the windows that show them.

    Attributes:
        boxes, frames: (D, 4), of the detections and of their windows.
        scores, labels: (D,).
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    frames: Tensor

    def at(self, index: Tensor) -> _Seen:
        """Those of some places, or where a mask holds."""
        return _Seen(
            boxes=self.boxes[index], scores=self.scores[index], labels=self.labels[index], frames=self.frames[index]
        )


def _nms_per_class(boxes: Tensor, scores: Tensor, labels: Tensor, iou_thresh: float) -> Tensor:
    """Places of the boxes that stay, class by class; `batched_nms` would round the coordinates of large images."""
    kept = [torch.zeros(0, dtype=torch.int64)]
    for label in labels.unique().tolist():
        of_class = (labels == label).nonzero().squeeze(1)
        kept.append(of_class[nms(boxes[of_class], scores[of_class], iou_thresh)])
    return torch.cat(kept)


def _is_cut(boxes: Tensor, frames: Tensor, size: tuple[int, int]) -> Tensor:
    """(D,) bool: whether a box reaches a border of its window where the image goes on."""
    h, w = size
    extent = boxes[:, 2:] - boxes[:, :2]
    near = (extent * BORDER_FRACTION).clamp(min=BORDER_PX)
    low = (boxes[:, :2] - frames[:, :2] < near) & (frames[:, :2] > 0)
    high = (frames[:, 2:] - boxes[:, 2:] < near) & (frames[:, 2:] < frames.new_tensor([w, h]))
    return (low | high).any(dim=1)


def _join(parts: _Seen, *, iou_thresh: float) -> Detections:
    """The boxes around the parts of one object each, with the best score of its parts; in no order."""
    pairs = _pairs(parts, parts, iou_thresh=iou_thresh, covered=False)
    group = torch.arange(len(parts.boxes))
    while True:  # the smallest index spreads over all that coincide, directly or through others
        spread = group.scatter_reduce(0, pairs[:, 0], group[pairs[:, 1]], "amin")
        if torch.equal(spread, group):
            break
        group = spread
    groups, member_of = group.unique(return_inverse=True)
    by_corner = member_of[:, None].expand(-1, 2)
    boxes = parts.boxes.new_zeros(len(groups), 4)
    boxes[:, :2].scatter_reduce_(0, by_corner, parts.boxes[:, :2], "amin", include_self=False)
    boxes[:, 2:].scatter_reduce_(0, by_corner, parts.boxes[:, 2:], "amax", include_self=False)
    best = parts.scores.new_zeros(len(groups)).scatter_reduce(0, member_of, parts.scores, "amax", include_self=False)
    return Detections(boxes=boxes, scores=best, labels=parts.labels[groups])


def _pairs(ones: _Seen, others: _Seen, *, iou_thresh: float, covered: bool) -> Tensor:
    """(P, 2) int64: places in `ones` and `others` of detections of the same object.

    Args:
        ones, others: detections.
        iou_thresh: of `_coincide`.
        covered: whether one that lies within another is a part of it, too.
    """
    step = max(1, BLOCK_ELEMENTS // max(1, len(others.boxes)))
    found = [torch.zeros((0, 2), dtype=torch.int64)]
    for start in range(0, len(ones.boxes), step):
        block = ones.at(torch.arange(start, min(start + step, len(ones.boxes))))
        same_class = block.labels[:, None] == others.labels
        same = same_class & _coincide(block, others, iou_thresh)
        if covered:
            shared = _area(_intersection(block.boxes[:, None], others.boxes))
            rivals = others.scores >= RIVAL_SCORE * block.scores[:, None]
            same |= (shared > COVERED * _area(block.boxes)[:, None]) & (same_class | rivals)
        found.append(same.nonzero() + torch.tensor([start, 0]))
    return torch.cat(found)


def _coincide(ones: _Seen, others: _Seen, iou_thresh: float) -> Tensor:
    """(D, E) whether the IoU of two boxes, both clipped to the intersection of their windows, exceeds the threshold."""
    shared = _intersection(ones.frames[:, None], others.frames)
    one, other = _intersection(ones.boxes[:, None], shared), _intersection(others.boxes, shared)
    overlap = _area(_intersection(one, other))
    return overlap > iou_thresh * (_area(one) + _area(other) - overlap)


def _intersection(one: Tensor, other: Tensor) -> Tensor:
    """(..., 4) boxes of what two share, turned inside out where that is nothing."""
    return torch.cat([torch.maximum(one, other)[..., :2], torch.minimum(one, other)[..., 2:]], dim=-1)


def _area(boxes: Tensor) -> Tensor:
    """(...,) area of boxes (..., 4); 0 for those turned inside out."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)
