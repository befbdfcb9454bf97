"""The second stage: classify and refine regions of interest (Fast R-CNN, arXiv 1504.08083; arXiv 1612.03144, 4.2).

`RoIHead` is one classifier, `CascadeRoIHead` several in a row. Background is class K, the last; it exists only in this
file.

Dimensions: N images, P proposals, G ground truth, S sampled RoIs per image, R = N * S, K classes, D features of a RoI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, linear, softmax

from fpn_det import boxes as box_ops
from fpn_det.models.backbone import Layer4
from fpn_det.models.box_loss import BoxLoss, box_loss
from fpn_det.models.matching import GROUND_TRUTH, PROPOSALS, match, noise, sample
from fpn_det.models.nms import best, nms_per_class
from fpn_det.models.norms import Norm, conv_norm
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


class ConvFCHead(nn.Module):
    """3x3 convolutions, then fully connected layers, all with ReLU: (R, C, size, size) -> (R, D).

    Two fully connected layers are FPN's head; four convolutions and one layer that of arXiv 1803.08494.

    Args:
        in_channels: C.
        pool_size: height and width of the pooled features.
        num_convs, conv_channels: number and channels of the convolutions.
        num_fcs, fc_dim: number and width of the fully connected layers.
        norm: normalisation of the convolutions.

    Attributes:
        out_channels: D.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        pool_size: int,
        fc_dim: int,
        num_fcs: int = 2,
        num_convs: int = 0,
        conv_channels: int = 256,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[conv_channels] * num_convs]
        self.convs = nn.ModuleList(conv_norm(widths[i], widths[i + 1], 3, norm=norm) for i in range(num_convs))
        for module in self.convs.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        dims = [widths[-1] * pool_size**2, *[fc_dim] * num_fcs]
        fcs = [nn.Linear(dims[i], dims[i + 1]) for i in range(num_fcs)]
        for fc in fcs:
            nn.init.kaiming_uniform_(fc.weight, a=1)
            nn.init.zeros_(fc.bias)
        self.fcs = nn.ModuleList(fcs)
        self.out_channels = dims[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, size, size) -> (R, D)."""
        for conv in self.convs:
            x = conv(x).relu()
        for i, fc in enumerate(self.fcs):
            x = (linear_of_features(fc, x) if i == 0 else fc(x)).relu()
        return x.flatten(1)


def linear_of_features(fc: nn.Module, x: Tensor) -> Tensor:
    """`fc(x.flatten(1))` of (R, C, size, size) features.

    In float32 on CPUs as a convolution: channels-last features need no copy, and AMD processors use all of their vector
    units, of which the matrix product of Intel's library uses half (1.4 times as fast for 1024 RoIs, the backward pass
    included; below 512 RoIs, reordering the weights costs more than that gains).
    """
    assert isinstance(fc, nn.Linear)
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if on_cpu and len(x) >= 512:
        return conv2d(x, fc.weight.view(-1, *x.shape[1:]), fc.bias).flatten(1)
    return linear(x.flatten(1), fc.weight, fc.bias)


class Res5Head(Layer4):
    """The body's last stage on RoIs of C4, averaged over the cells (arXiv 1512.03385, appendix A)."""

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, size, size) -> (R, D)."""
        return super().forward(x).mean(dim=(2, 3))


class RoIHead(nn.Module):
    """Pooling, box head, class logits and box deltas.

    Args:
        pooler: features of each RoI.
        box_head: (R, C, size, size) -> (R, D), with `out_channels` D.
        num_classes: K.
        background_rows: rows of the classifier that mean background: 1, or more for weights of torchvision, whose
            classifier has rows for category ids that COCO does not use.
        positive_iou: RoIs from this IoU on are positive, all others background.
        num_samples, positive_fraction: RoIs per image that a step trains on, and the largest share of positives.
        class_agnostic: whether all classes share one set of four deltas.
        box_weights: multipliers of the encoded deltas.
        box_loss, smooth_l1_beta, box_loss_weight: kind of box loss, see `fpn_det.models.box_loss`, and its weight.
        delta_clamp: on which sides the predicted dw and dh are clamped.
        score_thresh: detections must score more.
        nms_thresh: IoU of NMS, within each class.
        detections_per_image: the most that are kept.
        min_size: detections must be wider and higher than this many pixels; None: they must have an area, but those
            without take part in NMS and count among `detections_per_image` (as in Detectron2).
    """

    def __init__(
        self,
        *,
        pooler: MultiLevelRoIAlign,
        box_head: ConvFCHead | Res5Head,
        num_classes: int,
        background_rows: int = 1,
        positive_iou: float = 0.5,
        num_samples: int = 512,
        positive_fraction: float = 0.25,
        class_agnostic: bool = False,
        box_weights: box_ops.Weights = (10.0, 10.0, 5.0, 5.0),
        box_loss: BoxLoss = "smooth_l1",
        smooth_l1_beta: float = 0.0,
        box_loss_weight: float = 1.0,
        delta_clamp: box_ops.DeltaClamp = "upper",
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_image: int = 100,
        min_size: float | None = 0.0,
    ) -> None:
        super().__init__()
        self.pooler = pooler
        self.box_head = box_head
        self.class_logits = nn.Linear(box_head.out_channels, num_classes + background_rows)
        self.box_deltas = nn.Linear(box_head.out_channels, 4 if class_agnostic else 4 * num_classes)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.box_deltas.weight, std=0.001)
        nn.init.zeros_(self.class_logits.bias)
        nn.init.zeros_(self.box_deltas.bias)
        self.num_classes = num_classes
        self.positive_iou = positive_iou
        self.num_samples = num_samples
        self.positive_fraction = positive_fraction
        self.box_weights = box_weights
        self.box_loss = box_loss
        self.smooth_l1_beta = smooth_l1_beta
        self.box_loss_weight = box_loss_weight
        self.delta_clamp: box_ops.DeltaClamp = delta_clamp
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_image = detections_per_image
        self.min_size = min_size

    def losses(
        self, features: Sequence[Tensor], proposals: Proposals, targets: Targets, sizes: Tensor, seeds: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses `roi_class`, `roi_box` and statistics `roi_positives` (per image) of a step.

        Args:
            features: (N, C, h_i, w_i) per level.
            proposals: regions to sample from.
            targets: ground truth.
            sizes: (N, 2) (h, w) of the images without padding.
            seeds: (N,) int64, what the choice of RoIs depends on.
        """
        samples = self.sample(proposals, targets, seeds)
        logits, deltas = self(features, samples.boxes)
        return self.loss(logits, deltas, samples), {"roi_positives": self.count_positives(samples)}

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets, seeds: Tensor) -> RoISamples:
        """Match proposals and ground-truth boxes with the ground truth and choose some at random, by `seeds` (N,).

        The ground-truth boxes are candidates too, so that the head sees positives before the RPN finds them.
        """
        boxes = torch.cat([proposals.boxes, targets.boxes], dim=1)
        usable = torch.cat([proposals.valid, targets.valid], dim=1)
        every = self.label(boxes, usable, targets)
        positive = usable & (every.labels < self.num_classes)
        # Each kind draws for itself: how many there are of the other depends on the other images of the batch.
        draws = [
            noise(seeds, proposals.boxes.shape[1], salt=PROPOSALS),
            noise(seeds, targets.boxes.shape[1], salt=GROUND_TRUTH),
        ]
        index, _, valid = sample(
            positive,
            usable & ~positive,
            torch.cat(draws, dim=1),
            num=self.num_samples,
            positive_fraction=self.positive_fraction,
        )
        box_index = index[:, :, None].expand(-1, -1, 4)
        return RoISamples(
            boxes=boxes.gather(1, box_index) * valid[:, :, None],
            labels=torch.where(valid, every.labels.gather(1, index), self.num_classes),
            gt_boxes=every.gt_boxes.gather(1, box_index) * valid[:, :, None],
            valid=valid,
        )

    @torch.no_grad()
    def label(self, boxes: Tensor, valid: Tensor, targets: Targets) -> RoISamples:
        """Match all of `boxes` (N, S, 4) with the ground truth, without sampling; `valid` (N, S) says which count."""
        matches = match(boxes, targets)
        is_positive = (matches.iou >= self.positive_iou) & valid
        if targets.boxes.shape[1] == 0:
            labels, gt_boxes = torch.full_like(matches.gt_index, self.num_classes), torch.zeros_like(boxes)
        else:
            labels = torch.where(is_positive, targets.labels.gather(1, matches.gt_index), self.num_classes)
            gt_boxes = targets.boxes.gather(1, matches.gt_index[:, :, None].expand(-1, -1, 4))
            gt_boxes = gt_boxes * is_positive[:, :, None]
        return RoISamples(boxes=boxes, labels=labels, gt_boxes=gt_boxes, valid=valid)

    def count_positives(self, samples: RoISamples) -> Tensor:
        """Mean number of positives per image."""
        return (samples.labels < self.num_classes).sum(1).float().mean()

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and deltas of each box.

        Args:
            features: (N, C, h_i, w_i) per level.
            boxes: (N, S, 4) float32 XYXY.

        Returns:
            logits: (N, S, K + background_rows) float32, background last.
            deltas: (N, S, K, 4) float32, or (N, S, 1, 4) if class-agnostic.
        """
        n, s = boxes.shape[:2]
        hidden = self.box_head(self.pooler(features, boxes))
        logits, deltas = self.class_logits(hidden), self.box_deltas(hidden)
        return logits.float().unflatten(0, (n, s)), deltas.float().view(n, s, deltas.shape[1] // 4, 4)

    def loss(self, logits: Tensor, deltas: Tensor, samples: RoISamples) -> dict[str, Tensor]:
        """Cross-entropy, and box loss of the positives, both divided by N * `num_samples`.

        A constant divisor, as of the RPN: the number of RoIs that there are, where an image has fewer, would weigh the
        images of each process and micro-batch differently.
        """
        labels = torch.where(samples.valid, samples.labels, -100)  # cross_entropy ignores -100
        classification = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        is_positive = samples.valid & (samples.labels < self.num_classes)
        delta_index = samples.labels.clamp(max=deltas.shape[2] - 1)[:, :, None, None].expand(-1, -1, 1, 4)
        pred = deltas.gather(2, delta_index).squeeze(2)
        box = box_loss(
            pred,
            samples.boxes,
            samples.gt_boxes,
            is_positive,
            kind=self.box_loss,
            beta=self.smooth_l1_beta,
            weights=self.box_weights,
            delta_clamp=self.delta_clamp,
        )
        divisor = self.num_samples * len(logits)
        return {"roi_class": classification / divisor, "roi_box": self.box_loss_weight * box / divisor}

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
        return self.select(self.scores(logits), self.decode(deltas, proposals.boxes, sizes), proposals.valid)

    def scores(self, logits: Tensor) -> Tensor:
        """(N, S, K + background_rows) logits -> (N, S, K) probabilities of the classes."""
        return softmax(logits, dim=-1)[..., : self.num_classes]

    def decode(self, deltas: Tensor, boxes: Tensor, sizes: Tensor) -> Tensor:
        """(N, S, K or 1, 4) deltas of (N, S, 4) boxes -> (N, S, K or 1, 4) boxes, clipped to the images."""
        decoded = box_ops.decode(deltas, boxes[:, :, None], self.box_weights, delta_clamp=self.delta_clamp)
        return box_ops.clip(decoded, sizes[:, None, None])

    def select(self, scores: Tensor, boxes: Tensor, valid: Tensor) -> list[Detections]:
        """Threshold, NMS within each class, and the best `detections_per_image`.

        Args:
            scores: (N, P, K).
            boxes: (N, P, K or 1, 4) XYXY.
            valid: (N, P) bool, which proposals count.
        """
        boxes = boxes.expand(-1, -1, self.num_classes, -1)
        min_size = -torch.inf if self.min_size is None else self.min_size  # which NaN does not exceed either
        kept = (scores > self.score_thresh) & valid[:, :, None] & box_ops.nonempty(boxes, min_size)
        labels = torch.arange(self.num_classes, device=scores.device).expand_as(scores)
        boxes, scores, labels, kept = (x.flatten(1, 2) for x in (boxes, scores, labels, kept))
        index, kept = nms_per_class(
            boxes, scores, labels, kept, iou_thresh=self.nms_thresh, top_k=self.detections_per_image
        )
        if self.min_size is None:
            kept = kept & box_ops.nonempty(boxes.gather(1, index[:, :, None].expand(-1, -1, 4)))
            position, kept = best(scores.gather(1, index), kept, top_k=index.shape[1])
            index = index.gather(1, position)
        boxes = boxes.gather(1, index[:, :, None].expand(-1, -1, 4))
        scores, labels = scores.gather(1, index), labels.gather(1, index)
        counts = kept.sum(1).tolist()  # waits for the device, once for all images
        return [
            Detections(boxes=boxes[i, :count], scores=scores[i, :count], labels=labels[i, :count])
            for i, count in enumerate(counts)
        ]


class CascadeRoIHead(nn.Module):
    """Heads in a row, each trained on the boxes that the one before refined, at a higher IoU (arXiv 1712.00726).

    Args:
        stages: the heads; the last one's thresholds select the detections.
        loss_weights: of the stages.
    """

    def __init__(self, *, stages: Sequence[RoIHead], loss_weights: Sequence[float]) -> None:
        super().__init__()
        assert len(stages) == len(loss_weights)
        self.stages = nn.ModuleList(stages)
        self.loss_weights = tuple(loss_weights)

    @property
    def heads(self) -> list[RoIHead]:
        """The stages."""
        return list(self.stages)  # type: ignore[arg-type]

    def losses(
        self, features: Sequence[Tensor], proposals: Proposals, targets: Targets, sizes: Tensor, seeds: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As of `RoIHead`, for each stage: `roi_class_1`, ..."""
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        samples = self.heads[0].sample(proposals, targets, seeds)
        for i, (head, weight) in enumerate(zip(self.heads, self.loss_weights, strict=True), start=1):
            logits, deltas = head(features, samples.boxes)
            losses |= {f"{k}_{i}": weight * loss for k, loss in head.loss(logits, deltas, samples).items()}
            stats[f"roi_positives_{i}"] = head.count_positives(samples)
            if i < len(self.heads):  # sampled once: the next stage trains on all of the refined boxes
                boxes = self.refine(head, logits, deltas, samples.boxes, sizes)
                samples = self.heads[i].label(boxes, samples.valid & box_ops.nonempty(boxes), targets)
        return losses, stats

    @torch.no_grad()
    def predict(self, features: Sequence[Tensor], proposals: Proposals, sizes: Tensor) -> list[Detections]:
        """Detections of each image: the boxes of the last stage, the mean scores of all (section 4.1).

        Args and result as of `RoIHead.predict`.
        """
        boxes, scores = proposals.boxes, []
        for head in self.heads:
            reference = boxes
            logits, deltas = head(features, reference)
            scores.append(head.scores(logits))
            boxes = self.refine(head, logits, deltas, reference, sizes)
        decoded = head.decode(deltas, reference, sizes)
        return head.select(torch.stack(scores).mean(0), decoded, proposals.valid)

    @staticmethod
    @torch.no_grad()
    def refine(head: RoIHead, logits: Tensor, deltas: Tensor, boxes: Tensor, sizes: Tensor) -> Tensor:
        """(N, S, 4) boxes of the likeliest class (background aside) for the next stage, detached; zeros if empty."""
        likeliest = logits[..., : head.num_classes].argmax(-1).clamp(max=deltas.shape[2] - 1)
        index = likeliest[:, :, None, None].expand(-1, -1, 1, 4)
        refined = head.decode(deltas.gather(2, index), boxes, sizes).squeeze(2)
        # NaN of a diverged stage counts as empty: the pooler cannot place it, and the losses report it.
        return torch.where(box_ops.nonempty(refined)[:, :, None], refined, 0)
