"""tools/check_data.py: all that is wrong in one go, in words, as JSON, and as the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fpn_det import build
from fpn_det.config import load_config
from fpn_det.data.problems import Defect
from fpn_det.data.report import write_report
from fpn_det.structures import InputError


def write(folder: Path, split: str, num_images: int = 30, **parts: Any) -> list[str]:
    """A split of pictures of noise with two boxes each, other lists in place; the overrides that name it."""
    images = folder / split
    images.mkdir(exist_ok=True)
    for i in range(num_images):
        Image.effect_noise((64, 48), 20 + i + 100 * (split == "val")).save(images / f"{i}.jpg")
    content = valid(num_images) | parts
    (folder / f"{split}.json").write_text(json.dumps(content))
    return [f"data.{split}.images={images}", f"data.{split}.annotations={folder / f'{split}.json'}"]


def valid(num_images: int = 30) -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(num_images)],
        "annotations": [
            {"id": i, "image_id": i // 2, "category_id": 1 + i % 2, "bbox": [9, 9, 9, 9]} for i in range(2 * num_images)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


@pytest.fixture
def run(tool, tiny, tmp_path: Path):
    """Run the tool with these overrides after those of `tiny`; its exit code, text, and report."""

    def check(*arguments: str) -> tuple[int, str, dict[str, Any]]:
        outcome = tool("check_data", *tiny, "--output-dir", tmp_path / "out", *arguments)
        assert "Traceback" not in outcome.err
        report = tmp_path / "out/data_report.json"
        return outcome.code, outcome.out, json.loads(report.read_text()) if report.exists() else {}

    return check


def defects(report: dict[str, Any], split: str) -> list[tuple[str, Any]]:
    return [(p["defect"], p["id"]) for p in report["splits"][split]["problems"]]


def test_nothing_wrong(run, tmp_path: Path) -> None:
    code, text, report = run(*write(tmp_path, "train"), *write(tmp_path, "val"))
    assert (code, text.splitlines()[-2]) == (0, "nothing is wrong")
    assert report == {
        "splits": {
            split: {
                "refused": [],
                "annotations": str(tmp_path / f"{split}.json"),
                "images": str(tmp_path / split),
                "num_images": {"in_file": 30, "left_out": 0, "with_boxes": 30, "without_boxes": 0},
                "num_boxes": {"in_file": 60, "crowd": 0, "left_out": 0, "clipped": 0, "used": 60},
                "classes": [{"id": 1, "name": "cat", "num_boxes": 30}, {"id": 2, "name": "dog", "num_boxes": 30}],
                "problems": [],
            }
            for split in ("train", "val")
        },
        "between_splits": [],
    }


def test_images_are_decoded_unless_it_is_to_be_quick(run, tmp_path: Path) -> None:
    """A broken training image is left out with its boxes; of validation, it is reported."""
    overrides = [*write(tmp_path, "train"), *write(tmp_path, "val")]
    (tmp_path / "train/3.jpg").write_bytes(b"junk")
    (tmp_path / "val/4.jpg").write_bytes((tmp_path / "val/4.jpg").read_bytes()[:300])
    (tmp_path / "val/5.jpg").write_bytes((tmp_path / "train/6.jpg").read_bytes())
    assert run(*overrides, "--quick")[0] == 0
    code, text, report = run(*overrides)
    assert code == 1
    assert defects(report, "train") == [("IMAGE_UNREADABLE", 3)]
    assert defects(report, "val") == [("IMAGE_UNREADABLE", 4)]
    assert report["splits"]["train"]["num_boxes"]["left_out"] == 2
    [copy] = report["between_splits"]
    assert (copy["defect"], copy["id"], copy["value"]) == ("IMAGE_SAME_BYTES", 5, "'5.jpg' is '6.jpg'")
    assert f"{tmp_path}/train/3.jpg" in text
    code, text, _ = run(*overrides, "data.drop_limit=0.01")
    assert code == 2
    assert "1 of the 30 images (3.3%) cannot be used, more than data.drop_limit 0.01 allows" in text


def test_all_that_is_wrong_comes_at_once(run, tmp_path: Path) -> None:
    train, val = valid(), valid()
    train["images"][0]["file_name"] = "../secret.jpg"
    train["annotations"][9]["bbox"] = [5, 5, 0, 0]
    train["annotations"][8]["bbox"] = [5, 5, 99, 9]
    val["images"][1] = val["images"][0] | {"width": 3}
    val["annotations"][6]["bbox"] = "text"
    val["categories"].pop()
    code, text, report = run(*write(tmp_path, "train", **train), *write(tmp_path, "val", **val), "model.num_classes=7")
    assert code == 2
    assert defects(report, "train") == [("IMAGE_ESCAPES", 0), ("BOX_LARGE", 8), ("BOX_EMPTY", 9)]
    assert {name for name, _ in defects(report, "val")} == {
        "IMAGE_AMBIGUOUS",
        "UNKNOWN_IMAGE",
        "UNKNOWN_CATEGORY",
        "BOX_MALFORMED",
    }
    assert len(report["splits"]["train"]["refused"]) == 1
    assert "model.num_classes is 7" in report["splits"]["train"]["refused"][0]
    complete, truth, categories = report["splits"]["val"]["refused"]
    assert "2 of the 30 images cannot be used, but a validation set must be complete" in complete
    assert "images[1] repeats the id 0" in truth
    assert "define different categories" in categories
    assert all(reason in text for reason in (complete, truth, categories))


def test_a_split_that_cannot_be_read_does_not_hide_the_other(run, tmp_path: Path) -> None:
    train = write(tmp_path, "train", annotations=[{}])
    code, text, report = run(*train, "data.val.annotations=nowhere.json")
    assert code == 2
    assert report["splits"]["val"].keys() == {"refused"}
    assert "nowhere.json: cannot be read" in text
    assert ("UNKNOWN_IMAGE", None) in defects(report, "train")
    assert run("data.train.annotations=nowhere.json", "data.val.annotations=nowhere.json")[0] == 2


def test_an_image_in_both_splits_is_reported_once(run, tmp_path: Path) -> None:
    """By its path, which says more than that the bytes are the same."""
    train = write(tmp_path, "train")
    val = write(tmp_path, "val", images=valid(4)["images"][1:], annotations=[])
    val.append(f"data.val.images={tmp_path / 'train'}")
    code, _, report = run(*train, *val)
    assert code == 1
    assert [(p["defect"], p["id"]) for p in report["between_splits"]] == [("IMAGE_IN_BOTH", i) for i in (1, 2, 3)]


def test_the_same_file_twice_is_said_and_allowed(run, tmp_path: Path) -> None:
    """Its images are all copies; that is not said once more."""
    train = write(tmp_path, "train")
    code, text, report = run(*train, *(o.replace("data.train", "data.val") for o in train))
    assert code == 1
    assert [p["defect"] for p in report["between_splits"]] == ["SAME_FILE"]
    assert "training and validation have the same annotation file" in text


def test_links_are_followed_if_the_config_says_so(run, tmp_path: Path) -> None:
    """Training reads what the check reads."""
    overrides = [*write(tmp_path, "train"), *write(tmp_path, "val")]
    target = (tmp_path / "train/0.jpg").rename(tmp_path / "elsewhere.jpg")
    (tmp_path / "train/0.jpg").symlink_to(target)
    code, text, report = run(*overrides, "--quick")
    assert (code, defects(report, "train")) == (1, [("IMAGE_LINK_ESCAPES", 0)])
    assert "data.follow_links=true" in text
    assert run(*overrides, "--quick", "data.follow_links=true")[0] == 0


def test_a_config_that_cannot_be_read(run) -> None:
    assert run("data.drop_limt=0.1") == (2, "", {})


# What training makes of it


@pytest.fixture
def load(tiny, tmp_path: Path):
    """The training data with these lists in the annotation file, read as training does."""

    def read(*overrides: str, **parts: Any):
        return build.load_train_data(
            load_config(Path(tiny[1]), [*tiny[2:], *write(tmp_path, "train", **parts), *overrides])
        )

    return read


def test_training_leaves_out_what_it_may(load) -> None:
    images = valid()["images"]
    images[4] |= {"file_name": "missing.jpg"}
    assert len(load(images=images)) == 29
    for overrides, said in (
        (["data.drop_limit=0.02"], r"1 of the 30 images \(3\.3%\) cannot be used[\s\S]*id 4: 'missing.jpg'"),
        (["data.on_error=fail"], r"1 of its images or annotations cannot be used, and data.on_error is fail"),
    ):
        with pytest.raises(InputError, match=said):
            load(*overrides, images=images)
    for image in images:
        image["file_name"] += ".x"
    with pytest.raises(InputError, match=r"30 of the 30 images of .* are missing, .*Set data\.train\.images"):
        load(images=images)


def test_validation_is_complete_or_refused(tiny, tmp_path: Path) -> None:
    overrides = write(tmp_path, "val")
    config = load_config(Path(tiny[1]), [*tiny[2:], *overrides, "data.drop_limit=1"])
    assert len(build.load_val_data(config)) == 30
    (tmp_path / "val/7.jpg").unlink()
    with pytest.raises(InputError, match=r"must be complete[\s\S]*id 7: '7\.jpg'"):
        build.load_val_data(config)


def test_the_report_of_training(load, tmp_path: Path) -> None:
    """Images without boxes are gone there, but not lost."""
    annotations = valid()["annotations"]
    annotations[:4] = [annotations[0] | {"bbox": [1, 1, 0, 1]}]
    data = load("data.keep_empty=false", annotations=annotations)
    assert len(data) == 28
    write_report(tmp_path / "new/report.json", {"train": data, "val": None}, refused={"val": ["why"]})
    report = json.loads((tmp_path / "new/report.json").read_text())["splits"]
    assert report["train"]["num_images"] == {"in_file": 30, "left_out": 0, "with_boxes": 28, "without_boxes": 2}
    assert report["train"]["num_boxes"] == {"in_file": 57, "crowd": 0, "left_out": 1, "clipped": 0, "used": 56}
    assert [p["defect"] for p in report["train"]["problems"]] == [Defect.BOX_EMPTY.name]
    assert report["val"] == {"refused": ["why"]}
