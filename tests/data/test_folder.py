"""Which image files are there: only those inside the folder, at one listing per folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from fpn_det.data.folder import escapes, find_defects
from fpn_det.data.problems import Defect
from fpn_det.structures import InputError

MISSING, ESCAPES = Defect.IMAGE_MISSING, Defect.IMAGE_LINK_ESCAPES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files, and links of each kind."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    outside = tmp_path / "images and more"  # the name starts with that of the folder
    outside.mkdir()
    for file in (folder / "a.jpg", folder / "sub/b.jpg", outside / "c.jpg"):
        file.touch()
    (folder / "in.jpg").symlink_to("sub/b.jpg")
    (folder / "out.jpg").symlink_to(outside / "c.jpg")
    (folder / "over.jpg").symlink_to("out.jpg")
    (folder / "device.jpg").symlink_to("/dev/null")
    (folder / "broken.jpg").symlink_to("nowhere")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "linked").symlink_to("sub")
    (folder / "away").symlink_to(outside)
    return folder


CASES = {
    "a.jpg": (None, None),
    "./a.jpg": (None, None),
    "sub//b.jpg": (None, None),
    "in.jpg": (None, None),
    "linked/b.jpg": (None, None),
    "out.jpg": (ESCAPES, None),
    "over.jpg": (ESCAPES, None),
    "away/c.jpg": (ESCAPES, None),
    "away/d.jpg": (MISSING, MISSING),
    "device.jpg": (MISSING, MISSING),
    "broken.jpg": (MISSING, MISSING),
    "loop.jpg": (MISSING, MISSING),
    "sub": (MISSING, MISSING),
    "a.jpg/x": (MISSING, MISSING),
}
"""Name -> what is wrong with it, and what is if links are followed."""


@pytest.mark.parametrize("follow_links", [False, True])
@pytest.mark.parametrize("name", ["images", "link to images"])
def test_links(folder: Path, follow_links: bool, name: str) -> None:
    """The folder itself may be one."""
    (folder.parent / "link to images").symlink_to(folder)
    expected = {i: case[follow_links] for i, case in enumerate(CASES.values()) if case[follow_links]}
    assert find_defects(folder.parent / name, list(CASES), follow_links=follow_links) == expected


def test_names_that_escape_are_told_without_looking() -> None:
    outward = ["/a", "\\a", "..", "../a", "a/..", "a/../b", "a\\..\\b", "..\\a", "C:a", "c:\\a", "z:/a", "\\\\host\\a"]
    inward = ["a", "a/b", "..a", "a..", "a/..b", "a..b/c", ".", "./a", "a\\b", "1:a", "ab:c", "...", "a/.../b"]
    assert all(map(escapes, outward))
    assert not any(map(escapes, inward))


def test_files_take_no_call_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One listing per folder and nothing for a regular file: on a file server each call takes a millisecond."""
    names = [f"{i}.jpg" for i in range(50)] + [f"sub/{i}.jpg" for i in range(50)]
    for name in names:
        (folder / name).touch()
    calls: list[str] = []
    for module, name in ((os, "scandir"), (os, "lstat"), (os, "stat"), (os.path, "isfile")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, n=name, **k: (calls.append(n), f(*a, **k))[1])
    assert find_defects(folder, names, follow_links=False) == {}
    assert calls.count("scandir") == 2
    assert len(calls) < 40, "the rest resolves the two folders"


def test_a_folder_that_cannot_be_read(folder: Path) -> None:
    for path, said in ((folder / "none", "No such file"), (folder / "a.jpg", "Not a directory")):
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: cannot read the image folder \({said}"):
            find_defects(path, ["a.jpg"], follow_links=False)
