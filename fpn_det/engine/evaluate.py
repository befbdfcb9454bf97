"""Detection over a data set, and its COCO metrics.

Dimensions: N images of a batch, D detections of one image.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from fpn_det.boxes import rescale
from fpn_det.engine.coco_eval import Backend, Metrics, score
from fpn_det.engine.distributed import Process
from fpn_det.structures import Batch, Categories, Detections


class Detector(Protocol):
    """What evaluation needs of a model; `fpn_det.models.faster_rcnn.FasterRCNN` has it."""

    training: bool

    def predict(self, batch: Batch) -> list[Detections]:
        """Detections of each image, in the frame of the resized image."""

    def train(self, mode: bool = True) -> Any:
        """Enter training mode, or evaluation mode if `mode` is False."""


@torch.no_grad()
def detect(
    model: Detector, batches: Iterable[Any], *, device: torch.device, precision: str, show_progress: bool = True
) -> Iterator[tuple[Batch, list[Detections]]]:
    """Detect in all batches.

    Args:
        model: the detector; it is put into evaluation mode.
        batches: yields `Batch`es.
        device: where the model is.
        precision: `fp32` or `bf16`.
        show_progress: whether to show a progress bar (on a terminal only).

    Yields:
        The batch, on the CPU, and per image its detections, on the CPU, in the frame of the original image.
    """
    model.train(False)
    progress = tqdm(batches, desc="detecting", unit="batch", disable=None if show_progress else True, file=sys.stderr)
    for batch in progress:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            found = model.predict(batch.to(device, non_blocking=True))
        found = [d.to("cpu") for d in found]
        yield (
            batch,
            [
                Detections(boxes=rescale(d.boxes, size, original_size), scores=d.scores, labels=d.labels)
                for d, size, original_size in zip(found, batch.sizes, batch.original_sizes, strict=True)
            ],
        )


def to_coco_results(image_id: int, detections: Detections, categories: Categories) -> list[dict[str, Any]]:
    """Detections of one image in COCO's results format: category ids of the data set, boxes as [x, y, w, h]."""
    xywh = detections.boxes.clone()
    xywh[:, 2:] -= xywh[:, :2]
    return [
        {"image_id": image_id, "category_id": categories.ids[label], "bbox": box, "score": value}
        for box, label, value in zip(xywh.tolist(), detections.labels.tolist(), detections.scores.tolist(), strict=True)
    ]


def from_coco_results(results: Sequence[dict[str, Any]], categories: Categories) -> Detections:
    """Inverse of `to_coco_results` for the records of one image, which are sorted by descending score."""
    results = sorted(results, key=lambda r: -r["score"])
    boxes = torch.tensor([r["bbox"] for r in results], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        boxes=boxes,
        scores=torch.tensor([r["score"] for r in results], dtype=torch.float32),
        labels=torch.tensor([categories.ids.index(r["category_id"]) for r in results], dtype=torch.int64),
    )


def evaluate(
    model: Detector,
    batches: Iterable[Any],
    *,
    annotations: Path,
    categories: Categories,
    backend: Backend,
    max_detections: int,
    precision: str,
    process: Process,
) -> tuple[Metrics, list[dict[str, Any]]] | None:
    """COCO metrics of a model on a data set that is shared out over all processes (collective).

    Args:
        model: the detector; it comes back in the mode (training or evaluation) it had.
        batches: this process' share of the images.
        annotations: COCO-format ground truth of all images.
        categories: of the model.
        backend: `pycocotools` or `hotcoco`.
        max_detections: detections per image that count, best first.
        precision: `fp32` or `bf16`.
        process: this process.

    Returns:
        The metrics and the detections in COCO's results format on the main process, None on the others.
    """
    was_training = model.training
    results = [
        record
        for batch, found in detect(
            model, batches, device=process.device, precision=precision, show_progress=process.is_main
        )
        for image_id, detections in zip(batch.image_ids.tolist(), found, strict=True)
        for record in to_coco_results(image_id, detections, categories)
    ]
    model.train(was_training)
    gathered = process.gather(results)
    if not process.is_main:
        return None
    results = sorted((r for part in gathered for r in part), key=lambda r: (r["image_id"], -r["score"]))
    return score(annotations, results, backend=backend, max_detections=max_detections), results
