"""Normalisation layers by name, and convolutions that carry one.

Dimensions: C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from fpn_det import kernels

Norm = Literal["frozen_bn", "bn", "sync_bn", "gn"]


def norm_layer(norm: Norm, eps: float = 1e-5) -> Callable[[int], nn.Module]:
    """The constructor of a normalisation of C channels.

    Args:
        norm: `frozen_bn` (constant statistics and affine, for pre-trained weights), `bn`, `sync_bn` (statistics over
            all processes), `gn` (32 groups).
        eps: added to the variance.
    """
    match norm:
        case "frozen_bn":
            return partial(FrozenBatchNorm2d, eps=eps)
        case "bn":
            return partial(nn.BatchNorm2d, eps=eps)
        case "sync_bn":
            return partial(SyncBatchNorm, eps=eps)
        case "gn":
            return lambda channels: nn.GroupNorm(32, channels, eps=eps)


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """torchvision's normalisation by constants; which multiplication and addition it is, is computed once."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self._computed: tuple[Tensor, Tensor] | None = None
        self._computed_from: list[tuple[Tensor, int]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies compute anew: the versions of their buffers count from the start, and may come to be those noted."""
        return {**self.__dict__, "_computed": None, "_computed_from": []}

    def affine(self) -> tuple[Tensor, Tensor]:
        """(C,) scale and shift; of five small kernels per norm, a step on a GPU would wait for the host."""
        if torch.compiler.is_compiling() or self.weight.is_inference():
            return self._affine()
        known = zip(self.buffers(), self._computed_from, strict=False)
        # Buffers are replaced when they move to another device, and written to when weights are loaded. (A broadcast is
        # not counted as a write, but gives frozen buffers the values that they have.)
        if self._computed is None or any(now is not then or now._version != version for now, (then, version) in known):
            with torch.inference_mode(False):  # or training after it could not use them
                self._computed = self._affine()
            self._computed_from = [(buffer, buffer._version) for buffer in self.buffers()]
        return self._computed

    def _affine(self) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes; any process may have no input at all.

    On GPUs it is torch's, which refuses CPUs. On those the sums over the processes are taken here. It is no subclass
    of torch's, since DistributedDataParallel refuses such on CPUs.
    """

    process_group = None  # all processes
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W) of the same type; collective while training."""
        if x.device.type != "cpu":
            # Without input, torch would share statistics of the input's type, which autocast makes a shorter one.
            values = x if len(x) > 0 else x.to(self.weight.dtype)
            out: Tensor = nn.SyncBatchNorm.forward(self, values)  # type: ignore[arg-type]
            return out.to(x.dtype)
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        values = x.to(self.weight.dtype)  # float32 under autocast
        count = values.new_full((1,), values.numel() // values.shape[1])
        sums = _SumOverProcesses.apply(torch.cat([values.sum((0, 2, 3)), count]))
        total = sums[-1].clamp(min=1)  # no input in any process: no NaN
        mean = sums[:-1] / total
        centred = values - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / total
        with torch.no_grad():
            momentum = self.momentum * (sums[-1] > 0)
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * total / (total - 1).clamp(min=1), momentum)
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient, as the loss of each process depends on each input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, norm: Norm | None = None
) -> nn.Conv2d | nn.Sequential:
    """A convolution that keeps the size (divided by `stride`); with a norm, which then replaces the bias, a pair.

    The weights are drawn as in Detectron's FPN (Kaiming, uniform, a = 1); the bias is 0.
    """
    conv = Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=norm is None)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if norm is None:
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        return conv
    return nn.Sequential(conv, norm_layer(norm)(out_channels))


def apply_conv_norm(
    conv: nn.Module, norm: nn.Module, x: Tensor, *, shortcut: Tensor | None = None, relu: bool = False
) -> Tensor:
    """`relu(norm(conv(x)) + shortcut)` for an `nn.Conv2d` without bias, or with one if the norm was folded into it.

    A frozen norm is a multiplication and an addition per channel. Folded into the convolution's weights and bias, it
    costs neither a pass over the features nor memory for the backward pass; the gradients are the same.
    """
    assert isinstance(conv, nn.Conv2d)
    weight, shift = conv.weight, conv.bias
    if isinstance(norm, FrozenBatchNorm2d):
        scale, shift = norm.affine()
        weight = weight * scale[:, None, None, None]
    elif not isinstance(norm, nn.Identity):
        return activated(norm(conv(x)), shortcut, relu)
    if shift is not None and kernels.serve(x):
        out = conv._conv_forward(x, weight, None)
        if out.is_contiguous(memory_format=torch.channels_last) and (shortcut is None or shortcut.dtype == out.dtype):
            from fpn_det.kernels.shift_relu import shift_relu

            return shift_relu(out, shift, shortcut, relu=relu)
        return activated(out + shift[:, None, None].to(out.dtype), shortcut, relu)
    return activated(conv._conv_forward(x, weight, shift), shortcut, relu)


def activated(x: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """`relu(x + shortcut)`, written to `x`; without either if there is no shortcut, or `relu` is False."""
    if shortcut is not None:
        x = x.add_(shortcut)
    return x.relu_() if relu else x


class Conv2d(nn.Conv2d):
    """PyTorch's, whose bias is added along with what follows where that is faster (`apply_conv_norm`)."""

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, h, w)."""
        return apply_conv_norm(self, _NO_NORM, x, relu=relu)


_NO_NORM = nn.Identity()


@torch.no_grad()
def fold_frozen_norms(model: nn.Module) -> None:
    """Fold the frozen norms of `model` into its convolutions for good: for models that are not trained any more."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, FrozenBatchNorm2d):
                conv = parent.get_submodule(name.replace("bn", "conv") if name.startswith("bn") else f"{int(name) - 1}")
                assert isinstance(conv, nn.Conv2d)
                assert conv.bias is None
                scale, shift = norm.affine()
                conv.weight.mul_(scale[:, None, None, None])
                conv.bias = nn.Parameter(shift.clone())
                setattr(parent, name, nn.Identity())
