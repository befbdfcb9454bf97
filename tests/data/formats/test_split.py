"""Stratified division: every group once, parts of the right size, shares of classes near the fractions."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_det.data.formats.split import IMAGES, Counts, assign

FRACTIONS = [[0.8, 0.1, 0.1], [0.5, 0.5], [0.9, 0.1], [0.7, 0.2, 0.05, 0.05]]
images = st.lists(st.dictionaries(st.integers(0, 5), st.integers(0, 30), max_size=4), min_size=1, max_size=60)


def of(contents: list[dict[int, int]]) -> dict[str, Counts]:
    return {f"{i}.jpg": Counter({IMAGES: 1, **boxes}) for i, boxes in enumerate(contents)}


@settings(deadline=None)
@given(images, st.sampled_from(FRACTIONS), st.integers(0, 3))
def test_every_image_once_and_the_right_number_each(contents, fractions: list[float], seed: int) -> None:
    groups = of(contents)
    parts = assign(groups, fractions, seed=seed)
    assert parts.keys() == groups.keys()
    sizes = Counter(parts.values())
    for part, fraction in enumerate(fractions):
        assert abs(sizes[part] - fraction * len(groups)) < 1


@settings(deadline=None)
@given(images, st.sampled_from(FRACTIONS), st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_order_does_not_matter(contents, fractions: list[float], seed: int, rng: random.Random) -> None:
    groups = of(contents)
    shuffled = list(groups.items())
    rng.shuffle(shuffled)
    assert assign(dict(shuffled), fractions, seed=seed) == assign(groups, fractions, seed=seed)


def errors(groups: dict[str, Counts], parts: dict[str, int], fractions: list[float]) -> list[float]:
    """How far each part's share of each class is from its fraction, relative to that."""
    totals: Counts = sum(groups.values(), Counter())
    filled = [sum((groups[n] for n, p in parts.items() if p == part), Counter()) for part in range(len(fractions))]
    return [abs(f[key] / (totals[key] * x) - 1) for f, x in zip(filled, fractions, strict=True) for key in totals]


@pytest.mark.parametrize("seed", range(3))
def test_shares_of_a_long_tail(seed: int) -> None:
    """30 classes, the rarest in 1 % of the images of the most frequent, with 1 to 12 boxes in an image."""
    rng = random.Random(seed)
    weights = [1 / (k + 1) ** 1.3 for k in range(30)]
    contents = [
        dict(Counter(rng.choices(rng.choices(range(30), weights, k=3), k=rng.randrange(13)))) for _ in range(2000)
    ]
    groups, fractions = of(contents), [0.8, 0.1, 0.1]
    shuffled = sorted(groups, key=lambda name: rng.random())
    at_random = {name: (i >= 1600) + (i >= 1800) for i, name in enumerate(shuffled)}
    ours, theirs = (errors(groups, p, fractions) for p in (assign(groups, fractions, seed=seed), at_random))
    assert max(ours) < 0.2 < 0.4 < max(theirs)
    assert sum(ours) < sum(theirs) / 10


def test_a_seed_is_another_division() -> None:
    groups = of([{0: 1}] * 100)
    assert len({tuple(sorted(assign(groups, [0.5, 0.5], seed=seed).items())) for seed in range(5)}) == 5


def test_crowded_images_go_to_all_parts() -> None:
    """Largest first must not mean that the first part gets the largest."""
    groups = of([{0: 1 + i} for i in range(100)])
    parts = assign(groups, [0.8, 0.2], seed=0)
    crowded = [parts[f"{i}.jpg"] for i in range(80, 100)]
    assert crowded.count(1) == 4


def test_groups_larger_than_a_part() -> None:
    groups = {"a": Counter({IMAGES: 90, 0: 90}), "b": Counter({IMAGES: 10, 0: 10})}
    assert assign(groups, [0.5, 0.5], seed=0) in ({"a": 0, "b": 1}, {"a": 1, "b": 0})
