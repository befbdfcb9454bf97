"""Both implementations of NMS against torchvision's, tie by tie."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import batched_nms, box_iou
from torchvision.ops import nms as torchvision_nms

from fpn_det.models import nms
from fpn_det.models.nms import best, largest_float32_up_to, nms_per_class, nms_per_level, pack, solve

both = pytest.mark.parametrize("fixed_shape", [False, True])
thresholds = st.sampled_from([0.0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.7])
Problem = tuple[Tensor, Tensor, Tensor, Tensor]
"""Boxes (N, B, 4), scores, groups, valid."""


def draw_problem(draw: st.DrawFn, n: int, b: int) -> Problem:
    """On a coarse grid, so that boxes, scores and IoUs tie; some boxes touch, some have no area."""

    def numbers(count: int, most: int) -> Tensor:
        return torch.tensor(draw(st.lists(st.integers(0, most), min_size=count, max_size=count)), dtype=torch.int64)

    corners = numbers(n * b * 4, 6).view(n, b, 2, 2)
    scores, groups, valid = (numbers(n * b, most).view(n, b) for most in (3, 2, 4))
    return torch.cat([corners.amin(2), corners.amax(2)], dim=-1).float(), scores / 4, groups, valid > 0


@st.composite
def class_problems(draw: st.DrawFn) -> Problem:
    return draw_problem(draw, draw(st.integers(1, 3)), draw(st.integers(0, 14)))


@st.composite
def level_problems(draw: st.DrawFn) -> tuple[list[int], Problem]:
    """With the sizes of the levels; by descending score within each."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    boxes, scores, _, valid = draw_problem(draw, draw(st.integers(1, 3)), sum(sizes))
    scores = torch.cat([x.sort(dim=1, descending=True).values for x in scores.split(sizes, dim=1)], dim=1)
    levels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).expand_as(scores)
    return sizes, (boxes, scores, levels, valid)


def random_problem(n: int, b: int, *, num_groups: int) -> Problem:
    """Clusters of boxes of 20 to 60 pixels, jittered."""
    center = torch.rand(n, b // 8 + 1, 2)[:, torch.arange(b) % (b // 8 + 1)] * 400 + torch.randn(n, b, 2) * 6
    half = 10 + 20 * torch.rand(n, b, 2)
    boxes = torch.cat([center - half, center + half], dim=-1)
    return boxes, torch.rand(n, b), torch.randint(0, num_groups, (n, b)), torch.rand(n, b) > 0.1


def expected(problem: Problem, *, iou_thresh: float, top_k: int) -> list[list[int]]:
    """What torchvision keeps of each image."""
    keep = []
    for boxes, scores, groups, valid in zip(*problem, strict=True):
        chosen = valid.nonzero().squeeze(1)
        keep.append(chosen[batched_nms(boxes[chosen], scores[chosen], groups[chosen], iou_thresh)][:top_k].tolist())
    return keep


def kept_of(result: tuple[Tensor, Tensor]) -> list[list[int]]:
    """The kept indices of each image; they come first, and 0 follows."""
    index, kept = result
    counts = kept.sum(1).tolist()
    for i, count in enumerate(counts):
        assert kept[i, :count].all()
        assert not index[i, count:].any()
    return [index[i, :count].tolist() for i, count in enumerate(counts)]


@both
@settings(max_examples=300, deadline=None)
@given(problem=class_problems(), iou_thresh=thresholds, top_k=st.integers(1, 16))
def test_classes_equal_torchvision(fixed_shape: bool, problem: Problem, iou_thresh: float, top_k: int) -> None:
    found = kept_of(nms_per_class(*problem, iou_thresh=iou_thresh, top_k=top_k, fixed_shape=fixed_shape))
    assert found == expected(problem, iou_thresh=iou_thresh, top_k=top_k)


@both
@settings(max_examples=300, deadline=None)
@given(pair=level_problems(), iou_thresh=thresholds, top_k=st.integers(1, 16))
def test_levels_equal_torchvision(
    fixed_shape: bool, pair: tuple[list[int], Problem], iou_thresh: float, top_k: int
) -> None:
    sizes, problem = pair
    boxes, scores, _, valid = problem
    found = nms_per_level(
        boxes, scores, valid, level_sizes=sizes, iou_thresh=iou_thresh, top_k=top_k, fixed_shape=fixed_shape
    )
    assert kept_of(found) == expected(problem, iou_thresh=iou_thresh, top_k=top_k)


@pytest.mark.parametrize("block", [1, 1 << 24], ids=["64 rows at once", "all at once"])
@pytest.mark.parametrize("iou_thresh", [0.3, 0.5, 0.7])
def test_many_boxes(monkeypatch: pytest.MonkeyPatch, iou_thresh: float, block: int) -> None:
    """More than a word and a block hold, and not a multiple of 64."""
    monkeypatch.setattr(nms, "BLOCK_ELEMENTS", block)
    problem = random_problem(3, 500, num_groups=1)
    boxes, scores, _, valid = problem
    for fixed_shape in (False, True):
        found = nms_per_class(*problem, iou_thresh=iou_thresh, top_k=500, fixed_shape=fixed_shape)
        assert kept_of(found) == expected(problem, iou_thresh=iou_thresh, top_k=500)
    for boxes_of, scores_of, valid_of, found_of in zip(boxes, scores, valid, kept_of(found), strict=True):
        assert 50 < len(found_of) < 400
        slow = greedy(boxes_of, scores_of, valid_of, iou_thresh)
        assert found_of == slow


def test_blocks_are_no_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 rows of 3 problems of 512 boxes, each against the boxes up to the last of them."""
    shapes = []
    monkeypatch.setattr(nms, "pack", lambda mask: shapes.append(tuple(mask.shape)) or pack(mask))
    monkeypatch.setattr(nms, "BLOCK_ELEMENTS", 3 * 512 * 128)
    nms.better_overlaps(torch.rand(3, 512, 4), None, iou_thresh=0.5)
    assert shapes == [(3, 128, 128), (3, 128, 256), (3, 128, 384), (3, 128, 512)]


def greedy(boxes: Tensor, scores: Tensor, valid: Tensor, iou_thresh: float) -> list[int]:
    """By the definition, one box after the other."""
    keep: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if valid[i] and not (box_iou(boxes[i][None], boxes[keep]) > iou_thresh).any():
            keep.append(i)
    return keep


@pytest.mark.parametrize("interval", [1, 3, 16])
def test_chains_longer_than_the_interval(monkeypatch: pytest.MonkeyPatch, interval: int) -> None:
    """Each box overlaps only its neighbours: every other one stays, which is known after as many iterations."""
    monkeypatch.setattr(nms, "ITERATIONS_BEFORE_CHECK", interval)
    left = torch.arange(100.0) * 4
    boxes = torch.stack([left, torch.zeros(100), left + 10, torch.full((100,), 10.0)], dim=1)  # IoU 6/14, then 2/18
    valid = torch.ones(2, 100, dtype=torch.bool)
    valid[1, 0] = False
    keep = solve(boxes.expand(2, -1, -1), valid, iou_thresh=0.4)
    assert keep[0].tolist() == [i % 2 == 0 for i in range(100)]
    assert keep[1].tolist() == [i % 2 == 1 for i in range(100)]


@both
def test_threshold_is_exclusive_as_in_torchvision(fixed_shape: bool) -> None:
    """3/10 in float32 exceeds 0.3 in float64, 7/10 does not exceed 0.7, and 1/2 is 0.5."""
    for width, iou_thresh, kept in ((3.0, 0.3, 1), (7.0, 0.7, 2), (5.0, 0.5, 2)):
        boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, width, 10]]])
        scores, labels, valid = torch.tensor([[2.0, 1]]), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2) > 0
        assert len(torchvision_nms(boxes[0], scores[0], iou_thresh)) == kept
        found = nms_per_class(boxes, scores, labels, valid, iou_thresh=iou_thresh, top_k=2, fixed_shape=fixed_shape)
        assert found[1].sum() == kept


@given(st.floats(0, 1), st.floats(0, 1, width=32))
def test_largest_float32(x: float, iou: float) -> None:
    bound = largest_float32_up_to(x)
    assert bound == torch.tensor(bound, dtype=torch.float32).item() <= x
    assert (iou > bound) == (iou > x)


@both
def test_coordinates_are_not_rounded(fixed_shape: bool) -> None:
    """IoU 3/7 of boxes smaller than what float32 resolves at the offset that `batched_nms` gives to label 200."""
    boxes = torch.tensor([[[0.0, 0, 0.01, 0.01], [0.004, 0, 0.014, 0.01], [0, 0, 1000, 1000]]])
    scores, labels, valid = torch.tensor([[3.0, 2, 1]]), torch.tensor([[200, 200, 0]]), torch.ones(1, 3) > 0
    assert batched_nms(boxes[0], scores[0], labels[0], 0.5).tolist() == [0, 2]
    found = nms_per_class(boxes, scores, labels, valid, iou_thresh=0.5, top_k=3, fixed_shape=fixed_shape)
    assert kept_of(found) == [[0, 1, 2]]


@both
def test_nothing_to_do(fixed_shape: bool) -> None:
    options = {"iou_thresh": 0.5, "top_k": 4, "fixed_shape": fixed_shape}
    for n, b in ((0, 3), (2, 0), (2, 3)):
        boxes, scores, valid = torch.rand(n, b, 4), torch.rand(n, b), torch.zeros(n, b, dtype=torch.bool)
        of_classes = nms_per_class(boxes, scores, valid.long(), valid, **options)
        of_levels = nms_per_level(boxes, scores, valid, level_sizes=[b, 0], **options)
        assert kept_of(of_classes) == kept_of(of_levels) == [[]] * n


def test_too_many_boxes_for_fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are handled one by one, to the same result."""
    problem = random_problem(2, 100, num_groups=3)
    calls = []
    monkeypatch.setattr(nms, "nms", lambda *args: calls.append(args) or torchvision_nms(*args))
    results = []
    for limit in (100, 20):
        monkeypatch.setattr(nms, "MAX_FIXED_SHAPE_BOXES", limit)
        results.append(kept_of(nms_per_class(*problem, iou_thresh=0.5, top_k=50, fixed_shape=True)))
        assert len(calls) == (0 if limit == 100 else 6)
    assert results[0] == results[1] == expected(problem, iou_thresh=0.5, top_k=50)


def test_implementation_follows_the_device() -> None:
    assert not nms.prefers_fixed_shape(torch.device("cpu"))
    assert nms.prefers_fixed_shape(torch.device("cuda"))


def test_best() -> None:
    """The first of equals first; what is not to be kept is not, whatever its score."""
    scores, keep = torch.tensor([[1.0, 3, 3, 9, 2], [1, 2, 3, 4, torch.nan]]), torch.ones(2, 5) > 0
    keep[0, 3] = keep[1, :4] = keep[1, 4] = False
    index, kept = best(scores, keep, top_k=3)
    assert index.tolist() == [[1, 2, 4], [0, 0, 0]]
    assert kept.tolist() == [[True] * 3, [False] * 3]
    assert best(scores, keep, top_k=9)[0].tolist() == [[1, 2, 4, 0, 0], [0] * 5]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
def test_pack(words: list[int]) -> None:
    mask = torch.tensor([[word >> i & 1 for i in range(64)] for word in words], dtype=torch.bool).flatten()
    assert [word % 2**64 for word in pack(mask).tolist()] == words
