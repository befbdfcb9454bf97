"""One process or many: everything that knows about `torch.distributed`.

`torchrun` describes the job in environment variables; without them, a run is one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fpn_det.structures import InputError


@dataclass(frozen=True, kw_only=True)
class Process:
    """This process within the job.

    Attributes:
        rank: number among all processes of the job.
        world_size: how many there are.
        device: where this process computes.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes of a tensor of the same shape in each (collective)."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values / self.world_size

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process in the order of ranks, on the main process; empty elsewhere (collective)."""
        if self.world_size == 1:
            return [value]
        gathered = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, gathered, dst=0)
        return gathered or []

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process (collective)."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the main one's buffers (collective); running statistics differ between processes."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


@contextmanager
def launched_process(device: str | None = None, timeout: timedelta = timedelta(hours=1)) -> Iterator[Process]:
    """Join the job that `torchrun` started, or be the only process.

    Args:
        device: `cpu` or `cuda`; by default a GPU where there is one.
        timeout: how long a collective may wait for the other processes (the main one evaluates alone meanwhile).

    Raises:
        InputError: this machine has fewer GPUs than processes.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        yield Process(device=torch.device(kind))
        return
    local = torch.device("cpu")
    if kind == "cuda":
        num_gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if local_rank >= num_gpus:
            raise InputError(
                f"process {local_rank} of this machine has no GPU, there are {num_gpus}: use --nproc-per-node "
                f"{num_gpus}, or hide them with CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        local = torch.device("cuda", local_rank)
        torch.cuda.set_device(local)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", timeout=timeout, device_id=local if kind == "cuda" else None
    )
    yield Process(rank=dist.get_rank(), world_size=dist.get_world_size(), device=local)
    # Not after an exception: NCCL would wait for processes that wait for this one in a collective. Exiting ends it all.
    dist.destroy_process_group()
