"""Runs nms_cases.py in processes of their own: Triton settles at its import whether it interprets kernels."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which comes with torch for CUDA")


@pytest.mark.parametrize(
    "interpret",
    [
        pytest.param("1", id="interpreted"),
        pytest.param(
            "0", id="compiled", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
        ),
    ],
)
def test_cases(interpret: str) -> None:
    cases = Path(__file__).parent / "nms_cases.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases],
        env=os.environ | {"TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        timeout=300,  # a kernel of `choose` whose boxes overlap themselves would not end
    )
    assert done.returncode == 0, done.stdout + done.stderr
