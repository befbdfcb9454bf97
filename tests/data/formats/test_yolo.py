"""YOLO: there and back, against hotcoco's writer and supervision's reader; layouts; what cannot be used is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision
import torch
import yaml
from hotcoco import COCO
from PIL import Image

from fpn_det.data.coco import load_coco
from fpn_det.data.formats.labels import to_records
from fpn_det.data.formats.yolo import read_yolo, unfit_images, write_yolo
from fpn_det.data.problems import Defect
from fpn_det.structures import InputError


def test_there_and_back(test_data: Path, tmp_path: Path) -> None:
    bccd = test_data / "bccd"
    splits = {name: load_coco(bccd / f"annotations/{name}.json", bccd / "images") for name in ("train", "val")}
    write_yolo(tmp_path / "yolo", splits, place="none")
    for name, expected in splits.items():
        (tmp_path / "yolo/images").mkdir(exist_ok=True)
        (tmp_path / "yolo/images" / name).mkdir()
        for file in expected.names():
            shutil.copy(bccd / "images" / file, tmp_path / "yolo/images" / name)
    data = read_yolo(tmp_path / "yolo")
    assert data.problems == []
    for name, expected in splits.items():
        records = to_records(data.splits[name], data.classes, source=bccd, description="")
        records.write(tmp_path / f"{name}.json")
        found = load_coco(tmp_path / f"{name}.json", tmp_path / "yolo/images" / name)
        assert found.names() == expected.names()
        assert torch.equal(found.sizes, expected.sizes)
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.box_offsets, expected.box_offsets)
        torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-4, rtol=0)
        assert found.categories.names == expected.categories.names


@pytest.mark.parametrize("images", [None, "images"])
def test_what_supervision_writes_is_read(shapes: Path, tmp_path: Path, images: str | None) -> None:
    theirs = supervision.DetectionDataset.from_coco(str(shapes / "val"), str(shapes / "annotations/val.json"))
    theirs.as_yolo(str(tmp_path / "images"), str(tmp_path / "labels"), str(tmp_path / "data.yaml"))
    found = read_yolo(tmp_path, images=tmp_path / images if images else None)
    assert found.problems == []
    assert [found.classes.index(name) for name in theirs.classes] == list(range(len(theirs.classes)))
    for image in found.splits["all"].images:
        expected = theirs.annotations[str(shapes / "val" / image.file_name)]
        assert [found.classes.index(label.name) for label in image.labels] == expected.class_id.tolist()
        boxes = np.array([label.box for label in image.labels]).reshape(-1, 4)
        np.testing.assert_allclose(boxes, expected.xyxy, atol=1e-3)


def test_supervision_reads_what_is_written(shapes: Path, tmp_path: Path) -> None:
    data = load_coco(shapes / "annotations/val.json", shapes / "val")
    write_yolo(tmp_path / "yolo", {"val": data}, place="copy")
    theirs = supervision.DetectionDataset.from_yolo(
        images_directory_path=str(tmp_path / "yolo/images/val"),
        annotations_directory_path=str(tmp_path / "yolo/labels/val"),
        data_yaml_path=str(tmp_path / "yolo/data.yaml"),
    )
    assert theirs.classes == list(data.categories.names)
    assert len(theirs) == len(data)
    for index, name in enumerate(data.names()):
        boxes, labels = data.targets(index)
        found = theirs.annotations[str(tmp_path / "yolo/images/val" / name)]
        np.testing.assert_allclose(found.xyxy.reshape(-1, 4), boxes.numpy(), atol=1e-3)
        assert found.class_id.tolist() == labels.tolist()


def test_what_hotcoco_writes_is_read(shapes: Path, tmp_path: Path) -> None:
    data = load_coco(shapes / "annotations/val.json", shapes / "val")
    COCO(str(shapes / "annotations/val.json")).to_yolo(str(tmp_path))
    found = read_yolo(tmp_path, images=shapes / "val")
    (split,) = found.splits.values()
    assert found.problems == []
    assert found.classes == data.categories.names
    images = {image.file_name: image for image in split.images}
    for index, name in enumerate(data.names()):
        boxes, labels = data.targets(index)
        assert [found.classes.index(label.name) for label in images[name].labels] == labels.tolist()
        found_boxes = np.array([label.box for label in images[name].labels]).reshape(-1, 4)
        np.testing.assert_allclose(found_boxes, boxes.numpy(), atol=1e-3)


# Writing


def coco(folder: Path, *, names: tuple[str, ...] = ("a.jpg",), **changes: Any) -> Path:
    """A file of images of 64x48 with one box each, and one without any."""
    (folder / "images").mkdir(exist_ok=True)
    for name in (*names, "empty.jpg"):
        (folder / "images" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 48)).save(folder / "images" / name)
    content = {
        "images": [{"id": i, "file_name": n, "width": 64, "height": 48} for i, n in enumerate((*names, "empty.jpg"))],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 7, "bbox": [16, 12, 32, 24], "iscrowd": 0, "area": 1}
            for i in range(len(names))
        ],
        "categories": [{"id": 7, "name": "cat: 'x'\n"}, {"id": 3, "name": "on"}],
    }
    path = folder / "coco.json"
    path.write_text(json.dumps(content | changes))
    return path


@pytest.mark.parametrize("place", ["link", "copy", "none"])
def test_the_files(tmp_path: Path, place) -> None:
    data = load_coco(coco(tmp_path, names=("a.jpg", "sub/b.jpg")), tmp_path / "images")
    write_yolo(tmp_path / "yolo", {"train": data}, place=place)
    labels = tmp_path / "yolo/labels/train"
    line = "1 0.500000000 0.500000000 0.500000000 0.500000000\n"
    assert {p.relative_to(labels).as_posix(): p.read_text() for p in labels.rglob("*.txt")} == {
        "a.txt": line,
        "sub/b.txt": line,
        "empty.txt": "",
    }
    content = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())
    assert content == {"train": "images/train", "names": {0: "on", 1: "cat: 'x'\n"}}
    images = tmp_path / "yolo/images/train"
    assert images.exists() == (place != "none")
    if place != "none":
        assert (images / "sub/b.jpg").is_symlink() == (place == "link")
        assert (images / "sub/b.jpg").read_bytes() == (tmp_path / "images/sub/b.jpg").read_bytes()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    data = load_coco(coco(tmp_path, names=("a.jpg", "a.png")), tmp_path / "images")
    with pytest.raises(InputError, match=r"'a\.jpg' and 'a\.png' would share"):
        write_yolo(tmp_path / "yolo", {"train": data}, place="none")
    assert not (tmp_path / "yolo").exists()
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        write_yolo(tmp_path / "images", {"train": data}, place="none")


def test_images_that_do_not_fit(tmp_path: Path) -> None:
    path = coco(tmp_path, names=("turned.jpg", "small.jpg", "broken.jpg", "fine.jpg"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "images/turned.jpg", exif=exif)
    Image.new("RGB", (32, 48)).save(tmp_path / "images/small.jpg")
    (tmp_path / "images/broken.jpg").write_text("no image")
    data = load_coco(path, tmp_path / "images")
    assert {i: p.defect for i, p in unfit_images(data).items()} == {
        0: Defect.IMAGE_TURNED,
        1: Defect.IMAGE_SIZE_DIFFERS,
        2: Defect.IMAGE_UNREADABLE,
    }


# Reading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """data.yaml, and in images/train a.jpg and b.jpg of 100x50, without labels yet."""
    for name in ("images/train", "labels/train"):
        (tmp_path / name).mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (100, 50)).save(tmp_path / f"images/train/{name}.jpg")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [cat, dog]\n")
    return tmp_path


def label(folder: Path, text: str | bytes, name: str = "train/a") -> None:
    path = folder / f"labels/{name}.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    ("line", "name", "box"),
    [
        ("0 0.5 0.5 0.2 0.4", "cat", (40, 15, 60, 35)),
        ("1.0\t.5 .5 1 1 ", "dog", (0, 0, 100, 50)),
        ("1 .9 .5 .3 .4", "dog", (75, 15, 105, 35)),  # partly outside: for the reader of the result to clip
        ("0 .1 .2 .5 .2 .3 .8", "cat", (10, 10, 50, 40)),  # polygon
        ("0 .1 .2 .5 .2 .5 .8 .1 .8", "cat", (10, 10, 50, 40)),  # oriented box
    ],
)
def test_a_line(folder: Path, line: str, name: str, box: tuple[float, ...]) -> None:
    label(folder, f"\ufeff{line}\r\n\n")
    data = read_yolo(folder)
    a, b = data.splits["train"].images
    assert data.problems == []
    assert (a.size, a.labels[0].name, b.labels) == ((50, 100), name, [])
    assert a.labels[0].box == pytest.approx(box)


def test_keypoints_are_no_polygon(folder: Path) -> None:
    (folder / "data.yaml").write_text("train: images/train\nnames: [cat]\nkpt_shape: [2, 2]\n")
    label(folder, "0 .5 .5 .2 .4 9 9 .7 .7\n0 .5 .5 .2 .4 .1 .1 1 .7 .7 2\n")
    (a, _) = read_yolo(folder).splits["train"].images
    assert [label.box for label in a.labels] == [pytest.approx((40, 15, 60, 35))] * 2


@pytest.mark.parametrize(
    ("line", "defect"),
    [
        ("0 .5 .5 .2", Defect.LABEL_MALFORMED),
        ("0 .5 .5 .2 .2 .9", Defect.LABEL_MALFORMED),
        ("0", Defect.LABEL_MALFORMED),
        ("cat .5 .5 .2 .2", Defect.LABEL_MALFORMED),
        ("0 nan .5 .2 .2", Defect.LABEL_MALFORMED),
        ("0 .5 .5 .2 inf", Defect.LABEL_MALFORMED),
        (f"{'9' * 5000} .5 .5 .2 .2", Defect.LABEL_MALFORMED),
        ("0 .5 .5 0,2 .2", Defect.LABEL_MALFORMED),
        ("2 .5 .5 .2 .2", Defect.LABEL_CLASS),
        ("-1 .5 .5 .2 .2", Defect.LABEL_CLASS),
        ("0.5 .5 .5 .2 .2", Defect.LABEL_CLASS),
        ("0 50 25 20 20", Defect.LABEL_FRACTIONS),
        ("0 .5 .5 -.2 .2", Defect.LABEL_FRACTIONS),
        ("0 .5 .5 -.005 .2", Defect.LABEL_INVERTED),
        ("0 .5 .5 0 .2", Defect.LABEL_EMPTY),
    ],
)
def test_lines_that_are_none(folder: Path, line: str, defect: Defect) -> None:
    label(folder, f"0 .5 .5 .2 .2\n\n{line}\n")
    data = read_yolo(folder)
    (problem,) = data.problems
    assert problem.defect is defect
    assert "/labels/train/a.txt:3" in problem.value
    assert len(data.splits["train"].images[0].labels) == 1 + (defect is Defect.LABEL_EMPTY)


def test_files_that_are_none(folder: Path) -> None:
    label(folder, "0 .5 .5 .2 .2 caf\u00e9".encode("latin-1"))
    (folder / "labels/train/b.txt").mkdir()
    label(folder, "", "train/gone")
    label(folder, "cat\ndog\n", "train/classes")
    (folder / "images/train/c.jpg").write_text("no image")
    data = read_yolo(folder)
    assert data.splits["train"].images == []
    assert [(p.defect, p.value.split(":")[0].rpartition("/")[2]) for p in data.problems] == [
        (Defect.SOURCE_UNREADABLE, "a.txt"),
        (Defect.SOURCE_UNREADABLE, "b.txt"),
        (Defect.IMAGE_UNREADABLE, "c.jpg"),
        (Defect.SOURCE_IMAGE_MISSING, "gone.txt"),
    ]


def test_upright(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (100, 50)).save(folder / "images/train/a.jpg", exif=exif)
    label(folder, "0 .5 .5 1 1")
    assert read_yolo(folder).splits["train"].images[0].labels[0].box == (0, 0, 50, 100)


@pytest.mark.parametrize(
    "text",
    [
        "path: {folder}\ntrain: images/train\nnames: {{0: cat, 1: dog}}",
        "path: /nowhere/else\ntrain: [images/train]\nnames: [cat, dog]",
        "train: ../images/train\nval:\nnames: [cat, dog]",
        "train: {folder}/images/train\nnames: [cat, dog]",
        "train: list.txt\nnames: [cat, dog]",
        "\ufefftrain: images\\train\r\nnames: [cat, dog]\r\n",
        "names: [cat, dog]",
        None,
    ],
)
def test_layouts(folder: Path, text: str | None, monkeypatch) -> None:
    label(folder, "1 .5 .5 .2 .2")
    (folder / "list.txt").write_text("./images/train/a.jpg\n./images/train/b.jpg\n")
    if text is None:
        (folder / "data.yaml").unlink()
        (folder / "classes.txt").write_text("cat\ndog\n")
    else:
        (folder / "data.yaml").write_text(text.format(folder=folder))
    monkeypatch.chdir(folder.parent)
    data = read_yolo(Path(folder.name))
    assert data.problems == []
    assert data.classes == ("cat", "dog")
    (split,) = data.splits.values()
    assert [(split.folder / image.file_name).resolve().name for image in split.images] == ["a.jpg", "b.jpg"]
    assert [len(image.labels) for image in split.images] == [1, 0]


def test_another_yaml_file_and_no_test_images(folder: Path) -> None:
    (folder / "data.yaml").write_text("train: images/train\ntest: ../test/images\nnames: [cat, dog]")
    (folder / "data.yaml").rename(folder / "coco8.yaml")
    data = read_yolo(folder)
    assert list(data.splits) == ["train"]
    assert [(p.defect, "test/images" in p.value) for p in data.problems] == [(Defect.SOURCE_SPLIT_MISSING, True)]
    (folder / "more.yaml").touch()  # now it is not clear which is meant
    with pytest.raises(InputError, match=r"neither data\.yaml nor"):
        read_yolo(folder)


def test_labels_beside_images_and_names_on_the_command_line(tmp_path: Path) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("1 .5 .5 1 1")
    with pytest.raises(InputError, match="--classes"):
        read_yolo(tmp_path)
    data = read_yolo(tmp_path, classes=["cat", "dog"])
    assert data.splits["all"].images[0].labels[0].name == "dog"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [cat", "not valid YAML"),
        ("[1]", "expected keys"),
        ("train: images/train", "names: expected a list"),
        ("train: images/train\nnames: {1: cat}", "names: expected a list"),
        ("train: images/train\nnames: [cat, cat]", "several classes are called 'cat'"),
        ("train: images/nowhere\nnames: [cat]", "train: 'images/nowhere' does not exist"),
        ("train: {a: b}\nnames: [cat]", "train: expected a folder"),
        ("test: nowhere\nnames: [cat]", "no folder of images that it names is there"),
        ("names: !!python/object/apply:os.getpid []", "not valid YAML"),
        ("train: labels/train\nnames: [cat]", "no image"),
    ],
)
def test_data_yaml_that_is_none(folder: Path, text: str, message: str) -> None:
    (folder / "data.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_yolo(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
