"""Names of bodies from their shapes, against torchvision's own models."""

import pytest
import torch
import torchvision
from torch import Tensor

from fpn_det.models.backbone import BODIES, ResNet
from fpn_det.structures import InputError
from fpn_det.weights.architecture import ARCHITECTURES, detector_architecture, norm_kind, resnet_architecture


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name in torchvision.models.list_models()])
def test_bodies_of_torchvision(name: str) -> None:
    with torch.device("meta"):
        assert resnet_architecture(torchvision.models.get_model(name).state_dict()) == name


@pytest.mark.parametrize("name", list(BODIES))
def test_every_body_of_ours(name: str) -> None:
    with torch.device("meta"):
        assert resnet_architecture(ResNet(name=name, norm="frozen_bn", frozen_stages=0).state_dict()) == name


def test_unknown_bodies_are_described() -> None:
    with torch.device("meta"):
        deep = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 4, 40, 3]).state_dict()
        mobile = torchvision.models.mobilenet_v2().state_dict()
    with pytest.raises(InputError, match=r"file\.pth: no body of ours has bottleneck blocks \[3, 4, 40, 3\] of"):
        resnet_architecture(deep, source="file.pth")
    with pytest.raises(InputError, match=r"not the tensors of a ResNet: expected layer1.* found .*classifier"):
        resnet_architecture(mobile)
    with pytest.raises(InputError, match="found none"):
        resnet_architecture({})


def test_misshapen_and_missing_tensors_of_a_body_are_named() -> None:
    with torch.device("meta"):
        body = torchvision.models.resnet18().state_dict()
    with pytest.raises(InputError, match=r"file\.pth: layer1\.0\.conv2\.weight has the shape \(64, 0, 3, 3\)"):
        resnet_architecture(body | {"layer1.0.conv2.weight": torch.zeros(64, 0, 3, 3)}, source="file.pth")
    with pytest.raises(InputError, match=r"file\.pth: conv1\.weight has the shape \(64,\); expected a 4-dim"):
        resnet_architecture(body | {"conv1.weight": torch.zeros(64)}, source="file.pth")
    del body["conv1.weight"]
    with pytest.raises(InputError, match=r"file\.pth: no model of this kind can do without conv1\.weight"):
        resnet_architecture(body, source="file.pth")


def test_norm_kinds() -> None:
    def tensors(*names: str) -> dict[str, Tensor]:
        return {f"stem.1.{name}": torch.zeros(1) for name in names}

    assert norm_kind(tensors(), "stem.1.") is None
    assert norm_kind(tensors("weight", "bias"), "stem.1.") == "gn"
    assert norm_kind(tensors("weight", "bias", "running_mean", "running_var"), "stem.1.") == "frozen_bn"
    counted = tensors("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert norm_kind(counted, "stem.1.") == "bn"


def test_missing_parts_of_a_detector_are_named() -> None:
    with pytest.raises(InputError, match=r"file\.pth: no model of this kind can do without neck\.lateral\.0\.weight"):
        detector_architecture({"rpn.head.objectness.weight": torch.zeros(3, 8, 1, 1)}, source="file.pth")
