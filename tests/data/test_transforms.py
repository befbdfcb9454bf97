"""Decoding against Pillow, resizing and mirroring against first principles."""

from __future__ import annotations

import ast
import io
import os
import random
import re
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
import torch
from hostile_images import throw
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fpn_det.data import transforms
from fpn_det.data.transforms import (
    ResizeKind,
    TestTransform,
    TrainTransform,
    flip_horizontally,
    flip_vertically,
    load_image,
    resize_to,
    resized_size,
)
from fpn_det.structures import InputError, Sample

JPEG_LEVELS = 3
"""Decoders of JPEG may differ by rounding."""

KINDS: tuple[ResizeKind, ...] = get_args(ResizeKind)


def picture(width: int = 80, height: int = 60) -> Image.Image:
    """Smooth colours without any symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / width, 255 * y / height, 127 + 120 * np.sin(x / 9 + y / 5)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(image: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


def load_bytes(folder: Path, data: bytes, size: tuple[int, int] | None = None) -> Tensor:
    path = folder / "image"
    path.write_bytes(data)
    return load_image(path, size)


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def difference(one: Tensor, other: Tensor) -> int:
    assert one.dtype == other.dtype == torch.uint8
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


# Every awkward file has a stated outcome: the table of docs/images.md.

TABLE = re.findall(
    r"^\| `(?P<name>[^`]+)` \|[^|]+\| (?:(?P<width>\d+)x(?P<height>\d+)|refused: `(?P<refused>[^`]+)`) \|[^|]*\|$",
    (Path(__file__).parents[2] / "docs/images.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
OUTCOMES: dict[str, tuple[int, int] | str] = {
    name: refused or (int(height), int(width)) for name, width, height, refused in TABLE
}
"""Height and width, or what the error says."""


@pytest.mark.parametrize("name", sorted(OUTCOMES))
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_every_awkward_file_has_a_stated_outcome(test_data: Path, name: str) -> None:
    path, outcome = test_data / "images" / name, OUTCOMES[name]
    if isinstance(outcome, str):
        with pytest.raises(InputError) as caught:
            load_image(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: cannot decode the image (")
        assert outcome in message
        assert "\n" not in message
        return
    got = load_image(path)
    assert got.shape == (3, *outcome)
    assert got.dtype == torch.uint8
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file)
        if upright.mode == "I;16":
            upper = torch.from_numpy(np.array(upright).astype(np.int64) >> 8).to(torch.uint8)
            assert torch.equal(got, upper.expand(3, -1, -1))
        else:
            assert difference(got, pixels(upright)) <= (JPEG_LEVELS if name.endswith("jpg") else 0)


def test_the_table_of_outcomes_is_complete(test_data: Path) -> None:
    assert {p.name for p in (test_data / "images").iterdir()} == set(OUTCOMES)


def test_awkward_files_show_what_a_person_sees(test_data: Path) -> None:
    """Not by Pillow's word: one portrait in five files, and pictures of one colour or two."""

    def load(name: str) -> Tensor:
        return load_image(test_data / "images" / name).float()

    portrait = load("hopper_orientation_3.jpg")
    for name in ("hopper_orientation_6.jpg", "hopper_orientation_8.jpg", "hopper.Lab.tif"):
        assert (load(name) - portrait).abs().mean() < 8, name
        assert (load(name) - portrait.flip(1)).abs().mean() > 30, name
    gray = torch.einsum("chw,c->hw", portrait, torch.tensor([0.299, 0.587, 0.114]))
    assert (load("hopper_gray.jpg") - gray).abs().mean() < 5
    assert load("broken_exif_dpi.jpg").mean((1, 2)).tolist() == pytest.approx([0, 128, 1])
    assert load("mode_16bit.png").mean((1, 2)).tolist() == [255, 0, 0]
    assert load("tRNS_null_1x1.png").flatten().tolist() == [255, 77, 0]
    red, green, blue = load("pil_sample_cmyk.jpg")
    assert red.max() > 200
    assert torch.stack([green, blue]).max() < 80
    assert torch.equal(load("iss634.gif"), load("iss634.webp"))


def test_photographs_equal_pillow(test_data: Path) -> None:
    for path in sorted((test_data / "bccd/images").glob("*.jpg"))[:5]:
        with Image.open(path) as file:
            assert difference(load_image(path, size=(480, 640)), pixels(file)) <= JPEG_LEVELS


# Formats


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_png_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = picture().convert(mode)
    assert torch.equal(load_bytes(tmp_path, encode(image, "PNG")), pixels(image))


@pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_jpeg_modes_become_rgb(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    data = encode(picture().convert(mode), "JPEG", **options)
    got = load_bytes(tmp_path, data)
    assert difference(got, pixels(Image.open(io.BytesIO(data)))) <= JPEG_LEVELS
    original = pixels(picture().convert(mode)).float()
    assert (got - original).abs().mean() < 8, "inverted or with swapped channels"


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    image = picture()
    opaque = pixels(image)
    image.putalpha(0)
    assert torch.equal(load_bytes(tmp_path, encode(image, "PNG")), opaque)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_16_bits_the_upper_byte_is_kept(tmp_path: Path, kind: str) -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    got = load_bytes(tmp_path, encode(Image.fromarray(values), kind))
    assert torch.equal(got, torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, -1, -1))


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="convert the file to 8 bits"):
        load_bytes(tmp_path, encode(Image.new("F", (4, 4)), "TIFF"))


def test_common_jpegs_take_the_fast_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that a phone rotates; only four components need Pillow."""

    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded with Pillow")

    monkeypatch.setattr(transforms, "_decode_with_pillow", unexpected)
    for image in (picture(), picture().convert("L")):
        for options in ({}, {"progressive": True}):
            load_bytes(tmp_path, encode(image, "JPEG", **options))
    load_bytes(tmp_path, with_orientation(picture(), 6))
    with pytest.raises(AssertionError, match="Pillow"):
        load_bytes(tmp_path, encode(picture().convert("CMYK"), "JPEG"))


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path: Path, orientation: int) -> None:
    data = with_orientation(picture(80, 60), orientation)
    upright = pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert upright.shape == ((3, 60, 80) if orientation < 5 else (3, 80, 60))
    assert difference(load_bytes(tmp_path, data), upright) <= JPEG_LEVELS
    assert difference(load_bytes(tmp_path, data, tuple(upright.shape[1:])), upright) <= JPEG_LEVELS
    lossless = load_bytes(tmp_path, with_orientation(picture(80, 60), orientation, "PNG"))
    assert torch.equal(lossless, pixels(ImageOps.exif_transpose(Image.open(tmp_path / "image"))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_annotations_of_the_stored_pixels_get_the_stored_pixels(tmp_path: Path, orientation: int, kind: str) -> None:
    data = with_orientation(picture(80, 60), orientation, kind)
    stored = pixels(Image.open(io.BytesIO(data)))
    assert difference(load_bytes(tmp_path, data, (60, 80)), stored) <= JPEG_LEVELS
    with pytest.raises(InputError, match=r"the image is 60x80 .*, but the annotations say 61x80"):
        load_bytes(tmp_path, data, (80, 61))


def test_a_size_that_contradicts_the_annotations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the image is 80x60 \(width x height\), but the annotations say 60x80"):
        load_bytes(tmp_path, encode(picture(80, 60), "JPEG"), (80, 60))


# Broken files


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 2, 3, 20, 0.3, 0.5, 0.9, -100, -3, -2, -1])
def test_a_truncated_jpeg_is_refused(tmp_path: Path, keep: float, progressive: bool) -> None:
    """Not returned with a gray rest, however little is missing; of -2, the end marker alone."""
    data = encode(picture(200, 150), "JPEG", progressive=progressive)
    cut = data[: int(keep * len(data)) if isinstance(keep, float) else keep]
    with pytest.raises(InputError, match="cannot decode the image"):
        load_bytes(tmp_path, cut)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("GIF", {}), ("WEBP", {}), ("TIFF", {}), ("BMP", {})])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_other_truncated_files_are_refused(tmp_path: Path, kind: str, options: dict[str, Any], share: float) -> None:
    data = encode(picture(), kind, **options)
    with pytest.raises(InputError, match="cannot decode the image"):
        load_bytes(tmp_path, data[: int(share * len(data))])


@pytest.mark.parametrize("rest", [b"\0" * 64, b"junk" * 999, b"\xff\xd8\xff"])
def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path: Path, rest: bytes) -> None:
    """Phones append depth maps and films."""
    data = encode(picture(), "JPEG")
    assert torch.equal(load_bytes(tmp_path, data + rest), load_bytes(tmp_path, data))


def test_fill_bytes_before_a_marker_are_allowed(tmp_path: Path) -> None:
    for mode in ("RGB", "CMYK"):
        data = encode(picture().convert(mode), "JPEG")
        padded = load_bytes(tmp_path, data[:2] + b"\xff\xff" + data[2:])
        assert torch.equal(padded, load_bytes(tmp_path, data))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_bomb_is_refused_by_its_header(tmp_path: Path, progressive: bool) -> None:
    """torchvision would allocate the 12 GB that the header claims."""
    data = bytearray(encode(picture(), "JPEG", progressive=progressive))
    frame = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[frame + 5 : frame + 9] = (65000).to_bytes(2, "big") * 2
    assert throw(lambda _: bytes(data), range(1), max_megabytes=100, max_seconds=30).failures == []
    with pytest.raises(InputError, match=r"more than the limit of 89,478,485 pixels.*cut it into tiles"):
        load_bytes(tmp_path, bytes(data))


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, chunk(b"IEND", b"")])


def tiff(**tags: int) -> bytes:
    """An image of 100x100 zeros, one byte per pixel, compressed by LZW, but for `tags`."""
    numbers = {"w": 256, "h": 257, "bits": 258, "compression": 259, "kind": 262, "offset": 273, "rows": 278}
    numbers |= {"size": 279, "tile_w": 322, "tile_h": 323, "tile_offset": 324, "tile_size": 325}
    values = {"w": 100, "h": 100, "bits": 8, "compression": 5, "kind": 1, "offset": 200, "rows": 100, "size": 10_000}
    entries = sorted((numbers[name], value) for name, value in (values | tags).items())
    packed = [struct.pack("<HHII", number, 4, 1, value) for number, value in entries]
    return b"II*\0" + struct.pack("<IH", 8, len(packed)) + b"".join(packed) + bytes(10_200)


def webp_canvas(width: int, height: int) -> bytes:
    """An animation of one small frame on a large canvas."""
    frame = bytes(6) + struct.pack("<I", 15)[:3] * 2 + bytes(4) + encode(Image.new("RGB", (16, 16)), "WEBP")[12:]
    parts = [
        (b"VP8X", struct.pack("<I", 2) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]),
        (b"ANIM", bytes(6)),
        (b"ANMF", frame),
    ]
    body = b"WEBP" + b"".join(name + struct.pack("<I", len(data)) + data for name, data in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(width: int, height: int) -> bytes:
    """A frame of this size on a screen of 10x10."""
    return b"GIF89a" + struct.pack("<HH", 10, 10) + b"\0\0\0," + struct.pack("<HHHH", 0, 0, width, height) + b"\0\2\0;"


TEXT = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(300_000_000), 9))

BOMBS = {
    "png": png(60_000, 60_000),
    "png, text": png(10, 10, TEXT),
    "png, profile": png(10, 10, chunk(b"iCCP", TEXT[8:-4])),
    "png, length of a chunk": png(10, 10)[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt",
    "gif": gif(65_535, 65_535),
    "tiff": tiff(w=2**31 - 1, h=2**31 - 1),
    "tiff, tile": tiff(tile_w=65_536, tile_h=16_000, tile_offset=200, tile_size=5000),
    "tiff, rows": tiff(rows=2**32 - 1, size=2**32 - 1),
    "webp": webp_canvas(16_383, 16_383),
    "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6),
}


def test_bombs_cost_neither_memory_nor_time() -> None:
    """Each takes 100 MB at most, in a process of its own; most would take gigabytes."""
    bombs = list(BOMBS.values())
    report = throw(lambda number: bombs[number], range(len(bombs)), max_megabytes=100, max_seconds=30)
    assert report.failures == []
    assert report.outcomes == {"refused": len(bombs)}


def test_what_bombs_are_made_of_can_be_read(tmp_path: Path) -> None:
    """But for their size they are files like others."""
    black = chunk(b"IDAT", zlib.compress(bytes(310)))
    assert load_bytes(tmp_path, png(10, 10, black)).shape == (3, 10, 10)
    assert load_bytes(tmp_path, webp_canvas(300, 200)).shape == (3, 200, 300)
    assert load_bytes(tmp_path, tiff(compression=1)).shape == (3, 100, 100)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_of_scans_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    data = encode(picture(80, 60).convert(mode), "JPEG", progressive=True)
    scans = data.count(b"\xff\xda")
    assert scans > 5
    monkeypatch.setattr(transforms, "MAX_SCANNED_PIXELS", scans * 80 * 60)
    assert load_bytes(tmp_path, data).shape == (3, 60, 80)
    monkeypatch.setattr(transforms, "MAX_SCANNED_PIXELS", scans * 80 * 60 - 1)
    with pytest.raises(InputError, match=f"{scans} scans of 80x60 pixels take too long"):
        load_bytes(tmp_path, data)


def test_pixels_between_pillows_warning_and_its_error_are_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    for kind in ("PNG", "JPEG"):
        assert load_bytes(tmp_path, encode(picture(80, 50), kind)).shape == (3, 50, 80)
        with pytest.raises(InputError, match="more than the limit of 4,000 pixels"):
            load_bytes(tmp_path, encode(picture(80, 51), kind))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Nor opened: a pipe without a writer would wait for one."""
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(transforms.MAX_FILE_BYTES + 1)
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    expected = {
        tmp_path / "missing.jpg": "No such file",
        tmp_path / "loop.jpg": "symbolic links",
        tmp_path: "not a regular file",
        tmp_path / "pipe.jpg": "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path / "large.jpg": "536,870,913 bytes, more than the limit of 536,870,912",
    }
    for path, reason in expected.items():
        with pytest.raises(InputError, match=rf"^{path}: cannot read the image \(.*{reason}.*\); .* leave it out$"):
            load_image(path)


def test_a_file_that_grows_is_read_as_far_as_it_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc and network file systems have files of size 0 that never end; here the size is what a stat says."""
    path = tmp_path / "image.png"
    path.write_bytes(encode(picture(), "PNG") + bytes(100))
    size, sizes = path.stat().st_size, []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            sizes.append(size)
            return super().read(size)

    monkeypatch.setattr(Path, "open", lambda self, mode: Counted(b"x" * 10_000_000))
    with pytest.raises(InputError, match="cannot decode"):
        load_image(path)
    assert sizes == [size]


def test_only_image_formats_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the name of the file: Pillow would run Ghostscript on this one."""
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *arguments, **_: started.append(arguments))
    with pytest.raises(InputError, match="none of BMP, GIF"):
        load_bytes(tmp_path, encode(picture(), "EPS"))
    assert started == []


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    """As in viewers, and in torchvision's decoder of JPEGs."""
    good = with_orientation(picture(80, 60), 6, "PNG")
    assert load_bytes(tmp_path, good).shape == (3, 80, 60)
    start = good.index(b"eXIf")
    length = int.from_bytes(good[start - 4 : start])
    bad = good[: start - 4] + chunk(b"eXIf", b"JUNK" + bytes(length)) + good[start + 8 + length :]
    assert torch.equal(load_bytes(tmp_path, bad), pixels(picture(80, 60)))


def test_pillows_advice_is_not_passed_on(tmp_path: Path) -> None:
    """Nobody can act on it, at every step of a run and from every worker."""
    image = picture().convert("P")
    data = encode(image, "PNG", transparency=bytes(range(256)))
    with pytest.warns(UserWarning, match="Transparency"):
        Image.open(io.BytesIO(data)).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load_bytes(tmp_path, data), pixels(image))


def test_integers_beyond_16_bits_are_refused(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 65535]], np.int32)
    got = load_bytes(tmp_path, encode(Image.fromarray(values), "TIFF"))
    assert got[0].tolist() == [[0, 0, 1, 255]]
    for value in (-1, 65536):
        values[0, 0] = value
        with pytest.raises(InputError, match="more than 16 bits have no defined white"):
            load_bytes(tmp_path, encode(Image.fromarray(values), "TIFF"))


def test_large_images_of_pillow_take_a_bounded_multiple_of_their_pixels() -> None:
    """16 bytes per pixel, where 4 and the 3 of the result are the least; 25 were taken once."""
    images = [Image.new(mode, (3000, 3000)) for mode in ("RGB", "P", "RGBA", "I;16")]
    files = [encode(image, "PNG", compress_level=1) for image in images]
    report = throw(lambda number: files[number], range(len(files)), max_megabytes=16 * 9)
    assert report.failures == []
    assert report.outcomes == {"decoded": len(files)}


def test_the_decoder_that_crashes_is_never_used() -> None:
    """torchvision's decode_image and decode_png die of a segmentation fault on a broken PNG."""
    package = Path(transforms.__file__).parent.parent
    taken: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "torchvision.io":
                taken |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = {alias.name for alias in node.names}
                assert not any(name.startswith("torchvision.io") for name in names), path
                assert not (isinstance(node, ast.ImportFrom) and node.module == "torchvision" and "io" in names), path
    assert taken == {"ImageReadMode", "decode_jpeg"}


# Geometry


@pytest.mark.parametrize(
    ("size", "short_side", "long_side", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),  # torchvision rounds down to 1066
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((100, 1000), 800, 1333, (133, 1333)),
        ((1000, 100), 800, 1333, (1333, 133)),
        ((800, 1333), 800, 1333, (800, 1333)),
        ((3, 4), 2, 100, (2, 3)),  # 2.67
        ((4, 5), 2, 100, (2, 3)),  # 2.5 rounds up
        ((1, 10_000), 800, 1333, (1, 1333)),
        ((1, 1), 800, 1333, (800, 800)),
    ],
)
def test_resized_size(size: tuple[int, int], short_side: int, long_side: int, expected: tuple[int, int]) -> None:
    assert resized_size(size, short_side=short_side, long_side=long_side) == expected
    assert resized_size(size, short_side=short_side, long_side=long_side, resize="opencv") == expected


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [
        ("float", (480, 640), (800, 1066)),  # 1066.67
        ("float", (427, 640), (800, 1199)),  # 1199.06
        ("float", (1, 10_000), (1, 1333)),  # where torchvision fails
        ("pillow", (480, 640), (800, 1067)),
        ("pillow", (39, 78), (666, 1333)),  # 666.5 but for rounding: 800/39 and then 1333/1600, not 1333/78
        ("antialiased", (39, 78), (667, 1333)),
        ("opencv", (39, 78), (667, 1333)),
        ("pillow", (1, 10_000), (1, 1333)),
    ],
)
def test_resized_size_by_kind(resize: ResizeKind, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(size, short_side=800, long_side=1333, resize=resize) == expected
    assert resized_size(size[::-1], short_side=800, long_side=1333, resize=resize) == expected[::-1]


def test_float_sizes_and_boxes_are_torchvisions() -> None:
    """The class itself decides, on one channel for speed; boxes but for the order of two roundings."""
    oracle = GeneralizedRCNNTransform(min_size=80, max_size=133, image_mean=[0], image_std=[1]).eval()
    rng = random.Random(0)
    rounded_otherwise = 0
    for _ in range(600):
        h, w = rng.randint(20, 400), rng.randint(20, 400)
        box = torch.tensor([[0.1 * w, 0.2 * h, 0.7 * w, 0.9 * h]])
        image, target = oracle.resize(torch.zeros(1, h, w), {"boxes": box})
        size = resized_size((h, w), short_side=80, long_side=133, resize="float")
        assert size == tuple(image.shape[1:])
        rounded_otherwise += size != resized_size((h, w), short_side=80, long_side=133)
        before = Sample(
            image=torch.zeros(3, h, w, dtype=torch.uint8),
            boxes=box,
            labels=torch.zeros(1, dtype=torch.int64),
            image_id=0,
            original_size=(h, w),
        )
        after = resize_to(before, size, resize="float")
        torch.testing.assert_close(after.boxes, target["boxes"], rtol=2.4e-7, atol=0)
    assert rounded_otherwise > 200


def test_pillow_sizes_are_detectron2s() -> None:
    """`ResizeShortestEdge.get_output_shape`, in small enough numbers to try every size where two roundings matter."""

    def detectron2(h: int, w: int) -> tuple[int, int]:
        short_side, long_side = 80.0, 133.0
        scale = short_side / min(h, w)
        new = [scale * h, scale * w]
        new[0 if h < w else 1] = short_side
        if max(new) > long_side:
            scale = long_side / max(new)
            new = [scale * new[0], scale * new[1]]
        return int(new[0] + 0.5), int(new[1] + 0.5)

    sizes = [(h, w) for h in range(2, 200) for w in range(2, 200) if max(h, w) < 100 * min(h, w)]
    got = {size: resized_size(size, short_side=80, long_side=133, resize="pillow") for size in sizes}
    assert got == {size: detectron2(*size) for size in sizes}
    assert sum(got[size] != resized_size(size, short_side=80, long_side=133) for size in sizes) > 10


def sample(width: int = 80, height: int = 60, boxes: list[list[float]] | None = None) -> Sample:
    rows = [[0, 0, width, height], [10.5, 20, 30, 22.25]] if boxes is None else boxes
    return Sample(
        image=pixels(picture(width, height)),
        boxes=torch.tensor(rows, dtype=torch.float32).reshape(-1, 4),
        labels=torch.arange(len(rows)),
        image_id=5,
        original_size=(height, width),
    )


def same(one: Sample, other: Sample) -> bool:
    return (
        torch.equal(one.image, other.image)
        and torch.equal(one.boxes, other.boxes)
        and torch.equal(one.labels, other.labels)
        and (one.image_id, one.original_size) == (other.image_id, other.original_size)
    )


SIZES = [(30, 40), (120, 160), (33, 101), (61, 80), (7, 500), (1, 2), (60, 81)]
"""To these, (60, 80) is halved, doubled, shrunk one way and stretched the other, ..."""


def views() -> list[Sample]:
    """Smooth colours, and noise, which tells antialiasing and every rounding."""
    noise = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [sample(), Sample(**{**fields(sample()), "image": noise})]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("resize", "levels"), [("antialiased", 1), ("pillow", 0)])
def test_resize_agrees_with_pillow(resize: ResizeKind, levels: int, size: tuple[int, int]) -> None:
    """Pillow's bilinear filter is the antialiased one; without antialiasing the noise would tell."""
    for before in views():
        image = Image.fromarray(before.image.permute(1, 2, 0).numpy())
        after = resize_to(before, size, resize=resize)
        assert difference(after.image, pixels(image.resize(size[::-1], Image.Resampling.BILINEAR))) <= levels


@pytest.mark.parametrize("size", SIZES)
def test_resize_equals_opencv(size: tuple[int, int]) -> None:
    for before in views():
        expected = cv2.resize(before.image.permute(1, 2, 0).numpy(), size[::-1], interpolation=cv2.INTER_LINEAR)
        after = resize_to(before, size, resize="opencv")
        assert torch.equal(after.image, torch.from_numpy(expected).permute(2, 0, 1))


def test_resize_equals_opencv_at_random_sizes() -> None:
    """To 1600 pixels, where OpenCV's rounding of the positions to float32 shows, and down to images of one pixel."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        (h, w), size = rng.integers(1, 120, 2), (int(rng.integers(1, 160)), int(rng.integers(1, 1600)))
        image = rng.integers(0, 256, (int(h), int(w), 3), dtype=np.uint8)
        before = Sample(**{**fields(sample()), "image": torch.from_numpy(image).permute(2, 0, 1).contiguous()})
        after = resize_to(before, size, resize="opencv")
        assert np.array_equal(after.image.permute(1, 2, 0).numpy(), cv2.resize(image, size[::-1])), (h, w, size)


@pytest.mark.parametrize(("short_side", "long_side"), [(800, 1333), (47, 70), (30, 100)])
def test_float_equals_torchvision(short_side: int, long_side: int) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    oracle = GeneralizedRCNNTransform(min_size=short_side, max_size=long_side, image_mean=mean, image_std=std).eval()
    transform = TestTransform(short_side=short_side, long_side=long_side, resize="float")
    for before in views():
        images, _ = oracle([before.image / 255])
        h, w = images.image_sizes[0]
        normalized = images.tensors[0, :, :h, :w]
        expected = 255 * (normalized * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])
        after = transform(before, random.Random(0))
        assert after.image.dtype == torch.float32
        torch.testing.assert_close(after.image, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("resize", "antialias"), [("antialiased", True), ("float", False)])
def test_the_layout_in_memory_changes_no_pixel(resize: ResizeKind, antialias: bool, size: tuple[int, int]) -> None:
    """torch has code of its own for channels last; these are the pixels of the plain layout."""
    for before in views():
        plain = before.image.contiguous()
        pixels = plain.float() if resize == "float" else plain
        expected = interpolate(pixels[None], size=size, mode="bilinear", antialias=antialias)[0]
        last = replace(before, image=plain.permute(1, 2, 0).contiguous().permute(2, 0, 1))
        for view in (replace(before, image=plain), last):
            assert torch.equal(resize_to(view, size, resize=resize).image, expected)


@pytest.mark.parametrize("resize", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_boxes_are_scaled_along(resize: ResizeKind, size: tuple[int, int]) -> None:
    before, (h, w) = sample(), size
    after = resize_to(before, size, resize=resize)
    assert after.image.shape == (3, h, w)
    assert resize == "opencv" or after.image.permute(1, 2, 0).is_contiguous(), "channels last stays"
    expected_boxes = [[0, 0, w, h], [10.5 * w / 80, 20 * h / 60, 30 * w / 80, 22.25 * h / 60]]
    torch.testing.assert_close(after.boxes, torch.tensor(expected_boxes))
    assert torch.equal(after.labels, before.labels)
    assert (after.image_id, after.original_size) == (5, (60, 80))


def fields(s: Sample) -> dict[str, Any]:
    return {name: getattr(s, name) for name in ("image", "boxes", "labels", "image_id", "original_size")}


@pytest.mark.parametrize("resize", KINDS)
def test_resize_to_the_same_size_changes_nothing_but_the_type(resize: ResizeKind) -> None:
    after = resize_to(sample(), (60, 80), resize=resize)
    dtype = torch.float32 if resize == "float" else torch.uint8
    assert after.image.dtype == dtype
    assert same(after, Sample(**{**fields(sample()), "image": sample().image.to(dtype)}))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from(range(640, 801, 32)),
    st.sampled_from(get_args(ResizeKind)),
)
def test_boxes_stay_within_whatever_the_rounding(height: int, width: int, short_side: int, resize: ResizeKind) -> None:
    """Exactly, in float32; the picture itself is left out for speed."""
    size = resized_size((height, width), short_side=short_side, long_side=1333, resize=resize)
    before = Sample(
        image=torch.empty(0, height, width, dtype=torch.uint8),
        boxes=torch.tensor([[0, 0, width, height]], dtype=torch.float32),
        labels=torch.zeros(1, dtype=torch.int64),
        image_id=0,
        original_size=(height, width),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "interpolate", lambda image, size, **_: image.new_empty(1, 0, *size))
        after = resize_to(before, size)
    assert after.boxes.tolist() == [[0, 0, size[1], size[0]]]
    for flip in (flip_horizontally, flip_vertically):
        assert flip(after).boxes.tolist() == [[0, 0, size[1], size[0]]]


def test_flips_move_pixels_and_boxes_together() -> None:
    """A single white pixel stays in its box, and the box stays upright."""
    before = sample(boxes=[[11, 7, 12, 8], [2, 3, 40, 9]])
    before.image.zero_()[:, 7, 11] = 255
    horizontal, vertical = flip_horizontally(before), flip_vertically(before)
    assert horizontal.boxes.tolist() == [[68, 7, 69, 8], [40, 3, 78, 9]]
    assert horizontal.image.nonzero().tolist() == [[c, 7, 68] for c in range(3)]
    assert vertical.boxes.tolist() == [[11, 52, 12, 53], [2, 51, 40, 57]]
    assert vertical.image.nonzero().tolist() == [[c, 52, 11] for c in range(3)]
    for flipped in (horizontal, vertical):
        assert torch.equal(flipped.labels, before.labels)
        assert (flipped.image_id, flipped.original_size) == (5, (60, 80))


@pytest.mark.parametrize("flip", [flip_horizontally, flip_vertically])
def test_flips_are_involutions(flip: Any) -> None:
    for before in (sample(), sample(boxes=[]), resize_to(sample(), (60, 80), resize="float")):
        once = flip(before)
        assert once.image.dtype == before.image.dtype
        assert not torch.equal(once.image, before.image)
        assert same(flip(once), before)


def test_the_outcome_depends_on_the_seed_alone() -> None:
    transform = TrainTransform(short_sides=(30, 40, 50), long_side=64, horizontal_flip=0.5, vertical_flip=0.5)
    outcomes = []
    for seed in range(64):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        one = transform(sample(), random.Random(seed))
        torch.rand(7)
        random.random()
        np.random.rand(7)  # noqa: NPY002
        assert same(transform(sample(), random.Random(seed)), one)
        flipped = [bool(one.boxes[1, 0] > 0.3 * one.image.shape[2]), bool(one.boxes[1, 1] > 0.5 * one.image.shape[1])]
        outcomes.append((tuple(one.image.shape[1:]), *flipped))
    sizes = {(30, 40), (40, 53), (48, 64)}
    assert {size for size, _, _ in outcomes} == sizes, "the last one is bounded by its longer side"
    assert len(set(outcomes)) == 12, "three sizes, mirrored or not in two directions, all of them independent"


@pytest.mark.parametrize("vertical", [0.0, 1.0])
@pytest.mark.parametrize("horizontal", [0.0, 1.0])
def test_probabilities_of_zero_and_one_are_certain(horizontal: float, vertical: float) -> None:
    transform = TrainTransform(short_sides=(60,), long_side=80, horizontal_flip=horizontal, vertical_flip=vertical)
    expected = sample()
    expected = flip_horizontally(expected) if horizontal else expected
    expected = flip_vertically(expected) if vertical else expected
    assert all(same(transform(sample(), random.Random(seed)), expected) for seed in range(200))


def test_the_test_transform_only_resizes() -> None:
    transform = TestTransform(short_side=45, long_side=70)
    assert same(transform(sample(), random.Random(1)), resize_to(sample(), (45, 60)))
    wide = transform(sample(160, 40, boxes=[]), random.Random(2))
    assert wide.image.shape == (3, 18, 70)
    assert wide.boxes.shape == (0, 4)


def test_the_mirrored_view_is_mirrored_after_resizing() -> None:
    plain, mirrored = (TestTransform(short_side=50, long_side=90, horizontal_flip=f) for f in (False, True))
    for before in views():
        expected = flip_horizontally(plain(before, random.Random(1)))
        assert same(mirrored(before, random.Random(1)), expected)
        assert not torch.equal(expected.image, plain(before, random.Random(1)).image)


@pytest.mark.parametrize("resize", KINDS)
def test_the_transforms_resize_as_told(resize: ResizeKind) -> None:
    """Noise, so that no other kind gives these pixels; at 666.5, so that the roundings of the size differ too."""
    before = Sample(**{**fields(sample()), "image": torch.randint(0, 256, (3, 39, 78), dtype=torch.uint8)})
    size = resized_size((39, 78), short_side=800, long_side=1333, resize=resize)
    expected = resize_to(before, size, resize=resize)
    train = TrainTransform(short_sides=(800,), long_side=1333, horizontal_flip=0, resize=resize)
    test = TestTransform(short_side=800, long_side=1333, resize=resize)
    assert same(train(before, random.Random(0)), expected)
    assert same(test(before, random.Random(0)), expected)
    for other in set(KINDS) - {resize}:
        assert not torch.equal(resize_to(before, size, resize=other).image.float(), expected.image.float())
