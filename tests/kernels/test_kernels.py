"""Runs the *_cases.py of this folder in a process of their own, in Triton's interpreter, which needs no GPU.

Triton settles at its import whether it interprets. With `make test-cuda` they run compiled, on the GPU.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which comes with PyTorch's Linux packages")
@pytest.mark.parametrize(
    "interpret",
    [
        pytest.param("1", id="interpreted"),
        pytest.param(
            "0",
            id="compiled",
            marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_cases(interpret: str) -> None:
    cases = sorted(Path(__file__).parent.glob("*_cases.py"))
    assert cases
    mark = ["-m", "not cuda" if interpret == "1" else ""]  # which hides GPUs, or does not
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *mark, *cases],
        env=os.environ | {"TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        timeout=500,  # a loop of a kernel may not end
    )
    assert done.returncode == 0, done.stdout + done.stderr
