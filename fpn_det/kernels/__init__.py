"""Triton kernels for GPUs; each has an equal in PyTorch, which serves by default.

`FPN_DET_TRITON=1` in the environment switches them on. The tests interpret and compile them, but they have not run on
a GPU yet: until their gain is measured, they are an experiment.

They are imported where they are used, since not every PyTorch comes with Triton.
"""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch import Tensor


def serve(x: Tensor) -> bool:
    """Whether kernels are to be used on `x`: on a GPU that can, but not where operators are recorded for others.

    What is compiled or exported has PyTorch's operators: the compiler fuses them itself, and files hold no kernels.
    """
    if not x.is_cuda or os.environ.get("FPN_DET_TRITON") != "1":
        return False
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return not recorded and available(x.device)


@cache
def available(device: torch.device) -> bool:
    """Whether kernels run on this GPU: NVIDIA's since Ampere, with Triton and the C compiler that it needs.

    Warns once if not.
    """
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        warnings.warn(
            f"FPN_DET_TRITON=1 has no effect on {device}: it needs an NVIDIA GPU, Ampere or newer", stacklevel=2
        )
        return False
    try:
        from fpn_det.kernels.shift_relu import shift_relu

        x, shift = torch.zeros(1, 8, 1, 1, device=device), torch.ones(8, device=device)
        shift_relu(x.contiguous(memory_format=torch.channels_last), shift)
    except Exception as error:  # which one depends on what is missing
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warnings.warn(
            f"Triton does not work here ({reason}), so operators of PyTorch are used on {device}. It comes with "
            "PyTorch's Linux packages and needs a C compiler: apt-get install gcc",
            stacklevel=2,
        )
        return False
    return True
