"""The page of tools/browse.py: what training sees, in figures and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_det.report.page import (
    Cell,
    Html,
    Picture,
    Section,
    cards,
    code,
    grid,
    heading,
    markup,
    number,
    page,
    paragraph,
    percent,
    row,
    table,
)
from fpn_det.report.survey import (
    TINY_PX,
    AnchorSet,
    Survey,
    by_class,
    by_size,
    changed_overrides,
    level_shares,
    quantiles,
)

BARS_PER_OCTAVE = 4
"""Of the histogram of sizes."""

STEPS = "Images as the training steps get them: augmented, resized, padded."

SIGNS = (
    "Colours tell the levels apart. A box is a positive, a disc the centre of a negative, a ring that of an anchor "
    "that is ignored. Boxes of the ground truth are white; red ones have no positive anchor at all, so the first stage "
    "does not learn to find them. Grey borders are padding. The samples are those of the losses."
)


def browse_page(
    survey: Survey, *, name: str, source: str, advice: Sequence[str], samples: Sequence[Sequence[Picture]], note: str
) -> str:
    """A whole document.

    Args:
        survey: of the training split.
        name: of the run.
        source: the annotation file, in words.
        advice: what is worth changing, anchors aside.
        samples: the pictures of each image.
        note: on the pictures.
    """
    shown: list[str | Html] = [paragraph(SIGNS, soft=True), *([paragraph(note)] if note else [])]
    shown += [grid(pictures, width_px=300) for pictures in samples]
    sections = [
        Section("Overview", [_overview(survey), *_advice([*advice, *_anchor_advice(survey)])]),
        *([Section("What the model sees", shown, STEPS)] if samples else []),
        *([_anchor_section(survey)] if survey.anchor_sets else []),
        _box_section(survey),
        _class_section(survey),
    ]
    return page(f"{name}: training data", sections, intro=source)


def format_overview(survey: Survey) -> str:
    """The essentials for a console: boxes by size, and anchors where there are some."""
    low, middle, high = quantiles(survey.side, (0.05, 0.5, 0.95))
    per_image = survey.boxes_per_image
    lines = [
        f"boxes at training scale: side {middle:.0f} px (5% below {low:.0f}, 5% above {high:.0f}); "
        f"{per_image.double().mean():.1f} per image, up to {int(per_image.max())}"
    ]
    present = survey.present
    header = ["side in px", "boxes", "share"]
    header += [f"IoU>={present.positive_iou:g}", "IoU>=0.5", "mean IoU"] if present else []
    rows = [header]
    for group in by_size(survey):
        rows.append([group.name, f"{group.num_boxes:,.0f}", f"{len(group.of) / len(survey.boxes):.1%}"])
        rows[-1] += _recalls(present, group.of) if present else []
    lines += _columns(rows)
    if present:
        lines.append(f"\nbest possible recall of anchors, ratios {_listed(present.ratios)}")
        rows = [["anchors", *header[3:], "sizes"]]
        rows += [
            [each.name, *_recalls(each, None), each.overrides()[0].partition("=")[2] + _other_ratios(present, each)]
            for each in survey.anchor_sets
        ]
        lines += _columns(rows)
        lines.append(_verdict(survey))
        if survey.suggested:
            lines += [f"  {override}" for override in changed_overrides(present, survey.suggested)]
    return "\n".join(lines)


def _overview(survey: Survey) -> Html:
    per_image = survey.boxes_per_image
    low, middle, high = quantiles(survey.side, (0.05, 0.5, 0.95))
    tiny = (survey.side < TINY_PX).double().mean().item()
    numbers = {
        "images": f"{len(per_image):,}",
        "boxes": f"{int(per_image.sum()):,}",
        "classes": str(len(survey.categories)),
        "boxes per image": f"{per_image.double().mean():.1f}",
        "side of a box": f"{middle:.0f} px",
        "tiny boxes": f"{tiny:.1%}",
    }
    notes = {
        "images": f"{int((per_image == 0).sum()):,} without boxes",
        "boxes per image": f"up to {int(per_image.max())}",
        "side of a box": f"median at training scale; 90% in {low:.0f} to {high:.0f}",
        "tiny boxes": f"below {TINY_PX} px at training scale",
    }
    if survey.present:
        numbers["anchor recall"] = f"{survey.present.recall(survey.present.positive_iou):.1%}"
        notes["anchor recall"] = f"boxes with an anchor of IoU {survey.present.positive_iou:g} or more"
    return cards(numbers, notes=notes)


def _advice(advice: Sequence[str]) -> list[Html]:
    if not advice:
        return [paragraph("Nothing stands out.")]
    items = "".join(f"<li>{markup(text)}</li>" for text in advice)
    return [heading("Worth a look"), Html(f"<ul>{items}</ul>")]


def _anchor_advice(survey: Survey) -> list[str]:
    old, new = survey.present, survey.suggested
    if old is None or new is None:
        return []
    return [
        f"Other anchors would cover the boxes better: recall at IoU {old.positive_iou:g} "
        f"{old.recall(old.positive_iou):.1%} -> {new.recall(new.positive_iou):.1%}, mean best IoU "
        f"{old.mean_iou():.3f} -> {new.mean_iou():.3f}: {' '.join(changed_overrides(old, new))}"
    ]


def _anchor_section(survey: Survey) -> Section:
    present = survey.anchor_sets[0]
    header = ["anchors", "sizes", "ratios", f"IoU ≥ {present.positive_iou:g}, %", "IoU ≥ 0.5, %", "mean IoU"]
    rows: list[list[str | Html | Cell]] = [
        [
            each.name,
            each.overrides()[0].partition("=")[2],
            _listed(each.ratios),
            percent(each.recall(each.positive_iou)),
            percent(each.recall(0.5)),
            number(each.mean_iou(), 3),
        ]
        for each in survey.anchor_sets
    ]
    sizes: list[list[str | Html | Cell]] = [
        [
            group.name,
            number(group.num_boxes, 0),
            percent(present.recall(present.positive_iou, group.of)),
            percent(present.recall(0.5, group.of)),
            number(present.mean_iou(group.of), 3),
        ]
        for group in by_size(survey)
    ]
    suggestion = survey.suggested
    override = [code(" ".join(changed_overrides(present, suggestion)))] if suggestion else []
    return Section(
        "Anchors",
        [
            table(header, rows, label="sets of anchors", marked=[each is suggestion for each in survey.anchor_sets]),
            paragraph(_verdict(survey)),
            *override,
            heading("As configured, by side of the box in px at training scale"),
            table(["side", "boxes", *header[3:]], sizes, label="recall by size"),
        ],
        "The best recall that any training of the first stage could reach: the share of boxes that some anchor, at its "
        "place in the image, overlaps enough.",
    )


def _box_section(survey: Survey) -> Section:
    low = math.floor(math.log2(max(1.0, survey.side.min().item())))
    high = math.ceil(math.log2(survey.side.max().item() + 1))
    high = max(high, low + 1)
    sides = _log_histogram(survey.side, low, high)
    ratios = _log_histogram(survey.ratio, -3, 3)
    charts = row(
        Html(
            heading("Side at training scale, px")
            + _bars(sides, [f"{2**k:g}" for k in range(low, high + 1)], label="histogram of the sides of boxes")
        ),
        Html(
            heading("Height / width")
            + _bars(ratios, ["1/8", "1/4", "1/2", "1", "2", "4", "8"], label="histogram of the aspect ratios of boxes")
        ),
        Html(heading("Boxes per image") + _per_image_chart(survey.boxes_per_image)),
    )
    body: list[str | Html] = [charts]
    levels = {"best anchor is of": survey.present.best.level} if survey.present else {}
    if survey.roi_level is not None:
        levels["pooled from"] = survey.roi_level
    if len(survey.level_names) > 1:
        shares = {what: level_shares(survey, level) for what, level in levels.items()}
        rows: list[list[str | Html | Cell]] = [
            [name, *(percent(share[i]) for share in shares.values())] for i, name in enumerate(survey.level_names)
        ]
        body += [heading("Share of the boxes by level, %"), table(["level", *shares], rows, label="levels")]
    what = f"each at {survey.num_scales} scales, " if survey.num_scales > 1 else ""
    return Section("Boxes", body, f"All boxes of the split, {what}in pixels of the resized image.")


def _class_section(survey: Survey) -> Section:
    present, low, high = survey.present, 0, 10
    names = survey.level_names if survey.roi_level is not None and len(survey.level_names) > 1 else []
    used = [name for i, name in enumerate(names) if bool((survey.roi_level == i).any())]  # type: ignore[union-attr]
    header = ["class", "boxes", "images", "side, median", "5%", "95%", f"below {TINY_PX} px, %", "1 to 1,024 px"]
    header += ["height / width", *(f"pooled from {name}, %" for name in used)]
    header += [f"IoU ≥ {present.positive_iou:g}, %", "mean IoU"] if present else []
    rows: list[list[str | Html | Cell]] = []
    for group, images in zip(by_class(survey), survey.images_per_class.tolist(), strict=True):
        side = survey.side[group.of]
        fifth, middle, last = quantiles(side, (0.05, 0.5, 0.95))
        tiny = (side < TINY_PX).double().mean().item()
        cells: list[str | Html | Cell] = [group.name, number(group.num_boxes, 0), number(images, 0)]
        cells += [number(middle, 0), number(fifth, 0), number(last, 0), percent(tiny)]
        cells.append(_spark(_log_histogram(side, low, high)))
        cells.append(number(quantiles(survey.ratio[group.of], (0.5,))[0], 2))
        if survey.roi_level is not None:
            shares = level_shares(survey, survey.roi_level, group.of)
            cells += [percent(share) for share, name in zip(shares, survey.level_names, strict=True) if name in used]
        if present:
            cells += [percent(present.recall(present.positive_iou, group.of)), number(present.mean_iou(group.of), 3)]
        rows.append(cells)
    return Section(
        "Classes",
        [table(header, rows, label="classes", filterable=True)],
        "Sides in px at training scale; the small charts show their histogram, from 1 px on the left to 1,024 on the "
        "right.",
    )


def _verdict(survey: Survey) -> str:
    if len(survey.anchor_sets) == 1:
        return "Too few boxes to suggest anchors."
    if survey.suggested is None:
        return "The anchors as configured are fine: no other sizes or ratios that were tried are much better."
    return (
        f"Suggested: {survey.suggested.name}. They change what the first stage learns: weights of an RPN that was "
        "trained with others do not fit them."
    )


def _recalls(anchors: AnchorSet, of: Tensor | None) -> list[str]:
    recalls = (anchors.recall(anchors.positive_iou, of), anchors.recall(0.5, of))
    return [*("-" if math.isnan(recall) else f"{recall:.1%}" for recall in recalls), f"{anchors.mean_iou(of):.3f}"]


def _listed(values: Sequence[float]) -> str:
    return f"[{','.join(f'{value:g}' for value in values)}]"


def _other_ratios(present: AnchorSet, other: AnchorSet) -> str:
    return "" if list(other.ratios) == list(present.ratios) else f", ratios {_listed(other.ratios)}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for a console, its first column and those after a number left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_text = [i == 0 or header == "sizes" for i, header in enumerate(rows[0])]
    return [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(cells, widths, is_text, strict=True)
        ).rstrip()
        for cells in rows
    ]


def _log_histogram(values: Tensor, low: int, high: int) -> list[float]:
    """Shares of values between 2**low and 2**high in equal parts of the logarithm; the ends take what lies beyond."""
    bars = BARS_PER_OCTAVE * (high - low)
    place = ((values.double().log2() - low) * BARS_PER_OCTAVE).floor().clamp(0, bars - 1).long()
    return (torch.bincount(place, minlength=bars).double() / max(1, len(values))).tolist()


def _per_image_chart(counts: Tensor) -> Html:
    step = max(1, math.ceil((int(counts.max()) + 1) / 30))
    place = torch.div(counts, step, rounding_mode="floor")
    shares = (torch.bincount(place).double() / len(counts)).tolist()
    label = f"histogram of the number of boxes per image, {step} per bar"
    return _bars(shares, ["0", str(step * len(shares))], label=label)


def _bars(shares: Sequence[float], ticks: Sequence[str], *, label: str) -> Html:
    """A histogram as a drawing; the ticks are spread evenly from its left to its right end."""
    width, height, top = 480, 150, 18
    most = max(shares, default=0) or 1
    bar = width / len(shares)
    bars = "".join(
        f'<rect x="{10 + i * bar + 0.5:.1f}" y="{top + height * (1 - share / most):.1f}" width="{bar - 1:.1f}" '
        f'height="{height * share / most:.1f}"><title>{share:.1%}</title></rect>'
        for i, share in enumerate(shares)
    )
    texts = "".join(
        f'<text x="{10 + width * i / (len(ticks) - 1):.1f}" y="{top + height + 16}" text-anchor="{anchor}">'
        f"{markup(tick)}</text>"
        for i, tick in enumerate(ticks)
        for anchor in ["start" if i == 0 else "end" if i == len(ticks) - 1 else "middle"]
    )
    return Html(
        f'<svg class="chart" role="img" aria-label="{markup(label)}" viewBox="0 0 {width + 20} {top + height + 22}">'
        f'<g fill="var(--accent)">{bars}</g><path class="axis" d="M10 {top + height}H{width + 10}"/>{texts}'
        f'<text x="10" y="12">highest bar: {most:.1%}</text></svg>'
    )


def _spark(shares: Sequence[float]) -> Html:
    """A histogram the size of a word."""
    most = max(shares) or 1
    bars = "".join(f"M{3 * i + 1.5} 24V{24 - 23 * share / most:.1f}" for i, share in enumerate(shares) if share)
    return Html(
        f'<svg role="img" aria-label="histogram of sides" width="{3 * len(shares)}" height="24">'
        f'<path d="{bars}" stroke="var(--accent)" stroke-width="2.4"/></svg>'
    )
