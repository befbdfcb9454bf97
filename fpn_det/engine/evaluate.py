"""Detection and proposals over a data set, and their COCO metrics.

Images that could not be read (`Batch.unreadable`) pass through the network as black ones, and nothing is found there.

Dimensions: N images of a batch, P proposals per image, D detections of one image, V views.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms
from tqdm import tqdm

from fpn_det.boxes import rescale
from fpn_det.engine.coco_eval import (
    Backend,
    GroundTruth,
    Metrics,
    ProposalMetrics,
    ScoredBoxes,
    score,
    score_proposals,
)
from fpn_det.engine.distributed import Process
from fpn_det.engine.memory import explained_memory_errors
from fpn_det.engine.precision import Precision, autocast
from fpn_det.structures import Batch, Categories, Detections, InputError, Proposals

Output = TypeVar("Output")

MAX_UNREADABLE = 10
"""So many images at the start, none of which can be read, are more than single broken files."""


MEMORY_REMEDY = "Lower eval.batch_size or data.test_short_side"


class Model(Protocol):
    """What evaluation needs of any model."""

    training: bool

    def train(self, mode: bool = True) -> Any:
        """Enter training mode, or evaluation mode if `mode` is False."""


class DetectionModel(Model, Protocol):
    """A model that detects; all of `fpn_det.models.faster_rcnn` do."""

    def predict(self, batch: Batch) -> list[Detections]:
        """Detections of each image, in the frame of the resized image."""


class Proposer(Model, Protocol):
    """A model that proposes; all of `fpn_det.models.faster_rcnn` do."""

    def propose(self, batch: Batch) -> Proposals:
        """Proposals of each image, in the frame of the resized image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One look at the images of a data set.

    Attributes:
        batches: yields `Batch`es.
        flipped: whether their images are mirrored left to right.
    """

    batches: Iterable[Any]
    flipped: bool = False


def detect(
    model: DetectionModel,
    batches: Iterable[Any],
    *,
    device: torch.device,
    precision: Precision,
    flipped: bool = False,
    show_progress: bool = True,
    memory_remedy: str = MEMORY_REMEDY,
) -> Iterator[tuple[Batch, list[Detections]]]:
    """Detect in all batches.

    Args:
        model: the detector; it is put into evaluation mode.
        batches: yields `Batch`es.
        device: where the model is.
        precision: of the forward pass.
        flipped: whether the images are mirrored left to right; their detections are mirrored back.
        show_progress: whether to show a progress bar (on a terminal only).
        memory_remedy: what to lower where memory runs out.

    Yields:
        The batch, on the CPU, and per image its detections, on the CPU, in the frame of the original image; none in an
        image that could not be read.

    Raises:
        InputError: none of the first images can be read.
    """
    outputs = _run(
        model,
        model.predict,
        batches,
        device=device,
        precision=precision,
        show_progress=show_progress,
        name="detecting",
        memory_remedy=memory_remedy,
    )
    for batch, found in outputs:
        yield (
            batch,
            [
                Detections(
                    boxes=_to_original(d.boxes, size, original_size, flipped=flipped), scores=d.scores, labels=d.labels
                )
                for d, size, original_size in zip(
                    _to_cpu(_of_readable(batch, found)), batch.sizes, batch.original_sizes, strict=True
                )
            ],
        )


def propose(
    model: Proposer, batches: Iterable[Any], *, device: torch.device, precision: Precision, show_progress: bool = True
) -> Iterator[tuple[Batch, list[tuple[Tensor, Tensor]]]]:
    """Find proposals in all batches.

    Args:
        model: the proposer; it is put into evaluation mode.
        batches: yields `Batch`es.
        device: where the model is.
        precision: of the forward pass.
        show_progress: whether to show a progress bar (on a terminal only).

    Yields:
        The batch, on the CPU, and per image its proposals, on the CPU, best first: boxes (P, 4) in the frame of the
        original image and scores (P,); none in an image that could not be read.

    Raises:
        InputError: none of the first images can be read.
    """
    outputs = _run(
        model, model.propose, batches, device=device, precision=precision, show_progress=show_progress, name="proposing"
    )
    for batch, found in outputs:
        p = found.to("cpu")
        valid_and_readable = p.valid & _is_readable(batch)[:, None]
        yield (
            batch,
            [
                (_to_original(boxes[valid], size, original_size), scores[valid])
                for boxes, scores, valid, size, original_size in zip(
                    p.boxes, p.scores, valid_and_readable, batch.sizes, batch.original_sizes, strict=True
                )
            ],
        )


def merge_views(views: Sequence[Detections], *, nms_thresh: float, top_k: int) -> Detections:
    """Detections of one image in several views as those of one: their union after another NMS.

    That is what Detectron2's `GeneralizedRCNNWithTTA` does with boxes.

    Args:
        views: V detections in the frame of the original image; a single view stays as it is.
        nms_thresh: a detection is dropped if it overlaps a better one of its class by more.
        top_k: how many are kept, best first.
    """
    if len(views) == 1:
        return views[0]
    boxes, scores, labels = (torch.cat([getattr(v, name) for v in views]) for name in ("boxes", "scores", "labels"))
    keep = batched_nms(boxes, scores, labels, nms_thresh)[:top_k]
    return Detections(boxes=boxes[keep], scores=scores[keep], labels=labels[keep])


def to_coco_results(image_ids: Sequence[int], detections: Sequence[Detections], categories: Categories) -> ScoredBoxes:
    """Detections of some images, on the CPU, in COCO's terms: [x, y, w, h], category ids of the data set."""
    # The first item of each list gives shape and dtype where there is no image.
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(d.boxes.numpy() for d in detections)])
    boxes[:, 2:] -= boxes[:, :2]
    labels = np.concatenate([np.zeros(0, np.int64), *(d.labels.numpy() for d in detections)])
    return ScoredBoxes(
        boxes=boxes,
        scores=np.concatenate([np.zeros(0, np.float32), *(d.scores.numpy() for d in detections)]),
        image_ids=np.repeat(np.array(image_ids, np.int64), [len(d) for d in detections]),
        category_ids=np.array(categories.ids, np.int64)[labels],
    )


def from_coco_results(results: ScoredBoxes, categories: Categories) -> Detections:
    """Inverse of `to_coco_results` for one image; sorted by descending score."""
    results = results[np.argsort(-results.scores, kind="stable")]
    boxes = torch.tensor(results.boxes, dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        boxes=boxes,
        scores=torch.tensor(results.scores, dtype=torch.float32),
        labels=torch.tensor(np.searchsorted(categories.ids, results.category_ids)),
    )


def evaluate(
    model: DetectionModel,
    views: Iterable[View],
    *,
    truth: GroundTruth,
    categories: Categories,
    backend: Backend,
    nms_thresh: float,
    max_detections: int,
    precision: Precision,
    process: Process,
) -> tuple[Metrics, ScoredBoxes] | None:
    """COCO metrics of a model on a data set that is shared out over all processes (collective).

    Args:
        model: the detector; it comes back in the mode (training or evaluation) it had.
        views: this process' share of the images; of several views of an image the detections are merged.
        truth: ground truth of all images.
        categories: of the model.
        backend: `pycocotools` or `hotcoco`.
        nms_thresh: of the merging; see `merge_views`.
        max_detections: detections per image that count, best first.
        precision: of the forward pass.
        process: this process.

    Returns:
        On the main process the metrics, with the `unreadable_images` of all processes if there are any, and the
        detections, by image id and descending score; None on the others.
    """
    was_training = model.training
    found: dict[int, list[Detections]] = defaultdict(list)
    unreadable: set[int] = set()
    for view in views:
        for batch, detections in detect(
            model,
            view.batches,
            device=process.device,
            precision=precision,
            flipped=view.flipped,
            show_progress=process.is_main,
        ):
            unreadable.update(batch.unreadable.tolist())
            process.doing("evaluating")
            for image_id, of_image in zip(batch.image_ids.tolist(), detections, strict=True):
                found[image_id].append(of_image)
    model.train(was_training)
    merged = [merge_views(of_views, nms_thresh=nms_thresh, top_k=max_detections) for of_views in found.values()]
    gathered = process.gather((to_coco_results(list(found), merged, categories), unreadable))
    if not process.is_main:
        return None
    results = ScoredBoxes.join([of_process for of_process, _ in gathered])
    results = results[np.lexsort((-results.scores, results.image_ids))]
    metrics = score(truth, results, backend=backend, max_detections=max_detections)
    if ids := sorted(set().union(*(ids for _, ids in gathered))):
        metrics["unreadable_images"] = ids
    return metrics, results


def evaluate_proposals(
    model: Proposer,
    batches: Iterable[Any],
    *,
    truth: GroundTruth,
    backend: Backend,
    precision: Precision,
    process: Process,
) -> ProposalMetrics | None:
    """Recall of a model's proposals on a data set that is shared out over all processes (collective).

    Args:
        model: the proposer; it comes back in the mode (training or evaluation) it had.
        batches: this process' share of the images.
        truth: ground truth of all images.
        backend: `pycocotools` or `hotcoco`, which is much faster here.
        precision: of the forward pass.
        process: this process.

    Returns:
        The recalls on the main process, with the `unreadable_images` of all processes if there are any; None on the
        others.
    """
    was_training = model.training
    unreadable: set[int] = set()
    boxes, scores, image_ids = [np.zeros((0, 4), np.float32)], [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
    for batch, proposals in propose(
        model, batches, device=process.device, precision=precision, show_progress=process.is_main
    ):
        process.doing("evaluating")
        unreadable.update(batch.unreadable.tolist())
        for image_id, (boxes_of_image, scores_of_image) in zip(batch.image_ids.tolist(), proposals, strict=True):
            boxes.append(boxes_of_image.numpy())
            scores.append(scores_of_image.numpy())
            image_ids.append(np.full(len(boxes_of_image), image_id))
    model.train(was_training)
    xywh, ids = np.concatenate(boxes), np.concatenate(image_ids)
    xywh[:, 2:] -= xywh[:, :2]
    own = ScoredBoxes(boxes=xywh, scores=np.concatenate(scores), image_ids=ids, category_ids=np.zeros_like(ids))
    gathered = process.gather((own, unreadable))
    if not process.is_main:
        return None
    metrics = score_proposals(truth, ScoredBoxes.join([of_process for of_process, _ in gathered]), backend=backend)
    if unreadable_ids := sorted(set().union(*(ids for _, ids in gathered))):
        metrics["unreadable_images"] = unreadable_ids
    return metrics


@torch.no_grad()
def _run(
    model: Model,
    call: Callable[[Batch], Output],
    batches: Iterable[Any],
    *,
    device: torch.device,
    precision: Precision,
    show_progress: bool,
    name: str,
    memory_remedy: str = MEMORY_REMEDY,
) -> Iterator[tuple[Batch, Output]]:
    """What `call` makes of each batch, in evaluation mode; the batch on the CPU, the output where it is.

    Raises:
        InputError: no image can be read.
    """
    model.train(False)
    num_images = num_unreadable = 0
    for batch in tqdm(batches, desc=name, unit="batch", disable=None if show_progress else True, file=sys.stderr):
        num_images += len(batch.image_ids)
        num_unreadable += len(batch.unreadable)
        if num_unreadable == num_images >= MAX_UNREADABLE:
            raise InputError(
                f"none of the first {num_images} images can be read; is the file system there, and data.val.images "
                f"right? The last one: id {batch.image_ids[-1]}"
            )
        with (
            explained_memory_errors(batch, device, remedy=memory_remedy),
            autocast(device, precision),
        ):
            output = call(batch.to(device, non_blocking=True))
        yield batch, output


def _is_readable(batch: Batch) -> Tensor:
    """(N,) bool, on the CPU: whether the image could be read."""
    return ~torch.isin(batch.image_ids, batch.unreadable)


def _of_readable(batch: Batch, detections: Sequence[Detections]) -> list[Detections]:
    """The detections of a batch, none in images that could not be read."""
    return [
        d if readable else Detections(boxes=d.boxes[:0], scores=d.scores[:0], labels=d.labels[:0])
        for d, readable in zip(detections, _is_readable(batch).tolist(), strict=True)
    ]


def _to_cpu(detections: Sequence[Detections]) -> list[Detections]:
    """The detections of a batch in three copies: three per image would each wait for the device."""
    counts = [len(d) for d in detections]
    boxes, scores, labels = (
        torch.cat([getattr(d, name) for d in detections]).cpu().split(counts) for name in ("boxes", "scores", "labels")
    )
    return [Detections(boxes=b, scores=s, labels=k) for b, s, k in zip(boxes, scores, labels, strict=True)]


def _to_original(boxes: Tensor, size: Tensor, original_size: Tensor, *, flipped: bool = False) -> Tensor:
    """(D, 4) boxes of an image resized to `size`, and mirrored if `flipped`, in the frame of its file."""
    if flipped:
        x1, y1, x2, y2 = boxes.unbind(1)
        boxes = torch.stack([size[1] - x2, y1, size[1] - x1, y2], 1)
    return rescale(boxes, size, original_size)
