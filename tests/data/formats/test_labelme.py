"""LabelMe: the kinds of shapes; what cannot be used is named by its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fpn_det.data.formats.labelme import read_labelme
from fpn_det.data.problems import Defect
from fpn_det.structures import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder `train` with a.jpg and b.jpg of 100x50."""
    (tmp_path / "train").mkdir()
    for name in "ab":
        Image.new("RGB", (100, 50)).save(tmp_path / f"train/{name}.jpg")
    return tmp_path / "train"


def shape(points: Any, kind: str | None = "rectangle", label: Any = "cat") -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}}


def write(folder: Path, *shapes: Any, name: str = "a", **more: Any) -> None:
    content = {"version": "5.5.0", "shapes": list(shapes), "imagePath": f"{name}.jpg", "imageData": "x" * 1000}
    (folder / f"{name}.json").write_text(json.dumps(content | more))


@pytest.mark.parametrize(
    ("found", "box"),
    [
        (shape([[10, 5], [30, 20]]), (10, 5, 30, 20)),
        (shape([[30.5, 5], [10, 20]]), (10, 5, 30.5, 20)),  # corners in any order
        (shape([[10, 5], [30, 20], [20, 25]], "polygon"), (10, 5, 30, 25)),
        (shape([[10, 5], [30, 20], [20, 25]], None), (10, 5, 30, 25)),  # as of old versions
        (shape([[50, 25], [53, 29]], "circle"), (45, 20, 55, 30)),
        (shape([[50, 0], [60, 10], [50, 20], [40, 10]], "oriented_rectangle"), (40, 0, 60, 20)),
        (shape([[10, 5], [30, 20]], "mask"), (10, 5, 30, 20)),
    ],
)
def test_shapes(folder: Path, found: dict[str, Any], box: tuple[float, ...]) -> None:
    write(folder, found, imageHeight=50, imageWidth=100)
    data = read_labelme([folder])
    assert data.problems == []
    (image,) = data.splits["train"].images
    assert (image.file_name, image.size) == ("a.jpg", (50, 100))
    assert image.labels == [("cat", box, False)]
    assert data.num_unlabelled == 1


@pytest.mark.parametrize(
    ("found", "defect"),
    [
        (shape([[10, 5]], "point"), Defect.LABEL_SHAPE),
        (shape([[10, 5], [20, 20]], "line"), Defect.LABEL_SHAPE),
        (shape([[10, 5], [20, 20]], "polygon"), Defect.LABEL_SHAPE),
        (shape([[10, 5]]), Defect.LABEL_SHAPE),
        (shape([], "polygon"), Defect.LABEL_SHAPE),
        (shape([[10, 5], [30, 20]], 3), Defect.LABEL_SHAPE),
        (shape([[10, 5], [30, 20]], label=None), Defect.LABEL_MALFORMED),
        (shape([[10, 5], [30, 20]], label=""), Defect.LABEL_MALFORMED),
        (shape([[10, float("nan")], [30, 20]]), Defect.LABEL_MALFORMED),
        (shape([[10, 10**400], [30, 20]]), Defect.LABEL_MALFORMED),
        (shape([[10, True], [30, 20]]), Defect.LABEL_MALFORMED),
        (shape([[10], [30, 20]]), Defect.LABEL_MALFORMED),
        (shape("corners"), Defect.LABEL_MALFORMED),
        (shape(None), Defect.LABEL_MALFORMED),
        ("cat", Defect.LABEL_MALFORMED),
        (shape([[10, 5], [10, 20]]), Defect.LABEL_EMPTY),
    ],
)
def test_shapes_that_are_none(folder: Path, found: Any, defect: Defect) -> None:
    write(folder, shape([[1, 1], [2, 2]]), found)
    data = read_labelme([folder])
    (problem,) = data.problems
    assert problem.defect is defect
    assert "a.json, shape 2: " in problem.value
    assert len(data.splits["train"].images[0].labels) == 1 + (defect is Defect.LABEL_EMPTY)


def test_files_that_are_none(folder: Path) -> None:
    (folder / "cut.json").write_text('{"shapes": [')
    (folder / "digits.json").write_text('{"shapes": [%s]}' % ("9" * 5000))
    (folder / "list.json").write_text("[]")
    (folder / "deep.json").write_text("[" * 100_000)
    write(folder, name="gone")
    write(folder, imageHeight=51, imageWidth=100)
    write(folder, name="b", imagePath="a\0.jpg")
    data = read_labelme([folder])
    assert {p.value.split(":")[0].rpartition("/")[2]: p.defect for p in data.problems} == {
        "a.json": Defect.IMAGE_SIZE_DIFFERS,
        "cut.json": Defect.SOURCE_UNREADABLE,
        "deep.json": Defect.SOURCE_UNREADABLE,
        "digits.json": Defect.SOURCE_UNREADABLE,
        "gone.json": Defect.SOURCE_IMAGE_MISSING,
        "list.json": Defect.SOURCE_UNREADABLE,
    }
    assert [image.file_name for image in data.splits["train"].images] == ["b.jpg"]


def test_images_in_another_folder(folder: Path) -> None:
    labels = folder.parent / "labels"
    labels.mkdir()
    write(labels, shape([[1, 1], [2, 2]]), name="x", imagePath="..\\train\\b.jpg")
    with pytest.raises(InputError, match="no JSON file"):
        read_labelme([folder])
    assert [p.defect for p in read_labelme([labels]).problems] == [Defect.SOURCE_IMAGE_MISSING]
    data = read_labelme([labels], images=folder)
    assert [image.file_name for image in data.splits["labels"].images] == ["b.jpg"]
