"""Two detectors on the same data: differences with 95 % bootstrap intervals, and a page that shows them.

Images are drawn with replacement, the same ones for both, and everything is computed again: what the interval of a
difference leaves out cannot be explained by which images happened to be in the set. It says nothing on what another
seed of the training would change.

The twelve numbers' intervals are hotcoco's; those of the classes, which hotcoco has not, are computed here.

Dimensions: I images, B detections, G boxes, K classes, T IoU thresholds, N resamples.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fpn_det.engine.coco_eval import METRIC_NAMES, GroundTruth, ScoredBoxes, hotcoco_evaluator, score
from fpn_det.files import replacing, write_errors, write_json, write_text
from fpn_det.report import charts
from fpn_det.report.analysis import Analysis, analyse, find_matches
from fpn_det.report.evaluation import ERRORS
from fpn_det.report.examples import MAX_ROWS, Names, ReadImage, compare_image
from fpn_det.report.page import (
    Html,
    Picture,
    Row,
    Section,
    details,
    figure,
    grid,
    number,
    page,
    paragraph,
    percent,
    row,
    table,
)
from fpn_det.structures import InputError, printable

_IOUS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_CHUNK = 50  # resamples at a time, so that a class of many detections does not fill the memory


@dataclass(frozen=True, slots=True)
class Difference:
    """A number of two detectors.

    Attributes:
        name: of the number, or the class.
        a: of the first, 0..1; -1 where there is nothing to find.
        b: of the second.
        low: lower end of the interval of b - a; None where there is none.
        high: upper end.
    """

    name: str
    a: float
    b: float
    low: float | None
    high: float | None

    @property
    def delta(self) -> float | None:
        """b - a."""
        return None if -1 in (self.a, self.b) else self.b - self.a

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, slots=True)
class ImageDifference:
    """Mistakes of both in an image, each at its own threshold."""

    image_id: int
    a: int
    b: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All numbers of a comparison.

    Attributes:
        a: analysis of the first detector.
        b: of the second.
        metrics: COCO's twelve.
        classes: AP of each class.
        images: those where the number of mistakes differs, most first.
        num_resamples: N.
    """

    a: Analysis
    b: Analysis
    metrics: list[Difference]
    classes: list[Difference]
    images: list[ImageDifference]
    num_resamples: int

    def as_json(self) -> dict[str, Any]:
        """Plain data: what comparison.json holds."""
        return {
            "num_resamples": self.num_resamples,
            "metrics": [{**asdict(d), "delta": d.delta, "clear": d.is_clear} for d in self.metrics],
            "classes": [{**asdict(d), "delta": d.delta, "clear": d.is_clear} for d in self.classes],
            "images": [asdict(i) for i in self.images],
        }


def compare(
    truth: GroundTruth,
    a: ScoredBoxes,
    b: ScoredBoxes,
    *,
    max_detections: int = 100,
    num_resamples: int = 500,
    seed: int = 0,
) -> Comparison:
    """Compare two detectors.

    Args:
        truth: ground truth of both.
        a: detections of the first.
        b: detections of the second.
        max_detections: how many per image and class count.
        num_resamples: N; 0 gives no intervals.
        seed: of the resampling.

    Raises:
        InputError: a result is malformed, or names an image or category that the ground truth lacks.
    """
    limits = [min(limit, max_detections) for limit in (1, 10, max_detections)]
    metrics_a, metrics_b = (score(truth, results, max_detections=max_detections) for results in (a, b))
    evaluator_a, evaluator_b = (hotcoco_evaluator(truth, results, limits=limits) for results in (a, b))
    found = hotcoco.compare(evaluator_a, evaluator_b, n_bootstrap=num_resamples, seed=seed)["ci"] or {}
    per_class = class_intervals(truth, (a, b), (evaluator_a, evaluator_b), num_resamples=num_resamples, seed=seed)
    both = [analyse(truth, results, m) for results, m in ((a, metrics_a), (b, metrics_b))]
    return Comparison(
        a=both[0],
        b=both[1],
        metrics=[
            _difference(name, metrics_a[name], metrics_b[name], _interval(found.get(name)))  # type: ignore[literal-required]
            for name in METRIC_NAMES
        ],
        classes=[
            _difference(name, metrics_a["per_class"][name]["AP"], metrics_b["per_class"][name]["AP"], interval)
            for name, interval in zip(truth.names, per_class, strict=True)
        ],
        images=_images(*both),
        num_resamples=num_resamples,
    )


def class_intervals(
    truth: GroundTruth,
    results: Sequence[ScoredBoxes],
    evaluators: Sequence[Any],
    *,
    num_resamples: int,
    seed: int,
) -> list[tuple[float, float] | None]:
    """95 % intervals of the difference in AP of each class, second minus first; None where there are none.

    Args:
        truth: ground truth.
        results: of the two detectors.
        evaluators: theirs, of `hotcoco_evaluator`.
        num_resamples: N.
        seed: of the resampling.
    """
    num_images, num_classes = len(truth.image_ids), len(truth.names)
    if not num_resamples:
        return [None] * num_classes
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(num_images, np.full(num_images, 1 / num_images), size=num_resamples)
    outcomes = [_Outcomes.of(truth, found, evaluator) for found, evaluator in zip(results, evaluators, strict=True)]
    intervals: list[tuple[float, float] | None] = []
    for k in tqdm(range(num_classes), desc="resampling", unit="class", disable=None, file=sys.stderr):
        gt_images = truth.images[~truth.crowd & (truth.classes == k)]
        if not len(gt_images):
            intervals.append(None)
            continue
        first, second = (of_one.average_precision(k, gt_images, weights) for of_one in outcomes)
        differences = (second - first)[~np.isnan(second - first)]  # no box of the class in a resample: no AP
        low, high = np.percentile(differences, [2.5, 97.5]).tolist() if len(differences) else (0.0, 0.0)
        intervals.append((low, high) if len(differences) else None)
    return intervals


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Outcomes:
    """What became of each detection of a detector, in COCO's order: best first, of equal ones the first image's.

    Attributes:
        classes: (B,) class indices.
        images: (B,) places in the ground truth's images.
        counted: (B, T) bool; not those that match a crowd.
        correct: (B, T) bool.
    """

    classes: NDArray[np.int64]
    images: NDArray[np.int64]
    counted: NDArray[np.bool_]
    correct: NDArray[np.bool_]

    @staticmethod
    def of(truth: GroundTruth, results: ScoredBoxes, evaluator: Any) -> _Outcomes:
        matches = [
            find_matches(evaluator, num_results=len(results), num_boxes=len(truth.boxes), iou=iou) for iou in _IOUS
        ]
        images = np.searchsorted(truth.image_ids, results.image_ids)
        order = np.lexsort((images, -results.scores))
        return _Outcomes(
            classes=np.searchsorted(truth.category_ids, results.category_ids)[order],
            images=images[order],
            counted=np.stack([m.counted for m in matches], axis=1)[order],
            correct=np.stack([m.correct for m in matches], axis=1)[order],
        )

    def average_precision(
        self, k: int, gt_images: NDArray[np.int64], weights: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """COCO's AP of a class when each image counts `weights` times.

        Args:
            k: the class.
            gt_images: (G,) places of the images of its boxes.
            weights: (N, I) how often each image counts.

        Returns:
            (N,) AP, NaN where no box counts.
        """
        own = np.flatnonzero(self.classes == k)
        counted, correct, images = self.counted[own], self.correct[own], self.images[own]
        values = []
        for chunk in np.array_split(weights, -(-len(weights) // _CHUNK)):
            num_boxes = chunk[:, gt_images].sum(axis=1)
            times = chunk[:, images]  # (n, b)
            of_iou = [_areas(times * counted[:, t], times * correct[:, t], num_boxes) for t in range(len(_IOUS))]
            values.append(np.where(num_boxes > 0, np.mean(of_iou, axis=0), np.nan))
        return np.concatenate(values)


def _areas(counted: NDArray[np.int64], correct: NDArray[np.int64], num_boxes: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,) area under each interpolated precision-recall curve.

    Args:
        counted: (n, b) how often each detection counts, best first.
        correct: (n, b) how often it is right.
        num_boxes: (n,) boxes to find.
    """
    if not counted.shape[1]:
        return np.zeros(len(counted))
    num_correct = np.cumsum(correct, axis=1)
    recall = num_correct / np.maximum(num_boxes, 1)[:, None]
    precision = num_correct / np.maximum(np.cumsum(counted, axis=1), 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    padded = np.concatenate([envelope, np.zeros((len(envelope), 1))], axis=1)  # recalls that are not reached
    places = np.stack([np.searchsorted(of_one, _RECALLS) for of_one in recall])
    return np.take_along_axis(padded, places, axis=1).mean(axis=1)


def format_comparison(comparison: Comparison, names: tuple[str, str], *, max_classes: int = 20) -> str:
    """A table for the console, in percent; a star where the interval leaves out 0.

    Args:
        comparison: what to show.
        names: of the two detectors.
        max_classes: of the classes those that differ most.
    """
    classes = sorted(comparison.classes, key=lambda d: -abs(d.delta or 0.0))[:max_classes]
    width = max(12, *(min(30, len(d.name)) for d in classes))
    lines = [f"A: {names[0]}", f"B: {names[1]}", ""]
    lines.append(f"{'':<{width}}{'A':>8}{'B':>8}{'B - A':>8}   95 % interval, {comparison.num_resamples:,} resamples")
    lines += [_line(d, width) for d in comparison.metrics]
    lines += [
        "",
        "AP of the classes"
        + (f", the {max_classes} that differ most" if len(classes) < len(comparison.classes) else ""),
    ]
    lines += [_line(d, width) for d in classes]
    lines += ["", "* the interval leaves out 0: another draw of images would hardly turn the difference round"]
    return "\n".join(lines)


def write_comparison(
    folder: Path,
    comparison: Comparison,
    truth: GroundTruth,
    a: ScoredBoxes,
    b: ScoredBoxes,
    *,
    names: tuple[str, str],
    read_image: ReadImage | str,
    image_names: Mapping[int, str],
    about: Mapping[str, str],
    config_differences: Sequence[tuple[str, str, str]],
    curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    num_images: int = 12,
) -> Path:
    """Write comparison.html, comparison.json and the charts.

    Args:
        folder: gets the files; it is made.
        comparison: of `a` and `b`.
        truth: ground truth.
        a: detections of the first.
        b: detections of the second.
        names: of the two.
        read_image: the images, or why there are none.
        image_names: image id -> file name, as far as known.
        about: what was compared, when and by what.
        config_differences: key, its value in A, its value in B.
        curves: what a curve shows -> name of the detector -> steps and values.
        num_images: how many images are shown.

    Returns:
        The path of comparison.html.

    Raises:
        InputError: a file cannot be written, or matplotlib is not installed.
    """
    drawn = {
        "differences": charts.intervals(
            [
                (d.name, 100 * d.delta, 100 * (d.low or 0.0), 100 * (d.high or 0.0))
                for d in comparison.metrics
                if d.delta is not None and d.low is not None
            ],
            x_label="B - A, points",
        ),
        **{
            f"curve_{i}": charts.lines(series, x_label="step", y_label=name)
            for i, (name, series) in enumerate(curves.items())
        },
    }
    sections = [
        _numbers(comparison, drawn["differences"]),
        _classes(comparison),
        _error_types(comparison),
        *([_training(drawn, curves)] if curves else []),
        _configs(config_differences),
        _pictures(comparison, truth, a, b, Names(truth, image_names), read_image, count=num_images),
        Section("Settings", [table(["setting", "value"], list(about.items()), label="settings")]),
    ]
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, data in drawn.items():
        with replacing(folder / f"{name}.png") as file:
            file.write(data)
    write_json(folder / "comparison.json", {"about": dict(about), "names": list(names), **comparison.as_json()})
    path = folder / "comparison.html"
    intro = f"A: {names[0]}\nB: {names[1]}\n{len(truth.image_ids):,} images of {truth.source}"
    write_text(path, page("Comparison of two detectors", sections, intro=intro, footer="fpn_det"))
    return path


def _difference(name: str, a: float, b: float, interval: tuple[float, float] | None) -> Difference:
    low, high = interval if interval is not None and -1 not in (a, b) else (None, None)
    return Difference(name, a, b, low, high)


def _interval(found: Mapping[str, float] | None) -> tuple[float, float] | None:
    return None if found is None else (found["lower"], found["upper"])


def _images(a: Analysis, b: Analysis) -> list[ImageDifference]:
    mistakes_a, mistakes_b = ({i.image_id: len(i.missed) + len(i.false) for i in one.worst} for one in (a, b))
    images = [
        ImageDifference(image_id, mistakes_a.get(image_id, 0), mistakes_b.get(image_id, 0))
        for image_id in sorted(mistakes_a.keys() | mistakes_b.keys())
    ]
    return sorted((i for i in images if i.a != i.b), key=lambda i: -abs(i.a - i.b))


def _line(d: Difference, width: int) -> str:
    numbers = f"{percent(d.a).shown:>8}{percent(d.b).shown:>8}{percent(d.delta, signed=True).shown:>8}"
    return f"{_cut(d.name, width):<{width}}{numbers}   {_range(d)}{' *' if d.is_clear else ''}".rstrip()


def _cut(text: str, width: int) -> str:
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _range(d: Difference) -> str:
    return "" if d.low is None or d.high is None else f"{100 * d.low:+.1f} to {100 * d.high:+.1f}"


def _rows(differences: Sequence[Difference]) -> list[Row]:
    return [
        [d.name, percent(d.a), percent(d.b), percent(d.delta, signed=True), _range(d), "yes" if d.is_clear else ""]
        for d in differences
    ]


_HEADER = ["A", "B", "B - A", "95 % interval", "leaves out 0"]


def _numbers(comparison: Comparison, chart: bytes) -> Section:
    marked = [d.is_clear for d in comparison.metrics]
    numbers = table(["metric", *_HEADER], _rows(comparison.metrics), label="metrics", marked=marked)
    return Section(
        "Overview",
        [row(numbers, figure(chart, alt="Differences of the metrics with their intervals"))],
        f"In percent. The intervals come from {comparison.num_resamples:,} draws of the images, the same for both: "
        "they say how much of a difference may be due to the choice of images, not to the seed of the training.",
    )


def _classes(comparison: Comparison) -> Section:
    marked = [d.is_clear for d in comparison.classes]
    content = table(["class", *_HEADER], _rows(comparison.classes), label="classes", marked=marked, filterable=True)
    return Section(
        "Classes",
        [content],
        "AP in percent. Of many classes, one in twenty leaves out 0 by chance alone.",
    )


def _error_types(comparison: Comparison) -> Section:
    rows: list[Row] = [
        [ERRORS[a.kind][0], percent(a.cost), percent(b.cost), percent(b.cost - a.cost, signed=True), ERRORS[a.kind][1]]
        for a, b in zip(comparison.a.errors, comparison.b.errors, strict=True)
    ]
    return Section(
        "What costs AP",
        [table(["error", "A", "B", "B - A", "what it is"], rows, label="error types")],
        "Points of AP50 that each of TIDE's error types costs.",
    )


def _training(
    drawn: Mapping[str, bytes], curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
) -> Section:
    figures = [figure(drawn[f"curve_{i}"], alt=f"{name} over steps") for i, name in enumerate(curves)]
    return Section("Training", [row(*figures)])


def _configs(differences: Sequence[tuple[str, str, str]]) -> Section:
    if not differences:
        return Section("Configs", ["No difference is known."])
    return Section("Configs", [table(["key", "A", "B"], differences, label="keys that differ", filterable=True)])


def _pictures(
    comparison: Comparison,
    truth: GroundTruth,
    a: ScoredBoxes,
    b: ScoredBoxes,
    names: Names,
    read_image: ReadImage | str,
    *,
    count: int,
) -> Section:
    body: list[str | Html] = []
    if isinstance(read_image, str):
        body.append(f"No pictures: {read_image}")
    else:
        pictures = []
        for image in comparison.images[:count]:
            caption = f"{names.image(image.image_id)}: A {image.a}, B {image.b} mistakes"
            try:
                pixels = read_image(image.image_id)
            except InputError as error:
                body.append(paragraph(f"{caption} ({error})", soft=True))
                continue
            drawn = compare_image(
                pixels, image.image_id, truth, names, {"A": (comparison.a, a), "B": (comparison.b, b)}
            )
            pictures.append(Picture(drawn, caption, f"Ground truth, A and B in {names.image(image.image_id)}"))
        body += ["Blue: annotated, or right. Orange: false.", grid(pictures, width_px=560)] if pictures else []
    rows: list[Row] = [
        [names.image(i.image_id), number(i.a, 0), number(i.b, 0), number(i.b - i.a, 0, signed=True)]
        for i in comparison.images[:MAX_ROWS]
    ]
    if rows:
        listed = table(["image", "A", "B", "B - A"], rows, label="images", filterable=True)
        body.append(details(f"The first {len(rows)} as a table", listed))
    else:
        body.append("There is no such image.")
    return Section(
        "Images that differ most",
        body,
        "By the number of mistakes (missed boxes and false detections), each detector at its own best threshold: "
        f"A {comparison.a.threshold.score:.3f}, B {comparison.b.threshold.score:.3f}.",
    )
