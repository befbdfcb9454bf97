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
from fpn_det.data.coco import (
    CLIP_TOLERANCE_PX,
    CocoAnnotations,
    check_same_categories,
    format_problems,
    load_coco,
)
from fpn_det.structures import InputError

WIDTH, HEIGHT = 64, 48


def image(image_id: Any = 1, name: Any = "a.jpg", **other: Any) -> dict[str, Any]:
    return {"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT, **other}


def box(bbox: Any, **other: Any) -> dict[str, Any]:
    return {"id": 7, "image_id": 1, "category_id": 1, "bbox": bbox, "iscrowd": 0, **other}


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


def load(folder: Path, on_error: str = "drop", **parts: Any) -> CocoAnnotations:
    return load_coco(write(folder, **parts), folder, on_error=on_error)


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
    data = load(
        folder,
        images=[image(i) for i in range(n)],
        annotations=[box([1, 1, 2, 2], image_id=i % n) for i in range(3 * n)],
    )
    small = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    tensors = {name: small.pop(name) for name in list(small) if isinstance(small[name], Tensor)}
    assert set(small) == {"source", "folder", "categories", "num_crowd", "problems"}
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

NUMBER = "bbox with a value that is not a finite number"
FORM = "bbox that is not [x, y, width, height]"
AREA = "bbox without area (width or height <= 0)"
THIN = "bbox too thin to have an area in float32"
OUTSIDE = "bbox outside its image"


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [
        ("[NaN, 1, 2, 3]", NUMBER),
        ("[1, 2, Infinity, 3]", NUMBER),
        ("[1, -Infinity, 2, 3]", NUMBER),
        ("[1, 2, 1e999, 3]", NUMBER),
        (f"[1, 2, {'9' * 400}, 3]", NUMBER),
        (f"[-{'9' * 400}, 2, 3, 3]", NUMBER),
        ('[1, 2, "3", 4]', NUMBER),
        ("[1, 2, true, 4]", NUMBER),
        ("[1, 2, null, 4]", NUMBER),
        ("[[1], 2, 3, 4]", NUMBER),
        ("null", FORM),
        ("[]", FORM),
        ("[1, 2, 3]", FORM),
        ("[1, 2, 3, 4, 5]", FORM),
        ('"1 2 3 4"', FORM),
        ('{"x": 1}', FORM),
        (str(list(range(5000))), FORM),
        ("[5, 5, 0, 3]", AREA),
        ("[5, 5, 3, 0.0]", AREA),
        ("[5, 5, -3, 3]", AREA),
        ("[5, 5, 3, -3]", AREA),
        ("[10, 10, 1e-20, 3]", THIN),
        ("[0, 0, 1e-320, 3]", THIN),
        ("[63.99999999, 0, 1, 1]", THIN),
        ("[64, 5, 3, 3]", OUTSIDE),
        ("[5, 48, 3, 3]", OUTSIDE),
        ("[-3, 5, 3, 3]", OUTSIDE),
        ("[5, -9, 3, 3]", OUTSIDE),
        ("[1e308, 1, 1e308, 3]", OUTSIDE),
    ],
)
def test_a_box_that_cannot_be_used_is_dropped_and_reported(folder: Path, bbox: str, reason: str) -> None:
    text = write(folder, annotations=[box("HERE", id=41), box([1, 2, 3, 4], id=42)]).read_text()
    path = write(folder, text.replace('"HERE"', bbox).encode())
    data = load_coco(path, folder)
    assert data.boxes.tolist() == [[1, 2, 4, 6]]
    [problem] = data.problems
    assert (problem.annotation_id, problem.reason, problem.fatal) == (41, reason, True)
    assert len(problem.value) < 100
    with pytest.raises(InputError) as caught:
        load_coco(path, folder, on_error="fail")
    message = str(caught.value)
    assert f"1 x {reason} (not used): annotation 41: {problem.value}\n" in message
    assert str(path) in message
    assert "data.on_error=drop" in message


@pytest.mark.parametrize(
    ("bbox", "clipped", "reported"),
    [
        ([0, 0, 64, 48], [0, 0, 64, 48], False),
        ([0, 0, 64.6, 48.9], [0, 0, 64, 48], False),
        ([-0.5, -1, 10, 10], [0, 0, 9.5, 9], False),
        ([0, 0, 64 + CLIP_TOLERANCE_PX, 48], [0, 0, 64, 48], False),
        ([0, 0, 65.5, 48], [0, 0, 64, 48], True),
        ([-5, 3, 10, 10], [0, 3, 5, 13], True),
        ([60, 40, 10, 20], [60, 40, 64, 48], True),
        ([-1e308, 1, 1.7e308, 3], [0, 1, 64, 4], True),
    ],
)
def test_a_box_partly_outside_is_clipped(folder: Path, bbox: list[float], clipped: list[float], reported: bool) -> None:
    """Also with on_error="fail": the box is of use."""
    data = load(folder, annotations=[box(bbox)], on_error="fail")
    torch.testing.assert_close(data.boxes, torch.tensor([clipped], dtype=torch.float32))
    reasons = [(p.reason, p.fatal) for p in data.problems]
    assert reasons == ([("bbox partly outside its image", False)] if reported else [])


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (None, "not a JSON object"),
        ("x" * 1000, "not a JSON object"),
        ([1, 2], "not a JSON object"),
        ({}, "image_id that the file does not define"),
        (box([1, 2, 3, 4], image_id=99), "image_id that the file does not define"),
        (box([1, 2, 3, 4], image_id="1"), "image_id that the file does not define"),
        (box([1, 2, 3, 4], image_id=True), "image_id that the file does not define"),
        (box([1, 2, 3, 4], image_id=[1]), "image_id that the file does not define"),
        (box([1, 2, 3, 4], category_id=99), "category_id that the file does not define"),
        (box([1, 2, 3, 4], category_id=1.0), "category_id that the file does not define"),
        (box([1, 2, 3, 4], category_id=None), "category_id that the file does not define"),
        (box([1, 2, 3, 4], category_id=2**200), "category_id that the file does not define"),
    ],
)
def test_an_annotation_of_nothing_is_dropped_and_reported(folder: Path, annotation: Any, reason: str) -> None:
    data = load(folder, annotations=[annotation, box([1, 2, 3, 4])])
    assert data.boxes.tolist() == [[1, 2, 4, 6]]
    [problem] = data.problems
    assert (problem.reason, problem.fatal) == (reason, True)
    assert len(problem.value) < 100


def test_the_report_counts_by_reason_and_names_the_first_ids(folder: Path) -> None:
    zero = [box([5, 5, 0, 3], id=i) for i in range(100, 108)]
    data = load(folder, annotations=[box([-9, 3, 20, 10], id="left\nside"), *zero, box([1, 1, 2, 2])])
    assert format_problems(data.problems, limit=2).split("\n") == [
        f"  8 x {AREA} (not used): annotation 100: [5, 5, 0, 3], 101: [5, 5, 0, 3], ...",
        r"  1 x bbox partly outside its image (clipped): annotation 'left\nside': [-9, 3, 20, 10]",
    ]
    assert "8 unusable boxes" in data.summary()


# Files that cannot be used


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b" \n\t ", "the file is empty"),
        (b'{"images": [', "not valid JSON"),
        (b"\0\0\0\0", "not valid JSON"),
        (b"\xff\xd8\xff\xe0 a picture", "not valid JSON"),
        (b'{"a": "\xe9"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"images": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "got list"),
        (b"null", "got NoneType"),
        (b"3", "got int"),
        (b'{"info": {}, "images": []}', "got keys ['images', 'info']"),
        (b'{"images": {}, "annotations": [], "categories": []}', "expected a JSON object with the lists"),
    ],
)
def test_a_file_that_is_not_coco_is_refused_in_one_line(folder: Path, content: bytes, said: str) -> None:
    assert said in refusal(folder, content)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_json_allows_are_read(folder: Path, encoding: str) -> None:
    text = write(folder, categories=[{"id": 1, "name": "Löwe"}]).read_text()
    assert load_coco(write(folder, text.encode(encoding)), folder).categories.names == ("L\xf6we",)


@pytest.mark.parametrize("name", ["missing.json", "images", "images/a.jpg/annotations.json"])
def test_an_annotation_file_that_cannot_be_read(folder: Path, name: str) -> None:
    path = folder.parent / name
    with pytest.raises(InputError, match=r"cannot read the annotation file .*; set data\.train\.annotations") as caught:
        load_coco(path, folder)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"images": []}, "the list 'images' is empty"),
        ({"categories": []}, "the list 'categories' is empty"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "category id 1 is defined twice"),
        ({"categories": [{"id": "1", "name": "a"}]}, "{'id': '1', 'name': 'a'} needs an integer `id`"),
        ({"categories": [{"id": True, "name": "a"}]}, "needs an integer `id` and a text `name`"),
        ({"categories": [{"id": 1}]}, "needs an integer `id` and a text `name`"),
        ({"categories": [None]}, "category None needs"),
        ({"images": [None]}, "image None is not a JSON object"),
        ({"images": ["x" * 9999]}, "is not a JSON object"),
        ({"images": [{"junk": "x" * 9999}]}, "needs an integer `id` of 64 bits and a text `file_name`"),
        ({"images": [image("1")]}, "needs an integer `id`"),
        ({"images": [image(1.0)]}, "needs an integer `id`"),
        ({"images": [image(True)]}, "needs an integer `id`"),
        ({"images": [image(2**63)]}, "needs an integer `id` of 64 bits"),
        ({"images": [image(-(2**63) - 1)]}, "needs an integer `id` of 64 bits"),
        ({"images": [image(name=None)]}, "a text `file_name`"),
        ({"images": [image(name=3)]}, "a text `file_name`"),
        ({"images": [image(3), image(3, "b.jpg"), image(4)]}, "image ids [3] are defined more than once (1 in all)"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}]}, "image id 1 ('a.jpg') needs positive integers"),
        ({"images": [image(width=0)]}, "got 48 and 0"),
        ({"images": [image(height=-48)]}, "got -48 and 64"),
        ({"images": [image(width=64.0)]}, "got 48 and 64.0"),
        ({"images": [image(width="64")]}, "got 48 and '64'"),
        ({"images": [image(width=True)]}, "got 48 and True"),
        ({"images": [image(width=2**31)]}, "needs positive integers"),
        ({"images": [image(width=10**400)]}, "needs positive integers"),
        ({"images": [image(name="../secret.jpg")]}, "'../secret.jpg' leaves the image folder"),
        ({"images": [image(name="sub/../../a.jpg")]}, "leaves the image folder"),
        ({"images": [image(name="/etc/hostname")]}, "leaves the image folder"),
        ({"images": [image(), image(2, "c.jpg")]}, "1 of the 2 images of"),
        ({"images": [image(name="")]}, "are missing, first ''. Set data.train.images"),
        ({"images": [image(name=".")]}, "are missing"),
        ({"images": [image(name="a\0b.jpg")]}, "are missing"),
        ({"images": [image(name="a\0b/c.jpg")]}, "are missing"),
        ({"images": [image(name="none/c.jpg")]}, "are missing, first 'none/c.jpg'"),
        ({"images": [image(name="a\nb.jpg", width=0)]}, r"('a\nb.jpg') needs"),
        ({"images": [image(name="\ud800.jpg")]}, r"first '\ud800.jpg'"),
        ({"images": [image(name="x" * 300)]}, "are missing"),
        ({"images": [image(name="sub\\a.jpg")]}, "are missing"),
    ],
)
def test_an_entry_that_cannot_be_used_is_named_in_one_line(folder: Path, parts: dict[str, Any], said: str) -> None:
    assert said in refusal(folder, **parts)


def test_the_outermost_image_ids_are_kept(folder: Path) -> None:
    ids = [-(2**63), 2**63 - 1, 0]
    assert load(folder, images=[image(i) for i in ids]).image_ids.tolist() == ids


@pytest.mark.parametrize("name", ["missing", "images/a.jpg"])
def test_an_image_folder_that_is_none(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"cannot read the image folder \((No such|Not a).*; set data\.train\.images"):
        load_coco(write(folder), folder.parent / name)


def test_categories_of_both_splits_must_agree(folder: Path) -> None:
    cat, dog = {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}
    both, swapped = load(folder, categories=[cat, dog]), load(folder, categories=[dog, cat])
    check_same_categories(both, swapped)  # the order of the list means nothing
    renamed = load(folder, categories=[cat, {"id": 2, "name": "wolf"}])
    with pytest.raises(InputError, match=re.escape("only in the first [(2, 'dog')], only in the second [(2, 'wolf')]")):
        check_same_categories(both, renamed)
    with pytest.raises(InputError, match="different categories"):
        check_same_categories(both, load(folder, categories=[cat]))


# What is kept for the next start


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path, Path], CocoAnnotations]:
    """`load_coco` as of the second time: from the cache, which also small files have here, or it fails."""
    monkeypatch.setattr(cache, "MIN_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def load_again(path: Path, folder: Path, on_error: str = "drop") -> CocoAnnotations:
        with monkeypatch.context() as patch:
            patch.setattr(coco, "read_coco_json", lambda _: pytest.fail("read the annotation file"))
            return load_coco(path, folder, on_error=on_error)

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
        images=[image(5, name), image(2**63 - 1), image(1, "b.jpg")],
        categories=[{"id": 2**70, "name": "\ud800"}, {"id": -1, "name": "cat"}],
        annotations=[
            *(box(bbox, id=i, image_id=5, category_id=-1) for bbox, i in zip(bad, ids, strict=True)),
            None,
            box([1, 2, 3, 4]),
            box([1, 2, 3.3, 4], category_id=2**70),
            box([1, 2, 3, 4], category_id=-1, iscrowd=1),
            box([7, 7, 3, 4], category_id=-1, image_id=5),
        ],
    )


def test_a_data_set_is_the_same_from_the_cache(folder: Path, again: Callable[..., CocoAnnotations]) -> None:
    path = awkward(folder)
    first = load_coco(path, folder)
    assert (len(first.boxes), first.num_crowd) == (3, 1)
    ids = [None, "x", 1.5, 2**70, "\ud800", "[[1]]", None, 7]
    assert [p.annotation_id for p in first.problems] == ids, "in the order of the file"
    second = again(path, folder)
    assert identical(first, second)
    assert identical(first.without_empty(), second.without_empty())
    assert format_problems(first.problems) == format_problems(second.problems)


def test_a_data_set_without_boxes_is_the_same_from_the_cache(
    folder: Path, again: Callable[..., CocoAnnotations]
) -> None:
    path = write(folder, annotations=[])
    assert identical(load_coco(path, folder), again(path, folder))


def test_bad_boxes_are_refused_from_the_cache_too(folder: Path, again: Callable[..., CocoAnnotations]) -> None:
    path = awkward(folder)
    messages = []
    for load_file in (load_coco, again):
        with pytest.raises(InputError, match="bbox outside its image") as caught:
            load_file(path, folder, on_error="fail")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_images_are_looked_up_each_time(folder: Path, again: Callable[..., CocoAnnotations]) -> None:
    path = awkward(folder)
    load_coco(path, folder)
    moved = folder.rename(folder.parent / "moved")
    assert again(path, moved).path(1) == moved / "a.jpg"
    (moved / "b.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of the 3 images of .* are missing, first 'b.jpg'"):
        again(path, moved)
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


def test_the_cache_does_not_depend_on_the_boxes_that_are_wanted(
    folder: Path, again: Callable[..., CocoAnnotations]
) -> None:
    """A refused file is read once; the way out that the message names then works at once."""
    path = awkward(folder)
    with pytest.raises(InputError):
        load_coco(path, folder, on_error="fail")
    assert len(again(path, folder).boxes) == 3


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
    assert [p.annotation_id for p in data.problems if p.fatal] == bad
    assert {p.reason for p in data.problems if p.fatal} <= {AREA}
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
    if bad:
        with pytest.raises(InputError, match=f"annotation {bad[0]}: "):
            load_coco(path, images, on_error="fail")


def test_coco_val_subset(test_data: Path, tmp_path: Path) -> None:
    """Category ids with holes and crowd boxes, as COCO has them."""
    path = test_data / "coco_eval/gt.json"
    content = json.loads(path.read_bytes())
    for entry in content["images"]:
        (tmp_path / entry["file_name"]).touch()
    data = load_coco(path, tmp_path)
    assert data.num_crowd == 9
    assert len(data.boxes) == len(content["annotations"]) - 9
    assert not any(p.fatal for p in data.problems)
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
    assert (coco.CACHE_VERSION, hashlib.sha256(b"".join(parts)).hexdigest()[:16]) == (1, "73325cbfc4caba0e")
