"""The generated data set: repeatable, valid COCO, boxes that fit, and never written over other data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from fpn_det.data import shapes
from fpn_det.structures import InputError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.generate(folder, num_train=150, num_val=50, size=128, seed=0)
    return folder


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def edges(xywh: list[float]) -> list[float]:
    x, y, w, h = xywh
    return [x, y, x + w, y + h]


def load(root: Path, split: str) -> dict[str, Any]:
    return json.loads((root / "annotations" / f"{split}.json").read_text())


def test_same_parameters_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shapes.generate(tmp_path / name, num_train=6, num_val=3, size=64, seed=5)
    shapes.generate(tmp_path / "other", num_train=6, num_val=3, size=64, seed=6)
    first, other = digests(tmp_path / "one"), digests(tmp_path / "other")
    assert len(first) == 6 + 3 + 2
    assert first == digests(tmp_path / "two")
    assert not set(first.values()) & set(other.values())


def test_an_image_does_not_depend_on_how_many_there_are(root: Path, tmp_path: Path) -> None:
    shapes.generate(tmp_path, num_train=4, num_val=2, size=128, seed=0)
    few, many = digests(tmp_path), digests(root)
    images = [name for name in few if name.endswith(".jpg")]
    assert len(images) == 6
    assert all(few[name] == many[name] for name in images)


def test_no_two_images_are_the_same(root: Path) -> None:
    images = [digest for name, digest in digests(root).items() if name.endswith(".jpg")]
    assert len(images) == 200 == len(set(images))
    assert not {i["id"] for i in load(root, "train")["images"]} & {i["id"] for i in load(root, "val")["images"]}


@pytest.mark.parametrize(("split", "number"), [("train", 150), ("val", 50)])
def test_valid_coco(root: Path, split: str, number: int) -> None:
    coco = COCO(str(root / "annotations" / f"{split}.json"))
    images, annotations = coco.imgs, list(coco.anns.values())
    assert len(images) == number == len(list((root / split).glob("*.jpg")))
    assert len(annotations) == len(coco.dataset["annotations"])  # ids are unique
    assert sorted(coco.getCatIds()) == [3, 7, 8, 21, 90]
    assert {one["category_id"] for one in annotations} == set(coco.getCatIds())
    for image in images.values():
        with Image.open(root / split / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"])
    for one in annotations:
        image = images[one["image_id"]]
        x, y, w, h = one["bbox"]
        assert all(isinstance(number, float) for number in one["bbox"])
        assert x >= 0
        assert y >= 0
        assert w > 0
        assert h > 0
        assert x + w <= image["width"]
        assert y + h <= image["height"]
        assert 0.15 * w * h < one["area"] <= w * h


def test_has_what_real_data_have(root: Path) -> None:
    data = load(root, "train")
    ids = [image["id"] for image in data["images"]]
    assert max(ids) - min(ids) + 1 > len(ids)
    assert {(image["height"], image["width"]) for image in data["images"]} == {(128, 128), (96, 128), (128, 96)}
    crowds = [one for one in data["annotations"] if one["iscrowd"]]
    singles = [one for one in data["annotations"] if not one["iscrowd"]]
    empty = set(ids) - {one["image_id"] for one in data["annotations"]}
    assert 0.01 < len(crowds) / len(ids) < 0.12
    assert 0.01 < len(empty) / len(ids) < 0.12
    longest = [max(one["bbox"][2:]) for one in singles]
    assert min(longest) < 16
    assert max(longest) > 64
    assert max(np.bincount([one["image_id"] for one in singles])) == 7


def test_shapes_overlap_little_and_never_enter_a_crowd(root: Path) -> None:
    data = load(root, "train")
    pairs = 0
    for image in data["images"]:
        objects = [one for one in data["annotations"] if one["image_id"] == image["id"]]
        for i, one in enumerate(objects):
            for other in objects[:i]:
                pairs += 1
                iou = shapes._iou(one["bbox"], other["bbox"])
                # Boxes are of the visible part, so hiding more of a shape can raise the overlap a little.
                assert iou < shapes.MAX_IOU + 0.1
                if one["iscrowd"] or other["iscrowd"]:
                    assert iou == 0
    assert pairs > 300


def test_measure_is_tight_to_the_pixel() -> None:
    mask = np.zeros((10, 12), bool)
    mask[3:7, 5] = True
    mask[6, 5:9] = True
    assert shapes.measure(mask) == ([5.0, 3.0, 4.0, 4.0], 7.0)
    assert shapes.measure(np.ones((2, 3), bool)) == ([0.0, 0.0, 3.0, 2.0], 6.0)


def test_boxes_fit_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a flat background the pixels tell the box without a mask."""

    def flat(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
        return np.zeros((height, width))

    monkeypatch.setattr(shapes, "_texture", flat)
    errors = []
    for index in range(200):
        pixels, objects = shapes.draw(seed=1, split="val", index=index, size=128)
        if len(objects) == 1:
            image = pixels.astype(float)
            background = np.median(image, axis=(0, 1)) if objects[0]["area"] < 0.3 * image[..., 0].size else image[0, 0]
            distance = np.linalg.norm(image - background, axis=2)
            seen, _ = shapes.measure(distance > 0.5 * np.percentile(distance[distance > 60], 50))
            errors.append([b - a for a, b in zip(edges(objects[0]["bbox"]), edges(seen), strict=True)])
    assert len(errors) > 15
    assert np.abs(errors).max() <= 1  # noise decides on pixels that are half covered
    assert np.abs(np.mean(errors, axis=0)).max() < 0.2


def test_second_call_keeps_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes.generate(tmp_path, num_train=2, num_val=1, size=64)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    shapes.generate(tmp_path, num_train=2, num_val=1, size=64)
    assert "already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_interrupted_call_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        original = shapes.draw

        def stop(**given: Any) -> Any:
            if given["split"] == "val":
                raise KeyboardInterrupt
            return original(**given)

        patch.setattr(shapes, "draw", stop)
        with pytest.raises(KeyboardInterrupt):
            shapes.generate(tmp_path, num_train=2, num_val=1, size=64)
    assert list((tmp_path / "train").glob("*.jpg"))
    assert not list(tmp_path.rglob("*.json"))
    shapes.generate(tmp_path, num_train=2, num_val=1, size=64)
    assert len(load(tmp_path, "val")["images"]) == 1


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"num_train": 3}, {"num_val": 2}, {"size": 128}, {"smallest": 20}, {"distractors": 1}]
)
def test_other_parameters_are_refused(tmp_path: Path, other: dict[str, int]) -> None:
    parameters = {"num_train": 2, "num_val": 1, "size": 64, "seed": 0}
    shapes.generate(tmp_path, **parameters)
    before = digests(tmp_path)
    with pytest.raises(InputError, match="delete the folder") as error:
        shapes.generate(tmp_path, **{**parameters, **other})
    assert str(tmp_path) in str(error.value)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("content", ['{"info": {}, "images": []}', "[]", "not json"])
def test_somebody_elses_annotations_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "annotations" / "train.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(InputError, match=r"train\.json .*not generated"):
        shapes.generate(tmp_path, num_train=1, num_val=1, size=64)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_train": 0}, "num_train is 0"),
        ({"num_val": 0}, "num_val is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"size": 66}, "size is 66"),
        ({"size": 32}, "size is 32"),
        ({"smallest": 7}, "smallest is 7"),
        ({"size": 64, "smallest": 33}, "smallest is 33; give 8 to 32"),
        ({"distractors": 9}, "distractors is 9"),
    ],
)
def test_bad_parameters(tmp_path: Path, given: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        shapes.generate(tmp_path / "new", **given)
    assert not (tmp_path / "new").exists()


def test_smallest() -> None:
    """The smallest shapes are as small as asked for, and the octaves from there on are all well filled."""
    sides = []
    for index in range(60):
        _, objects = shapes.draw(seed=0, split="val", index=index, size=128, smallest=8)
        sides += [max(one["bbox"][2:]) for one in objects if not one["iscrowd"]]
    assert 7 <= min(sides) <= 9
    octaves = np.histogram(sides, bins=(7, 16, 32, 64))[0]
    assert octaves.min() > 0.15 * len(sides)  # the large ones less: they find no room more often


def test_distractors() -> None:
    """They are drawn, not annotated, and leave the objects as they are."""
    changed = 0
    for index in range(20):
        plain, objects = shapes.draw(seed=0, split="val", index=index, size=128)
        crowded, same = shapes.draw(seed=0, split="val", index=index, size=128, distractors=8)
        assert [one["category_id"] for one in same] == [one["category_id"] for one in objects]
        for one, other in zip(same, objects, strict=True):  # at most a tenth of an object is covered
            assert one["area"] >= 0.85 * other["area"]
        changed += not np.array_equal(plain, crowded)
    assert changed > 12
