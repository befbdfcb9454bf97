"""Why a detector does not fit the few images that it was trained on: which stage fails, by how much, and the way out.

A detector that can learn anything at all reaches a high AP on eight images. Where it does not, one of the stages says
so: boxes that no setting could tell apart, proposals that miss, classes that are confused, boxes that are imprecise.

Dimensions: G ground-truth boxes, P proposals, D detections of one image, A shapes of anchors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, pstdev

import torch
from torch import Tensor
from torchvision.ops import box_iou

from fpn_det.structures import Detections, printable

TARGET_AP = 0.9
SAME_IOU = 0.9
"""Two boxes that overlap at least this much are of one object."""
FOUND_IOU = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedImage:
    """Ground truth of an image, and what a detector finds in it.

    Attributes:
        image_id: the data set's own id.
        boxes: (G, 4) float32 XYXY, in pixels of the image file, as all boxes here.
        labels: (G,) int64.
        scale: side of the image as the network sees it / side of the file.
        proposals: (P, 4); None where they are not known, or the detector has no RPN.
        detections: None where they are not known.
    """

    image_id: int
    boxes: Tensor
    labels: Tensor
    scale: float
    proposals: Tensor | None = None
    detections: Detections | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that keeps the AP low.

    Attributes:
        what: with numbers.
        remedy: what to do, keys of the config included.
    """

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}"


def limits(
    images: Sequence[FittedImage], names: Sequence[str], *, nms_thresh: float, detections_per_image: int
) -> list[Finding]:
    """What no training could mend, from the ground truth alone.

    Args:
        images: whose boxes and labels are looked at.
        names: of the classes.
        nms_thresh, detections_per_image: of the second stage.
    """
    repeated, torn, crowded = [], [], []
    for image in images:
        iou = box_iou(image.boxes, image.boxes).triu(diagonal=1)
        same = image.labels[:, None] == image.labels
        of_image = f"image {image.image_id}"
        repeated += [of_image] * int(((iou >= SAME_IOU) & same).sum())
        crowded += [of_image] * int(((iou > nms_thresh) & (iou < SAME_IOU) & same).sum())
        for i, j in ((iou >= SAME_IOU) & ~same).nonzero().tolist():
            both = sorted(printable(names[int(image.labels[k])]) for k in (i, j))
            torn.append(f"{both[0]} and {both[1]} in {of_image}")
    findings = []
    if repeated:
        findings.append(
            Finding(
                what=f"{_times(len(repeated), 'box', 'boxes')} repeated: another of the same class overlaps it by "
                f"{SAME_IOU:g} or more ({_examples(repeated)}), and NMS keeps one of two",
                remedy="Delete one of each pair from the annotations",
            )
        )
    if torn:
        findings.append(
            Finding(
                what=f"{_times(len(torn), 'object', 'objects')} labelled twice, with two classes ({_examples(torn)}): "
                "the classifier cannot be right",
                remedy="Decide for one class, in the annotations",
            )
        )
    if crowded:
        findings.append(
            Finding(
                what=f"{_times(len(crowded), 'pair', 'pairs')} of boxes of one class overlap by more than "
                f"model.roi_head.nms_thresh {nms_thresh:g} ({_examples(crowded)}), where NMS keeps one of two",
                remedy="Delete one of each pair if both are of one object; if not, raise model.roi_head.nms_thresh",
            )
        )
    most = max(images, key=lambda image: len(image.boxes))
    if len(most.boxes) > detections_per_image:
        findings.append(
            Finding(
                what=f"image {most.image_id} has {len(most.boxes)} boxes, of which {detections_per_image} can be found",
                remedy=f"Raise model.roi_head.detections_per_image from {detections_per_image}",
            )
        )
    return findings


def diagnose(
    images: Sequence[FittedImage],
    names: Sequence[str],
    *,
    anchor_shapes: Tensor,
    losses: Sequence[float],
    num_skipped: int,
    trained: Mapping[str, tuple[int, int]],
    score_thresh: float,
) -> list[Finding]:
    """What training could mend, the earlier stage first: a later one cannot find what an earlier one lost.

    Args:
        images: with detections, and proposals where the detector makes them.
        names: of the classes.
        anchor_shapes: (A, 2) widths and heights in pixels of the image that the network sees.
        losses: of the run, means over equal numbers of steps.
        num_skipped: steps that were skipped, as they were not finite.
        trained: part of the detector -> parameters that are trained, and all of them.
        score_thresh: of detections.
    """
    findings = []
    if num_skipped:
        findings.append(
            Finding(
                what=f"{num_skipped} steps had a loss or gradient that was not finite, and were skipped",
                remedy="Lower optim.lr, or set optim.clip_norm to 10",
            )
        )
    frozen = [part for part, (number, _) in trained.items() if number == 0]
    if frozen:
        findings.append(
            Finding(
                what=f"nothing in {', '.join(frozen)} is trained",
                remedy="Lower model.backbone.frozen_stages",
            )
        )
    for finding in (
        _of_losses(losses),
        _of_proposals(images, anchor_shapes),
        _of_scores(images, score_thresh),
        _of_classes(images, names),
        _of_boxes(images),
    ):
        if finding is not None:
            findings.append(finding)
    return findings


def _of_losses(losses: Sequence[float]) -> Finding | None:
    """Whether the loss fell, and still falls."""
    if len(losses) < 8:
        return None
    n = len(losses) // 4
    first, before, last = fmean(losses[:n]), fmean(losses[-2 * n : -n]), fmean(losses[-n:])
    jumps = pstdev(b - a for a, b in pairwise(losses[-2 * n :])) / max(last, 1e-9)
    if last > 0.8 * first:
        return Finding(
            what=f"the loss does not fall: {first:.3g} in the first quarter of the run, {last:.3g} in the last",
            remedy="Try optim.lr ten times lower, and ten times higher",
        )
    if jumps > 0.5:
        return Finding(
            what=f"the loss jumps up and down, by {jumps:.0%} of its value from one record to the next",
            remedy="Lower optim.lr to a third, or set optim.clip_norm to 10",
        )
    if last < 0.9 * before:
        return Finding(
            what=f"the loss still falls: {before:.3g} in the third quarter of the run, {last:.3g} in the last",
            remedy="Train longer (train.steps), or raise optim.lr",
        )
    return None


def _of_proposals(images: Sequence[FittedImage], anchor_shapes: Tensor) -> Finding | None:
    """Whether the first stage misses boxes, and whether anchors have their shapes."""
    missed, total = [], 0
    for image in images:
        if image.proposals is not None:
            best = _best_iou(image.boxes, image.proposals)
            missed.append((image.boxes[best < FOUND_IOU, 2:] - image.boxes[best < FOUND_IOU, :2]) * image.scale)
            total += len(image.boxes)
    sizes = torch.cat(missed) if missed else torch.zeros(0, 2)
    if len(sizes) == 0:
        return None
    what = f"the first stage misses {len(sizes)} of {total} boxes: no proposal overlaps them by {FOUND_IOU:g}"
    misfits = int((_shape_iou(sizes, anchor_shapes).amax(1) < FOUND_IOU).sum())
    sides = sizes.prod(1).sqrt()
    seen = f"they are {sides.min():.0f} to {sides.max():.0f} px large where the network sees them"
    if misfits:
        smallest, largest = anchor_shapes.prod(1).sqrt().aminmax()
        return Finding(
            what=f"{what}, and {misfits} of these have the shape of no anchor ({seen}, sqrt of the area; anchors are "
            f"{smallest:.0f} to {largest:.0f})",
            remedy="Set model.anchors.sizes and model.anchors.ratios to the sizes and the height / width of the boxes, "
            "or, if those are small, raise data.test_short_side and data.short_sides",
        )
    return Finding(
        what=f"{what}, though anchors have their shapes ({seen})",
        remedy="Train longer (train.steps), raise optim.lr, or lower model.rpn.positive_iou to 0.6",
    )


def _of_scores(images: Sequence[FittedImage], score_thresh: float) -> Finding | None:
    """Whether objects have no detection at all."""
    missed, total = 0, 0
    for image in images:
        if image.detections is not None:
            missed += int((_best_iou(image.boxes, image.detections.boxes) < FOUND_IOU).sum())
            total += len(image.boxes)
    if missed == 0:
        return None
    return Finding(
        what=f"{missed} of {total} boxes have no detection of any class, of score {score_thresh:g} or more, that "
        f"overlaps them by {FOUND_IOU:g}",
        remedy="If the first stage finds them, train the second one longer (train.steps), or raise "
        "model.roi_head.positive_fraction",
    )


def _of_classes(images: Sequence[FittedImage], names: Sequence[str]) -> Finding | None:
    """Whether objects are found, as something else."""
    confused: Counter[str] = Counter()
    total = 0
    for image in images:
        found = image.detections
        if found is None or not len(found):
            continue
        iou = box_iou(image.boxes, found.boxes)
        scores = torch.where(iou >= FOUND_IOU, found.scores, -1.0)
        for label, of_box in zip(image.labels.tolist(), scores, strict=True):
            total += 1
            best = int(of_box.argmax())
            if of_box[best] >= 0 and int(found.labels[best]) != label:
                confused[f"{printable(names[label])} as {printable(names[int(found.labels[best])])}"] += 1
    if not confused:
        return None
    return Finding(
        what=f"{confused.total()} of {total} boxes are found as another class "
        f"({', '.join(f'{pair}: {number}' for pair, number in confused.most_common(3))})",
        remedy="Look at the pictures whether their labels are consistent; else train longer (train.steps)",
    )


def _of_boxes(images: Sequence[FittedImage]) -> Finding | None:
    """Whether objects are found, but not exactly where they are."""
    best = [_best_iou(i.boxes, i.detections.boxes) for i in images if i.detections is not None]
    found = [iou for ious in best for iou in ious.tolist() if iou >= FOUND_IOU]
    precise = sum(iou >= SAME_IOU for iou in found)
    if precise > 0.9 * len(found) or not found:
        return None
    return Finding(
        what=f"the boxes are imprecise: of {len(found)} that are found, {precise} overlap the true ones by "
        f"{SAME_IOU:g} (on average by {fmean(found):.2f}), and an AP of {100 * TARGET_AP:g} needs nearly all",
        remedy="Train longer (train.steps), or change optim.lr by a factor of 3; if the pictures show boxes that are "
        "right, the annotations are loose",
    )


def summary(images: Sequence[FittedImage]) -> str:
    """What each stage finds of the boxes, in two lines."""
    lines = [f"of {sum(len(i.boxes) for i in images)} boxes in {len(images)} images, found at IoU 0.5, 0.75, 0.9:"]
    for title, found in (
        ("proposals", [(i.boxes, i.proposals) for i in images if i.proposals is not None]),
        ("detections", [(i.boxes, i.detections.boxes) for i in images if i.detections is not None]),
    ):
        if found:
            best = torch.cat([_best_iou(boxes, others) for boxes, others in found])
            shares = "  ".join(f"{(best >= iou).float().mean():6.1%}" for iou in (0.5, 0.75, 0.9))
            lines.append(f"{title:10}  {shares}")
    return "\n".join(lines)


def _best_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """(G,) IoU of each box with the one of `others` that overlaps it most; 0 if there is none."""
    if len(others) == 0:
        return torch.zeros(len(boxes))
    return box_iou(boxes, others).amax(1)


def _shape_iou(sizes: Tensor, shapes: Tensor) -> Tensor:
    """(G, A) IoU of boxes (G, 2) with anchors (A, 2) that have the same centre."""
    inter = torch.minimum(sizes[:, None], shapes).prod(2)
    return inter / (sizes.prod(1)[:, None] + shapes.prod(1) - inter)


def _times(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _examples(found: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(found))
    return ", ".join(distinct[:3]) + (f" and {len(distinct) - 3} more" if len(distinct) > 3 else "")
