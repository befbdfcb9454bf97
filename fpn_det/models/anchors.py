"""Anchors: reference boxes of several shapes at every cell of the pyramid (arXiv 1612.03144, section 4.1).

Dimensions: A anchors of a level = height x width x sizes x ratios, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
