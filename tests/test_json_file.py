"""What is wrong with a file as a whole is said in one line, before it does harm. More cases: data/test_coco.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fpn_det import json_file
from fpn_det.json_file import read_json
from fpn_det.structures import InputError


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_json(path, "REMEDY")
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_a_file_that_memory_cannot_take_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of holes: reading it would take a minute, parsing it all memory."""
    path = tmp_path / "huge.json"
    path.touch()
    os.truncate(path, 10**12)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    assert ": too large: 1,000.0 GB of JSON take 7,000.0 GB of memory or more" in refusal(path)


def test_the_limit_is_the_memory_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.json"
    path.write_text("[1, 2]")  # 6 bytes
    monkeypatch.setattr(json_file, "_physical_memory", lambda: 42)
    assert read_json(path) == [1, 2]
    monkeypatch.setattr(json_file, "_physical_memory", lambda: 41)
    assert "too large" in refusal(path)
    monkeypatch.setattr(json_file, "_physical_memory", lambda: None)
    assert read_json(path) == [1, 2]


def test_memory_that_runs_out_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("[]")

    def loads(data: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(json_file.json, "loads", loads)
    assert "too large for the memory" in refusal(path)


def test_the_remedy_follows_where_the_file_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, said in (
        ("missing", "(No such file or directory). REMEDY"),
        ("", "(it is a folder, not a file). REMEDY"),
        ("pipe", "(it is a pipe or a device, not a file). REMEDY"),
        ("x" * 300, "(File name too long). REMEDY"),
    ):
        assert refusal(tmp_path / name).endswith(said)
    with pytest.raises(InputError, match=r"it is a pipe or a device"):
        read_json(Path("/dev/null"))
