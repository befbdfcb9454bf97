"""From a `Config` to objects: the only file that knows both.

A new backbone or neck is added in three places: its class, its section in `config.py` (told apart by `kind`) and its
`case` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, assert_never

import torch
from torch import nn
from torch.utils.data import DataLoader

from fpn_det.config import Config
from fpn_det.data.coco import CocoAnnotations, format_problems, load_coco
from fpn_det.data.loader import DetectionDataset, TestSampler, TrainSampler, make_loader
from fpn_det.data.transforms import TestTransform, TrainTransform
from fpn_det.engine.coco_eval import Metrics, read_ground_truth
from fpn_det.engine.distributed import Process
from fpn_det.engine.evaluate import evaluate
from fpn_det.engine.optim import lr_factor, make_optimizer, scaled_lr
from fpn_det.models.anchors import Anchors
from fpn_det.models.backbone import ResNet, read_classifier
from fpn_det.models.faster_rcnn import FasterRCNN
from fpn_det.models.fpn import FPN
from fpn_det.models.roi_head import RoIHead, TwoFCHead
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.models.rpn import RPN, RPNHead
from fpn_det.structures import Categories, InputError, Sample


def load_train_data(config: Config) -> CocoAnnotations:
    """The training annotations, checked against the config.

    Raises:
        InputError: what `load_coco` raises, no image left to train on, or a contradicting `model.num_classes`.
    """
    split = config.data.train
    data = load_coco(split.annotations, split.images, on_error=config.data.on_error)
    check_num_classes(config, data.categories)
    if not config.data.keep_empty:
        data = data.without_empty()
    if len(data.boxes) == 0:
        problems = f"\n{format_problems(data.problems)}" if data.problems else ""
        raise InputError(
            f"{split.annotations}: no usable box, so nothing to train on; set data.train.annotations to a file with "
            f"boxes{problems}"
        )
    return data


def load_val_data(config: Config) -> CocoAnnotations:
    """The validation annotations: every image, with or without boxes.

    Raises:
        InputError: what `load_coco` raises, or what the evaluation would refuse after the training.
    """
    split = config.data.val
    data = load_coco(split.annotations, split.images, on_error="drop")
    read_ground_truth(split.annotations)
    return data


def check_num_classes(config: Config, categories: Categories) -> None:
    """Refuse a `model.num_classes` that contradicts the data set."""
    if config.model.num_classes not in (None, len(categories)):
        raise InputError(
            f"model.num_classes is {config.model.num_classes}, but the data set has {len(categories)} classes "
            f"({', '.join(categories.names[:10])}). Remove model.num_classes: the number comes from the data set"
        )


def build_train_loader(
    config: Config, data: CocoAnnotations, *, start_step: int = 0, process: Process | None = None
) -> DataLoader[Sample]:
    """The endless stream of training batches of this process, from `start_step` on."""
    process = process or Process()
    transform = TrainTransform(
        short_sides=config.data.short_sides,
        long_side=config.data.long_side,
        horizontal_flip=config.data.horizontal_flip,
        vertical_flip=config.data.vertical_flip,
    )
    parts = process.world_size * config.train.accumulate
    if config.train.batch_size % parts:
        raise InputError(
            f"train.batch_size {config.train.batch_size} does not divide into {process.world_size} processes x "
            f"train.accumulate {config.train.accumulate}; use a multiple of {parts}"
        )
    sampler = TrainSampler(
        data.sizes,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start_step,
        rank=process.rank,
        world_size=process.world_size,
        accumulate=config.train.accumulate,
        group_by_aspect=config.data.group_by_aspect,
    )
    return make_loader(
        DetectionDataset(data, transform),
        sampler,
        num_workers=config.data.num_workers,
        pin_memory=process.device.type == "cuda",
    )


def build_val_loader(config: Config, data: CocoAnnotations, *, process: Process | None = None) -> DataLoader[Sample]:
    """Batches of this process' share of the validation images, each image once over all processes."""
    process = process or Process()
    sampler = TestSampler(
        data.sizes, batch_size=config.eval.batch_size, rank=process.rank, world_size=process.world_size
    )
    return make_loader(
        DetectionDataset(data, build_test_transform(config)),
        sampler,
        num_workers=config.data.num_workers,
        pin_memory=process.device.type == "cuda",
    )


def build_test_transform(config: Config) -> TestTransform:
    """What happens to an image before detection."""
    return TestTransform(short_side=config.data.test_short_side, long_side=config.data.long_side)


def num_steps(config: Config, num_images: int) -> int:
    """Optimiser steps of the run, from `train.steps` or `train.epochs`."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return max(1, math.ceil(config.train.epochs * num_images / config.train.batch_size))


def interval(every: int | None, steps: int) -> int:
    """Steps between two checkpoints or evaluations: as configured, or a tenth of the run, at most 5000."""
    return every if every is not None else min(5000, max(1, steps // 10))


def warmup_steps(config: Config, steps: int) -> int:
    """Steps of warm-up: as configured, but at most a tenth of the run."""
    return min(config.optim.warmup_steps, steps // 10)


def peak_lr(config: Config) -> float:
    """The learning rate after warm-up, scaled from `optim.base_batch_size` unless `optim.scale_lr` is off."""
    if not config.optim.scale_lr:
        return config.optim.lr
    return scaled_lr(config.optim.lr, batch_size=config.train.batch_size, base_batch_size=config.optim.base_batch_size)


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser at its peak learning rate."""
    return make_optimizer(
        model,
        kind=config.optim.kind,
        lr=peak_lr(config),
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        norm_weight_decay=config.optim.norm_weight_decay,
    )


def build_schedule(config: Config, steps: int) -> Callable[[int], float]:
    """Learning rate at a step, as a function."""
    factor = partial(
        lr_factor,
        num_steps=steps,
        schedule=config.optim.schedule,
        milestones=config.optim.milestones,
        gamma=config.optim.gamma,
        warmup_steps=warmup_steps(config, steps),
        warmup_factor=config.optim.warmup_factor,
    )
    peak = peak_lr(config)
    return lambda step: peak * factor(step)


def build_model(config: Config, num_classes: int, *, pretrained: bool) -> FasterRCNN:
    """The detector.

    Args:
        config: what to build.
        num_classes: K, from the data set or a checkpoint.
        pretrained: whether to load `model.backbone.weights`; a checkpoint that is loaded next makes that needless.

    Raises:
        InputError: the backbone weights cannot be had or do not fit.
    """
    model = config.model
    backbone = build_backbone(config, pretrained=pretrained)
    neck = build_neck(config, backbone)
    anchors = Anchors(
        sizes=model.anchors.sizes, ratios=model.anchors.ratios, strides=neck.strides, rounded=model.anchors.rounded
    )
    rpn_options = model.rpn.model_dump()
    rpn = RPN(
        head=RPNHead(channels=model.neck.channels, num_anchors=anchors.num_ratios), anchors=anchors, **rpn_options
    )
    head = model.roi_head
    pooler = MultiLevelRoIAlign(
        strides=backbone.strides,
        output_size=head.pool_size,
        sampling_ratio=head.sampling_ratio,
        aligned=head.aligned,
        canonical_level=head.canonical_level,
        canonical_size=head.canonical_size,
    )
    roi_head = RoIHead(
        pooler=pooler,
        box_head=TwoFCHead(in_channels=model.neck.channels, pool_size=head.pool_size, fc_dim=head.fc_dim),
        fc_dim=head.fc_dim,
        num_classes=num_classes,
        positive_iou=head.positive_iou,
        num_samples=head.num_samples,
        positive_fraction=head.positive_fraction,
        class_agnostic=head.class_agnostic,
        box_weights=head.box_weights,
        smooth_l1_beta=head.smooth_l1_beta,
        score_thresh=head.score_thresh,
        nms_thresh=head.nms_thresh,
        detections_per_image=head.detections_per_image,
        min_size=head.min_size,
    )
    return FasterRCNN(
        backbone=backbone,
        neck=neck,
        rpn=rpn,
        roi_head=roi_head,
        pixel_mean=model.pixel_mean,
        pixel_std=model.pixel_std,
    )


def build_backbone(config: Config, *, pretrained: bool) -> ResNet:
    """The body, with its ImageNet weights if `pretrained` and the config names some."""
    backbone = config.model.backbone
    match backbone.kind:
        case "resnet":
            body = ResNet(name=backbone.name, norm=backbone.norm, frozen_stages=backbone.frozen_stages)
        case _:
            assert_never(backbone.kind)
    if pretrained and backbone.weights is not None:
        weights = read_classifier(backbone.name, backbone.weights)
        try:
            body.load_classifier(weights)
        except ValueError as error:
            raise InputError(f"model.backbone.weights {backbone.weights}: {error}") from error
    return body


def build_neck(config: Config, backbone: ResNet) -> FPN:
    """The feature pyramid on top of `backbone`."""
    neck = config.model.neck
    match neck.kind:
        case "fpn":
            return FPN(in_channels=backbone.channels, channels=neck.channels, strides=backbone.strides)
        case _:
            assert_never(neck.kind)


def evaluate_model(
    config: Config,
    model: FasterRCNN,
    batches: DataLoader[Sample],
    categories: Categories,
    *,
    process: Process,
) -> tuple[Metrics, list[dict[str, Any]]] | None:
    """Metrics and detections of `model` on the validation images (collective); see `engine.evaluate.evaluate`."""
    return evaluate(
        model,
        batches,
        annotations=config.data.val.annotations,
        categories=categories,
        backend=config.eval.backend,
        max_detections=config.model.roi_head.detections_per_image,
        precision=config.train.precision,
        process=process,
    )
