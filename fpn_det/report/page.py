"""One page of HTML that needs no other file and no network: sections of tables, numbers, charts and pictures.

The functions return markup (`Html`); any other text that they are given, such as names from files, is escaped. Should
one slip through all the same, the page's Content-Security-Policy runs no script but its own and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fpn_det.report.assets import SCRIPT, STYLE
from fpn_det.structures import printable

Media = Literal["image/png", "image/jpeg"]


class Html(str):
    """Markup, which stands in the page as it is."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table that is sorted by a number.

    Attributes:
        shown: what stands there.
        value: what the column is sorted by; None goes to the end.
    """

    shown: str
    value: float | None


LONG_TEXT = 30  # characters; cells of more keep a width in which they can be read, and the table scrolls

Row = Sequence[str | Html | Cell]
"""Cells of a table from left to right."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of a grid.

    Attributes:
        data: the encoded image.
        caption: what stands below it.
        alt: what it shows, for those who do not see it.
        media: how it is encoded.
    """

    data: bytes
    caption: str | Html
    alt: str
    media: Media = "image/jpeg"


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page.

    Attributes:
        title: its heading; a short one, because it is in the list of contents too.
        body: what the functions below return; plain strings become paragraphs.
        intro: a sentence or two on what to see here.
    """

    title: str
    body: Sequence[str | Html]
    intro: str = ""


def page(title: str, sections: Sequence[Section], *, intro: str | Html = "", footer: str = "") -> str:
    """A whole document.

    Args:
        title: of the page.
        sections: in the order of reading.
        intro: what is shown below the title.
        footer: what is shown at the end.

    Returns:
        HTML, to be written as UTF-8.
    """
    own_script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{own_script}'; "
        "base-uri 'none'; form-action 'none'"
    )
    contents = "".join(f'<li><a href="#s{i}">{markup(s.title)}</a></li>' for i, s in enumerate(sections))
    parts = "\n".join(
        f'<section id="s{i}" aria-labelledby="h{i}"><h2 id="h{i}">{markup(s.title)}</h2>'
        f"{paragraph(s.intro) if s.intro else ''}{''.join(map(_block, s.body))}</section>"
        for i, s in enumerate(sections)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{markup(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{markup(title)}</h1>{_block(intro) if intro else ""}</header>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
{parts}
</main>
<footer>{markup(footer)}</footer>
<dialog aria-label="Enlarged picture"><img alt=""><div class="panel">\
<button type="button" data-step="-1" aria-label="Previous picture">←</button>\
<button type="button" data-step="1" aria-label="Next picture">→</button><p></p>\
<button type="button">Close</button></div></dialog>
<script>{SCRIPT}</script>
</body>
</html>
"""


def markup(text: str | Html) -> Html:
    """Text as markup: `Html` as it is, any other string escaped, for browsers and for eyes (`printable`)."""
    return text if isinstance(text, Html) else Html(html.escape(printable(text, keep="\n")))


def paragraph(text: str | Html, *, soft: bool = False) -> Html:
    """A paragraph; line breaks are kept. `soft` makes it smaller and paler, for remarks."""
    return Html(f"<p{' class=soft' if soft else ''}>{markup(text)}</p>")


def heading(text: str) -> Html:
    """A heading within a section."""
    return Html(f"<h3>{markup(text)}</h3>")


def cards(numbers: Mapping[str, str], *, notes: Mapping[str, str] | None = None) -> Html:
    """Numbers to see first, each with its name and perhaps a small note below."""
    notes = notes or {}
    items = "".join(
        f'<div class="card"><dt>{markup(name)}</dt><dd>{markup(value)}'
        f"{f'<small>{markup(notes[name])}</small>' if name in notes else ''}</dd></div>"
        for name, value in numbers.items()
    )
    return Html(f'<dl class="cards">{items}</dl>')


def number(value: float | None, digits: int = 1, *, signed: bool = False) -> Cell:
    """A number for a table; '-' for None and NaN."""
    if value is None or math.isnan(value):
        return Cell("-", None)
    rounded = round(value, digits) + 0.0  # no -0.0
    return Cell(f"{rounded:{'+' if signed else ''},.{digits}f}", value)


def percent(value: float | None, *, signed: bool = False) -> Cell:
    """A fraction as a percentage for a table; '-' for None, NaN and -1, which COCO writes where there is no number."""
    return number(None if value is None or (value == -1 and not signed) else 100 * value, signed=signed)


def table(
    header: Sequence[str],
    rows: Sequence[Row],
    *,
    label: str,
    filterable: bool = False,
    marked: Sequence[bool] | None = None,
) -> Html:
    """A table that a click on a column's name sorts; it scrolls in its own box.

    Args:
        header: names of the columns.
        rows: as many cells each; a column of `Cell`s alone is one of numbers.
        label: what the table holds, for those who do not see the page, and in the field above it.
        filterable: whether a field above the table selects rows by what they contain.
        marked: which rows stand out.
    """
    numeric = [bool(rows) and all(isinstance(row[i], Cell) for row in rows) for i in range(len(header))]
    heads = "".join(
        f'<th scope="col" aria-sort="none"{" class=number" if is_number else ""}>'
        f'<button type="button">{markup(name)}</button></th>'
        for name, is_number in zip(header, numeric, strict=True)
    )
    marks = marked or [False] * len(rows)
    body = "".join(
        f"<tr{' class=marked' if mark else ''}>{''.join(map(_cell, row))}</tr>"
        for row, mark in zip(rows, marks, strict=True)
    )
    content = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{markup(label)}">'
        f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    if not filterable:
        return Html(content)
    field = f'<label>Filter: {markup(label)} <input class="filter" type="search"></label>'
    return Html(f'<div class="filtered">{field}{content}</div>')


def figure(data: bytes, *, alt: str, caption: str | Html = "", media: Media = "image/png") -> Html:
    """A chart or picture, which a click enlarges.

    Args:
        data: the encoded image.
        alt: what it shows, for those who do not see it.
        caption: what stands below it.
        media: how it is encoded.
    """
    encoded = base64.b64encode(data).decode()
    below = f"<figcaption>{markup(caption)}</figcaption>" if caption else ""
    return Html(
        f'<figure><button class="zoom" type="button" aria-label="Enlarge: {markup(alt)}">'
        f'<img alt="{markup(alt)}" src="data:{media};base64,{encoded}"></button>{below}</figure>'
    )


def grid(pictures: Sequence[Picture], *, width_px: int = 260) -> Html:
    """Pictures side by side, as many as fit; a click enlarges one, arrow keys go on to the next.

    Args:
        pictures: in the order of reading.
        width_px: that each has at least.
    """
    items = "".join(figure(p.data, alt=p.alt, caption=p.caption, media=p.media) for p in pictures)
    return Html(f'<div class="grid" style="--width: {width_px}px">{items}</div>')


def row(*pieces: Html) -> Html:
    """Pieces side by side where the screen is wide enough."""
    return Html(f'<div class="row">{"".join(f"<div>{piece}</div>" for piece in pieces)}</div>')


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str, alt: str) -> Html:
    """Lines over 0..1 in both directions, drawn in the colours of the page.

    Args:
        series: name -> points (x, y), of up to four lines.
        x_label: what x is.
        y_label: what y is.
        alt: what the chart shows, for those who do not see it.
    """
    width, height, left, bottom, top = 400, 300, 44, 40, 24
    right = width - 12

    def place(x: float, y: float) -> str:
        return f"{left + x * (right - left):.1f},{height - bottom - y * (height - bottom - top):.1f}"

    ticks = [i / 5 for i in range(6)]
    x_ticks = [f'<path class="axis" d="M{place(t, 0)} L{place(t, 1)}"/>' for t in ticks]
    y_ticks = [f'<path class="axis" d="M{place(0, t)} L{place(1, t)}"/>' for t in ticks]
    x_texts = [_svg_text(f"{t:.1f}", *place(t, 0).split(","), dy=16) for t in ticks]
    y_texts = [_svg_text(f"{t:.1f}", *place(0, t).split(","), dx=-6, dy=4, anchor="end") for t in ticks]
    names = [_svg_text(x_label, *place(0.5, 0).split(","), dy=34), _svg_text(y_label, "2", "12", anchor="start")]
    drawn = []
    for i, (name, points) in enumerate(series.items()):
        path = " ".join(place(x, y) for x, y in points)
        drawn.append(f'<polyline class="line{i}" points="{path}"/>')
        names.append(_svg_text(name, str(right - 90 * (len(series) - 1 - i)), "12", anchor="end", kind=f"line{i}"))
    return Html(
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{markup(alt)}">'
        f"{''.join([*x_ticks, *y_ticks, *drawn, *x_texts, *y_texts, *names])}</svg>"
    )


def details(summary: str, *body: str | Html) -> Html:
    """Pieces that a click on the summary opens."""
    return Html(f"<details><summary>{markup(summary)}</summary>{''.join(map(_block, body))}</details>")


def code(text: str) -> Html:
    """Text as it is written in a file, such as a config."""
    return Html(f"<pre>{markup(text)}</pre>")


def choices(label: str, pieces: Mapping[str, Html]) -> Html:
    """One of several pieces, chosen from a list of their names; the first to begin with."""
    options = "".join(f"<option>{markup(name)}</option>" for name in pieces)
    bodies = "".join(f'<div class="piece"{" hidden" if i else ""}>{p}</div>' for i, p in enumerate(pieces.values()))
    return Html(
        f'<div class="choices"><label>{markup(label)} <select class="choice">{options}</select></label>{bodies}</div>'
    )


def _cell(cell: str | Html | Cell) -> str:
    if isinstance(cell, Cell):
        value = "" if cell.value is None else repr(float(cell.value))
        return f'<td class="number" data-value="{value}">{markup(cell.shown)}</td>'
    is_long = len(cell) > LONG_TEXT and not isinstance(cell, Html)
    return f"<td{' class=long' if is_long else ''}>{markup(cell)}</td>"


def _svg_text(text: str, x: str, y: str, *, dx: int = 0, dy: int = 0, anchor: str = "middle", kind: str = "") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" dx="{dx}" dy="{dy}" text-anchor="{anchor}">{markup(text)}</text>'


def _block(text: str | Html) -> Html:
    return text if isinstance(text, Html) else paragraph(text)
