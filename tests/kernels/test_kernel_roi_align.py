"""The kernel in Triton's interpreter, which runs it on the CPU, against the sum over cells in PyTorch."""

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fpn_det import kernels
from fpn_det.models.roi_pool import MultiLevelRoIAlign

pytest.importorskip("triton", reason="not every PyTorch comes with Triton")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

from fpn_det.kernels import roi_align as kernel


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """All functions of the kernel interpreted.

    TRITON_INTERPRET has to be set before Triton is imported, which other tests of the process may have done.
    """
    for name, function in inspect.getmembers(kernel, lambda x: isinstance(x, JITFunction)):
        monkeypatch.setattr(kernel, name, InterpretedFunction(function.fn))
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def dot_of_numbers(self: InterpreterBuilder, a: Any, b: Any, *others: Any) -> Any:
        """The interpreter keeps bfloat16 as uint16, and would multiply those."""
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    def cast_to_nearest(self: InterpreterBuilder, source: Any, to: Any) -> Any:
        """The interpreter cuts bits off where GPUs round to nearest."""
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(torch.as_tensor(source.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, to)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_of_numbers)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_to_nearest)


def maps_of(
    pooler: MultiLevelRoIAlign, *, n: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Levels of an image of this size, finest first: some channels-last, some not."""
    maps = [torch.randn(n, channels, -(-height // s), -(-width // s)).to(dtype) for s in pooler.strides]
    formats = (torch.channels_last, torch.contiguous_format)
    return [f.contiguous(memory_format=formats[i % 2]).requires_grad_() for i, f in enumerate(maps)]


def random_boxes(n: int, s: int, *, height: int, width: int) -> Tensor:
    """(n, s, 4): of any size and shape, many beyond the border, among the first: empty, all, more than all, none."""
    scale = torch.tensor([width, height])
    center, size = torch.rand(n, s, 2) * 1.2 - 0.1, (torch.randn(n, s, 2) - 1.5).exp()
    boxes = torch.cat([(center - size / 2) * scale, (center + size / 2) * scale], dim=2)
    special = [[9, 9, 9, 9], [0, 0, width, height], [-50, -40, width + 60, height + 30], [-90, -80, -40, -50]]
    for i, corners in enumerate(special[: n * s]):
        boxes[i % n, i // n] = torch.tensor(corners, dtype=torch.float32)
    return boxes


def check(pooler: MultiLevelRoIAlign, maps: Sequence[Tensor], boxes: Tensor, *, rounding: float = 0) -> None:
    """Pooled features and gradients, of arguments in any order of memory.

    `rounding` is the error allowed relative to each value, beside 1e-5 of the largest.
    """
    options = {name: getattr(pooler, name) for name in ("strides", "output_size", "sampling_ratio", "aligned")}
    level = pooler.assign_levels(boxes)
    scattered = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (boxes, level)]
    pooled = kernel.roi_align(maps, *scattered, **options)
    exact = [f.detach().float().requires_grad_() for f in maps]
    expected = pooler._sum_cells(exact, boxes)
    assert pooled.dtype == maps[0].dtype
    assert pooled.shape == expected.shape
    assert pooled.is_contiguous()
    grad = torch.randn(pooled.shape).to(pooled.dtype).mT.contiguous().mT
    grads = torch.autograd.grad(pooled, maps, grad)
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in grads)
    assert all(g.dtype == f.dtype for g, f in zip(grads, maps, strict=True))
    for ours, theirs in zip(
        (pooled, *grads), (expected, *torch.autograd.grad(expected, exact, grad.float())), strict=True
    ):
        atol = 1e-5 * theirs.abs().max().item() if theirs.numel() else 0
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=rounding, atol=atol)


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (16,)], ids=["pyramid", "one level"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_conventions(strides: Sequence[int], aligned: bool, sampling_ratio: int) -> None:
    torch.manual_seed(1)
    pooler = MultiLevelRoIAlign(
        strides=strides, sampling_ratio=sampling_ratio, aligned=aligned, canonical_size=56, output_size=7
    )
    maps = maps_of(pooler, n=2, channels=24, height=190, width=250)
    boxes = random_boxes(2, 6, height=190, width=250)
    assert len(pooler.assign_levels(boxes).unique()) == len(strides)
    check(pooler, maps, boxes)


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)],  # half a unit in the last place
    ids=["bfloat16", "float16"],
)
def test_short_formats_are_rounded_once(dtype: torch.dtype, rounding: float) -> None:
    torch.manual_seed(2)
    pooler = MultiLevelRoIAlign(strides=(4, 8), canonical_size=224)
    maps = maps_of(pooler, n=1, channels=16, height=100, width=130, dtype=dtype)
    check(pooler, maps, random_boxes(1, 8, height=100, width=130), rounding=rounding)


def test_constant_features_stay_constant() -> None:
    """The weights of a bin add up to 1, though none is a number of bfloat16."""
    pooler = MultiLevelRoIAlign(strides=(4,))
    ones = torch.ones(1, 16, 40, 40, dtype=torch.bfloat16)
    boxes = torch.tensor([[[11.3, 12.7, 130.9, 101.1], [20.7, 20.9, 23.1, 22.3]]])
    pooled = kernel.roi_align(
        [ones], boxes, pooler.assign_levels(boxes), strides=(4,), output_size=7, sampling_ratio=0, aligned=True
    )
    assert (pooled == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_any_shape(seed: int) -> None:
    """Channels that no block divides, several blocks, bins in several programs, maps of a few cells."""
    dice = torch.Generator().manual_seed(seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=dice))]

    torch.manual_seed(seed)
    pooler = MultiLevelRoIAlign(
        strides=(8, 16, 32)[: pick(1, 2, 3)],
        output_size=pick(1, 2, 3, 7, 9),
        sampling_ratio=pick(0, 0, 1, 3),
        aligned=bool(pick(0, 1)),
        canonical_size=pick(56, 448),
    )
    height, width = pick(8, 60, 120), pick(8, 50, 140)
    maps = maps_of(pooler, n=pick(1, 2, 3), channels=pick(1, 16, 24, 40), height=height, width=width)
    check(pooler, maps, random_boxes(len(maps[0]), pick(1, 3), height=height, width=width))


def test_no_boxes() -> None:
    pooler = MultiLevelRoIAlign(strides=(4, 8))
    check(pooler, maps_of(pooler, n=2, channels=3, height=40, width=50), torch.zeros(2, 0, 4))


def test_places_beyond_int32() -> None:
    """The second image of maps that begin 2**31 - 1 elements apart; the pages between are never touched."""
    tall = torch.empty(2, 2**15, 2**12, 16, dtype=torch.float16).permute(0, 3, 1, 2)
    boxes = torch.tensor([[[0.0, 0, 0, 0]], [[40.0, 4 * 32000, 60, 4 * 32000 + 20]]])
    tall[1, :, 31998:32008, 8:20] = torch.arange(16.0).half()[:, None, None]
    pooled = kernel.roi_align(
        [tall], boxes, torch.zeros(2, 1).long(), strides=(4,), output_size=2, sampling_ratio=0, aligned=True
    )
    assert torch.equal(pooled[1], torch.arange(16.0).half()[:, None, None].expand(16, 2, 2))
    assert not pooled[0].any()


def test_types_are_refused() -> None:
    boxes, level = torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64)
    options: dict[str, Any] = {"strides": (4, 8), "output_size": 7, "sampling_ratio": 0, "aligned": True}
    single, double = torch.zeros(1, 16, 4, 4), torch.zeros(1, 16, 4, 4, dtype=torch.float64)
    for maps in ([double, double], [single, single.half()]):
        with pytest.raises(TypeError, match="features must be float32, bfloat16 or float16, all alike, not"):
            kernel.roi_align(maps, boxes, level, **options)


def test_pooler_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels run, but for doubles."""
    monkeypatch.setattr(kernels, "serve", lambda x: True)
    pooler = MultiLevelRoIAlign(strides=(4, 8), canonical_size=56, output_size=3)
    maps = maps_of(pooler, n=1, channels=16, height=40, width=50, dtype=torch.bfloat16)
    maps.append(torch.full((1, 16, 1, 1), torch.nan))  # a level that is not used
    boxes = random_boxes(1, 6, height=40, width=50)
    pooled = pooler(maps, boxes)
    assert pooled.dtype == torch.bfloat16
    expected = pooler._sum_cells([f.float() for f in maps[:2]], boxes)
    torch.testing.assert_close(pooled.float(), expected, rtol=2**-8, atol=1e-5)
    assert pooler([f.double() for f in maps], boxes).dtype == torch.float64
