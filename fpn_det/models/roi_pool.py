"""RoIAlign over a pyramid (arXiv 1612.03144, equation 1; RoIAlign: Mask R-CNN, arXiv 1703.06870, section 3).

Dimensions: N images, S RoIs per image, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align


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
            (N * S, C, output_size, output_size), image-major.
        """
        n, s = boxes.shape[:2]
        image_index = torch.arange(n, device=boxes.device, dtype=boxes.dtype).repeat_interleave(s)
        rois = torch.cat([image_index[:, None], boxes.reshape(-1, 4)], dim=1)
        level = self.assign_levels(rois[:, 1:])
        pooled, order = [], []
        for i, stride in enumerate(self.strides):
            on_level = (level == i).nonzero().squeeze(1)
            order.append(on_level)
            pooled.append(
                roi_align(
                    features[i],
                    rois[on_level].to(torch.promote_types(features[i].dtype, torch.float32)),
                    output_size=self.output_size,
                    spatial_scale=1 / stride,
                    sampling_ratio=self.sampling_ratio,
                    aligned=self.aligned,
                )
            )
        return torch.cat(pooled)[torch.cat(order).argsort()]
