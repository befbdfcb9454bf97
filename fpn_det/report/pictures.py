"""Pictures of mistakes, small enough for a page: JPEG files of an image with its boxes.

What is right is drawn in blue, what is wrong in vermilion, which colour-blind readers tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fpn_det.draw import Color, draw_boxes, side_by_side

RIGHT: Color = (86, 180, 233)
WRONG: Color = (255, 110, 30)

_SIDE_PX = 560  # of one picture of several, at most
_CROP_PX = 320
_MIN_CROP_PX = 48  # of the image: smaller ones show nothing to recognise


@dataclass(frozen=True, slots=True)
class DrawnBox:
    """A box of a picture.

    Attributes:
        xywh: (x, y, width, height) in pixels of the original image.
        text: what stands at it; may be empty.
        color: of the box.
    """

    xywh: NDArray[np.floating]
    text: str
    color: Color


def compared(image: Tensor, panels: Mapping[str, Sequence[DrawnBox]]) -> bytes:
    """The image once for each title, side by side, with different boxes.

    Args:
        image: (3, H, W) uint8, RGB.
        panels: title -> boxes, the most important last.
    """
    small, factor = _shrunk(image, _SIDE_PX)
    return _jpeg(side_by_side({title: _drawn(small, boxes, factor) for title, boxes in panels.items()}))


def crop(image: Tensor, boxes: Sequence[DrawnBox]) -> bytes:
    """The part of the image around the boxes, with as much again around them.

    Args:
        image: (3, H, W) uint8, RGB.
        boxes: at least one; the most important last.
    """
    height, width = image.shape[1:]
    xywh = np.array([box.xywh for box in boxes], np.float64)
    low, high = xywh[:, :2].min(axis=0), (xywh[:, :2] + xywh[:, 2:]).max(axis=0)
    reach = np.maximum(high - low, _MIN_CROP_PX / 2)  # from the centre: half of it is context
    x1, y1 = np.floor((low + high) / 2 - reach).astype(int).clip(0, [width - 1, height - 1])
    x2, y2 = np.ceil((low + high) / 2 + reach).astype(int).clip([x1 + 1, y1 + 1], [width, height])
    small, factor = _shrunk(image[:, y1:y2, x1:x2], _CROP_PX)
    shift = np.array([x1, y1, 0, 0])
    return _jpeg(_drawn(small, [DrawnBox(box.xywh - shift, box.text, box.color) for box in boxes], factor))


def _drawn(image: Tensor, boxes: Sequence[DrawnBox], factor: float) -> Tensor:
    corners = torch.tensor(np.array([box.xywh for box in boxes], np.float64).reshape(-1, 4)) * factor
    corners[:, 2:] += corners[:, :2]
    return draw_boxes(image, corners, [box.text for box in boxes], colors=[box.color for box in boxes])


def _shrunk(image: Tensor, side_px: int) -> tuple[Tensor, float]:
    """The image with sides of at most `side_px`, and the factor."""
    factor = min(1.0, side_px / max(image.shape[1:]))
    if factor == 1.0:
        return image, factor
    height, width = (max(1, round(side * factor)) for side in image.shape[1:])
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), reducing_gap=2.0)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1), factor


def _jpeg(image: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=80, optimize=True)
    return file.getvalue()
