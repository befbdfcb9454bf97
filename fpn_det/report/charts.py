"""Charts as PNG files, by matplotlib (the extra `report`): each function returns the encoded image.

Figures are drawn without pyplot: nothing is kept, and no setting of matplotlib changes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fpn_det.extras import require
from fpn_det.structures import printable

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
"""Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), which colour-blind readers tell apart."""

_TEXT, _PALE, _GRID = "#3a4149", "#9aa4ae", "#d4d9de"
_COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
_MAX_NAME = 22  # letters of a name on an axis


def lines(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    diagonal: bool = False,
    whole_x: bool = False,
) -> bytes:
    """Lines over numbers.

    Args:
        series: name -> x and y.
        x_label: what x is.
        y_label: what y is.
        x_range: first and last x.
        y_range: first and last y.
        diagonal: whether to mark x = y.
        whole_x: whether x are whole numbers.
    """
    figure, axes = _figure(6.0, 4.2)
    if whole_x:
        axes.xaxis.get_major_locator().set_params(integer=True)
    if diagonal:
        axes.axline((0, 0), slope=1, color=_TEXT, linewidth=1, linestyle=":")
    for (name, (x, y)), color in zip(series.items(), cycle(_COLORS), strict=False):
        marker = "o" if np.size(x) == 1 else None  # which a line would not show
        axes.plot(x, y, label=_name(name), color=color, linewidth=2, marker=marker)
    _labels(axes, x_label, y_label, x_range, y_range)
    _legend(axes)
    return _png(figure)


def horizontal_bars(values: Mapping[str, float], *, x_label: str, color: str = BLUE) -> bytes:
    """One bar for each name, the first on top, with its value."""
    figure, axes = _figure(6.0, 0.8 + 0.42 * max(1, len(values)))
    names = [_name(name) for name in values]
    bars = axes.barh(range(len(values)), list(values.values()), color=color, height=0.65)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=10, color=_TEXT)
    axes.set_yticks(range(len(values)), names, parse_math=False)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(min(0, *values.values()), max(1, *values.values()) * 1.15)
    _labels(axes, x_label, "")
    return _png(figure)


def intervals(rows: Sequence[tuple[str, float, float, float]], *, x_label: str) -> bytes:
    """A point and its interval for each (name, value, low, high), the first on top; pale where 0 is inside."""
    figure, axes = _figure(6.0, 0.9 + 0.34 * max(1, len(rows)))
    axes.axvline(0, color=_TEXT, linewidth=1)
    for i, (_, value, low, high) in enumerate(rows):
        color = BLUE if low > 0 or high < 0 else _PALE
        axes.plot([low, high], [i, i], color=color, linewidth=3, solid_capstyle="round")
        axes.plot([value], [i], color=color, marker="o", markersize=7)
    axes.set_yticks(range(len(rows)), [_name(name) for name, *_ in rows], parse_math=False)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    _labels(axes, x_label, "")
    return _png(figure)


def grouped_bars(groups: Sequence[str], series: Mapping[str, Sequence[float]], *, y_label: str) -> bytes:
    """A bar of each series in each group; NaN leaves a gap."""
    figure, axes = _figure(6.0, 4.0)
    width = 0.8 / max(1, len(series))
    for i, ((name, values), color) in enumerate(zip(series.items(), cycle(_COLORS), strict=False)):
        places = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        axes.bar(places, values, width=width * 0.92, label=_name(name), color=color)
    axes.set_xticks(range(len(groups)), [_name(g) for g in groups], rotation=30, ha="right", parse_math=False)
    axes.grid(axis="x", visible=False)
    _labels(axes, "", y_label, None, (0, 100))
    _legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(series))
    return _png(figure)


def reliability(scores: Sequence[float], precision: Sequence[float], counts: Sequence[int]) -> bytes:
    """How often detections of a score are right, and how many there are.

    Args:
        scores: mean score of each bin, 0..1; bins without detections are not drawn.
        precision: share of right ones, 0..1.
        counts: detections of each bin.
    """
    figure, (top, bottom) = _figure(6.0, 5.0, nrows=2, height_ratios=(3, 1), sharex=True)
    used = np.array(counts) > 0
    x, y = np.array(scores)[used], np.array(precision)[used]
    top.axline((0, 0), slope=1, color=_TEXT, linewidth=1, linestyle=":", label="perfect")
    top.plot(x, y, color=BLUE, marker="o", linewidth=2, label="measured")
    top.vlines(x, np.minimum(x, y), np.maximum(x, y), color=RED, linewidth=3, alpha=0.6, label="gap")
    _legend(top, loc="upper left")
    _labels(top, "", "precision", (0, 1), (0, 1))
    edges = np.linspace(0, 1, len(counts) + 1)
    bottom.bar((edges[:-1] + edges[1:]) / 2, counts, width=0.9 / max(1, len(counts)), color=BLUE)
    _labels(bottom, "score", "detections")
    return _png(figure)


def heat_map(shares: NDArray[np.float64], names: Sequence[str]) -> bytes:
    """A confusion matrix: rows ground truth, columns detections, the last of both background.

    Args:
        shares: (K + 1, K + 1), 0..1.
        names: of the K classes.
    """
    size = len(names) + 1
    side = float(np.clip(2.2 + 0.45 * size, 4.5, 14.0))
    figure, axes = _figure(side, side * 0.95)
    colors = require("matplotlib.colors", extra="report", purpose="Drawing charts")
    scale = colors.PowerNorm(0.5, vmin=0, vmax=1)  # a confusion of 2 percent is seen too
    image = axes.imshow(shares, cmap="cividis", norm=scale)
    font = float(np.clip(72 * 0.6 * (side - 2.2) / size, 4.0, 10.0))
    columns, rows = ([*(_name(n) for n in names), last] for last in ("nothing (missed)", "nothing (false)"))
    axes.set_xticks(range(size), columns, rotation=90, fontsize=font, parse_math=False)
    axes.set_yticks(range(size), rows, fontsize=font, parse_math=False)
    if size <= 16:
        for i, j in np.argwhere(shares >= 0.005):
            color = "#000000" if shares[i, j] > 0.3 else "#ffffff"
            axes.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", color=color, fontsize=9)
    axes.grid(visible=False)
    _labels(axes, "detected", "ground truth")
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02)
    bar.ax.set_ylabel("share of the row", color=_TEXT)
    return _png(figure)


def _figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    """A figure of so many inches, with its axes."""
    figures = require("matplotlib.figure", extra="report", purpose="Drawing charts")
    figure = figures.Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    height_ratios = grid.pop("height_ratios", None)
    axes = figure.subplots(gridspec_kw={"height_ratios": height_ratios} if height_ratios else None, **grid)
    for each in np.atleast_1d(axes):
        each.grid(color=_GRID, linewidth=0.8)
        each.set_axisbelow(True)
        each.tick_params(colors=_TEXT, labelsize=10)
        for name, spine in each.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(_GRID)
    return figure, axes


def _labels(
    axes: Any,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> None:
    axes.set_xlabel(x_label, color=_TEXT)
    axes.set_ylabel(y_label, color=_TEXT)
    if x_range is not None:
        axes.set_xlim(x_range)
    if y_range is not None:
        axes.set_ylim(y_range)


def _legend(axes: Any, **place: Any) -> None:
    for text in axes.legend(frameon=False, fontsize=10, **place).get_texts():
        text.set_parse_math(False)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks appears as boxes
        figure.savefig(file, format="png")
    return file.getvalue()


def _name(text: str) -> str:
    """A name, short enough for an axis."""
    text = printable(text)
    return text if len(text) <= _MAX_NAME else f"{text[: _MAX_NAME - 1]}…"
