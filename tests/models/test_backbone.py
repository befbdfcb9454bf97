import copy
import hashlib
import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import conv2d
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from fpn_det.models import backbone, norms
from fpn_det.models.backbone import BODIES, Layer4, ResNet, read_classifier
from fpn_det.models.norms import SyncBatchNorm
from fpn_det.models.roi_head import Res5Head
from fpn_det.structures import InputError


@pytest.fixture(scope="module")
def classifier() -> dict[str, torch.Tensor]:
    return torchvision.models.resnet18(weights=None).state_dict()


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", (64, 128, 256, 512)),
        ("resnet50", (256, 512, 1024, 2048)),
        ("resnext50_32x4d", (256, 512, 1024, 2048)),
    ],
)
def test_declared_channels_and_strides(name: str, channels: tuple[int, ...]) -> None:
    body = ResNet(name=name, norm="frozen_bn", frozen_stages=2)
    assert body.channels == channels
    assert body.strides == (4, 8, 16, 32)
    with torch.no_grad():
        features = body(torch.randn(1, 3, 65, 97))
    for feature, c, stride in zip(features, channels, body.strides, strict=True):
        assert feature.shape == (1, c, -(-65 // stride), -(-97 // stride))


# name: block, blocks per stage, groups and channels of the first 3x3 convolution, channels of C5
KNOWN = {
    "resnet18": (BasicBlock, [2, 2, 2, 2], 1, 64, 512),
    "resnet26": (Bottleneck, [2, 2, 2, 2], 1, 64, 2048),
    "resnet34": (BasicBlock, [3, 4, 6, 3], 1, 64, 512),
    "resnet50": (Bottleneck, [3, 4, 6, 3], 1, 64, 2048),
    "resnet101": (Bottleneck, [3, 4, 23, 3], 1, 64, 2048),
    "resnet152": (Bottleneck, [3, 8, 36, 3], 1, 64, 2048),
    "resnext50_32x4d": (Bottleneck, [3, 4, 6, 3], 32, 128, 2048),
    "resnext101_32x4d": (Bottleneck, [3, 4, 23, 3], 32, 128, 2048),
    "resnext101_32x8d": (Bottleneck, [3, 4, 23, 3], 32, 256, 2048),
    "resnext101_64x4d": (Bottleneck, [3, 4, 23, 3], 64, 256, 2048),
    "wide_resnet50_2": (Bottleneck, [3, 4, 6, 3], 1, 128, 2048),
    "wide_resnet101_2": (Bottleneck, [3, 4, 23, 3], 1, 128, 2048),
}


@pytest.mark.parametrize("name", BODIES)
def test_every_body(name: str) -> None:
    """By the papers' tables, and tensor by tensor where torchvision has the body."""
    block, blocks, groups, width, channels = KNOWN[name]
    with torch.device("meta"):  # shapes alone
        body = ResNet(name=name, norm="bn", frozen_stages=0)
        features = body(torch.zeros(1, 3, 65, 97))
    stages = [body.layer1, body.layer2, body.layer3, body.layer4]
    assert [len(stage) for stage in stages] == blocks
    assert all(type(b) is not block and isinstance(b, block) for stage in stages for b in stage)
    assert (body.layer1[0].conv2.groups, body.layer1[0].conv2.out_channels) == (groups, width)
    assert body.channels == tuple(channels // i for i in (8, 4, 2, 1))
    assert [f.shape[1] for f in features] == list(body.channels)
    if name in torchvision.models.list_models():
        with torch.device("meta"):
            theirs = torchvision.models.get_model(name, weights=None).state_dict()
        renamed = {k.replace("stem.0.", "conv1.").replace("stem.1.", "bn1."): v for k, v in body.state_dict().items()}
        assert {k: v.shape for k, v in renamed.items()} == {
            k: v.shape for k, v in theirs.items() if not k.startswith("fc.")
        }


def strides(body: ResNet) -> dict[str, int]:
    """The convolutions of the stages that have a stride."""
    convs = {k: m for k, m in body.named_modules() if isinstance(m, nn.Conv2d) and k.startswith("layer")}
    return {k: m.stride[0] for k, m in convs.items() if m.stride != (1, 1)}


@pytest.mark.parametrize(("in_1x1", "conv"), [(False, "conv2"), (True, "conv1")])
def test_which_convolution_has_the_stride(in_1x1: bool, conv: str) -> None:
    body = ResNet(name="resnet26", norm="frozen_bn", frozen_stages=0, stride_in_1x1=in_1x1)
    layers = ("layer2", "layer3", "layer4")
    assert strides(body) == {f"{x}.0.{c}": 2 for x in layers for c in (conv, "downsample.0")}
    assert Layer4(name="resnet26", norm="bn", stride_in_1x1=in_1x1).layer4[0].get_submodule(conv).stride == (2, 2)
    assert [f.shape[-2:] for f in body(torch.randn(1, 3, 65, 97))] == [(17, 25), (9, 13), (5, 7), (3, 4)]


def test_stride_in_1x1_by_hand() -> None:
    """The 1x1 convolution picks every second cell; the 3x3 one then sees neighbours two cells apart."""
    block = ResNet(name="resnet26", norm="frozen_bn", frozen_stages=0, stride_in_1x1=True).layer2[0]
    x = torch.randn(1, 256, 7, 9)
    hidden = conv2d(x[:, :, ::2, ::2], block.conv1.weight).relu()  # the norms are identities
    hidden = conv2d(hidden, block.conv2.weight, padding=1).relu()
    shortcut = conv2d(x[:, :, ::2, ::2], block.downsample[0].weight)
    expected = (conv2d(hidden, block.conv3.weight) + shortcut).relu()
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [ResNet, Layer4])
def test_basic_blocks_have_no_1x1(make: type) -> None:
    options = {"frozen_stages": 0} if make is ResNet else {}
    with pytest.raises(ValueError, match="resnet18 has no 1x1 convolution"):
        make(name="resnet18", norm="bn", stride_in_1x1=True, **options)


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "sync_bn", "gn"])
def test_norm_eps_reaches_every_norm(norm: str) -> None:
    for eps in (0.0, 1e-3):
        body = ResNet(name="resnet18", norm=norm, frozen_stages=0, norm_eps=eps)
        layer4 = Layer4(name="resnet18", norm=norm, norm_eps=eps)
        found = [m.eps for x in (body, layer4) for m in x.modules() if "Norm" in type(m).__name__]
        assert found == [eps] * 25
    default = ResNet(name="resnet18", norm=norm, frozen_stages=0)
    assert {m.eps for m in default.modules() if "Norm" in type(m).__name__} == {1e-5}


def trained(classifier: torchvision.models.ResNet) -> dict[str, torch.Tensor]:
    """State of a classifier whose norms do something."""
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return classifier.state_dict()


@pytest.mark.parametrize(("name", "in_1x1"), [("resnet18", False), ("resnet26", True)])
def test_c4_body_and_layer4_are_the_whole_body(name: str, in_1x1: bool) -> None:
    state = trained(torchvision.models.ResNet(**BODIES[name]))
    options = {"name": name, "norm": "frozen_bn", "norm_eps": 1e-3, "stride_in_1x1": in_1x1}
    whole, c4 = ResNet(**options, frozen_stages=2), ResNet(**options, frozen_stages=2, last_stage=4)
    layer4, head = Layer4(**options), Res5Head(**options)
    for part in (whole, c4, layer4, head):
        part.load_classifier(state)
    assert (c4.strides, c4.channels) == (whole.strides[:3], whole.channels[:3])
    assert not [k for k in c4.state_dict() if k.startswith("layer4")]
    images = torch.randn(2, 3, 65, 97)
    expected, features = whole(images), c4(images)
    assert len(features) == 3
    for ours, other in zip(features, expected, strict=False):
        assert torch.equal(ours, other)
    assert layer4.out_channels == head.out_channels == whole.channels[3]
    assert torch.equal(layer4(features[2]), expected[3])
    torch.testing.assert_close(head(features[2]), expected[3].flatten(2).mean(-1))


@pytest.mark.parametrize("frozen_stages", [3, 4, 5])
def test_frozen_stages_of_a_c4_body(frozen_stages: int) -> None:
    body = ResNet(name="resnet18", norm="bn", frozen_stages=frozen_stages, last_stage=4)
    frozen = {name.partition(".")[0] for name, p in body.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "layer1", "layer2", "layer3"} - ({"layer3"} if frozen_stages == 3 else set())


def test_layer4_refuses_what_does_not_fit(classifier: dict[str, torch.Tensor]) -> None:
    layer4 = Layer4(name="resnet18", norm="bn")
    with pytest.raises(ValueError, match=r"missing \['layer4.1.bn2.running_var'\], unexpected \[\]"):
        layer4.load_classifier(without(classifier))
    with pytest.raises(ValueError, match=r"unexpected \['head.weight'\]"):
        layer4.load_classifier(classifier | {"head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unexpected \['layer5.0.weight'\]"):
        ResNet(name="resnet18", norm="bn", frozen_stages=0, last_stage=4).load_classifier(
            classifier | {"layer5.0.weight": torch.zeros(1)}
        )


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("frozen_bn", norms.FrozenBatchNorm2d),
        ("bn", nn.BatchNorm2d),
        ("sync_bn", SyncBatchNorm),
        ("gn", nn.GroupNorm),
    ],
)
def test_norms(norm: str, kind: type[nn.Module]) -> None:
    body = ResNet(name="resnet18", norm=norm, frozen_stages=0).eval()
    norms = [m for m in body.modules() if "Norm" in type(m).__name__]
    assert len(norms) == 20
    assert {type(m) for m in norms} == {kind}
    if norm == "gn":
        assert {m.num_groups for m in norms} == {32}
    assert all(f.isfinite().all() for f in body(torch.randn(1, 3, 32, 32)))


@pytest.mark.parametrize("frozen_stages", range(6))
def test_frozen_stages(frozen_stages: int) -> None:
    """Frozen stages keep weights and statistics; the others have gradients and update their statistics."""
    body = ResNet(name="resnet18", norm="bn", frozen_stages=frozen_stages).train()
    stages = [body.stem, body.layer1, body.layer2, body.layer3, body.layer4]
    before = {name: value.clone() for name, value in body.named_buffers()}
    body(torch.randn(2, 3, 64, 64))
    for i, (name, stage) in enumerate(zip(("stem", "layer1", "layer2", "layer3", "layer4"), stages, strict=True)):
        frozen = i < frozen_stages
        assert {p.requires_grad for p in stage.parameters()} == {not frozen}
        assert {m.training for m in stage.modules()} == {not frozen}
        for buffer, value in stage.named_buffers():
            assert torch.equal(value, before[f"{name}.{buffer}"]) == frozen, buffer
    assert not body.eval().training
    assert not any(m.training for m in body.modules())


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
def test_load_classifier_takes_every_tensor(classifier: dict[str, torch.Tensor], norm: str) -> None:
    body = ResNet(name="resnet18", norm=norm, frozen_stages=2)
    body.load_classifier({k: v for k, v in classifier.items() if not k.endswith("num_batches_tracked")})
    own = {k: v for k, v in body.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(own) == sum(not k.startswith("fc.") and not k.endswith("num_batches_tracked") for k in classifier)
    for name, value in own.items():
        original = name.replace("stem.0.", "conv1.").replace("stem.1.", "bn1.")
        assert torch.equal(value, classifier[original]), name


def renamed(state: dict) -> dict:
    return {f"module.{k}": v for k, v in state.items()}


def reshaped(state: dict) -> dict:
    return state | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}


def without(state: dict) -> dict:
    return {k: v for k, v in state.items() if k != "layer4.1.bn2.running_var"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, r"unexpected \['module.bn1.bias'"),
        (reshaped, r"of another shape \['layer1.0.conv1.weight'\]"),
        (without, r"missing \['layer4.1.bn2.running_var'\]"),
    ],
)
def test_weights_that_do_not_fit(classifier: dict[str, torch.Tensor], change: Callable, message: str) -> None:
    body = ResNet(name="resnet18", norm="bn", frozen_stages=0)
    before = {k: v.clone() for k, v in body.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        body.load_classifier(change(dict(classifier)))
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())


def test_batch_norm_weights_do_not_fit_group_norm(classifier: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="running_mean"):
        ResNet(name="resnet18", norm="gn", frozen_stages=0).load_classifier(classifier)


def test_read_classifier_from_a_file(tmp_path, classifier: dict[str, torch.Tensor]) -> None:
    torch.save(classifier, tmp_path / "body.pth")
    state = read_classifier("resnet18", str(tmp_path / "body.pth"))
    assert state.keys() == classifier.keys()
    assert all(torch.equal(state[k], classifier[k]) for k in state)


def test_read_classifier_from_a_checkpoint(tmp_path) -> None:
    """The body of a detector of ours, whose stem has our names, for a body, a C4 body and a head of RoIs."""
    source = ResNet(name="resnet18", norm="bn", frozen_stages=0)
    model = {f"backbone.{k}": v for k, v in source.state_dict().items()} | {"neck.lateral.0.weight": torch.zeros(1)}
    torch.save({"model": model, "step": 3}, tmp_path / "final.pth")
    state = read_classifier("resnet18", str(tmp_path / "final.pth"))
    body = ResNet(name="resnet18", norm="frozen_bn", frozen_stages=2)
    c4 = ResNet(name="resnet18", norm="bn", frozen_stages=2, last_stage=4)
    layer4 = Layer4(name="resnet18", norm="bn")
    for part in (body, c4, layer4):
        part.load_classifier(state)
        own = {k: v for k, v in part.state_dict().items() if not k.endswith("num_batches_tracked")}
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in own.items())
    torch.save({"model": {"neck.lateral.0.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="holds no state dict of a torchvision resnet18"):
        read_classifier("resnet18", str(tmp_path / "other.pth"))


def test_neither_name_nor_file() -> None:
    with pytest.raises(InputError, match=r"'IMAGENET1K_V3' is neither a file nor .* \(IMAGENET1K_V1"):
        read_classifier("resnet18", "IMAGENET1K_V3")


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x80\x02junk", b"PK\x03\x04junk", b"<html>\n"])
def test_not_a_weights_file(tmp_path, content: bytes) -> None:
    (tmp_path / "body.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"body\.pth is not a file of PyTorch weights"):
        read_classifier("resnet18", str(tmp_path / "body.pth"))


@pytest.mark.parametrize("content", [[1, 2], {"model": {}, "step": 3}])
def test_not_a_state_dict(tmp_path, content: object) -> None:
    torch.save(content, tmp_path / "body.pth")
    with pytest.raises(InputError, match=r"body\.pth holds no state dict of a torchvision resnet18"):
        read_classifier("resnet18", str(tmp_path / "body.pth"))


@pytest.fixture
def imagenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classifier: dict[str, torch.Tensor]
) -> Iterator[tuple[Path, Path]]:
    """torchvision's weights of resnet18 lie on a server of this machine: its file, and where it is kept here."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path / "server"))

        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "server").mkdir()
    torch.save(classifier, tmp_path / "server" / "new.pth")
    content = (tmp_path / "server" / "new.pth").read_bytes()
    file = (tmp_path / "server" / "new.pth").rename(
        tmp_path / "server" / f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{file.name}"
        monkeypatch.setattr(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value, "url", url)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("no_proxy", "*")
        yield file, tmp_path / "home/hub/checkpoints" / file.name
        server.shutdown()


def test_imagenet_weights_are_downloaded_once(imagenet: tuple[Path, Path], classifier: dict[str, torch.Tensor]) -> None:
    file, kept = imagenet
    state = read_classifier("resnet18", "IMAGENET1K_V1")
    assert all(torch.equal(state[k], classifier[k]) for k in classifier)
    assert kept.read_bytes() == file.read_bytes()
    file.unlink()
    assert (
        read_classifier("resnet18", "IMAGENET1K_V1").keys() == classifier.keys()
    )  # what torchvision left is found, too


def test_imagenet_weights_that_were_altered(imagenet: tuple[Path, Path]) -> None:
    file, kept = imagenet
    kept.parent.mkdir(parents=True)
    kept.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"^model\.backbone\.weights: .*{kept}: its SHA-256 is .* Delete it"):
        read_classifier("resnet18", "IMAGENET1K_V1")
    kept.unlink()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        InputError, match=r"^model\.backbone\.weights: .*127\.0\.0\.1.*: SHA-256 of what was received is"
    ):
        read_classifier("resnet18", "IMAGENET1K_V1")
    assert not kept.exists()


def test_imagenet_weights_that_cannot_be_downloaded(imagenet: tuple[Path, Path]) -> None:
    imagenet[0].unlink()
    with pytest.raises(InputError, match=r"IMAGENET1K_V1 of resnet18 is not at hand: .*404.*weights=FILE; .*scratch"):
        read_classifier("resnet18", "IMAGENET1K_V1")


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("stride", [1, 2])
def test_frozen_norms_folded_into_convolutions(block: type[BasicBlock | Bottleneck], stride: int) -> None:
    """Outputs and gradients of torchvision's own blocks, in double precision."""
    shortcut = nn.Sequential(
        nn.Conv2d(8, 4 * block.expansion, 1, stride, bias=False), FrozenBatchNorm2d(4 * block.expansion)
    )
    theirs = block(8, 4, stride, shortcut, norm_layer=FrozenBatchNorm2d).double()
    for module in theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for buffer in module.buffers():
                nn.init.uniform_(buffer, 0.5, 1.5)
    ours = {BasicBlock: backbone.BasicBlock, Bottleneck: backbone.Bottleneck}[block](
        8, 4, stride, copy.deepcopy(shortcut), norm_layer=norms.FrozenBatchNorm2d
    ).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64, requires_grad=True)
    results = [module(x) for module in (ours, theirs)]
    torch.testing.assert_close(*results)
    grads = [
        torch.autograd.grad(y.square().sum(), [x, *m.parameters()])
        for y, m in zip(results, (ours, theirs), strict=True)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_norm_follows_its_buffers() -> None:
    """What is computed once is computed anew when weights are loaded, and for a copy or another type."""
    norm, x = norms.FrozenBatchNorm2d(4), torch.randn(2, 4, 3, 3)
    size = len(pickle.dumps(norm))

    def applied(norm: norms.FrozenBatchNorm2d) -> torch.Tensor:
        scale, shift = norm.affine()
        assert norm.affine()[0] is scale
        return x.to(scale.dtype) * scale[:, None, None] + shift[:, None, None]

    with torch.inference_mode():
        torch.testing.assert_close(applied(norm), norm(x))
    for _ in range(2):
        norm.load_state_dict({name: torch.rand(4) + 0.5 for name in norm.state_dict()})
        torch.testing.assert_close(applied(norm), norm(x))
    assert len(pickle.dumps(norm)) == size
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):  # made by one write, so that now there are two
        twin.load_state_dict({name: torch.rand(4) + 0.5 for name in norm.state_dict()})
        torch.testing.assert_close(applied(twin), twin(x))
    torch.testing.assert_close(applied(norm), norm(x))
    torch.testing.assert_close(applied(norm.double()), norm(x.double()))
    assert not norm.affine()[0].is_inference()
