"""Resizing inside of the graph against `fpn_det.data.transforms`, which it must repeat."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpn_det.data.transforms import ResizeKind, resize_to, resized_size
from fpn_det.export.resize import Resize
from fpn_det.structures import Sample

KINDS = get_args(ResizeKind)
SIDES = st.integers(1, 3000)


@pytest.mark.parametrize("kind", KINDS)
@given(size=st.tuples(SIDES, SIDES), short_side=st.sampled_from([64, 600, 800]), long_side=st.sampled_from([800, 1333]))
def test_sizes_are_the_same(kind: ResizeKind, size: tuple[int, int], short_side: int, long_side: int) -> None:
    resize = Resize(short_side=short_side, long_side=long_side, kind=kind)
    expected = resized_size(size, short_side=short_side, long_side=long_side, resize=kind)
    assert tuple(resize.resized_size(torch.tensor(size)).tolist()) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "size",
    [(64, 97), (31, 30), (200, 160), (100, 401), (64, 64)],
    ids=["wide", "up", "down", "long side", "as is"],
)
def test_pixels_are_the_same_and_the_rest_is_zero(kind: ResizeKind, size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    resized, (h, w), original_size = Resize(short_side=64, long_side=150, kind=kind)(image[None])
    expected = resize_to(Sample.to_detect_in(image), (int(h), int(w)), resize=kind).image.float()
    assert tuple(original_size.tolist()) == size
    assert resized.dtype == torch.float32
    assert all(side % 32 == 0 for side in resized.shape[2:])
    difference = (resized[0, :, :h, :w] - expected).abs().max()
    assert difference <= (0.01 if kind == "float" else 0)
    assert resized[0, :, h:].count_nonzero() == resized[0, :, :, w:].count_nonzero() == 0
