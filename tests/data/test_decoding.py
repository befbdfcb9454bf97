"""Every image is decoded, and one that takes its decoder down is known by name."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from fpn_det.data import decoding
from fpn_det.data.coco import CocoAnnotations, load_coco
from fpn_det.data.decoding import Decoded, decode_all
from fpn_det.data.problems import Defect

WIDTH, HEIGHT = 64, 48
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # to be shown turned by 90 degrees


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture = Image.effect_noise((WIDTH, HEIGHT), 50)
    picture.save(tmp_path / "good.jpg")
    picture.save(tmp_path / "rotated.jpg", exif=ROTATED)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:-100])
    (tmp_path / "text.png").write_bytes(b"no picture")
    (tmp_path / "empty.jpg").touch()
    return tmp_path


def load(folder: Path, *images: tuple[str, int, int]) -> CocoAnnotations:
    """Images of these names, widths and heights, without boxes."""
    entries = [{"id": 10 + i, "file_name": n, "width": w, "height": h} for i, (n, w, h) in enumerate(images)]
    content = {"images": entries, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (folder / "annotations.json").write_text(json.dumps(content))
    return load_coco(folder / "annotations.json", folder)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_what_is_wrong_with_an_image_is_told(folder: Path, num_workers: int) -> None:
    data = load(
        folder,
        ("good.jpg", WIDTH, HEIGHT),
        ("good.jpg", HEIGHT, WIDTH),
        ("rotated.jpg", HEIGHT, WIDTH),
        ("rotated.jpg", WIDTH, HEIGHT),
        ("rotated.jpg", WIDTH, WIDTH),
        ("cut.jpg", WIDTH, HEIGHT),
        ("text.png", WIDTH, HEIGHT),
        ("empty.jpg", WIDTH, HEIGHT),
    )
    found = dict(decode_all(data, num_workers=num_workers, name="test"))
    assert [found[i].defect for i in range(8)] == [
        None,
        Defect.IMAGE_SIZE_DIFFERS,
        None,
        Defect.IMAGE_NOT_UPRIGHT,
        Defect.IMAGE_SIZE_DIFFERS,
        *[Defect.IMAGE_UNREADABLE] * 3,
    ]
    good, rotated = (hashlib.sha256((folder / f"{n}.jpg").read_bytes()).digest() for n in ("good", "rotated"))
    assert [found[i].sha256 for i in range(8)] == [good, b"", rotated, rotated, b"", b"", b"", b""]
    assert found[3].value == f"{folder}/rotated.jpg: upright it is 48x64 (width x height), annotated 64x48"
    assert all(str(data.path(i)) in found[i].value for i in (1, 3, 4, 5, 6, 7))


def test_decompression_bombs_are_refused(test_data: Path, tmp_path: Path) -> None:
    bomb = test_data / "images/decompression_bomb.gif"
    (tmp_path / "bomb.gif").write_bytes(bomb.read_bytes())
    [(_, found)] = decode_all(load(tmp_path, ("bomb.gif", 100, 100)), num_workers=1, name="test")
    assert found.defect is Defect.IMAGE_UNREADABLE
    assert str(tmp_path / "bomb.gif") in found.value


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_decoder_that_dies_is_survived(folder: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a segmentation fault, for want of memory, or by its own exit; other images are not lost."""
    data = load(
        folder, *((name, WIDTH, HEIGHT) for name in ["good.jpg"] * 2 + ["cut.jpg", "text.png", "empty.jpg"] * 2)
    )

    def decode(data: CocoAnnotations, index: int) -> Decoded:
        faulthandler.disable()  # of pytest, which would tell
        match data.path(index).name:
            case "cut.jpg":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "text.png":
                os.kill(os.getpid(), signal.SIGKILL)
            case "empty.jpg":
                os._exit(3)
        return Decoded(None)

    monkeypatch.setattr(decoding, "_decode", decode)
    found = dict(decode_all(data, num_workers=num_workers, name="test"))
    assert [found[i].defect for i in range(8)] == [None] * 2 + [Defect.IMAGE_KILLS_DECODER] * 6
    causes = ["cut.jpg: SIGSEGV", "text.png: SIGKILL, perhaps for want of memory", "empty.jpg: exit code 3"]
    assert [found[i].value for i in range(2, 8)] == [f"{folder}/{cause}" for cause in causes * 2]


def test_workers_end_with_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the work is given up."""
    started = []
    start = decoding._start
    monkeypatch.setattr(decoding, "_start", lambda data: started.append(start(data)) or started[-1])
    data = load(folder, *[("good.jpg", WIDTH, HEIGHT)] * 9)
    assert len(dict(decode_all(data, num_workers=3, name="test"))) == 9
    stream = decode_all(data, num_workers=2, name="test")
    next(stream)
    stream.close()
    assert len(started) == 5
    for process, _ in started:
        process.join(10)
        assert not process.is_alive()


def test_no_images_no_workers(folder: Path) -> None:
    data = load(folder, ("missing.jpg", WIDTH, HEIGHT))
    assert list(decode_all(data, num_workers=4, name="test")) == []
