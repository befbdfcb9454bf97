"""The number format of the forward pass. Geometry and losses are float32 in any case: the models see to that."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which convolutions and matrix products take place."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def loss_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """Keeps gradients of float16 from vanishing; does nothing in the other formats."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
