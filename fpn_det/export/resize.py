"""Resizing and padding inside of the graph: what `fpn_det.data.transforms` does, said with standard operators.

Bilinear interpolation is a matrix product per axis, whose weights follow from the sizes. So it means the same in
every format, rounding included, which no format's own operator does. Dense matrices cost 1 to 2 % of a detector.

Dimensions: N images, H x W before, H' x W' after, both multiples of 32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fpn_det.data.transforms import ResizeKind


class Resize(nn.Module):
    """Resize as `resized_size` and `resize_to` of `fpn_det.data.transforms` do, then pad with zeros.

    The results are the same, to the bit but for `float`, whose sums are rounded otherwise.

    Args:
        short_side: the shorter side after resizing in pixels.
        long_side: upper bound of the longer side in pixels.
        kind: how.
    """

    def __init__(self, *, short_side: int, long_side: int, kind: ResizeKind) -> None:
        super().__init__()
        self.short_side = short_side
        self.long_side = long_side
        self.kind: ResizeKind = kind

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Resize and pad.

        Args:
            images: (N, 3, H, W) uint8.

        Returns:
            resized: (N, 3, H', W') float32 in 0..255.
            size: (2,) int64, (h, w) before padding.
            original_size: (2,) int64, (H, W).
        """
        images = of_unknown_number(images)
        height, width = images.shape[-2:]
        one = torch.ones((), dtype=torch.int64, device=images.device)
        original_size = torch.stack([height * one, width * one])
        size = self.resized_size(original_size)
        # Across first, then down: the order matters where the first result is rounded.
        if self.kind == "opencv":
            return self._opencv(images, size, original_size), size, original_size
        # Products of 22-bit weights (Pillow) need more than float32; those of 16-bit weights (torch) do not.
        pixels = images.to(torch.float64 if self.kind == "pillow" else torch.float32)
        across = self._weights(width, original_size[1], size[1]).to(pixels.dtype)
        down = self._weights(height, original_size[0], size[0]).to(pixels.dtype)
        return self._round(down @ self._round(pixels @ across.mT)).float(), size, original_size

    def resized_size(self, original_size: Tensor) -> Tensor:
        """As `fpn_det.data.transforms.resized_size`: (2,) int64 -> (2,) int64."""
        original = original_size.double()
        # Numbers made tensors: number / tensor multiplies by the reciprocal, and lands on the other side of a half.
        short_side, long_side = original.new_full((), self.short_side), original.new_full((), self.long_side)
        if self.kind == "pillow":  # multiplies twice where the longer side decides
            size = torch.where(original == original.min(), short_side, short_side / original.min() * original)
            size = torch.where(size.max() > long_side, size * (long_side / size.max()), size)
        else:
            size = original * torch.minimum(short_side / original.min(), long_side / original.max())
        return (size if self.kind == "float" else size + 0.5).long().clamp(min=1)

    def _weights(self, length: int, old: Tensor, new: Tensor) -> Tensor:
        """(`new` rounded up to a multiple of 32, `length`) float64 weights of an axis; 0 from row `new` on.

        Args:
            length: pixels of the axis before resizing.
            old: () int64, the same.
            new: () int64, pixels after resizing.
        """
        scale = old.double() / new.double()
        support = torch.ones_like(scale) if self.kind == "float" else scale.clamp(min=1)
        target = padded_range(new)[:, None]
        source = torch.arange(length, device=old.device, dtype=torch.float64)
        weights = (1 - ((target + 0.5) * scale - 0.5 - source).abs() / support).clamp(min=0)
        is_pixel = target < new
        weights = torch.where(is_pixel, weights / weights.sum(1, keepdim=True), 0)
        match self.kind:
            case "antialiased":  # torch: as many bits as let the largest weight fit into 16
                unit = torch.exp2(torch.ceil(torch.log2((2**15 - 0.5) / weights.max())).clamp(max=23) - 1)
                return (weights * unit + 0.5).floor() / unit
            case "pillow":
                return (weights * 2**22 + 0.5).floor() / 2**22
            case _:
                return weights

    def _round(self, pixels: Tensor) -> Tensor:
        return pixels if self.kind == "float" else (pixels + 0.5).floor().clamp(0, 255)

    def _opencv(self, images: Tensor, size: Tensor, original_size: Tensor) -> Tensor:
        """As `fpn_det.data.transforms._resize_like_opencv`, whose integers float64 holds."""
        pixels = images.double()
        (upper, lower), rows = opencv_weights(original_size[0], size[0])
        (left, right), columns = opencv_weights(original_size[1], size[1])
        wide = pixels.index_select(3, left) * columns[0] + pixels.index_select(3, right) * columns[1]
        wide = (wide / 16).floor()
        above = (wide.index_select(2, upper) * rows[0][:, None] / 2**16).floor()
        below = (wide.index_select(2, lower) * rows[1][:, None] / 2**16).floor()
        return ((above + below + 2) / 4).floor().float()


def opencv_weights(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """As `fpn_det.data.transforms._opencv_weights`, the weights in float64 and 0 from `new` on."""
    target = padded_range(new)
    offset = ((target + 0.5) * (old.double() / new.double()) - 0.5).float()
    first = offset.floor()
    fraction = (offset - first).double()
    positions = torch.minimum(torch.stack([first, first + 1]).long().clamp(min=0), old - 1)
    weights = (torch.stack([1 - fraction, fraction]) * 2048).round()
    return positions, torch.where(target < new, weights, 0)


def of_unknown_number(images: Tensor) -> Tensor:
    """The same images; exporters do not know N any more, as they do not know H' and W'.

    torch 2.11 asks for the memory format of every convolution where it knows N, which H' and W' then leave open.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return images
    count: Any = torch.full((), images.shape[0]).item()
    torch._check(count >= 1)
    torch._check(count <= images.shape[0])
    return images.narrow(0, 0, count)


def padded_range(new: Tensor) -> Tensor:
    """0, 1, .. as float64, `new` of them rounded up to a multiple of 32."""
    cells = (new + 31).div(32, rounding_mode="floor")
    count: Any = cells  # TorchScript's tracing records tensors, and takes them for numbers
    if not torch.jit.is_tracing():  # type: ignore[attr-defined]
        count = cells.item()
        torch._check(count >= 1)
    return torch.arange(count * 32, device=new.device, dtype=torch.float64)
