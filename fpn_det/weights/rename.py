"""The renaming engine of the import: rules from another framework's tensor names to ours, and the table of what became
of every tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fpn_det.structures import Categories, InputError, printable

Action = Literal["taken", "permuted", "changed", "added", "left out"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of the tensors whose whole name matches a pattern.

    Attributes:
        pattern: regular expression for the whole name.
        target: our name, with the groups of the pattern as \\1 or \\g<name>; None leaves the tensor out.
        note: for the table: how it is changed, or why it is left out.
        transform: applied to the values; None takes them as they are.
        action: the word for `transform` in the table: `permuted` if it only moves or selects values, else `changed`.
    """

    pattern: str
    target: str | None
    note: str = ""
    transform: Callable[[Tensor], Tensor] | None = None
    action: Literal["permuted", "changed"] = "permuted"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        source: name in the file; `-` for a tensor that was added.
        target: our name; `-` for a tensor that was left out.
        action: what was done.
        note: how, or why.
    """

    source: str
    target: str
    action: Action
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Weights of another framework in our names and layout.

    Attributes:
        kind: `detector`, or `body`: the classifier's layers C1..C5 alone, in torchvision's names.
        state_dict: the tensors.
        config: nested keys under which our model reproduces the source; the defaults fill the rest.
        categories: the classes in the order of the logits; None where the file does not tell.
        rows: one per tensor of the file, in its order, then the added ones.
        remarks: what the user should know about the choices made, one sentence each.
    """

    kind: Literal["detector", "body"]
    state_dict: dict[str, Tensor]
    config: dict[str, Any]
    rows: list[Row]
    categories: Categories | None = None
    remarks: tuple[str, ...] = ()


def rename(
    tensors: Mapping[str, Tensor], rules: Sequence[Rule], *, source: Path | str
) -> tuple[dict[str, Tensor], list[Row]]:
    """Apply the one rule that fits to each tensor.

    Args:
        tensors: by their name in the file.
        rules: at most one may match a name.
        source: the file, for the error.

    Returns:
        The tensors in our names, and a row per tensor of the file.

    Raises:
        InputError: naming the tensors without a rule, or two that would have the same name.
    """
    state_dict: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    rows: list[Row] = []
    unknown: list[str] = []
    for name, value in tensors.items():
        matching = [(rule, match) for rule in rules if (match := re.fullmatch(rule.pattern, name))]
        assert len(matching) <= 1, f"{name} matches {[rule.pattern for rule, _ in matching]}"
        if not matching:
            unknown.append(f"{name} {tuple(value.shape)}")
            continue
        [(rule, match)] = matching
        if rule.target is None:
            rows.append(Row(name, "-", "left out", rule.note))
            continue
        target = match.expand(rule.target)
        if target in origin:
            raise InputError(
                f"{source}: {origin[target]} and {name} are both the model's {target}; the file mixes two layouts. "
                "Delete one of them"
            )
        origin[target] = name
        state_dict[target] = value if rule.transform is None else rule.transform(value)
        rows.append(Row(name, target, "taken" if rule.transform is None else rule.action, rule.note))
    if unknown:
        examples = ", ".join(unknown[:20]) + (f" and {len(unknown) - 20} more" if len(unknown) > 20 else "")
        raise InputError(
            f"{source}: {len(unknown)} of {len(tensors)} tensors are of no known layer: {examples}. "
            "Nothing is dropped silently: if the model works without them, delete them from the file"
        )
    return state_dict, rows


def format_rows(rows: Iterable[Row]) -> str:
    """The table as text in aligned columns, one line per tensor; control characters are escaped."""
    cells = [("tensor of the file", "", "tensor here")]
    for row in rows:
        action = f"{row.action} ({row.note})" if row.note else row.action
        cells.append((printable(row.source), printable(action), printable(row.target)))
    widths = [max(len(line[i]) for line in cells) for i in (0, 2)]
    header, *lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {action or 'action'}".rstrip() for a, action, b in cells]
    return "\n".join([header, *lines])
