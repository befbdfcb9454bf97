from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator

from fpn_det.models.anchors import Anchors

SIZES, RATIOS, STRIDES = (32, 64, 128, 256, 512), (0.5, 1, 2), (4, 8, 16, 32, 64)


def sides(anchors: torch.Tensor) -> list[list[float]]:
    """(w, h) of each."""
    return (anchors[:, 2:] - anchors[:, :2]).tolist()


def test_shapes_of_every_level() -> None:
    levels = Anchors(sizes=SIZES, ratios=RATIOS, strides=STRIDES)([(1, 1)] * 5)
    assert [len(level) for level in levels] == [3] * 5
    for level, size in zip(levels, SIZES, strict=True):
        assert level.dtype == torch.float32
        for (w, h), ratio in zip(sides(level), RATIOS, strict=True):
            assert w * h == pytest.approx(size**2)
            assert h / w == pytest.approx(ratio)
        assert (level[:, :2] + level[:, 2:]).abs().max() == 0  # centred on the origin


def test_grid() -> None:
    """Row-major, the ratios of a cell next to each other, centres at (column, row) * stride."""
    (anchors,) = Anchors(sizes=(32,), ratios=RATIOS, strides=(4,))([(2, 3)])
    assert anchors.shape == (2 * 3 * 3, 4)
    centers = ((anchors[:, :2] + anchors[:, 2:]) / 2).view(2, 3, 3, 2)
    for row in range(2):
        for column in range(3):
            assert centers[row, column].tolist() == [[column * 4.0, row * 4.0]] * 3
    assert anchors[1].tolist() == [-16, -16, 16, 16]
    assert anchors[3 * (3 + 2) + 1].tolist() == [8 - 16, 4 - 16, 8 + 16, 4 + 16]  # row 1, column 2


def test_rounded_like_torchvision() -> None:
    (anchors,) = Anchors(sizes=(32,), ratios=RATIOS, strides=(4,), rounded=True)([(1, 1)])
    assert sides(anchors) == [[46, 22], [32, 32], [22, 46]]


def test_rounded_equals_torchvision() -> None:
    shapes = [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]
    generator = AnchorGenerator(tuple((s,) for s in SIZES), (RATIOS,) * 5)
    images = SimpleNamespace(tensors=torch.zeros(1, 3, 128, 192), image_sizes=[(128, 192)])
    (expected,) = generator(images, [torch.zeros(1, 1, *shape) for shape in shapes])
    anchors = Anchors(sizes=SIZES, ratios=RATIOS, strides=STRIDES, rounded=True)(shapes)
    assert torch.equal(torch.cat(anchors), expected)


def test_not_part_of_checkpoints_but_moves_with_the_model() -> None:
    anchors = Anchors(sizes=SIZES, ratios=RATIOS, strides=STRIDES)
    assert anchors.num_ratios == 3
    assert not anchors.state_dict()
    assert anchors.to("meta")([(1, 1)] * 5)[0].device.type == "meta"


def test_one_size_per_level() -> None:
    with pytest.raises(ValueError, match="4 sizes for 5 levels"):
        Anchors(sizes=SIZES[:4], ratios=RATIOS, strides=STRIDES)
