"""Region Proposal Network over a pyramid (arXiv 1506.01497, section 3.1; arXiv 1612.03144, section 4.1).

One head serves all levels, or each has its own. Three verbs: `forward` computes, `loss` compares with samples,
`propose` decodes; `losses` and `predict` put them together, for training and for use.

Training needs the outputs of the sampled anchors only, 256 of some 100,000: their gradient is computed from the 3x3
cells around each, and the outputs of all anchors, which the proposals come from, need none. That saves the backward
pass of the head, a sixth of a training step, and its memory; losses and gradients are the same.

Dimensions: N images, A anchors (A_l of a level, A of all), S sampled anchors per image, P proposals per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, conv2d

from fpn_det import boxes as box_ops
from fpn_det.models.anchors import Anchors, level_shapes, locate
from fpn_det.models.box_loss import BoxLoss, box_loss
from fpn_det.models.matching import ANCHORS, match, noise, sample
from fpn_det.models.nms import nms_per_level
from fpn_det.models.norms import Conv2d
from fpn_det.structures import Proposals, Targets


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorLabels:
    """What the anchors of all levels are to the ground truth; those that are neither are ignored.

    Attributes:
        gt_index: (N, A) int64, the ground truth that each overlaps most; 0 where there is none.
        is_positive: (N, A) bool.
        is_negative: (N, A) bool.
    """

    gt_index: Tensor
    is_positive: Tensor
    is_negative: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorSamples:
    """The anchors that a step trains on.

    Attributes:
        index: (N, S) int64 into the anchors of all levels.
        is_positive: (N, S) bool.
        valid: (N, S) bool.
        anchors: (N, S, 4) float32 XYXY.
        gt_boxes: (N, S, 4) float32 XYXY, the matched ground truth; the anchor itself unless positive.
    """

    index: Tensor
    is_positive: Tensor
    valid: Tensor
    anchors: Tensor
    gt_boxes: Tensor


class RPNHead(nn.Module):
    """3x3 convolutions with ReLU, then an objectness logit and four deltas per anchor; one for all levels.

    Args:
        in_channels: of every level.
        num_anchors: per location.
        channels: of the 3x3 convolutions; `in_channels` if None.
        num_convs: how many of them.
    """

    def __init__(self, *, in_channels: int, num_anchors: int, channels: int | None = None, num_convs: int = 1) -> None:
        super().__init__()
        channels = channels or in_channels
        widths = [in_channels, *[channels] * num_convs]
        self.convs = nn.ModuleList(Conv2d(widths[i], channels, 3, padding=1) for i in range(num_convs))
        self.objectness = nn.Conv2d(widths[-1], num_anchors, kernel_size=1)
        self.deltas = nn.Conv2d(widths[-1], num_anchors * 4, kernel_size=1)
        for conv in (*self.convs, self.objectness, self.deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: (N, A_l) logits and (N, A_l, 4) deltas, in the order (row, column, anchor) of the anchors."""
        logits, deltas = [], []
        for x in features:
            for conv in self.convs:
                x = conv(x, relu=True)
            logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.deltas(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))
        return logits, deltas

    def at(self, features: Sequence[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs of some anchors, from the cells around them.

        Args:
            features: (N, C, h_i, w_i) per level.
            index: (N, S) int64 into the anchors of all levels.

        Returns:
            (N, S) logits and (N, S, 4) deltas.
        """
        n, s = index.shape
        place = locate(index, level_shapes(features), num_per_location=self.objectness.out_channels)
        radius = len(self.convs)
        around = torch.arange(-radius, radius + 1, device=index.device)
        rows, columns = place.row[:, :, None] + around, place.column[:, :, None] + around
        inside_rows = (rows >= 0) & (rows < place.height[:, :, None])
        inside_columns = (columns >= 0) & (columns < place.width[:, :, None])
        inside = (inside_rows[:, :, :, None] & inside_columns[:, :, None, :]).flatten(0, 1)[:, None]

        cells = torch.cat([f.permute(0, 2, 3, 1).flatten(1, 2) for f in features], dim=1)  # (N, cells, C)
        num_cells = cells.shape[1]
        first_of_row = place.level_start[:, :, None] + rows * place.width[:, :, None]
        cell = (first_of_row[:, :, :, None] + columns[:, :, None, :]).clamp(0, num_cells - 1)
        cell += num_cells * torch.arange(n, device=index.device)[:, None, None, None]
        x = cells.flatten(0, 1).index_select(0, cell.flatten())
        x = x.view(n * s, *cell.shape[2:], -1).permute(0, 3, 1, 2)  # (N * S, C, 2 * radius + 1, 2 * radius + 1)
        for conv in self.convs:
            x = conv2d(torch.where(inside, x, 0), conv.weight, conv.bias).relu_()  # type: ignore[arg-type]
            inside = inside[:, :, 1:-1, 1:-1]
        shape = place.shape.flatten()[:, None]
        logits = self.objectness(x).flatten(1).gather(1, shape)
        deltas = self.deltas(x).view(n * s, -1, 4).gather(1, shape[:, :, None].expand(-1, -1, 4))
        return logits.view(n, s), deltas.view(n, s, 4)


class UnsharedRPNHead(nn.Module):
    """A head of its own for each level (arXiv 1612.03144, section 4.1, last paragraph).

    Args:
        heads: one per level.
    """

    def __init__(self, heads: Sequence[RPNHead]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(heads)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """As of `RPNHead`."""
        outputs = [head([x]) for head, x in zip(self.levels, features, strict=True)]
        return [logits for (logits,), _ in outputs], [deltas for _, (deltas,) in outputs]

    def at(self, features: Sequence[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """As of `RPNHead`, but picked from the outputs of all anchors."""
        logits, deltas = self(features)
        return torch.cat(logits, 1).gather(1, index), torch.cat(deltas, 1).gather(
            1, index[:, :, None].expand(-1, -1, 4)
        )


class RPN(nn.Module):
    """Anchors, head, and what training and proposing need.

    Args:
        head: logits and deltas from features.
        anchors: one (A_l, 4) per level from the shapes of the features.
        positive_iou, negative_iou: anchors from / below this IoU are positive / negative; those between are ignored.
        min_match_iou: the best anchors of a ground truth are positive too if they overlap it by this much.
        num_samples, positive_fraction: anchors per image that a step trains on, and the largest share of positives.
        box_loss, smooth_l1_beta, box_loss_weight: kind of box loss, see `fpn_det.models.box_loss`, and its weight.
        delta_clamp: on which sides the predicted dw and dh are clamped.
        pre_nms_top_k_train, pre_nms_top_k_test: best anchors per level that enter NMS.
        post_nms_top_k_train, post_nms_top_k_test: P, proposals per image over all levels.
        nms_thresh: IoU of NMS, within each level.
        min_size: proposals must be wider and higher than this many pixels.
    """

    def __init__(
        self,
        *,
        head: RPNHead | UnsharedRPNHead,
        anchors: Anchors,
        positive_iou: float = 0.7,
        negative_iou: float = 0.3,
        min_match_iou: float = 0.0,
        num_samples: int = 256,
        positive_fraction: float = 0.5,
        box_loss: BoxLoss = "smooth_l1",
        smooth_l1_beta: float = 0.0,
        box_loss_weight: float = 1.0,
        delta_clamp: box_ops.DeltaClamp = "upper",
        pre_nms_top_k_train: int = 2000,
        pre_nms_top_k_test: int = 1000,
        post_nms_top_k_train: int = 1000,
        post_nms_top_k_test: int = 1000,
        nms_thresh: float = 0.7,
        min_size: float = 0.0,
    ) -> None:
        super().__init__()
        self.head = head
        self.anchors = anchors
        self.positive_iou = positive_iou
        self.negative_iou = negative_iou
        self.min_match_iou = min_match_iou
        self.num_samples = num_samples
        self.positive_fraction = positive_fraction
        self.box_loss = box_loss
        self.smooth_l1_beta = smooth_l1_beta
        self.box_loss_weight = box_loss_weight
        self.delta_clamp: box_ops.DeltaClamp = delta_clamp
        self.pre_nms_top_k = {True: pre_nms_top_k_train, False: pre_nms_top_k_test}
        self.post_nms_top_k = {True: post_nms_top_k_train, False: post_nms_top_k_test}
        self.nms_thresh = nms_thresh
        self.min_size = min_size

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level: (N, A_l) float32 logits, (N, A_l, 4) float32 deltas, (A_l, 4) float32 anchors."""
        logits, deltas = self.head(features)
        anchors = self.anchors(level_shapes(features))
        return [x.float() for x in logits], [x.float() for x in deltas], anchors

    def losses(
        self, features: Sequence[Tensor], targets: Targets, seeds: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses `rpn_objectness`, `rpn_box`, and statistics `rpn_positives` (per image) of a step.

        Args:
            features: (N, C, h_i, w_i) per level.
            targets: ground truth.
            seeds: (N,) int64, what the choice of anchors depends on.
        """
        samples = self.sample(self.anchors(level_shapes(features)), targets, seeds)
        logits, deltas = self.head.at(features, samples.index)
        return self.loss(logits.float(), deltas.float(), samples), {"rpn_positives": self.count_positives(samples)}

    @torch.no_grad()
    def predict(self, features: Sequence[Tensor], sizes: Tensor) -> Proposals:
        """The proposals in images of `sizes` (N, 2) without padding."""
        logits, deltas, anchors = self(features)
        return self.propose(logits, deltas, anchors, sizes)

    @torch.no_grad()
    def sample(self, anchors: Sequence[Tensor], targets: Targets, seeds: Tensor) -> AnchorSamples:
        """Match the anchors of all levels with the ground truth and choose some at random, by `seeds` (N,)."""
        all_anchors = torch.cat(list(anchors))
        labels = self.label(all_anchors, targets)
        index, is_positive, valid = sample(
            labels.is_positive,
            labels.is_negative,
            noise(seeds, len(all_anchors), salt=ANCHORS),
            num=self.num_samples,
            positive_fraction=self.positive_fraction,
        )
        sampled = gt_boxes = all_anchors[index]
        if targets.boxes.shape[1] > 0:
            gt_index = labels.gt_index.gather(1, index)
            gt_boxes = targets.boxes.gather(1, gt_index[:, :, None].expand(-1, -1, 4))
            gt_boxes = torch.where(is_positive[:, :, None], gt_boxes, sampled)
        return AnchorSamples(index=index, is_positive=is_positive, valid=valid, anchors=sampled, gt_boxes=gt_boxes)

    @torch.no_grad()
    def label(self, anchors: Tensor, targets: Targets) -> AnchorLabels:
        """Match `anchors` (A, 4) of all levels with the ground truth, without sampling."""
        matches = match(anchors, targets, min_best_iou=self.min_match_iou)
        positive = (matches.iou >= self.positive_iou) | matches.is_best
        negative = (matches.iou < self.negative_iou) & ~positive
        return AnchorLabels(gt_index=matches.gt_index, is_positive=positive, is_negative=negative)

    def count_positives(self, samples: AnchorSamples) -> Tensor:
        """Mean number of positives per image."""
        return samples.is_positive.sum(1).float().mean()

    def loss(self, logits: Tensor, deltas: Tensor, samples: AnchorSamples) -> dict[str, Tensor]:
        """Binary cross-entropy and box loss over the samples, both divided by N * `num_samples`.

        A constant divisor: an image with few samples weighs as little as it knows.

        Args:
            logits, deltas: (N, S) and (N, S, 4) float32, of the samples.
            samples: the anchors that they are of.
        """
        objectness = binary_cross_entropy_with_logits(
            logits, samples.is_positive.float(), weight=samples.valid.float(), reduction="sum"
        )
        box = box_loss(
            deltas,
            samples.anchors,
            samples.gt_boxes,
            samples.is_positive,
            kind=self.box_loss,
            beta=self.smooth_l1_beta,
            delta_clamp=self.delta_clamp,
        )
        divisor = self.num_samples * len(logits)
        return {"rpn_objectness": objectness / divisor, "rpn_box": self.box_loss_weight * box / divisor}

    @torch.no_grad()
    def propose(
        self, logits: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Sequence[Tensor], sizes: Tensor
    ) -> Proposals:
        """The best boxes after decoding, clipping and NMS within each level.

        The best anchors are selected before decoding, so only those are decoded.

        Args:
            logits, deltas, anchors: as from `forward`.
            sizes: (N, 2) (h, w) of the images without padding.
        """
        top_logits, top_deltas, top_anchors = [], [], []
        for logit, delta, anchor in zip(logits, deltas, anchors, strict=True):
            top_k = min(self.pre_nms_top_k[self.training], logit.shape[1])
            top_logit, index = logit.topk(top_k, dim=1)
            top_logits.append(top_logit)
            top_deltas.append(delta.gather(1, index[:, :, None].expand(-1, -1, 4)))
            top_anchors.append(anchor[index])
        all_logits = torch.cat(top_logits, 1)
        boxes = box_ops.decode(torch.cat(top_deltas, 1), torch.cat(top_anchors, 1), delta_clamp=self.delta_clamp)
        boxes = box_ops.clip(boxes, sizes[:, None])
        valid = box_ops.nonempty(boxes, self.min_size) & all_logits.isfinite()
        index, kept = nms_per_level(
            boxes,
            all_logits,
            valid,
            level_sizes=[x.shape[1] for x in top_logits],
            iou_thresh=self.nms_thresh,
            top_k=min(self.post_nms_top_k[self.training], boxes.shape[1]),
        )
        # Selected, not multiplied: padding repeats box 0, and NaN * 0 is NaN.
        return Proposals(
            boxes=torch.where(kept[:, :, None], boxes.gather(1, index[:, :, None].expand(-1, -1, 4)), 0),
            scores=torch.where(kept, all_logits.gather(1, index).sigmoid(), 0),
            valid=kept,
        )
