"""What a training step sees of each image: boxes after augmentation, the anchors and the RoIs that it trains on.

Both are asked of the stages themselves (`RPN.label`, `RPN.sample`, `RoIHead.sample`), with the seeds of the batch, so
they are those of the losses.

In pictures a level has one colour; a box is a positive, a disc the centre of a negative, a ring that of an anchor that
is ignored.

Dimensions: N images, G ground-truth boxes of one image, A anchors of all levels, S sampled RoIs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fpn_det.draw import Color, class_color, draw_boxes, draw_points, draw_title
from fpn_det.models.roi_head import CascadeRoIHead, RoIHead
from fpn_det.models.rpn import RPN
from fpn_det.structures import Batch, Proposals

LEVEL_COLORS: tuple[Color, ...] = ((86, 180, 233), (0, 158, 115), (240, 228, 66), (230, 159, 0), (204, 121, 167))
"""Fine to coarse; Okabe and Ito's, which colour-blind readers tell apart."""

WHITE: Color = (255, 255, 255)
BLACK: Color = (0, 0, 0)
ALARM: Color = (255, 0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorView:
    """The anchors of one image in one step, on the CPU.

    Attributes:
        anchors: (A, 4) float32 XYXY, in pixels of the padded image.
        level: (A,) int64, fine to coarse.
        positive, negative: (A,) bool, those that the step trains on.
        ignored: (A,) bool, those that overlap a box too much for a negative and too little for a positive.
        positives_of_gt: (G,) int64, positive anchors of each box, sampled or not; 0 means that the RPN does not learn
            to find this box.
    """

    anchors: Tensor
    level: Tensor
    positive: Tensor
    negative: Tensor
    ignored: Tensor
    positives_of_gt: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RoIView:
    """The sampled RoIs of one image in one step, on the CPU.

    Attributes:
        boxes: (S, 4) float32 XYXY, in pixels of the padded image.
        level: (S,) int64, the level that each is pooled from, fine to coarse.
        is_positive: (S,) bool.
    """

    boxes: Tensor
    level: Tensor
    is_positive: Tensor


@torch.no_grad()
def anchor_views(rpn: RPN, batch: Batch) -> list[AnchorView]:
    """What the anchors are to each image of a batch; needs no weights.

    Args:
        rpn: the first stage.
        batch: of the training loader.
    """
    height, width = batch.images.shape[-2:]
    anchors = rpn.anchors([(-(-height // stride), -(-width // stride)) for stride in rpn.anchors.strides])
    counts = torch.tensor([len(level) for level in anchors])
    labels = rpn.label(torch.cat(anchors), batch.targets)
    samples = rpn.sample(anchors, batch.targets, batch.seeds)
    level = torch.arange(len(counts)).repeat_interleave(counts)
    everywhere = torch.cat(anchors).cpu()
    num_boxes = batch.targets.valid.sum(1).tolist()
    views = []
    for i in range(len(batch.images)):
        index, is_positive, valid = (x[i].cpu() for x in (samples.index, samples.is_positive, samples.valid))
        positive, negative = torch.zeros(2, len(level), dtype=torch.bool).unbind()
        positive[index[valid & is_positive]] = True
        negative[index[valid & ~is_positive]] = True
        all_positive, all_negative = labels.is_positive[i].cpu(), labels.is_negative[i].cpu()
        owners = labels.gt_index[i].cpu()[all_positive]
        views.append(
            AnchorView(
                anchors=everywhere,
                level=level,
                positive=positive,
                negative=negative,
                ignored=~all_positive & ~all_negative,
                positives_of_gt=torch.bincount(owners, minlength=num_boxes[i])[: num_boxes[i]],
            )
        )
    return views


@torch.no_grad()
def roi_views(head: RoIHead | CascadeRoIHead, proposals: Proposals, batch: Batch) -> list[RoIView]:
    """Which RoIs the second stage trains on in each image; of a cascade, the first of its heads.

    Args:
        head: the second stage.
        proposals: of the batch.
        batch: of the training loader.
    """
    first = first_head(head)
    samples = first.sample(proposals, batch.targets, batch.seeds)
    level = first.pooler.assign_levels(samples.boxes)
    is_positive = samples.labels < first.num_classes
    views = []
    for i in range(len(batch.images)):
        valid = samples.valid[i]
        boxes, levels, positive = (x[i][valid].cpu() for x in (samples.boxes, level, is_positive))
        views.append(RoIView(boxes=boxes, level=levels, is_positive=positive))
    return views


def first_head(head: RoIHead | CascadeRoIHead) -> RoIHead:
    """The head that samples RoIs: a cascade samples once, for its first."""
    return head.heads[0] if isinstance(head, CascadeRoIHead) else head


def padded_image(batch: Batch, index: int, pixel_mean: Sequence[float]) -> Tensor:
    """(3, H, W) uint8: image `index` of a batch with its padding in `pixel_mean`, which is 0 after normalising."""
    image = batch.images[index].cpu().round().to(torch.uint8).clone()
    h, w = batch.sizes[index].tolist()
    color = torch.tensor(pixel_mean).round().to(torch.uint8)[:, None, None]
    image[:, h:] = color
    image[:, :, w:] = color
    return image


def draw_targets(image: Tensor, batch: Batch, index: int, class_names: Sequence[str]) -> Tensor:
    """The boxes of image `index` with their classes; `image` is that of `padded_image`."""
    boxes, labels = _targets(batch, index)
    h, w = batch.sizes[index].tolist()
    picture = draw_boxes(
        image, boxes, [class_names[label] for label in labels], colors=[class_color(label) for label in labels]
    )
    padded_h, padded_w = image.shape[1:]
    padding = f", padded to {padded_w}x{padded_h}" if (padded_h, padded_w) != (h, w) else ""
    return draw_title(picture, f"seen: {w}x{h}{padding}, {len(boxes)} boxes")


def draw_anchors(
    image: Tensor, batch: Batch, index: int, view: AnchorView, class_names: Sequence[str], level_names: Sequence[str]
) -> Tensor:
    """The anchors of image `index`: sampled ones, ignored ones, and boxes that have none at all."""
    picture = _draw_gt(image, batch, index, class_names, lost=view.positives_of_gt == 0)
    scale = picture.shape[1] // image.shape[1]
    colors = [LEVEL_COLORS[level % len(LEVEL_COLORS)] for level in view.level.tolist()]
    dots = (view.ignored | view.negative).nonzero().flatten().tolist()
    centers = (view.anchors[dots, :2] + view.anchors[dots, 2:]) / 2 * scale
    negative = view.negative.tolist()
    picture = draw_points(picture, centers, colors=[colors[i] for i in dots], filled=[negative[i] for i in dots])
    chosen = view.positive.nonzero().flatten().tolist()
    picture = draw_boxes(picture, view.anchors[chosen] * scale, [""] * len(chosen), colors=[colors[i] for i in chosen])
    title = f"anchors: {len(chosen)} positive, {int(view.negative.sum())} negative, {int(view.ignored.sum())} ignored"
    return draw_title(picture, title, _legend(view.level[view.positive], level_names, view.positives_of_gt))


def draw_rois(
    image: Tensor, batch: Batch, index: int, view: RoIView, class_names: Sequence[str], level_names: Sequence[str]
) -> Tensor:
    """The sampled RoIs of image `index`, in the colour of the level that they are pooled from."""
    picture = _draw_gt(image, batch, index, class_names)
    scale = picture.shape[1] // image.shape[1]
    colors = [LEVEL_COLORS[level % len(LEVEL_COLORS)] for level in view.level.tolist()]
    centers = (view.boxes[:, :2] + view.boxes[:, 2:]) / 2 * scale
    background = (~view.is_positive).nonzero().flatten().tolist()
    picture = draw_points(
        picture, centers[background], colors=[colors[i] for i in background], filled=[True] * len(background)
    )
    chosen = view.is_positive.nonzero().flatten().tolist()
    picture = draw_boxes(picture, view.boxes[chosen] * scale, [""] * len(chosen), colors=[colors[i] for i in chosen])
    title = f"RoIs: {len(chosen)} positive, {len(background)} background"
    return draw_title(picture, title, _legend(view.level, level_names))


def _targets(batch: Batch, index: int) -> tuple[Tensor, list[int]]:
    """Boxes (G, 4) and labels of one image."""
    valid = batch.targets.valid[index]
    return batch.targets.boxes[index][valid].cpu(), batch.targets.labels[index][valid].tolist()


def _draw_gt(
    image: Tensor, batch: Batch, index: int, class_names: Sequence[str], *, lost: Tensor | None = None
) -> Tensor:
    """The boxes in white, those that are `lost` (G,) in red with a name."""
    boxes, labels = _targets(batch, index)
    is_lost = lost.tolist() if lost is not None else [False] * len(boxes)
    # On white images a white line needs a dark one beside it.
    picture = draw_boxes(image, boxes, [""] * len(boxes), colors=[BLACK] * len(boxes), width=4)
    return draw_boxes(
        picture,
        boxes * (picture.shape[1] // image.shape[1]),
        [f"no anchor: {class_names[label]}" if alarm else "" for label, alarm in zip(labels, is_lost, strict=True)],
        colors=[ALARM if alarm else WHITE for alarm in is_lost],
        width=2,
    )


def _legend(
    levels: Tensor, level_names: Sequence[str], positives_of_gt: Tensor | None = None
) -> list[tuple[str, Color]]:
    """Levels with how many boxes are of each, then the boxes of the ground truth."""
    counts = torch.bincount(levels, minlength=len(level_names)).tolist()
    entries = [
        (f"{name}: {count}", LEVEL_COLORS[i % len(LEVEL_COLORS)])
        for i, (name, count) in enumerate(zip(level_names, counts, strict=True))
    ]
    entries.append(("ground truth", WHITE))
    num_lost = int((positives_of_gt == 0).sum()) if positives_of_gt is not None else 0
    return [*entries, (f"without anchor: {num_lost}", ALARM)] if num_lost else entries
