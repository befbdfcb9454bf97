"""`fpn_det.models.matching.noise` in one launch: in PyTorch, its hash is some sixty."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Boxes per program."""


def noise(seeds: Tensor, num: int, *, salt: int) -> Tensor:
    """(N,) int64 seeds -> (N, num) float32, equal to the bit to what PyTorch's operators give."""
    out = torch.empty((len(seeds), num), dtype=torch.float32, device=seeds.device)
    if out.numel() > 0:
        with torch.cuda.device_of(seeds):
            grid = (triton.cdiv(num, BLOCK), len(seeds))
            _kernel[grid](seeds.contiguous(), out, num, salt, BLOCK, enable_fp_fusion=True)
    return out


@triton.jit
def _kernel(seeds, out, num, salt: tl.constexpr, block: tl.constexpr):
    image = tl.program_id(1)
    place = tl.program_id(0) * block + tl.arange(0, block)
    seed = tl.load(seeds + image + tl.zeros_like(place))
    key = _mix(_mix(_mix(tl.full((block,), salt, tl.uint32)) ^ seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32))
    word = _mix(key ^ _mix(place.to(tl.uint32))) & 0x7FFFFFFF
    tl.store(out + image.to(tl.int64) * num + place, word.to(tl.float32) * 2.0**-31, place < num)


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)
