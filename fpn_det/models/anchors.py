"""Anchors: reference boxes of several shapes at every cell of the pyramid (arXiv 1612.03144, section 4.1).

Dimensions: A anchors of a level = height x width x ratios, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Anchors(nn.Module):
    """One area per level, several aspect ratios; centred on the grid points (column, row) * stride.

    Args:
        sizes: side of the square of the same area, in pixels, one per level, fine to coarse.
        ratios: height / width.
        strides: of the levels, in pixels.
        rounded: whether half widths and heights are rounded to whole pixels, as in torchvision.
    """

    def __init__(
        self, *, sizes: Sequence[float], ratios: Sequence[float], strides: Sequence[int], rounded: bool = False
    ) -> None:
        super().__init__()
        if len(sizes) != len(strides):
            raise ValueError(f"one anchor size per level: got {len(sizes)} sizes for {len(strides)} levels")
        self.strides = tuple(strides)
        self.num_ratios = len(ratios)
        size = torch.tensor(sizes, dtype=torch.float64)[:, None]
        root = torch.tensor(ratios, dtype=torch.float64).sqrt()
        half = torch.stack([size / root, size * root], dim=-1) / 2  # (levels, ratios, 2) as (w, h)
        if rounded:
            half = half.round()
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
            self._level(cells, shape, stride)
            for cells, shape, stride in zip(self.cells, shapes, self.strides, strict=True)
        ]

    def _level(self, cells: Tensor, shape: tuple[int, int], stride: int) -> Tensor:
        y, x = (torch.arange(n, device=cells.device, dtype=torch.float32) * stride for n in shape)
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centers = torch.stack([grid_x, grid_y, grid_x, grid_y], dim=-1)
        return (centers[:, :, None] + cells).reshape(-1, 4)
