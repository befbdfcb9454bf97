"""What the tools print: nothing that a terminal obeys, and nothing that its encoding cannot take."""

import io
import re
import sys

import pytest

from fpn_det.cli import say, user_errors
from fpn_det.structures import InputError

HOSTILE = "\x1b[2J\r\u202e\ud800\0"
SHOWN = r"\x1b[2J\r\u202e\ud800\x00"


def test_lines_stay_lines_and_the_rest_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"one {HOSTILE}\ntwo é")
    say(HOSTILE, file=sys.stderr)
    assert capsys.readouterr() == (f"one {SHOWN}\ntwo é\n", f"{SHOWN}\n")


@pytest.mark.parametrize("error", [InputError(f"a.json: {HOSTILE}"), FileNotFoundError(2, "No such file", HOSTILE)])
def test_errors_are_escaped(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"), user_errors():
        raise error
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: .*{re.escape(SHOWN)}.*\n", err)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_the_console_will_do(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding, errors="strict"))

    @user_errors()
    def tool() -> None:
        print("cell é 甲 \ud800")  # whoever prints it
        raise InputError("cell é 甲")

    with pytest.raises(SystemExit):
        tool()
    for name, stream in streams.items():
        getattr(sys, name).flush()
        text = stream.getvalue().decode(encoding)
        for char in "é甲":
            assert (char in text) != (char.encode("unicode_escape").decode() in text)
