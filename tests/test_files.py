"""Files are whole, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpn_det.files import replacing, write_errors, write_json, write_text
from fpn_det.structures import InputError


def test_text_and_json(tmp_path):
    write_text(tmp_path / "a.txt", "Grüße\n")
    write_json(tmp_path / "b.json", {"a": [1, 2.5]})
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Grüße\n"
    assert (tmp_path / "b.json").read_text() == '{\n  "a": [\n    1,\n    2.5\n  ]\n}'
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "b.json"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file_and_no_junk(tmp_path, error):
    def write(path: Path) -> None:
        with replacing(path) as file:
            file.write(b"half of it")
            raise error

    (tmp_path / "a.txt").write_text("old")
    for name in ("a.txt", "new.txt"):
        with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
            write(tmp_path / name)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_named(tmp_path):
    """A limit on the size of files stands for the disk; `torch.save` gives its own error in place of the system's."""
    path = tmp_path / "model.pth"
    code = f"""
import resource, signal, torch
from pathlib import Path
from fpn_det.engine.checkpoint import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save_checkpoint(Path({str(path)!r}), {{"weight": torch.ones(10)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
save_checkpoint(Path({str(path)!r}), {{"weight": torch.ones(100_000)}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"InputError: {path}: cannot be written (File too large)" in done.stderr
    assert torch.load(path, weights_only=True)["weight"].tolist() == [1.0] * 10
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_vanished_or_is_none(tmp_path):
    with pytest.raises(InputError, match=r"gone/a\.txt: cannot be written \(No such file or directory\)"):
        write_text(tmp_path / "gone/a.txt", "x")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/a\.txt: cannot be written \(Not a directory\)"):
        write_text(tmp_path / "file/a.txt", "x")


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="of its own"), write_errors(tmp_path):
        raise RuntimeError("of its own")


def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    """A process writes one file again and again, of one letter each time, until it is killed."""
    path = tmp_path / "a.txt"
    code = f"""
import itertools
from pathlib import Path
from fpn_det.files import write_text
for letter in itertools.cycle("abcdefgh"):
    write_text(Path({str(path)!r}), letter * 1_000_000)
"""
    for delay in (0.05, 0.11, 0.17):
        process = subprocess.Popen([sys.executable, "-c", code], preexec_fn=lambda: os.nice(5))
        while not path.exists():
            assert process.poll() is None
        signal.sigtimedwait([], delay)
        process.kill()
        process.wait()
        content = path.read_text()
        assert content == content[0] * 1_000_000
        for leftover in tmp_path.glob(".*"):
            leftover.unlink()
        path.unlink()
