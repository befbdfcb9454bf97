"""Is an exported file the detector? The same images through both, detection by detection.

Both compute in float32, in another order, so numbers differ a little, and what hangs on a threshold (a score, an IoU,
the last rank) may fall to the other side. Boxes and scores have tolerances; detections beyond them are counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor
from torchvision.ops import box_iou
from tqdm import tqdm

from fpn_det.structures import Detections

MIN_IMAGES = 10
"""Fewer images say too little."""

BOX_TOLERANCE = 0.1
"""Pixels of the input image. Rounding moves boxes by 1e-5 to 1e-2; half a level of all pixels, by more than this."""

SCORE_TOLERANCE = 1e-3
"""Rounding moves scores by 1e-7 to 1e-4."""

AP_TOLERANCE = 1e-3
"""0.1 points."""

MAX_DIFFERING = 0.005
"""Share of the detections that may be beyond the tolerances, or found by one side only: decisions at thresholds."""

SAME_IOU = 0.9
"""Boxes of one class from this IoU on are taken for the same detection, whose numbers are compared."""

NUM_VARIED = 4
"""Images that are also checked in batches of three and cropped."""

Detector = Callable[[Tensor], Sequence[Detections]]
"""(N, 3, H, W) uint8 -> the detections of each image, in its frame."""


@dataclass(kw_only=True)
class Comparison:
    """What differs; all numbers over everything that was compared so far.

    Attributes:
        num_images: images that were compared as they are, one by one.
        num_detections: of the detector, batches and crops included.
        num_differing: detections beyond a tolerance, or of one side only.
        box_difference: the largest of a coordinate in pixels, of detections that both found.
        score_difference: the largest of a score, of detections that both found.
        expected, found: detections of the images, for the metrics.
        expected_ms, found_ms: how long each image took.
    """

    num_images: int = 0
    num_detections: int = 0
    num_differing: int = 0
    box_difference: float = 0.0
    score_difference: float = 0.0
    expected: list[Detections] = field(default_factory=list)
    found: list[Detections] = field(default_factory=list)
    expected_ms: list[float] = field(default_factory=list)
    found_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> tuple[float, float]:
        """Milliseconds per image of the detector and of the file."""
        return median(self.expected_ms), median(self.found_ms)

    def failures(self) -> list[str]:
        """Why the file is not the detector, as far as detections tell; empty if it is."""
        if self.num_detections == 0:
            return [
                f"the detector finds nothing in {self.num_images} images, so there is nothing to compare; give images "
                "of its classes"
            ]
        allowed = int(MAX_DIFFERING * self.num_detections)
        if self.num_differing <= allowed:
            return []
        return [
            f"{self.num_differing} of {self.num_detections} detections differ by more than {BOX_TOLERANCE} px or "
            f"{SCORE_TOLERANCE:g} in score, or were found by one side only ({allowed} may)"
        ]

    def add(self, expected: Detections, found: Detections, *, score_thresh: float, max_detections: int) -> None:
        """Compare the detections of one image."""
        differing, box_difference, score_difference = compare(
            expected, found, score_thresh=score_thresh, max_detections=max_detections
        )
        self.num_detections += len(expected)
        self.num_differing += differing
        self.box_difference = max(self.box_difference, box_difference)
        self.score_difference = max(self.score_difference, score_difference)


def check(
    expected: Detector, found: Detector, images: Sequence[Tensor], *, score_thresh: float, max_detections: int
) -> Comparison:
    """Compare two detectors: on each image, and on batches and crops of some, so that no size is built in.

    Args:
        expected: the detector, which takes one image.
        found: what was exported, which takes several.
        images: (3, H, W) uint8, of any sizes.
        score_thresh: the lowest score of detections.
        max_detections: the most detections of an image.
    """
    comparison = Comparison()
    limits = {"score_thresh": score_thresh, "max_detections": max_detections}
    for detector in (expected, found):  # what a first call prepares is not part of the time
        detector(images[0][None])
    for i, image in enumerate(tqdm(images, desc="checking", unit="image", disable=None, file=sys.stderr)):
        one, expected_ms = timed(expected, image[None])
        other, found_ms = timed(found, image[None])
        comparison.add(one, other, **limits)  # type: ignore[arg-type]
        comparison.num_images += 1
        comparison.expected.append(one)
        comparison.found.append(other)
        comparison.expected_ms.append(expected_ms)
        comparison.found_ms.append(found_ms)
        if i < NUM_VARIED:
            for batch in variations(image):
                for view, of_view in zip(batch, found(batch), strict=True):
                    [of_detector] = expected(view[None])
                    comparison.add(of_detector, of_view, **limits)  # type: ignore[arg-type]
    return comparison


def timed(detector: Detector, images: Tensor) -> tuple[Detections, float]:
    """The detections of one image, and the milliseconds that they took."""
    start = time.perf_counter()
    [detections] = detector(images)
    return detections, 1000 * (time.perf_counter() - start)


def variations(image: Tensor) -> Iterator[Tensor]:
    """Batches of another number and size: the image mirrored three ways, turned by 90 degrees, and a part of it."""
    yield torch.stack([image.flip(2), image.flip(1), image.flip(1, 2)])
    yield image.mT[None].contiguous()
    h, w = image.shape[1:]
    yield image[:, h // 5 :, : w - w // 3][None].contiguous()


def compare(
    expected: Detections, found: Detections, *, score_thresh: float, max_detections: int
) -> tuple[int, float, float]:
    """Pair the detections of an image and compare.

    Returns:
        How many differ, the largest difference of a coordinate, and of a score, of those that both found. Detections
        of one side only do not count within the tolerance of the lowest score that is kept.
    """
    iou = box_iou(expected.boxes, found.boxes)
    iou[expected.labels[:, None] != found.labels] = 0
    box_difference = (expected.boxes[:, None] - found.boxes).abs().amax(2)
    score_difference = (expected.scores[:, None] - found.scores).abs()
    distance = box_difference / BOX_TOLERANCE + score_difference / SCORE_TOLERANCE
    distance[iou < SAME_IOU] = torch.inf
    pairs, free = [], torch.ones(len(found), dtype=torch.bool)
    alone = []  # scores of detections of one side only
    for i in range(len(expected)):
        of_free = torch.where(free, distance[i], torch.inf)
        j = int(of_free.argmin()) if len(found) else 0
        if len(found) and of_free[j] < torch.inf:
            pairs.append((i, j))
            free[j] = False
        else:
            alone.append(float(expected.scores[i]))
    alone += found.scores[free].tolist()

    lowest = score_thresh
    for side in (expected, found):
        if len(side) == max_detections:
            lowest = max(lowest, float(side.scores[-1]))
    differing = sum(score > lowest + SCORE_TOLERANCE for score in alone)
    largest_box = largest_score = 0.0
    for i, j in pairs:
        of_box, of_score = float(box_difference[i, j]), float(score_difference[i, j])
        differing += of_box > BOX_TOLERANCE or of_score > SCORE_TOLERANCE
        largest_box, largest_score = max(largest_box, of_box), max(largest_score, of_score)
    return differing, largest_box, largest_score
