"""The kernel compiled for GPUs that need not be there: the interpreter accepts what the compiler does not."""

import re
from typing import Any

import pytest

pytest.importorskip("triton", reason="not every PyTorch comes with Triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fpn_det.kernels import roi_align as kernel


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def ptx(dtype: str, *, backward: bool, capability: int) -> str:
    """Assembly of the kernel as `_launch` specialises it for 7 x 7 bins of 256 channels of a pyramid."""
    constants: dict[str, Any] = {
        "scales": (1 / 4, 1 / 8, 1 / 16, 1 / 32),
        "channels": 256,
        "size": 7,
        "sampling_ratio": 0,
        "aligned": True,
        "backward": backward,
        "bin_rows": 8,
        "bin_columns": 8,
        "tile": kernel.TILE,
        "block": kernel.BLOCK_BYTES // (4 if dtype == "fp32" else 2),
    }
    types: dict[str, Any] = {
        "maps": ("*fp32" if backward else f"*{dtype}",) * 4,
        "heights": ("fp32",) * 4,
        "widths": ("fp32",) * 4,
        "boxes": "*fp32",
        "levels": "*i64",
        "pooled": f"*{dtype}",
        "boxes_per_image": "i32",
    }
    names = kernel._kernel.arg_names
    assert names == [*types, *constants]
    of_16_bytes = [(0, 0), (0, 1), (0, 2), (0, 3), (names.index("boxes"),), (names.index("pooled"),)]
    source = ASTSource(
        fn=kernel._kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in of_16_bytes},
    )
    target = GPUTarget("cuda", capability, 32)
    text: str = triton.compile(
        source, target=target, options={"num_warps": kernel.NUM_WARPS, "enable_fp_fusion": True}
    ).asm["ptx"]
    return text


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_for_hopper(dtype: str, backward: bool) -> None:
    """On tensor cores, and with reads and atomic additions of 16 bytes."""
    text = ptx(dtype, backward=backward, capability=90)
    product = {"bf16": "f32.bf16.bf16", "fp32": "f32.tf32.tf32"}[dtype]
    assert re.search(rf"wgmma\.mma_async\S*\.{product}", text)
    assert re.search(r"(atom|red)\.global\S*\.add\.v4\.f32" if backward else r"ld\.global\.v4\.b32", text)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_for_ampere(backward: bool) -> None:
    text = ptx("fp16", backward=backward, capability=80)
    assert re.search(r"mma\.sync\S*\.f32\.f16\.f16\.f32", text)
