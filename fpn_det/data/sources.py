"""What to detect in, as a user names it: images, folders of images, patterns, videos, cameras."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from fpn_det.data.transforms import IMAGE_SUFFIXES, find_images
from fpn_det.data.video import VIDEO_SUFFIXES
from fpn_det.structures import InputError

MAX_CAMERAS = 100
"""Numbers below are cameras, unless a file has that name."""


class Source(NamedTuple):
    """One image, video or camera.

    Attributes:
        path: the file, or the index of a camera.
        name: unique among those found: relative to the folder or pattern that it came from, or, where that is not
            unique, to the folder that all have in common.
    """

    path: Path | int
    name: str

    @property
    def is_image(self) -> bool:
        """Whether it is read as an image."""
        return isinstance(self.path, Path) and self.path.suffix.lower() not in VIDEO_SUFFIXES

    @property
    def is_camera(self) -> bool:
        """Whether it is a camera."""
        return isinstance(self.path, int)


def find_sources(inputs: Sequence[str], *, recursive: bool = False) -> list[Source]:
    """The images, videos and cameras that `inputs` name, in this order, each once; within a folder or pattern by name.

    Args:
        inputs: image or video files; folders, of which the images count; patterns with `*`, `?` or `[...]`, where `**`
            is any depth of folders; indices of cameras.
        recursive: whether the images in folders of the folders count, too.

    Raises:
        InputError: one of them is an address, or names nothing.
    """
    found: dict[Path | int, str] = {}
    for given in inputs:
        for path, name in _find(given, recursive=recursive):
            found.setdefault(path, name)
    if max(Counter(found.values()).values(), default=0) > 1:
        files = {path: Path(os.path.realpath(path.parent)) / path.name for path in found if isinstance(path, Path)}
        common = os.path.commonpath([file.parent for file in files.values()])
        found |= {path: file.relative_to(common).as_posix() for path, file in files.items()}
    return [Source(path, name) for path, name in found.items()]


def _find(given: str, *, recursive: bool) -> list[tuple[Path | int, str]]:
    """Paths and names of one input."""
    path = Path(given)
    if path.is_file():
        return [(path, path.name)]
    if path.is_dir():
        return [(p, p.relative_to(path).as_posix()) for p in find_images(path, recursive=recursive)]
    if "://" in given:
        raise InputError(f"{given}: addresses are not read; download the file and give its path")
    if given.isdecimal() and int(given) < MAX_CAMERAS:
        return [(int(given), f"camera{int(given)}")]
    if glob.has_magic(given):
        suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
        paths = sorted(p for p in map(Path, glob.glob(given, recursive=True)) if p.suffix.lower() in suffixes)
        paths = [p for p in paths if p.is_file()]
        if not paths:
            raise InputError(f"{given}: no image or video matches (looked for {', '.join(sorted(suffixes))})")
        root = Path(*takewhile(lambda part: not glob.has_magic(part), Path(given).parent.parts))
        return [(p, p.relative_to(root).as_posix()) for p in paths]
    raise InputError(f"{given}: no such image or folder, nor a video or camera")
