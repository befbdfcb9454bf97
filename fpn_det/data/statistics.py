"""Boxes of a whole split as training sees them: after resizing, at every length of the shorter side.

Dimensions: I images, B boxes of all images, S lengths of the shorter side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.transforms import ResizeKind, resized_size


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaledBoxes:
    """The boxes of all images at every training scale, not mirrored; each of the S * B once.

    Attributes:
        boxes: (S * B, 4) float32 XYXY, in pixels of the resized image.
        labels: (S * B,) int64.
        image_sizes: (S * B, 2) int64, (h, w) of the resized image that each box lies in.
    """

    boxes: Tensor
    labels: Tensor
    image_sizes: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def side(self) -> Tensor:
        """(S * B,) float32, square root of the area in pixels."""
        return (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1).sqrt()

    @property
    def ratio(self) -> Tensor:
        """(S * B,) float32, height / width."""
        width, height = (self.boxes[:, 2:] - self.boxes[:, :2]).unbind(1)
        return height / width

    def padded_sizes(self, divisor: int = 32) -> Tensor:
        """(S * B, 2) int64: `image_sizes` as a batch of that image alone is padded."""
        return -(-self.image_sizes // divisor) * divisor

    def sample(self, num: int) -> ScaledBoxes:
        """At most `num` boxes, evenly spread over all."""
        if len(self) <= num:
            return self
        index = torch.linspace(0, len(self) - 1, num, dtype=torch.float64).round().long()
        return ScaledBoxes(boxes=self.boxes[index], labels=self.labels[index], image_sizes=self.image_sizes[index])


def training_boxes(
    data: CocoAnnotations, *, short_sides: Sequence[int], long_side: int, resize: ResizeKind = "antialiased"
) -> ScaledBoxes:
    """Scale the boxes of a split to what training draws from.

    Args:
        data: the split.
        short_sides: lengths of the shorter image side, which training draws with equal probability.
        long_side: upper bound of the longer side.
        resize: how sizes are rounded.
    """
    kinds, kind = data.sizes.unique(dim=0, return_inverse=True)
    every = kinds.tolist()
    owner = torch.arange(len(data)).repeat_interleave(data.box_offsets.diff())
    old = data.sizes[owner].flip(1).repeat(1, 2)  # (w, h, w, h)
    boxes, sizes = [], []
    for short_side in short_sides:
        resized = [resized_size((h, w), short_side=short_side, long_side=long_side, resize=resize) for h, w in every]
        new = torch.tensor(resized, dtype=torch.int64).reshape(-1, 2)[kind][owner]
        boxes.append(data.boxes * new.flip(1).repeat(1, 2) / old)
        sizes.append(new)
    return ScaledBoxes(
        boxes=torch.cat(boxes), labels=data.labels.repeat(len(short_sides)), image_sizes=torch.cat(sizes)
    )
