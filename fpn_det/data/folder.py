"""Which image files of a data set are there, and inside the image folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fpn_det.data.problems import Defect
from fpn_det.structures import InputError

_ESCAPES = re.compile(r"^[/\\]|^[A-Za-z]:|(?:^|[/\\])\.\.(?:[/\\]|$)")
"""Absolute and upward paths of POSIX and Windows, so that a file is judged alike everywhere."""


def escapes(name: str) -> bool:
    """Whether a file name, as it is written, leaves the folder that it is relative to."""
    return _ESCAPES.search(name) is not None


def find_defects(folder: Path, names: Sequence[str], *, follow_links: bool) -> dict[int, Defect]:
    """The names without a usable file: place in `names` -> IMAGE_MISSING or IMAGE_LINK_ESCAPES.

    One listing per folder instead of one call per file, which on a file server takes minutes; only what a listing does
    not show as a regular file (links, missing files) is looked up.

    Args:
        folder: the image folder, which may be a link itself.
        names: file names relative to it, none of which `escapes`.
        follow_links: whether links, of files and of folders, may lead out of `folder`.

    Raises:
        InputError: the folder cannot be read.
    """
    root = os.path.realpath(folder)
    regular: set[str] = set()
    for parent in {"", *(name.rpartition("/")[0] for name in names)}:
        try:
            if parent and not follow_links and not _is_inside(root, folder / parent):
                continue
            with os.scandir(folder / parent) as entries:
                prefix = f"{parent}/" if parent else ""
                regular.update(prefix + e.name for e in entries if e.is_file(follow_symlinks=False))
        except ValueError:  # not the name of a folder; its images are missing
            continue
        except OSError as error:
            if parent:
                continue
            raise InputError(
                f"{folder}: cannot read the image folder ({error.strerror}). Paths are relative to the current "
                "folder; set data.train.images and data.val.images"
            ) from error
    found: dict[int, Defect] = {}
    for place, name in enumerate(names):
        if name in regular:
            continue
        if not os.path.isfile(folder / name):
            found[place] = Defect.IMAGE_MISSING
        elif not follow_links and not _is_inside(root, folder / name):
            found[place] = Defect.IMAGE_LINK_ESCAPES
    return found


def _is_inside(root: str, path: Path) -> bool:
    return os.path.realpath(path).startswith(os.path.join(root, ""))
