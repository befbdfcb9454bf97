"""Reading JSON that others wrote: one clear message for whatever is wrong with the file as a whole."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from fpn_det.structures import InputError

MEMORY_PER_BYTE = 7
"""Bytes of memory that reading takes per byte of the file, at least.

Measured with Python 3.11: 7.2 for COCO's annotations with polygons, 8.8 for short records of boxes, 12.4 for polygons
of whole numbers. The least of them, so that no file is refused that could have been read.
"""


def read_json(path: Path, remedy: str = "") -> Any:
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32.

    Args:
        path: the file.
        remedy: what to do about a file that is not there or not the right one, for the message.

    Raises:
        InputError: the file cannot be opened, is a folder, pipe or device, is larger than the memory can take, empty,
            cut off, not text, not JSON, or nested too deeply.
    """
    size = _size(path, remedy)
    memory = _physical_memory()
    if memory is not None and size * MEMORY_PER_BYTE > memory:
        raise InputError(
            f"{path}: too large: {size / 1e9:,.1f} GB of JSON take {size * MEMORY_PER_BYTE / 1e9:,.1f} GB of memory or "
            f"more, this machine has {memory / 1e9:,.1f}. Remove what is not needed, as masks (`segmentation`), or "
            "split the file"
        )
    try:
        data = path.read_bytes()
        return json.loads(data)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)}). {remedy}".rstrip()) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not valid JSON (byte {error.start:,} is not {error.encoding}: {error.reason}); save it as "
            "UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: {_json_error(error, len(data))}") from error
    except RecursionError as error:
        raise InputError(f"{path}: is not valid JSON for this purpose (nested too deeply)") from error
    except MemoryError as error:
        raise InputError(f"{path}: too large for the memory ({size / 1e9:,.1f} GB)") from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{path}: is not valid JSON for this purpose ({error})") from error


def _size(path: Path, remedy: str) -> int:
    """The size of a file in bytes; refuses pipes and devices, which may never come to an end."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{path}: cannot be read ({_reason(error)}). {remedy}".rstrip()) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise InputError(f"{path}: cannot be read (it is {kind}, not a file). {remedy}".rstrip())
    return status.st_size


def _json_error(error: json.JSONDecodeError, size: int) -> str:
    """What is wrong with a text that is not JSON; a text that starts well and ends too early was cut off."""
    text = error.doc.strip("\ufeff \t\n\r")
    if not text:
        return "the file is empty"
    ended = error.pos >= len(error.doc.rstrip()) or text[-1] not in "}]"
    if text[0] in "{[" and ended and error.msg != "Extra data":
        return (
            f"is cut off: it ends at byte {size:,} in the middle of the JSON ({error.msg}). Copy or download it again"
        )
    return f"is not valid JSON ({error})"


def _physical_memory() -> int | None:
    """Bytes of main memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
