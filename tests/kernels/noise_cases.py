"""The kernel of the samples' noise against PyTorch's operators, to the bit; run by test_kernels.py."""

import os

import pytest
import torch

from fpn_det import kernels
from fpn_det.models.matching import ANCHORS, GROUND_TRUTH, PROPOSALS, noise

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")


@pytest.mark.parametrize("salt", [ANCHORS, PROPOSALS, GROUND_TRUTH])
@pytest.mark.parametrize("num", [0, 1, 1000, 2500])
def test_equal_to_the_bit(monkeypatch: pytest.MonkeyPatch, salt: int, num: int) -> None:
    seeds = torch.tensor([0, 1, -1, 2**31, -(2**31) - 1, 2**63 - 1, 1234567890123456789])
    expected = noise(seeds, num, salt=salt)
    monkeypatch.setattr(kernels, "serve", lambda x: True)
    found = noise(seeds.to(DEVICE), num, salt=salt)
    assert found.dtype == torch.float32
    assert torch.equal(found.cpu(), expected)
    assert num < 1000 or (0.45 < found.mean() < 0.55 and found.max() <= 1)
