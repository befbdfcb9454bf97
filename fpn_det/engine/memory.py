"""Running out of memory, said in terms of what can be changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fpn_det.structures import Batch, InputError


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
