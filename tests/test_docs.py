"""What the documents say about this repository: tests exist, defaults are the defaults, overrides are accepted."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fpn_det.config import Config, parse_config

ROOT = Path(__file__).parent.parent
FIDELITY = (ROOT / "docs/fidelity.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", FIDELITY)
RELIABILITY = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
PROMISES = re.findall(r"`([^`\n]+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8") + RELIABILITY)
TESTS = sorted({code for code in [*CODE, *PROMISES] if "::" in code})
DEFAULTS = sorted({code for code in CODE if re.match(r"[a-z_0-9]+\.[a-z_0-9.]+: ", code)})
OVERRIDES = sorted({code for code in CODE if re.match(r"[a-z_0-9]+\.[a-z_0-9.]+=", code)})


@cache
def functions_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_every_kind_of_statement_is_found():
    assert min(len(TESTS), len(DEFAULTS), len(OVERRIDES)) > 20


def test_every_row_has_a_cell_per_framework_and_a_test():
    rows = [line for line in FIDELITY.split("\n") if line.startswith("|") and not re.match(r"\|( item|---)", line)]
    assert len(rows) > 50
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 6, row
        assert all(cells), row
        assert "::" in cells[-1], row


def test_every_promise_of_security_has_a_test():
    promised = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("## Not promised")[0]
    rows = [line for line in promised.split("\n") if re.match(r"\|(?! from a stranger|---)", line)]
    assert len(rows) > 10
    for row in rows:
        assert "`tests/" in row.strip("|").split("|")[-1], row


def test_every_fault_has_an_outcome_and_a_test():
    faults = RELIABILITY.partition("## Last figures")[0]
    rows = [line for line in faults.split("\n") if line.startswith("|") and not re.match(r"\|( fault|---)", line)]
    assert len(rows) > 40
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 3, row
        assert all(cells), row
        assert "`tests/" in cells[2], row


@pytest.mark.parametrize("name", TESTS)
def test_named_test_exists(name: str):
    path, _, function = name.partition("::")
    assert (ROOT / path).exists()
    assert function in functions_in(ROOT / path)


@pytest.mark.parametrize("statement", DEFAULTS)
def test_stated_default(statement: str):
    key, _, value = statement.partition(": ")
    stated = value_of(parse_config("seed: 0", source="docs", overrides=[f"{key}={value}"]), key)
    assert stated == value_of(Config(), key)


@pytest.mark.parametrize("override", OVERRIDES)
def test_stated_override(override: str):
    config = parse_config("seed: 0", source="docs", overrides=[override])
    key = override.partition("=")[0]
    assert value_of(config, key) != value_of(Config(), key)
