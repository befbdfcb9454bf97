"""Detection in tiles of a large image: where the tiles are, and one detection per object out of those of all tiles.

An object at the border of a tile is seen in part there, and wholly, or its other part, in a neighbour. Two detections
of different windows (tiles, or the whole image) show the same object if they coincide in what both windows see: for a
part and the whole, and for the two parts of an object larger than the overlap, that is the same question.

Dimensions: T windows, D detections of all windows, C of them cut off by a window's border. Boxes and windows are XYXY
in pixels of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

from fpn_det.structures import Detections

Window = tuple[int, int, int, int]
"""XYXY in whole pixels of the image."""

BORDER_FRACTION = 0.05
"""So near to the border of its window, as a fraction of its own width or height, a box is taken for cut off."""

BORDER_PX = 2
""".. and so near in any case."""

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
    window is dropped if such a one shows its object; boxes that are all cut off become the box around them.

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
    boxes = torch.cat([d.boxes for d in detections]) + frames[:, :2].repeat(1, 2)
    scores, labels = (torch.cat([getattr(d, name) for d in detections]) for name in ("scores", "labels"))
    cut = _is_cut(boxes, frames, size)

    found = []
    for label in labels.unique().tolist():
        whole, parts = ((mask & (labels == label)).nonzero().squeeze(1) for mask in (~cut, cut))
        whole = whole[nms(boxes[whole], scores[whole], iou_thresh)]
        seen_wholly = _coinciding_pairs(boxes, frames, parts, whole, iou_thresh=iou_thresh)[:, 0]
        parts = parts[~torch.isin(torch.arange(len(parts)), seen_wholly)]
        joined, joined_scores = _join(boxes, scores, frames, parts, iou_thresh=iou_thresh)
        all_boxes, all_scores = torch.cat([boxes[whole], joined]), torch.cat([scores[whole], joined_scores])
        keep = nms(all_boxes, all_scores, iou_thresh)
        found.append((all_boxes[keep], all_scores[keep], torch.full_like(keep, label)))
    if not found:
        return Detections(boxes=boxes, scores=scores, labels=labels)
    all_boxes, all_scores, all_labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = all_scores.sort(descending=True, stable=True).indices
    return Detections(boxes=all_boxes[order], scores=all_scores[order], labels=all_labels[order])


def _is_cut(boxes: Tensor, frames: Tensor, size: tuple[int, int]) -> Tensor:
    """(D,) bool: whether a box reaches a border of its window where the image goes on."""
    h, w = size
    extent = boxes[:, 2:] - boxes[:, :2]
    near = (extent * BORDER_FRACTION).clamp(min=BORDER_PX)
    low = (boxes[:, :2] - frames[:, :2] < near) & (frames[:, :2] > 0)
    high = (frames[:, 2:] - boxes[:, 2:] < near) & (frames[:, 2:] < frames.new_tensor([w, h]))
    return (low | high).any(dim=1)


def _join(boxes: Tensor, scores: Tensor, frames: Tensor, parts: Tensor, *, iou_thresh: float) -> tuple[Tensor, Tensor]:
    """The boxes (J, 4) around the parts of one object each, and the best score of its parts (J,)."""
    pairs = _coinciding_pairs(boxes, frames, parts, parts, iou_thresh=iou_thresh)
    group = torch.arange(len(parts))
    while True:  # the smallest index spreads over all that coincide, directly or through others
        spread = group.scatter_reduce(0, pairs[:, 0], group[pairs[:, 1]], "amin")
        if torch.equal(spread, group):
            break
        group = spread
    groups, member_of = group.unique(return_inverse=True)
    by_corner = member_of[:, None].expand(-1, 2)
    low = boxes.new_zeros(len(groups), 2).scatter_reduce(0, by_corner, boxes[parts, :2], "amin", include_self=False)
    high = boxes.new_zeros(len(groups), 2).scatter_reduce(0, by_corner, boxes[parts, 2:], "amax", include_self=False)
    best = scores.new_zeros(len(groups)).scatter_reduce(0, member_of, scores[parts], "amax", include_self=False)
    return torch.cat([low, high], dim=1), best


def _coinciding_pairs(boxes: Tensor, frames: Tensor, rows: Tensor, columns: Tensor, *, iou_thresh: float) -> Tensor:
    """(P, 2) int64: places in `rows` and `columns` of detections that coincide in what both their windows see."""
    step = max(1, BLOCK_ELEMENTS // max(1, len(columns)))
    found = [torch.zeros((0, 2), dtype=torch.int64)]
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        same = _coincide(boxes[block, None], boxes[columns], frames[block, None], frames[columns], iou_thresh)
        found.append(same.nonzero() + torch.tensor([start, 0]))
    return torch.cat(found)


def _coincide(one: Tensor, other: Tensor, one_frame: Tensor, other_frame: Tensor, iou_thresh: float) -> Tensor:
    """Whether the IoU of two boxes, both clipped to the intersection of their windows, exceeds the threshold."""
    shared = _intersection(one_frame, other_frame)
    one, other = _intersection(one, shared), _intersection(other, shared)
    overlap = _area(_intersection(one, other))
    return overlap > iou_thresh * (_area(one) + _area(other) - overlap)


def _intersection(one: Tensor, other: Tensor) -> Tensor:
    """(..., 4) boxes of what two share, turned inside out where that is nothing."""
    return torch.cat([torch.maximum(one, other)[..., :2], torch.minimum(one, other)[..., 2:]], dim=-1)


def _area(boxes: Tensor) -> Tensor:
    """(...,) area of boxes (..., 4); 0 for those turned inside out."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)
