"""When is a file taken for the detector?"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fpn_det.export.check import Comparison, check, compare, variations
from fpn_det.structures import Detections

BOXES = [[10.0, 10, 50, 50], [100, 20, 160, 90], [30, 60, 70, 130]]


def detections(boxes: Sequence[Sequence[float]], scores: Sequence[float], labels: Sequence[int]) -> Detections:
    return Detections(
        boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.int64),
    )


EXPECTED = detections(BOXES, [0.9, 0.8, 0.06], [0, 1, 0])


@pytest.mark.parametrize(
    ("boxes", "scores", "labels", "differing", "box_difference", "score_difference"),
    [
        pytest.param(BOXES, [0.9, 0.8, 0.06], [0, 1, 0], 0, 0, 0, id="the same"),
        pytest.param([BOXES[i] for i in (1, 0, 2)], [0.9, 0.9, 0.06], [1, 0, 0], 1, 0, 0.1, id="order and score"),
        pytest.param(BOXES, [0.9004, 0.8, 0.06], [0, 1, 0], 0, 0, 0.0004, id="score within the tolerance"),
        pytest.param([[10.05, 10, 50, 50], *BOXES[1:]], [0.9, 0.8, 0.06], [0, 1, 0], 0, 0.05, 0, id="box within it"),
        pytest.param([[11, 10, 50, 50], *BOXES[1:]], [0.9, 0.8, 0.06], [0, 1, 0], 1, 1, 0, id="box beyond it"),
        pytest.param([[30, 10, 70, 50], *BOXES[1:]], [0.9, 0.8, 0.06], [0, 1, 0], 2, 0, 0, id="box elsewhere"),
        pytest.param(BOXES, [0.9, 0.8, 0.06], [0, 2, 0], 2, 0, 0, id="another label"),
        pytest.param(BOXES[:2], [0.9, 0.8], [0, 1], 1, 0, 0, id="one is missing"),
        pytest.param([], [], [], 3, 0, 0, id="all are missing"),
    ],
)
def test_differences_are_counted(boxes, scores, labels, differing, box_difference, score_difference) -> None:
    for one, other in ((EXPECTED, detections(boxes, scores, labels)), (detections(boxes, scores, labels), EXPECTED)):
        result = compare(one, other, score_thresh=0.05, max_detections=100)
        assert result == (differing, pytest.approx(box_difference, abs=1e-5), pytest.approx(score_difference, abs=1e-6))


def test_what_is_at_the_lowest_score_may_be_missing() -> None:
    two = detections(BOXES[:2], [0.9, 0.8], [0, 1])
    assert compare(EXPECTED, two, score_thresh=0.0595, max_detections=100)[0] == 0
    assert compare(EXPECTED, two, score_thresh=0.05, max_detections=3)[0] == 0  # the last rank
    assert compare(EXPECTED, two, score_thresh=0.05, max_detections=4)[0] == 1


def test_the_nearest_of_several_boxes_is_the_same_detection() -> None:
    near = [[0.0, 0, 100, 100], [2, 0, 102, 100]]  # of one class, as an NMS of another threshold leaves them
    one, other = detections(near, [0.9, 0.8], [0, 0]), detections(near[::-1], [0.8, 0.9], [0, 0])
    assert compare(one, other, score_thresh=0.05, max_detections=100) == (0, 0, 0)


def finds_all(images: Tensor) -> list[Detections]:
    """One box, the whole image, whose score is the upper left pixel."""
    h, w = images.shape[2:]
    return [detections([[0, 0, w, h]], [0.1 + float(image[0, 0, 0]) / 300], [0]) for image in images]


def images(num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, 20 + i, 30), dtype=torch.uint8, generator=generator) for i in range(num)]


def test_batches_and_other_sizes_are_checked_too() -> None:
    shapes = {tuple(batch.shape) for batch in variations(images(1)[0])}
    assert len({n for n, *_ in shapes}) == 2
    assert len({(h, w) for _, _, h, w in shapes}) == 3

    def only_one(batch: Tensor) -> list[Detections]:
        return [finds_all(batch)[0]] * len(batch)

    def only_wide(batch: Tensor) -> list[Detections]:
        return finds_all(batch if batch.shape[3] == 30 else batch[..., :19])

    limits = {"score_thresh": 0.05, "max_detections": 100}
    assert check(finds_all, finds_all, images(10), **limits).failures() == []
    for broken in (only_wide, only_one):
        assert check(finds_all, broken, images(10), **limits).num_differing > 0
    comparison = check(finds_all, finds_all, images(10), **limits)
    assert (comparison.num_images, len(comparison.expected), comparison.num_detections) == (10, 10, 30)


def test_one_detection_in_200_may_differ_and_none_is_no_check() -> None:
    assert Comparison(num_images=10, num_detections=199, num_differing=1).failures() != []
    assert Comparison(num_images=10, num_detections=200, num_differing=1).failures() == []
    assert "nothing to compare" in Comparison(num_images=10).failures()[0]
