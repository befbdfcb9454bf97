"""FLOPs and bytes of a step by part, counted while it runs, and what the device reaches at most, measured.

FLOPs are those of convolutions and matrix products, by PyTorch's formulas (`torch.utils.flop_counter`); RoIAlign, NMS,
norms, activations and losses count none. Bytes are what eager execution asks of the memory: every operator reads its
tensors and writes its results once, views are free. Caches and fusion lower that.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

PARTS = {
    ".backbone": "body",
    ".neck": "FPN",
    ".rpn": "RPN head",
    ".pooler": "RoIAlign",
    ".roi_head": "box head",
}
"""Part of our detectors by what the name of a running module contains; the first that fits."""
OUTSIDE_MODULES, OPTIMIZER = "matching, sampling, losses, boxes, NMS", "optimiser, gradient norm"


class Counter(TorchDispatchMode):
    """Counts FLOPs and bytes, by part and in all, of what runs within it, backward passes included.

    Attributes:
        flops, bytes: by part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)
        self._modules = ModuleTracker()

    def __enter__(self) -> Any:
        self._modules.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._modules.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        part = self._part()
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops[part] += formula(*args, **(kwargs or {}), out_val=out)
        self.bytes[part] += traffic(func, args, kwargs, out)
        return out

    def _part(self) -> str:
        running = self._modules.parents
        for key, part in PARTS.items():
            if any(key in name for name in running):
                return part
        return OUTSIDE_MODULES if len(running) > 1 or self._modules.is_bw else OPTIMIZER


def traffic(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes of the tensors that an operator reads and of those that it writes."""
    returns, name = func._schema.returns, func._schema.name
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if is_view or "empty" in name:
        return 0
    given = zip(func._schema.arguments, args, strict=False)
    mutated = [value for argument, value in given if argument.alias_info is not None and argument.alias_info.is_write]
    return size((args, kwargs)) + size(out if returns else mutated)


def size(tree: Any) -> int:
    """Bytes of all tensors in nested lists and dicts."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


def ceilings(device: torch.device, *, tiny: bool = False) -> dict[str, float]:
    """Best of several: TFLOP/s per precision, and GB/s of a copy (bytes read and written).

    A precision's ceiling is that of a matrix product or of a 3x3 convolution of 256 channels, whichever is higher: on
    CPUs they come from different libraries. `... matmul` is the matrix product's.
    """
    on_gpu = device.type == "cuda"
    n = 64 if tiny else 8192 if on_gpu else 2048
    found = {}
    for precision, dtype in {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}.items():
        if precision == "tf32" and not on_gpu:
            continue
        set_tf32(precision == "tf32")
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        product = 2 * n**3 / best_seconds(lambda a=a, b=b: a @ b, device) / 1e12  # type: ignore[misc]
        cells = 16 if tiny else 512 if on_gpu else 128
        x, weight = (
            torch.randn(size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for size in ((1, 256, cells, cells), (256, 256, 3, 3))
        )
        seconds = best_seconds(lambda x=x, weight=weight: conv2d(x, weight, padding=1), device)  # type: ignore[misc]
        found[precision] = max(product, 2 * 9 * 256**2 * cells**2 / seconds / 1e12)
        found[f"{precision} matmul"] = product
    source = torch.ones(2**18 if tiny else 2**29 if on_gpu else 2**26, device=device)
    target = torch.empty_like(source)
    found["GB/s"] = 2 * size(source) / best_seconds(lambda: target.copy_(source), device) / 1e9
    return found


def best_seconds(work: Callable[[], object], device: torch.device, *, repeats: int = 10) -> float:
    """The shortest of several runs, after two that do not count."""
    seconds = []
    for _ in range(repeats + 2):
        synchronize(device)
        since = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - since)
    return min(seconds[2:])


def set_tf32(allowed: bool) -> None:
    """Whether GPUs may multiply and convolve float32 in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
