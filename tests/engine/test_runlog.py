"""The log of a run: what is written, and what remains of it after an interruption."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fpn_det.engine.runlog import RunLog
from fpn_det.structures import InputError

SPEED = {"speed/images_per_s": 8.0}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def run(folder: Path, *, start_step: int, num_steps: int = 6, until: int, validated: tuple[int, ...] = ()) -> None:
    """Log steps start_step + 1 .. until, each with its number as the loss."""
    with RunLog(folder, start_step=start_step, num_steps=num_steps) as log:
        for step in range(start_step + 1, until + 1):
            log.advance()
            log.training(step, {"loss/total": float(step), **SPEED}, eta="0:00:01")
            if step in validated:
                log.scalars(step, {"val/AP": step / 10})


def test_records_text_and_console(tmp_path, capsys):
    with RunLog(tmp_path, start_step=0, num_steps=6) as log:
        log.message("hello")
        log.training(2, {"loss/total": 1.25, **SPEED}, eta="0:00:07")
        log.image(2, "val/0", torch.zeros(3, 8, 8, dtype=torch.uint8))
    line = "step 2/6 eta 0:00:07 loss 1.25 images_per_s 8"
    assert capsys.readouterr().out.splitlines() == ["hello", line]
    assert (tmp_path / "log.txt").read_text().splitlines() == ["hello", line]
    assert records(tmp_path) == [{"step": 2, "loss/total": 1.25, "speed/images_per_s": 8.0}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(2, 1.25)]
    assert events.Tags()["images"] == ["val/0"]


def test_names_cannot_steer_the_terminal(tmp_path, capsys):
    with RunLog(tmp_path, start_step=0, num_steps=6) as log:
        log.message("two\nlines of 甲虫\x1b[2J\r\u202e\ud800")
    lines = ["two", r"lines of 甲虫\x1b[2J\r\u202e\ud800"]
    assert capsys.readouterr().out.split("\n") == [*lines, ""]
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").split("\n") == [*lines, ""]


def test_the_files_do_not_depend_on_the_locale(tmp_path, monkeypatch):
    open_file = Path.open

    def of_ascii(path, mode="r", buffering=-1, encoding=None, **rest):
        return open_file(path, mode, buffering, encoding or ("ascii" if "b" not in mode else None), **rest)

    monkeypatch.setattr(Path, "open", of_ascii)
    with RunLog(tmp_path, start_step=0, num_steps=6) as log:
        log.message("甲虫")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "甲虫\n"


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with RunLog(None, start_step=0, num_steps=6) as log:
        log.message("hello")
        log.advance()
        log.training(1, {"loss/total": 1.0, **SPEED}, eta="")
        log.scalars(1, {"val/AP": 0.5})
        log.image(1, "val/0", torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_resuming_replaces_the_records_after_the_checkpoint(tmp_path):
    run(tmp_path, start_step=0, until=5, validated=(3, 5))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # killed while writing
    run(tmp_path, start_step=3, until=6)
    assert [(r["step"], "val/AP" in r) for r in records(tmp_path)] == [
        (1, False),
        (2, False),
        (3, False),
        (3, True),
        (4, False),
        (5, False),
        (6, False),
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss/total")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("val/AP")] == [3]


def test_torn_records_of_a_crash_are_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1, "loss/total": 2.0}\n\0\0\0}\n[1]\n{"step": "x"}\n{"step": 2, "train/lo')
    with RunLog(tmp_path, start_step=1, num_steps=4) as log:
        assert log.kept == [{"step": 1, "loss/total": 2.0}]
    assert path.read_text() == '{"step": 1, "loss/total": 2.0}\n'


def full_disk(monkeypatch, log: RunLog) -> None:
    for name in ("_text", "_records"):
        monkeypatch.setattr(log, name, Path("/dev/full").open("w"))  # noqa: SIM115 - closed by the log


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    log = RunLog(tmp_path, start_step=0, num_steps=4)
    full_disk(monkeypatch, log)
    with pytest.raises(InputError, match=r"log\.txt: cannot be written \(No space left on device\)"):
        log.message("hello")
    with pytest.raises(InputError, match=r"log\.jsonl: cannot be written \(No space left on device\)"):
        log.scalars(1, {"loss/total": 1.0})
    with pytest.raises(InputError, match="cannot be written"):  # what is still in a buffer
        log.__exit__(None, None, None)


def test_closing_does_not_hide_the_error_under_way(tmp_path, monkeypatch):
    def fail() -> None:
        with RunLog(tmp_path, start_step=0, num_steps=4) as log:
            full_disk(monkeypatch, log)
            log.message("hello")

    with pytest.raises(InputError, match=r"log\.txt"):
        fail()


def test_evaluating_a_finished_run_again_replaces_its_last_record(tmp_path):
    run(tmp_path, start_step=0, until=6, validated=(3, 6))
    with RunLog(tmp_path, start_step=6, num_steps=6) as log:
        log.scalars(6, {"val/AP": 0.7})
    validations = [(r["step"], r["val/AP"]) for r in records(tmp_path) if "val/AP" in r]
    assert validations == [(3, 0.3), (6, 0.7)]
    assert [r["step"] for r in records(tmp_path) if "loss/total" in r] == [1, 2, 3, 4, 5, 6]


def test_a_longer_run_keeps_the_last_evaluation(tmp_path):
    run(tmp_path, start_step=0, until=6, validated=(6,))
    run(tmp_path, start_step=6, num_steps=8, until=8)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 6, 6, 7, 8]
