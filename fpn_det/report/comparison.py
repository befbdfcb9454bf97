"""Two detectors on the same data: differences with 95 % bootstrap intervals, and a page that shows them.

Images are drawn with replacement, the same ones for both, and everything is computed again: what the interval of a
difference leaves out cannot be explained by which images happened to be in the set. It says nothing on what another
seed of the training would change.

hotcoco's `compare` has no intervals of classes, and those of its twelve numbers are too narrow by a quarter: an image
that is drawn twice counts once there. So the resampling is done here, by weights of images on outcomes of detections.

Dimensions: I images, B detections, G boxes, K classes, T IoU thresholds, N resamples.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

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

Interval = tuple[float, float]
"""Its lower and upper end."""

_IOUS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_IOU_50, _IOU_75 = 0, 5  # indices in T
_RANGES = {"": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}  # suffix -> areas
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
    metrics_a, metrics_b = (score(truth, results, max_detections=max_detections) for results in (a, b))
    intervals: dict[str, Interval | None] = {}
    per_class: list[Interval | None] = [None] * len(truth.names)
    if num_resamples:
        intervals, per_class = bootstrap(
            truth, (a, b), max_detections=max_detections, num_resamples=num_resamples, seed=seed
        )
    both = [analyse(truth, results, m) for results, m in ((a, metrics_a), (b, metrics_b))]
    return Comparison(
        a=both[0],
        b=both[1],
        metrics=[
            _difference(name, metrics_a[name], metrics_b[name], intervals.get(name))  # type: ignore[literal-required]
            for name in METRIC_NAMES
        ],
        classes=[
            _difference(name, metrics_a["per_class"][name]["AP"], metrics_b["per_class"][name]["AP"], interval)
            for name, interval in zip(truth.names, per_class, strict=True)
        ],
        images=_images(*both),
        num_resamples=num_resamples,
    )


def bootstrap(
    truth: GroundTruth,
    results: Sequence[ScoredBoxes],
    *,
    max_detections: int,
    num_resamples: int,
    seed: int,
) -> tuple[dict[str, Interval | None], list[Interval | None]]:
    """95 % intervals of the differences, second minus first; None where there are none.

    Args:
        truth: ground truth.
        results: of the two detectors.
        max_detections: how many per image and class count.
        num_resamples: N, at least 1.
        seed: of the resampling.

    Returns:
        The intervals of COCO's twelve numbers, and those of the AP of each class.
    """
    num_images, num_classes = len(truth.image_ids), len(truth.names)
    generator, even = np.random.default_rng(seed), np.full(num_images, 1 / num_images)
    weights = generator.multinomial(num_images, even, size=num_resamples).astype(np.int32)
    numbers = [{name: np.full((num_resamples, num_classes), np.nan) for name in METRIC_NAMES} for _ in results]
    steps = list(product(enumerate(results), _RANGES.items()))
    with tqdm(total=len(steps) * num_classes, desc="resampling", unit="class", disable=None, file=sys.stderr) as bar:
        for (of_one, found), (suffix, area_range) in steps:
            outcomes = _Outcomes.of(truth, found, area_range=area_range, max_detections=max_detections)
            for k in range(num_classes):
                for name, values in outcomes.resampled(k, weights).items():
                    full_name = "AR100" if name + suffix == "AR" else name + suffix
                    if full_name in METRIC_NAMES:
                        numbers[of_one][full_name][:, k] = values
                bar.update()
    first, second = numbers
    of_metrics = {name: _interval(_mean_of_classes(second[name]) - _mean_of_classes(first[name])) for name in first}
    of_classes = [_interval(difference) for difference in (second["AP"] - first["AP"]).T]
    return of_metrics, of_classes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Outcomes:
    """What became of each detection of a detector, in COCO's order: best first, of equal ones the first image's.

    Attributes:
        classes: (B,) class indices.
        images: (B,) places in the ground truth's images.
        ranks: (B,) place among the detections of the same image and class, from 0.
        counted: (B, T) bool; not those that match a crowd, or have to do with boxes of other areas only.
        correct: (B, T) bool.
        gt_classes: (G,) class indices of the boxes to find.
        gt_images: (G,) places of their images.
        max_detections: how many per image and class count.
    """

    classes: NDArray[np.int64]
    images: NDArray[np.int64]
    ranks: NDArray[np.int64]
    counted: NDArray[np.bool_]
    correct: NDArray[np.bool_]
    gt_classes: NDArray[np.int64]
    gt_images: NDArray[np.int64]
    max_detections: int

    @staticmethod
    def of(
        truth: GroundTruth, results: ScoredBoxes, *, area_range: tuple[float, float], max_detections: int
    ) -> _Outcomes:
        evaluator = hotcoco_evaluator(truth, results, limits=[max_detections], ranges=np.array([area_range]))
        matches = [
            find_matches(evaluator, num_results=len(results), num_boxes=len(truth.boxes), iou=iou) for iou in _IOUS
        ]
        images = np.searchsorted(truth.image_ids, results.image_ids)
        classes = np.searchsorted(truth.category_ids, results.category_ids)
        order = np.lexsort((images, -results.scores))
        low, high = area_range
        to_find = ~truth.crowd & (truth.areas >= low) & (truth.areas <= high)
        return _Outcomes(
            classes=classes[order],
            images=images[order],
            ranks=_ranks(images[order] * len(truth.names) + classes[order]),
            counted=np.stack([m.counted for m in matches], axis=1)[order],
            correct=np.stack([m.correct for m in matches], axis=1)[order],
            gt_classes=truth.classes[to_find],
            gt_images=truth.images[to_find],
            max_detections=max_detections,
        )

    def resampled(self, k: int, weights: NDArray[np.int32]) -> dict[str, NDArray[np.float64]]:
        """COCO's numbers of a class when each image counts `weights` times.

        Args:
            k: the class.
            weights: (N, I) how often each image counts.

        Returns:
            Name (AP, AP50, AP75, AR1, AR10, and AR of `max_detections`) -> (N,) values, NaN where no box counts.
        """
        num_boxes = weights[:, self.gt_images[self.gt_classes == k]].sum(axis=1)
        own = np.flatnonzero((self.classes == k) & self.counted.any(axis=1))
        images, counted, correct = self.images[own], self.counted[own], self.correct[own]
        limits = np.array([1, 10, self.max_detections])
        limited = correct.sum(axis=1)[:, None] * (self.ranks[own, None] < limits)  # (b, 3)
        precision, num_found = np.zeros((len(weights), len(_IOUS))), np.zeros((len(weights), len(limits)))
        for start in range(0, len(weights), _CHUNK):
            rows = slice(start, start + _CHUNK)
            times = weights[rows, images]  # (n, b)
            num_found[rows] = times @ limited
            for t in range(len(_IOUS)):
                is_correct = correct[:, t]  # precision is highest, and recall rises, at these alone
                num_kept = np.cumsum(times * counted[:, t], axis=1, dtype=np.int32)[:, is_correct]
                num_correct = np.cumsum(times[:, is_correct], axis=1, dtype=np.int32)
                precision[rows, t] = _areas(num_kept, num_correct, num_boxes[rows])
        precision[num_boxes == 0] = np.nan
        recall = num_found / np.where(num_boxes > 0, len(_IOUS) * num_boxes, np.nan)[:, None]
        return {
            "AP": precision.mean(axis=1),
            "AP50": precision[:, _IOU_50],
            "AP75": precision[:, _IOU_75],
            **dict(zip(("AR1", "AR10", "AR"), recall.T, strict=True)),
        }


def _areas(
    num_kept: NDArray[np.int32], num_correct: NDArray[np.int32], num_boxes: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(n,) area under each interpolated precision-recall curve.

    Args:
        num_kept: (n, b) detections down to each correct one, best first.
        num_correct: (n, b) the correct ones of these.
        num_boxes: (n,) boxes to find.
    """
    n, b = num_kept.shape
    precision = num_correct / np.maximum(num_kept, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    padded = np.concatenate([envelope, np.zeros((n, 1))], axis=1)  # recalls that are not reached
    # How many correct ones reach a recall, by the very division of COCO; then all rows are searched as one.
    total = np.maximum(num_boxes, 1)[:, None]
    needed = np.floor(_RECALLS * total).astype(np.int64)
    needed += needed / total < _RECALLS
    apart = np.arange(n)[:, None] * (max(int(total.max()), int(num_correct.max(initial=0))) + 1)
    places = np.searchsorted((num_correct + apart).ravel(), needed + apart) - np.arange(n)[:, None] * b
    return np.take_along_axis(padded, places, axis=1).mean(axis=1)


def _ranks(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """(B,) how many before each are of the same group."""
    order = np.argsort(groups, kind="stable")
    _, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order)) - starts.repeat(counts)
    return ranks


def _mean_of_classes(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) mean of (N, K) over the classes that have boxes; NaN without any."""
    defined = ~np.isnan(values)
    return np.where(defined, values, 0).sum(axis=1) / np.where(defined.any(axis=1), defined.sum(axis=1), np.nan)


def _interval(differences: NDArray[np.float64]) -> Interval | None:
    """What 95 % of the resamples that have such boxes lie in."""
    defined = differences[~np.isnan(differences)]
    low, high = np.percentile(defined, [2.5, 97.5]).tolist() if len(defined) else (0.0, 0.0)
    return (low, high) if len(defined) else None


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
    num = comparison.num_resamples
    interval = f"   95 % interval, {num:,} resamples" if num else ""
    lines.append(f"{'':<{width}}{'A':>8}{'B':>8}{'B - A':>8}{interval}")
    lines += [_line(d, width) for d in comparison.metrics]
    lines += [
        "",
        "AP of the classes"
        + (f", the {max_classes} that differ most" if len(classes) < len(comparison.classes) else ""),
    ]
    lines += [_line(d, width) for d in classes]
    if num:
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
        f"curve_{i}": charts.lines(series, x_label="step", y_label=name, whole_x=True)
        for i, (name, series) in enumerate(curves.items())
    }
    bars = [
        (d.name, 100 * d.delta, 100 * d.low, 100 * d.high)
        for d in comparison.metrics
        if d.delta is not None and d.low is not None and d.high is not None
    ]
    if bars:
        drawn["differences"] = charts.intervals(bars, x_label="B - A, points")
    sections = [
        _numbers(comparison, drawn),
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


def _difference(name: str, a: float, b: float, interval: Interval | None) -> Difference:
    low, high = interval if interval is not None and -1 not in (a, b) else (None, None)
    return Difference(name, a, b, low, high)


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


def _numbers(comparison: Comparison, drawn: Mapping[str, bytes]) -> Section:
    marked = [d.is_clear for d in comparison.metrics]
    numbers = table(["metric", *_HEADER], _rows(comparison.metrics), label="metrics", marked=marked)
    if "differences" not in drawn:
        return Section("Overview", [numbers], "In percent, without intervals: nothing was resampled.")
    return Section(
        "Overview",
        [row(numbers, figure(drawn["differences"], alt="Differences of the metrics with their intervals"))],
        f"In percent. The intervals come from {comparison.num_resamples:,} draws of the images, the same for both: "
        "they say how much of a difference may be due to the choice of images, not to the seed of the training.",
    )


def _classes(comparison: Comparison) -> Section:
    marked = [d.is_clear for d in comparison.classes]
    content = table(["class", *_HEADER], _rows(comparison.classes), label="classes", marked=marked, filterable=True)
    return Section(
        "Classes",
        [content],
        "AP in percent."
        + (" Of many classes, one in twenty leaves out 0 by chance alone." if comparison.num_resamples else ""),
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
        body += (
            ["Blue: annotated, or right. Orange: false, or missed.", grid(pictures, width_px=560)] if pictures else []
        )
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
