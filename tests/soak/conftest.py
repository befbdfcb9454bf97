"""What the long tests share: jobs of real processes that are watched from outside, and figures that are shown."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
THIS = Path(__file__).parent

Show = Callable[[str], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` leaves them out, `make soak` runs nothing else."""
    for item in items:
        if THIS in item.path.parents:
            item.add_marker(pytest.mark.soak)


@pytest.fixture
def show(capsys) -> Show:
    """Show a line of figures among the results of the tests."""

    def show_line(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", flush=True)

    return show_line


class Job:
    """A process whose output goes to a file; ends with the `with` block, however that ends.

    Args:
        arguments: of Python.
        output: where stdout and stderr go.
    """

    def __init__(self, arguments: Sequence[object], output: Path) -> None:
        self.output = output
        self._file = output.open("w")
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            for pid in self.ranks().values():  # torchrun gives each a session of its own
                os.kill(pid, 9)
        self.process.wait()
        self._file.close()

    def text(self) -> str:
        """What was printed so far."""
        return self.output.read_text(errors="replace")

    def wait_for(self, words: str, *, seconds: float = 120) -> None:
        """Wait until the output has these words."""
        until(lambda: words in self.text() or self.process.poll() is not None, seconds=seconds)
        assert words in self.text(), self.text()

    def wait(self, *, seconds: float = 240) -> int:
        """Wait for the end; the exit code."""
        return self.process.wait(timeout=seconds)

    def ranks(self) -> dict[int, int]:
        """Process ids by rank, of a job that torchrun started."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended
                continue
            if parent == self.process.pid:
                found |= {int(line[5:]): int(folder.name) for line in environment if line.startswith("RANK=")}
        return found


def until(condition: Callable[[], bool], *, seconds: float, interval: float = 0.05) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(interval)


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Job]]:
    """Start jobs that end with the test."""
    jobs: list[Job] = []

    def start_job(*arguments: object) -> Job:
        jobs.append(Job(arguments, tmp_path / f"output_{len(jobs)}.txt"))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.__exit__()


TRAIN = ROOT / "tools/train.py"


def torchrun(*options: object) -> list[object]:
    """Arguments of Python that start `torchrun`."""
    return ["-m", "torch.distributed.run", *options]
