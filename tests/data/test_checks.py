"""How much may be left out, and whether the splits go together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fpn_det.data.checks import check_same_categories, compare_splits, train_refusals, val_refusals
from fpn_det.data.coco import CocoAnnotations, load_coco
from fpn_det.data.problems import Defect
from fpn_det.structures import InputError


def load(folder: Path, name: str = "train", num_images: int = 20, image_folder: str = "images", **parts: Any) -> Any:
    """20 images of one box each, with other lists in place."""
    (folder / image_folder).mkdir(exist_ok=True)
    for i in range(num_images):
        (folder / image_folder / f"{i}.jpg").touch()
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(num_images)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [1 + i, 2, 30, 4]} for i in range(num_images)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content | parts))
    return load_coco(path, folder / image_folder)


def spoil(data: list[dict[str, Any]], number: int, **changes: Any) -> list[dict[str, Any]]:
    return [entry | changes if i < number else entry for i, entry in enumerate(data)]


@pytest.fixture
def valid(tmp_path: Path) -> dict[str, Any]:
    load(tmp_path)
    return json.loads((tmp_path / "train.json").read_text())


def refusals(data: CocoAnnotations, on_error: Any = "drop", drop_limit: float = 0.1) -> list[str]:
    return train_refusals(data, on_error=on_error, drop_limit=drop_limit)


def test_good_data_are_used(tmp_path: Path) -> None:
    data = load(tmp_path)
    assert refusals(data, "fail", 0) == val_refusals(data) == []


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("images", {"width": 0}, "3 of the 20 images (15.0%) cannot be used, more than data.drop_limit 0.1 allows"),
        ("annotations", {"bbox": None}, "3 of the 20 boxes (15.0%) cannot be used, more than data.drop_limit 0.1"),
    ],
)
def test_the_limit_holds_for_images_and_boxes(
    tmp_path: Path, valid: dict[str, Any], name: str, changes: dict[str, Any], said: str
) -> None:
    at_limit, beyond = (load(tmp_path, **{name: spoil(valid[name], n, **changes)}) for n in (2, 3))
    assert refusals(at_limit) == []
    assert f"{tmp_path}/train.json: {said}" in refusals(beyond)[0]
    assert refusals(beyond, drop_limit=0.15) == []
    [message] = refusals(at_limit, "fail", 1)
    assert message.endswith(
        "2 of its images or annotations cannot be used, and data.on_error is fail. Correct them, or train without "
        "them with data.on_error=drop"
    )


def test_the_boxes_of_lost_images_are_lost(tmp_path: Path, valid: dict[str, Any]) -> None:
    data = load(tmp_path, images=spoil(valid["images"], 3, width=0))
    images, boxes = refusals(data)
    assert "3 of the 20 images (15.0%)" in images
    assert "3 of the 20 boxes (15.0%)" in boxes


def test_images_without_boxes_are_not_lost(tmp_path: Path, valid: dict[str, Any]) -> None:
    data = load(tmp_path, annotations=valid["annotations"][:5])
    assert refusals(data, "fail", 0) == []
    assert data.without_empty().num_images_lost == 0


def test_repeated_entries_are_no_loss(tmp_path: Path, valid: dict[str, Any]) -> None:
    data = load(tmp_path, images=valid["images"] * 2)
    assert refusals(data) == []
    assert refusals(data, "fail")


def test_clipped_boxes_and_warnings_refuse_nothing(tmp_path: Path, valid: dict[str, Any]) -> None:
    boxes = spoil(valid["annotations"], 20, bbox=[-5, 2, 30, 4], id=1)
    data = load(tmp_path, annotations=boxes, categories=[*valid["categories"], {"id": 2, "name": "dog"}])
    assert {p.defect for p in data.problems} == {
        Defect.BOX_PARTLY_OUTSIDE,
        Defect.ANNOTATION_ID_REPEATED,
        Defect.CATEGORY_EMPTY,
    }
    assert refusals(data, "fail", 0) == []


def test_without_images_or_boxes_there_is_one_reason(tmp_path: Path, valid: dict[str, Any]) -> None:
    missing = load(tmp_path, images=[i | {"file_name": f"x{i['id']}"} for i in valid["images"]])
    unusable = load(tmp_path, images=spoil(valid["images"], 20, width=0))
    flat = load(tmp_path, annotations=spoil(valid["annotations"], 20, bbox=[1, 2, 0, 0]))
    for data, said in (
        (missing, "20 of the 20 images of {}/train.json are missing, first 'x0'. Set data.train.images"),
        (unusable, "{}/train.json: none of the 20 images can be used"),
        (flat, "{}/train.json: no usable box, so nothing to train on; set data.train.annotations"),
    ):
        [message] = refusals(data, "fail", 0)
        assert said.format(tmp_path) in message
    assert len(val_refusals(missing)) == len(val_refusals(unusable)) == 1


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"categories": [{"id": 1, "name": "cat"}] * 3}, "2 x category with an `id` that another category has ('cat')"),
        ({"categories": [{"id": 1, "name": "cat"}, {}]}, "1 x category with no integer `id` or no text `name` ({})"),
        (
            {"annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [33, 9, 60, 40]} for i in range(20)]},
            "the boxes look like [x1, y1, x2, y2], not [x, y, width, height] (100.0% of 20 boxes",
        ),
    ],
)
def test_whole_files_are_refused_whatever_is_allowed(tmp_path: Path, parts: dict[str, Any], said: str) -> None:
    """Validation files too."""
    data = load(tmp_path, **parts)
    [message] = refusals(data, drop_limit=1)
    assert said in message
    assert val_refusals(data) == [message]


def test_every_image_of_validation_is_needed(tmp_path: Path, valid: dict[str, Any]) -> None:
    """Unusable boxes are for the evaluation to judge, which reads the file itself."""
    one_less = load(tmp_path, images=spoil(valid["images"], 1, file_name="x.jpg"))
    [message] = val_refusals(one_less)
    assert "1 of the 20 images cannot be used, but a validation set must be complete" in message
    assert val_refusals(load(tmp_path, annotations=spoil(valid["annotations"], 9, bbox=[1, 2, 0, 0]))) == []


def test_categories_of_both_splits_must_agree(tmp_path: Path) -> None:
    cat, dog = {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}
    both, swapped = load(tmp_path, categories=[cat, dog]), load(tmp_path, "val", categories=[dog, cat])
    check_same_categories(both, swapped)  # the order of the list means nothing
    renamed = load(tmp_path, "val", categories=[cat, {"id": 2, "name": "\x1bwolf"}])
    said = r"only in the first [(2, 'dog')], only in the second [(2, '\x1bwolf')]"
    with pytest.raises(InputError, match=re.escape(said)):
        check_same_categories(both, renamed)
    many = load(tmp_path, "val", categories=[{"id": i, "name": "x" * 500} for i in range(1000)])
    with pytest.raises(InputError, match="different categories") as caught:
        check_same_categories(both, many)
    assert len(str(caught.value)) < 1500


def test_images_in_both_splits_are_found_by_their_paths(tmp_path: Path, valid: dict[str, Any]) -> None:
    """However the folder and the names are written."""
    train = load(tmp_path, images=[i | {"file_name": f"./{i['file_name']}"} for i in valid["images"][:3]])
    (tmp_path / "link").symlink_to("images")
    val = load(tmp_path, "val", image_folder="link")
    found = compare_splits(train, val)
    assert [(p.defect, p.id) for p in found] == [(Defect.IMAGE_IN_BOTH, i) for i in range(3)]
    assert found[0].value == repr(str((tmp_path / "images/0.jpg").resolve())) or "..." in found[0].value
    assert compare_splits(train, load(tmp_path, "val", image_folder="others")) == []


def test_two_splits_of_one_file_are_one_warning(tmp_path: Path) -> None:
    data = load(tmp_path)
    (tmp_path / "val.json").hardlink_to(tmp_path / "train.json")
    for val in (data, load_coco(tmp_path / "val.json", data.folder)):
        assert [p.defect for p in compare_splits(data, val)] == [Defect.SAME_FILE]
