"""tools/download_coco.py: a small COCO 2017 from a server on this machine that does what servers and networks do."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from fpn_det.config import Config, load_config
from fpn_det.data import coco2017
from fpn_det.data.archive import unpack
from fpn_det.data.coco2017 import ARCHIVES, SERVER
from fpn_det.structures import InputError
from tests.test_download import Server, quick

__all__ = ["quick"]  # a fixture: no pauses, short waits

NUM_IMAGES = {"train": 7, "val": 3}
SIZE = 64


def pictures(split: str) -> dict[str, bytes]:
    found = {}
    for i in range(NUM_IMAGES[split]):
        file = io.BytesIO()
        Image.effect_noise((SIZE, SIZE), 20 + i).convert("RGB").save(file, "jpeg", quality=95)
        found[f"{split}2017/{i:012}.jpg"] = file.getvalue()
    return found


def instances(split: str) -> bytes:
    images = [{"id": i, "file_name": f"{i:012}.jpg", "width": SIZE, "height": SIZE} for i in range(NUM_IMAGES[split])]
    boxes = [{"id": i["id"], "image_id": i["id"], "category_id": 1, "bbox": [9, 9, 20, 20]} for i in images]
    categories = [{"id": 1, "name": "person"}]
    return json.dumps({"images": images, "annotations": boxes, "categories": categories}).encode()


def pack(content: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for folder in sorted({name.rpartition("/")[0] for name in content}):
            archive.mkdir(folder)
        for name, data in content.items():
            archive.writestr(name, data)
    return file.getvalue()


CONTENT = {
    "train": pictures("train"),
    "val": pictures("val"),
    "annotations": {f"annotations/instances_{split}2017.json": instances(split) for split in ("train", "val")},
}
ZIPS = {part: pack(content) for part, content in CONTENT.items()}
ZIPS["annotations"] = pack(CONTENT["annotations"] | {"annotations/captions_val2017.json": bytes(99_000)})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A mirror of the small data set, which the tool takes for COCO."""
    with Server() as server:
        for part, archive in ARCHIVES.items():
            data = ZIPS[part]
            server.contents[f"/coco/{archive.path}"] = data
            small = replace(
                archive,
                num_bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                num_files=len(CONTENT[part]),
                max_bytes=len(data),
            )
            monkeypatch.setitem(coco2017.ARCHIVES, part, small)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run(tool, server: Server, tmp_path: Path):
    """Run the tool with the server as a mirror and tmp_path/coco as the place."""

    def download(*arguments: str):
        outcome = tool("download_coco", "--mirror", server.url("/coco/"), "--output", tmp_path / "coco", *arguments)
        assert "Traceback" not in outcome.err
        return outcome

    return download


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_the_official_archives_are() -> None:
    """Their places, and a layout that is the one of the configs."""
    assert [f"{SERVER}/{archive.path}" for archive in ARCHIVES.values()] == [
        "https://s3.amazonaws.com/images.cocodataset.org/zips/val2017.zip",
        "https://s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip",
        "https://s3.amazonaws.com/images.cocodataset.org/annotations/annotations_trainval2017.zip",
    ]
    data = Config().data
    for part, split in (("train", data.train), ("val", data.val)):
        assert (Path("data/coco") / ARCHIVES[part].pattern).parent == split.images
        assert split.annotations.match(f"data/coco/{ARCHIVES['annotations'].pattern}")
    assert (ARCHIVES["train"].num_files, ARCHIVES["val"].num_files) == (118_287, 5_000)
    assert all(re.fullmatch("[0-9a-f]{64}", archive.sha256) for archive in ARCHIVES.values())


def test_all_parts_and_again(run, server: Server, tmp_path: Path) -> None:
    outcome = run("--parts", "train", "val", "annotations")
    assert outcome.code == 0, outcome.err
    assert files(tmp_path / "coco") == CONTENT["train"] | CONTENT["val"] | CONTENT["annotations"]
    assert f"complete: {tmp_path}/coco/train2017/*.jpg (7 files)" in outcome.out
    assert "instances_val2017.json: 3 images (0 without boxes), 3 boxes, 1 classes" in outcome.out
    num_requests = len(server.requests)
    again = run("--parts", "train", "val", "annotations")
    assert (again.code, again.out) == (0, outcome.out)
    assert len(server.requests) == num_requests
    (tmp_path / "mine.yaml").write_text(outcome.out.partition("not in data/coco:\n")[2])
    config = load_config(tmp_path / "mine.yaml")  # the lines that it prints name the data
    assert config.data.train.images == tmp_path / "coco/train2017"
    assert config.data.val.annotations == tmp_path / "coco/annotations/instances_val2017.json"


def test_by_default_what_evaluation_needs(run, tmp_path: Path) -> None:
    outcome = run("--keep-zips")
    assert outcome.code == 0, outcome.err
    zips = {ARCHIVES[part].name: ZIPS[part] for part in ("val", "annotations")}
    assert files(tmp_path / "coco") == CONTENT["val"] | CONTENT["annotations"] | zips
    assert "to train, add --parts train. To evaluate:\n  python tools/eval.py" in outcome.out
    assert "not needed any more" not in outcome.out
    assert "val2017.zip is not needed any more" in run().out
    assert (tmp_path / "coco/val2017.zip").exists()


def test_a_server_that_cuts_connections(run, server: Server, tmp_path: Path) -> None:
    server.cuts = [30_000 if i % 2 else 100 for i in range(6)]
    outcome = run("--parts", "train", "val", "annotations")
    assert outcome.code == 0, outcome.err
    assert files(tmp_path / "coco") == CONTENT["train"] | CONTENT["val"] | CONTENT["annotations"]
    assert sum(wanted is not None for wanted in server.ranges) >= 2
    assert "trying again" in outcome.err


def test_a_server_that_cuts_too_often_is_gone_on_with_later(run, server: Server, tmp_path: Path) -> None:
    server.cuts = [5_000, *[0] * 9]
    outcome = run("--parts", "val")
    assert (outcome.code, outcome.out) == (2, "")
    assert re.search(
        r"error: .*val2017\.zip: the connection was cut after 5,000 of .* run the same command", outcome.err
    )
    server.cuts, server.requests = [], []
    assert run("--parts", "val").code == 0
    assert server.ranges == ["bytes=5000-"]
    assert files(tmp_path / "coco") == CONTENT["val"]


def test_a_server_that_lies_about_the_length(run, server: Server, tmp_path: Path) -> None:
    server.stated_length = len(ZIPS["val"]) + 10
    server.ignores_ranges = True
    outcome = run("--parts", "val")
    assert outcome.code == 2
    assert f"after {len(ZIPS['val']):,} of {len(ZIPS['val']) + 10:,} bytes" in outcome.err
    server.stated_length = len(ZIPS["val"]) - 10  # a file that is cut, and whose length fits
    outcome = run("--parts", "val")
    assert outcome.code == 2
    assert "SHA-256 of what was received is" in outcome.err
    assert files(tmp_path / "coco") == {}


def test_a_damaged_archive_is_not_unpacked(run, server: Server, tmp_path: Path) -> None:
    path = "/coco/zips/val2017.zip"
    server.contents[path] = ZIPS["val"][:5000] + b"?" + ZIPS["val"][5001:]
    outcome = run("--parts", "val")
    assert outcome.code == 2
    assert re.search(r"zips/val2017\.zip: SHA-256 of what was received is .*, expected .* it is deleted", outcome.err)
    assert files(tmp_path / "coco") == {}


def test_an_archive_that_is_there_is_used(run, server: Server, tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/val2017.zip").write_bytes(ZIPS["val"])
    assert run("--parts", "val").code == 0
    assert server.requests == []
    assert files(tmp_path / "coco") == CONTENT["val"]


def test_an_unpacking_that_was_killed_goes_on(run, server: Server, tmp_path: Path) -> None:
    """What a killed process leaves: the archive, some of its files, and one under a temporary name."""
    folder = tmp_path / "coco"
    folder.mkdir()
    (folder / "train2017.zip").write_bytes(ZIPS["train"])
    unpack(folder / "train2017.zip", folder, pattern="*[013].jpg", max_bytes=10**6)
    (folder / "train2017/.000000000002.jpg.tmp").write_bytes(b"half")
    inode = (folder / "train2017/000000000001.jpg").stat().st_ino
    assert run("--parts", "train").code == 0
    assert server.requests == []
    assert files(folder) == CONTENT["train"]
    assert (folder / "train2017/000000000001.jpg").stat().st_ino == inode


def test_a_disk_without_room_is_told_before_the_download(run, server: Server, tmp_path: Path, monkeypatch) -> None:
    val = ARCHIVES["val"].max_bytes
    free = ARCHIVES["val"].num_bytes + val
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    outcome = run("--parts", "train", "val")
    assert outcome.code == 2
    assert re.search(
        r"coco: 0\.0 GB are needed here \(the archives, until .* choose another disk with --out", outcome.err
    )
    assert (server.requests, files(tmp_path)) == ([], {})
    assert run("--parts", "val").code == 0
    assert files(tmp_path / "coco") == CONTENT["val"]


def test_a_folder_with_other_images_is_told(run, tmp_path: Path) -> None:
    assert run("--parts", "val", "annotations").code == 0
    image = tmp_path / "coco/val2017/000000000001.jpg"
    image.rename(image.with_name("other.jpg"))
    outcome = run("--parts", "val", "annotations")
    assert outcome.code == 2
    assert re.search(r"val2017: 1 images of .*instances_val2017\.json are not there", outcome.err)


def test_a_mirror_speaks_https(tool, tmp_path: Path) -> None:
    outcome = tool("download_coco", "--mirror", "http://example.org", "--output", tmp_path / "coco")
    assert outcome.code == 2
    assert "only https:// addresses are downloaded" in outcome.err


def test_an_archive_with_too_few_files_is_refused(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(coco2017.ARCHIVES, "val", replace(ARCHIVES["val"], num_files=4))
    outcome = run("--parts", "val")
    assert outcome.code == 2
    assert re.search(r"val2017\.zip: has 3 files val2017/\*\.jpg, not the 4 of COCO", outcome.err)


ANNOTATIONS, VAL, TRAIN = (ARCHIVES[part] for part in ("annotations", "val", "train"))
CONTENTS = ANNOTATIONS.max_bytes + VAL.max_bytes + TRAIN.max_bytes


@pytest.mark.parametrize(
    ("arrived", "keep_zips", "needed"),
    [
        ({}, False, CONTENTS + TRAIN.num_bytes),
        ({}, True, CONTENTS + ANNOTATIONS.num_bytes + VAL.num_bytes + TRAIN.num_bytes),
        ({"train2017.zip.part": 10**10}, False, CONTENTS + TRAIN.num_bytes - 10**10),
        ({"val2017.zip": VAL.num_bytes}, False, CONTENTS + TRAIN.num_bytes - VAL.num_bytes),
    ],
)
def test_the_room_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrived: dict[str, int], keep_zips: bool, needed: int
) -> None:
    """Worst while train2017.zip, the last, is unpacked; what has arrived is there already."""
    for name, size in arrived.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    order = [ANNOTATIONS, VAL, TRAIN]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    coco2017.check_room(order, tmp_path, keep_zips=keep_zips)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=rf"{needed / 1e9:.1f} GB are needed here .* room for {needed / 1e9:.1f} GB"):
        coco2017.check_room(order, tmp_path, keep_zips=keep_zips)
