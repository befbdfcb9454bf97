"""The schema for editors and the reference page: current, and of one mind with `load_config`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from fpn_det.config import Config, _known_keys, _Loader, dump_config, flatten, parse_config
from fpn_det.schema import INTRODUCTION, _escape, config_reference, config_schema
from fpn_det.structures import InputError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SCHEMA = config_schema()
VALIDATOR = Draft7Validator(SCHEMA)


class EditorLoader(_Loader):
    """YAML as editors read it: `none` is text."""


EditorLoader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile("^(?:~|null|Null|NULL|)$") if tag.endswith(":null") else pattern) for tag, pattern in resolvers
    ]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def complaints(text: str) -> list[str]:
    """What an editor underlines."""
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(yaml.load(text, EditorLoader))]


def is_accepted(text: str) -> bool:
    """Whether `load_config` would take it."""
    try:
        parse_config(text, source="f.yaml")
    except InputError:
        return False
    return True


def nested(key: str, value: Any) -> str:
    """The YAML that sets one key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return json.dumps(value)


def sections(node: dict[str, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Every section of the schema, as its place and itself."""
    for i, member in enumerate(node.get("oneOf", node.get("anyOf", []))):
        yield from sections(member, (*path, i))
    if "properties" in node:
        yield path, node
        for key, value in node["properties"].items():
            yield from sections(value, (*path, key))
    if "items" in node:
        yield from sections(node["items"], (*path, "items"))


def test_the_files_are_current() -> None:
    remedy = "run `python tools/config.py schema --output configs/schema.json`, and the same with reference"
    assert json.loads((ROOT / "configs/schema.json").read_text(encoding="utf-8")) == SCHEMA, remedy
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == config_reference(), remedy


def test_it_is_a_schema() -> None:
    Draft7Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert complaints(text) == []
    assert is_accepted(text)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_complete_configs_are_valid(path: Path) -> None:
    """What a run writes to its config.yaml states every key."""
    assert complaints(dump_config(parse_config(path.read_text(encoding="utf-8"), source="f"))) == []


ACCEPTED = [
    "model: {neck: {channels: 64}}",
    "model: {neck: {kind: pafpn, channels: 64}}",
    "model: {neck: {kind: single, stage: 5}, anchors: {sizes: [[32, 64]]}}",
    "model: {neck: {kind: single}, anchors: {sizes: [[32, 64]]}, roi_head: {box_head: {kind: res5}}}",
    "model: {roi_head: {kind: cascade, stages: [{positive_iou: 0.5, box_weights: [1, 2, 3, 4]}]}}",
    "model: {roi_head: {kind: cascade, box_head: {num_convs: 4, norm: gn}}}",
    "model: {roi_head: {min_size: none}, rpn: {channels: None}, num_classes: NONE}",
    "model: {backbone: {weights: none, norm: bn, frozen_stages: 0}}",
    "data: {train: {images: a}, val: {annotations: b.json}}",
    "data: {train: {}}",
    "optim: {lr: 1e-3, clip_norm: 10}",
    "train: {epochs: 12}",
    "train: {steps: null, epochs: 0.5}",
    "eval: {tta: {}}",
    "eval: {tta: none, every: 0}",
    "name: x",
]
REFUSED = [
    "model: {neck: {stage: 5}}",
    "model: {neck: {kind: pafpn, top_down: false}}",
    "model: {neck: {kind: other}}",
    "model: {roi_head: {stages: []}}",
    "model: {roi_head: {kind: cascade, stages: []}}",
    "model: {roi_head: {kind: cascade, stages: [{positive_iou: 0.5}]}}",
    "model: {roi_head: {kind: cascade, stages: [{positive_iou: 0.5, box_weights: [1, 2, 3]}]}}",
    "model: {roi_head: {kind: cascade, positive_iou: 0.5}}",
    "model: {anchors: {sizes: []}}",
    "model: {anchors: {sizes: 32}}",
    "model: {pixel_mean: [1, 2]}",
    "model: {pixel_mean: [1, 2, 300]}",
    "model: {backbone: {name: resnet51}}",
    "model: {backbone: {weights: ''}}",
    "model: none",
    "model:",
    "data: {short_sides: [0]}",
    "data: {train: images}",
    "optim: {lr: 0}",
    "optim: {lr: fast}",
    "optim: {momentum: 1}",
    "optim: {lr: none}",
    "train: {steps: 1.5}",
    "train: {batch_size: true}",
    "train: {batch_size: '8'}",
    "seed: -1",
    "seed: 4294967296",
    "name: 3",
    "[]",
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_both_accept(text: str) -> None:
    assert complaints(text) == []
    assert is_accepted(text)


@pytest.mark.parametrize("text", REFUSED)
def test_what_both_refuse(text: str) -> None:
    assert complaints(text) != []
    assert not is_accepted(text)


@pytest.mark.parametrize("path", [path for path, _ in sections(SCHEMA)], ids=lambda path: ".".join(map(str, path)))
def test_unknown_keys_are_refused_in_every_section(path: tuple[Any, ...]) -> None:
    node = dict(sections(SCHEMA))[path]
    assert node["additionalProperties"] is False
    example = {key: value.get("default", value.get("const")) for key, value in node["properties"].items()}
    example |= {key: 0.5 if key == "positive_iou" else [1, 1, 1, 1] for key in node["required"] if key != "kind"}
    example = {key: value for key, value in example.items() if value is not None}
    assert Draft7Validator(node).is_valid(example)
    assert not Draft7Validator(node).is_valid(example | {"chanels": 1})


def test_every_key_of_the_configuration_is_there() -> None:
    """Also those of kinds and lists; each with its description, and all but sections with a default."""
    found = set()
    for path, node in sections(SCHEMA):
        prefix = [part for part in path if isinstance(part, str) and part != "items"]
        found |= {".".join([*prefix, key]) for key in node["properties"]}
        assert all(value["description"] for value in node["properties"].values())
        for key, value in node["properties"].items():
            assert "default" in value or "const" in value or next(sections(value), None) or key in node["required"]
    assert len(found) > 100
    assert found - set(_known_keys(Config)) == {
        f"model.roi_head.stages.{key}" for key in ("positive_iou", "box_weights", "loss_weight")
    } - set(_known_keys(Config))
    assert set(_known_keys(Config)) <= found


WRONG = [
    None,
    True,
    -1,
    0,
    0.5,
    10**9,
    "text",
    [],
    [1],
    [-1],
    {},
    {"a": 1},
]  # not 8.0, which is an integer to JSON schemas


@pytest.mark.parametrize("key", sorted(flatten(Config().model_dump(mode="json"))))
def test_one_mind_about_values(key: str) -> None:
    """What the schema refuses, `load_config` refuses, and the other way round unless a rule is about several keys."""
    rules_of_several = {
        "model.anchors.sizes",  # as many as levels
        "model.backbone.weights",  # norm and frozen_stages
        "model.backbone.norm",
        "model.neck.norm",  # groups of channels
        "model.neck.channels",
        "model.neck.top_down",
        "model.neck.finest_only",  # then one level
        "model.rpn.positive_iou",  # not below the other
        "model.rpn.negative_iou",
        "data.short_sides",  # not above long_side
        "data.test_short_side",
        "data.long_side",
        "optim.milestones",
        "train.batch_size",
        "train.accumulate",
        "train.epochs",  # not with steps
        "model.roi_head.box_head.norm",
        "name",
    }
    for value in WRONG:
        text = nested(key, value)
        refused = complaints(text) != []
        if refused or key not in rules_of_several:
            assert is_accepted(text) is not refused, text


def test_the_default_is_what_load_config_takes() -> None:
    """The defaults in the schema, of the default kinds, are those of `Config`."""

    def defaults(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        if "oneOf" in node:
            [node] = [member for member in node["oneOf"] if "kind" not in member["required"]]
        found: dict[str, Any] = {}
        for key, value in node["properties"].items():
            if "properties" in value or "oneOf" in value:
                found |= defaults(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value["default"]
        return found

    assert defaults(SCHEMA) == flatten(Config().model_dump(mode="json"))


def test_the_page_has_every_key_and_its_links_lead_somewhere() -> None:
    page = config_reference()
    headings = re.findall(r"^## `?([a-z_0-9.]+)`?$", page, re.MULTILINE)
    assert len(headings) == len(set(headings)) == 16
    anchors = {heading.replace(".", "") for heading in headings}
    assert set(re.findall(r"\]\(#([a-z_0-9]+)\)", page)) == anchors
    for target in re.findall(r"\]\((\.\./[^)]+)\)", page):
        assert (ROOT / "docs" / target).resolve().is_file()
    current, keys = "", set()
    for line in page.split("\n"):
        if line.startswith("## "):
            current = line.strip("# `").replace("Top level", "")
        elif match := re.match(r"\| \[?`([a-z_0-9]+)`", line):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line
            keys.add(f"{current}.{match[1]}".lstrip("."))
        elif match := re.match(r"\*\*`(kind): ", line):
            keys.add(f"{current}.{match[1]}")
    assert set(_known_keys(Config)) <= keys
    for example in re.findall(r"`([a-z.]+=[^` ]+) ([a-z.]+=[^`]+)`", INTRODUCTION):
        assert parse_config("name: x", source="f", overrides=example) != Config(name="x")


def test_vs_code_finds_the_schema() -> None:
    [(schema, patterns)] = json.loads((ROOT / ".vscode/settings.json").read_text())["yaml.schemas"].items()
    assert (ROOT / schema).is_file()
    assert {path for pattern in patterns for path in ROOT.glob(pattern)} == set(CONFIGS)


def test_text_in_tables_stays_text() -> None:
    assert _escape("a | b, <kbd>") == "a \\| b, &lt;kbd>"
