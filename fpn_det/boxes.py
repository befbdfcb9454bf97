"""Box arithmetic: pure functions on float32 XYXY boxes in pixels (IoU is in `models.matching`, NMS in `models.nms`).

Coordinates are kept in float32 under autocast: float16 and bfloat16 cannot tell neighbouring pixels apart
beyond 2048 and 256 respectively.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)
"""Upper bound of the predicted log width and height ratio (Detectron's choice: a 16-pixel anchor grows to 1000)."""

DeltaClamp = Literal["upper", "both"]
"""Whether dw and dh are bounded from above only, or by `-MAX_LOG_SCALE` from below too (MMDetection)."""

Weights = tuple[float, float, float, float]
UNIT_WEIGHTS: Weights = (1.0, 1.0, 1.0, 1.0)


def encode(boxes: Tensor, reference: Tensor, weights: Weights = UNIT_WEIGHTS) -> Tensor:
    """Express `boxes` relative to `reference` (R-CNN, arXiv 1311.2524, appendix C).

    Args:
        boxes: (..., 4) XYXY targets.
        reference: (..., 4) XYXY anchors or RoIs of positive width and height.
        weights: multipliers of (dx, dy, dw, dh).

    Returns:
        (..., 4) float32 deltas (dx, dy, dw, dh). Degenerate boxes give non-finite deltas: mask them.
    """
    boxes, reference = boxes.float(), reference.float()
    size, ref_size = boxes[..., 2:] - boxes[..., :2], reference[..., 2:] - reference[..., :2]
    center, ref_center = boxes[..., :2] + 0.5 * size, reference[..., :2] + 0.5 * ref_size
    deltas = torch.cat([(center - ref_center) / ref_size, torch.log(size / ref_size)], dim=-1)
    return deltas if weights == UNIT_WEIGHTS else deltas * _on_device(weights, deltas)


def decode(
    deltas: Tensor,
    reference: Tensor,
    weights: Weights = UNIT_WEIGHTS,
    *,
    delta_clamp: DeltaClamp = "upper",
) -> Tensor:
    """Inverse of `encode`, with dw and dh clamped at `MAX_LOG_SCALE`.

    Args:
        deltas: (..., 4) (dx, dy, dw, dh).
        reference: (..., 4) XYXY anchors or RoIs, broadcastable to `deltas`.
        weights: as given to `encode`.
        delta_clamp: on which sides dw and dh are clamped.

    Returns:
        (..., 4) float32 XYXY boxes, not clipped.
    """
    deltas, reference = deltas.float(), reference.float()
    if weights != UNIT_WEIGHTS:
        deltas = deltas / _on_device(weights, deltas)
    ref_size = reference[..., 2:] - reference[..., :2]
    center = reference[..., :2] + 0.5 * ref_size + deltas[..., :2] * ref_size
    min_log_scale = -MAX_LOG_SCALE if delta_clamp == "both" else None
    half = 0.5 * ref_size * torch.exp(deltas[..., 2:].clamp(min=min_log_scale, max=MAX_LOG_SCALE))
    return torch.cat([center - half, center + half], dim=-1)


def _on_device(weights: Weights, like: Tensor) -> Tensor:
    """(4,) tensor of the weights, filled on the device: `new_tensor` would copy from the host and wait for it."""
    return torch.cat([like.new_full((1,), weight) for weight in weights])


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes to their images.

    Args:
        boxes: (..., 4) XYXY.
        sizes: (h, w) in the last dimension, leading dimensions broadcastable to those of `boxes`.

    Returns:
        (..., 4) boxes within 0..w and 0..h.
    """
    limit = sizes.flip(-1).to(boxes.dtype)  # (h, w) -> (x, y)
    limit = torch.cat([limit, limit], dim=-1)
    return torch.minimum(boxes.clamp(min=0), limit)


def rescale(boxes: Tensor, from_size: Tensor, to_size: Tensor) -> Tensor:
    """Map boxes between two sizes of the same image.

    Args:
        boxes: (..., 4) XYXY in the frame of `from_size`.
        from_size: (2,) (h, w).
        to_size: (2,) (h, w).

    Returns:
        (..., 4) boxes in the frame of `to_size`.
    """
    ratio = (to_size.to(boxes.dtype) / from_size.to(boxes.dtype)).flip(-1)
    return boxes * torch.cat([ratio, ratio], dim=-1)


def nonempty(boxes: Tensor, min_size: float = 0.0) -> Tensor:
    """Which boxes (..., 4) are wider and higher than `min_size` pixels; (...,) bool, False for NaN."""
    large = boxes[..., 2:] - boxes[..., :2] > min_size
    return large[..., 0] & large[..., 1]
