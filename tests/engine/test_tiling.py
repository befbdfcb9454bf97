"""Tiles of large images, and one detection per object out of those of all tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_det.engine.tiling import merge_windows, windows_of
from fpn_det.structures import Detections

SIZE = (300, 500)
LEFT, RIGHT = (0, 0, 300, 300), (200, 0, 500, 300)
WHOLE = (0, 0, 500, 300)


def found(*boxes: tuple[float, float, float, float, float, int]) -> Detections:
    """x1, y1, x2, y2, score, label each."""
    table = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6)
    return Detections(boxes=table[:, :4], scores=table[:, 4], labels=table[:, 5].long())


def merged(*parts: tuple[tuple[int, int, int, int], Detections], thresh: float = 0.5) -> list[tuple]:
    windows, detections = zip(*parts, strict=True)
    result = merge_windows(detections, windows, size=SIZE, iou_thresh=thresh)
    scores = [round(score, 4) for score in result.scores.tolist()]
    return [(*box, s, k) for box, s, k in zip(result.boxes.tolist(), scores, result.labels.tolist(), strict=True)]


SIDES = st.integers(1, 500)


@settings(max_examples=50, deadline=None)
@given(st.tuples(SIDES, SIDES), st.integers(50, 200), st.floats(0, 0.7), st.randoms(use_true_random=True))
def test_tiles_cover_the_image_and_show_small_objects_wholly(size, tile_size, overlap, rng) -> None:
    h, w = size
    whole, *tiles = windows_of(size, tile_size=tile_size, overlap=overlap)
    assert whole == (0, 0, w, h)
    if max(size) <= tile_size:
        assert tiles == []
        return
    assert {(x2 - x1, y2 - y1) for x1, y1, x2, y2 in tiles} == {(min(tile_size, w), min(tile_size, h))}
    assert len(set(tiles)) == len(tiles)
    shared = max(round(tile_size * overlap) - 1, 1)  # whole pixels
    for _ in range(10):
        box_w, box_h = min(shared, w), min(shared, h)
        x, y = rng.randint(0, w - box_w), rng.randint(0, h - box_h)
        assert any(x1 <= x and y1 <= y and x + box_w <= x2 and y + box_h <= y2 for x1, y1, x2, y2 in tiles)


def test_no_tiles() -> None:
    assert windows_of(SIZE, tile_size=None, overlap=0.2) == [WHOLE]


def test_an_object_in_two_tiles_is_one() -> None:
    left, right = found((210, 10, 260, 60, 0.8, 1)), found((11, 10, 60, 60, 0.9, 1))
    assert merged((LEFT, left), (RIGHT, right)) == [(211, 10, 260, 60, 0.9, 1)]


def test_a_part_gives_way_to_the_whole_even_if_it_scores_better() -> None:
    part, whole = found((250, 10, 300, 60, 0.9, 1)), found((50, 10, 150, 60, 0.6, 1))
    assert merged((LEFT, part), (RIGHT, whole)) == [(250, 10, 350, 60, 0.6, 1)]
    large = found((100, 100, 480, 200, 0.5, 0))  # seen wholly in the whole image only
    parts = (LEFT, found((100, 100, 300, 200, 0.9, 0))), (RIGHT, found((0, 100, 280, 200, 0.8, 0)))
    assert merged((WHOLE, large), *parts) == [(100, 100, 480, 200, 0.5, 0)]


def test_a_part_that_does_not_fill_what_its_window_sees_of_the_whole_gives_way() -> None:
    tip, triangle = found((260, 80, 298, 120, 0.9, 1)), found((60, 20, 220, 180, 0.8, 1))
    assert merged((LEFT, tip), (RIGHT, triangle)) == [(260, 20, 420, 180, 0.8, 1)]


@pytest.mark.parametrize(("score", "num_left"), [(0.6, 1), (0.3, 2)])
def test_half_an_object_is_not_something_else(score, num_left) -> None:
    """Unless what shows it wholly is a guess."""
    half, circle = found((251, 10, 300, 60, 0.9, 1)), found((50, 10, 150, 60, score, 2))
    assert len(merged((LEFT, half), (RIGHT, circle))) == num_left


def test_what_is_seen_wholly_inside_another_object_stays() -> None:
    both = found((20, 30, 150, 150, 0.9, 2), (30, 40, 80, 120, 0.7, 1))
    assert len(merged((LEFT, found()), (RIGHT, both))) == 2


def test_a_regressed_edge_is_a_few_pixels_off_the_border() -> None:
    half, circle = found((250, 10, 297, 60, 0.9, 1)), found((50, 10, 150, 60, 0.8, 2))
    assert merged((LEFT, half), (RIGHT, circle)) == [(250, 10, 350, 60, 0.8, 2)]


def test_parts_alone_become_the_box_around_them() -> None:
    parts = (LEFT, found((100, 100, 300, 200, 0.7, 0))), (RIGHT, found((0, 101, 280, 200, 0.8, 0)))
    assert merged(*parts) == [(100, 100, 480, 200, 0.8, 0)]


def test_a_chain_of_parts_becomes_one_box() -> None:
    windows = [(i * 150, 0, i * 150 + 200, 300) for i in range(3)]
    parts = [found((100, 50, 200, 90, 0.5, 2)), found((0, 50, 200, 90, 0.6, 2)), found((0, 50, 100, 90, 0.4, 2))]
    assert merged(*zip(windows, parts, strict=True)) == [(100, 50, 400, 90, 0.6, 2)]


@pytest.mark.parametrize(
    "other",
    [
        (0, 100, 280, 200, 0.8, 1),  # of another class
        (0, 220, 280, 290, 0.8, 0),  # at another height
        (120, 100, 280, 200, 0.8, 0),  # beyond what the left tile sees
    ],
)
def test_parts_of_different_objects_stay_apart(other) -> None:
    x1, y1, x2, y2, score, label = other
    part = (100, 100, 300, 200, 0.7, 0)
    assert merged((LEFT, found(part)), (RIGHT, found(other))) == [
        (x1 + 200, y1, x2 + 200, y2, score, label),
        (*part[:4], 0.7, 0),
    ]


def test_wholes_that_coincide_only_in_the_shared_strip_stay_apart() -> None:
    one, other = found((20, 10, 280, 60, 0.9, 0)), found((25, 10, 290, 60, 0.8, 0))
    assert len(merged((LEFT, one), (RIGHT, other))) == 2  # IoU 0.12, though 0.94 within the strip


def test_a_small_object_inside_a_large_one_stays() -> None:
    large, small = found((100, 50, 480, 250, 0.9, 0)), found((150, 100, 180, 130, 0.8, 0))
    assert len(merged((WHOLE, large), (LEFT, small), (RIGHT, found()))) == 2


def test_a_box_at_the_border_of_the_image_is_whole() -> None:
    at_the_border = found((0, 0, 50, 50, 0.9, 0))
    assert merged((LEFT, at_the_border), (RIGHT, found())) == [(0, 0, 50, 50, 0.9, 0)]


def test_nothing_found_anywhere() -> None:
    assert merged((LEFT, found()), (RIGHT, found())) == []


def test_many_detections_are_compared_in_blocks(monkeypatch) -> None:
    corners = [(x, y) for x in range(0, 280, 20) for y in range(0, 280, 20)]
    left = found(*((x, y, x + 15, y + 15, 0.5 + x / 1000, 0) for x, y in corners))
    right = found(*((x, y, x + 15, y + 15, 0.4 + x / 1000, 0) for x, y in corners))
    expected = merged((LEFT, left), (RIGHT, right))
    monkeypatch.setattr("fpn_det.engine.tiling.BLOCK_ELEMENTS", 7)
    assert merged((LEFT, left), (RIGHT, right)) == expected
    assert len(expected) == len({box[:2] for box in expected}) > len(corners)
