"""From an image file and its boxes to a training or test sample, by default all on uint8 tensors.

Images have the shape (3, H, W) and lie in memory as decoders write them, the three values of a pixel side by side
(channels last): torch resizes that layout 2.4 times as fast, to the same pixels.
Other ways of resizing are for weights that were trained on them: they reproduce the sizes and pixels of their source.
"""

from __future__ import annotations

import io
import math
import random
import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, assert_never

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from fpn_det.structures import InputError, Sample

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take a file for, whatever its name. It knows many more: for EPS it would start Ghostscript."""

MAX_FILE_BYTES = 512 * 2**20
"""Larger files are not read: twice the largest image that is decoded (`max_pixels`), as RGB without compression."""

MAX_SCANNED_PIXELS = 10**12
"""Of a JPEG, pixels times scans, about a minute's work. Nothing else bounds the time: 10 bytes are another scan."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""

ResizeKind = Literal["antialiased", "pillow", "float", "opencv"]
"""How images are resized: the rounding of the size, and the interpolation, always bilinear.

- `antialiased`: torch on uint8, antialiased; the nearest size.
- `pillow`: Pillow on uint8, antialiased; Detectron2's size (`ResizeShortestEdge`).
- `float`: torch on float32, not antialiased; the size rounded down, as torchvision's `GeneralizedRCNNTransform` does.
- `opencv`: OpenCV's fixed-point arithmetic on uint8, not antialiased; the nearest size (MMDetection, `mmcv.imrescale`).
"""


def load_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """Decode an image file to RGB, upright.

    All of this project reads images through this function alone: the checks, training, evaluation and prediction.
    What each kind of file becomes is in docs/images.md.

    Grayscale, CMYK, Lab, palette and 16-bit files are converted, alpha is dropped, of an animation the first frame
    counts. The EXIF orientation is honoured unless `size` says that the annotations were made on the pixels as stored.

    No more than `MAX_FILE_BYTES` are read, of regular files only, and no more than `max_pixels` are decoded.

    Args:
        path: the file.
        size: (h, w) that the annotations state, if any.

    Returns:
        (3, H, W) uint8, channels last in memory.

    Raises:
        InputError: the file cannot be read or decoded, or its size is not `size`.
    """
    data = _read(path)
    image = decode_image(data, path)
    if size is None or tuple(image.shape[1:]) == size:
        return image
    stored = decode_image(data, path, upright=False)
    if tuple(stored.shape[1:]) == size:
        return stored
    h, w = image.shape[1:]
    raise InputError(
        f"{path}: the image is {w}x{h} (width x height), but the annotations say {size[1]}x{size[0]}; "
        "correct the annotation file or replace the image"
    )


def decode_image(data: bytes, path: Path, *, upright: bool = True) -> Tensor:
    """Decode the content of an image file to RGB, as `load_image` does.

    Args:
        data: the content.
        path: where it comes from, for the message.
        upright: apply the EXIF orientation.

    Returns:
        (3, H, W) uint8, channels last in memory.

    Raises:
        InputError: it cannot be decoded.
    """
    if _is_plain_jpeg(data):
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        try:
            return decode_jpeg(raw, mode=ImageReadMode.RGB, apply_exif_orientation=upright)
        except RuntimeError:
            pass  # Pillow reads more dialects, and says more clearly what is wrong with the rest
    return _decode_with_pillow(path, data, upright=upright)


def from_pillow(image: Image.Image) -> Tensor:
    """An image that Pillow holds, as `load_image` gives it: RGB, upright.

    Args:
        image: of any mode; one that `Image.open` has not read yet is read.

    Returns:
        (3, H, W) uint8, channels last in memory.

    Raises:
        InputError: it cannot be read or converted.
    """
    try:
        return _to_tensor(_turn_upright(image))
    except Exception as error:  # as in `_decode_with_pillow`
        raise InputError(f"a Pillow image cannot be used ({type(error).__name__}: {error})") from error


def max_pixels() -> float:
    """Images of more pixels are refused: Pillow's limit, 89,478,485 unless the program has changed it."""
    return Image.MAX_IMAGE_PIXELS or math.inf


def find_images(source: Path, *, recursive: bool = False) -> list[Path]:
    """The image files at `source`: the file itself, or those in a folder, by name.

    Args:
        source: an image or a folder.
        recursive: whether those in folders of the folder count, too.

    Raises:
        InputError: there is no such path, or no image in the folder.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InputError(f"{source}: no such image or folder")
    entries = source.rglob("*") if recursive else source.iterdir()
    paths = sorted(p for p in entries if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        raise InputError(f"{source}: no image in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def resized_size(
    size: tuple[int, int], *, short_side: int, long_side: int, resize: ResizeKind = "antialiased"
) -> tuple[int, int]:
    """(h, w) such that the shorter side is `short_side`, or the longer one `long_side` if that is smaller.

    Args:
        size: (h, w) of the image in pixels.
        short_side: wanted length of the shorter side in pixels.
        long_side: upper bound of the longer side in pixels.
        resize: whose arithmetic to follow. The results differ by a pixel at most.
    """
    h, w = size
    scale = min(short_side / min(size), long_side / max(size))
    match resize:
        case "antialiased" | "opencv":
            new_h, new_w = h * scale + 0.5, w * scale + 0.5
        case "float":
            # In float64, as torchvision since 0.16; its earlier float32 often fell a pixel short: 480x640 -> 799x1066.
            new_h, new_w = h * scale, w * scale
        case "pillow":
            # Detectron2 multiplies twice where the longer side decides: halves may fall to the other side.
            scale = short_side / min(size)
            new_h, new_w = (short_side, scale * w) if h < w else (scale * h, short_side)
            if max(new_h, new_w) > long_side:
                scale = long_side / max(new_h, new_w)
                new_h, new_w = new_h * scale, new_w * scale
            new_h, new_w = new_h + 0.5, new_w + 0.5
        case _:
            assert_never(resize)
    return max(int(new_h), 1), max(int(new_w), 1)


def resize_to(sample: Sample, size: tuple[int, int], *, resize: ResizeKind = "antialiased") -> Sample:
    """The sample at `size` (h, w), boxes scaled along; its image is float32 in 0..255 under `float`, else uint8."""
    h, w = sample.image.shape[1:]
    image = sample.image.float() if resize == "float" else sample.image
    if (h, w) == size:
        return replace(sample, image=image)
    match resize:
        case "antialiased" | "float":
            image = interpolate(_channels_last(image), size=size, mode="bilinear", antialias=resize == "antialiased")[0]
        case "pillow":
            pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            image = _to_tensor(pixels.resize(size[::-1], Image.Resampling.BILINEAR))
        case "opencv":
            image = _resize_like_opencv(image, size)
        case _:
            assert_never(resize)
    old, new = (sample.boxes.new_tensor([x, y, x, y]) for y, x in ((h, w), size))
    # In this order a box that fills its image still does; w * (new / w) can exceed `new`.
    return _move(sample, image, lambda boxes: boxes * new / old)


def flip_horizontally(sample: Sample) -> Sample:
    """The sample mirrored left to right."""
    width = sample.image.shape[2]

    def mirror(boxes: Tensor) -> Tensor:
        x1, y1, x2, y2 = boxes.unbind(1)
        return torch.stack([width - x2, y1, width - x1, y2], 1)

    return _move(sample, sample.image.flip(2), mirror)


def flip_vertically(sample: Sample) -> Sample:
    """The sample mirrored top to bottom."""
    height = sample.image.shape[1]

    def mirror(boxes: Tensor) -> Tensor:
        x1, y1, x2, y2 = boxes.unbind(1)
        return torch.stack([x1, height - y2, x2, height - y1], 1)

    return _move(sample, sample.image.flip(1), mirror)


def _move(sample: Sample, image: Tensor, move: Callable[[Tensor], Tensor]) -> Sample:
    """The sample with another image, its boxes and fixed proposals moved along."""
    proposals = move(sample.proposals) if sample.proposals is not None else None
    return replace(sample, image=image, boxes=move(sample.boxes), proposals=proposals)


class TrainTransform:
    """Resize to a random one of `short_sides`, then flip by chance.

    Args:
        short_sides: choices of the shorter side in pixels.
        long_side: upper bound of the longer side in pixels.
        horizontal_flip: probability of mirroring left to right.
        vertical_flip: probability of mirroring top to bottom.
        resize: how to resize.
    """

    def __init__(
        self,
        *,
        short_sides: Sequence[int],
        long_side: int,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        resize: ResizeKind = "antialiased",
    ) -> None:
        self.short_sides = tuple(short_sides)
        self.long_side = long_side
        self.horizontal_flip = horizontal_flip
        self.vertical_flip = vertical_flip
        self.resize: ResizeKind = resize

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        """Transform a sample; the outcome depends on `rng` alone."""
        short_side = rng.choice(self.short_sides)
        sample = _resize(sample, short_side=short_side, long_side=self.long_side, resize=self.resize)
        if rng.random() < self.horizontal_flip:
            sample = flip_horizontally(sample)
        if rng.random() < self.vertical_flip:
            sample = flip_vertically(sample)
        return sample


class TestTransform:
    """Resize to one fixed shorter side.

    Args:
        short_side: the shorter side in pixels.
        long_side: upper bound of the longer side in pixels.
        resize: how to resize.
        horizontal_flip: whether to mirror left to right afterwards, for a second view of the same image.
    """

    __test__ = False  # not a pytest class

    def __init__(
        self,
        *,
        short_side: int,
        long_side: int,
        resize: ResizeKind = "antialiased",
        horizontal_flip: bool = False,
    ) -> None:
        self.short_side = short_side
        self.long_side = long_side
        self.resize: ResizeKind = resize
        self.horizontal_flip = horizontal_flip

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        """Transform a sample; `rng` is not used."""
        sample = _resize(sample, short_side=self.short_side, long_side=self.long_side, resize=self.resize)
        return flip_horizontally(sample) if self.horizontal_flip else sample


def _resize(sample: Sample, *, short_side: int, long_side: int, resize: ResizeKind) -> Sample:
    h, w = sample.image.shape[1:]
    size = resized_size((h, w), short_side=short_side, long_side=long_side, resize=resize)
    return resize_to(sample, size, resize=resize)


def _channels_last(image: Tensor) -> Tensor:
    """(3, H, W) -> (1, 3, H, W) in channels-last memory; copies if the image lies otherwise.

    Neither `image[None]` nor `contiguous(memory_format=...)` do: they leave a stride of the first dimension by which
    `interpolate` does not know the layout.
    """
    return image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)


def _resize_like_opencv(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, h, w) uint8 -> (3, *size) uint8, to the bit what `cv2.resize` with INTER_LINEAR does on a CPU.

    Source: OpenCV 4 and 5, modules/imgproc/src/resize.cpp, `hal::resize` and `VResizeLinear`, less the branches that
    change no result.
    """
    (left, right), columns = _opencv_weights(image.shape[2], size[1])
    (upper, lower), rows = _opencv_weights(image.shape[1], size[0])
    wide = image.index_select(2, left) * columns[0]
    wide += image.index_select(2, right) * columns[1]
    wide >>= 4
    above = wide.index_select(1, upper) * rows[0][:, None]
    below = wide.index_select(1, lower) * rows[1][:, None]
    above >>= 16  # each on its own, which loses up to half a level
    below >>= 16
    return ((above + below + 2) >> 2).to(torch.uint8)


def _opencv_weights(old: int, new: int) -> tuple[Tensor, Tensor]:
    """The two source pixels of each of `new` pixels, (2, new) int64, and their weights, (2, new) int32 of 2048.

    Beyond the first and the last of the `old` pixels, both are that pixel.
    """
    offset = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).float()
    first = offset.floor()
    fraction = offset - first  # of the rounded offset, as there
    positions = torch.stack([first, first + 1]).long().clamp(0, old - 1)
    return positions, (torch.stack([1 - fraction, fraction]) * 2048).round().int()


def _read(path: Path) -> bytes:
    """The content of a regular file. Opening a pipe would wait for a writer, and a device may never end."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: cannot read the image (not a regular file); replace it or leave it out")
        if status.st_size > MAX_FILE_BYTES:
            raise InputError(
                f"{path}: cannot read the image ({status.st_size:,} bytes, more than the limit of "
                f"{MAX_FILE_BYTES:,}); compress the file, cut it into tiles, or leave it out"
            )
        with path.open("rb") as file:
            return file.read(status.st_size)  # not to its end, which may move away
    except OSError as error:
        raise InputError(f"{path}: cannot read the image ({error.strerror}); put it there or leave it out") from error


def _decode_with_pillow(path: Path, data: bytes, *, upright: bool) -> Tensor:
    # From memory: Pillow maps some files, and a mapped file that is cut short meanwhile ends the process.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                _check_work(file, data)
                file.load()
                return _to_tensor(_turn_upright(file) if upright else file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path}: cannot decode the image (more than the limit of {max_pixels():,} pixels, or a decompression "
            "bomb); cut it into tiles, scale it down, or leave it out"
        ) from error
    except UnidentifiedImageError as error:  # its own text names the memory that the file was read to
        raise InputError(
            f"{path}: cannot decode the image (damaged, or none of {', '.join(FORMATS)}); replace the file or leave "
            "it out"
        ) from error
    except Exception as error:  # Pillow's decoders raise many types on broken files
        raise InputError(
            f"{path}: cannot decode the image ({type(error).__name__}: {error}); replace the file or leave it out"
        ) from error


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. EXIF data that cannot be read turn nothing, as in viewers."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever Pillow meets in them
        return image
    return image if turn is None else image.transpose(turn)


def _check_work(file: Image.Image, data: bytes) -> None:
    """Refuse what Pillow does not before it decodes: tiles larger than any image, and scans without end."""
    if isinstance(file, TiffImageFile):
        tags = file.tag_v2
        if tags.get(TILEWIDTH, 0) * tags.get(TILELENGTH, 0) > max_pixels():
            raise ValueError(f"tiles of {tags[TILEWIDTH]}x{tags[TILELENGTH]} pixels are beyond the limit of pixels")
    if isinstance(file, JpegImageFile) and _num_scans(data) * file.width * file.height > MAX_SCANNED_PIXELS:
        raise ValueError(f"{_num_scans(data):,} scans of {file.width}x{file.height} pixels take too long")


def _to_tensor(image: Image.Image) -> Tensor:
    """An image of any Pillow mode as (3, H, W) uint8 RGB, channels last in memory."""
    if image.mode != "RGB":
        image = _to_rgb(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB; 16-bit values keep their upper byte instead of being clipped."""
    if image.mode.startswith("I"):
        values = np.asarray(image)  # of 16 bits, though Pillow may keep them in 32
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integers of more than 16 bits have no defined white; convert the file to 8 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; convert the file to 8 bits")
    return image.convert("RGB")


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether the header says JPEG, 8 bits, grey or three colours, and not more work than `load_image` takes on.

    torchvision would allocate whatever size the header claims: 13 GB for a file of 1 kB.
    """
    position = 2
    while data.startswith(b"\xff\xd8") and position + 9 < len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            precision, components = data[position + 4], data[position + 9]
            height = int.from_bytes(data[position + 5 : position + 7])
            width = int.from_bytes(data[position + 7 : position + 9])
            is_common = marker <= 0xC2 and precision == 8 and components in (1, 3)  # baseline or progressive
            pixels = height * width
            return is_common and pixels <= max_pixels() and _num_scans(data) * pixels <= MAX_SCANNED_PIXELS
        position += 2 + length
    return False


def _num_scans(data: bytes) -> int:
    """At least the number of scans of a JPEG; what follows its end may look like some."""
    return data.count(b"\xff\xda")
