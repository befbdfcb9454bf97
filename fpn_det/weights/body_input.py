"""How an imported body takes its image: order of the channels, mean, standard deviation, place of the stride."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fpn_det.weights.rename import Row

Channels = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class BodyInput:
    """The conventions that a body was trained under.

    Attributes:
        bgr: whether the channels are blue, green, red.
        mean, std: of values 0..255, in the order of the body's channels.
        stride_in_1x1: whether a stage has its stride in the first 1x1 convolution instead of the 3x3.
        reason: where this is known from, in words.
    """

    bgr: bool
    mean: Channels
    std: Channels
    stride_in_1x1: bool
    reason: str = "as asked for with --style"

    def config(self) -> dict[str, Any]:
        """Keys of the config's section `model`; ours are in RGB order."""
        order = -1 if self.bgr else 1
        return {"pixel_mean": list(self.mean[::order]), "pixel_std": list(self.std[::order])}

    def to_rgb(self, stem: str, state_dict: dict[str, Tensor], rows: list[Row]) -> None:
        """Let the stem give for RGB what it gave for BGR, in place: permute the input channels of its convolution.

        Args:
            stem: our name of the weight, (64, 3, 7, 7).
            state_dict: in our names.
            rows: the table, whose row is changed too.
        """
        if self.bgr:
            state_dict[stem] = state_dict[stem].flip(1)
            [i] = [i for i, row in enumerate(rows) if row.target == stem]
            rows[i] = Row(rows[i].source, stem, "permuted", "input channels BGR -> RGB")

    def remark(self) -> str:
        """All of it in a sentence."""
        return (
            f"the body takes {'BGR' if self.bgr else 'RGB'}, mean {self.mean}, std {self.std}, stride in the "
            f"{'1x1' if self.stride_in_1x1 else '3x3'}: {self.reason}"
        )


MSRA = BodyInput(bgr=True, mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), stride_in_1x1=True)
"""The original ResNets, also called caffe style."""
TORCHVISION = BodyInput(bgr=False, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), stride_in_1x1=False)
"""Also called pytorch style."""
FAIR_RESNEXT = BodyInput(bgr=True, mean=(103.53, 116.28, 123.675), std=(57.375, 57.12, 58.395), stride_in_1x1=False)
"""The X-101-32x8d that Caffe2 trained."""
