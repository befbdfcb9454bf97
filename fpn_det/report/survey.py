"""Figures of a training split: how large its boxes are where the model meets them, what covers them, what to mend.

Dimensions: B boxes at all training scales (S lengths of the shorter side times the boxes of the split), K classes,
L levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.statistics import ScaledBoxes
from fpn_det.models.anchor_recall import BestAnchors, best_anchors, suggest_sizes
from fpn_det.models.anchors import Anchors
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.structures import Categories, printable

TINY_PX = 8
"""Boxes below this side cover two cells of the finest level of a pyramid, of stride 4: little can be seen in them."""

FEW_BOXES = 50
"""Classes of fewer boxes are learnt badly."""

MANY_TINY = 0.01
"""Share of tiny boxes from which on they are worth a word."""

FIT_BOXES = 20_000
"""So many boxes decide about suggested sizes; their effect is measured on all."""

MIN_BOXES_TO_FIT = 50
"""Fewer boxes, scales aside, do not say what anchors a data set needs."""

MATERIAL_GAIN = 0.02
"""A suggestion must raise the mean IoU by so much, and lower no recall by half of it: less is not worth weights that
fit no other run."""

RATIOS = (0.1, 0.12, 0.15, 0.2, 0.25, 0.33, 0.4, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6.5, 8, 10)
"""What suggested ratios are rounded to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorSet:
    """Anchors and how well they cover the boxes.

    Attributes:
        name: what they are.
        anchors: of all levels.
        sizes, ratios: as in the config.
        best: the best anchor of each of the B boxes.
        positive_iou: the RPN's threshold.
    """

    name: str
    anchors: Anchors
    sizes: Sequence[Sequence[float]]
    ratios: Sequence[float]
    best: BestAnchors
    positive_iou: float

    def recall(self, iou: float, of: Tensor | None = None) -> float:
        """Share of the boxes (of those at the indices `of`) that some anchor overlaps by `iou` or more; NaN of none."""
        return _mean(_picked(self.best.iou, of) >= iou)

    def mean_iou(self, of: Tensor | None = None) -> float:
        """Mean IoU of the best anchors."""
        return _mean(_picked(self.best.iou, of))

    def overrides(self) -> list[str]:
        """What sets them on the command line."""
        sizes = ",".join(_sizes_of_level(level) for level in self.sizes)
        ratios = ",".join(f"{ratio:g}" for ratio in self.ratios)
        return [f"model.anchors.sizes=[{sizes}]", f"model.anchors.ratios=[{ratios}]"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """All figures of a split.

    Attributes:
        boxes: at all training scales.
        side, ratio: (B,) float32, square root of the area in pixels, height / width.
        categories: the classes.
        boxes_per_image: (I,) int64.
        images_per_class: (K,) int64.
        num_scales: S.
        anchor_sets: the present anchors, then what was tried; empty where the model has no RPN.
        suggested: of those, what is materially better than the present ones, if anything is.
        roi_level: (B,) int64, the level that each box is pooled from as a RoI; None where there is no second stage.
        level_names: of the L levels of the RPN, the first of which the RoIs are pooled from.
    """

    boxes: ScaledBoxes
    side: Tensor
    ratio: Tensor
    categories: Categories
    boxes_per_image: Tensor
    images_per_class: Tensor
    num_scales: int
    anchor_sets: Sequence[AnchorSet]
    suggested: AnchorSet | None
    roi_level: Tensor | None
    level_names: Sequence[str]

    @property
    def present(self) -> AnchorSet | None:
        """The anchors of the config."""
        return self.anchor_sets[0] if self.anchor_sets else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Boxes that have something in common, a class or a size.

    Attributes:
        name: what they have in common.
        of: int64, which of the B boxes they are.
        num_boxes: in the split, each counted once.
    """

    name: str
    of: Tensor
    num_boxes: float


def make_survey(
    data: CocoAnnotations,
    boxes: ScaledBoxes,
    *,
    num_scales: int,
    anchors: Anchors | None,
    sizes: Sequence[Sequence[float]],
    ratios: Sequence[float],
    positive_iou: float,
    pooler: MultiLevelRoIAlign | None,
    level_names: Sequence[str],
) -> Survey:
    """Measure a split.

    Args:
        data: the split.
        boxes: of it, at `num_scales` scales.
        num_scales: S.
        anchors: of the RPN, made of `sizes` and `ratios`; None without an RPN.
        sizes: of the anchors of each level, in pixels.
        ratios: of the anchors, height / width.
        positive_iou: from which IoU on the RPN takes an anchor for positive.
        pooler: of the second stage; None without one.
        level_names: of the levels, fine to coarse.
    """
    owner = torch.arange(len(data)).repeat_interleave(data.box_offsets.diff())
    of_class = (data.labels * max(1, len(data)) + owner).unique() // max(1, len(data))
    sets: list[AnchorSet] = []
    suggested = None
    if anchors is not None:
        sets, suggested = _compare_anchors(
            boxes, anchors, sizes=sizes, ratios=ratios, positive_iou=positive_iou, num_boxes=len(data.boxes)
        )
    return Survey(
        boxes=boxes,
        side=boxes.side,
        ratio=boxes.ratio,
        categories=data.categories,
        boxes_per_image=data.box_offsets.diff(),
        images_per_class=torch.bincount(of_class, minlength=len(data.categories)),
        num_scales=num_scales,
        anchor_sets=sets,
        suggested=suggested,
        roi_level=pooler.assign_levels(boxes.boxes) if pooler is not None else None,
        level_names=level_names,
    )


def by_size(survey: Survey) -> Iterator[Group]:
    """The boxes by side at training scale, in octaves; those that are empty at either end are left out."""
    side = survey.side
    edges = [0.0, *(2.0**k for k in range(3, 10)), math.inf]
    groups = []
    for low, high in pairwise(edges):
        of = ((side >= low) & (side < high)).nonzero().flatten()
        name = f"below {high:g}" if low == 0 else f"{low:g} and more" if high == math.inf else f"{low:g} to {high:g}"
        groups.append(Group(name=name, of=of, num_boxes=len(of) / survey.num_scales))
    filled = [i for i, group in enumerate(groups) if group.num_boxes]
    yield from groups[filled[0] : filled[-1] + 1] if filled else []


def by_class(survey: Survey) -> Iterator[Group]:
    """The boxes by class, in the order of the class indices."""
    counts = torch.bincount(survey.boxes.labels, minlength=len(survey.categories))
    parts = survey.boxes.labels.argsort(stable=True).split(counts.tolist())
    for name, of in zip(survey.categories.names, parts, strict=True):
        yield Group(name=name, of=of, num_boxes=len(of) / survey.num_scales)


def advice(survey: Survey, *, short_sides: Sequence[int], detections_per_image: int | None) -> list[str]:
    """What is worth changing before training, one sentence or two each; empty if nothing is.

    Args:
        survey: of the training split.
        short_sides: lengths of the shorter image side in training.
        detections_per_image: how many detections of an image are kept; None without a second stage.
    """
    said = []
    is_tiny = survey.side < TINY_PX
    share = _mean(is_tiny)
    if share >= MANY_TINY:
        of_class = [(_mean(is_tiny[group.of]), group) for group in by_class(survey) if group.num_boxes]
        worst = [g for s, g in sorted(of_class, key=lambda pair: -pair[0]) if s >= MANY_TINY][:5]
        said.append(
            f"{share:.1%} of the boxes are smaller than {TINY_PX} px at training scale (most of them relative to their "
            f"class: {_named(g.name for g in worst)}). Raise data.short_sides (now {list(short_sides)}) and "
            "data.long_side, or cut the images into tiles; what remains of such boxes is two cells of stride 4."
        )
    rare = [group for group in by_class(survey) if group.num_boxes < FEW_BOXES]
    if rare:
        rare.sort(key=lambda group: group.num_boxes)
        said.append(
            f"{len(rare)} of {len(survey.categories)} classes have fewer than {FEW_BOXES} boxes: "
            f"{_named(f'{g.name} ({g.num_boxes:.0f})' for g in rare)}. Label more of them, or merge classes; their AP "
            "will be low and noisy."
        )
    num_full = int((survey.boxes_per_image > (detections_per_image or math.inf)).sum())
    if num_full:
        said.append(
            f"{num_full:,} images hold more than {detections_per_image} boxes (up to "
            f"{int(survey.boxes_per_image.max())}), and no more detections are kept: raise "
            "model.roi_head.detections_per_image, which the metrics follow."
        )
    return said


def changed_overrides(old: AnchorSet, new: AnchorSet) -> list[str]:
    """What has to be set to get from one set of anchors to another."""
    return [override for override in new.overrides() if override not in old.overrides()]


def level_shares(survey: Survey, level: Tensor, of: Tensor | None = None) -> list[float]:
    """The share of the boxes (of those at the indices `of`) on each level, where `level` (B,) places them."""
    counts = torch.bincount(_picked(level, of), minlength=len(survey.level_names)).double()
    return (counts / counts.sum()).tolist()


def quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Quantiles of (B,) values, the lower of two neighbours; NaN of none. `torch.quantile` ends at 16 million."""
    if not len(values):
        return [math.nan] * len(shares)
    ordered = values.sort().values
    return [ordered[int(share * (len(values) - 1))].item() for share in shares]


def _compare_anchors(
    boxes: ScaledBoxes,
    anchors: Anchors,
    *,
    sizes: Sequence[Sequence[float]],
    ratios: Sequence[float],
    positive_iou: float,
    num_boxes: int,
) -> tuple[list[AnchorSet], AnchorSet | None]:
    """The present anchors, sizes fitted to the boxes, and ratios too; and what to recommend."""

    def measure(name: str, sizes: Sequence[Sequence[float]], ratios: Sequence[float]) -> AnchorSet:
        made = Anchors(
            sizes=sizes,
            ratios=ratios,
            strides=anchors.strides,
            rounded=anchors.rounded,
            inferred_strides=anchors.inferred_strides,
        )
        best = best_anchors(made, boxes.boxes, boxes.padded_sizes())
        return AnchorSet(name=name, anchors=made, sizes=sizes, ratios=ratios, best=best, positive_iou=positive_iou)

    def fitted_sizes(ratios: Sequence[float]) -> list[tuple[float, ...]]:
        few = boxes.sample(FIT_BOXES)
        return suggest_sizes(
            anchors,
            few.boxes,
            few.padded_sizes(),
            present=sizes,
            ratios=ratios,
            positive_iou=positive_iou,
        )

    sets = [measure("as configured", sizes, ratios)]
    if num_boxes < MIN_BOXES_TO_FIT:
        return sets, None
    sets.append(measure("other sizes", fitted_sizes(ratios), ratios))
    others = _fitted_ratios(boxes.ratio, len(ratios))
    if others != sorted(ratios):
        sets.append(measure("other sizes and ratios", fitted_sizes(others), others))
    best = sets[0]
    for candidate in sets[1:]:
        best = candidate if _is_materially_better(candidate, best) else best
    return sets, None if best is sets[0] else best


def _is_materially_better(new: AnchorSet, old: AnchorSet) -> bool:
    losses = [old.recall(iou) - new.recall(iou) for iou in (old.positive_iou, 0.5)]
    return new.mean_iou() - old.mean_iou() >= MATERIAL_GAIN and max(losses) < MATERIAL_GAIN / 2


def _fitted_ratios(ratio: Tensor, num: int) -> list[float]:
    """`num` ratios in the middle of as many equal parts of the boxes; fewer, if that rounds some to the same."""
    middles = quantiles(ratio, [(2 * i + 1) / (2 * num) for i in range(num)])
    return sorted({min(RATIOS, key=lambda r: abs(math.log(r / middle))) for middle in middles})


def _sizes_of_level(level: Sequence[float]) -> str:
    text = ",".join(f"{size:g}" for size in level)
    return text if len(level) == 1 else f"[{text}]"


def _named(names: Iterator[str] | Sequence[str], limit: int = 10) -> str:
    every = [printable(name) for name in names]
    rest = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + rest


def _picked(values: Tensor, of: Tensor | None) -> Tensor:
    return values if of is None else values[of]


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
