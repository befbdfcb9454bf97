"""The folder of a run: one process writes there, and a run goes on from its newest checkpoint that is whole."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fpn_det.engine.checkpoint import DamagedCheckpoint, State, load_checkpoint
from fpn_det.files import TEMPORARY, write_errors
from fpn_det.structures import InputError

LOCK = ".lock"
STEPS = "step_*.pth"


@contextmanager
def opened_run(folder: Path, *, resume: bool) -> Iterator[tuple[State | None, list[str]]]:
    """Make the folder of a run, keep other runs out of it while this is entered, and find out what to go on from.

    The lock is the operating system's, so it ends with the process, however that ends. A run that belongs to the same
    job of `torchrun`, which starts the processes again after one was lost, is resumed in any case.

    Args:
        folder: of the run.
        resume: whether to go on with a run that lies there.

    Yields:
        The state to resume from, or None for a fresh run; messages about damaged checkpoints that were passed over.

    Raises:
        InputError: another run has the folder, or it cannot be written; it holds a run and `resume` is off, or nothing
            that a run could resume from.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    with file:
        with write_errors(folder / LOCK):
            is_free = _lock(file) and _is_at(file, folder / LOCK)
        if not is_free:
            raise InputError(
                f"{folder}: another run writes there ({_owner(file)}). Wait for it, stop it, or choose another "
                f"--output-dir; if there is no such run, delete {folder / LOCK}"
            )
        try:
            state, notes = _state_to_resume(folder, resume=resume or _is_of_this_job(_read(file)))
            own = {
                "host": platform.node(),
                "pid": os.getpid(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "time": time.time(),
                "job": _job(),
            }
            with write_errors(folder / LOCK):
                file.truncate(0)
                file.write(json.dumps(own))
                file.flush()
                for path in folder.glob(TEMPORARY.format("*")):  # left by a process that was killed while it wrote
                    path.unlink()
            yield state, notes
        finally:
            if [path.name for path in folder.glob("*")] == [LOCK]:  # nothing came of it
                (folder / LOCK).unlink()


def _lock(file: TextIO) -> bool:
    """Whether no other process has the lock.

    A record lock, as loader workers, which may outlive a killed process for seconds, do not inherit it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # file systems without locks
            raise
    return True


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether the open file is still the one at `path`, or another run has just removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read(file: TextIO) -> Mapping[str, object]:
    file.seek(0)
    try:
        content = json.loads(file.read())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _owner(file: TextIO) -> str:
    """Who has the lock, in words."""
    owner = _read(file)
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"


def _job() -> str | None:
    """The id of the job that `torchrun` started; without one from the user, the machine and the process of torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{platform.node()} {os.getppid()}" if run_id == "none" else run_id


def _is_of_this_job(owner: Mapping[str, object]) -> bool:
    """Whether the run belongs to this job, so that `torchrun` has started its processes again.

    Ids may be used again for another job, but the torchrun of that one is younger than the run. Its own count of
    restarts does not tell: on machines that lost no process it stays 0.
    """
    job, written = _job(), owner.get("time")
    return job is not None and owner.get("job") == job and isinstance(written, float) and written > _launched_at()


def _launched_at() -> float:
    """When the parent of this process, torchrun, started (seconds since 1970); never, where that is unknown."""
    try:
        ticks = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])  # proc(5): starttime
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return math.inf


def _state_to_resume(folder: Path, *, resume: bool) -> tuple[State | None, list[str]]:
    """The newest checkpoint that is whole; damaged ones that are newer are renamed to `*.damaged`."""
    steps = sorted(folder.glob(STEPS), reverse=True)
    present = [*steps, *(path for path in (folder / "final.pth", folder / "best.pth") if path.exists())]
    if not present:
        return None, []
    if not resume:
        raise InputError(
            f"{folder}: holds a run already ({present[0].name}); add --resume to go on with it, choose another "
            "--output-dir, or delete the folder"
        )
    damaged = []
    for path in steps:
        try:
            state = load_checkpoint(path)
        except DamagedCheckpoint as error:
            damaged.append((path, error))
        else:
            for bad, _ in damaged:  # they would count as the newest
                with write_errors(bad):
                    bad.rename(bad.with_name(f"{bad.name}.damaged"))
            return state, [f"{error}\nrenamed to {bad.name}.damaged; resuming from {path}" for bad, error in damaged]
    reasons = "".join(f"\n  {error}" for _, error in damaged)
    raise InputError(
        f"{folder}: holds {present[0].name}, but no step_*.pth to resume from{' that is whole' if damaged else ''}; "
        f"choose another --output-dir, or delete the folder{reasons}"
    )


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step_{step:08d}.pth"


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` step checkpoints."""
    for path in sorted(folder.glob(STEPS))[:-keep]:
        path.unlink(missing_ok=True)
