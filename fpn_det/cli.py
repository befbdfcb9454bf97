"""What the command-line tools share: arguments of a run, what they print, errors as one line instead of a traceback."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

import torch

from fpn_det.data.loader import worker_errors
from fpn_det.structures import InputError, printable


def config_parser(description: str | None, *, required: bool = True) -> argparse.ArgumentParser:
    """A parser with `--config` and `key=value` overrides; with `parse_intermixed_args` they may stand anywhere.

    Args:
        description: what --help says.
        required: whether `--config` is; else it is by default the one in the checkpoint.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "" if required else "; by default that of the checkpoint"
    parser.add_argument("--config", type=Path, required=required, help=f"YAML file, see configs/{default}")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace those of the file, as in optim.lr=0.01"
    )
    return parser


def count(text: str) -> int:
    """A whole number of at least 1 from the command line: a `type` for `add_argument`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print lines that may hold names from files: whatever else a terminal would obey is escaped.

    Args:
        text: one line or more; a name that is a part of a line must not break it, so escape it with `printable`.
        file: the standard output by default.
    """
    # Newline included, so that it is one write: other processes of a job may speak at the same time.
    print(printable(text + "\n", keep="\n"), end="", file=file)


@contextmanager
def user_errors() -> Iterator[None]:
    """Exit with code 2 and one line on an `InputError` or a path that cannot be used, with 130 on Ctrl-C.

    From here on, characters that the encoding of the console lacks are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with worker_errors():
            yield
    except InputError as error:
        # A loader worker's error arrives with the worker's traceback in front.
        _fail(str(error).rpartition("InputError: ")[2].strip())
    except OSError as error:
        if error.filename is None:  # not about a path, so not the user's to mend
            raise
        _fail(f"{error.filename}: {error.strerror}")
    except torch.OutOfMemoryError as error:
        _fail(f"{str(error).splitlines()[0]}; is another program on that GPU?")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    say(f"error: {message}" if rank == "0" else f"error (rank {rank}): {message}", file=sys.stderr)
    sys.exit(2)
