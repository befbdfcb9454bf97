"""What follows a convolution, in one pass over its output: the bias, the shortcut of a residual block, ReLU.

PyTorch adds the bias of a channels-last convolution at a third of the memory's bandwidth, and then reads and writes the
result again for the shortcut and for ReLU: a third of the time of a ResNet in bf16 on an H200.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2048
"""Elements per program, 16 per thread."""


def shift_relu(x: Tensor, shift: Tensor, shortcut: Tensor | None = None, *, relu: bool = True) -> Tensor:
    """`relu(x + shift + shortcut)`, computed in float32 and written to `x`.

    Args:
        x: (N, C, h, w), channels last, of any floating type: the output of a convolution, which needs it no more.
        shift: (C,) of any floating type.
        shortcut: of the shape and type of `x`.
        relu: whether negative sums become 0.
    """
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    if not torch.is_grad_enabled():
        _launch(x, shift, shortcut, relu)
        return x
    out: Tensor = _ShiftReLU.apply(x, shift, shortcut, relu)
    return out


class _ShiftReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
        _launch(x, shift, shortcut, relu)
        ctx.mark_dirty(x)
        ctx.relu, ctx.shift_dtype = relu, shift.dtype
        ctx.save_for_backward(*([x] if relu else []))
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        if ctx.relu:
            grad = torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0], 0)
        of_shift = grad.sum((0, 2, 3), dtype=torch.float32).to(ctx.shift_dtype) if ctx.needs_input_grad[1] else None
        return grad, of_shift, grad if ctx.needs_input_grad[2] else None, None


def _launch(x: Tensor, shift: Tensor, shortcut: Tensor | None, relu: bool) -> None:
    assert x.is_contiguous(memory_format=torch.channels_last)
    if x.numel() == 0:
        return
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(x.numel(), BLOCK),)
        addend = x if shortcut is None else shortcut
        options = (x.shape[1], shortcut is not None, relu, BLOCK)
        _kernel[grid](x, shift, addend, x.numel(), *options, enable_fp_fusion=True)


@triton.jit
def _kernel(
    x,
    shift,
    shortcut,
    numel,
    channels: tl.constexpr,
    has_shortcut: tl.constexpr,
    relu: tl.constexpr,
    block: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < numel
    value = tl.load(x + place, inside).to(tl.float32) + tl.load(shift + place % channels).to(tl.float32)
    if has_shortcut:
        value += tl.load(shortcut + place, inside).to(tl.float32)
    if relu:
        value = tl.where(value < 0, 0.0, value)  # NaN stays
    tl.store(x + place, value, inside)
