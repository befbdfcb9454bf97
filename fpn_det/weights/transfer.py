"""What a detector takes over from the weights of another, whose classes or parts may differ (fine-tuning).

Layers of the same name and shape are taken whole. Of the two layers with rows for each class, the rows of classes that
both detectors have are kept, and those of the background. Everything else keeps the values it was initialised with.
Nothing of this is silent: `Transfer` has a row for each part.

Dimensions: K classes, B background rows, D features of a RoI.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap

from torch import Tensor

from fpn_det.structures import Categories, printable

_PARTS = re.compile(
    r"backbone|neck|rpn\.head(\.levels\.\d+)?\.[a-z_]+|roi_head(\.stages\.\d+)?\.(box_head|class_logits|box_deltas)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRow:
    """What became of one part of the detector.

    Attributes:
        part: `backbone`, `neck`, `rpn.head.objectness`, ...
        num_taken, num_tensors: how many of its tensors hold values of the source, all of them or some rows.
        note: which rows were kept, or which layers were initialised and why; empty if all was taken as it is.
    """

    part: str
    num_taken: int
    num_tensors: int
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """The new weights, and where they come from.

    Attributes:
        state_dict: all tensors of the detector.
        rows: one per part, in the order of the detector.
        initialised: names of the layers that hold nothing of the source.
        unused: tensors of the source per part for which the detector has no layer.
        kept: names of the classes whose rows were kept.
        new: names of the other classes.
        near: pairs of a new class and a class of the source whose names differ by case, spaces or hyphens only.
    """

    state_dict: dict[str, Tensor]
    rows: tuple[PartRow, ...]
    initialised: tuple[str, ...]
    unused: dict[str, int]
    kept: tuple[str, ...]
    new: tuple[str, ...]
    near: tuple[tuple[str, str], ...]

    def table(self) -> str:
        """All but the tensors as text; names are escaped for a terminal."""
        width = max(len(row.part) for row in self.rows)
        lines = [f"{'part':{width}}  tensors taken"]
        for row in self.rows:
            counts = f"{row.num_taken} of {row.num_tensors}"
            lines.append(f"{row.part:{width}}  {f'{counts:13}  {row.note}' if row.note else counts}")
        lines += [f"{part:{width}}  not used: {number} tensors there" for part, number in self.unused.items()]
        if any(row.part.endswith("class_logits") for row in self.rows):
            lines += _listing("rows kept", self.kept) + _listing("new rows", self.new)
        lines += [
            f"{printable(own)!r} is a new class, though {printable(theirs)!r} is known: if they are the same, give the "
            "category that name in both annotation files"
            for own, theirs in self.near
        ]
        return "\n".join(lines)


def transfer(
    source: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    source_categories: Categories,
    categories: Categories,
) -> Transfer:
    """Put the weights of one detector into another.

    Args:
        source: state dict of the trained detector.
        own: state dict of the other one, as initialised; its tensors are not changed.
        source_categories: of the trained detector.
        categories: of the other one.
    """
    index = same_classes(source_categories, categories)
    kept = [i for i, theirs in enumerate(index) if theirs is not None]
    state_dict = dict(own)
    taken: Counter[str] = Counter()
    notes: dict[str, list[str]] = defaultdict(list)
    layers: dict[str, list[str]] = defaultdict(list)
    initialised = []
    for name in own:
        layers[name.rpartition(".")[0]].append(name)
    for layer, names in layers.items():
        part = part_of(layer)
        note = ""
        if layer.endswith("class_logits"):
            merged, note = _classifier(source, own, names, index, len(source_categories))
        elif layer.endswith("box_deltas"):
            merged, note = _regressor(source, own, names, index, len(source_categories))
        else:
            merged = _whole(source, own, names)
        if merged is None:
            initialised.append(layer)
            notes[part].append(f"{layer}: {_reason(source, own, names)}")
        else:
            state_dict |= merged
            taken[part] += len(names)
            notes[part] += [note] if note else []
    totals = Counter(part_of(name) for name in own)
    there = Counter(part_of(name) for name in source)
    new = [i for i in range(len(categories)) if i not in set(kept)]
    return Transfer(
        state_dict=state_dict,
        rows=tuple(
            PartRow(part=part, num_taken=taken[part], num_tensors=total, note=_note(notes[part], taken[part]))
            for part, total in totals.items()
        ),
        initialised=tuple(initialised),
        unused={part: number for part, number in there.items() if part not in totals},
        kept=tuple(categories.names[i] for i in kept),
        new=tuple(categories.names[i] for i in new),
        near=_near([categories.names[i] for i in new], source_categories.names),
    )


def same_classes(source: Categories, own: Categories) -> list[int | None]:
    """For each of our classes the index of that of the same name there; None if there is none.

    A name that several classes share tells nothing, unless the classes are the same altogether.
    """
    if source == own:
        return list(range(len(own)))
    unique = {name for categories in (own, source) for name, count in Counter(categories.names).items() if count == 1}
    repeated = {name for categories in (own, source) for name, count in Counter(categories.names).items() if count > 1}
    place = {name: i for i, name in enumerate(source.names) if name in unique - repeated}
    return [place.get(name) for name in own.names]


def part_of(name: str) -> str:
    """The part of the detector that a tensor or layer belongs to, as the table names it."""
    match = _PARTS.match(name)
    return match[0] if match else name.partition(".")[0]


def _whole(source: Mapping[str, Tensor], own: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor] | None:
    """All tensors of a layer from the source; None unless all fit. Counts of updated statistics may lack there."""
    found = {name: source[name] for name in names if name in source and source[name].shape == own[name].shape}
    fits = all(name in found or name.endswith("num_batches_tracked") for name in names)
    return found if fits else None


def _classifier(
    source: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    names: Sequence[str],
    index: Sequence[int | None],
    num_source_classes: int,
) -> tuple[dict[str, Tensor] | None, str]:
    """(K + B, D) and (K + B,) with the rows of known classes and of the background, and a note; None if D differs."""
    if not _same_but_for_rows(source, own, names):
        return None, ""
    own_background = len(own[names[0]]) - len(index)
    background = len(source[names[0]]) - num_source_classes
    num_kept = min(background, own_background)  # the first is the background, the others are labels without a class
    merged = {}
    for name in names:
        values = own[name].clone()
        values[len(index) :][:num_kept] = source[name][num_source_classes:][:num_kept]
        merged[name] = _with_rows(values, source[name], index, rows_per_class=1)
    some = "" if background == own_background else f" ({num_kept} of {background} rows there, {own_background} here)"
    return merged, f"rows of {_num_known(index)} classes and background{some}"


def _regressor(
    source: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    names: Sequence[str],
    index: Sequence[int | None],
    num_source_classes: int,
) -> tuple[dict[str, Tensor] | None, str]:
    """(4 K, D) and (4 K,) with the rows of known classes, or (4, D) and (4,) of class-agnostic boxes, and a note."""
    if not _same_but_for_rows(source, own, names):
        return None, ""
    num_rows, num_source_rows = len(own[names[0]]), len(source[names[0]])
    per_class = num_rows == 4 * len(index) and num_source_rows == 4 * num_source_classes
    if not per_class:  # one of them is class-agnostic
        return (_whole(source, own, names) if num_rows == num_source_rows else None), "of all classes together"
    merged = {name: _with_rows(own[name].clone(), source[name], index, rows_per_class=4) for name in names}
    return merged, f"rows of {_num_known(index)} classes"


def _num_known(index: Sequence[int | None]) -> int:
    return sum(theirs is not None for theirs in index)


def _same_but_for_rows(source: Mapping[str, Tensor], own: Mapping[str, Tensor], names: Sequence[str]) -> bool:
    return all(name in source and source[name].shape[1:] == own[name].shape[1:] for name in names)


def _with_rows(values: Tensor, theirs: Tensor, index: Sequence[int | None], *, rows_per_class: int) -> Tensor:
    """`values` with the rows of each class that has an index in `theirs`, in place."""
    n = rows_per_class
    for i, j in enumerate(index):
        if j is not None:
            values[n * i : n * (i + 1)] = theirs[n * j : n * (j + 1)]
    return values


def _reason(source: Mapping[str, Tensor], own: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """Why a layer cannot be taken."""
    for name in names:
        if name not in source and not name.endswith("num_batches_tracked"):
            return "not there"
        if name in source and source[name].shape != own[name].shape:
            return f"{tuple(source[name].shape)} there, {tuple(own[name].shape)} here"
    raise AssertionError("it fits")


def _note(notes: Sequence[str], num_taken: int) -> str:
    """Of a part with those of its layers; where nothing was taken, one reason is enough."""
    if num_taken == 0:
        return f"initialised ({notes[0].partition(': ')[2]})"
    misfits = [note for note in notes if ": " in note]
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        return f"initialised: {'; '.join(misfits[:3])}{more}"
    return notes[0] if notes else ""


def _near(names: Iterable[str], source_names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Pairs of names that differ by case, spaces, hyphens and underscores only."""

    def bare(name: str) -> str:
        return re.sub(r"[\s_-]+", "", name).casefold()

    known = {bare(name): name for name in source_names}
    return tuple((name, known[bare(name)]) for name in names if known.get(bare(name), name) != name)


def _listing(title: str, names: Sequence[str]) -> list[str]:
    text = f"{title} ({len(names)}): {', '.join(map(printable, names)) or 'none'}"
    return wrap(text, 118, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
