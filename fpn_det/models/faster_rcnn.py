"""The stages put together: Faster R-CNN (arXiv 1506.01497, 1612.03144), its RPN alone, and Fast R-CNN.

All train by `forward(batch)`, which returns losses (it is what DistributedDataParallel wraps), detect by
`predict(batch)`, and give class-agnostic proposals by `propose(batch)`.

Dimensions: N images, H and W of the padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fpn_det.models.roi_head import CascadeRoIHead, RoIHead
from fpn_det.models.rpn import RPN
from fpn_det.structures import Batch, Detections, Proposals


class Pyramid(nn.Module):
    """Images to features: what the three detectors share.

    Args:
        backbone: normalised images -> features.
        neck: features -> pyramid.
        pixel_mean, pixel_std: per RGB channel, on the scale 0..255.

    Attributes:
        memory_format: of the normalised images, which the features follow; by default channels last.
    """

    def __init__(
        self, *, backbone: nn.Module, neck: nn.Module, pixel_mean: Sequence[float], pixel_std: Sequence[float]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.memory_format = torch.channels_last
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    def normalize(self, images: Tensor, sizes: Tensor) -> Tensor:
        """(N, 3, H, W) -> float32 (x - pixel_mean) / pixel_std; the padding becomes 0, the mean colour."""
        n, _, h, w = images.shape
        # As rows of 3 W values: a loop over three channels side by side uses no vector unit.
        rows = images.permute(0, 2, 3, 1).reshape(n, h, 3 * w).to(self.pixel_mean.dtype, copy=True)
        mean, std = (x.flatten().repeat(w) for x in (self.pixel_mean, self.pixel_std))
        rows.sub_(mean).div_(std)
        rows.mul_(torch.arange(h, device=images.device)[:, None] < sizes[:, 0, None, None])
        rows.mul_(torch.arange(3 * w, device=images.device) < 3 * sizes[:, 1, None, None])
        return rows.view(n, h, w, 3).permute(0, 3, 1, 2).to(memory_format=self.memory_format)

    def features(self, batch: Batch) -> list[Tensor]:
        """The levels of the neck, P2..P6 of an FPN."""
        pyramid: list[Tensor] = self.neck(self.backbone(self.normalize(batch.images, batch.sizes)))
        return pyramid


class FasterRCNN(Pyramid):
    """Images to features to proposals to detections.

    Args:
        backbone, neck, pixel_mean, pixel_std: as of `Pyramid`.
        rpn: pyramid -> proposals.
        roi_head: pyramid and proposals -> detections.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: nn.Module,
        rpn: RPN,
        roi_head: RoIHead | CascadeRoIHead,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(backbone=backbone, neck=neck, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.rpn = rpn
        self.roi_head = roi_head

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of a batch.

        Returns:
            losses: scalars to be summed: `rpn_objectness`, `rpn_box`, `roi_class`, `roi_box`.
            stats: scalars to be logged: `rpn_positives`, `roi_positives` (samples per image).
        """
        features = self.features(batch)
        # In this order: what autocast keeps of a weight that it met without gradients would have none later.
        rpn_losses, rpn_stats = self.rpn.losses(features, batch.targets, batch.seeds)
        proposals = self.rpn.predict(features, batch.sizes)
        roi_losses, roi_stats = self.roi_head.losses(features, proposals, batch.targets, batch.sizes, batch.seeds)
        return rpn_losses | roi_losses, rpn_stats | roi_stats

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Detections]:
        """Detections of each image, in the frame of the resized image. Call it in evaluation mode."""
        features = self.features(batch)
        return self.roi_head.predict(features, self.rpn.predict(features, batch.sizes), batch.sizes)

    @torch.no_grad()
    def propose(self, batch: Batch) -> Proposals:
        """Proposals of each image, in the frame of the resized image. Call it in evaluation mode."""
        return self.rpn.predict(self.features(batch), batch.sizes)


class ProposalNetwork(Pyramid):
    """An RPN alone, for proposals that are used elsewhere or measured by their recall.

    Args:
        backbone, neck, pixel_mean, pixel_std: as of `Pyramid`.
        rpn: pyramid -> proposals.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: nn.Module,
        rpn: RPN,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(backbone=backbone, neck=neck, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.rpn = rpn

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses `rpn_objectness`, `rpn_box` and statistics `rpn_positives` (per image) of a batch."""
        return self.rpn.losses(self.features(batch), batch.targets, batch.seeds)

    @torch.no_grad()
    def propose(self, batch: Batch) -> Proposals:
        """Proposals of each image, in the frame of the resized image. Call it in evaluation mode."""
        return self.rpn.predict(self.features(batch), batch.sizes)

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Detections]:
        """The proposals as detections of label 0 whose score is the objectness."""
        proposals = self.propose(batch)
        labels = torch.zeros_like(proposals.scores, dtype=torch.int64)
        counts = proposals.valid.sum(1).tolist()  # the valid ones come first
        return [
            Detections(boxes=proposals.boxes[i, :count], scores=proposals.scores[i, :count], labels=labels[i, :count])
            for i, count in enumerate(counts)
        ]


class FastRCNN(Pyramid):
    """A second stage alone, on proposals that come with the images (arXiv 1504.08083).

    Args:
        backbone, neck, pixel_mean, pixel_std: as of `Pyramid`.
        roi_head: pyramid and proposals -> detections.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: nn.Module,
        roi_head: RoIHead | CascadeRoIHead,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(backbone=backbone, neck=neck, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.roi_head = roi_head

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses `roi_class`, `roi_box` and statistics `roi_positives` (per image) of a batch."""
        features, proposals = self.features(batch), self.propose(batch)
        return self.roi_head.losses(features, proposals, batch.targets, batch.sizes, batch.seeds)

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Detections]:
        """Detections of each image, in the frame of the resized image. Call it in evaluation mode."""
        return self.roi_head.predict(self.features(batch), self.propose(batch), batch.sizes)

    def propose(self, batch: Batch) -> Proposals:
        """The proposals that the batch brings."""
        assert batch.proposals is not None, "build.py refuses data without proposals"
        return batch.proposals


DetectionModel = FasterRCNN | ProposalNetwork | FastRCNN
