"""One process or many: everything that knows about `torch.distributed`.

`torchrun` describes the job in environment variables; without them, a run is one process. Within a job, every process
notes what it is doing (`Process.doing`); one that gets no further for too long ends, and says which one held it up.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from fpn_det.structures import InputError, printable

T = TypeVar("T")

STALLED_EXIT_CODE = 3


@dataclass(frozen=True, kw_only=True)
class Process:
    """This process within the job.

    Attributes:
        rank: number among all processes of the job.
        world_size: how many there are.
        device: where this process computes.
        watchdog: takes notes and time; None where there is one process.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    watchdog: Watchdog | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def doing(self, what: str, step: int | None = None) -> None:
        """Note progress: what this process begins to do now, in which step (by default that of the last note)."""
        if self.watchdog is not None:
            self.watchdog.note(what, step)

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the main process, which alone does it, in every process (collective).

        An `InputError` there ends all processes; the main one tells.
        """
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except InputError as error:
                outcome[1] = error
        failed = [outcome[1] is not None]
        dist.broadcast_object_list(failed, src=0)
        if failed[0]:
            raise outcome[1] if self.is_main else SystemExit(2)
        dist.broadcast_object_list(outcome, src=0)
        result: T = outcome[0]
        return result

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


class Watchdog:
    """Ends this process when it has made no progress for too long, and names the process that holds up the job.

    A collective waits for all processes, so when one is stuck, dead or unreachable, all others wait. A thread tells
    them through the store of the job what this process is doing, and watches over it.

    Args:
        rank, world_size: this process among all.
        timeout: the longest time between two notes.
        store: where the processes tell each other; not the one of the collectives, which may be waiting.
    """

    def __init__(self, *, rank: int, world_size: int, timeout: timedelta, store: Store) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout.total_seconds()
        self.interval_s = min(5.0, self.timeout_s / 8)
        self._note: tuple[str, int | None, float] = ("starting", None, time.monotonic())
        self._num_told = 0
        self._done = threading.Event()
        # Two, as the store does not answer if the process that holds it stands still.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._tell_always)]
        self._store = store

    def note(self, what: str, step: int | None = None) -> None:
        """Note progress."""
        self._note = (what, self._note[1] if step is None else step, time.monotonic())

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(timeout=self.interval_s)

    def where(self) -> str:
        """What this process is doing, in words."""
        return _in_words({"what": self._note[0], "step": self._note[1]})

    def _watch(self) -> None:
        while not self._done.wait(self.interval_s):
            waited_s = time.monotonic() - self._note[2]
            if waited_s > self.timeout_s:
                message = f"error (rank {self.rank}): no progress for {waited_s:.0f} s while {self.where()}. "
                try:
                    # Newline included, so that it is one write, which no other process can come in between of.
                    sys.stderr.write(printable(message + self._reason()) + "\n")
                    sys.stderr.flush()
                finally:
                    os._exit(STALLED_EXIT_CODE)  # the main thread waits outside of Python

    def _tell_always(self) -> None:
        while not self._done.wait(self.interval_s):
            self._tell()

    def _tell(self) -> None:
        what, step, since = self._note
        self._num_told += 1
        content = {"what": what, "step": step, "for_s": time.monotonic() - since, "number": self._num_told}
        try:
            self._store.set(f"doing/{self.rank}", json.dumps(content | {"host": platform.node()}))
        except RuntimeError:  # whoever holds the store has ended; waiting for a collective shows the rest
            return

    def _reason(self) -> str:
        """Who is behind, in words, as far as the store answers."""
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.append(self._held_up_by()), daemon=True)
        asking.start()
        asking.join(4 * self.interval_s + 5)
        return found[0] if found else "The main process or its machine stands still: it does not answer"

    def _held_up_by(self) -> str:
        """Who is behind, in words."""
        before = self._read_all()
        time.sleep(3 * self.interval_s)
        now = self._read_all()
        if not now:
            return "The job's store cannot be reached: the main process or its machine is gone"
        silent = [r for r in range(self.world_size) if now.get(r, {}).get("number") == before.get(r, {}).get("number")]
        steps = {r: -1 if state["step"] is None else state["step"] for r, state in now.items()}
        last = [r for r in steps if steps[r] == min(steps.values())]
        if not silent and len(last) == self.world_size:  # all in the same step: the one that noted nothing for longest
            last = [max(now, key=lambda r: now[r]["for_s"])]
        parts = [
            f"rank {r} on {now[r]['host']}, {_in_words(now[r])}{' (it does not answer)' if r in silent else ''}"
            if r in now
            else f"rank {r}, which never answered"
            for r in silent or last
        ]
        return (
            f"Held up by {'; '.join(parts)}. If a step or an evaluation takes so long, raise runtime.timeout_minutes; "
            "--resume goes on from the last checkpoint"
        )

    def _read_all(self) -> dict[int, dict[str, Any]]:
        """The last note of each process that gave one; empty if the store cannot be reached."""
        try:
            keys = {rank: f"doing/{rank}" for rank in range(self.world_size)}
            return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}
        except RuntimeError:
            return {}


def _in_words(note: dict[str, Any]) -> str:
    return note["what"] if note["step"] is None else f"{note['what']} in step {note['step']}"


@contextmanager
def launched_process(device: str | None = None, timeout: timedelta = timedelta(minutes=30)) -> Iterator[Process]:
    """Join the job that `torchrun` started, or be the only process.

    Args:
        device: `cpu` or `cuda`; by default a GPU where there is one.
        timeout: how long a process may go without progress (the main one evaluates alone meanwhile).

    Raises:
        InputError: this machine has fewer GPUs than processes, or another process of the job was lost.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        yield Process(device=torch.device(kind))
        return
    missing = [name for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"the environment has RANK, but not {', '.join(missing)}: start with torchrun, or unset RANK")
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
    try:
        store, rank, world_size = _join(timeout)
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout + timedelta(minutes=1),  # the watchdog, which knows more, comes first
            device_id=local if kind == "cuda" else None,
        )
    except RuntimeError as error:
        raise InputError(
            f"the {os.environ.get('WORLD_SIZE')} processes of the job did not find each other at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} ({_first_line(error)}). Start as many as "
            "--nnodes and --nproc-per-node say, with the same --rdzv-endpoint, and open that port between the machines"
        ) from error
    with Watchdog(rank=rank, world_size=world_size, timeout=timeout, store=store.clone()) as watchdog:
        try:
            yield Process(rank=rank, world_size=world_size, device=local, watchdog=watchdog)
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise InputError(
                f"the connection to the other processes broke while {watchdog.where()} ({_first_line(error)}); look "
                "for what the others say, or for one that was killed. --resume goes on from the last checkpoint, and "
                "torchrun --max-restarts N does so by itself"
            ) from error
    # Not after an exception: NCCL would wait for processes that wait for this one in a collective. Exiting ends it all.
    dist.destroy_process_group()


def _join(timeout: timedelta) -> tuple[Store, int, int]:
    """Find the other processes: a store that all of them share and no earlier ones used, the rank, the number of ranks.

    `torchrun` keeps its store when it starts the processes again, and in it the addresses of processes that are gone,
    which gloo would take for those of the new ones. So the main process thinks of a name for this start, and answers
    all who ask, each by a name that is used once.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    start = uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", start)
        start = store.get(f"answer/{start}").decode()
        store.set(f"{start}/{rank}", "here")
        return PrefixStore(start, store), rank, world_size
    missing, deadline = list(range(1, world_size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"asks/{other}"]):  # perhaps an earlier process of that rank: then nobody reads the answer
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", start)
        time.sleep(0.02)
        missing = [other for other in missing if not store.check([f"{start}/{other}"])]
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"rank {', '.join(map(str, missing))} of {world_size} did not come")
    return PrefixStore(start, store), rank, world_size


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
