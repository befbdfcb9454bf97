"""What the command-line tools share: arguments of a run, and errors as one line instead of a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from fpn_det.data.loader import worker_errors
from fpn_det.structures import InputError


def config_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--config` and `key=value` overrides; with `parse_intermixed_args` they may stand anywhere."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace those of the file, as in optim.lr=0.01"
    )
    return parser


@contextmanager
def user_errors() -> Iterator[None]:
    """Exit with code 2 and one line on an `InputError` or a path that cannot be used, with 130 on Ctrl-C."""
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    print(f"error: {message}" if rank == "0" else f"error (rank {rank}): {message}", file=sys.stderr)
    sys.exit(2)
