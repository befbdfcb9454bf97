"""Faster R-CNN on a Feature Pyramid Network (arXiv 1506.01497, 1612.03144): the stages put together.

Dimensions: N images, H and W of the padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fpn_det.models.roi_head import RoIHead
from fpn_det.models.rpn import RPN
from fpn_det.structures import Batch, Detections


class FasterRCNN(nn.Module):
    """Image to features to proposals to detections.

    `forward` trains and returns losses (it is what DistributedDataParallel wraps); `predict` detects.

    Args:
        backbone: normalised images -> features.
        neck: features -> pyramid.
        rpn: pyramid -> proposals.
        roi_head: pyramid and proposals -> detections.
        pixel_mean, pixel_std: per RGB channel, on the scale 0..255.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: nn.Module,
        rpn: RPN,
        roi_head: RoIHead,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.rpn = rpn
        self.roi_head = roi_head
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    def normalize(self, images: Tensor, sizes: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> float32 (x - pixel_mean) / pixel_std; the padding becomes 0, the mean colour."""
        normalized = (images - self.pixel_mean) / self.pixel_std
        rows, columns = (torch.arange(n, device=images.device) for n in images.shape[-2:])
        inside = (rows[:, None] < sizes[:, 0, None, None]) & (columns < sizes[:, 1, None, None])
        return normalized * inside[:, None]

    def features(self, batch: Batch) -> list[Tensor]:
        """The pyramid P2..P6 of the images."""
        pyramid: list[Tensor] = self.neck(self.backbone(self.normalize(batch.images, batch.sizes)))
        return pyramid

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of a batch.

        Returns:
            losses: scalars to be summed: `rpn_objectness`, `rpn_box`, `roi_class`, `roi_box`.
            stats: scalars to be logged: `rpn_positives`, `roi_positives` (samples per image).
        """
        features = self.features(batch)
        logits, deltas, anchors = self.rpn(features)
        anchor_samples = self.rpn.sample(anchors, batch.targets)
        proposals = self.rpn.propose(logits, deltas, anchors, batch.sizes)
        roi_samples = self.roi_head.sample(proposals, batch.targets)
        roi_logits, roi_deltas = self.roi_head(features, roi_samples.boxes)
        losses = self.rpn.loss(logits, deltas, anchor_samples) | self.roi_head.loss(roi_logits, roi_deltas, roi_samples)
        foreground = roi_samples.labels < self.roi_head.num_classes
        stats = {
            "rpn_positives": anchor_samples.is_positive.sum(1).float().mean(),
            "roi_positives": foreground.sum(1).float().mean(),
        }
        return losses, stats

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Detections]:
        """Detections of each image, in the frame of the resized image. Call it in evaluation mode."""
        features = self.features(batch)
        logits, deltas, anchors = self.rpn(features)
        proposals = self.rpn.propose(logits, deltas, anchors, batch.sizes)
        return self.roi_head.predict(features, proposals, batch.sizes)
