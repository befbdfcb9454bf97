"""A check of everything at once: the same few images until the detector has learned them by heart, or a diagnosis.

Whatever is wrong with labels, boxes, anchors, losses, learning rate or evaluation shows here, in minutes instead of
days. The images are neither augmented nor held out: training and evaluation see the same pixels and boxes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fpn_det import build
from fpn_det.config import Config, dump_config
from fpn_det.data.coco import CocoAnnotations
from fpn_det.engine.coco_eval import GroundTruth, Metrics, ScoredBoxes, format_table
from fpn_det.engine.diagnosis import SkippedSteps
from fpn_det.engine.distributed import Process
from fpn_det.engine.evaluate import View, from_coco_results, propose
from fpn_det.engine.fit import TARGET_AP, Finding, FittedImage, diagnose, limits, summary
from fpn_det.engine.run_folder import opened_run
from fpn_det.engine.runlog import RunLog
from fpn_det.engine.train import train
from fpn_det.files import replacing, write_text
from fpn_det.learner import Learner
from fpn_det.models.faster_rcnn import FastRCNN
from fpn_det.snapshots import draw_validation
from fpn_det.structures import InputError, printable

STEPS = "train.steps=400"
OVERRIDES = (
    STEPS,
    "optim.schedule=cosine",  # at a constant rate boxes stay imprecise: AP 60 to 70 where this exceeds 90
    "optim.warmup_steps=50",
    "train.accumulate=1",
    "train.ema_decay=none",
    "eval.every=20",
)
"""What this changes in a config, unless the command line says otherwise."""

MAX_PICTURES = 32


def overrides(config: Config, num_images: int, given: Sequence[str]) -> list[str]:
    """The key=value overrides that turn the config of a run into that of the check; those `given` win."""
    own = [*OVERRIDES, f"train.batch_size={min(num_images, config.train.batch_size)}"]
    if any(override.startswith("train.epochs=") for override in given):
        own.remove(STEPS)
    return [*own, *given]


def overfit(config: Config, folder: Path, *, num_images: int, process: Process) -> bool:
    """Train on a few images until their AP exceeds 0.9, or to the end of the run, and say what that means.

    Args:
        config: with `overrides`.
        folder: gets config.yaml, the log, TensorBoard's events, overfit.json and pictures; no checkpoint, so that the
            next check may use it too.
        num_images: how many of the training images with boxes, drawn by the config's seed.
        process: the only one.

    Returns:
        Whether the images were learned.

    Raises:
        InputError: of the data or the config; there is more than one process, or the model does not detect.
    """
    if process.world_size > 1:
        raise InputError("--overfit is a check with a few images: start it without torchrun")
    if config.model.kind == "rpn":
        raise InputError("--overfit goes by the AP of detections, and model.kind rpn gives none: set it to faster_rcnn")
    # What is trained on is what is evaluated, its proposals included.
    config = config.model_copy(update={"data": config.data.model_copy(update={"val": config.data.train})})
    every = build.load_train_data(config).without_empty()
    data = every.only(np.random.default_rng(config.seed).permutation(len(every))[:num_images].tolist())
    with (
        opened_run(folder, resume=False),
        RunLog(folder, start_step=0, num_steps=build.num_steps(config, len(data))) as log,
    ):
        write_text(folder / "config.yaml", dump_config(config))
        return Overfitting(config, folder, data, process, log).run()


class Overfitting:
    """One such run: the model, what it is compared with, and the latest evaluation."""

    def __init__(self, config: Config, folder: Path, data: CocoAnnotations, process: Process, log: RunLog) -> None:
        self.config, self.folder, self.data, self.process, self.log = config, folder, data, process, log
        self.learner = Learner(config, data.categories, device=process.device, pretrained=True)
        self.num_steps = build.num_steps(config, len(data))
        self.truth = ground_truth(data)
        self.batches = build.build_val_loader(config, data)
        self.skipped = SkippedSteps(limit=self.num_steps)
        self.evaluated: set[int] = set()

    def run(self) -> bool:
        """Train, evaluate and tell."""
        beyond = self.introduce()
        done = self.take_steps()
        if done not in self.evaluated:
            self.evaluate(done)
        fitted = self.metrics["AP"] > TARGET_AP
        is_interrupted = done < self.num_steps and not fitted
        images = self.images(self.results, self.proposals())
        self.log.message(format_table(self.metrics))
        self.log.message(summary(images))
        findings = [*beyond, *([] if fitted or is_interrupted else self.diagnosis(images))]
        self.draw()
        self.log.write_json(
            "overfit.json",
            {
                "fitted": fitted,
                "step": done,
                "AP": self.metrics["AP"],
                "AP50": self.metrics["AP50"],
                "image_ids": self.data.image_ids.tolist(),
                "findings": [{"what": finding.what, "remedy": finding.remedy} for finding in findings],
            },
        )
        self.log.message(self.verdict(done, fitted, findings, is_interrupted=is_interrupted))
        return fitted

    def introduce(self) -> list[Finding]:
        """Begin the log: which images these are, and what no training could learn of them."""
        head = self.config.model.roi_head
        files = ", ".join(
            f"{printable(self.data.path(i).name)} (id {self.data.image_ids[i]})" for i in range(min(len(self.data), 8))
        )
        self.log.message(
            f"{len(self.data)} of the images of {self.data.source} with boxes, "
            f"drawn by seed {self.config.seed}: {files}{', ..' if len(self.data) > 8 else ''}"
        )
        if self.learner.origin:
            self.log.message(self.learner.origin)
        beyond = limits(
            self.images(),
            self.data.categories.names,
            nms_thresh=head.nms_thresh,
            detections_per_image=head.detections_per_image,
        )
        for finding in beyond:
            self.log.message(f"{finding}")
        return beyond

    def take_steps(self) -> int:
        """Train to the end, or until the images are learned; returns the number of steps done."""
        config = self.config
        return train(
            self.learner.model,
            build.build_train_loader(config, self.data, transform=build.build_test_transform(config)),
            optimizer=self.learner.optimizer,
            scaler=self.learner.scaler,
            lr_at=build.build_schedule(config, self.num_steps),
            start_step=0,
            num_steps=self.num_steps,
            seed=config.seed,
            process=self.process,
            log=self.log,
            skipped=self.skipped,
            note_unreadable=self.refuse_unreadable,
            save=lambda step: None,
            evaluate=self.evaluate,
            accumulate=config.train.accumulate,
            precision=config.train.precision,
            clip_norm=config.optim.clip_norm,
            ema=self.learner.ema,
            log_every=config.train.log_every,
            evaluate_every=build.interval(config.eval.every, self.num_steps),
        )

    def evaluate(self, step: int) -> bool:
        """Whether the images are learned after `step` steps."""
        evaluated = build.evaluate_model(
            self.config,
            self.learner.detector,
            [View(batches=self.batches)],
            self.truth,
            self.data.categories,
            process=self.process,
        )
        assert evaluated is not None  # this is the main process
        self.metrics: Metrics = evaluated[0]
        self.results: ScoredBoxes = evaluated[1]
        ap, ap50 = self.metrics["AP"], self.metrics["AP50"]
        self.evaluated.add(step)
        self.log.scalars(step, {"val/AP": ap, "val/AP50": ap50})
        self.log.message(f"step {step}: AP {100 * ap:.1f}, AP50 {100 * ap50:.1f} on the same images")
        return ap > TARGET_AP

    def proposals(self) -> dict[int, torch.Tensor]:
        """The proposals in each image, by its id; empty where the model has no RPN."""
        if isinstance(self.learner.model, FastRCNN):
            return {}
        found = propose(
            self.learner.detector, self.batches, device=self.process.device, precision=self.config.train.precision
        )
        return {
            image_id: boxes
            for batch, of_batch in found
            for image_id, (boxes, _) in zip(batch.image_ids.tolist(), of_batch, strict=True)
        }

    def images(
        self, results: ScoredBoxes | None = None, proposals: dict[int, torch.Tensor] | None = None
    ) -> list[FittedImage]:
        """The images with what is known of them."""
        transform, images = build.build_test_transform(self.config), []
        for i, image_id in enumerate(self.data.image_ids.tolist()):
            boxes, labels = self.data.targets(i)
            short, long = sorted(self.data.sizes[i].tolist())
            detections = None
            if results is not None:
                detections = from_coco_results(results[results.image_ids == image_id], self.data.categories)
            images.append(
                FittedImage(
                    image_id=image_id,
                    boxes=boxes,
                    labels=labels,
                    scale=min(transform.short_side / short, transform.long_side / long),
                    proposals=proposals.get(image_id) if proposals else None,
                    detections=detections,
                )
            )
        return images

    def diagnosis(self, images: Sequence[FittedImage]) -> list[Finding]:
        """What keeps the AP low, apart from the limits of the data."""
        records = map(json.loads, (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
        return diagnose(
            images,
            self.data.categories.names,
            anchor_shapes=anchor_shapes(self.config),
            losses=[record["loss/total"] for record in records if "loss/total" in record],
            num_skipped=self.skipped.count,
            trained=trained_parameters(self.learner.model),
            score_thresh=self.config.model.roi_head.score_thresh,
        )

    def draw(self) -> None:
        """Write the images with ground truth and detections."""
        (self.folder / "pictures").mkdir(exist_ok=True)
        for i, image_id in enumerate(self.data.image_ids.tolist()[:MAX_PICTURES]):
            picture = draw_validation(self.data, i, self.results)
            with replacing(self.folder / "pictures" / f"{image_id}.png") as file:
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")

    def verdict(self, step: int, fitted: bool, findings: Sequence[Finding], *, is_interrupted: bool) -> str:
        """What it all means, for the end of the log."""
        ap = f"AP {100 * self.metrics['AP']:.1f} after {step} of {self.num_steps} steps"
        if fitted:
            return (
                f"learned by heart: {ap}. Model, losses and evaluation work together on this data. Wrong labels and "
                f"misplaced boxes can be learned by heart, too: see in {self.folder}/pictures whether the boxes on the "
                "left are right. How well it generalises, training will show"
            )
        if is_interrupted:
            return f"interrupted: {ap}. Whether the images can be learned is not known yet"
        reasons = "\n".join(f"{i}. {finding}" for i, finding in enumerate(findings, 1))
        return (
            f"not learned: {ap}, where a detector that fits its data exceeds {100 * TARGET_AP:g}. Pictures are in "
            f"{self.folder}/pictures. The likely causes:\n{reasons or '(none found: look at the pictures)'}"
        )

    def refuse_unreadable(self, image_ids: list[int]) -> None:
        """An image that cannot be read would be replaced by another."""
        raise InputError(
            f"{self.data.source}: the images with ids {', '.join(map(str, image_ids))} cannot be read; "
            "tools/check_data.py names all such"
        )


def ground_truth(data: CocoAnnotations) -> GroundTruth:
    """What the evaluation compares with: the boxes that are trained on."""
    image_ids = data.image_ids.numpy()
    order = np.argsort(image_ids)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    boxes = data.boxes.double().numpy().copy()
    boxes[:, 2:] -= boxes[:, :2]
    names = data.categories.names
    return GroundTruth(
        source=data.source,
        image_ids=image_ids[order],
        category_ids=np.array(data.categories.ids, np.int64),
        names=tuple(
            name if names.count(name) == 1 else f"{name} (id {category_id})"
            for category_id, name in zip(data.categories.ids, names, strict=True)
        ),
        boxes=boxes,
        areas=boxes[:, 2:].prod(1),
        crowd=np.zeros(len(boxes), np.bool_),
        images=place.repeat(data.box_offsets.diff().numpy()),
        classes=data.labels.numpy(),
    )


def anchor_shapes(config: Config) -> torch.Tensor:
    """(A, 2) widths and heights of the anchors of all levels, in pixels of the resized image."""
    anchors = config.model.anchors
    sizes = [size for level in anchors.level_sizes for size in level]
    return torch.tensor([(size / ratio**0.5, size * ratio**0.5) for size in sizes for ratio in anchors.ratios])


def trained_parameters(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Part of the model -> its parameters that are trained, and all of them."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        trained, total = counts.get(part, (0, 0))
        counts[part] = (trained + parameter.requires_grad * parameter.numel(), total + parameter.numel())
    return counts
