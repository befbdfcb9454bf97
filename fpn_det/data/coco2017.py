"""COCO 2017 from its official server: three archives, downloaded, verified, unpacked, and deleted again.

COCO publishes no checksums. Those below, and the lengths, are the same in TensorFlow Datasets and in other projects
that fetched the archives between 2019 and 2026.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fpn_det.data.archive import unpack
from fpn_det.download import download
from fpn_det.structures import InputError

SERVER = "https://s3.amazonaws.com/images.cocodataset.org"
"""The bucket behind http://images.cocodataset.org, whose HTTPS certificate is not of that name but of amazonaws.com."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One of the archives.

    Attributes:
        path: its place on the server.
        num_bytes: its length.
        sha256: its checksum.
        pattern: names of the files to unpack, relative to the folder of the data set.
        num_files: how many these are.
        max_bytes: how much they are together, rounded up.
    """

    path: str
    num_bytes: int
    sha256: str
    pattern: str
    num_files: int
    max_bytes: int

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.rpartition("/")[2]

    def num_files_in(self, folder: Path) -> int:
        """How many of its files are in `folder`; one listing, which for 118,287 images takes a fraction of a second."""
        parent, _, pattern = self.pattern.rpartition("/")
        try:
            return sum(fnmatchcase(name, pattern) for name in os.listdir(folder / parent))
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise InputError(f"{folder / parent}: cannot be read as a folder ({error.strerror})") from error

    def is_complete_in(self, folder: Path) -> bool:
        """Whether all its files are in `folder`: they appear there when they are whole."""
        return self.num_files_in(folder) >= self.num_files


ARCHIVES = {
    "val": Archive(
        path="zips/val2017.zip",
        num_bytes=815_585_330,
        sha256="4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        pattern="val2017/*.jpg",
        num_files=5_000,
        max_bytes=900_000_000,
    ),
    "train": Archive(
        path="zips/train2017.zip",
        num_bytes=19_336_861_798,
        sha256="69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        pattern="train2017/*.jpg",
        num_files=118_287,
        max_bytes=20_000_000_000,
    ),
    "annotations": Archive(
        path="annotations/annotations_trainval2017.zip",
        num_bytes=252_907_541,
        sha256="113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        pattern="annotations/instances_*2017.json",  # not its captions and keypoints, half a gigabyte
        num_files=2,
        max_bytes=500_000_000,
    ),
}


def get_archive(archive: Archive, folder: Path, *, server: str = SERVER, keep_zip: bool = False) -> None:
    """Download an archive to `folder`, unpack it there, and delete it; each goes on where an earlier call was cut.

    Args:
        archive: which.
        folder: of the data set.
        server: address (https) that the archive's `path` is relative to.
        keep_zip: do not delete it.

    Raises:
        InputError: it cannot be downloaded, has another checksum, or there is no room.
    """
    zip_path = folder / archive.name
    download(f"{server.rstrip('/')}/{archive.path}", zip_path, sha256=archive.sha256)
    unpack(zip_path, folder, pattern=archive.pattern, max_bytes=archive.max_bytes)
    num_files = archive.num_files_in(folder)
    if num_files < archive.num_files:
        raise InputError(
            f"{zip_path}: has {num_files:,} files {archive.pattern}, not the {archive.num_files:,} of COCO"
        )
    if not keep_zip:
        zip_path.unlink(missing_ok=True)


def check_room(archives: Sequence[Archive], folder: Path, *, keep_zips: bool = False) -> None:
    """Refuse to begin what the disk has no room for: all that is unpacked, and the archives while they are.

    Args:
        archives: what is to be fetched, in this order.
        folder: of the data set; need not exist.
        keep_zips: whether the archives stay.

    Raises:
        InputError: saying how much is needed, and how much is free.
    """
    stays = peak = 0
    for archive in archives:
        part = folder / archive.name
        arrived = max((p.stat().st_size for p in (part, part.with_name(f"{part.name}.part")) if p.exists()), default=0)
        content = archive.max_bytes * (archive.num_files - archive.num_files_in(folder)) // archive.num_files
        to_come = archive.num_bytes - arrived
        peak = max(peak, stays + to_come + content)
        stays += content + (to_come if keep_zips else -arrived)
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if peak > free:
        raise InputError(
            f"{folder}: {peak / 1e9:.1f} GB are needed here (the archives, until they are unpacked, and what is in "
            f"them), and there is room for {free / 1e9:.1f} GB. Free some space, or choose another disk with --output"
        )
