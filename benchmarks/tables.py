"""Results of bench.py as tables: on the console, and in a document between two markers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fpn_det.structures import InputError

BEGIN, END = "<!-- benchmarks/bench.py writes from here .. -->", "<!-- .. to here -->"
Results = dict[str, Any]


def read_document(path: Path) -> tuple[str, str]:
    """What stands before and after the tables.

    Raises:
        InputError: the document has no markers.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{path}: needs the lines {BEGIN!r} and {END!r} once each: tables are written between them")
    return text.split(BEGIN)[0], text.split(END)[1]


def write_markdown(path: Path, folder: Path) -> None:
    """Rewrite what lies between the markers of a document from all JSON files of a folder."""
    before, after = read_document(path)
    every = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    body = "\n\n".join(report(results, folded=True) for results in every)
    path.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")


TITLES = {
    "roofline": "Roofline of our training step, eager",
    "scaling": "Seconds per training step as the work grows",
    "loader": "Loader, one thread",
    "annotations": "Opening annotations of COCO's size",
    "evaluator": "Evaluator",
    "matching": "Matching",
    "nms": "NMS",
}


def report(results: Results, *, folded: bool = False) -> str:
    """All tables of one device; `folded` hides the long one until a reader opens it."""
    device, ceilings = results["device"], results["ceilings"]
    title = f"## {device['name']}"
    versions = ", ".join(f"{key} {value}" for key, value in device.items() if key != "name")
    peaks = ", ".join(f"{v:.3g} {'' if k == 'GB/s' else 'TFLOP/s '}{k}" for k, v in ceilings.items())
    blocks = [title, f"{versions}.", f"Measured ceilings (matrix product or 3x3 convolution, copy): {peaks}."]
    if cases := results["cases"]:
        blocks += ["### Images per second, and times torchvision's best setting", summary(cases)]
        details = every_setting(cases)
        fold = f"<details><summary>Every setting</summary>\n\n{details}\n\n</details>"
        blocks.append(fold if folded else details)
    special = {"roofline": rooflines, "scaling": scaling_table}
    for part, values in results["parts"].items():
        form = special.get(part, lambda values: table(["", "value"], flat(values)))
        blocks += [f"### {TITLES[part]}", form(values)]
    if missing := not_measured(results):
        blocks += ["### Not measured", "\n".join(f"- {line}" for line in missing)]
    return "\n\n".join(blocks)


def summary(cases: Results) -> str:
    """A row per case: the best setting of torchvision, and every other contender."""
    others = list(dict.fromkeys(v for c in cases.values() for v in c["variants"] if not v.startswith("torchvision")))
    rows = []
    for name, case in cases.items():
        best, best_s = best_of(case, "torchvision")
        cells = [
            f"{case['batch'] / best_s:.3g} ({best.removeprefix('torchvision').strip() or 'eager'})" if best else "-"
        ]
        for variant in others:
            seconds = case["variants"].get(variant, {}).get("median_s")
            ratio = f" **{best_s / seconds:.2f}x**" if seconds and best else ""
            cells.append(f"{case['batch'] / seconds:.3g}{ratio}" if seconds else "-")
        rows.append([name, *cells])
    return table(["case", "torchvision's best", *others], rows)


def best_of(case: Results, prefix: str) -> tuple[str, float]:
    """The fastest variant whose name begins so, and its seconds; an empty name if none was measured."""
    measured = {v: r["median_s"] for v, r in case["variants"].items() if v.startswith(prefix) and "median_s" in r}
    best = min(measured, key=lambda v: measured[v], default="")
    return best, measured.get(best, float("nan"))


COLUMNS = {
    "ms/step": lambda r: f"{1e3 * r['median_s']:.4g}",
    "quartiles": lambda r: f"{1e3 * r['quartiles_s'][0]:.4g} - {1e3 * r['quartiles_s'][1]:.4g}",
    "first step s": lambda r: f"{r['first_s']:.3g}",
    "TFLOP/s": lambda r: f"{r['tflops']:.3g}",
    "of ceiling": lambda r: f"{r['of_ceiling']:.0%}",
    "peak GiB": lambda r: f"{r['peak_gib']:.3g}",
    "syncs": lambda r: str(r["syncs"]),
    "kernels": lambda r: str(r["kernels"]),
    "data wait": lambda r: f"{r['data_wait']:.1%}",
}


def every_setting(cases: Results) -> str:
    """A row per case and variant with all that was measured; columns without a value are left out."""
    rows = []
    for name, case in cases.items():
        for variant, row in case["variants"].items():
            if "median_s" in row:
                rows.append(
                    [name, variant, *(cell(form, row) for form in COLUMNS.values()), case["commit"], case["date"]]
                )
    header = ["case", "setting", *COLUMNS, "commit", "date"]
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return table([header[i] for i in used], [[row[i] for i in used] for row in rows])


def cell(form: Any, row: Results) -> str:
    """One value, or nothing where it was not measured."""
    try:
        return str(form(row))
    except (KeyError, TypeError):
        return ""


def rooflines(values: Results) -> str:
    """Per case: FLOPs, bytes and the shortest time of each part."""
    blocks = []
    for name, roofline in values.items():
        parts = roofline["parts"]
        bound = sum(max(part["compute_ms"], part["memory_ms"]) for part in parts.values())
        measured = "".join(f", {variant} took {1e3 * s:.0f} ms" for variant, s in roofline["measured_s"].items())
        header = ["part", "GFLOP", "GB", "ms of products", "ms of memory"]
        keys = ("gflop", "gbyte", "compute_ms", "memory_ms")
        rows = [[part, *(f"{counts[key]:.4g}" for key in keys)] for part, counts in parts.items()]
        blocks.append(f"{name}: at least {bound:.0f} ms (the larger time of each part, summed){measured}.")
        blocks.append(table(header, rows))
    return "\n\n".join(blocks)


def scaling_table(scaling: Results) -> str:
    """Seconds of each framework, and growth from the first row of an axis."""
    rows = []
    for axis, points in scaling["axes"].items():
        for point in points:
            cells = []
            for variant, seconds in point["seconds"].items():
                first = points[0]["seconds"].get(variant)
                cells.append(f"{seconds:.3g} ({seconds / first:.2f}x)" if seconds and first else "-")
            rows.append([axis, point["value"], *cells])
    variants = list(next(iter(scaling["axes"].values()))[0]["seconds"])
    return f"Base: {scaling['base']}.\n\n{table(['axis', 'value', *variants], rows)}"


def not_measured(results: Results) -> list[str]:
    """What failed and what was left out, with the reasons; the same reason is told once per variant."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, case in results["cases"].items():
        for variant, row in case["variants"].items():
            if "error" in row:
                reasons.setdefault((variant, row["error"]), []).append(name)
    failed = [f"{v} in {n[0] if len(n) == 1 else f'{len(n)} cases'}: {error}" for (v, error), n in reasons.items()]
    return [*(f"{what}: {why}" for what, why in results["not_measured"].items()), *failed]


def flat(values: Results, prefix: str = "") -> Iterable[list[str]]:
    """Rows of name and value from nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}: ")
        else:
            yield [f"{prefix}{key}", f"{value:.4g}" if isinstance(value, float) else str(value)]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table whose columns are aligned as plain text too."""
    lines = [list(header), *([str(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
