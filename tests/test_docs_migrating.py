"""docs/migrating.md: every key, value, file and option of ours that it names exists, and so do torchvision's."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn

from fpn_det.config import Config, parse_config

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
FRAMEWORKS = ("Detectron2", "MMDetection", "torchvision")
# Keys that a default config lacks because another `kind` has them, with the override that makes them appear.
OF_OTHER_KINDS = {
    "model.roi_head.stages": "model.roi_head.kind=cascade",
    "eval.tta.short_sides": "eval.tta={}",
    "eval.tta.long_side": "eval.tta={}",
    "eval.tta.horizontal_flip": "eval.tta={}",
}


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of the table in a section, without its head."""
    lines = [line for line in section(title).split("\n") if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


ROWS = [pytest.param(row, id=f"{name}: {row[0]}") for name in FRAMEWORKS for row in rows(f"From {name}")]
TORCHVISION = [name for row in rows("From torchvision") for name in code(row[0]) if re.fullmatch(r"[a-z_0-9]+", name)]
DEFAULTS = [item for row in rows("Defaults that differ") for item in code(row[1]) if ": " in item]


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check_command(command: str) -> None:
    """The script of a command exists, and its source has each option."""
    words = command.split()
    path = next(word for word in words if word.endswith((".py", ".sbatch", ".yaml")))
    assert (ROOT / path).is_file(), path
    source = (ROOT / path).read_text(encoding="utf-8") + (ROOT / "fpn_det/cli.py").read_text(encoding="utf-8")
    for option in (word for word in words[words.index(path) :] if word.startswith("--")):
        assert f'"{option}"' in source, f"{path} has no {option}"


def test_every_framework_has_a_table():
    assert {name: len(rows(f"From {name}")) > 40 for name in FRAMEWORKS} == dict.fromkeys(FRAMEWORKS, True)
    assert len(DEFAULTS) > 10


@pytest.mark.parametrize("row", ROWS)
def test_what_stands_on_our_side_exists(row: list[str]):
    assert len(row) == 3, row
    theirs, ours, _ = row
    assert theirs
    assert code(ours) or ours in ("none", "torchrun's own arguments"), row
    overrides = []
    for item in code(ours):
        if re.search(r"\.(py|sbatch|yaml)\b", item):
            check_command(item)
        elif "=" in item:
            overrides.append(item)
        else:
            kind = [OF_OTHER_KINDS[item]] if item in OF_OTHER_KINDS else []
            value_of(parse_config("seed: 0", source="docs", overrides=kind), item)
    config = parse_config("seed: 0", source="docs", overrides=overrides)
    for key in (item.partition("=")[0] for item in overrides):
        assert value_of(config, key) != value_of(Config(), key), f"{key} has that value by default"


@pytest.mark.parametrize("statement", DEFAULTS)
def test_stated_default(statement: str):
    key, _, value = statement.partition(": ")
    stated = value_of(parse_config("seed: 0", source="docs", overrides=[f"{key}={value}"]), key)
    assert stated == value_of(Config(), key)


@pytest.mark.parametrize("name", TORCHVISION)
def test_argument_of_torchvision_exists(name: str):
    known = {*inspect.signature(FasterRCNN).parameters, *inspect.signature(fasterrcnn_resnet50_fpn).parameters}
    assert name in known


def test_every_argument_of_torchvisions_detector_is_answered():
    known = set(inspect.signature(FasterRCNN).parameters) - {"backbone", "kwargs"}
    assert known == known & set(TORCHVISION)
