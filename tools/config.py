"""Look into configurations.

    python tools/config.py show C [key=value ...]   # every value, and where it comes from
    python tools/config.py diff C                   # what differs from the defaults
    python tools/config.py diff A B                 # .. between two
    python tools/config.py schema [--output FILE]     # the JSON schema, for editors: configs/schema.json
    python tools/config.py reference [--output FILE]  # the page of all keys: docs/configuration.md

C, A and B are YAML files, or checkpoints (.pth), which hold the config that they were trained with. What `show` prints
is a config itself. `diff` exits with code 1 if something differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from fpn_det.cli import say, user_errors
from fpn_det.config import Config, Section, flatten, inline_yaml, read_text, trace_config
from fpn_det.engine.checkpoint import load_checkpoint
from fpn_det.files import write_text
from fpn_det.schema import config_reference, config_schema
from fpn_det.structures import printable

COMMENT_COLUMN = 48  # where comments begin, if the line is shorter


def main() -> None:
    """Read the command line and answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show_parser = commands.add_parser("show", help="every value, and where it comes from")
    show_parser.add_argument("config", type=Path, metavar="C", help="YAML file or checkpoint")
    show_parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")
    diff_parser = commands.add_parser("diff", help="what differs")
    diff_parser.add_argument("left", type=Path, metavar="A", help="YAML file or checkpoint")
    diff_parser.add_argument("right", type=Path, metavar="B", nargs="?", help="another; the defaults if it is left out")
    for name, what in (("schema", "the JSON schema"), ("reference", "the page of all keys")):
        sub = commands.add_parser(name, help=what)
        sub.add_argument("--output", type=Path, help="the file to write (default: standard output)")
    args = parser.parse_args()
    with user_errors():
        match args.command:
            case "show":
                say(annotated(*read(args.config, args.overrides)))
            case "diff":
                sys.exit(diff(args.left, args.right))
            case "schema":
                put(json.dumps(config_schema(), indent=2) + "\n", args.output)
            case "reference":
                put(config_reference(), args.output)


def read(path: Path, overrides: list[str] | None = None) -> tuple[Config, dict[str, str]]:
    """A configuration and who gave its values, from a YAML file or a checkpoint."""
    text = str(load_checkpoint(path)["config"]) if path.suffix == ".pth" else read_text(path)
    return trace_config(text, source=str(path), name=path.stem, overrides=overrides or [])


def annotated(config: Config, origins: dict[str, str]) -> str:
    """The configuration as YAML, each value with a comment: who gave it, and the default if that is another."""
    defaults = default_values(config, Config(name=config.name))  # the name's is the file's
    return "\n".join(_annotated_lines(config.model_dump(mode="json"), origins, defaults, "", 0))


def _annotated_lines(
    values: dict[str, Any], origins: dict[str, str], defaults: dict[str, Any], prefix: str, depth: int
) -> Iterator[str]:
    indent = "  " * depth
    for key, value in sorted(values.items(), key=lambda item: item[0] != "kind"):
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _annotated_lines(value, origins, defaults, f"{name}.", depth + 1)
            continue
        line = f"{indent}{key}: {inline_yaml(value)}"
        origin = origins.get(name, "default" if value == defaults[name] else "follows from others")
        comment = origin if value == defaults[name] else f"{origin} (default {inline_yaml(defaults[name])})"
        yield f"{line:<{COMMENT_COLUMN}} # {printable(comment)}"


def default_values(section: Section, default: Section | None, prefix: str = "") -> dict[str, Any]:
    """The defaults of the keys that a section has, by their dotted names.

    Args:
        section: whose keys, of the kinds that it is of.
        default: what stands in its place by default; of another kind, or None, the defaults of its class count.
        prefix: of the names.
    """
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        by_default = getattr(default, name) if type(default) is type(section) else field.get_default()
        value = getattr(section, name)
        if isinstance(value, Section):
            values |= default_values(value, by_default, f"{prefix}{name}.")
        else:
            values[prefix + name] = to_jsonable_python(by_default)
    return values


def diff(left: Path, right: Path | None) -> int:
    """Print the keys in which two configurations differ.

    Args:
        left: the one.
        right: the other; None compares the defaults (on the left) with `left`.

    Returns:
        The exit code: 1 if there are any.
    """
    first, last = read(left)[0], read(right)[0] if right else None
    sides = (first, last) if last else (Config(name=first.name), first)
    a, b = (flatten(config.model_dump(mode="json")) for config in sides)
    keys = [key for key in a | b if key not in a or key not in b or a[key] != b[key]]
    if not keys:
        say("no difference")
        return 0
    titles = (str(left), str(right)) if right else ("defaults", str(left))
    rows = [("key", *titles), *((key, *(inline_yaml(c[key]) if key in c else "-" for c in (a, b))) for key in keys)]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for key, *values in rows:
        say(f"{key:<{widths[0]}}  {printable(values[0]):<{widths[1]}}  ->  {printable(values[1])}".rstrip())
    return 1


def put(text: str, path: Path | None) -> None:
    """Write to a file, or to the standard output."""
    if path:
        write_text(path, text)
    else:
        say(text.rstrip("\n"))


if __name__ == "__main__":
    main()
