"""Unpacking: what is there is not unpacked again, nothing leaves the folder, nothing half is named."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fpn_det.data.archive import unpack
from fpn_det.structures import InputError

CONTENT = {f"images/{i:03}.jpg": os.urandom(1000 + i) for i in range(40)}


def pack(path: Path, content: dict[str, bytes] = CONTENT, *, deflate: Iterable[str] = ()) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("images")
        for name, data in content.items():
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if name in deflate else zipfile.ZIP_STORED)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(archive: Path, folder: Path, *, max_bytes: int = 10**6) -> str:
    with pytest.raises(InputError) as caught:
        unpack(archive, folder, max_bytes=max_bytes)
    return str(caught.value)


def test_all_is_unpacked_once(tmp_path: Path) -> None:
    archive, folder = pack(tmp_path / "a.zip", deflate=["images/003.jpg"]), tmp_path / "new" / "data"
    assert unpack(archive, folder, max_bytes=10**6) == 40
    assert files(folder) == CONTENT
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*.jpg")}
    (folder / "images/003.jpg").unlink()
    (folder / "images/004.jpg").write_bytes(b"cut")
    assert unpack(archive, folder, max_bytes=10**6) == 2
    assert files(folder) == CONTENT
    assert sum(p.stat().st_mtime_ns != time for p, time in times.items()) == 2


def test_only_what_is_asked_for(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", {"x/instances_val.json": b"1", "x/captions_val.json": b"22" * 999})
    assert unpack(archive, tmp_path / "data", pattern="x/instances_*.json", max_bytes=1) == 1
    assert files(tmp_path / "data") == {"x/instances_val.json": b"1"}


def test_a_process_killed_in_the_middle_is_continued(tmp_path: Path) -> None:
    """SIGKILL while the 26th file has arrived by half: 25 are there, whole, and stay as they are."""
    archive, folder = pack(tmp_path / "a.zip"), tmp_path / "data"
    program = f"""
import os, shutil, signal
from pathlib import Path
from fpn_det.data import archive
copies = []
def copy(source, target, length):
    copies.append(None)
    target.write(source.read(500) if len(copies) == 26 else source.read())
    if len(copies) == 26:
        target.flush()
        os.kill(os.getpid(), signal.SIGKILL)
archive.shutil.copyfileobj = copy
archive.unpack(Path({str(archive)!r}), Path({str(folder)!r}), max_bytes=10**6)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    left = files(folder)
    [half] = set(left) - set(CONTENT)
    assert (half, len(left.pop(half))) == ("images/.025.jpg.tmp", 500)
    assert left == dict(list(CONTENT.items())[:25])
    inodes = {name: (folder / name).stat().st_ino for name in left}
    assert unpack(archive, folder, max_bytes=10**6) == 15
    assert files(folder) == CONTENT
    assert {name: (folder / name).stat().st_ino for name in left} == inodes


@pytest.mark.parametrize("name", ["../evil.jpg", "images/../../evil.jpg", "/evil.jpg", "C:evil.jpg", "a\\..\\..\\b"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    archive, folder = pack(tmp_path / "a.zip", CONTENT | {name: b"evil"}), tmp_path / "in" / "data"
    assert re.search(r"a\.zip: '.*' in it leads out of the folder; nothing was unpacked", refusal(archive, folder))
    assert files(tmp_path).keys() == {"a.zip"}


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO])
def test_links_and_devices_are_refused(tmp_path: Path, kind: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("images")
        info.external_attr = (kind | 0o777) << 16
        archive.writestr(info, "/etc")
        archive.writestr("images/passwd", "evil")
    assert "'images' in it is a link or a device" in refusal(tmp_path / "a.zip", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_bomb_is_refused_by_what_it_says(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", {"a": bytes(10**7)}, deflate=["a"])
    assert archive.stat().st_size < 20_000
    assert "holds 10,000,000 bytes, at most 1,000,000 are expected" in refusal(archive, tmp_path / "data")


def test_a_bomb_that_lies_is_cut_and_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", {"a": bytes(10**7)}, deflate=["a"])
    archive.write_bytes(archive.read_bytes().replace((10**7).to_bytes(4, "little"), (5000).to_bytes(4, "little")))
    assert "Bad CRC-32" in refusal(archive, tmp_path / "data")
    assert files(tmp_path / "data") == {}


def test_damage_is_told_and_gets_no_name(tmp_path: Path) -> None:
    archive, folder = pack(tmp_path / "a.zip"), tmp_path / "data"
    content = bytearray(archive.read_bytes())
    content[content.index(CONTENT["images/007.jpg"]) + 500] ^= 1
    archive.write_bytes(content)
    message = refusal(archive, folder)
    assert re.search(r"a\.zip: damaged, .*Bad CRC-32 for file 'images/007\.jpg'.* Delete it and get it again", message)
    assert files(folder) == dict(list(CONTENT.items())[:7])


@pytest.mark.parametrize("make", [lambda data: b"<html>", lambda data: data[:-900], lambda data: b""])
def test_what_is_no_archive(tmp_path: Path, make) -> None:
    archive = pack(tmp_path / "a.zip")
    archive.write_bytes(make(archive.read_bytes()))
    assert "a.zip: damaged, or not a zip archive" in refusal(archive, tmp_path / "data")
    assert "cannot be read (No such file" in refusal(tmp_path / "b.zip", tmp_path / "data")


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", {"a": b"a"})
    content = bytearray(archive.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    assert "is encrypted" in refusal(archive, tmp_path / "data")


def test_a_full_disk_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, folder = pack(tmp_path / "a.zip"), tmp_path / "data"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=40_000))
    assert re.search(r"40,780 bytes are to be unpacked from .*a\.zip, .* room for 40,000", refusal(archive, folder))
    assert files(folder) == {}
    (folder / "images").mkdir()
    (folder / "images/000.jpg").write_bytes(CONTENT["images/000.jpg"])  # with what is here, the rest has room
    assert unpack(archive, folder, max_bytes=10**6) == 39


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_disk_that_becomes_full(tmp_path: Path) -> None:
    archive, folder = pack(tmp_path / "a.zip"), tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "images/.002.jpg.tmp").symlink_to("/dev/full")
    assert re.search(r"images/002\.jpg: cannot be written \(No space left on device\)", refusal(archive, folder))
    assert files(folder) == dict(list(CONTENT.items())[:2])


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip")
    (tmp_path / "images").touch()
    assert "A file has the place of a folder" in refusal(archive, tmp_path)
    assert "A file has the place of a folder" in refusal(archive, tmp_path / "images")


def test_processes_take_turns(tmp_path: Path) -> None:
    """A lock belongs to an open file, so threads of a process stand for processes here."""
    archive, folder = pack(tmp_path / "a.zip"), tmp_path / "data"
    written: list[int] = []
    threads = [
        threading.Thread(target=lambda: written.append(unpack(archive, folder, max_bytes=10**6))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == [0, 0, 0, 40]
    assert files(folder) == CONTENT
