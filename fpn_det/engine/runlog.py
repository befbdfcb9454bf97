"""What a run tells: lines on the console, `log.txt` and `log.jsonl` in its folder, TensorBoard.

Only the main process writes. Control characters in what is told are escaped, because names may come from any file.
On a terminal, steps appear as a progress bar; elsewhere as plain lines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fpn_det.structures import printable


class RunLog:
    """The log of one run.

    Args:
        folder: of the run; None logs nothing (all processes but the main one).
        start_step: the step that the run begins or resumes at; records of an interrupted run that will be written
            again are dropped.
        num_steps: length of the run.
    """

    def __init__(self, folder: Path | None, *, start_step: int, num_steps: int) -> None:
        self.folder = folder
        self.num_steps = num_steps
        if folder is None:
            return
        _drop_records(folder / "log.jsonl", start_step=start_step, num_steps=num_steps)
        self._records = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._text = (folder / "log.txt").open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, initial=start_step, unit="step", disable=not self._is_terminal, smoothing=0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is not None:
            self._bar.close()
            self._records.close()
            self._text.close()
            self._writer.close()

    def message(self, text: str) -> None:
        """Tell the user something, in one line or more."""
        if self.folder is not None:
            text = printable(text, keep="\n")
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
            print(text, file=self._text, flush=True)

    def training(self, step: int, scalars: Mapping[str, float], *, eta: str) -> None:
        """Record the scalars of a training step; `step` counts the steps done."""
        self.scalars(step, scalars)
        if self.folder is None:
            return
        shown = " ".join(f"{k.split('/')[-1]} {v:.4g}" for k, v in scalars.items())
        line = f"step {step}/{self.num_steps} eta {eta} {shown}"
        print(line, file=self._text, flush=True)
        if not self._is_terminal:
            print(line, flush=True)
        self._bar.set_postfix_str(f"loss {scalars['train/loss']:.3f}, {scalars['speed/images_per_s']:.1f} images/s")

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.folder is not None:
            self._bar.update()

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record named numbers in log.jsonl and TensorBoard."""
        if self.folder is None:
            return
        print(json.dumps({"step": step, **scalars}), file=self._records, flush=True)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Tensor | np.ndarray) -> None:
        """Record a (3, H, W) uint8 picture in TensorBoard."""
        if self.folder is not None:
            self._writer.add_image(name, image, step)


def _drop_records(path: Path, *, start_step: int, num_steps: int) -> None:
    """Keep the records of steps done; a finished run only repeats its evaluation, so its last one goes too."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]  # the last may be torn
    records = [json.loads(line) for line in lines]
    repeated = [r["step"] > start_step or (r["step"] == num_steps and "train/loss" not in r) for r in records]
    path.write_text("".join(f"{line}\n" for line, again in zip(lines, repeated, strict=True) if not again))
