"""Sections of a report that show examples: the worst images, likely label errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from fpn_det.engine.coco_eval import GroundTruth, ScoredBoxes
from fpn_det.report.analysis import Analysis, ImageMistakes, Suspect, SuspectKind
from fpn_det.report.page import Html, Picture, Row, Section, details, grid, heading, number, paragraph, table
from fpn_det.report.pictures import RIGHT, WRONG, DrawnBox, compared, crop
from fpn_det.structures import InputError

MAX_ROWS = 200
"""Of tables of images; report.json has all."""

ReadImage = Callable[[int], Tensor]
"""Image id -> (3, H, W) uint8; `InputError` if it cannot be read."""


_SUSPECTS: dict[SuspectKind, tuple[str, str]] = {
    "wrong class": (
        "Another class than annotated",
        "A sure detection lies on the box, but names another class: is the annotation's class right?",
    ),
    "not annotated": ("Perhaps not annotated", "A sure detection where no box is: was an object forgotten?"),
    "never found": (
        "Boxes that nothing touches",
        "No detection of any class and score comes near: is there an object, and is the box at its place?",
    ),
}


class Names:
    """How images and classes are called."""

    def __init__(self, truth: GroundTruth, image_names: Mapping[int, str]) -> None:
        self._truth = truth
        self._image_names = image_names

    def image(self, image_id: int) -> str:
        return self._image_names.get(image_id, f"image {image_id}")

    def gt(self, box: int) -> str:
        return self._truth.names[self._truth.classes[box]]

    def detection(self, results: ScoredBoxes, place: int) -> str:
        label = np.searchsorted(self._truth.category_ids, results.category_ids[place])
        return f"{self._truth.names[label]} {results.scores[place]:.2f}"


def worst_images(
    analysis: Analysis,
    truth: GroundTruth,
    results: ScoredBoxes,
    names: Names,
    read_image: ReadImage | str,
    *,
    count: int,
) -> Section:
    title, score = "Worst images", shown_score(analysis.threshold.score)
    intro = (
        f"{len(analysis.worst):,} of {analysis.num_images:,} images have mistakes: boxes that no detection found, and "
        f"detections that match no box, at a score from {score} and IoU 0.5. Most mistakes first."
    )
    if not analysis.worst:
        return Section(title, ["No image has a mistake."], intro)
    body: list[str | Html] = []
    if isinstance(read_image, str):
        body.append(f"No pictures: {read_image}")
    else:
        pictures = []
        for image in analysis.worst[:count]:
            caption = f"{names.image(image.image_id)}: {_why(image, results, names)}"
            drawn = _mistakes(image, truth, results, names, read_image, score_thresh=analysis.threshold.score)
            if isinstance(drawn, str):
                body.append(paragraph(f"{caption} ({drawn})", soft=True))
            else:
                pictures.append(
                    Picture(drawn, caption, f"Ground truth and detections in {names.image(image.image_id)}")
                )
        body.append("Blue: found, or right. Orange: missed, or false.")
        body.append(grid(pictures, width_px=420))
    rows: list[Row] = [
        [names.image(i.image_id), number(i.image_id, 0), number(len(i.missed), 0), number(len(i.false), 0)]
        for i in analysis.worst[:MAX_ROWS]
    ]
    listed = table(["image", "id", "missed", "false"], rows, label="images", filterable=True)
    body.append(details(f"The {len(rows)} worst images as a table", listed))
    return Section(title, body, intro)


def _mistakes(
    image: ImageMistakes,
    truth: GroundTruth,
    results: ScoredBoxes,
    names: Names,
    read_image: ReadImage,
    *,
    score_thresh: float,
) -> bytes | str:
    """Ground truth and detections side by side, or why the image cannot be shown."""
    try:
        pixels = read_image(image.image_id)
    except InputError as error:
        return str(error)
    gt = _gt_boxes(truth, image.image_id, names, missed=image.missed)
    found = _found_boxes(results, image.image_id, names, false=image.false, score_thresh=score_thresh)
    return compared(
        pixels,
        {
            f"ground truth: {len(gt)}, missed {len(image.missed)}": gt,
            f"detections: {len(found)}, false {len(image.false)}": found,
        },
    )


def compare_image(
    pixels: Tensor,
    image_id: int,
    truth: GroundTruth,
    names: Names,
    detectors: Mapping[str, tuple[Analysis, ScoredBoxes]],
) -> bytes:
    """Ground truth and what several detectors found and missed side by side, as a JPEG file.

    Args:
        pixels: (3, H, W) uint8, the image.
        image_id: its id.
        truth: ground truth.
        names: of images and classes.
        detectors: title -> analysis, at whose threshold detections are shown, and detections.
    """
    gt = _gt_boxes(truth, image_id, names, missed=())
    panels = {f"ground truth: {len(gt)}": gt}
    for title, (analysis, results) in detectors.items():
        mistakes = next((i for i in analysis.worst if i.image_id == image_id), ImageMistakes(image_id, [], []))
        found = _found_boxes(results, image_id, names, false=mistakes.false, score_thresh=analysis.threshold.score)
        summary = f"{len(found)}, missed {len(mistakes.missed)}, false {len(mistakes.false)}"
        missed = [DrawnBox(truth.boxes[i], f"missed {names.gt(i)}", WRONG) for i in mistakes.missed]
        panels[f"{title}: {summary}"] = [*found, *missed]
    return compared(pixels, panels)


def _gt_boxes(truth: GroundTruth, image_id: int, names: Names, *, missed: Sequence[int]) -> list[DrawnBox]:
    """The boxes of an image, missed ones last."""
    place = int(np.searchsorted(truth.image_ids, image_id))
    boxes = np.flatnonzero((truth.images == place) & ~truth.crowd).tolist()
    return [
        DrawnBox(truth.boxes[i], names.gt(i), WRONG if i in missed else RIGHT)
        for i in sorted(boxes, key=lambda i: i in missed)
    ]


def _found_boxes(
    results: ScoredBoxes, image_id: int, names: Names, *, false: Sequence[int], score_thresh: float
) -> list[DrawnBox]:
    """The detections of an image from a score on, the weakest first, but false ones last."""
    places = np.flatnonzero((results.image_ids == image_id) & (results.scores >= score_thresh))
    places = places[np.argsort(results.scores[places], kind="stable")]
    return [
        DrawnBox(results.boxes[i], names.detection(results, i), WRONG if i in false else RIGHT)
        for i in sorted(places.tolist(), key=lambda i: i in false)
    ]


def _why(image: ImageMistakes, results: ScoredBoxes, names: Names) -> str:
    parts = []
    if image.missed:
        parts.append(f"missed {len(image.missed)} ({_first([names.gt(i) for i in image.missed])})")
    if image.false:
        false = sorted(image.false, key=lambda i: -results.scores[i])
        parts.append(f"false {len(false)} ({_first([names.detection(results, i) for i in false])})")
    return "; ".join(parts)


def label_errors(
    analysis: Analysis,
    truth: GroundTruth,
    results: ScoredBoxes,
    names: Names,
    read_image: ReadImage | str,
    *,
    count: int,
) -> Section:
    body: list[str | Html] = []
    if isinstance(read_image, str) and analysis.suspects:
        body.append(f"No pictures: {read_image}")
    for kind, (title, explanation) in _SUSPECTS.items():
        of_kind = [s for s in analysis.suspects if s.kind == kind]
        if not of_kind:
            continue
        body += [heading(f"{title}: {len(of_kind):,}"), explanation]
        if not isinstance(read_image, str):
            body.append(grid(_crops(of_kind[:count], truth, results, names, read_image), width_px=160))
        rows: list[Row] = [
            [names.image(s.image_id), _label_of(s, names), _detection_of(s, results, names), number(s.score, 3)]
            for s in of_kind[:MAX_ROWS]
        ]
        listed = table(["image", "annotated", "detected", "score"], rows, label=title, filterable=True)
        body.append(details(f"The first {len(rows)} as a table", listed))
    return Section(
        "Likely label errors",
        body or ["None was found."],
        "Where a good detector contradicts the annotations, these are worth a look: errors in the validation set cost "
        "AP that no model can win, and the training set has the same kinds. With a weak detector most are its own.",
    )


def _crops(
    suspects: Sequence[Suspect], truth: GroundTruth, results: ScoredBoxes, names: Names, read_image: ReadImage
) -> list[Picture]:
    pictures = []
    for s in suspects:
        try:
            pixels = read_image(s.image_id)
        except InputError:
            continue  # the table below has it
        boxes = [
            *([DrawnBox(truth.boxes[s.gt], _label_of(s, names), RIGHT)] if s.gt is not None else []),
            *(
                [DrawnBox(results.boxes[s.detection], _detection_of(s, results, names), WRONG)]
                if s.detection is not None
                else []
            ),
        ]
        said = "; ".join(
            part
            for part in (
                f"annotated {_label_of(s, names)}" if s.gt is not None else "",
                f"detected {_detection_of(s, results, names)}" if s.detection is not None else "",
            )
            if part
        )
        caption = f"{said}\n{names.image(s.image_id)}"
        pictures.append(Picture(crop(pixels, boxes), caption, f"{said} in {names.image(s.image_id)}"))
    return pictures


def _label_of(s: Suspect, names: Names) -> str:
    return names.gt(s.gt) if s.gt is not None else ""


def _detection_of(s: Suspect, results: ScoredBoxes, names: Names) -> str:
    return names.detection(results, s.detection) if s.detection is not None else ""


def shown_score(value: float) -> str:
    """A threshold in three digits, rounded down so that it keeps what it kept."""
    return f"{math.floor(1000 * value) / 1000:.3f}"


def _first(items: Sequence[str], count: int = 4) -> str:
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")
