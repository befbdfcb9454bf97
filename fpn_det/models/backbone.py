"""ResNet and ResNeXt bodies: image -> C2..C5 (He et al., arXiv 1512.03385; Xie et al., arXiv 1611.05431).

The layers are torchvision's, so its ImageNet weights fit; strides and channels are declared.

Dimensions: N images, C channels, H and W of the padded batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet

from fpn_det.download import download
from fpn_det.models.norms import Norm, apply_conv_norm, norm_layer
from fpn_det.structures import InputError


class BasicBlock(resnet.BasicBlock):
    """Two 3x3 convolutions; torchvision's, but for frozen norms, which are folded into the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, planes, h / stride, w / stride), rounded up."""
        shortcut = x if self.downsample is None else apply_conv_norm(self.downsample[0], self.downsample[1], x)
        out = apply_conv_norm(self.conv1, self.bn1, x, relu=True)
        return apply_conv_norm(self.conv2, self.bn2, out, shortcut=shortcut, relu=True)


class Bottleneck(resnet.Bottleneck):
    """Convolutions 1x1, 3x3, 1x1; torchvision's, but for frozen norms, which are folded into the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 4 * planes, h / stride, w / stride), rounded up."""
        shortcut = x if self.downsample is None else apply_conv_norm(self.downsample[0], self.downsample[1], x)
        out = apply_conv_norm(self.conv1, self.bn1, x, relu=True)
        out = apply_conv_norm(self.conv2, self.bn2, out, relu=True)
        return apply_conv_norm(self.conv3, self.bn3, out, shortcut=shortcut, relu=True)


BODIES: dict[str, dict[str, Any]] = {
    "resnet18": {"block": BasicBlock, "layers": [2, 2, 2, 2]},
    "resnet26": {"block": Bottleneck, "layers": [2, 2, 2, 2]},
    "resnet34": {"block": BasicBlock, "layers": [3, 4, 6, 3]},
    "resnet50": {"block": Bottleneck, "layers": [3, 4, 6, 3]},
    "resnet101": {"block": Bottleneck, "layers": [3, 4, 23, 3]},
    "resnet152": {"block": Bottleneck, "layers": [3, 8, 36, 3]},
    "resnext50_32x4d": {"block": Bottleneck, "layers": [3, 4, 6, 3], "groups": 32, "width_per_group": 4},
    "resnext101_32x4d": {"block": Bottleneck, "layers": [3, 4, 23, 3], "groups": 32, "width_per_group": 4},
    "resnext101_32x8d": {"block": Bottleneck, "layers": [3, 4, 23, 3], "groups": 32, "width_per_group": 8},
    "resnext101_64x4d": {"block": Bottleneck, "layers": [3, 4, 23, 3], "groups": 64, "width_per_group": 4},
    "wide_resnet50_2": {"block": Bottleneck, "layers": [3, 4, 6, 3], "width_per_group": 128},
    "wide_resnet101_2": {"block": Bottleneck, "layers": [3, 4, 23, 3], "width_per_group": 128},
}
"""Arguments of torchvision's `ResNet` by name; resnet26 and resnext101_32x4d are not torchvision's own."""


class ResNet(nn.Module):
    """A torchvision ResNet or ResNeXt without its classifier.

    Args:
        name: one of `BODIES`.
        norm: kind of normalisation, see `fpn_det.models.norms`; `frozen_bn` is for pre-trained weights.
        norm_eps: added to the variance.
        frozen_stages: how many stages are not trained: 1 = stem, 2 = stem and layer1 (Detectron2's default), .. 5.
        stride_in_1x1: whether the first 1x1 convolution of a stage has its stride, as in the original ResNet of
            MSRA (Detectron2's weights), or the 3x3 convolution, as in torchvision. Bottlenecks only.
        last_stage: 5, or 4 for a body that ends with C4.

    Attributes:
        strides: of C2..C5 relative to the image.
        channels: of C2..C5.
    """

    def __init__(
        self,
        *,
        name: str,
        norm: Norm,
        frozen_stages: int,
        norm_eps: float = 1e-5,
        stride_in_1x1: bool = False,
        last_stage: int = 5,
    ) -> None:
        super().__init__()
        body = _torchvision_resnet(name, norm, norm_eps, stride_in_1x1)
        self.stem = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool)
        self.stages = [f"layer{i}" for i in range(1, last_stage)]
        for stage in self.stages:
            self.add_module(stage, getattr(body, stage))
        self.strides = (4, 8, 16, 32)[: last_stage - 1]
        self.channels = tuple(body.fc.in_features // 2**i for i in (3, 2, 1, 0))[: last_stage - 1]
        self.frozen_stages = frozen_stages
        for module in self._frozen():
            module.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) normalised images -> C2..C5, (N, channels[i], H / strides[i], W / strides[i]) rounded up."""
        conv, norm, _, max_pool = self.stem
        x = max_pool(apply_conv_norm(conv, norm, images, relu=True))
        features = []
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
            features.append(x)
        return features

    def train(self, mode: bool = True) -> Self:
        """As in `nn.Module`, but the statistics of frozen stages stay as they are."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def load_classifier(self, state_dict: dict[str, Tensor]) -> None:
        """Load the body from the weights of a torchvision classifier.

        Args:
            state_dict: of `torchvision.models.resnet*`; the classifier `fc.*` and stages that this body lacks are
                passed over, anything else must fit exactly.

        Raises:
            ValueError: naming missing, unexpected or misshapen tensors.
        """
        absent = {"layer1", "layer2", "layer3", "layer4"} - set(self.stages)
        load_stages(self, state_dict, leave_out=absent)

    def _frozen(self) -> list[nn.Module]:
        return [self.stem, *(self.get_submodule(stage) for stage in self.stages)][: self.frozen_stages]


class Layer4(nn.Module):
    """The last stage of a body on its own, as the head of RoIs of C4 (arXiv 1512.03385, appendix A).

    Args:
        name, norm, norm_eps, stride_in_1x1: as of `ResNet`.

    Attributes:
        out_channels: of C5.
    """

    def __init__(self, *, name: str, norm: Norm, norm_eps: float = 1e-5, stride_in_1x1: bool = False) -> None:
        super().__init__()
        body = _torchvision_resnet(name, norm, norm_eps, stride_in_1x1)
        self.layer4 = body.layer4
        self.out_channels: int = body.fc.in_features

    def forward(self, x: Tensor) -> Tensor:
        """(R, channels of C4, h, w) -> (R, out_channels, h / 2, w / 2), rounded up."""
        out: Tensor = self.layer4(x)
        return out

    def load_classifier(self, state_dict: dict[str, Tensor]) -> None:
        """As `ResNet.load_classifier`, for this stage."""
        load_stages(self, state_dict, leave_out={"conv1", "bn1", "stem", "layer1", "layer2", "layer3"})


def load_stages(module: nn.Module, state_dict: dict[str, Tensor], *, leave_out: Iterable[str]) -> None:
    """Load a part of a torchvision classifier; `leave_out` and `fc` are the parts that `module` does not have.

    Raises:
        ValueError: naming missing, unexpected or misshapen tensors.
    """
    stem = {"conv1": "stem.0", "bn1": "stem.1"}
    renamed = {}
    for key, value in state_dict.items():
        part, _, rest = key.partition(".")
        # num_batches_tracked counts updates of statistics; FrozenBatchNorm has none, and old files lack it.
        if part not in {"fc", *leave_out} and not rest.endswith("num_batches_tracked"):
            renamed[f"{stem.get(part, part)}.{rest}"] = value
    own = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    missing, unexpected = sorted(own.keys() - renamed.keys()), sorted(renamed.keys() - own.keys())
    misfit = sorted(k for k in own.keys() & renamed.keys() if own[k].shape != renamed[k].shape)
    if missing or unexpected or misfit:
        raise ValueError(
            f"the weights do not fit this body: missing {missing[:4]}, unexpected {unexpected[:4]}, "
            f"of another shape {misfit[:4]}"
        )
    module.load_state_dict(renamed, strict=False)


def read_classifier(name: str, weights: str) -> dict[str, Tensor]:
    """The state dict of ImageNet weights for a body.

    Args:
        name: torchvision's name of the body.
        weights: a member of torchvision's weight enum of that body (`IMAGENET1K_V1`), downloaded on first use and
            verified on each, or the path of a file with such a state dict, or of a checkpoint of ours, whose body
            counts.

    Raises:
        InputError: neither a known name nor a readable file, or the download failed.
    """
    enum = torchvision.models.get_model_weights(name) if name in torchvision.models.list_models() else None
    known = enum.__members__ if enum is not None else {}
    path = Path(weights)
    if enum is not None and weights in known:
        url = enum[weights].url
        path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])  # where torchvision keeps them, too
        try:
            download(url, path, sha256=path.stem.rpartition("-")[2])  # resnet50-0676ba61.pth
        except InputError as error:
            raise InputError(
                f"model.backbone.weights: {weights} of {name} is not at hand: {error}. Any place will do with "
                "model.backbone.weights=FILE; or train from scratch with model.backbone.weights=none "
                "model.backbone.norm=bn model.backbone.frozen_stages=0"
            ) from error
    elif not path.is_file():
        raise InputError(
            f"model.backbone.weights: {weights!r} is neither a file nor one of torchvision's weights for {name} "
            f"({', '.join(known) or 'it has none'})"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets other files with nearly any exception
        raise InputError(
            f"model.backbone.weights: {path} is not a file of PyTorch weights ({type(error).__name__})"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # a checkpoint of ours, of which the body
        state = {k.removeprefix("backbone."): v for k, v in state["model"].items() if k.startswith("backbone.")}
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"model.backbone.weights: {path} holds no state dict of a torchvision {name}")
    return state


def _torchvision_resnet(name: str, norm: Norm, norm_eps: float, stride_in_1x1: bool) -> resnet.ResNet:
    body = resnet.ResNet(**BODIES[name], norm_layer=norm_layer(norm, norm_eps))
    if stride_in_1x1:
        if BODIES[name]["block"] is not Bottleneck:
            raise ValueError(f"{name} has no 1x1 convolution that could have the stride")
        for layer in (body.layer2, body.layer3, body.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = layer[0].conv2.stride, layer[0].conv1.stride
    return body
