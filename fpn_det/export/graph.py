"""A trained detector as one graph of standard operators: whole images in, boxes, scores and labels out.

The detections of `FasterRCNN.predict`, resizing before it and mapping back after it included, said in another way.
There, training and eager detection are written for speed; here, nothing in Python may depend on a value or a size,
since exporters record one run. So every number of boxes is a constant of the model: a level with fewer anchors is
padded, and what is missing is marked, not cut off. Trained layers, anchors, decoding, scores and thresholds are the
detector's own.

Dimensions: N images of one size H x W, L levels, T best anchors of a level, P proposals, K classes, D detections per
image, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.ops import roi_align

from fpn_det import boxes as box_ops
from fpn_det.export.resize import Resize
from fpn_det.models.faster_rcnn import FasterRCNN, ProposalNetwork
from fpn_det.models.nms import best
from fpn_det.models.roi_head import CascadeRoIHead, ConvFCHead, Res5Head, RoIHead
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.models.rpn import RPN
from fpn_det.structures import Proposals


class Suppress(Protocol):
    """Greedy NMS of many problems at once, in the operators of a format."""

    def __call__(self, boxes: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
        """Which boxes stay.

        Args:
            boxes: (M, B, 4) float32 XYXY.
            scores: (M, B) float32; -inf marks boxes that do not take part.
            iou_thresh: a box is dropped if it overlaps a better one of the same problem by more.

        Returns:
            (M, B) bool.
        """


class DetectorGraph(nn.Module):
    """What is exported.

    Args:
        model: the detector, in evaluation mode, in float32.
        resize: images as they are -> images as the detector takes them.
        suppress: NMS in the operators of a format.
    """

    def __init__(self, model: FasterRCNN | ProposalNetwork, *, resize: Resize, suppress: Suppress) -> None:
        super().__init__()
        self.model = model
        self.resize = resize
        self.suppress = suppress

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: (N, 3, H, W) uint8, RGB.

        Returns:
            boxes: (N, D, 4) float32 XYXY in pixels of `images`, by descending score; zeros where there are no more.
            scores: (N, D) float32 in 0..1; zeros where there are no more.
            labels: (N, D) int64, 0..K-1; -1 where there are no more.
        """
        pixels, size, original_size = self.resize(images)
        features = self.model.neck(self.model.backbone(self.normalize(pixels, size)))
        proposals = self.propose(self.model.rpn, features, size)
        if isinstance(self.model, ProposalNetwork):
            boxes, scores, kept = proposals.boxes, proposals.scores, proposals.valid
            labels = torch.zeros_like(scores, dtype=torch.int64)
        else:
            boxes, scores, labels, kept = self.detect(self.model.roi_head, features, proposals, size)
        boxes = box_ops.rescale(boxes, size, original_size)
        return torch.where(kept[:, :, None], boxes, 0), torch.where(kept, scores, 0), torch.where(kept, labels, -1)

    def normalize(self, pixels: Tensor, size: Tensor) -> Tensor:
        """As of `Pyramid`: (N, 3, H', W') float32 in 0..255 -> normalised, the padding beyond `size` 0."""
        normalized = (pixels - self.model.pixel_mean) / self.model.pixel_std
        rows = torch.arange(pixels.shape[2], device=pixels.device)[:, None] < size[0]
        columns = torch.arange(pixels.shape[3], device=pixels.device) < size[1]
        return torch.where(rows & columns, normalized, 0)

    def propose(self, rpn: RPN, features: Sequence[Tensor], size: Tensor) -> Proposals:
        """As of `RPN.predict`, but T is the same for all levels."""
        top_k = rpn.pre_nms_top_k[False]
        level_boxes, level_logits = [], []
        for logits, deltas, anchors in zip(*rpn(features), strict=True):
            top_logits, index = pad(logits, (0, top_k), value=-torch.inf).topk(top_k, dim=1)
            top_deltas = pad(deltas, (0, 0, 0, top_k)).gather(1, index[:, :, None].expand(-1, -1, 4))
            top_anchors = pad(anchors, (0, 0, 0, top_k))[index]
            boxes = box_ops.decode(top_deltas, top_anchors, delta_clamp=rpn.delta_clamp)
            level_boxes.append(box_ops.clip(boxes, size))
            level_logits.append(top_logits)
        boxes, logits = torch.stack(level_boxes, 1), torch.stack(level_logits, 1)  # (N, L, T, 4), (N, L, T)
        valid = box_ops.nonempty(boxes, rpn.min_size) & logits.isfinite()
        logits = torch.where(valid, logits, -torch.inf)
        stays = self.suppress(boxes.flatten(0, 1), logits.flatten(0, 1), rpn.nms_thresh)
        boxes, logits = boxes.flatten(1, 2), logits.flatten(1, 2)
        index, kept = best(logits, stays.view(logits.shape), top_k=rpn.post_nms_top_k[False])
        return Proposals(
            boxes=torch.where(kept[:, :, None], boxes.gather(1, index[:, :, None].expand(-1, -1, 4)), 0),
            scores=torch.where(kept, logits.gather(1, index).sigmoid(), 0),
            valid=kept,
        )

    def detect(
        self, roi_head: RoIHead | CascadeRoIHead, features: Sequence[Tensor], proposals: Proposals, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As of `RoIHead.predict` and `CascadeRoIHead.predict`.

        Returns:
            (N, D, 4) boxes in the resized image, (N, D) scores, labels, and whether there is such a detection.
        """
        sizes = size[None]
        stages = roi_head.heads if isinstance(roi_head, CascadeRoIHead) else [roi_head]
        boxes, stage_scores = proposals.boxes, []
        for i, head in enumerate(stages):
            logits, deltas = classify(head, features, boxes)
            stage_scores.append(head.scores(logits))
            if i + 1 < len(stages):
                boxes = CascadeRoIHead.refine(head, logits, deltas, boxes, sizes)
        return self.select(head, torch.stack(stage_scores).mean(0), head.decode(deltas, boxes, sizes), proposals.valid)

    def select(
        self, head: RoIHead, scores: Tensor, boxes: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As of `RoIHead.select`: scores (N, P, K), boxes (N, P, K or 1, 4), valid (N, P); returns as of `detect`."""
        boxes = boxes.expand(-1, -1, head.num_classes, -1)
        min_size = -torch.inf if head.min_size is None else head.min_size
        takes_part = (scores > head.score_thresh) & valid[:, :, None] & box_ops.nonempty(boxes, min_size)
        candidates = torch.where(takes_part, scores, -torch.inf)
        stays = self.suppress(boxes.transpose(1, 2).flatten(0, 1), candidates.mT.flatten(0, 1), head.nms_thresh)
        stays = stays.view(-1, head.num_classes, scores.shape[1]).mT  # (N * K, P) -> (N, P, K)
        labels = torch.arange(head.num_classes, device=scores.device).expand_as(scores)
        boxes, scores, labels, stays = (x.flatten(1, 2) for x in (boxes, scores, labels, stays))
        index, kept = best(scores, stays, top_k=head.detections_per_image)
        if head.min_size is None:
            kept = kept & box_ops.nonempty(boxes.gather(1, index[:, :, None].expand(-1, -1, 4)))
            position, kept = best(scores.gather(1, index), kept, top_k=index.shape[1])
            index = index.gather(1, position)
        boxes = boxes.gather(1, index[:, :, None].expand(-1, -1, 4))
        return boxes, scores.gather(1, index), labels.gather(1, index), kept


def classify(head: RoIHead, features: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
    """As of `RoIHead.forward`: (N, P, 4) boxes -> (N, P, K + background_rows) logits, (N, P, K or 1, 4) deltas."""
    n, p = boxes.shape[:2]
    hidden = describe(head.box_head, pool(head.pooler, features, boxes))
    return head.class_logits(hidden).view(n, p, -1), head.box_deltas(hidden).view(n, p, -1, 4)


def describe(box_head: ConvFCHead | Res5Head, x: Tensor) -> Tensor:
    """As `box_head`, which chooses how to multiply by the number of RoIs: (R, C, size, size) -> (R, features)."""
    if isinstance(box_head, Res5Head):
        out: Tensor = box_head(x)
        return out
    for conv in box_head.convs:
        x = conv(x).relu()
    x = x.flatten(1)
    for fc in box_head.fcs:
        x = fc(x).relu()
    return x


def pool(pooler: MultiLevelRoIAlign, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """As of `MultiLevelRoIAlign.forward`: RoIAlign of each level on its own RoIs."""
    n, p = boxes.shape[:2]
    image = torch.arange(n, device=boxes.device, dtype=boxes.dtype)[:, None, None].expand(n, p, 1)
    rois = torch.cat([image, boxes], dim=2).flatten(0, 1)
    level = pooler.assign_levels(boxes).flatten()
    shape = (n * p, features[0].shape[1], pooler.output_size, pooler.output_size)
    pooled = torch.zeros(shape, device=boxes.device, dtype=boxes.dtype)
    for i, stride in enumerate(pooler.strides):
        index = (level == i).nonzero().squeeze(1)
        of_level = roi_align(
            features[i],
            rois[index],
            output_size=pooler.output_size,
            spatial_scale=1 / stride,
            sampling_ratio=pooler.sampling_ratio,
            aligned=pooler.aligned,
        )
        pooled = pooled.index_put((index,), of_level)
    return pooled
