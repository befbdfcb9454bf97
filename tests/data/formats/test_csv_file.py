"""CSV: the usual headers give the same boxes; what cannot be used is named by its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fpn_det.data.formats.csv_file import read_csv
from fpn_det.data.problems import Defect
from fpn_det.structures import InputError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """a.jpg and sub/b.jpg of 100x50."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg"):
        Image.new("RGB", (100, 50)).save(folder / name)
    return folder


def read(images: Path, text: str | bytes, **options):
    path = images.parent / "train.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_csv([path], images=images, **options)


RETINANET = "a.jpg,10,5,30,20,cat\nsub/b.jpg,,,,,\na.jpg,0,0,100,50,dog\n"
TABLES = {
    "keras-retinanet": RETINANET,
    "torchvision": "path,x1,y1,x2,y2,class\n" + RETINANET,
    "empty first": "sub/b.jpg,,,,,\na.jpg,10,5,30,20,cat\na.jpg,0,0,100,50,dog",
    "tensorflow": (
        "filename,width,height,class,xmin,ymin,xmax,ymax\n"
        "a.jpg,100,50,cat,10,5,30,20\nb.jpg,100,50,,,,,\na.jpg,100,50,dog,0,0,100,50\n"
    ),
    "semicolons, BOM, CRLF, quotes": (
        '\ufeff"Image";"Label";"X_Min";"Y_Min";"X_Max";"Y_Max"\r\n"/old/place/a.jpg";"cat";10;5;30;20\r\n'
        '"C:\\data\\sub\\b.jpg";;;;;\r\n\r\n/old/place/a.jpg;dog;0;0;100;50\r\n'
    ),
    "Open Images": (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf\n"
        "a,xclick,cat,1,0.1,0.3,0.1,0.4,0,0,0\nb,,,,,,,,,,\na,xclick,dog,1,0,1,0,1,0,0,1\n"
    ),
}


@pytest.mark.parametrize("kind", list(TABLES))
def test_tables(images: Path, kind: str) -> None:
    data = read(images, TABLES[kind])
    assert data.problems == []
    assert data.classes == ("cat", "dog")
    found = {image.file_name: image for image in data.splits["train"].images}
    assert found["sub/b.jpg"].labels == []
    assert [(label.name, label.is_crowd) for label in found["a.jpg"].labels] == [
        ("cat", False),
        ("dog", kind == "Open Images"),
    ]
    assert [label.box for label in found["a.jpg"].labels] == [pytest.approx((10, 5, 30, 20)), (0, 0, 100, 50)]


def test_conventions(images: Path) -> None:
    one_based = read(images, RETINANET, one_based=True)
    assert [label.box for label in one_based.splits["train"].images[0].labels] == [(9, 4, 30, 20), (-1, -1, 100, 50)]
    assert [p.defect for p in one_based.problems] == [Defect.LABEL_BEFORE_FIRST]
    click = read(images, "a.jpg,10,5,10,20,cat\n", one_based=True)
    assert [p.defect for p in click.problems] == [Defect.LABEL_EMPTY]
    half = read(images, "a.jpg,0,0,.5,.5,cat\na.jpg,0,0,1.5,.5,cat", normalized=True)
    assert [label.box for label in half.splits["train"].images[0].labels] == [(0, 0, 50, 25)]
    assert [p.defect for p in half.problems] == [Defect.LABEL_FRACTIONS]
    with pytest.raises(InputError, match="--normalized"):
        read(images, "a.jpg,0,0,.5,.5,cat\n" * 20)
    assert len(read(images, "a.jpg,0,0,.5,.5,cat\n" * 19).splits["train"].images[0].labels) == 19


def test_classes(images: Path) -> None:
    data = read(images, RETINANET, classes=["dog", "bird"])
    assert data.classes == ("dog", "bird")
    assert [(p.defect, p.value.rpartition("/")[2]) for p in data.problems] == [
        (Defect.LABEL_CLASS, "train.csv:1: 'cat'")
    ]


@pytest.mark.parametrize(
    ("row", "defect"),
    [
        ("a.jpg,10,5,nan,20,cat", Defect.LABEL_MALFORMED),
        ("a.jpg,10,5,1e999,20,cat", Defect.LABEL_MALFORMED),
        (f"a.jpg,10,5,{'9' * 5000},20,cat", Defect.LABEL_MALFORMED),
        ("a.jpg,10,5,x,20,cat", Defect.LABEL_MALFORMED),
        ("a.jpg,10,5,,20,cat", Defect.LABEL_MALFORMED),
        ("a.jpg,10,5,30,20", Defect.LABEL_MALFORMED),
        ("a.jpg,,,,,cat", Defect.LABEL_MALFORMED),
        ("a.jpg,30,5,10,20,cat", Defect.LABEL_INVERTED),
        ("a.jpg,10,5,10,20,cat", Defect.LABEL_EMPTY),
        ("gone.jpg,10,5,30,20,cat", Defect.SOURCE_IMAGE_MISSING),
        (",10,5,30,20,cat", Defect.SOURCE_IMAGE_MISSING),
        ("a\x1b[2J,10,5,30,20,cat", Defect.SOURCE_IMAGE_MISSING),
        ('"two\nlines",10,5,30,20,cat', Defect.SOURCE_IMAGE_MISSING),
    ],
)
def test_rows_that_are_none(images: Path, row: str, defect: Defect) -> None:
    data = read(images, f"path,x1,y1,x2,y2,class\na.jpg,1,1,9,9,dog\n{row}\n")
    (problem,) = data.problems
    assert problem.defect is defect
    assert f"train.csv:{4 if 'two' in row else 3}" in problem.value
    assert problem.value.isprintable()
    assert len(data.splits["train"].images[0].labels) == 1 + (defect is Defect.LABEL_EMPTY)


def test_sizes_that_differ(images: Path) -> None:
    data = read(
        images, "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,101,50,cat,1,1,2,2\na.jpg,101,50,c,1,1,2,2"
    )
    assert [p.defect for p in data.problems] == [Defect.IMAGE_SIZE_DIFFERS]  # once for the image
    assert data.splits["train"].images == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line is empty"),
        ("path,x1,y1,x2,y2,class\n", "no row below"),
        ("path,x1,y1,x2,class\na.jpg,1,1,2,cat", "not all columns are there"),
        ("a.jpg,1,1,2,cat", "not all columns are there"),
        ("path,x1,y1,x2,y2,class\na.jpg,1,1,2,2,caf\u00e9".encode("latin-1"), "after line 1 it is not UTF-8"),
        ("path,x1,y1,x2,y2,class\n" + "x" * 200_000, "not valid CSV"),
    ],
)
def test_files_that_are_none(images: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read(images, text)
    assert "train.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_names_of_codes(images: Path, tmp_path: Path) -> None:
    codes = tmp_path / "codes.csv"
    codes.write_text('LabelName,DisplayName\n/m/01,Cat\n/m/02,"Dog, big"\n')
    table = "a.jpg,0,0,9,9,/m/02\na.jpg,0,0,9,9,/m/01\na.jpg,0,0,9,9,/m/03\n"
    data = read(images, table, class_names=codes)
    assert [label.name for label in data.splits["train"].images[0].labels] == ["Dog, big", "Cat", "/m/03"]
    assert data.classes == ("/m/03", "Cat", "Dog, big")
    for text in (b"/m/01,Cat,3\n", b"\xff\n"):
        codes.write_bytes(text)
        with pytest.raises(InputError, match=r"codes\.csv"):
            read(images, table, class_names=codes)


def test_files_of_one_name(images: Path) -> None:
    for folder, name in {"train": "a.jpg", "valid": "b.jpg"}.items():
        (images / folder).mkdir()
        (images / folder / "_annotations.csv").write_text(f"{name},0,0,9,9,{folder}\n")
    data = read_csv([images / "train/_annotations.csv", images / "valid/_annotations.csv"], images=images)
    assert {split: part.images[0].file_name for split, part in data.splits.items()} == {
        "train": "a.jpg",
        "val": "sub/b.jpg",
    }
    assert data.classes == ("train", "valid")
    with pytest.raises(InputError, match="two files of one name"):
        read_csv([Path("a/train.csv"), Path("b/a/train.csv")], images=images)
