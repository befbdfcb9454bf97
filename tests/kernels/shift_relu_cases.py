"""The kernel of bias, shortcut and ReLU against PyTorch's operators; run by test_kernels.py."""

import os

import pytest
import torch
from torch import Tensor, nn

from fpn_det import kernels
from fpn_det.models import norms
from fpn_det.models.backbone import BasicBlock, Bottleneck

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("has_shortcut", [True, False])
@pytest.mark.parametrize("shape", [(2, 24, 5, 7), (1, 256, 9, 3), (3, 1, 1, 1), (0, 8, 4, 4)])
def test_values_and_gradients(dtype: torch.dtype, relu: bool, has_shortcut: bool, shape: tuple[int, ...]) -> None:
    from fpn_det.kernels.shift_relu import shift_relu

    torch.manual_seed(0)
    x, shortcut, weight = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3))
    x = x.contiguous(memory_format=torch.channels_last)
    shift = torch.randn(shape[1], device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, shift, *([shortcut] if has_shortcut else []))]
    out = shift_relu(x * 1, shift, shortcut if has_shortcut else None, relu=relu)
    expected = x.float() + shift[:, None, None] + (shortcut.float() if has_shortcut else 0)
    expected = (expected.relu() if relu else expected).to(dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)
    grads, expected_grads = (torch.autograd.grad((y * weight).sum(), leaves) for y in (out, expected))
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_not_a_number_stays() -> None:
    from fpn_det.kernels.shift_relu import shift_relu

    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0], device=DEVICE).view(1, 4, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        out = shift_relu(x, torch.zeros(4, device=DEVICE)).flatten().tolist()
    assert out[0] != out[0]
    assert out[1:] == [torch.inf, 0, 0]


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("folded", [False, True])
def test_residual_blocks(monkeypatch: pytest.MonkeyPatch, block: type[BasicBlock | Bottleneck], folded: bool) -> None:
    """With frozen norms, and with those of inference, which are in the convolutions."""
    torch.manual_seed(0)
    norm = norms.FrozenBatchNorm2d
    channels = 4 * block.expansion
    module = block(8, 4, 2, nn.Sequential(nn.Conv2d(8, channels, 1, 2, bias=False), norm(channels)), norm_layer=norm)
    for part in module.modules():
        if isinstance(part, norm):
            for buffer in part.buffers():
                nn.init.uniform_(buffer, 0.5, 1.5)
    if folded:
        norms.fold_frozen_norms(nn.Sequential(module))
    module.to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(2, 8, 7, 9, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    found: list[tuple[Tensor, tuple[Tensor, ...]]] = []
    for on in (True, False):
        monkeypatch.setattr(kernels, "serve", lambda x, on=on: on)
        y = module(x)
        found.append((y, torch.autograd.grad(y.square().sum(), [x, *module.parameters()])))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
