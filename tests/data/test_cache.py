"""What was made of a file is given back while the file stays as it is, and otherwise made anew; no file stops a run."""

from __future__ import annotations

import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fpn_det.data import cache
from fpn_det.data.cache import ArrayCache

ARRAYS = {"one": np.arange(1000, dtype=np.int64), "two": np.ones((3, 4), np.float32), "none": np.zeros(0, np.uint8)}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file large enough to be worth it, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MIN_BYTES", 4)
    path = tmp_path / "source"
    path.write_bytes(b"abcd")
    return path


def write(source: Path, arrays: dict[str, np.ndarray] = ARRAYS) -> Path:
    """The one file of the cache."""
    ArrayCache(source, version=1).write(arrays)
    [path] = (source.parent / "cache" / "fpn_det").iterdir()
    return path


def is_kept(source: Path, version: int = 1) -> bool:
    arrays = ArrayCache(source, version=version).read()
    if arrays is None:
        return False
    assert {name: (a.dtype, a.shape, a.tolist()) for name, a in arrays.items()} == {
        name: (a.dtype, a.shape, a.tolist()) for name, a in ARRAYS.items()
    }
    return True


def test_arrays_come_back_as_they_were(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever path the source is called."""
    assert not is_kept(source)
    write(source)
    assert is_kept(source)
    (tmp_path / "link").symlink_to(source)
    assert is_kept(tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    assert is_kept(Path("source"))


def test_a_small_source_leaves_no_file(source: Path, tmp_path: Path) -> None:
    source.write_bytes(b"abc")
    ArrayCache(source, version=1).write(ARRAYS)
    assert not (tmp_path / "cache").exists()
    assert not is_kept(source)


def test_a_changed_source_is_noticed(source: Path) -> None:
    """By its size; by its time; and where the time was set back, by the time of that."""
    write(source)
    before = source.stat()
    assert not is_kept(source, version=2)
    source.write_bytes(b"abcde")
    assert not is_kept(source)
    source.write_bytes(b"abcx")
    os.utime(source, ns=(0, before.st_mtime_ns + 1))
    assert not is_kept(source)
    os.utime(source, ns=(0, before.st_mtime_ns))
    assert not is_kept(source)


def test_a_source_that_changes_while_it_is_read_is_noticed(source: Path) -> None:
    ours = ArrayCache(source, version=1)
    source.write_bytes(b"abcde")
    ours.write(ARRAYS)
    assert not is_kept(source)


def test_every_source_has_a_file_of_its_own(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"abcd")
    path = write(source)
    assert not is_kept(other)
    ArrayCache(other, version=1).write({"one": np.zeros(1)})
    assert is_kept(source)
    source.write_bytes(b"abcde")
    ArrayCache(source, version=1).write(ARRAYS)
    assert is_kept(source)
    assert len(list(path.parent.iterdir())) == 2, "a changed source replaces its own"


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def test_damaged_and_other_files_are_made_anew(source: Path) -> None:
    path = write(source)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(np.arange(500, 510).tobytes())] ^= 1
    npy = io.BytesIO()
    np.save(npy, ARRAYS["one"])
    pickled = npz(key=np.array([{}], dtype=object))
    truncated = [whole[: int(len(whole) * part)] for part in (0, 0.1, 0.5, 0.9)] + [whole[:-1]]
    for content in (*truncated, bytes(flipped), b"junk" * 100, npy.getvalue(), pickled, npz(**ARRAYS)):
        path.write_bytes(content)
        assert not is_kept(source)
        write(source)
        assert is_kept(source)


def test_nothing_in_a_cache_file_is_executed(source: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(source.parent / "executed"),)

    path = write(source)
    with np.load(path) as file:
        key = file["key"]
    path.write_bytes(npz(key=key, one=np.array([Bomb()], dtype=object)))
    assert not is_kept(source)
    assert not (source.parent / "executed").exists()


def test_a_folder_that_cannot_be_written_costs_a_warning(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    with pytest.warns(UserWarning, match=r"cannot be written \(.+\).*XDG_CACHE_HOME"):
        ArrayCache(source, version=1).write(ARRAYS)
    assert not is_kept(source)


def test_a_full_disk_is_not_made_fuller(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(source)

    def full(file: io.BufferedIOBase, **_: np.ndarray) -> None:
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="No space left"):
        ArrayCache(source, version=1).write({})
    assert list(path.parent.iterdir()) == [path]
    assert is_kept(source), "what was there stays"


def test_a_reader_meets_whole_files_while_others_write(source: Path) -> None:
    write(source)
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(ArrayCache(source, version=1).write, ARRAYS) for _ in range(200)]
        while not all(writer.done() for writer in writers):
            assert is_kept(source)
    assert all(writer.exception() is None for writer in writers)
    assert write(source).suffix == ".npz", "and no other file is left"


def test_without_source_or_home_there_is_no_cache(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ArrayCache(tmp_path / "missing", version=1).write(ARRAYS)
        assert not is_kept(tmp_path / "missing")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", homeless)
        ArrayCache(source, version=1).write(ARRAYS)
        assert not is_kept(source)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert not is_kept(tmp_path / "pipe")


def test_the_usual_folder_is_that_of_the_home(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ArrayCache(source, version=1).write(ARRAYS)
    assert len(list((tmp_path / "home/.cache/fpn_det").iterdir())) == 1
    assert is_kept(source)


def test_what_was_not_used_for_long_is_deleted(source: Path, tmp_path: Path) -> None:
    """Leftovers of interrupted writes too; reading counts as use."""
    path = write(source)
    stale = [path.with_name("old.npz"), path.with_name(".x.tmp")]
    of_others = path.with_name("notes.txt")
    for file in (*stale, of_others, path):
        file.write_bytes(path.read_bytes())
        os.utime(file, (0, 0))
    assert is_kept(source)
    path.with_name("gone.npz").symlink_to(tmp_path / "nowhere")
    other = tmp_path / "other"
    other.write_bytes(b"abcd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ArrayCache(other, version=1).write(ARRAYS)
    assert is_kept(source)
    assert of_others.exists()
    assert not any(file.exists() for file in stale)


def test_a_cache_that_can_only_be_read_is_used(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(source)

    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(cache.os, "utime", refuse)
    assert is_kept(source)
