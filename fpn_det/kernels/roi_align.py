"""RoIAlign over a pyramid in one launch, forward and backward; `fpn_det.models.roi_pool` has the convention.

The mean over the sampling points of a bin is a sum over cells, whose weights are a product of one per row and one per
column. So the bins of a RoI are a matrix product, (bins, cells) x (cells, channels), and its gradient is the transposed
one. A program takes a RoI and a block of channels, walks over the rectangle that the RoI touches in tiles of cells, and
reads each cell once, whatever the number of sampling points, or adds to it once: atomic additions are what the backward
pass waits for, and a RoI on its level shares each cell between 1.5 (large ones) and 10 bins (small ones).

Cells are read where they lie, channels last, in their own type. Products of bfloat16 and float16 run on tensor cores
with float32 sums; a weight is then the sum of two such numbers (16 bits or more), since bins of constant features
would otherwise not have that constant. Float32 is multiplied as three products of TF32, which is float32 but for the
last bits.

The levels are separate pointers: one tensor of all cells would cost a copy of the features, for 16 images of 800 x 1344
with 256 channels of bfloat16 0.73 GB to read and to write. Nothing of them is kept for the backward pass, which sums in
one float32 buffer of all levels (1.46 GB) that is then rounded to the gradients.

Dimensions: N images, S RoIs per image, R = N * S, C channels, B bins per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 8
"""Height and width of the tiles of cells."""

BINS = 64
"""Bins of a program, at least 16: whole rows of bins, 7 x 7 padded to 8 x 8."""

BLOCK_BYTES = 128
"""Channels of a program, at most: a cache line of each cell. With more, GPUs before Hopper run out of registers."""

NUM_WARPS = 4


def roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    level: Tensor,
    *,
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pool the features of each box from its level.

    A NaN or an infinity in the features spreads to all bins of a RoI that touches it or a cell next to it.

    Args:
        features: (N, C, h_i, w_i) of one type per level: float32, bfloat16 or float16; copied unless channels-last.
        boxes: (N, S, 4) float32 XYXY in pixels of the padded image, finite; without gradient.
        level: (N, S) int64, position in `features` of each box's level.
        strides: of the levels, in pixels.
        output_size: B.
        sampling_ratio: sampling points per bin and axis; 0 adapts them to the bin's size.
        aligned: whether pixel centres lie at +0.5.

    Returns:
        (N * S, C, B, B) of the type of the features, image-major, contiguous.

    Raises:
        TypeError: features of another type, or of several types.
    """
    dtype = features[0].dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or any(f.dtype != dtype for f in features):
        raise TypeError(f"features must be float32, bfloat16 or float16, all alike, not {[f.dtype for f in features]}")
    scales = tuple(1 / stride for stride in strides)  # which the kernel could not divide as exactly
    options = (scales, output_size, sampling_ratio, aligned)
    return _RoIAlign.apply(boxes.detach(), level, options, *features)


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, boxes: Tensor, level: Tensor, options: tuple[Any, ...], *features: Tensor) -> Tensor:
        features = tuple(f.contiguous(memory_format=torch.channels_last) for f in features)
        boxes, level = boxes.contiguous(), level.contiguous()
        channels, size = features[0].shape[1], options[1]
        pooled = features[0].new_empty(level.numel(), channels, size, size)
        ctx.save_for_backward(boxes, level)
        ctx.options, ctx.shapes, ctx.dtype = options, [f.shape for f in features], pooled.dtype
        _launch(features, ctx.shapes, boxes, level, pooled, options, backward=False)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        boxes, level = ctx.saved_tensors
        n, c = ctx.shapes[0][:2]
        areas = [h * w for _, _, h, w in ctx.shapes]
        cells = [n * area for area in areas]
        sums = grad.new_zeros(sum(cells), c, dtype=torch.float32)
        _launch(sums.split(cells), ctx.shapes, boxes, level, grad.contiguous(), ctx.options, backward=True)
        grads = sums.to(ctx.dtype).split(cells)
        of_levels = (g.view(n, h, w, c).permute(0, 3, 1, 2) for g, (_, _, h, w) in zip(grads, ctx.shapes, strict=True))
        return None, None, None, *of_levels


def _launch(
    maps: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    boxes: Tensor,
    level: Tensor,
    pooled: Tensor,
    options: tuple[Any, ...],
    *,
    backward: bool,
) -> None:
    """Run the kernel on maps, (N, h_i, w_i, C) in memory, and contiguous pooled features (R, C, B, B)."""
    scales, size, sampling_ratio, aligned = options
    channels = pooled.shape[1]
    if pooled.numel() == 0:
        return
    bin_columns = max(triton.next_power_of_2(size), 4)
    bin_rows = max(min(bin_columns, BINS // bin_columns), 1)
    block = min(max(triton.next_power_of_2(channels), 16), BLOCK_BYTES // pooled.element_size())
    with torch.cuda.device_of(pooled):
        # RoIs are the fast axis of the grid: while all pass, the maps' slice of one block of channels stays in L2.
        _kernel[level.numel(), triton.cdiv(channels, block), triton.cdiv(size, bin_rows)](
            tuple(maps),
            # As floats, because Triton compiles anew for integers that are multiples of 16.
            tuple(float(shape[2]) for shape in shapes),
            tuple(float(shape[3]) for shape in shapes),
            boxes,
            level,
            pooled,
            level.shape[1],
            scales,
            channels,
            size,
            sampling_ratio,
            aligned,
            backward,
            bin_rows,
            bin_columns,
            TILE,
            block,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )


@triton.jit(do_not_specialize=["boxes_per_image"])
def _kernel(
    maps,
    heights,
    widths,
    boxes,
    levels,
    pooled,
    boxes_per_image,
    scales: tl.constexpr,
    channels: tl.constexpr,
    size: tl.constexpr,
    sampling_ratio: tl.constexpr,
    aligned: tl.constexpr,
    backward: tl.constexpr,
    bin_rows: tl.constexpr,
    bin_columns: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
):
    """Forward: pooled (bins, channels) = sum over tiles of weights (bins, cells) x values (cells, channels).

    Backward: maps (cells, channels) += weights (cells, bins) x pooled (bins, channels), tile by tile.
    """
    roi = tl.program_id(0)
    level = tl.load(levels + roi)
    height, width, scale = _choose(level, heights), _choose(level, widths), _choose(level, scales)
    row_stride = width.to(tl.int32) * channels
    cells = maps[0]
    for i in tl.static_range(1, len(scales)):
        if level == i:
            cells = maps[i]
    cells += (roi // boxes_per_image).to(tl.int64) * height.to(tl.int32) * row_stride

    first_row = tl.program_id(2) * bin_rows
    last_row = tl.minimum(first_row + bin_rows, size) - 1
    low_y, bin_height, points_y, top, bottom = _axis(
        boxes + roi * 4 + 1, scale, height, first_row, last_row, size, sampling_ratio, aligned
    )
    low_x, bin_width, points_x, left, right = _axis(
        boxes + roi * 4, scale, width, 0, size - 1, size, sampling_ratio, aligned
    )

    channel = (tl.program_id(1) * block + tl.arange(0, block))[None, :]
    pooled += roi.to(tl.int64) * channels * size * size
    if backward:
        place, is_bin = _bins(first_row, channel, channels, size, bin_rows, bin_columns)
        grad = tl.load(pooled + place, mask=is_bin, other=0)
    else:
        total = tl.full((bin_rows * bin_columns, block), 0, tl.float32)

    cell = tl.arange(0, tile * tile)[:, None]
    for tile_row in range(top, bottom + 1, tile):
        for tile_column in range(left, right + 1, tile):
            row = tile_row + cell // tile
            column = tile_column + cell % tile
            corner = cells + tl.cast(tile_row, tl.int64) * row_stride + tile_column * channels
            at = corner + (cell // tile * row_stride + cell % tile * channels + channel)
            is_cell = (row <= bottom) & (column <= right) & (channel < channels)
            if not backward:
                values = tl.load(at, mask=is_cell, other=0)
            of_rows = _weights(tile_row, first_row, low_y, bin_height, points_y, height, bin_rows, tile)
            of_columns = _weights(tile_column, 0, low_x, bin_width, points_x, width, bin_columns, tile)
            weights = of_rows[:, None, :, None] * of_columns[None, :, None, :]
            weights = tl.reshape(weights, (bin_rows * bin_columns, tile * tile))
            if backward:
                product = _multiply(tl.trans(weights), grad, tl.full((tile * tile, block), 0, tl.float32))
                tl.atomic_add(at, product, mask=is_cell, sem="relaxed")
            else:
                total = _multiply(weights, values, total)
    if not backward:
        place, is_bin = _bins(first_row, channel, channels, size, bin_rows, bin_columns)
        tl.store(pooled + place, total.to(pooled.dtype.element_ty), mask=is_bin)


@triton.jit
def _choose(level, values):
    """The float32 `values[level]`."""
    chosen = tl.full((), values[0], tl.float32)
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(level == i, values[i], chosen)
    return chosen


@triton.jit
def _axis(
    box,
    scale,
    end,
    first_bin,
    last_bin,
    size: tl.constexpr,
    sampling_ratio: tl.constexpr,
    aligned: tl.constexpr,
):
    """Of one axis: the RoI's edge and its bins' size in cells, the points per bin, the first and last cell touched."""
    low = tl.load(box) * scale
    high = tl.load(box + 2) * scale
    if aligned:
        low -= 0.5
        high -= 0.5
        extent = tl.maximum(high - low, 0.0)
    else:
        extent = tl.maximum(high - low, 1.0)
    # Rounded to nearest: a bin a bit larger than a whole number would have a point more.
    bin_size = tl.div_rn(extent, tl.full((), size, tl.float32))
    if sampling_ratio > 0:
        points = tl.full((), sampling_ratio, tl.int32)
    else:
        points = tl.ceil(bin_size).to(tl.int32)
    spacing = bin_size / tl.maximum(points, 1)
    first = low + first_bin * bin_size + 0.5 * spacing
    last = low + last_bin * bin_size + (points - 0.5) * spacing
    first = tl.minimum(tl.maximum(first, 0.0), end - 1).to(tl.int32)
    last = tl.minimum(tl.maximum(last, 0.0), end - 1).to(tl.int32) + 1
    return low, bin_size, points, first, tl.minimum(last, end.to(tl.int32) - 1)


@triton.jit
def _bins(first_row, channel, channels, size: tl.constexpr, bin_rows: tl.constexpr, bin_columns: tl.constexpr):
    """(bins, channels): where they lie in the pooled features of a RoI, and whether there are such."""
    bin = tl.arange(0, bin_rows * bin_columns)[:, None]
    row = first_row + bin // bin_columns
    column = bin % bin_columns
    return (channel * size + row) * size + column, (row < size) & (column < size) & (channel < channels)


@triton.jit
def _weights(first_cell, first_bin, low, bin_size, points, end, num_bins: tl.constexpr, num_cells: tl.constexpr):
    """(bins, cells) float32: along one axis, the weight of each cell in the mean over a bin's sampling points."""
    bin = (first_bin + tl.arange(0, num_bins))[:, None]
    cell = (first_cell + tl.arange(0, num_cells))[None, :]
    spacing = bin_size / tl.maximum(points, 1)
    total = tl.full((num_bins, num_cells), 0, tl.float32)
    for point in range(points):
        position = low + bin * bin_size + (point + 0.5) * spacing
        counts = (position >= -1) & (position <= end)
        position = tl.minimum(tl.maximum(position, 0.0), end - 1)
        total += tl.where(counts, tl.maximum(1 - tl.abs(position - cell), 0.0), 0.0)
    return total / tl.maximum(points, 1)


@triton.jit
def _multiply(weights, values, total):
    """total + weights x values, in float32."""
    if values.dtype == tl.float32:
        product = tl.dot(weights, values, total, input_precision="tf32x3")
    else:
        rounded = weights.to(values.dtype)
        rest = (weights - rounded.to(tl.float32)).to(values.dtype)
        product = tl.dot(rest, values, tl.dot(rounded, values, total))
    return product
