"""Unpacking zip archives of strangers: names stay inside the folder, and a process that was killed goes on.

A file appears under its name when all of it has arrived and its CRC-32 is right. So a file of the right length is a
whole one, and is not unpacked again.
"""

from __future__ import annotations

import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from os import sync
from pathlib import Path
from typing import IO

from tqdm import tqdm

from fpn_det.data.folder import escapes
from fpn_det.files import TEMPORARY, write_errors
from fpn_det.structures import InputError, printable

CHUNK_BYTES = 1 << 20


def unpack(archive: Path, folder: Path, *, pattern: str = "*", max_bytes: int) -> int:
    """Write the files of a zip archive below `folder`, those that are there already excepted.

    What was written is on the disk when this returns. A progress bar with rate and remaining time is shown on a
    terminal.

    Args:
        archive: the zip file.
        folder: is created, as are the folders in the archive.
        pattern: the names in the archive to unpack, as in a shell; `*` stands for slashes too.
        max_bytes: how much they may be together, by their own statement, which is then held to.

    Returns:
        How many files were written.

    Raises:
        InputError: the archive is damaged, encrypted, holds a name that leads out of `folder`, a link, or more than
            `max_bytes`; or there is no room, or `folder` cannot be written. Files that are whole stay.
    """
    with _archive_errors(archive), _locked(archive) as file, zipfile.ZipFile(file) as source:
        members = [info for info in source.infolist() if not info.is_dir() and fnmatchcase(info.filename, pattern)]
        _check(archive, members, max_bytes)
        missing = [info for info in members if not _is_there(folder / info.filename, info.file_size)]
        num_bytes = sum(info.file_size for info in missing)
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        if num_bytes > free:
            raise InputError(
                f"{folder}: {num_bytes:,} bytes are to be unpacked from {archive}, and there is room for {free:,}. "
                "Free some space, or choose another disk"
            )
        with tqdm(
            desc=printable(f"unpacking {archive.name}"),
            total=num_bytes,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=None,  # shown on terminals
            file=sys.stderr,
        ) as bar:
            for info in missing:
                _unpack_member(source, info, folder / info.filename)
                bar.update(info.file_size)
        if missing:
            sync()  # once for all: a file that is named and not yet on the disk does not survive a power failure
    return len(missing)


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, one process at a time, as far as the file system can tell."""
    import fcntl  # here, because Windows lacks it

    with path.open("rb") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@contextmanager
def _archive_errors(path: Path) -> Iterator[None]:
    """What `zipfile` says against an archive, as an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise InputError(
            f"{path}: damaged, or not a zip archive ({error or type(error).__name__}). Delete it and get it again; the "
            "files that were unpacked before are whole"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _check(archive: Path, members: list[zipfile.ZipInfo], max_bytes: int) -> None:
    """Refuse what nobody packs who means well."""
    for info in members:
        mode = info.external_attr >> 16
        if escapes(info.filename):
            reason = "leads out of the folder"
        elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            reason = "is a link or a device"
        elif info.flag_bits & 0x1:
            reason = "is encrypted"
        else:
            continue
        raise InputError(
            f"{archive}: {info.filename!r} in it {reason}; nothing was unpacked. Get the archive elsewhere"
        )
    total = sum(info.file_size for info in members)
    if total > max_bytes:
        raise InputError(
            f"{archive}: holds {total:,} bytes, at most {max_bytes:,} are expected; nothing was unpacked. Get the "
            "archive elsewhere"
        )


def _is_there(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except OSError:  # what hinders writing too is told then
        return False


def _unpack_member(source: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    temporary = target.with_name(TEMPORARY.format(target.name))
    with source.open(info) as content:
        try:
            with write_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    shutil.copyfileobj(content, file, CHUNK_BYTES)  # ends with the stated length and checks the CRC-32
                temporary.replace(target)
        finally:
            with write_errors(target):
                temporary.unlink(missing_ok=True)
