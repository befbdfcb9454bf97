import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from fpn_det.models.backbone import ResNet
from fpn_det.models.fpn import FPN, PAFPN, SingleLevel, Upsample

IN_CHANNELS, STRIDES = (4, 8, 16, 32), (4, 8, 16, 32)
ODD = [(25, 33), (13, 17), (7, 9), (4, 5)]
EVEN = [(32, 40), (16, 20), (8, 10), (4, 5)]
LEARNED = ["deconv", "pixel_shuffle"]


def make_fpn(kind: type[FPN] = FPN, *, channels: int = 8, **options) -> FPN:
    return kind(in_channels=IN_CHANNELS, channels=channels, strides=STRIDES, **options)


def make_plain(kind: type[FPN] = FPN, **options) -> FPN:
    """One channel; every convolution hands on its input (at every second cell if it has a stride)."""
    neck = kind(in_channels=(1, 1, 1, 1), channels=1, strides=STRIDES, **options)
    for module in neck.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
    return neck


def one_channel(height: int, width: int) -> list[Tensor]:
    return [torch.randn(1, 1, height // 2**i, width // 2**i) for i in range(4)]


def twice(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def levels(*shapes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(2, c, *shape) for c, shape in zip(IN_CHANNELS, shapes, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_down": False},
        {"lateral": False},
        *({"upsample": kind} for kind in ("bilinear", *LEARNED)),
        {"smooth_top": False},
        {"kind": PAFPN},
        {"kind": PAFPN, "upsample": "deconv"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shapes", [EVEN, ODD, [(1, 1)] * 4], ids=["even", "odd", "one cell"])
def test_shapes(shapes: list[tuple[int, int]], options: dict) -> None:
    fpn = make_fpn(channels=256, **options)
    assert (fpn.channels, fpn.strides, fpn.roi_strides) == (256, (4, 8, 16, 32, 64), STRIDES)
    pyramid = fpn(levels(*shapes))
    p6 = tuple(-(-n // 2) for n in shapes[-1])
    assert [p.shape for p in pyramid] == [(2, 256, *shape) for shape in [*shapes, p6]]


def test_p6_is_every_second_cell_of_p5() -> None:
    p5, p6 = make_fpn()(levels(*ODD))[-2:]
    for y in range(2):
        for x in range(3):
            assert torch.equal(p6[:, :, y, x], p5[:, :, 2 * y, 2 * x])


def test_top_down_path_by_hand() -> None:
    """Channel-wise sums and identity convolutions: P2 is C2 + C3 repeated 2x2 + C4 repeated 4x4 + C5 repeated 8x8."""
    features = one_channel(8, 16)
    pyramid = make_plain()(features)
    expected = features[3]
    torch.testing.assert_close(pyramid[3], expected)
    for i in (2, 1, 0):
        expected = features[i] + twice(expected)
        torch.testing.assert_close(pyramid[i], expected)


def test_init() -> None:
    fpn = make_fpn(channels=64)
    for conv in [*fpn.lateral, *fpn.output]:
        assert not conv.bias.any()
        bound = (3 / conv.weight[0].numel()) ** 0.5  # Kaiming-uniform, a=1
        assert 0.8 * bound < conv.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [{2, 3, 4, 5}, {3, 4, 5}, {4, 5}, {5}, {5}]),
        ({"top_down": False}, [{2}, {3}, {4}, {5}, {5}]),
        ({"lateral": False}, [{5}] * 5),
        ({"finest_only": True}, [{2, 3, 4, 5}]),
        ({"finest_only": True, "lateral": False}, [{5}]),
        ({"kind": PAFPN}, [{2, 3, 4, 5}] * 5),
    ],
    ids=str,
)
def test_which_level_sees_which_features(options: dict, expected: list[set[int]]) -> None:
    """Rows (c) to (f) of the paper's tables 1 and 2, and PANet."""
    features = [x.requires_grad_() for x in levels(*ODD)]
    seen = []
    for level in make_fpn(**options)(features):
        grads = torch.autograd.grad(level.square().sum(), features, allow_unused=True, retain_graph=True)
        seen.append({i for i, grad in enumerate(grads, start=2) if grad is not None and grad.any()})
    assert seen == expected


def test_without_lateral_by_hand() -> None:
    """P2 is C5 repeated 8 x 8; there is one lateral convolution."""
    features, neck = one_channel(8, 16), make_plain(lateral=False)
    assert len(neck.lateral) == 1
    torch.testing.assert_close(neck(features)[0], twice(twice(twice(features[3]))))


def test_finest_only() -> None:
    """P2 as it would be with the others, which do not exist."""
    neck, features = make_fpn(finest_only=True), levels(*ODD)
    assert (neck.strides, neck.roi_strides) == ((4,), (4,))
    whole = make_fpn()
    assert whole.load_state_dict(neck.state_dict(), strict=False).unexpected_keys == []
    (p2,) = neck(features)
    assert torch.equal(p2, whole(features)[0])
    assert not [k for k in neck.state_dict() if k.startswith("output.") and not k.startswith("output.0.")]


def test_smooth_top_off() -> None:
    neck, features = make_fpn(smooth_top=False), levels(*ODD)
    pyramid = neck(features)
    assert torch.equal(pyramid[3], neck.lateral[3](features[3]))
    assert not [k for k in neck.state_dict() if k.startswith("output.3")]
    smooth = make_fpn()
    smooth.load_state_dict(neck.state_dict(), strict=False)
    for ours, other in zip(pyramid[:3], smooth(features)[:3], strict=True):
        assert torch.equal(ours, other)
    assert not torch.equal(pyramid[3], smooth(features)[3])


@pytest.mark.parametrize("norm", ["bn", "sync_bn", "gn", "frozen_bn"])
@pytest.mark.parametrize("kind", [FPN, PAFPN])
def test_norm_replaces_the_bias(kind: type[FPN], norm: str) -> None:
    neck = make_fpn(kind, channels=64, norm=norm)
    names = {k.rsplit(".", 1)[0] for k in neck.state_dict()}
    parts = ["lateral", "output"] if kind is FPN else ["lateral", "output", "downsample", "bottom_up"]
    assert names == {f"{p}.{i}.{j}" for p in parts for i in range(len(getattr(neck, p))) for j in (0, 1)}
    assert not any(isinstance(m, nn.Conv2d) and m.bias is not None for m in neck.modules())
    assert make_fpn(kind, channels=64).lateral[0].bias is not None


def test_norm_is_the_last_word() -> None:
    """Batch norm in training: every channel of P2..P5 has mean 0 and variance 1."""
    for level in make_fpn(norm="bn").train()(levels(*EVEN))[:4]:
        torch.testing.assert_close(level.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-5)
        torch.testing.assert_close(level.var((0, 2, 3), unbiased=False), torch.ones(8), rtol=0, atol=1e-3)


def test_bilinear_by_hand() -> None:
    """Centres of cells: a quarter of the way to the neighbour; the border repeats."""
    x = torch.tensor([[[[0.0, 8.0]]]])
    upsample = Upsample(channels=1, kind="bilinear")
    assert upsample(x, (2, 4)).tolist() == [[[[0, 2, 6, 8]] * 2]]
    assert upsample(x.mT, (4, 1))[0, 0, :, 0].tolist() == [0, 2, 6, 8]
    assert Upsample(channels=1, kind="nearest")(x, (1, 3)).tolist() == [[[[0, 0, 8]]]]
    assert not list(upsample.parameters())


@pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=["even", "odd"])
@pytest.mark.parametrize("kind", LEARNED)
def test_learned_upsampling_by_hand(kind: str, size: tuple[int, int]) -> None:
    """Each of the four cells below a coarse one is a linear map of its channels; the excess is cut off."""
    upsample, x = Upsample(channels=3, kind=kind), torch.randn(2, 3, 3, 4)
    for parameter in upsample.parameters():
        nn.init.normal_(parameter)
    weight, bias = upsample.conv.weight, upsample.conv.bias
    expected = torch.zeros(2, 3, 6, 8)
    for dy in (0, 1):
        for dx in (0, 1):
            corner = 2 * dy + dx
            if kind == "deconv":
                matrix, offset = weight[:, :, dy, dx].T, bias
            else:
                matrix, offset = weight[corner::4, :, 0, 0], bias[corner::4]
            expected[:, :, dy::2, dx::2] = torch.einsum("oc,nchw->nohw", matrix, x) + offset[:, None, None]
    torch.testing.assert_close(upsample(x, size), expected[..., : size[0], : size[1]])


@pytest.mark.parametrize("shapes", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("neck", [FPN, PAFPN])
def test_learned_upsampling_starts_as_nearest_and_learns(neck: type[FPN], kind: str, shapes: list) -> None:
    learned, nearest, features = make_fpn(neck, upsample=kind), make_fpn(neck), levels(*shapes)
    assert nearest.load_state_dict(learned.state_dict(), strict=False).missing_keys == []
    pyramid = learned(features)
    for ours, expected in zip(pyramid, nearest(features), strict=True):
        torch.testing.assert_close(ours, expected)
    sum(level.square().sum() for level in pyramid).backward()
    parameters = list(learned.upsample.parameters())
    assert len(parameters) == 6
    assert all(p.grad is not None and p.grad.any() for p in parameters)


def test_pafpn_by_hand() -> None:
    """N2 is P2, N(i+1) is relu(P(i+1) + relu(every second cell of N(i))), and P6 comes from N5."""
    features = one_channel(16, 24)
    p = make_plain()(features)[:4]
    neck = make_plain(PAFPN)
    found = neck(features)
    expected = p[0]
    assert (expected < 0).any()
    assert torch.equal(found[0], expected)
    for i in (1, 2, 3):
        expected = (p[i] + expected[:, :, ::2, ::2].relu()).relu()
        torch.testing.assert_close(found[i], expected)
    assert torch.equal(found[4], found[3][:, :, ::2, ::2])
    nn.init.constant_(neck.bottom_up[0].bias, -1)  # both convolutions come before their ReLU
    nn.init.constant_(neck.downsample[0].bias, -2)
    torch.testing.assert_close(neck(features)[1], (p[1] + (p[0][:, :, ::2, ::2] - 2).relu() - 1).relu())


def test_bottom_up_path_smooths() -> None:
    """The convolutions of the path are 3x3, with all cells of their neighbourhood."""
    neck = make_fpn(PAFPN)
    features = levels(*ODD)
    p = FPN.forward(neck, features)
    down, smooth = neck.downsample[0], neck.bottom_up[0]
    hidden = p[1] + conv2d(p[0], down.weight, down.bias, stride=2, padding=1).relu()
    torch.testing.assert_close(neck(features)[1], conv2d(hidden, smooth.weight, smooth.bias, padding=1).relu())


def test_single_level() -> None:
    features = levels(*ODD)
    neck = SingleLevel(in_channels=IN_CHANNELS, strides=STRIDES)
    assert (neck.channels, neck.strides, neck.roi_strides) == (32, (32,), (32,))
    assert neck(features)[0] is features[3]
    c4 = SingleLevel(in_channels=IN_CHANNELS[:3], strides=STRIDES[:3])
    assert (c4.channels, c4.strides, c4.roi_strides) == (16, (16,), (16,))
    assert c4(features[:3])[0] is features[2]


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("resnet26", (600, 900), [(150, 225), (75, 113), (38, 57), (19, 29), (10, 15)]),
        ("resnet50", (224, 224), [(56, 56), (28, 28), (14, 14), (7, 7), (4, 4)]),
    ],
)
@pytest.mark.parametrize("kind", [FPN, PAFPN])
def test_shapes_on_a_real_body(kind: type[FPN], name: str, size: tuple[int, int], expected: list) -> None:
    """No padding to a multiple of 32: every level rounds up."""
    with torch.device("meta"):  # shapes alone
        body = ResNet(name=name, norm="bn", frozen_stages=0)
        neck = kind(in_channels=body.channels, channels=256, strides=body.strides)
        pyramid = neck(body(torch.zeros(1, 3, *size)))
    assert [p.shape for p in pyramid] == [(1, 256, *shape) for shape in expected]


def test_nearest_upsampling_is_exported_as_one_operator():
    program = torch.export.export(Upsample(channels=3, kind="nearest"), (torch.randn(1, 3, 4, 5), (8, 10)))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["aten.upsample_nearest2d.vec"]
