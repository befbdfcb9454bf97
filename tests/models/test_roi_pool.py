import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from fpn_det.models.roi_pool import MultiLevelRoIAlign

STRIDES = (4, 8, 16, 32)


def box(w: float, h: float) -> list[float]:
    return [3.0, 5.0, 3.0 + w, 5.0 + h]


def features(channels: int = 3, n: int = 2) -> list[Tensor]:
    """Of images of 256 x 320, and a P6 that must not be used."""
    levels = [torch.randn(n, channels, 256 // s, 320 // s) for s in STRIDES]
    return [*levels, torch.full((n, channels, 4, 5), torch.nan)]


@pytest.mark.parametrize(
    ("w", "h", "level"),
    [
        (224, 224, 4),
        (223.9, 223.9, 3),
        (112, 112, 3),
        (111.9, 111.9, 2),
        (448, 448, 5),
        (447.9, 447.9, 4),
        (448, 112, 4),  # the area counts, not a side
        (112, 448, 4),
        (28, 1792, 4),
        (50, 60, 2),
        (1, 1, 2),
        (0, 10, 2),  # empty, as the padding of proposals
        (0, 0, 2),
        (5000, 5000, 5),
    ],
)
def test_level_rule(w: float, h: float, level: int) -> None:
    pooler = MultiLevelRoIAlign(strides=STRIDES)
    assert pooler.assign_levels(torch.tensor([[box(w, h)]])).item() == level - 2


def test_canonical_level_and_size() -> None:
    boxes = torch.tensor([box(56, 56), box(112, 112), box(224, 224)])
    assert MultiLevelRoIAlign(strides=STRIDES, canonical_level=5).assign_levels(boxes).tolist() == [1, 2, 3]
    assert MultiLevelRoIAlign(strides=STRIDES, canonical_size=56).assign_levels(boxes).tolist() == [2, 3, 3]
    assert MultiLevelRoIAlign(strides=(8, 16, 32)).assign_levels(boxes).tolist() == [0, 0, 1]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("way", ["_sum_cells", "_sum_levels"])
def test_equals_one_call_per_box(aligned: bool, sampling_ratio: int, way: str) -> None:
    """The way of the CPU and that of the GPU."""
    torch.manual_seed(1)
    pooler = MultiLevelRoIAlign(
        strides=STRIDES, output_size=5, sampling_ratio=sampling_ratio, aligned=aligned, canonical_size=56
    )
    corner = torch.rand(2, 30, 2) * 150
    boxes = torch.cat([corner, corner + 1 + torch.rand(2, 30, 2) * 200], dim=-1)
    levels = pooler.assign_levels(boxes)
    assert levels.unique().tolist() == [0, 1, 2, 3]
    maps = features()
    pooled = getattr(pooler, way)(maps, boxes).view(2, 30, 3, 5, 5)
    for i in range(2):
        for j in range(30):
            level = int(levels[i, j])
            expected = roi_align(
                maps[level][i : i + 1],
                [boxes[i, j : j + 1]],
                output_size=5,
                spatial_scale=1 / STRIDES[level],
                sampling_ratio=sampling_ratio,
                aligned=aligned,
            )
            torch.testing.assert_close(pooled[i, j], expected[0])


@pytest.mark.parametrize("way", ["_sum_cells", "_sum_levels"])
@given(
    seed=st.integers(0, 2**32),
    aligned=st.booleans(),
    sampling_ratio=st.integers(0, 3),
    output_size=st.integers(1, 4),
    channels_last=st.booleans(),
)
def test_equals_roi_align(
    way: str, seed: int, aligned: bool, sampling_ratio: int, output_size: int, channels_last: bool
) -> None:
    """Boxes of any size anywhere, empty, outside, larger than the image; with the gradient, in double."""
    torch.manual_seed(seed)
    options = {"output_size": output_size, "sampling_ratio": sampling_ratio, "aligned": aligned}
    pooler = MultiLevelRoIAlign(strides=(4, 8), canonical_size=448, **options)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    maps = [torch.randn(2, 3, h, w, dtype=torch.float64) for h, w in ((5, 7), (3, 4))]
    maps = [f.contiguous(memory_format=memory_format).requires_grad_() for f in maps]
    center, size = torch.rand(2, 6, 2) * 60 - 15, (torch.randn(2, 6, 2).exp() * 20 - 3).clamp(min=0)
    boxes = torch.cat([center - size / 2, center + size / 2], -1).double()
    boxes[0, 0, 2:] = boxes[0, 0, :2]
    boxes[1, 1] = torch.tensor([0.0, 0, 28, 20])
    pooled = getattr(pooler, way)(maps, boxes)
    level = pooler.assign_levels(boxes)
    expected = torch.stack(
        [
            roi_align(maps[k][i : i + 1], [boxes[i, j : j + 1]], spatial_scale=1 / (4 << k), **options)[0]
            for i in range(2)
            for j in range(6)
            for k in [int(level[i, j])]
        ]
    )
    torch.testing.assert_close(pooled, expected)
    grad = torch.randn(expected.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(pooled, maps, grad, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, maps, grad, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_geometry_is_float32_under_autocast(dtype: torch.dtype) -> None:
    """Beyond 256 pixels bfloat16 cannot tell neighbouring pixels apart."""
    ramp = torch.arange(400.0).expand(1, 1, 4, 400).to(dtype)
    pooler = MultiLevelRoIAlign(strides=(4,), output_size=1)
    boxes = torch.tensor([[[1201.0, 2, 1207, 8], [1203.0, 2, 1209, 8]]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        pooled = pooler([ramp], boxes)
    assert pooled.dtype == torch.float32
    # Sampling points 300.125 and 300.875 of the first box, 300.625 and 301.375 of the second; bfloat16 has no 301.
    assert pooled.flatten().tolist() == ([300.5, 301.0] if dtype == torch.float32 else [300.0, 300.375])


@pytest.mark.parametrize(("aligned", "offset"), [(True, 0.5), (False, 0.0)])
def test_coordinates_on_a_ramp(aligned: bool, offset: float) -> None:
    """Features that equal the position in cells come back as the centres of the bins, half a cell apart if aligned."""
    ramp = torch.arange(80.0).expand(1, 1, 64, 80).clone()
    pooler = MultiLevelRoIAlign(strides=STRIDES, output_size=4, aligned=aligned)
    maps = [ramp, *features(channels=1, n=1)[1:]]
    (pooled,) = pooler(maps, torch.tensor([[[40.0, 40, 104, 104]]]))  # cells 10..26 of P2, bins of 4 cells
    assert pooled[0, 0].tolist() == pytest.approx([12 - offset, 16 - offset, 20 - offset, 24 - offset])


def test_no_boxes_and_one_level_only() -> None:
    pooler = MultiLevelRoIAlign(strides=STRIDES)
    assert pooler(features(), torch.zeros(2, 0, 4)).shape == (0, 3, 7, 7)
    assert pooler(features(), torch.tensor([[box(20, 20)], [box(30, 10)]])).shape == (2, 3, 7, 7)


def test_gradient_reaches_the_level_of_the_box_only() -> None:
    maps = [f.requires_grad_() for f in features()[:4]]
    boxes = torch.tensor([[box(120, 120), box(120, 120)], [box(130, 120), box(120, 110)]])
    pooled = MultiLevelRoIAlign(strides=STRIDES)(maps, boxes)
    pooled.sum().backward()
    grads = [f.grad for f in maps]
    assert grads[1] is not None
    # The mean of each bin: every RoI hands down 49 per channel, unless it samples beyond the border.
    assert grads[1].sum().item() == pytest.approx(pooled.numel(), rel=1e-4)
    assert all(g is None or not g.any() for i, g in enumerate(grads) if i != 1)


def test_strides_must_be_powers_of_two() -> None:
    with pytest.raises(ValueError, match=r"consecutive powers of two, not \(4, 16\)"):
        MultiLevelRoIAlign(strides=(4, 16))


def around(borders: list[float], ulps: int) -> Tensor:
    """The float32 numbers nearest to each border, `ulps` on each side, and the border."""
    found = []
    for direction in (-math.inf, math.inf):
        x = torch.tensor(borders)
        for _ in range(ulps + 1):
            found.append(x)
            x = torch.nextafter(x, torch.tensor(direction))
    return torch.cat(found).unique()


def squares(sides: Tensor) -> Tensor:
    """Boxes at the origin, so that their sides are exact: w * h is a square, of which the root is exact too."""
    zero = torch.zeros_like(sides)
    return torch.stack([zero, zero, sides, sides], dim=-1)


SIDES = [around([14.0, 28, 56, 112, 224, 448, 896, 1792], ulps=60), torch.linspace(0.5, 1500, 3000), torch.zeros(1)]


def test_level_as_in_torchvision() -> None:
    """`LevelMapper`, and the formula on its own: floor(4 + log2(s / 224) + 1e-6)."""
    sides = torch.cat(SIDES)
    pooler = MultiLevelRoIAlign(strides=STRIDES, level_bias=1e-6)
    found = pooler.assign_levels(squares(sides))
    expected = (4 + torch.log2(sides / 224) + 1e-6).floor().clamp(2, 5) - 2
    assert torch.equal(found, expected.long())
    assert torch.equal(found, LevelMapper(2, 5)([squares(sides)]))
    below = torch.nextafter(torch.tensor(224.0), torch.tensor(0.0))
    assert pooler.assign_levels(squares(below)) == 2  # torchvision's border lies a little below 224
    assert MultiLevelRoIAlign(strides=STRIDES).assign_levels(squares(below * (1 - 3e-7))) == 1
    assert not torch.equal(found, MultiLevelRoIAlign(strides=STRIDES).assign_levels(squares(sides)))


def test_level_as_in_detectron2() -> None:
    """floor(4 + log2(s / 224 + 1e-8)) (`assign_boxes_to_levels`)."""
    sides = torch.cat(SIDES)
    found = MultiLevelRoIAlign(strides=STRIDES, level_eps=1e-8).assign_levels(squares(sides))
    expected = (4 + torch.log2(sides / 224 + 1e-8)).floor().clamp(2, 5) - 2
    assert torch.equal(found, expected.long())


def test_level_as_in_mmdetection() -> None:
    """floor(log2(s / 56 + 1e-6)) (`map_roi_levels`), but for two float32 numbers below each border."""
    pooler = MultiLevelRoIAlign(strides=STRIDES, level_eps=2.5e-7)
    sides = torch.cat(SIDES)

    def theirs(s: Tensor) -> Tensor:
        return torch.log2(s / 56 + 1e-6).floor().clamp(0, 3).long()

    found = pooler.assign_levels(squares(sides))
    differs = found != theirs(sides)
    neighbour = sides[differs]
    for _ in range(2):  # their sum, of another magnitude, is rounded to another digit
        neighbour = torch.nextafter(neighbour, torch.tensor(math.inf))
    assert torch.equal(found[differs], theirs(neighbour))
    assert differs.sum() <= 2 * 3
    # Where the eps decides: 5.6e-5 pixels, whatever the level.
    for border, level in ((112.0, 1), (224.0, 2)):
        near, far = torch.tensor(border - 2.5e-5), torch.tensor(border - 1.2e-4)
        assert [pooler.assign_levels(squares(s)) for s in (near, far)] == [level, level - 1]
        assert [theirs(s) for s in (near, far)] == [level, level - 1]


def test_one_level_takes_all() -> None:
    """A body without a pyramid."""
    pooler = MultiLevelRoIAlign(strides=(16,), output_size=3)
    boxes = torch.tensor([[box(5, 5), box(900, 700), box(0, 0)]])
    assert pooler.assign_levels(boxes).tolist() == [[0, 0, 0]]
    c4 = torch.randn(1, 2, 20, 20)
    expected = roi_align(c4, [boxes[0]], output_size=3, spatial_scale=1 / 16, aligned=True)
    torch.testing.assert_close(pooler([c4], boxes), expected)
