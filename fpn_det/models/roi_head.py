"""The second stage: classify and refine regions of interest (Fast R-CNN, arXiv 1504.08083; arXiv 1612.03144, 4.2).

Background is class K, the last; it exists only in this file.

Dimensions: N images, P proposals, G ground truth, S sampled RoIs per image, R = N * S, K classes, D features of a RoI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss, softmax

from fpn_det import boxes as box_ops
from fpn_det.models.matching import match, sample
from fpn_det.models.nms import grouped_nms
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.structures import Detections, Proposals, Targets


@dataclass(frozen=True, kw_only=True, slots=True)
class RoISamples:
    """The regions that a step trains on.

    Attributes:
        boxes: (N, S, 4) float32 XYXY.
        labels: (N, S) int64, 0..K-1 for positives, K for background.
        gt_boxes: (N, S, 4) float32 XYXY, the matched ground truth; zeros unless positive.
        valid: (N, S) bool; False where there were not enough regions.
    """

    boxes: Tensor
    labels: Tensor
    gt_boxes: Tensor
    valid: Tensor


class TwoFCHead(nn.Sequential):
    """Two fully connected layers with ReLU: (R, C, size, size) -> (R, D).

    Args:
        in_channels: C.
        pool_size: height and width of the pooled features.
        fc_dim: D.
    """

    def __init__(self, *, in_channels: int, pool_size: int, fc_dim: int) -> None:
        fc1, fc2 = nn.Linear(in_channels * pool_size**2, fc_dim), nn.Linear(fc_dim, fc_dim)
        for fc in (fc1, fc2):
            nn.init.kaiming_uniform_(fc.weight, a=1)
            nn.init.zeros_(fc.bias)
        super().__init__(nn.Flatten(), fc1, nn.ReLU(), fc2, nn.ReLU())


class RoIHead(nn.Module):
    """Pooling, box head, class logits and box deltas.

    Args:
        pooler: features of each RoI.
        box_head: (R, C, size, size) -> (R, fc_dim).
        fc_dim: D.
        num_classes: K.
        positive_iou: RoIs from this IoU on are positive, all others background.
        num_samples, positive_fraction: RoIs per image that a step trains on, and the largest share of positives.
        class_agnostic: whether all classes share one set of four deltas.
        box_weights: multipliers of the encoded deltas.
        smooth_l1_beta: where the box loss turns from quadratic to linear; 0 is L1.
        score_thresh: detections must score more.
        nms_thresh: IoU of NMS, within each class.
        detections_per_image: the most that are kept.
        min_size: detections must be wider and higher than this many pixels.
    """

    def __init__(
        self,
        *,
        pooler: MultiLevelRoIAlign,
        box_head: nn.Module,
        fc_dim: int,
        num_classes: int,
        positive_iou: float = 0.5,
        num_samples: int = 512,
        positive_fraction: float = 0.25,
        class_agnostic: bool = False,
        box_weights: box_ops.Weights = (10.0, 10.0, 5.0, 5.0),
        smooth_l1_beta: float = 0.0,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_image: int = 100,
        min_size: float = 0.0,
    ) -> None:
        super().__init__()
        self.pooler = pooler
        self.box_head = box_head
        self.class_logits = nn.Linear(fc_dim, num_classes + 1)
        self.box_deltas = nn.Linear(fc_dim, 4 if class_agnostic else 4 * num_classes)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.box_deltas.weight, std=0.001)
        nn.init.zeros_(self.class_logits.bias)
        nn.init.zeros_(self.box_deltas.bias)
        self.num_classes = num_classes
        self.positive_iou = positive_iou
        self.num_samples = num_samples
        self.positive_fraction = positive_fraction
        self.box_weights = box_weights
        self.smooth_l1_beta = smooth_l1_beta
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_image = detections_per_image
        self.min_size = min_size

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets) -> RoISamples:
        """Match proposals and ground-truth boxes with the ground truth and choose some at random.

        The ground-truth boxes are candidates too, so that the head sees positives before the RPN finds them.
        """
        boxes = torch.cat([proposals.boxes, targets.boxes], dim=1)
        usable = torch.cat([proposals.valid, targets.valid], dim=1)
        matches = match(boxes, targets)
        positive = (matches.iou >= self.positive_iou) & usable
        index, is_positive, valid = sample(
            positive, usable & ~positive, num=self.num_samples, positive_fraction=self.positive_fraction
        )
        boxes = boxes.gather(1, index[:, :, None].expand(-1, -1, 4))
        if targets.boxes.shape[1] == 0:
            labels, gt_boxes = torch.full_like(index, self.num_classes), torch.zeros_like(boxes)
        else:
            gt_index = matches.gt_index.gather(1, index)
            labels = torch.where(is_positive, targets.labels.gather(1, gt_index), self.num_classes)
            gt_boxes = targets.boxes.gather(1, gt_index[:, :, None].expand(-1, -1, 4)) * is_positive[:, :, None]
        return RoISamples(boxes=boxes * valid[:, :, None], labels=labels, gt_boxes=gt_boxes, valid=valid)

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and deltas of each box.

        Args:
            features: (N, C, h_i, w_i) per level.
            boxes: (N, S, 4) float32 XYXY.

        Returns:
            logits: (N, S, K + 1) float32, background last.
            deltas: (N, S, K, 4) float32, or (N, S, 1, 4) if class-agnostic.
        """
        n, s = boxes.shape[:2]
        hidden = self.box_head(self.pooler(features, boxes))
        logits, deltas = self.class_logits(hidden), self.box_deltas(hidden)
        return logits.float().view(n, s, self.num_classes + 1), deltas.float().view(n, s, deltas.shape[1] // 4, 4)

    def loss(self, logits: Tensor, deltas: Tensor, samples: RoISamples) -> dict[str, Tensor]:
        """Cross-entropy and (smooth) L1 of the positives, both divided by the number of sampled RoIs."""
        num_sampled = samples.valid.sum().clamp(min=1)
        labels = torch.where(samples.valid, samples.labels, -100)  # cross_entropy ignores -100
        classification = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        is_positive = samples.valid & (samples.labels < self.num_classes)
        delta_index = samples.labels.clamp(max=deltas.shape[2] - 1)[:, :, None, None].expand(-1, -1, 1, 4)
        pred = deltas.gather(2, delta_index).squeeze(2)
        target = box_ops.encode(samples.gt_boxes, samples.boxes, self.box_weights)
        target = torch.where(is_positive[:, :, None], target, 0)
        box = smooth_l1_loss(pred, target, beta=self.smooth_l1_beta, reduction="none")
        box = (box * is_positive[:, :, None]).sum()
        return {"roi_class": classification / num_sampled, "roi_box": box / num_sampled}

    @torch.no_grad()
    def predict(self, features: Sequence[Tensor], proposals: Proposals, sizes: Tensor) -> list[Detections]:
        """Detections of each image.

        Args:
            features: (N, C, h_i, w_i) per level.
            proposals: regions to classify.
            sizes: (N, 2) (h, w) of the images without padding.

        Returns:
            N detections in the frame of the features' images.
        """
        logits, deltas = self(features, proposals.boxes)
        scores = softmax(logits, dim=-1)[..., :-1]  # (N, P, K)
        boxes = box_ops.decode(deltas, proposals.boxes[:, :, None], self.box_weights)
        boxes = box_ops.clip(boxes, sizes[:, None, None]).expand(-1, -1, self.num_classes, -1)
        valid = (scores > self.score_thresh) & proposals.valid[:, :, None] & box_ops.nonempty(boxes, self.min_size)
        labels = torch.arange(self.num_classes, device=scores.device).expand_as(scores)
        boxes, scores, labels, valid = (x.flatten(1, 2) for x in (boxes, scores, labels, valid))
        index, kept = grouped_nms(
            boxes, scores, labels, valid, iou_thresh=self.nms_thresh, top_k=self.detections_per_image
        )
        keep = [index[i, kept[i]] for i in range(len(boxes))]
        return [Detections(boxes=boxes[i, k], scores=scores[i, k], labels=labels[i, k]) for i, k in enumerate(keep)]
