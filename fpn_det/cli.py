"""What the command-line tools share: arguments of a run, and errors as one line instead of a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fpn_det.structures import InputError


def config_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--config` and trailing `key=value` overrides."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace those of the file, as in optim.lr=0.01"
    )
    return parser


@contextmanager
def user_errors() -> Iterator[None]:
    """Print an `InputError` as it is and exit with code 2."""
    try:
        yield
    except InputError as error:
        # A loader worker's error arrives with the worker's traceback in front.
        message = str(error).rpartition("InputError: ")[2].strip()
        rank = os.environ.get("RANK", "0")
        print(f"error: {message}" if rank == "0" else f"error (rank {rank}): {message}", file=sys.stderr)
        sys.exit(2)
