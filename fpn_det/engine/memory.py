"""How much memory a process took, and running out of it, said in terms of what can be changed."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fpn_det.structures import Batch, InputError


def peak_memory_gib(device: torch.device) -> dict[str, float]:
    """The most that this process, without its loader workers, had at once: of the `host`'s memory, of the `gpu`'s."""
    unit = 1 if sys.platform == "darwin" else 2**10  # getrusage(2): bytes there, KiB elsewhere
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device) / 2**30
    return peak


@contextmanager
def explained_memory_errors(batch: Batch, device: torch.device, *, remedy: str) -> Iterator[None]:
    """What is done with `batch` runs out of memory: say how large it is and what to lower.

    Args:
        batch: on any device.
        device: whose memory it is.
        remedy: what to lower.

    Raises:
        InputError: in the place of the allocator's error.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED")):
            raise
        n, _, h, w = batch.images.shape
        counts = batch.targets.valid.sum(1).tolist()
        sizes = ", ".join(f"{width}x{height}" for height, width in batch.sizes.tolist())
        raise InputError(
            f"out of memory on {device}: {n} images padded to {w}x{h} (width x height: {sizes}) with "
            f"{', '.join(map(str, counts))} boxes, ids {', '.join(map(str, batch.image_ids.tolist()))}. {remedy} "
            f"({str(error).strip().partition(chr(10))[0]})"
        ) from error
