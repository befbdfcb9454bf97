"""Sizes from headers are those that decoding gives; names are found however labels spell them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fpn_det.data.formats.image_folder import ImageFolder, read_sizes
from fpn_det.data.transforms import load_image
from fpn_det.structures import InputError


def test_sizes_are_those_of_decoded_images(test_data: Path) -> None:
    compared = 0
    for path in sorted((test_data / "images").iterdir()):
        try:
            decoded = tuple(load_image(path).shape[1:])
        except InputError:
            continue
        assert read_sizes(path)[0] == decoded, path
        compared += 1
    assert compared >= 15


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    upright, stored = read_sizes(path)
    assert upright == tuple(load_image(path).shape[1:])
    assert upright == ((30, 20) if orientation >= 5 else (20, 30))
    load_image(path, stored)  # so the size as stored is one that annotations may state


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty"])
def test_no_image(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text("" if kind == "empty" else "no image")
    with pytest.raises(InputError, match=r"a\.jpg: "):
        read_sizes(path)


def test_names(tmp_path: Path) -> None:
    for name in ("a.jpg", "sub/a.jpg", "sub/b.JPG", "c.png", "c.jpg", "sub/deep/d.png", "e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder = ImageFolder(tmp_path)
    assert folder.names == {"a.jpg", "sub/a.jpg", "sub/b.JPG", "c.png", "c.jpg", "sub/deep/d.png"}
    for stated, found in {
        "a.jpg": ["a.jpg"],  # not the other of that name
        "sub/a.jpg": ["sub/a.jpg"],
        "sub\\a.jpg": ["sub/a.jpg"],
        "./sub/a.jpg": ["sub/a.jpg"],
        "/home/me/data/b.JPG": ["sub/b.JPG"],
        "..\\images\\d.png": ["sub/deep/d.png"],
        "/elsewhere/a.jpg": ["a.jpg", "sub/a.jpg"],
        "b": ["sub/b.JPG"],
        "c": ["c.jpg", "c.png"],
        "b.png": [],
        "e.txt": [],
        "": [],
    }.items():
        assert folder.named(stated) == found, stated
    assert folder.of_stem("c") == ["c.jpg", "c.png"]
    assert folder.of_stem("deep/d") == []
