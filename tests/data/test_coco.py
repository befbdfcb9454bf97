"""COCO files as flat tensors: what is kept, what is left out and said, and one clear message for a bad file."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fpn_det.data import cache, coco
from fpn_det.data.coco import CLIP_TOLERANCE_PX, CocoAnnotations, load_coco, read_categories
from fpn_det.data.problems import Defect, format_problems
from fpn_det.structures import InputError

WIDTH, HEIGHT = 64, 48


def image(image_id: Any = 1, name: Any = "a.jpg", **other: Any) -> dict[str, Any]:
    return {"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT, **other}


def box(bbox: Any, **other: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 1, "bbox": bbox, "iscrowd": 0, **other}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with the (empty) files a.jpg and b.jpg; loading annotations decodes nothing."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).touch()
    return folder


def write(folder: Path, content: bytes | None = None, **parts: Any) -> Path:
    """An annotation file beside `folder`: these bytes, or a valid file with these lists replaced."""
    whole = {"images": [image()], "annotations": [box([1, 2, 3, 4])], "categories": [{"id": 1, "name": "cat"}]}
    path = folder.parent / "annotations.json"
    path.write_bytes(json.dumps(whole | parts).encode() if content is None else content)
    return path


def load(folder: Path, **parts: Any) -> CocoAnnotations:
    return load_coco(write(folder, **parts), folder)


def found(data: CocoAnnotations) -> list[tuple[Defect, Any]]:
    """What is wrong, less categories without a box, which most of these small files have."""
    return [(p.defect, p.id) for p in data.problems if p.defect is not Defect.CATEGORY_EMPTY]


def refusal(folder: Path, content: bytes | None = None, **parts: Any) -> str:
    """The message about a bad file; it is one line, of bounded length, that starts with a path."""
    path = write(folder, content, **parts)
    with pytest.raises(InputError) as caught:
        load_coco(path, folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert message.startswith((f"{path}: ", f"{folder}: "))
    return message


# What is kept


def test_boxes_labels_and_names_go_to_their_images(folder: Path) -> None:
    """Annotations in any order; within an image they keep the file's order."""
    data = load(
        folder,
        images=[image(30, "b.jpg"), image(-4, "a.jpg", width=640, height=480)],
        categories=[{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
        annotations=[
            box([1, 2, 3, 4], image_id=-4, category_id=9),
            box([5, 6, 7, 8], image_id=30, category_id=2),
            box([0, 0, 640, 480], image_id=-4, category_id=2),
        ],
    )
    assert len(data) == 2
    assert data.image_ids.tolist() == [30, -4]
    assert data.sizes.tolist() == [[48, 64], [480, 640]]
    assert [data.path(i) for i in range(2)] == [folder / "b.jpg", folder / "a.jpg"]
    assert data.targets(0)[0].tolist() == [[5, 6, 12, 14]]
    assert data.targets(0)[1].tolist() == [0]
    assert data.targets(1)[0].tolist() == [[1, 2, 4, 6], [0, 0, 640, 480]]
    assert data.targets(1)[1].tolist() == [1, 0]
    assert data.boxes.dtype == torch.float32
    assert (data.image_ids.dtype, data.labels.dtype) == (torch.int64, torch.int64)
    assert data.problems == ()


def test_category_ids_of_any_kind_map_both_ways(folder: Path) -> None:
    ids = [7, 0, -3, 2**70, 1]
    data = load(
        folder,
        categories=[{"id": i, "name": f"class {i}"} for i in ids],
        annotations=[box([1, 1, 2, 2], category_id=i) for i in ids],
    )
    assert data.categories.ids == (-3, 0, 1, 7, 2**70)
    assert data.categories.names == tuple(f"class {i}" for i in data.categories.ids)
    assert [data.categories.ids[label] for label in data.labels.tolist()] == ids


def test_names_with_folders_and_any_characters(folder: Path) -> None:
    undecodable = os.fsdecode(b"\xff\x80.jpg")
    names = ["sub/deeper/a.jpg", "höhe 数.jpg", "🦕.jpg", "a.jpg", undecodable]
    (folder / "sub/deeper").mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    data = load(folder, images=[image(i, name) for i, name in enumerate(names)], annotations=[])
    assert [data.path(i) for i in range(len(names))] == [folder / name for name in names]
    assert all(data.path(i).is_file() for i in range(len(names)))


def test_nothing_but_tensors_grows_with_the_data(folder: Path) -> None:
    """Workers share tensors; a list of Python objects would be copied into each."""
    n = 500
    for i in range(n):
        (folder / f"{i:03}.x").touch()
    data = load(
        folder,
        images=[image(i, f"{i:03}.x") for i in range(n)],
        annotations=[box([1, 1, 2, 2], image_id=i % n) for i in range(3 * n)],
    )
    small = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    tensors = {name: small.pop(name) for name in list(small) if isinstance(small[name], Tensor)}
    assert set(small) == {"source", "folder", "categories", "problems", *coco.COUNTS}
    assert len(small["problems"]) == 0
    assert sum(t.nbytes for t in tensors.values()) == n * (5 + 8 + 8 + 16 + 8) + 16 + 3 * n * (16 + 8)
    owned = [t.untyped_storage().nbytes() for t in tensors.values()]
    assert owned == [t.nbytes for t in tensors.values()], "a view that keeps a larger tensor alive"


def test_crowd_boxes_are_left_out_and_counted(folder: Path) -> None:
    data = load(folder, annotations=[box([1, 1, 9, 9], iscrowd=1), box([2, 2, 2, 2]), box([1, 1, 9, 9], iscrowd=True)])
    assert data.boxes.tolist() == [[2, 2, 4, 4]]
    assert data.num_crowd == 2
    assert data.problems == ()
    assert "2 crowd boxes" in data.summary()


def test_images_without_boxes_are_kept_or_removed_at_wish(folder: Path) -> None:
    images = [image(1), image(2, "b.jpg"), image(3), image(4, "b.jpg", width=10), image(5)]
    annotations = [box([1, 1, 2, 2], image_id=4), box([3, 3, 2, 2], image_id=2), box([5, 5, 2, 2], image_id=4)]
    data = load(folder, images=images, annotations=annotations)
    assert [len(data.targets(i)[0]) for i in range(5)] == [0, 1, 0, 2, 0]
    assert data.targets(0)[0].shape == (0, 4)
    assert "5 images (3 without boxes)" in data.summary()
    kept = data.without_empty()
    assert kept.image_ids.tolist() == [2, 4]
    assert kept.sizes.tolist() == [[48, 64], [48, 10]]
    assert [kept.path(i).name for i in range(2)] == ["b.jpg", "b.jpg"]
    for old, new in ((1, 0), (3, 1)):
        assert torch.equal(kept.targets(new)[0], data.targets(old)[0])
        assert torch.equal(kept.targets(new)[1], data.targets(old)[1])


def test_a_data_set_without_any_box_can_be_loaded_and_emptied(folder: Path) -> None:
    data = load(folder, annotations=[])
    assert (len(data), data.boxes.shape, data.labels.shape) == (1, (0, 4), (0,))
    assert data.targets(0)[0].shape == (0, 4)
    assert len(data.without_empty()) == 0


# Boxes that cannot be used


@pytest.mark.parametrize(
    ("bbox", "defect"),
    [
        ("[NaN, 1, 2, 3]", Defect.BOX_NOT_FINITE),
        ("[1, 2, Infinity, 3]", Defect.BOX_NOT_FINITE),
        ("[1, -Infinity, 2, 3]", Defect.BOX_NOT_FINITE),
        ("[1, 2, 1e999, 3]", Defect.BOX_NOT_FINITE),
        (f"[1, 2, {'9' * 400}, 3]", Defect.BOX_NOT_FINITE),
        (f"[-{'9' * 400}, 2, 3, 3]", Defect.BOX_NOT_FINITE),
        ('[1, 2, "3", 4]', Defect.BOX_NOT_FINITE),
        ("[1, 2, true, 4]", Defect.BOX_NOT_FINITE),
        ("[1, 2, null, 4]", Defect.BOX_NOT_FINITE),
        ("[[1], 2, 3, 4]", Defect.BOX_NOT_FINITE),
        ("null", Defect.BOX_MALFORMED),
        ("[]", Defect.BOX_MALFORMED),
        ("[1, 2, 3]", Defect.BOX_MALFORMED),
        ("[1, 2, 3, 4, 5]", Defect.BOX_MALFORMED),
        ('"1 2 3 4"', Defect.BOX_MALFORMED),
        ('{"x": 1}', Defect.BOX_MALFORMED),
        (str(list(range(5000))), Defect.BOX_MALFORMED),
        ("[5, 5, 0, 3]", Defect.BOX_EMPTY),
        ("[5, 5, 3, 0.0]", Defect.BOX_EMPTY),
        ("[5, 5, -3, 3]", Defect.BOX_INVERTED),
        ("[5, 5, 3, -3]", Defect.BOX_INVERTED),
        ("[10, 10, 1e-20, 3]", Defect.BOX_THIN),
        ("[0, 0, 1e-320, 3]", Defect.BOX_THIN),
        ("[63.99999999, 0, 1, 1]", Defect.BOX_THIN),
        ("[64, 5, 3, 3]", Defect.BOX_OUTSIDE),
        ("[5, 48, 3, 3]", Defect.BOX_OUTSIDE),
        ("[-3, 5, 3, 3]", Defect.BOX_OUTSIDE),
        ("[5, -9, 3, 3]", Defect.BOX_OUTSIDE),
        ("[1e308, 1, 1e308, 3]", Defect.BOX_OUTSIDE),
    ],
)
def test_a_box_that_cannot_be_used_is_left_out_and_reported(folder: Path, bbox: str, defect: Defect) -> None:
    text = write(folder, annotations=[box("HERE", id=41), box([1, 2, 3, 4], id=42)]).read_text()
    data = load_coco(write(folder, text.replace('"HERE"', bbox).encode()), folder)
    assert data.boxes.tolist() == [[1, 2, 4, 6]]
    assert data.num_boxes_lost == 1
    [problem] = data.problems
    assert (problem.defect, problem.id, problem.position, defect.outcome) == (defect, 41, 0, "left out")
    assert len(problem.value) < 200


@pytest.mark.parametrize(
    ("bbox", "clipped", "defect"),
    [
        ([0, 0, 64, 48], [0, 0, 64, 48], None),
        ([0, 0, 64.6, 48.9], [0, 0, 64, 48], None),
        ([-0.5, -1, 10, 10], [0, 0, 9.5, 9], None),
        ([0, 0, 64 + CLIP_TOLERANCE_PX, 48], [0, 0, 64, 48], None),
        ([0, 0, 65.5, 48], [0, 0, 64, 48], Defect.BOX_LARGE),
        ([0, 0, 10, 49.5], [0, 0, 10, 48], Defect.BOX_LARGE),
        ([-5, 3, 10, 10], [0, 3, 5, 13], Defect.BOX_PARTLY_OUTSIDE),
        ([60, 40, 10, 20], [60, 40, 64, 48], Defect.BOX_PARTLY_OUTSIDE),
        ([-1e308, 1, 1.7e308, 3], [0, 1, 64, 4], Defect.BOX_LARGE),
        ([30, 20, 60, 40], [30, 20, 64, 48], Defect.BOX_CORNERS),
        ([2, 2, 64, 48], [2, 2, 64, 48], Defect.BOX_CORNERS),
        ([30, 20, 65, 40], [30, 20, 64, 48], Defect.BOX_PARTLY_OUTSIDE),  # as corners it reaches beyond, too
        ([30, 20, 30, 40], [30, 20, 60, 48], Defect.BOX_PARTLY_OUTSIDE),  # no width as corners
    ],
)
def test_a_box_partly_outside_is_clipped(
    folder: Path, bbox: list[float], clipped: list[float], defect: Defect | None
) -> None:
    data = load(folder, annotations=[box(bbox, id=7)])
    torch.testing.assert_close(data.boxes, torch.tensor([clipped], dtype=torch.float32))
    assert data.num_boxes_lost == 0
    assert found(data) == ([(defect, 7)] if defect else [])
    assert defect is None or defect.outcome == "clipped"


@pytest.mark.parametrize(
    ("annotation", "defect"),
    [
        (None, Defect.ANNOTATION_MALFORMED),
        ("x" * 1000, Defect.ANNOTATION_MALFORMED),
        ([1, 2], Defect.ANNOTATION_MALFORMED),
        ({}, Defect.UNKNOWN_IMAGE),
        *((box([1, 2, 3, 4], image_id=i, id=8), Defect.UNKNOWN_IMAGE) for i in (99, "1", True, [1])),
        *((box([1, 2, 3, 4], category_id=i, id=8), Defect.UNKNOWN_CATEGORY) for i in (99, 1.0, None, 2**200)),
        *((box([1, 2, 3, 4], iscrowd=i, id=8), Defect.CROWD) for i in ("0", 2, -1, [0], float("nan"))),
    ],
)
def test_an_annotation_of_nothing_is_left_out_and_reported(folder: Path, annotation: Any, defect: Defect) -> None:
    data = load(folder, annotations=[annotation, box([1, 2, 3, 4])])
    assert data.boxes.tolist() == [[1, 2, 4, 6]]
    assert (data.num_boxes_lost, data.num_crowd) == (1, 0)
    [problem] = data.problems
    assert (problem.defect, problem.position, defect.outcome) == (defect, 0, "left out")
    assert len(problem.value) < 200


def test_annotations_that_share_an_id_are_kept_and_reported(folder: Path) -> None:
    ids = [3, 4, 3, None, None, 3, "3", "3", 1.5, 1.5, [1], [1]]
    data = load(folder, annotations=[None, *(box([1, 2, 3, 4], id=i) for i in ids)])
    assert len(data.boxes) == len(ids)
    problems = [p for p in data.problems if p.defect is Defect.ANNOTATION_ID_REPEATED]
    assert [(p.position, p.id, p.value) for p in problems] == [(1, 3, "3 annotations"), (7, "'3'", "2 annotations")]


def grid(make: Callable[[int, int], list[float]]) -> list[dict[str, Any]]:
    """24 annotations all over the image, for the 6 x 4 cells of 10 pixels."""
    return [box(make(10 * i, 10 * j), id=6 * j + i) for j in range(4) for i in range(6)]


def test_boxes_that_are_all_corners_refuse_the_file(folder: Path) -> None:
    """To be told from real boxes, some of which reach beyond their image."""
    corners = grid(lambda x, y: [x + 1, y + 1, x + 9, y + 8])
    data = load(folder, annotations=corners)
    [problem] = [p for p in data.problems if p.defect.outcome == "refused"]
    assert problem.defect is Defect.ALL_CORNERS
    assert problem.value == "62.5% of 24 boxes reach beyond their image, 0.0% as corners"
    few = corners[: coco.MIN_BOXES_TO_JUDGE - 1]
    inverted, beyond = box([9, 9, 5, 5]), box([1, 1, 70, 20])
    true_boxes = grid(lambda x, y: [x + 1, y + 1, 8, 7])
    large = grid(lambda x, y: [1, 2, 40 + x / 3, 30 + y / 5])  # each about as large as the image
    for boxes, refused in (
        (few, False),
        ([*corners[1:], inverted], True),  # a slip of one in 24
        ([*corners[2:], inverted, inverted], False),
        ([*corners[1:], beyond], False),
        (true_boxes, False),
        (large, False),
    ):
        defects = [p.defect for p in load(folder, annotations=boxes).problems]
        assert (Defect.ALL_CORNERS in defects) == refused, boxes


def test_boxes_that_are_all_fractions_refuse_the_file(folder: Path) -> None:
    fractions = grid(lambda x, y: [x / 64, y / 48, 8 / 64, 7 / 48])
    assert Defect.ALL_FRACTIONS in [p.defect for p in load(folder, annotations=fractions).problems]
    mixed = [*fractions[2:], box([1, 1, 2, 2]), box([5, 5, 2, 2])]
    assert Defect.ALL_FRACTIONS not in [p.defect for p in load(folder, annotations=mixed).problems]


# Files that cannot be used


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b" \n\t ", "the file is empty"),
        (b'{"images": [', "it ends at byte 12 in the middle of the JSON"),
        (b'{"images": [{"id": 1}', "it ends at byte 21 in the middle"),
        (b'{"images": [{"id": 1}, {"id', "it ends at byte 27 in the middle"),
        (b'{"images": tr', "it ends at byte 13 in the middle"),
        (b'{"images": []} x', "not valid JSON (Extra data"),
        (b'{"images": [}, "annotations": []}', "not valid JSON (Expecting value"),
        (b"\0\0\0\0", "not valid JSON"),
        (b"\xff\xd8\xff\xe0 a picture", "not valid JSON"),
        (b'{"a": "\xe9"}', "byte 7 is not utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"images": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "got list"),
        (b"null", "got NoneType"),
        (b"3", "got int"),
        (b'{"info": {}, "images": []}', "got keys ['images', 'info']"),
        (b'{"images": {}, "annotations": [], "categories": []}', "got images: {}"),
    ],
)
def test_a_file_that_is_not_coco_is_refused_in_one_line(folder: Path, content: bytes, said: str) -> None:
    assert said in refusal(folder, content)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_json_allows_are_read(folder: Path, encoding: str) -> None:
    text = write(folder, categories=[{"id": 1, "name": "Löwe"}]).read_text()
    assert load_coco(write(folder, text.encode(encoding)), folder).categories.names == ("L\xf6we",)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.json", "No such file"),
        ("images", "it is a folder"),
        ("images/a.jpg/annotations.json", "Not a directory"),
        ("pipe", "it is a pipe or a device"),
        ("loop", "symbolic links"),
    ],
)
def test_an_annotation_file_that_cannot_be_read(folder: Path, name: str, said: str) -> None:
    """A pipe is not waited for."""
    os.mkfifo(folder.parent / "pipe")
    (folder.parent / "loop").symlink_to("loop")
    path = folder.parent / name
    with pytest.raises(InputError, match=rf": cannot be read \(.*{said}.*Set data\.train\.annotations") as caught:
        load_coco(path, folder)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"images": []}, "the list 'images' is empty"),
        ({"categories": []}, "the list 'categories' is empty"),
    ],
)
def test_a_file_without_images_or_categories_is_refused(folder: Path, parts: dict[str, Any], said: str) -> None:
    assert said in refusal(folder, **parts)


@pytest.mark.parametrize(
    ("entry", "defect"),
    [
        ({"id": 1, "name": "b"}, Defect.CATEGORY_ID_REPEATED),
        ({"id": "1", "name": "a"}, Defect.CATEGORY_MALFORMED),
        ({"id": True, "name": "a"}, Defect.CATEGORY_MALFORMED),
        ({"id": 2}, Defect.CATEGORY_MALFORMED),
        (None, Defect.CATEGORY_MALFORMED),
        ({"id": 2, "name": "cat"}, Defect.CATEGORY_NAME_REPEATED),
        ({"id": 2, "name": "dog"}, None),
    ],
)
def test_a_category_that_cannot_be_used_refuses_the_file(folder: Path, entry: Any, defect: Defect | None) -> None:
    """One of the same name does not: it may be meant."""
    path = write(folder, categories=[{"id": 1, "name": "cat"}, entry])
    data = load_coco(path, folder)
    assert [d for d, _ in found(data)] == ([defect] if defect else [])
    assert data.categories.names[0] == "cat"
    if defect is not None and defect.outcome == "refused":
        with pytest.raises(InputError, match=re.escape(defect.reason)):
            read_categories(path)
    else:
        assert read_categories(path).names == data.categories.names


def test_categories_without_a_box_are_reported(folder: Path) -> None:
    categories = [{"id": i, "name": name} for i, name in ((2**70, "dog"), (1, "cat"), (-3, "ape"))]
    problems = load(folder, categories=categories).problems
    assert [(p.defect, p.id, p.value) for p in problems] == [
        (Defect.CATEGORY_EMPTY, -3, "'ape'"),
        (Defect.CATEGORY_EMPTY, "1180591620717411303424", "'dog'"),
    ]


OUTWARD = ["../secret.jpg", "sub/../../a.jpg", "..", "/etc/hostname"]
OUTWARD_ON_WINDOWS = ["C:\\a.jpg", "c:/a.jpg", "\\\\host\\a.jpg", "sub\\..\\a.jpg"]
ABSENT = ["c.jpg", ".", "none/c.jpg", "x" * 300, "sub\\a.jpg", "pipe"]


@pytest.mark.parametrize(
    ("entry", "defect"),
    [
        (None, Defect.IMAGE_MALFORMED),
        ("x" * 9999, Defect.IMAGE_MALFORMED),
        ({"junk": "x" * 9999}, Defect.IMAGE_MALFORMED),
        *((image(i), Defect.IMAGE_MALFORMED) for i in ("1", 1.0, True, None, 2**63, -(2**63) - 1)),
        *((image(5, name), Defect.IMAGE_NAME) for name in (None, 3, "", "a\0b.jpg", "\ud800.jpg")),
        ({"id": 5, "file_name": "a.jpg"}, Defect.IMAGE_SIZE),
        *((image(5, width=w), Defect.IMAGE_SIZE) for w in (0, -64, 64.0, "64", True, None, 2**31, 10**400)),
        (image(5, height=0), Defect.IMAGE_SIZE),
        *(
            (image(5, name), Defect.IMAGE_ESCAPES)
            for name in ("../secret.jpg", "sub/../../a.jpg", "..", "/etc/hostname")
        ),
        *(
            (image(5, name), Defect.IMAGE_ESCAPES)
            for name in ("C:\\a.jpg", "c:/a.jpg", "\\\\host\\a.jpg", "sub\\..\\a.jpg")
        ),
        *(
            (image(5, name), Defect.IMAGE_MISSING)
            for name in ("c.jpg", ".", "none/c.jpg", "x" * 300, "sub\\a.jpg", "pipe")
        ),
        (image(5), Defect.IMAGE_NAME_REPEATED),
        (image(5, "./b.jpg"), None),
        (image(5, "..b.jpg"), None),
    ],
)
def test_an_image_that_cannot_be_used_is_left_out_with_its_boxes(
    folder: Path, entry: Any, defect: Defect | None
) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "..b.jpg").touch()
    boxes = [box([1, 2, 3, 4]), box([1, 2, 3, 4], id=8, image_id=5)]
    data = load(folder, images=[image(), entry], annotations=boxes)
    is_kept = defect is None or defect.outcome == "kept"
    assert data.image_ids.tolist() == ([1, 5] if is_kept else [1])
    assert len(data.boxes) == 1 + is_kept
    assert (data.num_images_lost, data.num_boxes_lost) == (1 - is_kept, 1 - is_kept)
    problems = [p for p in data.problems if p.defect is not Defect.UNKNOWN_IMAGE]
    assert [p.defect for p in problems] == ([defect] if defect else [])
    assert all(len(p.value) < 300 and p.value.isprintable() for p in problems)


def test_images_that_share_an_id(folder: Path) -> None:
    """One that repeats another does no harm; of different ones nobody knows whose the annotations are."""
    images = [image(1), image(2, "b.jpg"), image(1, license=3), image(2), image(3), image(2, "b.jpg")]
    boxes = [box([1, 2, 3, 4], image_id=i, id=i) for i in (1, 2, 3)]
    data = load(folder, images=images, annotations=boxes)
    assert data.image_ids.tolist() == [1, 3]
    assert len(data.boxes) == 2
    assert (data.num_images_in_file, data.num_images_lost, data.num_boxes_lost) == (6, 3, 1)
    assert [(p.defect, p.position) for p in data.problems] == [
        (Defect.IMAGE_AMBIGUOUS, 1),
        (Defect.IMAGE_REPEATED, 2),
        (Defect.IMAGE_AMBIGUOUS, 3),
        (Defect.IMAGE_NAME_REPEATED, 4),
        (Defect.IMAGE_AMBIGUOUS, 5),
    ]


def test_the_outermost_image_ids_are_kept(folder: Path) -> None:
    ids = [-(2**63), 2**63 - 1, 0]
    assert load(folder, images=[image(i) for i in ids]).image_ids.tolist() == ids


@pytest.mark.parametrize("name", ["missing", "images/a.jpg"])
def test_an_image_folder_that_is_none(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"cannot read the image folder \((No such|Not a).*set data\.train\.images"):
        load_coco(write(folder), folder.parent / name)


# What is kept for the next start


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path, Path], CocoAnnotations]:
    """`load_coco` as of the second time: from the cache, which also small files have here, or it fails."""
    monkeypatch.setattr(cache, "MIN_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def load_again(path: Path, folder: Path) -> CocoAnnotations:
        with monkeypatch.context() as patch:
            patch.setattr(coco, "read_coco_json", lambda _: pytest.fail("read the annotation file"))
            return load_coco(path, folder)

    return load_again


def identical(one: CocoAnnotations, other: CocoAnnotations) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)]
    return all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b and type(a) is type(b)
        for a, b in pairs
    )


def awkward(folder: Path) -> Path:
    """A file with every kind of problem, crowd boxes, odd names and category ids, and an image without boxes."""
    name = os.fsdecode(b"sub/h\xff\n.jpg")
    (folder / "sub").mkdir()
    (folder / name).touch()
    bad = [[5, 5, 0, 3], [64, 5, 3, 3], [0, 0, 1e-320, 3], [1, 2, 3], [1, 2, None, 3], [-9, 3, 20, 10]]
    ids = [None, "x", 1.5, 2**70, "\ud800", [[1]]]
    return write(
        folder,
        images=[image(5, name), image(9, "../b.jpg"), image(2**63 - 1), image(1, "b.jpg")],
        categories=[{"id": 2**70, "name": "\ud800"}, {"id": -1, "name": "cat"}],
        annotations=[
            *(box(bbox, id=i, image_id=5, category_id=-1) for bbox, i in zip(bad, ids, strict=True)),
            None,
            box([1, 2, 3, 4], id=7),
            box([1, 2, 3.3, 4], category_id=2**70),
            box([1, 2, 3, 4], category_id=-1, iscrowd=1),
            box([7, 7, 3, 4], category_id=-1, image_id=5),
        ],
    )


def test_a_data_set_is_the_same_from_the_cache(folder: Path, again: Callable[..., CocoAnnotations]) -> None:
    path = awkward(folder)
    first = load_coco(path, folder)
    assert (len(first.boxes), first.num_crowd) == (3, 1)
    ids = [None, "'x'", "1.5", str(2**70), r"'\ud800'", "[[1]]", None, 7]
    assert [i for _, i in found(first)] == [9, *ids], "in the order of the file"
    second = again(path, folder)
    assert identical(first, second)
    assert identical(first.without_empty(), second.without_empty())
    assert format_problems(first.problems) == format_problems(second.problems)


def test_a_data_set_without_boxes_is_the_same_from_the_cache(
    folder: Path, again: Callable[..., CocoAnnotations]
) -> None:
    path = write(folder, annotations=[])
    assert identical(load_coco(path, folder), again(path, folder))


def test_images_are_looked_up_each_time(folder: Path, again: Callable[..., CocoAnnotations]) -> None:
    path = awkward(folder)
    load_coco(path, folder)
    moved = folder.rename(folder.parent / "moved")
    assert again(path, moved).path(1) == moved / "a.jpg"
    (moved / "b.jpg").unlink()
    without = again(path, moved)
    assert (len(without), without.num_images_lost) == (2, 2)
    assert [(p.id, p.value) for p in without.problems if p.defect is Defect.IMAGE_MISSING] == [(1, "'b.jpg'")]
    with pytest.raises(InputError, match="cannot read the image folder"):
        again(path, folder)


def test_an_edited_file_is_read_again(folder: Path, again: Callable[..., CocoAnnotations]) -> None:
    path = write(folder)
    assert load_coco(path, folder).boxes.tolist() == [[1, 2, 4, 6]]
    before = path.stat()
    path.write_text(path.read_text().replace("[1, 2, 3, 4]", "[9, 2, 3, 4]"))
    os.utime(path, ns=(0, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    assert load_coco(path, folder).boxes.tolist() == [[9, 2, 12, 6]]
    assert again(path, folder).boxes.tolist() == [[9, 2, 12, 6]]


def test_images_in_subfolders_take_one_listing_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one call per file, which on a file server takes minutes."""
    names = [f"{part}/{i}.jpg" for part in ("x", "x/y") for i in range(20)] + ["a.jpg"]
    (folder / "x/y").mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    entries = [image(i, name) for i, name in enumerate(names)]
    monkeypatch.setattr(os.path, "isfile", lambda path: pytest.fail(f"looked for {path}"))
    assert len(load(folder, images=entries, annotations=[])) == 41


def test_the_garbage_collector_rests_while_a_file_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is left as it was, whatever happens."""
    original, seen = coco.read_coco_json, []
    monkeypatch.setattr(coco, "read_coco_json", lambda path: seen.append(gc.isenabled()) or original(path))
    for switch in (gc.disable, gc.enable):
        switch()
        load(folder)
        refusal(folder, b"junk")
        assert gc.isenabled() == (switch is gc.enable)
    assert seen == [False] * 4


# Real data


@pytest.mark.parametrize(
    ("split", "num_boxes", "bad"), [("train", 2804, [2288]), ("val", 1137, [887]), ("test", 945, [])]
)
def test_bccd(test_data: Path, split: str, num_boxes: int, bad: list[int]) -> None:
    """The real zero-width boxes are reported by their ids; every other box is the file's own."""
    path, images = test_data / f"bccd/annotations/{split}.json", test_data / "bccd/images"
    data = load_coco(path, images)
    assert found(data) == [(Defect.BOX_EMPTY, i) for i in bad]
    assert len(data.boxes) == num_boxes
    assert data.categories.names == ("RBC", "WBC", "Platelets")
    content = json.loads(path.read_bytes())
    for index, entry in enumerate(content["images"]):
        own = [a for a in content["annotations"] if a["image_id"] == entry["id"] and a["id"] not in bad]
        boxes, labels = data.targets(index)
        assert data.path(index) == images / entry["file_name"]
        assert data.sizes[index].tolist() == [entry["height"], entry["width"]]
        assert [data.categories.ids[i] for i in labels.tolist()] == [a["category_id"] for a in own]
        for got, (x, y, w, h) in zip(boxes.tolist(), [a["bbox"] for a in own], strict=True):
            assert got == [max(x, 0), max(y, 0), min(x + w, entry["width"]), min(y + h, entry["height"])]


def test_coco_val_subset(test_data: Path, tmp_path: Path) -> None:
    """Category ids with holes and crowd boxes, as COCO has them."""
    path = test_data / "coco_eval/gt.json"
    content = json.loads(path.read_bytes())
    for entry in content["images"]:
        (tmp_path / entry["file_name"]).touch()
    data = load_coco(path, tmp_path)
    assert data.num_crowd == 9
    assert len(data.boxes) == len(content["annotations"]) - 9
    assert {p.defect.outcome for p in data.problems} <= {"clipped", "kept"}, "nor is the file taken for corners"
    assert (len(data.categories), data.categories.ids[0], data.categories.ids[-1]) == (80, 1, 90)
    names = {c["id"]: c["name"] for c in content["categories"]}
    assert dict(zip(data.categories.ids, data.categories.names, strict=True)) == names
    areas = (data.boxes[:, 2:] - data.boxes[:, :2]).prod(1).double().sum().item()
    stated = sum(math.prod(a["bbox"][2:]) for a in content["annotations"] if not a["iscrowd"])
    assert areas == pytest.approx(stated, rel=1e-4)


def test_what_is_cached_belongs_to_its_version(folder: Path) -> None:
    """Red after a change of what is made of a file: raise `CACHE_VERSION`, and write down both here."""
    arrays = coco._pack(load_coco(awkward(folder), folder))
    parts = [f"{name} {a.dtype} {a.shape}".encode() + a.tobytes() for name, a in sorted(arrays.items())]
    assert (coco.CACHE_VERSION, hashlib.sha256(b"".join(parts)).hexdigest()[:16]) == (2, "4c847bda23fa8753")
