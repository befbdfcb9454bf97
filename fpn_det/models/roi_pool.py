"""RoIAlign over a pyramid (arXiv 1612.03144, equation 1; RoIAlign: Mask R-CNN, arXiv 1703.06870, section 3).

RoIAlign is linear in the features, and separable: the mean over the sampling points of a bin is a sum over the cells
that they touch, whose weights are the product of one weight per row and one per column. On a CPU that sum is an
embedding bag over the cells of all levels at once, which runs on all threads, forward and backward, and reads each cell
once where sampling points share it; NOTES.md has the figures. On GPUs it is torchvision's operator once per level, or
one kernel for all levels where `fpn_det.kernels` serve.

Dimensions: N images, S RoIs per image, R = N * S, C channels, B bins per side, T cells that a bin touches on one axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from torchvision.ops import roi_align

from fpn_det import kernels
from fpn_det.models.anchors import level_shapes

FAR_OUTSIDE = -1e5
"""Where RoIs of other levels are moved: RoIAlign is 0 outside of the image."""


class MultiLevelRoIAlign(nn.Module):
    """Pools each RoI from the level that suits its size: k = floor(k0 + log2(sqrt(w * h) / canonical_size)).

    Args:
        strides: of the levels, powers of two, fine to coarse; level k has stride 2**k. Further levels are not used.
        output_size: height and width of the pooled features.
        sampling_ratio: sampling points per bin and axis; 0 adapts them to the bin's size.
        aligned: whether pixel centres lie at +0.5 (RoIAlign as corrected in Detectron2).
        canonical_level: k0, the level of a RoI of `canonical_size`.
        canonical_size: in pixels.
        level_eps: added to sqrt(w * h) / canonical_size; Detectron2 has 1e-8, MMDetection what equals 2.5e-7.
        level_bias: added after the logarithm; torchvision has 1e-6.
    """

    def __init__(
        self,
        *,
        strides: Sequence[int],
        output_size: int = 7,
        sampling_ratio: int = 0,
        aligned: bool = True,
        canonical_level: int = 4,
        canonical_size: float = 224,
        level_eps: float = 0.0,
        level_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.min_level = self.strides[0].bit_length() - 1
        if any(stride != 2 ** (self.min_level + i) for i, stride in enumerate(self.strides)):
            raise ValueError(f"strides must be consecutive powers of two, not {self.strides}")
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.canonical_level = canonical_level
        self.canonical_size = canonical_size
        self.level_eps = level_eps
        self.level_bias = level_bias

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Position in `strides` of the level of each box: (..., 4) float32 XYXY -> (...,) int64."""
        size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1).sqrt()
        level = self.canonical_level + torch.log2(size / self.canonical_size + self.level_eps)
        level = torch.floor(level + self.level_bias)
        return (level - self.min_level).clamp(min=0, max=len(self.strides) - 1).to(torch.int64)

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Pool the features of each box.

        Args:
            features: (N, C, h_i, w_i) per level, at least one per stride.
            boxes: (N, S, 4) float32 XYXY in pixels of the padded image.

        Returns:
            (N * S, C, output_size, output_size), image-major. Float32, or float64 for such features; from the kernel of
            the features' type, with sums in float32 all the same.
        """
        features = features[: len(self.strides)]
        if kernels.serve(features[0]) and features[0].dtype != torch.float64:
            from fpn_det.kernels.roi_align import roi_align as pool

            return pool(
                features,
                boxes.float(),
                self.assign_levels(boxes.float()),
                strides=self.strides,
                output_size=self.output_size,
                sampling_ratio=self.sampling_ratio,
                aligned=self.aligned,
            )
        features = [f.to(torch.promote_types(f.dtype, torch.float32)) for f in features]
        boxes = boxes.to(features[0].dtype)
        return self._sum_cells(features, boxes) if boxes.device.type == "cpu" else self._sum_levels(features, boxes)

    def _sum_levels(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """The sum over the levels of RoIAlign on each, where RoIs of other levels give 0.

        Which RoIs are on a level is known to the device only; to pool just those, the host would have to wait for it.
        """
        n, s = boxes.shape[:2]
        image_index = torch.arange(n, device=boxes.device, dtype=boxes.dtype)[:, None].expand(n, s)
        level = self.assign_levels(boxes)
        pooled: Tensor | None = None
        for i, stride in enumerate(self.strides):
            of_level = boxes.masked_fill((level != i)[:, :, None], FAR_OUTSIDE)
            of_level = roi_align(
                features[i],
                torch.cat([image_index[:, :, None], of_level], dim=2).flatten(0, 1),
                output_size=self.output_size,
                spatial_scale=1 / stride,
                sampling_ratio=self.sampling_ratio,
                aligned=self.aligned,
            )
            pooled = of_level if pooled is None else pooled.add_(of_level)
        assert pooled is not None
        return pooled

    def _sum_cells(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """The weighted sum of the cells that each bin touches."""
        c = features[0].shape[1]
        cells = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, c) for f in features])
        index, offsets, weights = self._bags(level_shapes(features), boxes)
        pooled = embedding_bag(index, cells, offsets, mode="sum", per_sample_weights=weights)
        return pooled.view(-1, self.output_size, self.output_size, c).permute(0, 3, 1, 2)

    @torch.no_grad()
    def _bags(self, shapes: Sequence[tuple[int, int]], boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which cells each bin touches, and their weights.

        Args:
            shapes: (h, w) of each level in cells.
            boxes: as of `forward`.

        Returns:
            index: int32 into the cells of all levels, (level, image, row, column), bin after bin.
            offsets: (R * B * B,) int32, where each bin begins in `index`.
            weights: of `index`, of the type of `boxes`.
        """
        n, s = boxes.shape[:2]
        boxes = boxes.flatten(0, 1)
        level = self.assign_levels(boxes)
        size = torch.tensor(shapes, dtype=torch.int32)
        cells = n * size.prod(1)
        height, width = size[level].unbind(1)
        image = torch.arange(n, dtype=torch.int32).repeat_interleave(s)
        start = (cells.cumsum(0) - cells).int()[level] + image * height * width

        boxes = boxes / torch.tensor(self.strides, dtype=boxes.dtype)[level, None]
        boxes = boxes - 0.5 if self.aligned else boxes
        first_row, num_rows, row_weights = self._touched(boxes[:, 1], boxes[:, 3], height)
        first_column, num_columns, column_weights = self._touched(boxes[:, 0], boxes[:, 2], width)

        # Bags differ in length: element e of all lies in `bag[e]`, at `row[e]`, `column[e]` of its cells.
        lengths = (num_rows[:, :, None] * num_columns[:, None, :]).flatten()
        offsets = lengths.cumsum(0, dtype=torch.int32) - lengths
        bag = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)
        within = torch.arange(len(bag), dtype=torch.int32) - offsets[bag]
        row_bin = bag.div(self.output_size, rounding_mode="floor")  # of (R, B), as `first_row`
        roi = row_bin.div(self.output_size, rounding_mode="floor")
        column_bin = roi * self.output_size + bag.remainder(self.output_size)
        columns = num_columns.flatten()[column_bin]
        row = within.div(columns, rounding_mode="floor")
        column = within - row * columns
        corner = (
            start[:, None, None] + first_row[:, :, None] * width[:, None, None] + first_column[:, None, :]
        ).flatten()
        index = corner[bag] + row * width[roi] + column
        weights = row_weights[row_bin, row] * column_weights[column_bin, column]
        return index, offsets, weights

    def _touched(self, low: Tensor, high: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The cells along one axis that the sampling points of each bin touch.

        Args:
            low, high: (R,) the RoIs' edges in cells.
            size: (R,) cells of the level.

        Returns:
            first: (R, B) int32, the first cell.
            num: (R, B) int32, how many follow from there.
            weights: (R * B, T) their weights, which sum to 1 unless points lie outside of the level.
        """
        bin_size = (high - low).clamp(min=0 if self.aligned else 1) / self.output_size
        num_points = torch.full_like(bin_size, self.sampling_ratio) if self.sampling_ratio else bin_size.ceil()
        is_empty = (num_points == 0)[:, None, None]
        num_points = num_points.clamp(min=1)[:, None, None]
        bins = torch.arange(self.output_size, dtype=low.dtype)[:, None]
        points = torch.arange(int(num_points.amax()) if len(low) else 1, dtype=low.dtype)
        # Points beyond a RoI's number repeat its last one, with weight 0.
        place = bins + (torch.minimum(points, num_points - 1) + 0.5) / num_points  # (R, B, points), in bins
        position = low[:, None, None] + place * bin_size[:, None, None]
        end = size[:, None, None].to(low.dtype)
        counts = (points < num_points) & (position >= -1) & (position <= end) & ~is_empty
        position = torch.minimum(position.clamp(min=0), end - 1)

        first = position[:, :, :1].floor()
        last = torch.minimum(position[:, :, -1:].floor() + 1, end - 1)
        num = (last - first).int().squeeze(2) + 1
        cells = torch.arange(int(num.max()) if len(low) else 1, dtype=low.dtype)
        distance = ((position - first)[:, :, None] - cells[:, None]).abs_()  # (R, B, T, points)
        weights = ((1 - distance).clamp_(min=0) * counts[:, :, None]).sum(3) / num_points
        return first.int().squeeze(2), num, weights.flatten(0, 1)
