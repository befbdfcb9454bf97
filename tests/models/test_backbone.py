from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from fpn_det.models.backbone import ResNet, read_classifier
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


def test_bottleneck_strides_in_the_3x3() -> None:
    body = ResNet(name="resnet50", norm="frozen_bn", frozen_stages=0)
    assert (body.layer2[0].conv1.stride, body.layer2[0].conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("frozen_bn", FrozenBatchNorm2d),
        ("bn", nn.BatchNorm2d),
        ("sync_bn", nn.SyncBatchNorm),
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


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("invalid hash value")])
def test_failed_download(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(
        InputError, match=rf"cannot download IMAGENET1K_V1 of resnet18 from https://.*{error}.*give its path"
    ):
        read_classifier("resnet18", "IMAGENET1K_V1")
