"""Damaged image files without end, and what `load_image` makes of them: an image, or one `InputError`.

    python tests/data/hostile_images.py FILE ... [--first 0] [--count 10000]

Decodes in a process that may die, and prints every input that ended it, took too long or too much memory, or raised
anything but an `InputError`. Input number i is the same on every machine, given the same files.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from fpn_det.data.transforms import load_image
from fpn_det.structures import InputError

MAX_SECONDS = 60.0
MAX_MEGABYTES = 2000
"""More than any file of 89 million pixels takes, see docs/images.md."""

EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
"""Values at which sizes and offsets overflow."""


def damage(data: bytes, rng: random.Random) -> bytes:
    """Change a file in up to four places, more often in its first 600 bytes, where the headers are."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        end = max(1, min(600, len(damaged)) if rng.random() < 0.7 else len(damaged))
        at = rng.randrange(end)
        match rng.randrange(7):
            case 0:
                del damaged[rng.randrange(len(damaged) + 1) :]
            case 1:
                damaged[at : at + 1] = bytes([damaged[at] ^ 1 << rng.randrange(8)]) if damaged else b""
            case 2:
                size = rng.choice((1, 2, 4))
                value = rng.choice(EDGES) % 256**size
                damaged[at : at + size] = value.to_bytes(size, rng.choice(("big", "little")))
            case 3:
                del damaged[at : at + rng.randint(1, 40)]
            case 4:
                damaged[at:at] = rng.randbytes(rng.randint(1, 40))
            case 5:
                start = rng.randrange(end)
                damaged[at:at] = damaged[start : start + rng.randint(1, 200)]
            case 6:
                damaged = _change_jpeg_header(damaged, rng)
    return bytes(damaged)


def _change_jpeg_header(data: bytearray, rng: random.Random) -> bytearray:
    """Change a byte of a frame, scan, table or EXIF header of a JPEG; elsewhere, of anything."""
    marker = bytes([0xFF, rng.choice((0xC0, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD, 0xE1, 0xEE))])
    at = data.find(marker) + rng.randint(1, 24)
    if at < len(data):
        data[at] = rng.choice((0, 1, 2, 3, 4, 8, 12, 0x11, 0x22, 0x41, 0x44, 0x7F, 0xC0, 0xC3, 0xC9, 0xFF))
    return data


def hostile_image(number: int, sources: Sequence[bytes]) -> bytes:
    """Input `number`, made of one of `sources`; the same whenever it is asked for."""
    rng = random.Random(number)
    return damage(rng.choice(sources), rng)


@dataclass
class Report:
    """What became of the inputs.

    Attributes:
        outcomes: how many were decoded, how many refused, and how many failed.
        failures: number of the input and what happened, of those that neither gave an image nor an `InputError`.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)


def throw(
    make: Callable[[int], bytes],
    numbers: range,
    *,
    max_seconds: float = MAX_SECONDS,
    max_megabytes: float = MAX_MEGABYTES,
) -> Report:
    """Load inputs in a process of its own, and go on in another one where that died.

    Args:
        make: the content of the file of each number.
        numbers: which inputs, with a step of 1.
        max_seconds: an input that takes longer has failed.
        max_megabytes: so has one that raises the peak of the memory by more.
    """
    report, number = Report(), numbers.start
    while number < numbers.stop:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        rest = range(number, numbers.stop)
        child = multiprocessing.get_context("fork").Process(target=_load_all, args=(make, rest, max_megabytes, sender))
        child.start()
        sender.close()
        outcome = ""
        while number < numbers.stop and outcome in ("", "decoded", "refused"):
            outcome = _receive(receiver, max_seconds) or f"the process ended with {_exit_code(child)}"
            _note(report, number, outcome)
            number += 1
        child.kill()
        child.join()
    return report


def _receive(receiver: Connection, max_seconds: float) -> str:
    """The next outcome; empty where the process died."""
    try:
        return receiver.recv() if receiver.poll(max_seconds) else f"took more than {max_seconds:g} s"
    except EOFError:
        return ""


def _exit_code(child: BaseProcess) -> int | None:
    child.join()
    return child.exitcode


def _note(report: Report, number: int, outcome: str) -> None:
    if outcome in ("decoded", "refused"):
        report.outcomes[outcome] += 1
    else:
        report.outcomes["failed"] += 1
        report.failures.append((number, outcome))


def _load_all(make: Callable[[int], bytes], numbers: range, max_megabytes: float, sender: Connection) -> None:
    """Send the outcome of each input; decoders written in C complain on a standard error that nobody reads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)  # the threads of the parent did not come along
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        for number in numbers:
            path.write_bytes(make(number))
            before = _peak_megabytes()
            try:
                image = load_image(path)
                assert image.ndim == 3
                assert len(image) == 3
                outcome = "decoded"
            except InputError as error:
                outcome = "refused" if "\n" not in str(error) else f"more than one line: {error}"
            except BaseException:
                outcome = traceback.format_exc()
            if _peak_megabytes() - before > max_megabytes:
                outcome = f"took {_peak_megabytes() - before:.0f} MB"
            sender.send(outcome)


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    """Read the command line and throw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    args = parser.parse_args()
    make = partial(hostile_image, sources=[path.read_bytes() for path in args.files])
    report = throw(make, range(args.first, args.first + args.count))
    print(dict(report.outcomes))
    for number, problem in report.failures:
        print(f"{number}: {problem}")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
