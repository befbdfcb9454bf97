"""Non-maximum suppression of several images, with results of fixed shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms


@torch.no_grad()
def grouped_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, *, iou_thresh: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """Greedy NMS among the boxes of the same group (level or class) of each image.

    Args:
        boxes: (N, B, 4) float32 XYXY.
        scores: (N, B).
        groups: (N, B) int64.
        valid: (N, B) bool, which boxes take part.
        iou_thresh: a box is dropped if it overlaps a better one of its group by more.
        top_k: how many are kept per image, over all groups.

    Returns:
        index: (N, top_k) int64 into B, by descending score; 0 where not kept.
        kept: (N, top_k) bool.
    """
    n = boxes.shape[0]
    index = torch.zeros((n, top_k), dtype=torch.int64, device=boxes.device)
    kept = torch.zeros((n, top_k), dtype=torch.bool, device=boxes.device)
    for i in range(n):  # the number of survivors is known only after each image's NMS
        candidates = valid[i].nonzero().squeeze(1)
        keep = batched_nms(boxes[i, candidates], scores[i, candidates], groups[i, candidates], iou_thresh)[:top_k]
        index[i, : len(keep)] = candidates[keep]
        kept[i, : len(keep)] = True
    return index, kept
