"""Writing files so that a crash, a full disk or a kill never leaves half of one."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fpn_det.structures import InputError

TEMPORARY = ".{}.tmp"
"""Name of the file that is being written in the place of another; what a killed process leaves is called so."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write `path` anew: it holds either its old content or all of the new, whatever happens meanwhile.

    The content is on the disk before the name is, and the name before this returns (fsync).

    Args:
        path: the file; its folder must exist.

    Yields:
        A file to write to.

    Raises:
        InputError: it cannot be written; the old content is intact.
    """
    temporary = path.with_name(TEMPORARY.format(path.name))
    with write_errors(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # a full disk is not made fuller
        folder = os.open(path.parent, os.O_RDONLY)  # the rename is durable once the folder is
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that do not know this of folders
                raise
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as `replacing` does."""
    write_text(path, json.dumps(content, indent=2))


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """What the operating system says against writing `path`, as an `InputError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides what the file said
        if not isinstance(reason, OSError):
            raise
        match reason:
            case FileExistsError() | NotADirectoryError():
                remedy = "A file has the place of a folder: choose another"
            case FileNotFoundError():
                remedy = "Its folder is gone, or never was"
            case _:
                remedy = (
                    "What was complete before is intact. Make room, or the folder writable again, and repeat the "
                    "command (training: with --resume)"
                )
        raise InputError(f"{path}: cannot be written ({reason.strerror or reason}). {remedy}") from error
