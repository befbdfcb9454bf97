"""What was made of a large file, kept for the next start; nothing in a cache file is executed.

The files lie in `$XDG_CACHE_HOME/fpn_det`, by default `~/.cache/fpn_det`, one per source; they may be deleted any time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

MIN_BYTES = 1_000_000
"""Smaller sources are read again in less than 0.1 s; no file is left behind for them."""


KEEP_DAYS = 60
"""Files that were not used for longer are deleted when another one is written."""


class ArrayCache:
    """Arrays that are a function of one file, valid for as long as that file stays as it is now.

    The source is told by its path, size and times of change, taken here: construct before the source is read, so that
    a change while it is read counts as a later one. A cache file that is missing, damaged or of another source is
    made anew. Processes may write at the same time: each renames a whole file into place.

    Args:
        source: the file that the arrays are made of; need not exist.
        version: of the code that makes them.
    """

    def __init__(self, source: Path, *, version: int) -> None:
        self._path: Path | None = None
        try:
            path = source.resolve(strict=True)
            if not path.is_file():  # to open a pipe waits for its other end
                return
            with path.open("rb") as file:  # a network file system promises what is true now to those who open
                stat = os.fstat(file.fileno())
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fpn_det"
        except (OSError, RuntimeError):  # no source, which its reader will say; no home
            return
        if stat.st_size < MIN_BYTES:
            return
        self._path = folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.npz"
        self._key = f"{version} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {path!r}"

    def read(self) -> dict[str, np.ndarray] | None:
        """The arrays, if they were kept and the source is as it was."""
        if self._path is None:
            return None
        try:
            with np.load(self._path, allow_pickle=False) as file:
                if str(file["key"]) != self._key:
                    return None
                arrays = {name: file[name] for name in file if name != "key"}
        except Exception:  # zipfile and numpy meet damaged and other files with many exceptions
            return None
        with suppress(OSError):
            os.utime(self._path)  # used today
        return arrays

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays; where that is not possible, a warning is all."""
        if self._path is None:
            return
        temporary = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=".", suffix=".tmp", delete=False) as file:
                temporary = Path(file.name)
                np.savez(file, key=np.array(self._key), **arrays)  # type: ignore[arg-type]  # takes a name for a flag
            temporary.replace(self._path)
            _delete_unused(self._path.parent)
        except OSError as error:
            warnings.warn(
                f"{self._path}: cannot be written ({error.strerror}), so the next start will take as long; "
                "XDG_CACHE_HOME names another folder for caches",
                stacklevel=2,
            )
            if temporary is not None:
                temporary.unlink(missing_ok=True)


def _delete_unused(folder: Path) -> None:
    """Delete what was not used for `KEEP_DAYS`, leftovers of interrupted writes included."""
    for path in [*folder.glob("*.npz"), *folder.glob(".*.tmp")]:
        with suppress(OSError):  # another process was first, or it is another user's
            if path.stat().st_mtime < time.time() - 86400 * KEEP_DAYS:
                path.unlink()
