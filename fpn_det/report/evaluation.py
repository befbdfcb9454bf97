"""The report of an evaluation: report.html, which needs no other file, charts as PNG, the numbers as report.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fpn_det.engine.coco_eval import METRIC_NAMES, GroundTruth, ProposalMetrics, ScoredBoxes
from fpn_det.files import replacing, write_errors, write_json, write_text
from fpn_det.report import charts
from fpn_det.report.analysis import (
    SCORE_GRID,
    Analysis,
    ErrorKind,
    ScoreCurves,
    Slice,
)
from fpn_det.report.examples import MAX_ROWS, Names, ReadImage, label_errors, shown_score, worst_images
from fpn_det.report.page import (
    Cell,
    Html,
    Row,
    Section,
    cards,
    choices,
    code,
    details,
    figure,
    heading,
    line_chart,
    number,
    page,
    paragraph,
    percent,
    row,
    table,
)

_MAX_CLASSES = 80  # of the confusion matrix' picture
_MAX_CURVES = 200  # classes whose curves are drawn
_RECALLS = np.linspace(0, 1, 101)

_METRIC_NOTES = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "IoU 0.5",
    "AP75": "IoU 0.75",
    "APs": "area below 32²",
    "APm": "32² to 96²",
    "APl": "above 96²",
    "AR1": "1 detection per image and class",
    "AR10": "10 detections",
    "ARs": "area below 32²",
    "ARm": "32² to 96²",
    "ARl": "above 96²",
}
ERRORS: dict[ErrorKind, tuple[str, str, str]] = {
    "Cls": (
        "wrong class",
        "detections that lie on an object (IoU 0.5 or more) and name another class",
        "The confusion matrix says which classes. Look at the label errors of the kind 'wrong class' first; then more "
        "images of these classes help, and a longer training.",
    ),
    "Loc": (
        "localisation",
        "detections of the right class whose box overlaps the object by an IoU of 0.1 to 0.5 only",
        "A cascade (configs/r50_cascade.yaml) or model.roi_head.box_loss=giou draws tighter boxes; small objects need "
        "a larger data.test_short_side. Check that the annotators drew boxes alike.",
    ),
    "Both": (
        "class and box",
        "detections that overlap an object of another class by an IoU of 0.1 to 0.5",
        "They are often parts or groups of objects. Look at the worst images for what they have in common.",
    ),
    "Dupe": (
        "duplicate",
        "further detections of an object that a better one has found",
        "Lower model.roi_head.nms_thresh.",
    ),
    "Bkg": (
        "background",
        "detections where no annotated object is (IoU below 0.1)",
        "Look at the label errors of the kind 'not annotated' first: objects that nobody annotated count here. Images "
        "without objects (data.keep_empty=true) teach what is background.",
    ),
    "Miss": (
        "missed",
        "objects that nothing finds, nor would if the class or the box of a detection were put right",
        "Recall by size shows which. Small objects need smaller model.anchors.sizes and a larger data.test_short_side; "
        "rare classes need more images.",
    ),
}
"""TIDE's error types: how they are called, what they are, and what helps."""

CHARTS = ("errors", "precision_recall", "size", "aspect", "scores", "calibration", "confusion")
"""Those of `draw_charts`."""


def write_report(
    folder: Path,
    analysis: Analysis,
    truth: GroundTruth,
    results: ScoredBoxes,
    *,
    read_image: ReadImage | str,
    image_names: Mapping[int, str],
    about: Mapping[str, str],
    config: str,
    num_images: int = 24,
    num_suspects: int = 12,
) -> Path:
    """Write the report of an evaluation.

    Args:
        folder: gets report.html, report.json and the charts; it is made.
        analysis: of `truth` and `results`.
        truth: ground truth.
        results: the detections.
        read_image: the images, or why there are none.
        image_names: image id -> file name, as far as known.
        about: what was evaluated, when and by what.
        config: the config that was used, as YAML.
        num_images: of the worst images, how many are shown.
        num_suspects: of each kind of likely label errors, how many are shown.

    Returns:
        The path of report.html.

    Raises:
        InputError: a file cannot be written, or matplotlib is not installed.
    """
    drawn = draw_charts(analysis)
    names = Names(truth, image_names)
    sections = [
        _overview(analysis),
        _errors(analysis, drawn),
        _classes(analysis),
        _curves(analysis),
        _confusion(analysis, drawn),
        _calibration(analysis, drawn),
        _size_and_shape(analysis, drawn),
        *([_proposals(analysis.proposals)] if analysis.proposals is not None else []),
        worst_images(analysis, truth, results, names, read_image, count=num_images),
        label_errors(analysis, truth, results, names, read_image, count=num_suspects),
        Section("Settings", [_table_of_settings(about), details("The whole config", code(config))]),
    ]
    title = f"Evaluation: {about.get('run', truth.source.name)}"
    intro = (
        f"{analysis.num_images:,} images, {analysis.num_boxes:,} boxes of {len(truth.names):,} classes, "
        f"{analysis.num_detections:,} detections. Ground truth: {truth.source}"
    )
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name in CHARTS:
        if name in drawn:
            with replacing(folder / f"{name}.png") as file:
                file.write(drawn[name])
        else:  # of an earlier report
            (folder / f"{name}.png").unlink(missing_ok=True)
    write_json(folder / "report.json", {"about": dict(about), **analysis.as_json()})
    path = folder / "report.html"
    write_text(path, page(title, sections, intro=intro, footer="fpn_det"))
    return path


def draw_charts(analysis: Analysis) -> dict[str, bytes]:
    """The charts that there are numbers for: name of the file -> PNG."""
    drawn = {}
    if analysis.num_boxes:
        costs = sorted(analysis.errors, key=lambda e: -e.cost)
        drawn["errors"] = charts.horizontal_bars(
            {ERRORS[e.kind][0]: 100 * e.cost for e in costs}, x_label="points of AP50 that these errors cost"
        )
        drawn["precision_recall"] = charts.lines(
            {
                "IoU 0.5": (_RECALLS, analysis.precision50),
                "IoU 0.75": (_RECALLS, analysis.precision75),
                "mean of 0.5 to 0.95": (_RECALLS, analysis.precision),
            },
            x_label="recall",
            y_label="precision, mean of the classes",
            x_range=(0, 1),
            y_range=(0, 1.02),
        )
        for name, slices in (("size", analysis.by_size), ("aspect", analysis.by_aspect)):
            drawn[name] = charts.grouped_bars(
                [s.name for s in slices],
                {
                    "AP": [_defined(s.ap) for s in slices],
                    "AP50": [_defined(s.ap50) for s in slices],
                    "recall at IoU 0.5": [_defined(s.recall50) for s in slices],
                },
                y_label="percent",
            )
    if analysis.by_score.f1:
        grid_of_scores = SCORE_GRID[: len(analysis.by_score.f1)]
        drawn["scores"] = charts.lines(
            {
                "precision": (grid_of_scores, analysis.by_score.precision),
                "recall": (grid_of_scores, analysis.by_score.recall),
                "F1": (grid_of_scores, analysis.by_score.f1),
            },
            x_label="score threshold",
            y_label="all detections, IoU 0.5",
            x_range=(0, 1),
            y_range=(0, 1.02),
        )
    if analysis.bins:
        drawn["calibration"] = charts.reliability(
            [b.mean_score for b in analysis.bins],
            [b.precision for b in analysis.bins],
            [b.count for b in analysis.bins],
        )
    drawn["confusion"] = charts.heat_map(*_shown_confusion(analysis))
    return drawn


def _overview(analysis: Analysis) -> Section:
    metrics = analysis.metrics
    limit = metrics["max_detections"]
    values = {(f"AR{limit}" if name == "AR100" else name): metrics[name] for name in METRIC_NAMES}  # type: ignore[literal-required]
    body: list[str | Html] = [
        cards(
            {name: percent(value).shown for name, value in values.items()},
            notes={**_METRIC_NOTES, f"AR{limit}": f"{limit} detections"},
        )
    ]
    best = analysis.threshold
    if best.f1:
        body.append(
            f"With one threshold for all classes, F1 is highest at a score of {shown_score(best.score)}: precision "
            f"{best.precision:.1%}, recall {best.recall:.1%}, F1 {best.f1:.1%} at IoU 0.5. Confusions, worst images "
            "and label errors below are those of detections from this score on."
        )
    if not analysis.num_boxes:
        body.append("There is no ground truth to find, so COCO defines no number.")
    elif not analysis.num_detections:
        body.append("There are no detections at all. Was the right file or checkpoint given?")
    if ids := metrics.get("unreadable_images"):
        body.append(
            f"{len(ids):,} images could not be read and count as if nothing was found there; their ids are in "
            "report.json."
        )
    return Section("Overview", body, "COCO's twelve numbers in percent; '-' where there is nothing to find.")


def _errors(analysis: Analysis, drawn: Mapping[str, bytes]) -> Section:
    costs = sorted(analysis.errors, key=lambda e: -e.cost)
    sentences = [
        f"{ERRORS[e.kind][0].capitalize()} costs {100 * e.cost:.1f} AP50: {e.count:,} {ERRORS[e.kind][1]}. "
        f"{ERRORS[e.kind][2]}"
        for e in costs
        if e.cost >= 0.0005
    ]
    rows: list[Row] = [[ERRORS[e.kind][0], percent(e.cost), number(e.count, 0), ERRORS[e.kind][1]] for e in costs]
    body: list[str | Html] = []
    if "errors" in drawn:
        body.append(
            row(
                figure(drawn["errors"], alt="Bars: what each of six error types costs in AP50"),
                Html("".join(map(paragraph, sentences or ["No error costs a tenth of a point."]))),
            )
        )
    body.append(table(["error", "cost in AP50", "count", "what it is"], rows, label="error types"))
    return Section(
        "What costs AP",
        body,
        "The six error types of TIDE (arXiv 2008.08115): how much higher AP50 would be without each alone. The costs "
        "do not add up, because one error can hide another. Counts are of detections of any score.",
    )


def _classes(analysis: Analysis) -> Section:
    rows: list[Row] = [
        [
            c.name,
            number(c.num_boxes, 0),
            percent(c.ap),
            percent(c.ap50),
            percent(c.ar),
            *(
                (percent(c.best.f1), Cell(shown_score(c.best.score), c.best.score))
                + (percent(c.best.precision), percent(c.best.recall))
                if c.best
                else (number(None),) * 4
            ),
        ]
        for c in analysis.classes
    ]
    header = ["class", "boxes", "AP", "AP50", "AR", "best F1", "at score", "precision", "recall"]
    return Section(
        "Classes",
        [table(header, rows, label="classes", filterable=True)],
        "In percent. The best F1 at IoU 0.5 is that of the class alone, with its threshold, and precision and recall "
        "there. Click a column's name to sort.",
    )


def _curves(analysis: Analysis) -> Section:
    shown = {c.name for c in sorted(analysis.classes, key=lambda c: -c.num_boxes)[:_MAX_CURVES]}
    pieces = {
        "all classes": _two_charts(
            {
                "IoU 0.5": analysis.precision50,
                "IoU 0.75": analysis.precision75,
                "0.5 to 0.95": analysis.precision,
            },
            analysis.by_score,
            "all classes",
        )
    }
    for c in (c for c in analysis.classes if c.name in shown):
        pieces[f"{c.name} ({c.num_boxes:,} boxes)"] = _two_charts(
            {"IoU 0.5": c.precision50, "IoU 0.75": c.precision75}, c.by_score, c.name
        )
    body: list[str | Html] = [choices("Curves of", pieces)]
    if len(shown) < len(analysis.classes):
        body.append(paragraph(f"The {len(shown)} classes with most boxes are in the list.", soft=True))
    return Section(
        "Precision and recall",
        body,
        "Left: precision that is kept up to each recall (mean of the classes). Right: what a score threshold gives at "
        "IoU 0.5, over all detections.",
    )


def _two_charts(precision: Mapping[str, Sequence[float]], by_score: ScoreCurves, name: str) -> Html:
    if not any(precision.values()):
        return paragraph("No ground truth.")
    curves = {k: list(zip(_RECALLS.tolist(), v, strict=True)) for k, v in precision.items()}
    scores = {
        k: list(zip(SCORE_GRID.tolist(), v, strict=False))
        for k, v in (("precision", by_score.precision), ("recall", by_score.recall), ("F1", by_score.f1))
    }
    return row(
        line_chart(curves, x_label="recall", y_label="precision", alt=f"Precision over recall of {name}"),
        line_chart(scores, x_label="score threshold", y_label="", alt=f"Precision, recall, F1 by score of {name}"),
    )


def _confusion(analysis: Analysis, drawn: Mapping[str, bytes]) -> Section:
    rows: list[Row] = [[c.gt, c.detected, number(c.count, 0), percent(c.share)] for c in analysis.confusions[:MAX_ROWS]]
    body: list[str | Html] = [
        figure(drawn["confusion"], alt="Heat map: the share of each class that was detected as each class"),
    ]
    if len(analysis.classes) > _MAX_CLASSES:
        body.append(paragraph(f"The picture has the {_MAX_CLASSES} classes with most confusions.", soft=True))
    if rows:
        header = ["annotated", "detected as", "boxes", "percent of the class"]
        body += [heading("Most frequent confusions"), table(header, rows, label="confusions", filterable=True)]
    else:
        body.append("No class was taken for another.")
    return Section(
        "Confusions",
        body,
        f"Detections from a score of {shown_score(analysis.threshold.score)} on, each on the box of any class that it "
        "overlaps most (IoU 0.5 or more). In percent of the row.",
    )


def _calibration(analysis: Analysis, drawn: Mapping[str, bytes]) -> Section:
    if analysis.calibration_error is None:
        reason = "there are no detections" if not analysis.num_detections else "some scores lie outside 0..1"
        return Section("Calibration", [f"Not measured: {reason}."])
    rows: list[Row] = [
        [f"{b.low:.1f} to {b.high:.1f}", number(b.count, 0), percent(b.mean_score), percent(b.precision)]
        if b.count
        else [f"{b.low:.1f} to {b.high:.1f}", number(0, 0), number(None), number(None)]
        for b in analysis.bins
    ]
    return Section(
        "Calibration",
        [
            row(
                figure(drawn["calibration"], alt="Precision over score, and the number of detections"),
                table(["score", "detections", "mean score", "precision"], rows, label="scores"),
            )
        ],
        f"How far a score is the probability of being right at IoU 0.5: on average they differ by "
        f"{100 * analysis.calibration_error:.1f} points (expected calibration error). Below the diagonal scores "
        "promise too much, above it too little.",
    )


def _size_and_shape(analysis: Analysis, drawn: Mapping[str, bytes]) -> Section:
    body: list[str | Html] = []
    for title, name, first, slices in (
        ("By size", "size", "size", analysis.by_size),
        ("By shape", "aspect", "width : height", analysis.by_aspect),
    ):
        content = table([first, "boxes", "AP", "AP50", "AR", "recall at 0.5"], _slice_rows(slices), label=first)
        chart = [figure(drawn[name], alt=f"AP, AP50 and recall: {title.lower()}")] if name in drawn else []
        body += [heading(title), row(*chart, content)]
    return Section(
        "Size and shape",
        body,
        "In percent, mean of the classes that have such boxes. Size is the square root of the area, in pixels of the "
        "image file.",
    )


def _slice_rows(slices: Sequence[Slice]) -> list[Row]:
    return [
        [s.name, number(s.num_boxes, 0), percent(s.ap), percent(s.ap50), percent(s.ar), percent(s.recall50)]
        for s in slices
    ]


def _proposals(found: ProposalMetrics) -> Section:
    rows: list[Row] = [
        ["100", *(percent(found[k]) for k in ("AR100", "ARs100", "ARm100", "ARl100"))],
        ["1000", *(percent(found[k]) for k in ("AR1000", "ARs", "ARm", "ARl"))],
    ]
    return Section(
        "Proposals",
        [table(["proposals", "AR", "small", "medium", "large"], rows, label="recall of the proposals")],
        "Average recall of the RPN's proposals, all classes as one: the second stage cannot find what is missing here. "
        "If it is not much above AR of the detections, look at anchors and image size first.",
    )


def _table_of_settings(about: Mapping[str, str]) -> Html:
    return table(["setting", "value"], [[key, value] for key, value in about.items()], label="settings")


def _shown_confusion(analysis: Analysis) -> tuple[NDArray[np.float64], list[str]]:
    """Shares of each row, (K + 1, K + 1), and names; of the classes with most confusions if there are many."""
    counts = np.array(analysis.confusion, np.float64)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    names = [c.name for c in analysis.classes]
    if len(names) <= _MAX_CLASSES:
        return shares, names
    wrong = counts[:-1, :-1] - np.diag(np.diag(counts[:-1, :-1]))
    shown = np.sort(np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:_MAX_CLASSES])
    with_background = [*shown, len(names)]
    return shares[np.ix_(with_background, with_background)], [names[k] for k in shown]


def _defined(value: float) -> float:
    return 100 * value if value > -1 else math.nan
