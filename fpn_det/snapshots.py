"""Pictures of a run: training images as the model sees them, validation images with ground truth and detections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.transforms import load_image
from fpn_det.draw import class_color, draw_boxes, draw_comparison
from fpn_det.engine.coco_eval import ScoredBoxes
from fpn_det.engine.evaluate import from_coco_results
from fpn_det.structures import Batch, InputError


def draw_training(batch: Batch, index: int, names: Sequence[str]) -> Tensor:
    """One image of a batch with its ground truth, resized and augmented as the model sees it, without the padding.

    Args:
        batch: on the CPU.
        index: of the image in the batch.
        names: of the classes.

    Returns:
        (3, H, W) uint8, enlarged as `draw_boxes` says.
    """
    h, w = batch.sizes[index].tolist()
    valid = batch.targets.valid[index]
    labels = batch.targets.labels[index][valid].tolist()
    return draw_boxes(
        batch.images[index, :, :h, :w].round().to(torch.uint8),
        batch.targets.boxes[index][valid],
        [names[label] for label in labels],
        colors=[class_color(label) for label in labels],
    )


def draw_validation(data: CocoAnnotations, index: int, results: ScoredBoxes) -> Tensor:
    """Ground truth and detections of one image side by side; black where the file cannot be read.

    Args:
        data: of the image.
        index: of the image in `data`.
        results: detections in the whole data set.

    Returns:
        (3, H, W) uint8, as of `draw_comparison`.
    """
    h, w = data.sizes[index].tolist()
    of_image = results.image_ids == int(data.image_ids[index])
    detections = from_coco_results(results[of_image], data.categories)
    boxes, labels = data.targets(index)
    try:
        image = load_image(data.path(index), (h, w))
    except InputError:  # the evaluation has said so
        image = torch.zeros(3, h, w, dtype=torch.uint8)
    return draw_comparison(image, detections, boxes, labels, data.categories.names)
