"""Necks: C2..C5 -> a pyramid P2..P6, or one level of the body as it is.

FPN (Lin et al., arXiv 1612.03144, section 3) with the variants of its ablation; PAFPN (PANet, Liu et al.,
arXiv 1803.01534, section 3.1). A neck declares `channels`, the `strides` of its outputs, which the RPN uses, and
`roi_strides`, those of the first outputs, which RoIs are pooled from.

Dimensions: N images, C channels of every level, H and W of the padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.nn.functional import interpolate

from fpn_det.models.norms import Norm, conv_norm

UpsampleKind = Literal["nearest", "bilinear", "deconv", "pixel_shuffle"]


class FPN(nn.Module):
    """Lateral 1x1 convolutions, a top-down path of upsampling and addition, a 3x3 convolution per level.

    P6 is P5 subsampled by 2; only the RPN uses it (section 4.1). The defaults are the paper's FPN; `top_down`,
    `lateral` and `finest_only` are rows (d), (e) and (f) of its tables 1 and 2.

    Args:
        in_channels: of C2..C5, fine to coarse.
        channels: of every output level.
        strides: of C2..C5.
        top_down: whether a level receives the upsampled coarser one.
        lateral: whether a level receives its own features; else only the coarsest does. Excludes `top_down` off.
        upsample: `nearest`, `bilinear`, or learned: `deconv` (transposed convolution) and `pixel_shuffle` (sub-pixel
            convolution, arXiv 1609.05158), which start as nearest.
        smooth_top: whether the coarsest level has a 3x3 convolution too (nothing was added to it).
        norm: normalisation after each convolution, which then has no bias.
        finest_only: whether P2 is the only output.

    Attributes:
        channels: C.
        strides: of the outputs.
        roi_strides: of the outputs that RoIs are pooled from.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        channels: int,
        strides: Sequence[int],
        top_down: bool = True,
        lateral: bool = True,
        upsample: UpsampleKind = "nearest",
        smooth_top: bool = True,
        norm: Norm | None = None,
        finest_only: bool = False,
    ) -> None:
        super().__init__()
        assert top_down or lateral, "a level must receive something"
        self.channels = channels
        self.roi_strides = tuple(strides[:1] if finest_only else strides)
        self.strides = self.roi_strides if finest_only else (*strides, 2 * strides[-1])
        self.finest_only = finest_only
        self.lateral = nn.ModuleList(
            conv_norm(c, channels, 1, norm=norm) for c in (in_channels if lateral else in_channels[-1:])
        )
        num_steps = len(in_channels) - 1 if top_down else 0
        self.upsample = nn.ModuleList(Upsample(channels=channels, kind=upsample) for _ in range(num_steps))
        self.output = nn.ModuleList(conv_norm(channels, channels, 3, norm=norm) for _ in self.roi_strides)
        if not smooth_top and not finest_only:
            self.output[-1] = nn.Identity()

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C2..C5, (N, in_channels[i], h_i, w_i) -> P2..P6, (N, C, h_i, w_i), P6 of half P5's size, rounded up."""
        pyramid = [conv(x) for conv, x in zip(self.output, self.merge(features), strict=False)]
        return pyramid if self.finest_only else [*pyramid, subsample(pyramid[-1])]

    def merge(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The levels before their 3x3 convolutions: lateral features plus what comes from above."""
        num_missing = len(features) - len(self.lateral)
        merged: list[Tensor | None] = [None] * num_missing
        merged += [conv(x) for conv, x in zip(self.lateral, features[num_missing:], strict=True)]
        for i in reversed(range(len(self.upsample))):
            above = merged[i + 1]
            # To the size of the finer level, not by 2: levels of images that 32 does not divide are odd.
            upsampled = self.upsample[i](above, features[i].shape[-2:])
            own = merged[i]
            merged[i] = upsampled if own is None else own + upsampled
        return merged  # type: ignore[return-value]


class PAFPN(FPN):
    """An FPN with a second, bottom-up path, which brings fine localisation to the coarse levels in few steps.

    Each level is added to the finer one, convolved with stride 2, and smoothed; every convolution of the path is
    followed by ReLU (arXiv 1803.01534, section 3.1).

    Args:
        in_channels, channels, strides, upsample, smooth_top, norm: as of `FPN`.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        channels: int,
        strides: Sequence[int],
        upsample: UpsampleKind = "nearest",
        smooth_top: bool = True,
        norm: Norm | None = None,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            channels=channels,
            strides=strides,
            upsample=upsample,
            smooth_top=smooth_top,
            norm=norm,
        )
        levels = range(len(strides) - 1)
        self.downsample = nn.ModuleList(conv_norm(channels, channels, 3, stride=2, norm=norm) for _ in levels)
        self.bottom_up = nn.ModuleList(conv_norm(channels, channels, 3, norm=norm) for _ in levels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """As of `FPN`."""
        top_down = super().forward(features)[:-1]
        pyramid = top_down[:1]
        for level, down, smooth in zip(top_down[1:], self.downsample, self.bottom_up, strict=True):
            pyramid.append(smooth(level + down(pyramid[-1]).relu()).relu())
        return [*pyramid, subsample(pyramid[-1])]


class SingleLevel(nn.Module):
    """No pyramid: C4 or C5 alone, as in detectors before FPN (arXiv 1612.03144, tables 1 to 3, rows a and b).

    Args:
        in_channels: of the body's outputs.
        strides: of the body's outputs.

    Attributes:
        channels, strides, roi_strides: of the last output of the body.
    """

    def __init__(self, *, in_channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.channels = in_channels[-1]
        self.strides = self.roi_strides = (strides[-1],)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The body's features -> the coarsest of them."""
        return [features[-1]]


class Upsample(nn.Module):
    """Twice the height and width, cropped to the size of the finer level if that is odd.

    Args:
        channels: C.
        kind: as of `FPN`.
    """

    def __init__(self, *, channels: int, kind: UpsampleKind) -> None:
        super().__init__()
        self.kind = kind
        identity = torch.eye(channels)[:, :, None, None]
        match kind:
            case "deconv":
                self.conv = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
                self.conv.weight.data.copy_(identity.expand(-1, -1, 2, 2))
                nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
            case "pixel_shuffle":
                self.conv = nn.Conv2d(channels, 4 * channels, kernel_size=1)  # type: ignore[assignment]
                self.conv.weight.data.copy_(identity.repeat_interleave(4, dim=0))
                nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, C, h, w) -> (N, C, *size), `size` at most (2h, 2w)."""
        match self.kind:
            case "nearest":
                kind = x.device.type
                # Autocast would do it in float32. Where there is none, nothing is put into exported programs.
                autocast = is_autocast_available(kind) and torch.is_autocast_enabled(kind)
                with torch.autocast(kind, enabled=False) if autocast else nullcontext():
                    return interpolate(x, size=size, mode="nearest")
            case "bilinear":
                return interpolate(x, size=size, mode="bilinear", align_corners=False)
            case "deconv":
                return self.conv(x)[..., : size[0], : size[1]]
            case "pixel_shuffle":
                return nn.functional.pixel_shuffle(self.conv(x), 2)[..., : size[0], : size[1]]


def subsample(x: Tensor) -> Tensor:
    """Every second row and column."""
    return x[:, :, ::2, ::2]
