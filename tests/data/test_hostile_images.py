"""Damaged files: none may end the process, and the tool that throws them finds those that do."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import hostile_images
import pytest
import torch
from hostile_images import hostile_image, throw

from fpn_det.structures import InputError

GOOD, REFUSED, DIES, RAISES, HANGS, EATS = range(6)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".tif", ".webp"])
def test_damaged_files_are_decoded_or_refused(test_data: Path, suffix: str) -> None:
    """tests/data/hostile_images.py throws more."""
    sources = [path.read_bytes() for path in sorted((test_data / "images").glob(f"*{suffix}"))]
    report = throw(partial(hostile_image, sources=sources), range(150))
    assert report.failures == []
    assert min(report.outcomes["decoded"], report.outcomes["refused"]) > 5
    assert report.outcomes.total() == 150


def test_inputs_are_the_same_whenever_asked_for() -> None:
    sources = [bytes(range(256)) * 9, b"\xff\xd8\xff\xc0" + bytes(500), b""]
    inputs = [hostile_image(number, sources) for number in range(300)]
    assert inputs == [hostile_image(number, sources) for number in range(300)]
    assert len(set(inputs)) > 200


def test_what_must_not_happen_is_reported_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that dies, raises, hangs or takes too much memory, and what comes after it."""

    def load(path: Path) -> torch.Tensor:
        match path.read_bytes()[0]:
            case 1:
                raise InputError("refused")
            case 2:
                os.kill(os.getpid(), signal.SIGSEGV)
            case 3:
                raise KeyError("unexpected")
            case 4:
                time.sleep(60)
            case 5:
                torch.ones(100 * 2**20, dtype=torch.uint8)
        return torch.zeros(3, 1, 1)

    monkeypatch.setattr(hostile_images, "load_image", load)
    kinds = bytes([GOOD, DIES, REFUSED, RAISES, HANGS, GOOD, EATS, DIES, GOOD])
    report = throw(lambda number: kinds[number - 20 :], range(20, 29), max_seconds=3, max_megabytes=50)
    assert report.outcomes == {"decoded": 3, "refused": 1, "failed": 5}
    numbers, problems = zip(*report.failures, strict=True)
    assert numbers == (21, 23, 24, 26, 27)
    for problem, part in zip(problems, ("-11", "KeyError: 'unexpected'", "3 s", " MB", "-11"), strict=True):
        assert part in problem
