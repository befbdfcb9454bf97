"""What a run tells: lines on the console, `log.txt` and `log.jsonl` in its folder, TensorBoard.

Scalars have a group, which is a section of TensorBoard's page: `loss/`, `train/`, `speed/`, `memory/`, `val/` and, if
asked for, `val_classes/`; pictures are in `images/train/` and `images/val/`.

Only the main process writes. Control characters in what is told are escaped, because names may come from any file.
On a terminal, steps appear as a progress bar; elsewhere as plain lines.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary
from tqdm import tqdm

from fpn_det.files import write_errors, write_json, write_text
from fpn_det.structures import InputError, printable

ELSEWHERE = ("speed/eta_h",)
"""Scalars that a line of the console says in another way."""


def short_name(name: str) -> str:
    """Of a scalar, for one line of many: without its group; the total loss is `loss`."""
    return "loss" if name == "loss/total" else name.rpartition("/")[2]


class RunLog:
    """The log of one run.

    Args:
        folder: of the run; None logs nothing (all processes but the main one).
        start_step: the step that the run begins or resumes at; records of an interrupted run that will be written
            again are dropped.
        num_steps: length of the run.

    Attributes:
        kept: the records of an interrupted run that stay.

    Raises:
        InputError: by every method, that the folder cannot be written.
    """

    def __init__(self, folder: Path | None, *, start_step: int, num_steps: int) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self.kept: list[dict[str, Any]] = []
        if folder is None:
            return
        self.kept = _drop_records(folder / "log.jsonl", start_step=start_step, num_steps=num_steps)
        with write_errors(folder):
            self._records = (folder / "log.jsonl").open("a", encoding="utf-8")
            self._text = (folder / "log.txt").open("a", encoding="utf-8")
            self._events = EventFile(folder / "tensorboard", purge_step=start_step + 1)
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, initial=start_step, unit="step", disable=not self._is_terminal, smoothing=0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is not None:
            self._bar.close()
            if isinstance(error, InputError):
                with suppress(OSError):  # perhaps the very reason
                    print(f"error: {printable(str(error), keep=chr(10))}", file=self._text, flush=True)
            with suppress(InputError) if error is not None else nullcontext(), write_errors(self.folder):
                self._records.close()
                self._text.close()
                self._events.close()

    def message(self, text: str) -> None:
        """Tell the user something, in one line or more."""
        if self.folder is not None:
            text = printable(text, keep="\n")
            with suppress(OSError):  # a console that is gone must not end the run; log.txt has the text
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            with write_errors(self.folder / "log.txt"):
                print(text, file=self._text, flush=True)

    def training(self, step: int, scalars: Mapping[str, float], *, eta: str) -> None:
        """Record the scalars of a training step; `step` counts the steps done."""
        self.scalars(step, scalars)
        if self.folder is None:
            return
        shown = " ".join(f"{short_name(k)} {v:.4g}" for k, v in scalars.items() if k not in ELSEWHERE)
        line = f"step {step}/{self.num_steps} eta {eta} {shown}"
        with write_errors(self.folder / "log.txt"):
            print(line, file=self._text, flush=True)
        if not self._is_terminal:
            with suppress(OSError):
                print(line, flush=True)
        loss = scalars.get("loss/total", math.nan)  # missing if all steps were skipped
        self._bar.set_postfix_str(f"loss {loss:.3f}, {scalars['speed/images_per_s']:.1f} images/s")

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.folder is not None:
            self._bar.update()

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record named numbers in log.jsonl and TensorBoard."""
        if self.folder is None:
            return
        with write_errors(self.folder / "log.jsonl"):
            print(json.dumps({"step": step, **scalars}), file=self._records, flush=True)
            self._events.add(step, [summary.scalar(name, value) for name, value in scalars.items()])

    def image(self, step: int, name: str, image: Tensor | np.ndarray) -> None:
        """Record a (3, H, W) uint8 picture in TensorBoard."""
        if self.folder is not None:
            with write_errors(self.folder / "tensorboard"):
                self._events.add(step, [summary.image(name, image, dataformats="CHW")])

    def text(self, step: int, name: str, text: str) -> None:
        """Record a text in TensorBoard, which shows it as it is."""
        if self.folder is not None:
            with write_errors(self.folder / "tensorboard"):
                as_code = "".join(f"    {line}\n" for line in text.splitlines())  # else it is read as Markdown
                self._events.add(step, [summary.text(name, as_code)])

    def write_json(self, name: str, content: Any) -> None:
        """Write a file of the run's folder."""
        if self.folder is not None:
            write_json(self.folder / name, content)


class EventFile:
    """What TensorBoard reads, written at once: `SummaryWriter` writes in a thread, whose errors reach nobody.

    Args:
        folder: gets one file for each start of the run.
        purge_step: what earlier files have from this step on is void.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        folder.mkdir(exist_ok=True)
        # Read in the order of names.
        self._file = (folder / f"events.out.tfevents.{time.time_ns()}.{platform.node()}").open("ab")
        self._writer = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, summaries: Sequence[Summary]) -> None:
        """Add values of a step."""
        for values in summaries:
            self._write(Event(step=step, summary=values))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._file.flush()


def _drop_records(path: Path, *, start_step: int, num_steps: int) -> list[dict[str, Any]]:
    """Keep the records of steps done, which are returned.

    A finished run only repeats its evaluation, so its last one goes too.
    """
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            again = record["step"] > start_step or (record["step"] == num_steps and "loss/total" not in record)
        except (ValueError, TypeError, KeyError):  # torn when the machine went down
            continue
        if not again:
            kept.append(record)
    write_text(path, "".join(f"{json.dumps(record)}\n" for record in kept))
    return kept
