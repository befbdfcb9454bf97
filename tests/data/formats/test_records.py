"""COCO-format files in and out: nothing that entries hold is lost, no annotation changes its image or class."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hotcoco import COCO

from fpn_det.data.formats.records import (
    CocoRecords,
    choose_classes,
    find_copies,
    merge_records,
    read_records,
    split_records,
)
from fpn_det.data.problems import Defect
from fpn_det.structures import InputError

CONTENT: dict[str, Any] = {
    "info": {"year": 2017},
    "licenses": [{"id": 4, "name": "MIT", "url": "u"}],
    "images": [
        {"id": 9 - i, "file_name": f"v{i % 2}_{i}.jpg", "width": 64, "height": 48, "license": 4, "flickr": i}
        for i in range(6)
    ],
    "annotations": [
        {
            "id": 70 + i,
            "image_id": 9 - i % 5,
            "category_id": 3 + 4 * (i % 3),
            "bbox": [i, 2, 3, 4],
            "area": 7.5,
            "iscrowd": int(i == 8),
            "segmentation": [[1, 2, 3, 4, 5, i]],
            "attributes": {"hidden": i},
        }
        for i in range(10)
    ],
    "categories": [
        {"id": 11, "name": "bus", "supercategory": "vehicle"},
        {"id": 3, "name": "car", "supercategory": "vehicle"},
        {"id": 7, "name": "cat", "keypoints": ["nose"]},
    ],
    "scene": "street",
}


def read(folder: Path, name: str = "coco", **changes: Any) -> CocoRecords:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(CONTENT | changes))
    records, problems = read_records(path)
    assert problems == []
    return records


def meaning(records: CocoRecords) -> Counter[str]:
    """What the annotations say, in whatever order and with whatever ids: everything with names instead."""
    files = {image["id"]: image["file_name"] for image in records.images}
    names = {category["id"]: category["name"] for category in records.categories}
    assert len(files) == len(records.images)
    assert len({a["id"] for a in records.annotations}) == len(records.annotations)
    return Counter(
        json.dumps(
            {k: v for k, v in a.items() if k not in ("id", "image_id", "category_id")}
            | {"file": files[a["image_id"]], "class": names[a["category_id"]]},
            sort_keys=True,
        )
        for a in records.annotations
    )


def test_reading_and_writing_changes_nothing(tmp_path: Path) -> None:
    read(tmp_path).write(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == CONTENT


def test_entries_that_are_none(tmp_path: Path) -> None:
    image, annotation = CONTENT["images"][0], CONTENT["annotations"][0]
    changes = {
        "images": [
            image,
            image,
            {**image, "id": 1},
            {**image, "id": 1, "width": 1},
            5,
            {**image, "id": 2, "file_name": 3},
        ],
        "annotations": [
            annotation,
            {**annotation, "image_id": 1},
            {**annotation, "image_id": 99},
            {**annotation, "image_id": "9"},
            {**annotation, "category_id": 99},
            {**annotation, "bbox": None},
            "x",
        ],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(CONTENT | changes))
    records, problems = read_records(path)
    assert records.images == [image]
    assert records.annotations == [annotation, {**annotation, "bbox": None}]  # boxes are for the reader of the result
    assert [(p.defect, p.position) for p in problems] == [
        (Defect.IMAGE_REPEATED, 1),
        (Defect.IMAGE_AMBIGUOUS, 2),
        (Defect.IMAGE_AMBIGUOUS, 3),
        (Defect.IMAGE_MALFORMED, 4),
        (Defect.IMAGE_NAME, 5),
        (Defect.UNKNOWN_IMAGE, 2),
        (Defect.UNKNOWN_IMAGE, 3),
        (Defect.UNKNOWN_CATEGORY, 4),
        (Defect.ANNOTATION_MALFORMED, 6),
    ]


# Dividing


def test_parts_are_the_whole(tmp_path: Path) -> None:
    records = read(tmp_path)
    parts = split_records(records, {"train": 0.5, "val": 0.5}, seed=0)
    train, val = parts.values()
    assert (len(train.images), len(val.images)) == (3, 3)
    assert sorted(i["id"] for p in parts.values() for i in p.images) == [4, 5, 6, 7, 8, 9]
    assert meaning(train) + meaning(val) == meaning(records)
    for part in parts.values():
        assert part.categories == CONTENT["categories"]
        assert part.rest == {key: CONTENT[key] for key in ("info", "licenses", "scene")}
        assert part.images == [image for image in CONTENT["images"] if image in part.images]  # order of the file


def test_the_division_is_that_of_names_and_seed(tmp_path: Path) -> None:
    def files(records: CocoRecords, seed: int) -> list[set[str]]:
        parts = split_records(records, {"train": 0.5, "val": 0.5}, seed=seed)
        return [{image["file_name"] for image in part.images} for part in parts.values()]

    renumbered = {
        "images": [{**image, "id": image["id"] * 3} for image in CONTENT["images"]][::-1],
        "annotations": [{**a, "image_id": a["image_id"] * 3} for a in CONTENT["annotations"]][::-1],
    }
    records, other = read(tmp_path), read(tmp_path, "other", **renumbered)
    assert [files(records, seed) for seed in range(4)] == [files(other, seed) for seed in range(4)]
    assert len({str(files(records, seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("expression", [r"^(v\d)_", r"^v\d_"])
def test_groups_stay_together(tmp_path: Path, expression: str) -> None:
    for seed in range(4):
        parts = split_records(read(tmp_path), {"train": 0.5, "val": 0.5}, seed=seed, group_by=expression)
        videos = [{image["file_name"][:2] for image in part.images} for part in parts.values()]
        assert sorted(map(str, videos)) == ["{'v0'}", "{'v1'}"]


def test_images_without_a_group_are_alone(tmp_path: Path) -> None:
    for expression in ("nowhere", "v(x)?"):
        parts = split_records(read(tmp_path), {"train": 0.5, "val": 0.5}, seed=0, group_by=expression)
        assert [len(part.images) for part in parts.values()] == [3, 3]


def test_entries_of_one_file_stay_together(tmp_path: Path) -> None:
    records = read(tmp_path, images=[{**image, "file_name": f"{image['id'] // 2}.jpg"} for image in CONTENT["images"]])
    for seed in range(4):
        train, val = split_records(records, {"train": 0.5, "val": 0.5}, seed=seed).values()
        assert not {i["file_name"] for i in train.images} & {i["file_name"] for i in val.images}


@pytest.mark.parametrize(
    ("fractions", "group_by", "message"),
    [
        ({"a": 0.5, "b": 0.4}, None, "their sum is 0.9"),
        ({"a": 1.0}, None, "two or more"),
        ({"a": 1.5, "b": -0.5}, None, "between 0 and 1"),
        ({"a": float("nan"), "b": 0.5}, None, "between 0 and 1"),
        ({"a": 0.99, "b": 0.01}, None, "no image is left for 'b': 6 images are too few"),
        ({"a": 0.5, "b": 0.5}, "jpg", "no image is left for '.': 1 groups are too few"),
        ({"a": 0.5, "b": 0.5}, "(", "is no regular expression"),
    ],
)
def test_divisions_that_are_none(tmp_path: Path, fractions, group_by, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_records(read(tmp_path), fractions, seed=0, group_by=group_by)


# Classes


@pytest.mark.parametrize(("keep", "drop"), [(["car", "cat"], []), (None, ["bus"]), (["car", "cat", "bus"], ["bus"])])
def test_choosing_is_what_hotcoco_filters(tmp_path: Path, keep, drop) -> None:
    chosen = choose_classes(read(tmp_path), keep=keep, drop=drop)
    theirs = COCO(str(tmp_path / "coco.json")).filter(cat_ids=[3, 7], drop_empty_images=False).dataset
    assert [a["id"] for a in chosen.annotations] == sorted(a["id"] for a in theirs["annotations"])
    assert chosen.annotations == [a for a in CONTENT["annotations"] if a["category_id"] != 11]
    assert chosen.categories == CONTENT["categories"][1:]
    assert chosen.images == CONTENT["images"]


def test_renaming_and_uniting(tmp_path: Path) -> None:
    records = read(tmp_path)
    chosen = choose_classes(records, rename={"car": "vehicle", "bus": "vehicle", "cat": "dog"})
    assert chosen.categories == [
        {"id": 11, "name": "vehicle", "supercategory": "vehicle"},
        {"id": 7, "name": "dog", "keypoints": ["nose"]},
    ]
    expected = [{**a, "category_id": {3: 11}.get(a["category_id"], a["category_id"])} for a in CONTENT["annotations"]]
    assert chosen.annotations == expected
    assert records.annotations == CONTENT["annotations"]  # not changed in place
    assert choose_classes(records, rename={"car": "cat", "cat": "car"}).class_counts() == {"bus": 3, "cat": 4, "car": 3}


def test_empty_images_can_go(tmp_path: Path) -> None:
    chosen = choose_classes(read(tmp_path), keep=["bus"], drop_empty=True)
    assert {i["id"] for i in chosen.images} == {a["image_id"] for a in chosen.annotations} == {7, 9, 6}
    with pytest.raises(InputError, match="did you mean 'bus'"):
        choose_classes(read(tmp_path), keep=["buss"])
    with pytest.raises(InputError, match="would be left"):
        choose_classes(read(tmp_path), drop=["bus", "car", "cat"])


# Merging


def other(folder: Path, **changes: Any) -> CocoRecords:
    """A second data set: its ids collide with those of the first, one class is common, one licence has another id."""
    categories = [{"id": 3, "name": "dog"}, {"id": 7, "name": "car"}, {"id": 11, "name": "tram"}]
    licenses = [{"id": 4, "name": "CC0", "url": "u"}, {"id": 5, "name": "MIT", "url": "u"}]
    return read(folder, "other", categories=categories, licenses=licenses, **changes)


def prefixed(found: Counter[str], prefix: str) -> Counter[str]:
    return Counter({text.replace('"file": "', f'"file": "{prefix}'): count for text, count in found.items()})


def test_merged_is_the_sum(tmp_path: Path) -> None:
    a, b = read(tmp_path), other(tmp_path)
    merged, root, problems = merge_records([a, b], [tmp_path / "data/a/images", tmp_path / "data/b"])
    assert problems == []
    assert root == tmp_path / "data"
    assert meaning(merged) == prefixed(meaning(a), "a/images/") + prefixed(meaning(b), "b/")
    assert [(c["id"], c["name"]) for c in merged.categories] == [
        *[(11, "bus"), (3, "car"), (7, "cat")],
        *[(12, "dog"), (13, "tram")],
    ]
    assert [i["id"] for i in merged.images] == [*range(1, 13)]
    assert [a["id"] for a in merged.annotations] == [*range(1, 21)]
    assert [i["flickr"] for i in merged.images] == [*range(6)] * 2
    names = {entry["id"]: entry["name"] for entry in merged.rest["licenses"]}
    assert [names[i["license"]] for i in merged.images] == ["MIT"] * 6 + ["CC0"] * 6
    assert len(names) == 2
    assert merged.rest["scene"] == "street"


def test_merged_parts_of_a_division_are_the_whole(tmp_path: Path) -> None:
    records = read(tmp_path)
    parts = split_records(records, {"train": 0.5, "val": 0.5}, seed=0)
    merged, root, problems = merge_records([*parts.values()], [tmp_path, tmp_path])
    assert (root, problems) == (tmp_path, [])
    assert meaning(merged) == meaning(records)


def test_images_in_several_files(tmp_path: Path) -> None:
    a, b = read(tmp_path), other(tmp_path)
    for duplicates, defect, expected in (
        ("fail", Defect.IMAGE_IN_EARLIER, meaning(a)),
        ("first", Defect.IMAGE_IN_EARLIER, meaning(a)),
        ("unite", Defect.IMAGE_UNITED, meaning(a) + meaning(b)),
    ):
        merged, _, problems = merge_records(
            [a, b], [tmp_path / "x/../images", tmp_path / "images"], duplicates=duplicates
        )
        assert [p.defect for p in problems] == [defect] * 6
        assert "coco.json" in problems[0].value
        assert "other.json" in problems[0].value
        assert len(merged.images) == 6
        assert meaning(merged) == expected
    b.images[2] = {**b.images[2], "width": 1}
    with pytest.raises(InputError, match=r"other\.json: 'v0_2.jpg' has width and height .*coco\.json"):
        merge_records([a, b], [tmp_path, tmp_path], duplicates="unite")


def test_copies(tmp_path: Path) -> None:
    for name, content in {"a": "12", "b": "34", "sub/c": "12", "d": "123"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    found = find_copies(tmp_path, ["a", "b", "sub/c", "d", "gone", "nul\0", "a", "sub"])
    assert [(p.defect, p.value) for p in found] == [(Defect.IMAGE_COPY, "'sub/c' is 'a'")]
