"""Triton kernels for GPUs; each has an equal in PyTorch that serves elsewhere."""

import torch


def available(device: torch.device) -> bool:
    return device.type == "cuda"
