"""Feature Pyramid Network: C2..C5 -> P2..P6 (Lin et al., arXiv 1612.03144, section 3).

Dimensions: N images, C channels of every level, H and W of the padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate


class FPN(nn.Module):
    """Lateral 1x1 convolutions, a top-down path of nearest upsampling and addition, a 3x3 convolution per level.

    P6 is P5 subsampled by 2; only the RPN uses it (section 4.1).

    Args:
        in_channels: of C2..C5, fine to coarse.
        channels: of every output level.
        strides: of C2..C5.

    Attributes:
        strides: of P2..P6.
    """

    def __init__(self, *, in_channels: Sequence[int], channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = (*strides, 2 * strides[-1])
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, kernel_size=1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in in_channels)
        for conv in [*self.lateral, *self.output]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C2..C5, (N, in_channels[i], h_i, w_i) -> P2..P6, (N, C, h_i, w_i), P6 of half P5's size, rounded up."""
        top_down = self.lateral[-1](features[-1])
        pyramid = [self.output[-1](top_down)]
        for i in reversed(range(len(features) - 1)):
            # To the size of the finer level, not by 2: levels of images that 32 does not divide are odd.
            upsampled = interpolate(top_down, size=features[i].shape[-2:], mode="nearest")
            top_down = self.lateral[i](features[i]) + upsampled
            pyramid.append(self.output[i](top_down))
        pyramid.reverse()
        return [*pyramid, pyramid[-1][:, :, ::2, ::2]]
