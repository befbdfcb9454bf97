"""The kernels of NMS against torchvision's and against plain PyTorch; run by test_kernels.py."""

import os

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms
from torchvision.ops import nms as torchvision_nms

from fpn_det import kernels
from fpn_det.models import nms

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")


def on_device(boxes: Tensor, valid: Tensor, *, labels: Tensor | None = None, **options) -> Tensor:
    """What `nms.solve` answers by the kernels; arguments and result are on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "serve", lambda x: True)
        patch.setattr(nms, "iterate", None)
        labels = None if labels is None else labels.to(DEVICE)
        return nms.solve(boxes.to(DEVICE), valid.to(DEVICE), labels=labels, **options).cpu()


def clusters(m: int, count: int, *, dice: torch.Generator) -> Tensor:
    """Boxes of 20 to 60 pixels, some eight around each of some centres."""
    centers = torch.rand(m, count // 8 + 1, 2, generator=dice) * 300
    center = centers[:, torch.arange(count) % (count // 8 + 1)] + torch.randn(m, count, 2, generator=dice) * 6
    half = 10 + 20 * torch.rand(m, count, 2, generator=dice)
    return torch.cat([center - half, center + half], dim=-1)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize(("m", "count"), [(1, 0), (6, 1), (1, 63), (6, 64), (6, 65), (1, 700)])
def test_random_boxes(m: int, count: int, with_labels: bool) -> None:
    dice = torch.Generator().manual_seed(count)
    boxes, valid = clusters(m, count, dice=dice), torch.rand(m, count, generator=dice) < 0.9
    labels = torch.randint(0, 2, (m, count), generator=dice) if with_labels else None
    keep = on_device(boxes, valid, iou_thresh=0.5, labels=labels)
    assert torch.equal(keep, nms.iterate(boxes, valid, iou_thresh=0.5, labels=labels))
    for i in range(m):
        chosen = valid[i].nonzero().squeeze(1)
        scores = torch.linspace(1, 0, count)[chosen]
        groups = torch.zeros_like(chosen) if labels is None else labels[i, chosen]
        expected = chosen[batched_nms(boxes[i, chosen], scores, groups, 0.5)]
        assert keep[i].nonzero().squeeze(1).tolist() == expected.tolist()
        assert count < 63 or 0.2 < len(expected) / count < 0.8


@pytest.mark.parametrize("iou_thresh", [0.0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.7])
def test_tied_overlaps(iou_thresh: float) -> None:
    """On a grid of 6 x 6: many IoUs are at the threshold, many boxes touch or have no area."""
    corners = torch.randint(0, 7, (5, 100, 2, 2), generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([corners.amin(2), corners.amax(2)], dim=-1).float()
    keep = on_device(boxes, torch.ones(5, 100) > 0, iou_thresh=iou_thresh)
    for boxes_of, kept in zip(boxes, keep, strict=True):
        expected = torchvision_nms(boxes_of, torch.linspace(1, 0, 100), iou_thresh)
        assert kept.nonzero().squeeze(1).tolist() == expected.tolist()


def test_overlaps_are_exact() -> None:
    """An IoU does not exceed itself, but the next float32 below: one wrong rounding would show in one of the pairs."""
    valid, num_compared = torch.ones(1, 2) > 0, 0
    for pair in clusters(30, 2, dice=torch.Generator().manual_seed(0)):
        (x1, y1, x2, y2), area = pair.unbind(1), (pair[:, 2] - pair[:, 0]) * (pair[:, 3] - pair[:, 1])
        overlap = (x2.min() - x1.max()).clamp(min=0) * (y2.min() - y1.max()).clamp(min=0)
        iou = overlap / (area.sum() - overlap)
        if iou > 0:
            below = torch.nextafter(iou, torch.zeros(()))
            assert on_device(pair[None], valid, iou_thresh=iou.item()).sum() == 2
            assert on_device(pair[None], valid, iou_thresh=below.item()).sum() == 1
            num_compared += 1
    assert num_compared >= 25


def test_odd_boxes() -> None:
    """Swapped corners, no area, NaN, infinities and what overflows: as plain PyTorch has it."""
    odd = torch.tensor([0.0, -0.0, 1, -1, 3, 7, 10, 1e-15, 1e20, -1e20, torch.inf, -torch.inf, torch.nan])
    dice = torch.Generator().manual_seed(0)
    boxes = odd[torch.randint(0, len(odd), (4, 130, 4), generator=dice)]
    boxes[2:] = torch.randint(-3, 4, (2, 130, 4), generator=dice).float()
    valid = torch.ones(4, 130, dtype=torch.bool)
    for iou_thresh in (0.0, 0.4):
        keep = on_device(boxes, valid, iou_thresh=iou_thresh)
        assert torch.equal(keep, nms.iterate(boxes, valid, iou_thresh=iou_thresh))
        assert not keep.all()


def test_chains() -> None:
    """Each box overlaps only its neighbours: every other one stays. Boxes that are not contiguous in memory, too."""
    left = torch.arange(150.0) * 4
    boxes = torch.stack([left, torch.zeros(150), left + 10, torch.full((150,), 10.0)], dim=1)  # IoU 6/14, then 2/18
    valid = torch.ones(2, 150, dtype=torch.bool)
    valid[1, 0] = False
    keep = on_device(boxes.expand(2, -1, -1), valid, iou_thresh=0.4)
    assert keep[0].tolist() == [i % 2 == 0 for i in range(150)]
    assert keep[1].tolist() == [i % 2 == 1 for i in range(150)]


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("sizes", [[70, 0, 33, 1], [1], [16, 16, 150]])
def test_levels(sizes: list[int], with_labels: bool) -> None:
    """Boxes of other levels do not count, nor does it matter whether a level fills a word."""
    dice = torch.Generator().manual_seed(0)
    boxes = clusters(3, sum(sizes), dice=dice)
    valid = torch.rand(3, sum(sizes), generator=dice) < 0.9
    labels = torch.randint(0, 2, valid.shape, generator=dice) if with_labels else None
    options = {"level_sizes": sizes, "iou_thresh": 0.3, "labels": labels}
    levels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).expand(3, -1)
    groups = levels if labels is None else levels * 2 + labels
    expected = nms.iterate(boxes, valid, iou_thresh=0.3, labels=groups)
    assert torch.equal(on_device(boxes, valid, **options), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "available", lambda device: False)
        assert torch.equal(nms.solve(boxes, valid, **options), expected)


def test_no_images() -> None:
    assert on_device(torch.rand(0, 3, 4), torch.ones(0, 3) > 0, iou_thresh=0.5).shape == (0, 3)
    assert on_device(torch.rand(2, 0, 4), torch.ones(2, 0) > 0, level_sizes=[0, 0], iou_thresh=0.5).shape == (2, 0)
