"""The JSON schema of the configuration, for editors, and the reference page, for people: both written from `Config`.

The schema is of draft 7, which editors know best, and without references, so that its outline is the configuration's.
What one value demands of another (`train.steps` and `train.epochs`, say) is left to `load_config`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fpn_det.config import Config, inline_yaml

Schema = dict[str, Any]

NONE: Schema = {"enum": [None, "none", "None", "NONE"]}
"""No value: what `load_config` takes for null is text to editors."""
_ABSENT = object()
KEPT = ("type", "const", "enum", "minLength", "minItems", "maxItems")
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


# The schema


def config_schema() -> Schema:
    """The schema, as plain data for a JSON file.

    It accepts what `load_config` accepts, and more only where a rule is about several keys. A section of several kinds
    is a `oneOf`, whose members demand their `kind` unless it is the default.
    """
    generated = Config.model_json_schema()
    schema = _plain(generated, generated["$defs"])
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Configuration of fpn_det"} | schema


def _plain(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """A node of pydantic's schema in the form above."""
    if "$ref" in node:
        section = definitions[node["$ref"].rpartition("/")[2]]
        node = node | section | {"description": _description(node.get("description", ""), section["description"])}
    if node.get("type") == "null":
        return NONE
    plain: Schema = {"description": " ".join(node["description"].split())} if "description" in node else {}
    plain |= {key: node[key] for key in (*KEPT, *BOUNDS) if key in node}
    for key in ("anyOf", "oneOf"):
        if key in node:
            plain[key] = [_plain(member, definitions) for member in node[key]]
    if "items" in node:
        plain["items"] = _plain(node["items"], definitions)
    if "prefixItems" in node:  # a tuple, whose members are all alike here; draft 7 has another word for it
        plain["items"] = _plain(node["prefixItems"][0], definitions)
    if "properties" in node:
        plain["properties"] = {key: _plain(value, definitions) for key, value in node["properties"].items()}
        plain["required"] = node.get("required", [])
        plain["additionalProperties"] = False
    if "default" in node:
        _set_default(plain, node["default"])
    return plain


def _description(of_key: str, of_section: str) -> str:
    """What the key is, and what its section is, unless that says the same and more."""
    return of_section if of_section.startswith(of_key.rstrip(".")) else f"{of_key} {of_section}"


def _set_default(node: Schema, default: Any) -> None:
    """Give a node its default; a section hands it down to its keys, which may then be left out.

    A default that is equal already stays as `Config` has it (32, not 32.0).
    """
    if "properties" in node:
        node["required"] = [key for key in node["required"] if key not in default]
        for key, value in node["properties"].items():
            if key in default and value.get("default", _ABSENT) != default[key]:
                _set_default(value, default[key])
    elif "oneOf" in node:
        for member in node["oneOf"]:
            is_default = member["properties"]["kind"]["const"] == default["kind"]
            member["required"] = [key for key in member["required"] if key != "kind"] + ["kind"] * (not is_default)
            if is_default:
                _set_default(member, default)
    else:
        node["default"] = default


# The reference page

INTRODUCTION = """\
# Configuration

Every key, what it may be, and its default. A YAML file states only what differs from the defaults, which are the 1x
recipe of Faster R-CNN with ResNet-50 and FPN on COCO; `section.key=value` on the command line replaces what the file
says (`optim.lr=0.01 model.neck.kind=pafpn`). `none`, `null` and `~` mean no value. Unknown keys are errors. A section
of several kinds is of the first one unless it states its `kind`.

```
python tools/config.py show configs/r50_fpn.yaml optim.lr=0.01   # every value, and where it comes from
python tools/config.py diff configs/r50_fpn.yaml                 # what differs from the defaults
python tools/config.py diff runs/a/final.pth runs/b/final.pth    # .. between two runs
```
**In an editor**, [configs/schema.json](../configs/schema.json) explains, completes and checks keys as you type. VS Code
with Red Hat's extension *YAML* uses it for the files in `configs/`. Other files, and other editors with
`yaml-language-server`, need it named in the first line: `# yaml-language-server: $schema=PATH/configs/schema.json`.

This page is written by `python tools/config.py reference` from [fpn_det/config.py](../fpn_det/config.py).
"""


def config_reference() -> str:
    """The reference page, in Markdown as GitHub shows it."""
    return INTRODUCTION + "\n" + "\n".join(_section("", config_schema()))


def _section(name: str, node: Schema) -> Iterator[str]:
    """The lines of a section and of those below it."""
    yield f"## `{name}`" if name else "## Top level"
    yield ""
    if name:
        yield f"{_escape(node['description'])}"
        yield ""
    kinds = node.get("oneOf", [node])
    shared = [key for key in kinds[0]["properties"] if all(key in kind["properties"] for kind in kinds[1:])]
    if len(kinds) > 1:
        shared.remove("kind")
        names = ", ".join(f"`{kind['properties']['kind']['const']}`" for kind in kinds)
        yield f"Kinds: {names}; the first is the default."
        yield ""
    below: dict[str, Schema] = {}
    if shared:
        yield from _table(name, {key: kinds[0]["properties"][key] for key in shared}, below)
    if len(kinds) > 1:
        for kind in kinds:
            own = {key: value for key, value in kind["properties"].items() if key not in shared}
            yield f"**`kind: {own.pop('kind')['const']}`**: {_escape(kind['description'])}"
            yield ""
            if own:
                yield from _table(name, own, below)
    for key, value in below.items():
        yield from _section(key, value)


def _table(section: str, keys: dict[str, Schema], below: dict[str, Schema]) -> Iterator[str]:
    """The lines of a table of keys; what has keys of its own is noted in `below`, by its full name."""
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for key, node in keys.items():
        name = f"{section}.{key}".lstrip(".")
        inner = _inner_section(node)
        if inner is not None:
            below[name] = inner
        label = f"[`{key}`](#{name.replace('.', '')})" if inner is not None else f"`{key}`"
        default = (
            f"`{inline_yaml(node['default'])}`" if "default" in node else "" if inner is not None else "must be given"
        )
        yield f"| {label} | {_values(node)} | {default} | {_escape(node['description'])} |"
    yield ""


def _inner_section(node: Schema) -> Schema | None:
    """The section that a key holds, or that the members of its list are."""
    if "properties" in node or "oneOf" in node:
        return node
    candidates = [*node.get("anyOf", []), node.get("items", {})]
    return next((candidate for candidate in candidates if "properties" in candidate), None)


def _values(node: Schema, *, plural: bool = False) -> str:
    """What a key may be, in words."""
    s = "s" if plural else ""
    match node:
        case {"anyOf": members}:
            return " or ".join(_values(member, plural=plural) for member in members)
        case {"enum": [None, *_]}:
            return "`none`"
        case {"enum": values}:
            return ", ".join(f"`{value}`" for value in values)
        case {"const": value}:
            return f"`{value}`"
        case {"properties": _} | {"oneOf": _}:
            return f"section{s}"
        case {"type": "boolean"}:
            return "`true`, `false`"
        case {"type": "array", "items": items}:
            number = f"{node['minItems']} " if node.get("minItems", 0) == node.get("maxItems") else ""
            return f"list{s} of {number}{_values(items, plural=True)}"
        case {"type": "string"}:
            return f"text{s}"
        case {"type": kind}:
            return f"{kind}{s}{_bounds(node)}"
    raise AssertionError(node)


def _bounds(node: Schema) -> str:
    if "minimum" in node and "maximum" in node:
        return f" {inline_yaml(node['minimum'])}..{inline_yaml(node['maximum'])}"
    signs = dict(zip(BOUNDS, ("≥", ">", "≤", "<"), strict=True))
    bounds = [f"{signs[key]} {inline_yaml(node[key])}" for key in BOUNDS if key in node]
    return f" {', '.join(bounds)}" if bounds else ""


def _escape(text: str) -> str:
    """Text in a table of Markdown."""
    return text.replace("|", "\\|").replace("<", "&lt;")
