"""The images of a data set: found by the names that labels use, and their sizes without decoding them."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

from fpn_det.data.folder import escapes
from fpn_det.data.transforms import FORMATS, IMAGE_SUFFIXES
from fpn_det.structures import InputError

Size = tuple[int, int]
"""(h, w) in pixels."""

QUARTER_TURNS = frozenset({5, 6, 7, 8})
"""The EXIF orientations that exchange height and width."""


class ImageFolder:
    """The image files in a folder and the folders below it, links to folders not followed.

    Attributes:
        path: the folder.
        names: the files relative to it, with `/` between folders.
    """

    def __init__(self, path: Path) -> None:
        """List the folder.

        Raises:
            InputError: the folder cannot be read.
        """
        self.path = path
        self.names: set[str] = set()
        for parent, _, files in os.walk(path, onerror=_refuse):
            prefix = Path(parent).relative_to(path).as_posix()
            prefix = "" if prefix == "." else f"{prefix}/"
            self.names.update(prefix + name for name in files if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
        self._by_stem: dict[str, list[str]] = {}
        self._by_file: dict[str, list[str]] = {}
        for name in sorted(self.names):
            self._by_stem.setdefault(stem(name), []).append(name)
            file = name.rpartition("/")[2]
            for key in {file, stem(file)}:
                self._by_file.setdefault(key, []).append(name)

    def named(self, stated: str) -> list[str]:
        """The images that a name may mean: the file itself, else those of that file name in any folder.

        Args:
            stated: a path, relative to this folder or to another one, with `/` or `\\\\`; the suffix may be wanting.
        """
        name = stated.replace("\\", "/")
        if not escapes(name):
            name = os.path.normpath(name).replace(os.sep, "/")
            if name in self.names:
                return [name]
            if name in self._by_stem:
                return self._by_stem[name]
        return self._by_file.get(name.rpartition("/")[2], [])

    def of_stem(self, name: str) -> list[str]:
        """The images whose name without suffix is `name`, as label files are called after their image."""
        return self._by_stem.get(name, [])


def stem(name: str) -> str:
    """A name without its suffix: `a/b.jpg` -> `a/b`."""
    return os.path.splitext(name)[0]


def read_sizes(path: Path) -> tuple[Size, Size]:
    """The size of an image as `transforms.load_image` decodes it, from the header of the file alone.

    Args:
        path: the image file.

    Returns:
        (h, w) of the upright image, and (h, w) of the pixels as stored.

    Raises:
        InputError: the file cannot be opened, or is of no kind that is read here.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: not a regular file")
        with (
            path.open("rb") as file,
            warnings.catch_warnings(action="ignore"),
            Image.open(file, formats=FORMATS) as image,
        ):
            stored = image.height, image.width
            return (stored[::-1] if _orientation(image) in QUARTER_TURNS else stored), stored
    except InputError:
        raise
    except Exception as error:  # Pillow's parsers raise many types on broken files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged, or not an image"
        raise InputError(f"{path}: cannot read the size of the image ({reason})") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that still has to be applied; those that cannot be read turn nothing, as in viewers."""
    if isinstance(image, TiffImageFile):  # Pillow has turned it by itself
        return 1
    if image.format == "PNG" and "exif" not in image.info:  # getexif would decode the image to look behind it
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever Pillow meets in them
        return 1


def _refuse(error: OSError) -> None:
    raise InputError(
        f"{error.filename}: cannot read the folder ({error.strerror}). Paths are relative to the current folder"
    ) from error
