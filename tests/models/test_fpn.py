import pytest
import torch
from torch import nn

from fpn_det.models.fpn import FPN

IN_CHANNELS = (4, 8, 16, 32)


def levels(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randn(2, c, *shape) for c, shape in zip(IN_CHANNELS, shapes, strict=True)]


@pytest.mark.parametrize(
    "shapes",
    [[(32, 40), (16, 20), (8, 10), (4, 5)], [(25, 33), (13, 17), (7, 9), (4, 5)], [(1, 1)] * 4],
    ids=["even", "odd", "one cell"],
)
def test_shapes(shapes: list[tuple[int, int]]) -> None:
    fpn = FPN(in_channels=IN_CHANNELS, channels=256, strides=(4, 8, 16, 32))
    assert fpn.strides == (4, 8, 16, 32, 64)
    pyramid = fpn(levels(*shapes))
    p6 = tuple(-(-n // 2) for n in shapes[-1])
    assert [p.shape for p in pyramid] == [(2, 256, *shape) for shape in [*shapes, p6]]


def test_p6_is_every_second_cell_of_p5() -> None:
    pyramid = FPN(in_channels=IN_CHANNELS, channels=8, strides=(4, 8, 16, 32))(
        levels((25, 33), (13, 17), (7, 9), (4, 5))
    )
    p5, p6 = pyramid[-2:]
    for y in range(2):
        for x in range(3):
            assert torch.equal(p6[:, :, y, x], p5[:, :, 2 * y, 2 * x])


def test_top_down_path_by_hand() -> None:
    """Channel-wise sums and identity convolutions: P2 is C2 + C3 repeated 2x2 + C4 repeated 4x4 + C5 repeated 8x8."""
    fpn = FPN(in_channels=(1, 1, 1, 1), channels=1, strides=(4, 8, 16, 32))
    for conv in fpn.lateral:
        nn.init.ones_(conv.weight)
    for conv in fpn.output:
        nn.init.dirac_(conv.weight)
    features = [torch.randn(1, 1, 8 // 2**i, 16 // 2**i) for i in range(4)]
    pyramid = fpn(features)
    expected = features[3]
    torch.testing.assert_close(pyramid[3], expected)
    for i in (2, 1, 0):
        expected = features[i] + expected.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        torch.testing.assert_close(pyramid[i], expected)


def test_init() -> None:
    fpn = FPN(in_channels=IN_CHANNELS, channels=64, strides=(4, 8, 16, 32))
    for conv in [*fpn.lateral, *fpn.output]:
        assert not conv.bias.any()
        bound = (3 / conv.weight[0].numel()) ** 0.5  # Kaiming-uniform, a=1
        assert 0.8 * bound < conv.weight.abs().max() <= bound
