"""The documents: links lead somewhere, and commands that no test can run name tools, options and keys that exist."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fpn_det.config import Config, parse_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "NOTES.md", ROOT / "data/README.md", *ROOT.glob("docs/*.md")]
GUIDES = [ROOT / f"docs/{name}.md" for name in ("getting_started", "own_data", "multi_gpu", "troubleshooting")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def links() -> list[Any]:
    found = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" not in target:
                found.append(pytest.param(page, target, id=f"{name_of(page)}: {target}"))
    return found


@cache
def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> list[Any]:
    """Each command of a tool in the guides: in a block, in a table or in a sentence."""
    found = []
    for page in GUIDES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"(?:python|sbatch|torchrun) [^`\n]*tools/[^`\n]+", text):
            found.append(pytest.param(line, id=f"{name_of(page)}: {line}"))
    return found


def test_there_are_links_and_commands():
    assert len(links()) > 50
    assert len(commands()) > 30


@pytest.mark.parametrize(("page", "target"), links())
def test_a_link_leads_somewhere(page: Path, target: str):
    path, _, anchor = target.partition("#")
    file = page.parent / path if path else page
    assert file.exists()
    assert not anchor or anchor in anchors(file.resolve())


@pytest.mark.parametrize("page", [path.name for path in ROOT.glob("docs/*.md") if path.name != "README.md"])
def test_the_index_has_every_page(page: str):
    assert f"({page})" in (ROOT / "docs/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", commands())
def test_a_command_names_what_exists(tool, line: str):
    words = shlex.split(line)
    start = next(i for i, word in enumerate(words) if word.startswith("tools/"))
    script, rest = Path(words[start]), words[start + 1 :]
    assert (ROOT / script).is_file()
    name = "train" if script.suffix == ".sbatch" else script.stem
    subcommand = rest[:1] if name in ("convert_data", "config") else []
    described = tool(name, *subcommand, "--help")
    assert described.code == 0, described.err
    for option in (word for word in rest if word.startswith("--")):
        assert re.search(rf"{option}\b", described.out), f"{script} has no {option}"
    for override in (word for word in rest if re.match(r"[a-z_0-9]+\.[a-z_0-9.]+=", word)):
        check_override(override)


def check_override(override: str) -> None:
    """The key exists, takes the value, and has another one by default."""
    key = override.partition("=")[0]
    value: Any = parse_config("seed: 0", source="docs", overrides=[override])
    default: Any = Config()
    for part in key.split("."):
        value, default = getattr(value, part), getattr(default, part)
    assert value != default, f"{key} has that value by default"
