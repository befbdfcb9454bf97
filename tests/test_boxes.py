import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpn_det.boxes import MAX_LOG_SCALE, clip, decode, encode, nonempty, rescale

coordinate = st.floats(0, 1000, width=32)
side = st.floats(4, 200, width=32)  # the ratio of two sides stays below the clamp


@st.composite
def boxes(draw: st.DrawFn) -> Tensor:
    x, y, w, h = draw(coordinate), draw(coordinate), draw(side), draw(side)
    return torch.tensor([x, y, x + w, y + h], dtype=torch.float32)


weights = st.sampled_from([(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 3.0, 4.0)])


@settings(max_examples=200, deadline=None)
@given(boxes(), boxes(), weights)
def test_decode_inverts_encode(box: Tensor, reference: Tensor, weight: tuple[float, float, float, float]) -> None:
    deltas = encode(box, reference, weight)
    assert deltas.dtype == torch.float32
    torch.testing.assert_close(decode(deltas, reference, weight), box, rtol=0, atol=5e-3)


def test_encode_by_hand() -> None:
    """Centre (5, 10), size (10, 20) -> centre (11, 14), size (20, 5)."""
    reference, box = torch.tensor([0.0, 0, 10, 20]), torch.tensor([1.0, 11.5, 21, 16.5])
    expected = [6 / 10, 4 / 20, math.log(2), math.log(1 / 4)]
    assert encode(box, reference).tolist() == pytest.approx(expected)
    weighted = encode(box, reference, (1.0, 2.0, 3.0, 4.0)).tolist()
    assert weighted == pytest.approx([x * w for x, w in zip(expected, (1, 2, 3, 4), strict=True)])


def test_decode_by_hand() -> None:
    reference = torch.tensor([0.0, 0, 10, 20])
    deltas = torch.tensor([2.0, 3.0, 4 * math.log(2), 5 * math.log(0.5)])
    assert decode(deltas, reference, (1.0, 2.0, 4.0, 5.0)).tolist() == pytest.approx([15, 35, 35, 45])


@settings(max_examples=100, deadline=None)
@given(boxes(), boxes(), weights)
def test_weights_are_plain_factors(box: Tensor, reference: Tensor, weight: tuple[float, float, float, float]) -> None:
    """To the bit, units included."""
    deltas = encode(box, reference)
    assert torch.equal(encode(box, reference, weight), deltas * torch.tensor(weight))
    assert torch.equal(decode(deltas, reference, weight), decode(deltas / torch.tensor(weight), reference))


def test_decode_clamps_growth_but_not_shrinking() -> None:
    assert math.exp(MAX_LOG_SCALE) == pytest.approx(1000 / 16)
    reference = torch.tensor([0.0, 0, 16, 16])
    grown = decode(torch.tensor([0.0, 0, 100, 100]), reference)
    assert grown.tolist() == pytest.approx([-492, -492, 508, 508], abs=1e-3)
    weighted = decode(torch.tensor([0.0, 0, 500, 500]), reference, (1.0, 1.0, 5.0, 5.0))  # clamped after the division
    torch.testing.assert_close(weighted, grown)
    assert decode(torch.tensor([0.0, 0, -20, -20]), reference)[2:].tolist() == pytest.approx([8, 8], abs=1e-4)


def test_decode_clamps_both_sides() -> None:
    """MMDetection's way: a box shrinks to 16 / 1000 of its size at most; within the bounds nothing changes."""
    reference = torch.tensor([0.0, 0, 1000, 2000])
    shrunk = decode(torch.tensor([0.0, 0, -100, -100]), reference, delta_clamp="both")
    torch.testing.assert_close(shrunk, torch.tensor([492.0, 984, 508, 1016]))
    weighted = decode(torch.tensor([0.0, 0, -500, -500]), reference, (1.0, 1.0, 5.0, 5.0), delta_clamp="both")
    assert torch.equal(weighted, shrunk)  # clamped after the division
    assert torch.equal(decode(torch.tensor([0.0, 0, -MAX_LOG_SCALE, -99]), reference, delta_clamp="both"), shrunk)
    for bound in ("upper", "both"):
        grown = decode(torch.tensor([0.0, 0, 100, 100]), torch.tensor([0.0, 0, 16, 16]), delta_clamp=bound)
        assert grown.tolist() == pytest.approx([-492, -492, 508, 508], abs=1e-3)
    inside = torch.tensor([0.3, -0.2, -4.1, 4.1])
    assert torch.equal(decode(inside, reference, delta_clamp="both"), decode(inside, reference))


def test_shapes_broadcast() -> None:
    reference = torch.tensor([[0.0, 0, 10, 20], [5, 5, 20, 9]])
    decoded = decode(torch.zeros(2, 3, 4), reference[:, None])
    assert decoded.shape == (2, 3, 4)
    torch.testing.assert_close(decoded, reference[:, None].expand(-1, 3, -1))
    assert encode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
    assert decode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_result_is_float32(dtype: torch.dtype) -> None:
    reference = torch.tensor([1000.0, 1000, 1003, 1003])
    decoded = decode(torch.zeros(4, dtype=dtype), reference)
    assert decoded.dtype == torch.float32
    assert decoded.tolist() == [1000, 1000, 1003, 1003]


def test_clip_to_height_and_width() -> None:
    box = torch.tensor([[-5.0, -6, 500, 600], [10, 20, 30, 40], [150, 90, 300, 300], [-9, -9, -1, -1]])
    clipped = clip(box, torch.tensor([100, 200]))  # h, w
    assert clipped.tolist() == [[0, 0, 200, 100], [10, 20, 30, 40], [150, 90, 200, 100], [0, 0, 0, 0]]


def test_clip_each_image_to_its_size() -> None:
    box = torch.tensor([0.0, 0, 500, 500]).expand(2, 3, 4)
    clipped = clip(box, torch.tensor([[100, 200], [50, 20]])[:, None])
    assert clipped[0].tolist() == [[0, 0, 200, 100]] * 3
    assert clipped[1].tolist() == [[0, 0, 20, 50]] * 3


def test_rescale_height_and_width() -> None:
    box = torch.tensor([[10.0, 20, 30, 40]])
    assert rescale(box, torch.tensor([100, 200]), torch.tensor([50, 600])).tolist() == [[30, 10, 90, 20]]


@settings(max_examples=50, deadline=None)
@given(boxes(), st.tuples(*[st.integers(1, 2000)] * 4))
def test_rescale_there_and_back(box: Tensor, sizes: tuple[int, int, int, int]) -> None:
    a, b = torch.tensor(sizes[:2]), torch.tensor(sizes[2:])
    torch.testing.assert_close(rescale(rescale(box, a, b), b, a), box)


def test_nonempty() -> None:
    nan, inf = math.nan, math.inf
    box = torch.tensor(
        [[0, 0, 3, 3.5], [0, 0, 0, 3], [0, 0, 3, 0], [3, 3, 0, 0], [nan, 0, 3, 3], [0, 0, 3, nan], [inf, 0, inf, 3]]
    )
    assert nonempty(box).tolist() == [True, False, False, False, False, False, False]
    assert nonempty(box[0], 2.9).item()
    assert not nonempty(box[0], 3.0).item()  # wider than, not as wide as
    assert not nonempty(box[0].flip(0) * -1, 3.2).item()
    assert nonempty(torch.zeros(2, 0, 4)).shape == (2, 0)
