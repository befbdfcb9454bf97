"""Anchors: reference boxes of several shapes at every cell of the pyramid (arXiv 1612.03144, section 4.1).

Dimensions: A anchors of a level = height x width x sizes x ratios, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def level_shapes(features: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(h, w) in cells of each level (N, C, h, w)."""
    return [(f.shape[-2], f.shape[-1]) for f in features]


class Anchors(nn.Module):
    """One area or more per level, several aspect ratios; centred on the grid points (column, row) * stride.

    Args:
        sizes: sides of the squares of the same area, in pixels, for each level, fine to coarse.
        ratios: height / width.
        strides: of the levels, in pixels.
        rounded: whether half widths and heights are rounded to whole pixels, as in torchvision.
        inferred_strides: whether the grid's stride is that of torchvision, the side of the padded image divided by
            that of the level and rounded down: 61 instead of 64 on P6 of an image 800 pixels high.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float],
        strides: Sequence[int],
        rounded: bool = False,
        inferred_strides: bool = False,
    ) -> None:
        super().__init__()
        if len(sizes) != len(strides):
            raise ValueError(f"anchor sizes are needed for each level: got {len(sizes)} for {len(strides)} levels")
        self.strides = tuple(strides)
        self.rounded = rounded
        self.inferred_strides = inferred_strides
        size = torch.tensor([tuple(level) for level in sizes], dtype=torch.float64)[:, :, None]
        root = torch.tensor(ratios, dtype=torch.float64).sqrt()
        half = torch.stack([size / root, size * root], dim=-1).flatten(1, 2) / 2  # (levels, sizes * ratios, 2): (w, h)
        if rounded:
            half = half.round()
        self.num_per_location = half.shape[1]
        self.cells: Tensor
        self.register_buffer("cells", torch.cat([-half, half], dim=-1).float(), persistent=False)

    def forward(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Anchors of every level.

        Args:
            shapes: (h, w) of each level in cells.

        Returns:
            One (A, 4) float32 XYXY per level, in pixels of the padded image; they may reach beyond it.
        """
        return [
            self._level(cells, shape, self._strides(shape, stride, shapes[0]))
            for cells, shape, stride in zip(self.cells, shapes, self.strides, strict=True)
        ]

    def _strides(self, shape: tuple[int, int], stride: int, finest: tuple[int, int]) -> tuple[int, int]:
        """(y, x) strides of a level of `shape`."""
        if not self.inferred_strides:
            return stride, stride
        return self.strides[0] * finest[0] // shape[0], self.strides[0] * finest[1] // shape[1]

    def _level(self, cells: Tensor, shape: tuple[int, int], strides: tuple[int, int]) -> Tensor:
        y, x = (
            torch.arange(n, device=cells.device, dtype=torch.float32) * stride
            for n, stride in zip(shape, strides, strict=True)
        )
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centers = torch.stack([grid_x, grid_y, grid_x, grid_y], dim=-1)
        return (centers[:, :, None] + cells).reshape(-1, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorPlace:
    """Where anchors stand; every field is int64 and of the shape of the index it was found from.

    Attributes:
        row, column: in cells of the anchor's level.
        height, width: of the level in cells.
        level_start: cells of all finer levels.
        shape: which of the location's anchors it is.
    """

    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor
    level_start: Tensor
    shape: Tensor


def locate(index: Tensor, shapes: Sequence[tuple[int, int]], *, num_per_location: int) -> AnchorPlace:
    """Find the cells of anchors.

    Args:
        index: (...) int64 into the anchors of all levels.
        shapes: (h, w) of each level in cells.
        num_per_location: anchors per cell.
    """
    cell, shape = index.div(num_per_location, rounding_mode="floor"), index.remainder(num_per_location)
    level_start = torch.zeros_like(cell)
    height, width = torch.full_like(cell, shapes[0][0]), torch.full_like(cell, shapes[0][1])
    start = 0
    for i in range(1, len(shapes)):  # a table to look up in would have to be copied to the device
        start += shapes[i - 1][0] * shapes[i - 1][1]
        later = cell >= start
        level_start.masked_fill_(later, start)
        height.masked_fill_(later, shapes[i][0])
        width.masked_fill_(later, shapes[i][1])
    row = (cell - level_start).div(width, rounding_mode="floor")
    column = cell - level_start - row * width
    return AnchorPlace(row=row, column=column, height=height, width=width, level_start=level_start, shape=shape)
