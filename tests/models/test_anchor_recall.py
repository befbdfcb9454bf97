"""The best anchor of each box, against a comparison with all anchors; suggested sizes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fpn_det.models.anchor_recall import best_anchors, suggest_sizes
from fpn_det.models.anchors import Anchors
from fpn_det.models.matching import pairwise_iou

SIZES = ((32,), (64,), (128,), (256,), (512,))
STRIDES = (4, 8, 16, 32, 64)


def make(sizes: Any = SIZES, ratios: Any = (0.5, 1, 2), strides: Any = STRIDES, **options: bool) -> Anchors:
    return Anchors(sizes=sizes, ratios=ratios, strides=strides, **options)


def squares(side: Tensor, size: tuple[int, int] = (480, 640)) -> tuple[Tensor, Tensor]:
    """Squares at random places of images of `size`."""
    low = torch.rand(len(side), 2) * (torch.tensor(size[::-1]) - side[:, None])
    return torch.cat([low, low + side[:, None]], 1), torch.tensor([size]).expand(len(side), 2)


def test_an_anchor_covers_itself_and_no_anchor_a_box_of_5_pixels() -> None:
    anchors = make()
    image = torch.tensor([[480, 640]])
    for level, cells in enumerate(anchors.cells):
        box = cells[1] + torch.tensor([3, 2, 3, 2]) * STRIDES[level]
        best = best_anchors(anchors, box[None], image)
        assert (best.iou.item(), best.level.item()) == (1.0, level)
    best = best_anchors(anchors, torch.tensor([[100.0, 100.0, 105.0, 105.0]]), image)
    assert best.iou.item() == pytest.approx(25 / 1024)  # inside of the square of 32


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rounded": True, "inferred_strides": True},
        {"sizes": ((32, 40), (64, 80), (128, 160), (256, 320), (512, 640)), "ratios": (0.3, 3)},
        {"sizes": ((24, 80, 200),), "strides": (16,)},
    ],
)
def test_the_best_anchor_is_that_of_all(options: dict[str, Any]) -> None:
    """Boxes of all shapes and places, the borders too, in images of two sizes."""
    torch.manual_seed(0)
    anchors = make(**options)
    for height, width in ((96, 160), (224, 128)):
        low = torch.rand(300, 2) * torch.tensor([width, height])
        high = low + torch.rand(300, 2) ** 2 * (torch.tensor([width, height]) - low) + 0.1
        boxes = torch.cat([low, high], 1)
        best = best_anchors(anchors, boxes, torch.tensor([[height, width]]).expand(300, 2))
        levels = anchors([(-(-height // s), -(-width // s)) for s in anchors.strides])
        every = torch.stack([pairwise_iou(boxes[None], level[None])[0].amax(1) for level in levels])  # (L, B)
        torch.testing.assert_close(best.iou, every.amax(0), rtol=1e-5, atol=1e-6)
        assert torch.allclose(every.gather(0, best.level[None])[0], every.amax(0), rtol=1e-5, atol=1e-6)
        assert best.iou.max() > 0.5


def test_sizes_that_fit_stay() -> None:
    torch.manual_seed(0)
    boxes, sizes = squares(torch.tensor(SIZES[:4]).flatten().repeat(200).float())
    assert suggest_sizes(make(), boxes, sizes, present=SIZES, ratios=(0.5, 1, 2), positive_iou=0.7) == list(SIZES)


@pytest.mark.parametrize(
    ("strides", "present"), [(STRIDES, SIZES), ((16,), ((128, 256, 512),)), (STRIDES, tuple((s, 1) for (s,) in SIZES))]
)
def test_suggested_sizes_cover_boxes_that_the_present_ones_do_not(strides: Any, present: Any) -> None:
    """Objects of 12, 24 and 45 pixels under the anchors of COCO; present sizes that do not ascend are no obstacle."""
    torch.manual_seed(0)
    boxes, sizes = squares(torch.tensor([12.0, 24.0, 45.0]).repeat(300))
    old = make(sizes=present, strides=strides)
    found = suggest_sizes(old, boxes, sizes, present=present, ratios=(0.5, 1, 2), positive_iou=0.7)
    assert [len(level) for level in found] == [len(level) for level in present]
    flat = [size for level in found for size in level]
    assert all(low < high for low, high in pairwise(flat))
    before = best_anchors(old, boxes, sizes).iou
    after = best_anchors(make(sizes=found, strides=strides), boxes, sizes).iou
    assert after.mean() > before.mean() + 0.1
    assert (after >= 0.7).float().mean() >= (before >= 0.7).float().mean()
    if strides == STRIDES:
        assert after.min() > 0.5


def test_sizes_that_nothing_depends_on_stay_as_they_are() -> None:
    """No box is large, so the coarse levels could have any size."""
    torch.manual_seed(0)
    boxes, sizes = squares(torch.full((300,), 14.0))
    found = suggest_sizes(make(), boxes, sizes, present=SIZES, ratios=(0.5, 1, 2), positive_iou=0.7)
    assert found[0] == (14,)
    assert found[2:] == list(SIZES[2:])
