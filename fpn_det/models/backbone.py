"""ResNet and ResNeXt bodies: image -> C2..C5 (He et al., arXiv 1512.03385; Xie et al., arXiv 1611.05431).

The layers are torchvision's, so its ImageNet weights fit; strides and channels are declared.

Dimensions: N images, C channels, H and W of the padded batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from fpn_det.structures import InputError

Norm = Literal["frozen_bn", "bn", "sync_bn", "gn"]


class ResNet(nn.Module):
    """A torchvision ResNet or ResNeXt without its classifier.

    Args:
        name: torchvision's name, such as `resnet50` or `resnext101_32x8d`.
        norm: `frozen_bn` (constant statistics and affine, for pre-trained weights), `bn`, `sync_bn` (statistics over
            all processes), `gn` (32 groups).
        frozen_stages: how many stages are not trained: 1 = stem, 2 = stem and layer1 (Detectron2's default), .. 5.

    Attributes:
        strides: of C2..C5 relative to the image.
        channels: of C2..C5.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, *, name: str, norm: Norm, frozen_stages: int) -> None:
        super().__init__()
        body = getattr(resnet, name)(weights=None, norm_layer=_norm_layer(norm))
        self.stem = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool)
        self.layer1, self.layer2, self.layer3, self.layer4 = body.layer1, body.layer2, body.layer3, body.layer4
        self.channels = tuple(body.fc.in_features // 2**i for i in (3, 2, 1, 0))
        self.frozen_stages = frozen_stages
        for stage in self._frozen():
            stage.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) normalised images -> C2..C5, (N, channels[i], H / strides[i], W / strides[i]) rounded up."""
        x = self.stem(images)
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features

    def train(self, mode: bool = True) -> Self:
        """As in `nn.Module`, but the statistics of frozen stages stay as they are."""
        super().train(mode)
        for stage in self._frozen():
            stage.eval()
        return self

    def load_classifier(self, state_dict: dict[str, Tensor]) -> None:
        """Load the body from the weights of a torchvision classifier.

        Args:
            state_dict: of `torchvision.models.resnet*`; `fc.*` is ignored, anything else must fit exactly.

        Raises:
            ValueError: naming missing, unexpected or misshapen tensors.
        """
        renamed = {k.replace("conv1.", "stem.0.", 1) if k.startswith("conv1.") else k: v for k, v in state_dict.items()}
        renamed = {k.replace("bn1.", "stem.1.", 1) if k.startswith("bn1.") else k: v for k, v in renamed.items()}
        own = self.state_dict()
        # num_batches_tracked counts updates of statistics; FrozenBatchNorm has none, and old files lack it.
        wanted = {k for k in own if not k.endswith("num_batches_tracked")}
        given = {k for k in renamed if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
        misfit = sorted(k for k in wanted & given if own[k].shape != renamed[k].shape)
        if wanted != given or misfit:
            raise ValueError(
                f"the weights do not fit this body: missing {sorted(wanted - given)[:4]}, "
                f"unexpected {sorted(given - wanted)[:4]}, of another shape {misfit[:4]}"
            )
        self.load_state_dict({k: renamed[k] for k in given}, strict=False)

    def _frozen(self) -> list[nn.Module]:
        return [self.stem, self.layer1, self.layer2, self.layer3, self.layer4][: self.frozen_stages]


def read_classifier(name: str, weights: str) -> dict[str, Tensor]:
    """The state dict of ImageNet weights for a body.

    Args:
        name: torchvision's name of the body.
        weights: a member of torchvision's weight enum of that body (`IMAGENET1K_V1`), downloaded on first use, or the
            path of a file with such a state dict.

    Raises:
        InputError: neither a known name nor a readable file, or the download failed.
    """
    enum = torchvision.models.get_model_weights(name)
    if weights in enum.__members__:
        try:
            return enum[weights].get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash of a broken download differs
            raise InputError(
                f"model.backbone.weights: cannot download {weights} of {name} from {enum[weights].url} ({error}). "
                "Download the file elsewhere and give its path, or train from scratch with "
                "model.backbone.weights=none model.backbone.norm=bn model.backbone.frozen_stages=0"
            ) from error
    path = Path(weights)
    if not path.is_file():
        raise InputError(
            f"model.backbone.weights: {weights!r} is neither a file nor one of torchvision's weights for {name} "
            f"({', '.join(enum.__members__)})"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets other files with nearly any exception
        raise InputError(
            f"model.backbone.weights: {path} is not a file of PyTorch weights ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"model.backbone.weights: {path} holds no state dict of a torchvision {name}")
    return state


def _norm_layer(norm: Norm) -> type[nn.Module] | object:
    match norm:
        case "frozen_bn":
            return FrozenBatchNorm2d
        case "bn":
            return nn.BatchNorm2d
        case "sync_bn":
            return nn.SyncBatchNorm
        case "gn":
            return lambda channels: nn.GroupNorm(32, channels)
