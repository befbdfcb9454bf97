"""docs/troubleshooting.md quotes what the tools really print."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

PAGE = (Path(__file__).parent.parent / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTES = [" ".join(block.split()) for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)]
ANNOTATIONS = "data/mine/annotations"
# Quotes that take a limit of memory or several processes: the tests that make them happen.
ELSEWHERE = {
    "error: out of memory on cpu": "tests/engine/test_train.py::test_out_of_memory_says_what_to_lower",
    "error (rank 0): no progress for": "tests/soak/test_processes.py::test_a_process_that_stands_still_is_named",
}
CONFIG = {
    "model": {
        "backbone": {"name": "resnet18", "weights": None, "norm": "bn", "frozen_stages": 0},
        "neck": {"channels": 16},
        "anchors": {"sizes": [16, 32, 64, 128, 256]},
        "roi_head": {"num_samples": 32, "box_head": {"fc_dim": 32}},
    },
    "data": {
        "train": {"images": "data/mine/train", "annotations": f"{ANNOTATIONS}/train.json"},
        "val": {"images": "data/mine/val", "annotations": f"{ANNOTATIONS}/val.json"},
        "short_sides": [64],
        "test_short_side": 64,
        "long_side": 64,
        "num_workers": 0,
    },
    "train": {"steps": 8, "batch_size": 4, "log_every": 1, "save_every": 8},
    "eval": {"every": 0, "tensorboard_images": 0},
}
TRAIN = ("train", "--output-dir", "runs/other")
CHECK = ("check_data", "--output-dir", "runs/other")
EVAL = ("eval", "--checkpoint", "runs/mine/best.pth")
CASES = {
    "a run": ("train",),  # whose folder and checkpoint the others find
    "an unknown key": (*TRAIN, "model.num_clases=3"),
    "a value without effect": (*TRAIN, "model.rpn.box_loss=giou", "model.rpn.smooth_l1_beta=0.1"),
    "no annotations": (*TRAIN, "data.train.annotations=data/mine/anotations/train.json"),
    "no images": (*TRAIN, "data.train.images=data/mine/val"),
    "broken boxes": (*CHECK, f"data.train.annotations={ANNOTATIONS}/degenerate.json"),
    "many broken boxes": (*TRAIN, f"data.train.annotations={ANNOTATIONS}/degenerate.json", "data.drop_limit=0.01"),
    "corners": (*TRAIN, f"data.train.annotations={ANNOTATIONS}/corners.json"),
    "fractions": (*TRAIN, f"data.train.annotations={ANNOTATIONS}/fractions.json"),
    "another number of classes": (*TRAIN, "model.num_classes=3"),
    "other categories": (*TRAIN, f"data.train.annotations={ANNOTATIONS}/renamed.json"),
    "a checkpoint of other classes": (*EVAL, f"data.val.annotations={ANNOTATIONS}/val3.json"),
    "divergence": ("train", "--output-dir", "runs/nan", "optim.lr=1e9", "train.steps=60"),
    "a run is there": ("train",),
    "a run is longer": ("train", "--resume", "train.steps=4"),
    "a broken image": (*CHECK, "data.train.images=data/broken/train"),
    "another architecture": (*EVAL, "model.neck.channels=32"),
}


@pytest.fixture(scope="module")
def printed(shapes, tool, tmp_path_factory) -> Iterator[dict[str, str]]:
    """What the cases print, run in a folder with the names that the page uses."""
    folder = tmp_path_factory.mktemp("troubleshooting")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(folder, shapes)
        yield {name: run(tool, *arguments) for name, arguments in CASES.items()}


def run(tool: Any, name: str, *arguments: str) -> str:
    outcome = tool(name, "--config", "configs/mine.yaml", *arguments)
    return " ".join(f"{outcome.out} {outcome.err}".split())


def prepare(folder: Path, shapes: Path) -> None:
    """The data of the page: a sound file, and one of each kind of fault."""
    (folder / "data").mkdir()
    (folder / "configs").mkdir()
    (folder / "configs/mine.yaml").write_text(yaml.safe_dump(CONFIG))
    for part in ("train", "val"):
        (folder / "data/mine" / part).mkdir(parents=True)
        for image in (shapes / part).iterdir():
            (folder / "data/mine" / part / image.name).write_bytes(image.read_bytes())
    (folder / ANNOTATIONS).mkdir()
    (folder / "data/broken/train").mkdir(parents=True)
    for image in (shapes / "train").iterdir():
        content = image.read_bytes()
        (folder / "data/broken/train" / image.name).write_bytes(content[: 600 if image.name == "000003.jpg" else None])
    for name, source, change in (
        ("train", "train", None),
        ("val", "val", None),
        ("degenerate", "train", make_degenerate),
        ("corners", "train", make_corners),
        ("fractions", "train", make_fractions),
        ("renamed", "train", rename),
        ("val3", "val", drop_classes),
    ):
        content = json.loads((shapes / f"annotations/{source}.json").read_text())
        if change is not None:
            change(content)
        (folder / ANNOTATIONS / f"{name}.json").write_text(json.dumps(content))


def make_degenerate(content: Any) -> None:
    boxes = content["annotations"]
    boxes[3]["bbox"][2], boxes[5]["bbox"][3], boxes[7]["bbox"][0] = 0, -4, 500


def make_corners(content: Any) -> None:
    for box in content["annotations"]:
        x, y, w, h = box["bbox"]
        box["bbox"] = [x, y, x + w, y + h]


def make_fractions(content: Any) -> None:
    for box in content["annotations"]:
        box["bbox"] = [value / 64 for value in box["bbox"]]


def rename(content: Any) -> None:
    content["categories"][0]["name"] = "Circle"


def drop_classes(content: Any) -> None:
    content["categories"] = content["categories"][:3]
    kept = {category["id"] for category in content["categories"]}
    content["annotations"] = [box for box in content["annotations"] if box["category_id"] in kept]


def pattern(quote: str) -> re.Pattern[str]:
    """A quote, whose `...` stands for anything."""
    return re.compile(".*?".join(map(re.escape, quote.split("..."))))


@pytest.mark.parametrize("name", CASES)
def test_the_message_is_quoted(printed, name: str):
    assert any(pattern(quote).search(printed[name]) for quote in QUOTES), printed[name]


@pytest.mark.parametrize("quote", QUOTES)
def test_the_quote_is_printed(printed, quote: str):
    if any(quote.startswith(start) for start in ELSEWHERE):
        return
    if quote.startswith(("learning rate", "images_per_s")):
        quote = re.sub(r"\d[\d.e-]*", "...", quote)  # speeds and lengths differ
    assert any(pattern(quote).search(text) for text in printed.values())


def test_every_quote_from_elsewhere_is_on_the_page():
    assert all(any(quote.startswith(start) for quote in QUOTES) for start in ELSEWHERE)
