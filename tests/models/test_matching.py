"""Matching and sampling against loops over exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou

from fpn_det.models import matching
from fpn_det.models.matching import ANCHORS, GROUND_TRUTH, PROPOSALS, match, noise, pairwise_iou, sample
from fpn_det.structures import Targets

Box = tuple[int, int, int, int]


@st.composite
def grid_boxes(draw: st.DrawFn, least: int = 0, most: int = 6) -> list[Box]:
    """Boxes with corners on a coarse grid, so that IoUs tie; some without area."""
    corner = st.integers(0, 4)
    quads = draw(st.lists(st.tuples(corner, corner, corner, corner), min_size=least, max_size=most))
    return [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in quads]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Box]], list[list[Box]]]:
    """Boxes and ground truth of 1 to 3 images; as many boxes in each image."""
    n, b = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    boxes = [draw(grid_boxes(least=b, most=b)) for _ in range(n)]
    return boxes, [draw(grid_boxes()) for _ in range(n)]


def make_targets(gts: list[list[Box]], holes: bool = False) -> tuple[Targets, list[list[int]]]:
    """Padded targets and the position of each ground truth; with `holes` an invalid box of full size leads."""
    g = max(map(len, gts)) + int(holes)
    boxes, valid = torch.zeros(len(gts), g, 4), torch.zeros(len(gts), g, dtype=torch.bool)
    if holes:
        boxes[:, 0] = torch.tensor([0.0, 0.0, 4.0, 4.0])
    for i, gt in enumerate(gts):
        for j, box in enumerate(gt):
            boxes[i, j + holes] = torch.tensor(box)
            valid[i, j + holes] = True
    positions = [[j + holes for j in range(len(gt))] for gt in gts]
    return Targets(boxes=boxes, labels=torch.zeros(len(gts), g, dtype=torch.int64), valid=valid), positions


def exact_iou(a: Box, b: Box) -> Fraction:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(w, 0) * max(h, 0)
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - intersection
    return Fraction(intersection, union) if union else Fraction(0)


def check_against_loops(boxes: list[list[Box]], gts: list[list[Box]], min_best_iou: float, holes: bool) -> None:
    targets, positions = make_targets(gts, holes)
    matches = match(torch.tensor(boxes, dtype=torch.float32), targets, min_best_iou=min_best_iou)
    for i, (image_boxes, gt) in enumerate(zip(boxes, gts, strict=True)):
        ious = [[exact_iou(g, box) for box in image_boxes] for g in gt]
        for b in range(len(image_boxes)):
            column = [row[b] for row in ious]
            best = max(column, default=Fraction(0))
            assert matches.iou[i, b].item() == pytest.approx(float(best), abs=1e-6)
            assert matches.gt_index[i, b] == (positions[i][column.index(best)] if best > 0 else 0)
            is_best = any(row[b] == max(row) and row[b] > 0 and row[b] >= min_best_iou for row in ious)
            assert matches.is_best[i, b] == is_best


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.25, 0.5]), st.booleans())
def test_match_equals_loops(problem: tuple[list[list[Box]], list[list[Box]]], min_best_iou: float, holes: bool) -> None:
    check_against_loops(*problem, min_best_iou, holes)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.5]), st.integers(1, 40))
def test_chunks_change_nothing(
    problem: tuple[list[list[Box]], list[list[Box]]], min_best_iou: float, elements: int
) -> None:
    """One element per chunk is one ground truth at a time; more are several, or all."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(matching, "IOU_CHUNK_ELEMENTS", elements)
        check_against_loops(*problem, min_best_iou, holes=False)


def test_no_chunk_exceeds_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def recording(a: Tensor, b: Tensor) -> Tensor:
        sizes.append(a.shape[0] * a.shape[1] * b.shape[1])
        return pairwise_iou(a, b)

    monkeypatch.setattr(matching, "IOU_CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(matching, "pairwise_iou", recording)
    match(torch.rand(2, 10, 4), make_targets([[(0, 0, 1, 1)] * 13, []])[0])
    assert sizes == [100, 100, 60]


def test_shared_boxes_equal_repeated_ones() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 4, 4], [0, 3, 1, 4]])
    targets, _ = make_targets([[(0, 0, 2, 3)], [(1, 1, 3, 4), (0, 3, 1, 4)]])
    shared, repeated = match(boxes, targets), match(boxes.expand(2, -1, -1), targets)
    assert shared.iou.shape == (2, 3)
    for name in ("gt_index", "iou", "is_best"):
        assert torch.equal(getattr(shared, name), getattr(repeated, name))


def test_no_ground_truth() -> None:
    matches = match(torch.rand(5, 4), make_targets([[], []])[0])
    assert matches.iou.tolist() == matches.gt_index.tolist() == [[0] * 5] * 2
    assert not matches.is_best.any()


def test_ties_are_all_best() -> None:
    """Two anchors that overlap a ground truth equally are both its best."""
    boxes = torch.tensor([[0.0, 0, 2, 2], [2, 0, 4, 2], [3, 0, 5, 2]])
    matches = match(boxes, make_targets([[(1, 0, 3, 2)]])[0])
    assert matches.is_best.tolist() == [[True, True, False]]
    assert matches.iou[0, :2].tolist() == pytest.approx([1 / 3, 1 / 3])


def test_ground_truth_without_overlap_has_no_best_box() -> None:
    matches = match(torch.tensor([[0.0, 0, 2, 2], [2, 0, 4, 2]]), make_targets([[(10, 10, 12, 12)]])[0])
    assert not matches.is_best.any()
    assert not matches.iou.any()


def test_min_best_iou_is_inclusive() -> None:
    boxes, (targets, _) = torch.tensor([[0.0, 0, 2, 2]]), make_targets([[(0, 0, 1, 2)]])  # IoU 0.5
    assert match(boxes, targets, min_best_iou=0.5).is_best.item()
    assert not match(boxes, targets, min_best_iou=0.51).is_best.item()


def test_pairwise_iou_equals_torchvision() -> None:
    torch.manual_seed(0)
    a, b = (torch.rand(2, n, 2, 2).sort(dim=2).values.flatten(2) * 100 for n in (30, 40))
    expected = torch.stack([box_iou(x, y) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(pairwise_iou(a, b), expected)


def test_pairwise_iou_equals_the_plain_form() -> None:
    """To the bit: equal, touching, distant boxes and such without area."""
    corners = torch.randint(0, 6, (2, 200, 2, 2)) * torch.rand(2, 1, 1, 1) * 100
    boxes = torch.cat([corners.amin(2), corners.amax(2)], dim=-1)
    a, b = boxes[:, :80], boxes[:, 60:]
    size = torch.minimum(a[:, :, None, 2:], b[:, None, :, 2:]) - torch.maximum(a[:, :, None, :2], b[:, None, :, :2])
    intersection = size.clamp(min=0).prod(dim=-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(dim=-1) for x in (a, b))
    union = area_a[:, :, None] + area_b[:, None] - intersection
    assert (union == 0).any()
    assert torch.equal(pairwise_iou(a, b), torch.where(union > 0, intersection / union, 0))


def test_inputs_are_left_alone() -> None:
    """IoUs are computed in place, the boxes are the caller's."""
    boxes, targets = torch.rand(2, 5, 4), make_targets([[(0, 0, 1, 1), (0, 0, 2, 2)], []], holes=True)[0]
    before = boxes.clone(), targets.boxes.clone()
    match(boxes, targets)
    assert torch.equal(boxes, before[0])
    assert torch.equal(targets.boxes, before[1])


@st.composite
def masks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(N, B) positive, negative; the rest is ignored."""
    n, b = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    kind = torch.tensor(draw(st.lists(st.sampled_from([0, 1, 2]), min_size=n * b, max_size=n * b))).view(n, b)
    return kind == 1, kind == 2


@settings(max_examples=150, deadline=None)
@given(masks(), st.integers(1, 15), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 2**63 - 1))
def test_sample_takes_what_there_is(pair: tuple[Tensor, Tensor], num: int, fraction: float, seed: int) -> None:
    positive, negative = pair
    draws = noise(torch.full((len(positive),), seed), positive.shape[1], salt=ANCHORS)
    index, is_positive, valid = sample(positive, negative, draws, num=num, positive_fraction=fraction)
    assert index.shape == is_positive.shape == valid.shape == (len(positive), min(num, positive.shape[1]))
    for i in range(len(positive)):
        num_positive = min(int(positive[i].sum()), int(num * fraction))
        num_negative = min(int(negative[i].sum()), num - num_positive)
        chosen = index[i, valid[i]]
        assert len(chosen.unique()) == len(chosen) == num_positive + num_negative
        assert positive[i, chosen].tolist() == is_positive[i, valid[i]].tolist()
        assert negative[i, chosen].tolist() == (~is_positive[i, valid[i]]).tolist()
        # Positives first, then negatives, then padding.
        order = [True] * num_positive + [False] * (index.shape[1] - num_positive)
        assert is_positive[i].tolist() == order
        assert valid[i].tolist() == [j < len(chosen) for j in range(index.shape[1])]


@pytest.mark.parametrize("low", [0.0, 1.0])
def test_the_extremes_of_noise_count(low: float) -> None:
    """0 and 1 themselves are numbers like others."""
    draws = torch.tensor([[low, 1 - low, low, 1 - low]])
    positive = torch.tensor([[True, True, False, False]])
    index, is_positive, valid = sample(positive, ~positive, draws, num=4, positive_fraction=0.5)
    assert sorted(index[0, :2].tolist()) == [0, 1]
    assert is_positive.tolist() == [[True, True, False, False]]
    assert valid.all()


def seeds_of_a_run(count: int) -> Tensor:
    """As the sampler of images draws them."""
    state = np.random.SeedSequence(5).generate_state(count, np.uint64) >> np.uint64(1)
    return torch.from_numpy(state.astype(np.int64))


@pytest.mark.parametrize("seeds", [seeds_of_a_run(4000), torch.arange(4000)], ids=["random", "consecutive"])
def test_sample_is_uniform(seeds: Tensor) -> None:
    """2 of 8 positives and 6 of 24 negatives: each is taken a quarter of the time, and each pair as often as chance."""
    rounds = len(seeds)
    kind = (torch.arange(36) % 9).expand(rounds, -1)  # 0, 1: positive; 2..7: negative; 8: ignored
    index, _, valid = sample(
        kind < 2, (kind >= 2) & (kind < 8), noise(seeds, 36, salt=ANCHORS), num=8, positive_fraction=0.25
    )
    assert valid.all()
    share = index.flatten().bincount(minlength=36) / rounds
    assert not share[kind[0] == 8].any()
    deviation = 5 * (0.25 * 0.75 / rounds) ** 0.5
    assert (share[kind[0] < 8] - 0.25).abs().max() < deviation
    taken = torch.zeros(rounds, 36).scatter_(1, index, 1.0)
    together = (taken.T @ taken / rounds)[kind[0] < 2][:, kind[0] < 2].fill_diagonal_(1 / 28)
    assert (together - 1 / 28).abs().max() < 5 * (1 / 28 / rounds) ** 0.5


def reference_noise(seed: int, position: int, salt: int) -> float:
    """In whole numbers: `lowbias32` of position and key, the key that of salt, lower and upper half of the seed."""

    def mix(x: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 16

    key = mix(mix(mix(salt) ^ seed % 2**32) ^ seed >> 32)
    return (mix(mix(position) ^ key) % 2**31) / 2**31


def test_noise_is_the_hash() -> None:
    seeds = [0, 1, 2**31, 2**32 + 5, 2**63 - 1, 0x123456789ABCDEF0]
    for salt in (ANCHORS, PROPOSALS, GROUND_TRUTH):
        expected = [[reference_noise(seed, position, salt) for position in range(50)] for seed in seeds]
        torch.testing.assert_close(noise(torch.tensor(seeds), 50, salt=salt), torch.tensor(expected), rtol=0, atol=1e-7)


def test_noise_does_not_depend_on_company() -> None:
    """The other images of the batch, the number of boxes, the generator."""
    seeds = seeds_of_a_run(8)
    whole = noise(seeds, 1000, salt=ANCHORS)
    assert torch.equal(noise(seeds.flip(0), 1000, salt=ANCHORS).flip(0), whole)
    assert torch.equal(noise(seeds[3:5], 1000, salt=ANCHORS), whole[3:5])
    assert torch.equal(noise(seeds, 37, salt=ANCHORS), whole[:, :37])
    assert noise(seeds, 0, salt=ANCHORS).shape == (8, 0)
    assert noise(seeds[:0], 9, salt=ANCHORS).shape == (0, 9)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    noise(seeds, 10, salt=ANCHORS)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seeds", [seeds_of_a_run(32), torch.arange(32)], ids=["random", "consecutive"])
def test_noise_is_independent_between_images_and_stages(seeds: Tensor) -> None:
    """Uniform in 64 bins (chi-squared), no correlation of any two rows, even shifted by one box; few ties."""
    num = 20_000
    rows = torch.cat([noise(seeds, num, salt=salt) for salt in (ANCHORS, PROPOSALS, GROUND_TRUTH)])
    assert 0 <= rows.min() < rows.max() <= 1
    counts = torch.stack([(row * 64).long().clamp(max=63).bincount(minlength=64) for row in rows]).double()
    chi_squared = ((counts - num / 64).square() / (num / 64)).sum(1)
    assert chi_squared.max() < 63 + 5 * 126**0.5
    assert (chi_squared.mean() - 63).abs() < 5 * (126 / len(rows)) ** 0.5
    every = torch.cat([rows, rows.roll(1, dims=1)])
    assert torch.corrcoef(every).fill_diagonal_(0).abs().max() < 5.5 / num**0.5
    lowest = noise(seeds, 267_000, salt=ANCHORS).sort(dim=1).values[:, :256]  # what a step of COCO takes
    assert lowest.diff().count_nonzero() == lowest.diff().numel()
