"""A tiny detector and tiny batches for the tests of the model."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fpn_det.models.anchors import Anchors
from fpn_det.models.backbone import ResNet
from fpn_det.models.faster_rcnn import FasterRCNN
from fpn_det.models.fpn import FPN
from fpn_det.models.roi_head import ConvFCHead, RoIHead
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.models.rpn import RPN, RPNHead
from fpn_det.structures import Batch, Targets

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CHANNELS, FC_DIM = 16, 32


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pad_targets(boxes: Sequence[Sequence[Sequence[float]]], labels: Sequence[Sequence[int]]) -> Targets:
    """Ragged ground truth -> `Targets`."""
    n, g = len(boxes), max(map(len, boxes), default=0)
    padded = torch.zeros(n, g, 4), torch.zeros(n, g, dtype=torch.int64), torch.zeros(n, g, dtype=torch.bool)
    for i in range(n):
        k = len(boxes[i])
        padded[0][i, :k] = torch.tensor(boxes[i], dtype=torch.float32).reshape(-1, 4)
        padded[1][i, :k] = torch.tensor(labels[i], dtype=torch.int64)
        padded[2][i, :k] = True
    return Targets(boxes=padded[0], labels=padded[1], valid=padded[2])


@pytest.fixture
def make_targets() -> Callable[..., Targets]:
    return pad_targets


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Random pixels: make_batch(sizes, boxes, labels), padded to a multiple of 32."""

    def make(
        sizes: Sequence[tuple[int, int]],
        boxes: Sequence[Sequence[Sequence[float]]],
        labels: Sequence[Sequence[int]],
    ) -> Batch:
        height, width = (-(-max(size[i] for size in sizes) // 32) * 32 for i in (0, 1))
        images = torch.zeros(len(sizes), 3, height, width, dtype=torch.uint8)
        for image, (h, w) in zip(images, sizes, strict=True):
            image[:, :h, :w] = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
        return Batch(
            images=images,
            sizes=torch.tensor(sizes),
            targets=pad_targets(boxes, labels),
            image_ids=torch.arange(len(sizes)),
            original_sizes=torch.tensor(sizes),
            seeds=torch.arange(len(sizes)),
        )

    return make


class TinyBody(nn.Module):
    """Four strided convolutions: quicker than any ResNet."""

    strides, channels = (4, 8, 16, 32), (8, 8, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *self.channels)
        self.stages = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 3, stride=4 if i == 0 else 2, padding=1) for i in range(4)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            images = stage(images).relu()
            features.append(images)
        return features


@pytest.fixture
def make_model() -> Callable[..., FasterRCNN]:
    """make_model(body=None, num_classes=3, rpn={}, roi={}, pooler={}, anchors={}): keyword dictionaries override."""

    def make(
        *,
        body: ResNet | TinyBody | None = None,
        num_classes: int = 3,
        rpn: dict[str, Any] | None = None,
        roi: dict[str, Any] | None = None,
        pooler: dict[str, Any] | None = None,
        anchors: dict[str, Any] | None = None,
    ) -> FasterRCNN:
        body = body or TinyBody()
        neck = FPN(in_channels=body.channels, channels=CHANNELS, strides=body.strides)
        cells = {"sizes": ((16,), (32,), (64,), (128,), (256,)), "ratios": (0.5, 1, 2), "strides": neck.strides} | (
            anchors or {}
        )
        return FasterRCNN(
            backbone=body,
            neck=neck,
            rpn=RPN(head=RPNHead(in_channels=CHANNELS, num_anchors=3), anchors=Anchors(**cells), **(rpn or {})),
            roi_head=RoIHead(
                pooler=MultiLevelRoIAlign(**({"strides": body.strides} | (pooler or {}))),
                box_head=ConvFCHead(in_channels=CHANNELS, pool_size=7, fc_dim=FC_DIM),
                num_classes=num_classes,
                **(roi or {}),
            ),
            pixel_mean=MEAN,
            pixel_std=STD,
        )

    return make
