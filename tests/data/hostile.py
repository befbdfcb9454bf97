"""Annotation and results files that nobody should trust, and what must hold of whatever reads them.

The tests throw a few hundred at the readers; `soak` throws as many as one likes:

    PYTHONPATH=.:tests/data python -c "from hostile import soak; print(soak(10_000))"
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fpn_det.data.checks import compare_splits, train_refusals, val_refusals
from fpn_det.data.coco import load_coco
from fpn_det.data.problems import format_problems
from fpn_det.data.report import format_counts, write_report
from fpn_det.engine.coco_eval import METRIC_NAMES, read_ground_truth, read_results, score
from fpn_det.structures import InputError

NAMES = ("a.jpg", "b.jpg", "sub/c.jpg")

VALID: dict[str, Any] = {
    "info": {"year": 2017},
    "images": [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(NAMES)],
    "annotations": [
        {"id": i, "image_id": i % 3, "category_id": 1 + i % 2, "bbox": [i, 2, 30.5, 20], "area": 9.5, "iscrowd": i == 4}
        for i in range(6)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}
RESULTS: list[Any] = [
    {"image_id": i % 3, "category_id": 1, "bbox": [1.5, 2, 30, 20], "score": 0.1 * i} for i in range(4)
]

NUMBERS = [0, 1, 2, -1, 0.0, 1.0, -0.0, 0.5, 1e308, -1e308, 5e-324, 10**400, -(10**20), 2**63, 2**31]
NO_NUMBERS = [None, True, False, float("nan"), float("inf"), float("-inf")]
TEXTS = ["", "1", "a.jpg", "\u00e9", "x" * 5000, "\u202ertl", "a\0b", "\ud800", "\n\x1b[31m"]
PATHS = ["../a.jpg", "/a.jpg", "C:\\a.jpg", "\\\\a\\b", "sub/../../a", "out.jpg"]
CONTAINERS: list[Any] = [[], {}, [[]], [None] * 4, ["1", "2", "3", "4"], [1, 2, 3], {"id": 1}]
odd_values = st.sampled_from([*NUMBERS, *NO_NUMBERS, *TEXTS, *PATHS, *CONTAINERS])
json_values = st.recursive(
    odd_values | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside of a JSON value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, valid: Any) -> Any:
    """A valid file with one to six values replaced, removed, repeated, or given to a neighbour."""
    content = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 6))):
        *way, last = draw(st.sampled_from(places(content)[1:] or [(None,)]))
        if last is None:
            break
        parent = content
        for key in way:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "odd", "remove", "repeat", "swap"])):
            case "replace":
                parent[last] = copy.deepcopy(draw(json_values))  # a value may be drawn again
            case "odd":
                parent[last] = copy.deepcopy(draw(odd_values))
            case "remove":
                del parent[last]
            case "repeat" if isinstance(parent, list):
                parent.insert(draw(st.integers(0, len(parent))), copy.deepcopy(parent[last]))
            case "swap" if isinstance(parent[last], dict):
                parent[last] = dict(zip(parent[last], draw(st.permutations(list(parent[last].values()))), strict=True))
    return content


@st.composite
def damaged(draw: st.DrawFn, valid: Any) -> bytes:
    """The bytes of a valid file, cut off or with some of them changed."""
    data = bytearray(json.dumps(valid).encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))))
    if draw(st.booleans()):
        return bytes(data[: draw(st.integers(0, len(data)))])
    for position in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
        data[position] = draw(st.integers(0, 255))
    return bytes(data)


def files(valid: Any) -> st.SearchStrategy[bytes]:
    """Contents of a file that is like `valid`, more or less."""
    values = mutated(valid) | mutated(valid) | json_values
    return values.map(lambda value: json.dumps(value).encode()) | damaged(valid) | st.binary(max_size=200)


def evaluations() -> st.SearchStrategy[tuple[bytes, bytes]]:
    """A pair of ground truth and results, one of which is as it should be."""
    truth, results = (st.just(json.dumps(valid).encode()) for valid in (VALID, RESULTS))
    return st.tuples(truth, files(RESULTS)) | st.tuples(files(VALID), results)


def image_folder(parent: Path) -> Path:
    """The (empty) images of `VALID`, a link out of the folder, and one inside of it."""
    folder = parent / "images"
    (folder / "sub").mkdir(parents=True)
    for name in NAMES:
        (folder / name).touch()
    (parent / "secret.jpg").touch()
    (folder / "out.jpg").symlink_to(parent / "secret.jpg")
    return folder


def read_annotations(content: bytes, folder: Path) -> str:
    """Read the content as annotations; only an `InputError` may come out, or data that fit what they promise.

    Args:
        content: of the annotation file.
        folder: what `image_folder` made.

    Returns:
        "refused" or "read".
    """
    path = folder.parent / "annotations.json"
    path.write_bytes(content)
    try:
        data = load_coco(path, folder)
    except InputError as error:
        check_message(str(error))
        return "refused"
    assert data.boxes.isfinite().all()
    limits = data.sizes.flip(1).repeat(1, 2).repeat_interleave(data.box_offsets.diff(), 0)
    assert (data.boxes >= 0).all()
    assert (data.boxes <= limits).all()
    assert (data.boxes[:, 2:] > data.boxes[:, :2]).all()
    assert ((data.labels >= 0) & (data.labels < len(data.categories))).all()
    assert len(data.labels) == len(data.boxes) == int(data.box_offsets[-1])
    assert len(set(data.image_ids.tolist())) == len(data) == len(data.sizes) == len(data.names())
    assert (data.sizes > 0).all()
    assert all((folder / name).resolve().is_relative_to(folder.resolve()) for name in data.names())
    assert data.num_boxes_lost >= 0
    assert 0 <= data.num_images_lost <= data.num_images_in_file - len(data)
    if not any(p.defect.outcome == "left out" for p in data.problems):
        assert (data.num_images_lost, data.num_boxes_lost) == (0, 0), "something was left out without a word"
    for message in (
        data.summary(),
        *([format_problems(data.problems)] if data.problems else []),
        format_counts({"train": data}),
        *train_refusals(data, on_error="fail", drop_limit=0.05),
        *train_refusals(data, on_error="drop", drop_limit=0.05),
        *val_refusals(data),
    ):
        check_message(message)
    report = folder.parent / "report.json"
    write_report(report, {"train": data, "val": data}, between=compare_splits(data, data))
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", re.sub(r'"(\\.|[^"])*"', "", report.read_text())))
    return "read"


def evaluate(truth_content: bytes, results_content: bytes, folder: Path) -> str:
    """Score one content against the other; only an `InputError` may come out, or numbers.

    Returns:
        Which of the three steps refused, or "scored".
    """
    truth_path, results_path = folder / "truth.json", folder / "results.json"
    truth_path.write_bytes(truth_content)
    results_path.write_bytes(results_content)
    steps: list[Callable[..., Any]] = [lambda: read_ground_truth(truth_path), lambda: read_results(results_path), score]
    found: list[Any] = []
    for step in steps:
        try:
            found.append(step(*found) if step is score else step())
        except InputError as error:
            check_message(str(error))
            return ("truth", "results", "score")[len(found)]
    numbers = np.array([found[2][name] for name in METRIC_NAMES])
    assert ((numbers == -1) | ((numbers >= 0) & (numbers <= 1))).all(), numbers
    return "scored"


def check_message(message: str) -> None:
    """It can be printed and read: lines of printable characters, not too many, not empty."""
    assert message
    assert len(message) < 20_000
    assert all(line.isprintable() for line in message.split("\n")), repr(message)


def soak(num_examples: int) -> Counter[str]:
    """Throw `num_examples` files at each of the readers.

    Returns:
        How many of each outcome.
    """
    outcomes: Counter[str] = Counter()
    torch.set_num_threads(1)
    often = settings(max_examples=num_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    with tempfile.TemporaryDirectory() as name:
        folder = image_folder(Path(name))

        @often
        @given(files(VALID))
        def annotations(content: bytes) -> None:
            outcomes[f"annotations: {read_annotations(content, folder)}"] += 1

        @often
        @given(evaluations())
        def scores(pair: tuple[bytes, bytes]) -> None:
            outcomes[f"evaluation: {evaluate(*pair, Path(name))}"] += 1

        annotations()
        scores()
    return outcomes
