"""Pascal VOC: BCCD's XML gives its annotations; single cases; what cannot be used is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hotcoco import COCO
from PIL import Image

from fpn_det.data.formats.labels import to_records
from fpn_det.data.formats.voc import parse_xml, read_voc
from fpn_det.data.problems import Defect
from fpn_det.structures import InputError

CLASSES = ["RBC", "WBC", "Platelets"]


def test_bccd_equals_its_annotations(test_data: Path, tmp_path: Path) -> None:
    bccd = test_data / "bccd"
    sets = {name: bccd / f"splits/{name}.txt" for name in ("train", "val", "test")}
    data = read_voc(bccd / "voc", images=bccd / "images", sets=sets, classes=CLASSES)
    assert list(data.splits) == list(sets)
    for name, split in data.splits.items():
        expected = json.loads((bccd / f"annotations/{name}.json").read_text())
        description = expected["info"]["description"]
        to_records(split, data.classes, source=bccd, description=description).write(tmp_path / "out.json")
        assert json.loads((tmp_path / "out.json").read_text()) == expected
    assert [p.defect for p in data.problems] == [Defect.LABEL_EMPTY] * 2
    assert data.num_unlabelled == 0


def test_bccd_equals_what_hotcoco_reads(test_data: Path) -> None:
    bccd = test_data / "bccd"
    data = read_voc(bccd / "voc", images=bccd / "images")
    theirs = COCO.from_voc(str(bccd / "voc")).dataset
    ours = to_records(data.splits["all"], data.classes, source=bccd, description="")
    assert [c["name"] for c in theirs["categories"]] == [c["name"] for c in ours.categories]
    assert [i["file_name"] for i in theirs["images"]] == [i["file_name"] for i in ours.images]
    differing = 0
    for a, b in zip(ours.annotations, theirs["annotations"], strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        differing += a["bbox"] != b["bbox"]
    assert differing == 2  # the boxes of one point, which hotcoco takes for boxes of one pixel


XML = "<annotation><filename>{name}</filename><size><width>64</width><height>48</height></size>{objects}</annotation>"
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def an_object(*corners: object, name: str = "cat", more: str = "") -> str:
    return f"<object><name>{name}</name>{more}{BOX.format(*corners)}</object>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set without XML yet: images a.jpg, b.jpg, c.jpg of 64x48."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (64, 48)).save(tmp_path / f"JPEGImages/{name}.jpg")
    return tmp_path


def write(folder: Path, name: str, *objects: str, text: str | bytes | None = None) -> None:
    content = XML.format(name=f"{name}.jpg", objects="".join(objects)) if text is None else text
    path = folder / f"Annotations/{name}.xml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_corners(folder: Path) -> None:
    write(folder, "a", an_object(1, 1, 64, 48), an_object(10.5, 2, 20, 3), an_object(5, 5, 5, 9), an_object(9, 9, 8, 9))
    one_based, zero_based = (read_voc(folder, zero_based=flag) for flag in (False, True))
    (image,) = one_based.splits["all"].images
    assert (image.file_name, image.size) == ("a.jpg", (48, 64))
    assert [label.box for label in image.labels] == [(0, 0, 64, 48), (9.5, 1, 20, 3), (4, 4, 4, 4)]
    assert [p.defect for p in one_based.problems] == [Defect.LABEL_EMPTY, Defect.LABEL_INVERTED]
    assert "object 4" in one_based.problems[1].value
    assert [label.box for label in zero_based.splits["all"].images[0].labels[:2]] == [(1, 1, 64, 48), (10.5, 2, 20, 3)]


@pytest.mark.parametrize(("how", "kept"), [("crowd", [False, True]), ("keep", [False, False]), ("drop", [False])])
def test_difficult(folder: Path, how, kept: list[bool]) -> None:
    write(
        folder,
        "a",
        an_object(1, 1, 9, 9, more="<difficult>0</difficult>"),
        an_object(1, 1, 9, 9, more="<difficult>1</difficult>"),
    )
    (image,) = read_voc(folder, difficult=how).splits["all"].images
    assert [label.is_crowd for label in image.labels] == kept


def test_image_sets(folder: Path) -> None:
    for name in "abc":
        write(folder, name, an_object(1, 1, 9, 9, name=name))
    for name, members in {
        "train": "b\n\na.jpg\n",
        "val": "c  1\n",
        "trainval": "a\nb\nc\n",
        "cat_train": "a -1\n",
    }.items():
        (folder / f"ImageSets/Main/{name}.txt").write_text(members)
    data = read_voc(folder)
    names = {split: [image.file_name for image in part.images] for split, part in data.splits.items()}
    assert names == {"train": ["b.jpg", "a.jpg"], "val": ["c.jpg"]}
    assert data.classes == ("a", "b", "c")  # of all sets


def test_corners_below_1_are_noted(folder: Path) -> None:
    write(folder, "a", an_object(0, 1, 9, 9), an_object(1, 0.5, 9, 9), an_object(1, 1, 9, 9))
    problems = read_voc(folder).problems
    assert [p.defect for p in problems] == [Defect.LABEL_BEFORE_FIRST] * 2
    assert "object 1: [0.0, 1.0, 9.0, 9.0]" in problems[0].value
    assert read_voc(folder, zero_based=True).problems == []


def test_folders_that_are_splits(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (64, 48)).save(tmp_path / f"{split}/a b.JPG")
        text = XML.format(name="a b.JPG", objects=an_object(1, 1, 9, 9, name=split)).replace("><", ">\r\n<")
        (tmp_path / f"{split}/a b.xml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    data = read_voc(tmp_path)
    assert data.problems == []
    assert data.classes == ("train", "valid")
    names = {split: [image.file_name for image in part.images] for split, part in data.splits.items()}
    assert names == {"train": ["train/a b.JPG"], "val": ["valid/a b.JPG"]}
    (tmp_path / "more").mkdir()
    (tmp_path / "valid/a b.xml").rename(tmp_path / "more/a b.xml")
    assert list(read_voc(tmp_path, images=tmp_path).splits) == ["all"]
    assert list(read_voc(tmp_path / "train").splits) == ["all"]


def test_images_are_found_and_their_sizes_decide(folder: Path) -> None:
    images = folder / "JPEGImages"
    write(folder, "a", text=XML.format(name="stale.jpg", objects=""))  # the XML's own name decides
    write(folder, "other", text=XML.format(name="b.jpg", objects=""))
    write(folder, "c", text=XML.format(name="c.jpg", objects="").replace("64", "65"))
    write(folder, "nosize", text="<annotation><filename>turned.jpg</filename></annotation>")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("turned", "stored"):
        Image.new("RGB", (64, 48)).save(images / f"{name}.jpg", exif=exif)
    write(folder, "stored")
    write(folder, "gone")
    write(folder, "twice", text=XML.format(name="b.jpg", objects=""))
    Image.new("RGB", (64, 48)).save(images / "unlabelled.png")
    data = read_voc(folder)
    found = {image.file_name: image.size for image in data.splits["all"].images}
    assert found == {"a.jpg": (48, 64), "b.jpg": (48, 64), "turned.jpg": (64, 48), "stored.jpg": (48, 64)}
    assert {p.defect: p.value.split(":")[0].rpartition("/")[2] for p in data.problems} == {
        Defect.IMAGE_SIZE_DIFFERS: "c.xml",
        Defect.SOURCE_IMAGE_MISSING: "gone.xml",
        Defect.SOURCE_IMAGE_REPEATED: "twice.xml",
    }
    assert data.num_unlabelled == 1


BOMB = (
    '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;&x;&x;&x;&x;&x;"><!ENTITY z "&y;&y;&y;&y;&y;&y;">]>'
    "<annotation><filename>&z;</filename></annotation>"
)
EXTERNAL = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>'
FILES = {
    "empty": "",
    "text": "no XML",
    "cut off": XML.format(name="a.jpg", objects=an_object(1, 1, 9, 9))[:90],
    "bomb": BOMB,
    "external": EXTERNAL,
    "external type": '<!DOCTYPE annotation SYSTEM "http://localhost/a.dtd"><annotation/>',
    "latin-1": "<annotation><filename>Zelle \u00e9</filename></annotation>".encode("latin-1"),
    "unknown encoding": '<?xml version="1.0" encoding="klingon"?><annotation/>',
    "other": "<html/>",
    "NUL": "<annotation>\0</annotation>",
}
OBJECTS = {
    "NaN": an_object("nan", 1, 9, 9),
    "infinite": an_object(1, 1, "inf", 9),
    "text": an_object("left", 1, 9, 9),
    "digits": an_object("9" * 5000, 1, 9, 9),
    "no box": "<object><name>cat</name></object>",
    "no name": f"<object>{BOX.format(1, 1, 9, 9)}</object>",
    "blank name": an_object(1, 1, 9, 9, name=" "),
    "empty corner": an_object("", 1, 9, 9),
}


@pytest.mark.parametrize("kind", list(FILES))
def test_files_that_are_none(folder: Path, kind: str) -> None:
    write(folder, "a", text=FILES[kind])
    write(folder, "b", an_object(1, 1, 9, 9))
    data = read_voc(folder)
    assert [(p.defect, "a.xml" in p.value) for p in data.problems] == [(Defect.SOURCE_UNREADABLE, True)]
    assert data.problems[0].value.isprintable()
    assert len(data.splits["all"].images) == 1


@pytest.mark.parametrize("kind", list(OBJECTS))
def test_objects_that_are_none(folder: Path, kind: str) -> None:
    write(folder, "a", an_object(1, 1, 9, 9), OBJECTS[kind])
    data = read_voc(folder)
    (problem,) = data.problems
    assert problem.defect is Defect.LABEL_MALFORMED
    assert "a.xml, object 2: " in problem.value
    assert len(problem.value) < 500 + len(str(folder))
    assert len(data.splits["all"].images[0].labels) == 1


def test_deeply_nested_elements() -> None:
    root = parse_xml(b"<annotation>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</annotation>")
    assert root.tag == "annotation"


def test_names_are_kept_and_shown_escaped(folder: Path) -> None:
    write(
        folder, "a", an_object(9, 9, 1, 1, name="cat\x7f&#10;step 9: AP 99"), an_object(1, 1, 9, 9, name="赤血球 &lt;")
    )
    data = read_voc(folder)
    assert data.classes == ("赤血球 <",)
    assert data.problems[0].value.isprintable()


def test_folders_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(InputError, match="no XML file"):
        read_voc(folder)
    write(folder, "a")
    with pytest.raises(InputError, match="--images"):
        read_voc(folder / "Annotations")
    with pytest.raises(InputError, match=r"nowhere: cannot read the folder"):
        read_voc(folder, images=folder / "nowhere")
    with pytest.raises(InputError, match=r"nowhere\.txt: cannot be read"):
        read_voc(folder, sets={"train": folder / "nowhere.txt"})
    (folder / "ImageSets/Main/train.txt").write_text("a\nmissing\n")
    (problem,) = read_voc(folder).problems
    assert problem.defect is Defect.SOURCE_UNREADABLE
    assert "missing.xml" in problem.value
    assert "train.txt names it" in problem.value
