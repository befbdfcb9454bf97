"""Ground truth and detections that are made for tests of the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fpn_det.engine.coco_eval import GroundTruth, ScoredBoxes

Box = tuple[float, float, float, float]

BOX: Box = (0.0, 0.0, 40.0, 40.0)


def truth_of(boxes: list[tuple[int, int, Box]], *, num_classes: int = 3, crowd: tuple[int, ...] = ()) -> GroundTruth:
    """Ground truth of (image 0.., class 0.., box); image ids are 10, 11, .., category ids 1, 3, 5."""
    images, classes, xywh = (np.array(column) for column in zip(*boxes, strict=True)) if boxes else ([], [], [])
    array = np.array(xywh, np.float64).reshape(-1, 4)
    return GroundTruth(
        source=Path("gt.json"),
        image_ids=np.arange(10, 14),
        category_ids=np.arange(num_classes) * 2 + 1,
        names=tuple(f"class {k}" for k in range(num_classes)),
        boxes=array,
        areas=array[:, 2] * array[:, 3],
        crowd=np.isin(np.arange(len(boxes)), crowd),
        images=np.array(images, np.int64),
        classes=np.array(classes, np.int64),
    )


def found(boxes: list[tuple[int, int, Box, float]]) -> ScoredBoxes:
    """Detections of (image 0.., class 0.., box, score)."""
    return ScoredBoxes(
        boxes=np.array([b[2] for b in boxes], np.float64).reshape(-1, 4),
        scores=np.array([b[3] for b in boxes], np.float64),
        image_ids=np.array([b[0] + 10 for b in boxes], np.int64),
        category_ids=np.array([2 * b[1] + 1 for b in boxes], np.int64),
    )


def random_set(seed: int, *, num_images: int = 12, crowd: float = 0.1) -> tuple[GroundTruth, ScoredBoxes]:
    """Boxes that overlap, detections of all kinds, ties of scores."""
    rng = np.random.default_rng(seed)
    count = num_images * 4
    size = rng.uniform(8, 60, (count, 2))
    boxes = np.concatenate([rng.uniform(0, 60, (count, 2)), size], axis=1)
    images, classes = np.sort(rng.integers(0, num_images, count)), rng.integers(0, 3, count)
    truth = GroundTruth(
        source=Path("gt.json"),
        image_ids=np.arange(num_images) + 10,
        category_ids=np.array([1, 3, 5, 7]),  # the last class has no box
        names=("a", "b", "c", "d"),
        boxes=boxes,
        areas=boxes[:, 2] * boxes[:, 3],
        crowd=rng.random(count) < crowd,
        images=images,
        classes=classes,
    )
    near = rng.integers(0, count, 2 * count)
    moved = boxes[near] + rng.normal(0, 1, (2 * count, 4)) * boxes[near][:, 2:].repeat(2, axis=1) * 0.12
    labels = np.where(rng.random(2 * count) < 0.2, rng.integers(0, 4, 2 * count), classes[near])
    anywhere = np.concatenate([rng.uniform(0, 150, (count, 2)), rng.uniform(8, 60, (count, 2))], axis=1)
    return truth, ScoredBoxes(
        boxes=np.concatenate([moved, anywhere]).clip(min=[-9, -9, 2, 2]),
        scores=rng.permutation(np.round(np.linspace(0.02, 0.98, 3 * count), 2)),
        image_ids=np.concatenate([images[near], rng.integers(0, num_images, count)]) + 10,
        category_ids=np.concatenate([labels, rng.integers(0, 4, count)]) * 2 + 1,
    )
