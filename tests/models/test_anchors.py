from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator

from fpn_det.models.anchors import Anchors, locate

SIZES, RATIOS, STRIDES = (32, 64, 128, 256, 512), (0.5, 1, 2), (4, 8, 16, 32, 64)


def sides(anchors: torch.Tensor) -> list[list[float]]:
    """(w, h) of each."""
    return (anchors[:, 2:] - anchors[:, :2]).tolist()


def test_shapes_of_every_level() -> None:
    levels = Anchors(sizes=[(s,) for s in SIZES], ratios=RATIOS, strides=STRIDES)([(1, 1)] * 5)
    assert [len(level) for level in levels] == [3] * 5
    for level, size in zip(levels, SIZES, strict=True):
        assert level.dtype == torch.float32
        for (w, h), ratio in zip(sides(level), RATIOS, strict=True):
            assert w * h == pytest.approx(size**2)
            assert h / w == pytest.approx(ratio)
        assert (level[:, :2] + level[:, 2:]).abs().max() == 0  # centred on the origin


def test_grid() -> None:
    """Row-major, the ratios of a cell next to each other, centres at (column, row) * stride."""
    (anchors,) = Anchors(sizes=[(32,)], ratios=RATIOS, strides=(4,))([(2, 3)])
    assert anchors.shape == (2 * 3 * 3, 4)
    centers = ((anchors[:, :2] + anchors[:, 2:]) / 2).view(2, 3, 3, 2)
    for row in range(2):
        for column in range(3):
            assert centers[row, column].tolist() == [[column * 4.0, row * 4.0]] * 3
    assert anchors[1].tolist() == [-16, -16, 16, 16]
    assert anchors[3 * (3 + 2) + 1].tolist() == [8 - 16, 4 - 16, 8 + 16, 4 + 16]  # row 1, column 2


def test_rounded_like_torchvision() -> None:
    (anchors,) = Anchors(sizes=[(32,)], ratios=RATIOS, strides=(4,), rounded=True)([(1, 1)])
    assert sides(anchors) == [[46, 22], [32, 32], [22, 46]]


def test_rounded_equals_torchvision() -> None:
    shapes = [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]
    generator = AnchorGenerator(tuple((s,) for s in SIZES), (RATIOS,) * 5)
    images = SimpleNamespace(tensors=torch.zeros(1, 3, 128, 192), image_sizes=[(128, 192)])
    (expected,) = generator(images, [torch.zeros(1, 1, *shape) for shape in shapes])
    anchors = Anchors(sizes=[(s,) for s in SIZES], ratios=RATIOS, strides=STRIDES, rounded=True)(shapes)
    assert torch.equal(torch.cat(anchors), expected)


def test_not_part_of_checkpoints_but_moves_with_the_model() -> None:
    anchors = Anchors(sizes=[(s,) for s in SIZES], ratios=RATIOS, strides=STRIDES)
    assert anchors.num_per_location == 3
    assert not anchors.state_dict()
    assert anchors.to("meta")([(1, 1)] * 5)[0].device.type == "meta"


def test_one_size_per_level() -> None:
    with pytest.raises(ValueError, match="got 4 for 5 levels"):
        Anchors(sizes=[(s,) for s in SIZES[:4]], ratios=RATIOS, strides=STRIDES)


def test_several_sizes_per_level() -> None:
    """The ratios of a size next to each other, then the next size."""
    anchors = Anchors(sizes=[(32, 64), (128, 512)], ratios=(0.25, 1, 4), strides=(4, 8))
    assert anchors.num_per_location == 6
    fine, coarse = anchors([(2, 3), (1, 2)])
    assert (len(fine), len(coarse)) == (2 * 3 * 6, 2 * 6)
    assert sides(fine[:6]) == [[64, 16], [32, 32], [16, 64], [128, 32], [64, 64], [32, 128]]
    assert sides(coarse[6:]) == [[256, 64], [128, 128], [64, 256], [1024, 256], [512, 512], [256, 1024]]
    centers = (fine[:, :2] + fine[:, 2:]) / 2
    assert centers.view(2, 3, 6, 2)[1, 2].tolist() == [[8, 4]] * 6


def theirs(strides: tuple[int, ...], side: tuple[int, int]) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """Shapes of the levels of a padded image, and torchvision's anchors for them."""
    shapes = [(-(-side[0] // stride), -(-side[1] // stride)) for stride in strides]
    generator = AnchorGenerator(tuple((s,) for s in SIZES[: len(strides)]), (RATIOS,) * len(strides))
    images = SimpleNamespace(tensors=torch.empty(1, 3, *side), image_sizes=[side])
    (anchors,) = generator(images, [torch.empty(1, 1, *shape) for shape in shapes])
    return shapes, anchors


@pytest.mark.parametrize("strides", [STRIDES, (16,)], ids=["pyramid", "C4"])
@pytest.mark.parametrize("side", [(800, 1088), (1056, 800), (32, 96), (128, 192)])
def test_inferred_strides_equal_torchvision(side: tuple[int, int], strides: tuple[int, ...]) -> None:
    shapes, expected = theirs(strides, side)
    options = {"sizes": [(s,) for s in SIZES[: len(strides)]], "ratios": RATIOS, "strides": strides, "rounded": True}
    inferred = torch.cat(Anchors(**options, inferred_strides=True)(shapes))
    assert torch.equal(inferred, expected)
    declared = torch.cat(Anchors(**options)(shapes))
    divisible = all(n % strides[-1] == 0 for n in side)
    assert torch.equal(declared, expected) == divisible


def test_inferred_strides_by_hand() -> None:
    """An image of 800 x 1088 has a P6 of 13 x 17 cells: strides 61 and 64."""
    anchors = Anchors(sizes=[(s,) for s in SIZES], ratios=(1,), strides=STRIDES, inferred_strides=True)
    p6 = anchors([(200, 272), (100, 136), (50, 68), (25, 34), (13, 17)])[-1]
    centers = ((p6[:, :2] + p6[:, 2:]) / 2).view(13, 17, 2)
    assert centers[1, 1].tolist() == [64, 61]
    assert centers[12, 16].tolist() == [16 * 64, 12 * 61]


def test_locate() -> None:
    """Every anchor's place by counting."""
    shapes = [(3, 4), (2, 2), (1, 1)]
    counted = [
        (row, column, h, w, sum(a * b for a, b in shapes[:i]), shape)
        for i, (h, w) in enumerate(shapes)
        for row in range(h)
        for column in range(w)
        for shape in range(3)
    ]
    index = torch.randperm(len(counted)).view(3, 17)
    place = locate(index, shapes, num_per_location=3)
    fields = (place.row, place.column, place.height, place.width, place.level_start, place.shape)
    assert [tuple(f.flatten()[i].item() for f in fields) for i in range(51)] == [counted[i] for i in index.flatten()]
