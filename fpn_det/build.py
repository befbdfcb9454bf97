"""From a `Config` to objects: the only file that knows both.

A new backbone or neck is added in three places: its class, its section in `config.py` (told apart by `kind`) and its
`case` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, assert_never

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fpn_det.config import (
    AnyRoiHeadConfig,
    CascadeConfig,
    Config,
    ConvFcConfig,
    FpnConfig,
    PafpnConfig,
    Res5Config,
    RoiHeadConfig,
    SingleLevelConfig,
    load_config,
    parse_config,
)
from fpn_det.data.checks import train_refusals, val_refusals
from fpn_det.data.coco import CocoAnnotations, load_coco
from fpn_det.data.loader import DetectionDataset, TestSampler, TrainSampler, load_annotated, make_loader
from fpn_det.data.problems import format_problems
from fpn_det.data.proposals import FixedProposals, read_proposals
from fpn_det.data.transforms import TestTransform, TrainTransform
from fpn_det.engine.checkpoint import State, best_weights, checkpoint_categories, load_checkpoint, load_weights
from fpn_det.engine.coco_eval import GroundTruth, Metrics, ProposalMetrics, ScoredBoxes, read_ground_truth
from fpn_det.engine.distributed import Process
from fpn_det.engine.evaluate import View, evaluate, evaluate_proposals
from fpn_det.engine.optim import lr_factor, make_optimizer, scaled_lr
from fpn_det.engine.precision import DTYPES
from fpn_det.models.anchors import Anchors
from fpn_det.models.backbone import ResNet, read_classifier
from fpn_det.models.faster_rcnn import DetectionModel, FasterRCNN, FastRCNN, ProposalNetwork
from fpn_det.models.fpn import FPN, PAFPN, SingleLevel
from fpn_det.models.norms import fold_frozen_norms
from fpn_det.models.roi_head import CascadeRoIHead, ConvFCHead, Res5Head, RoIHead
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.models.rpn import RPN, RPNHead, UnsharedRPNHead
from fpn_det.structures import Categories, InputError, Sample, printable

Split = Literal["train", "val"]


def load_train_data(config: Config) -> CocoAnnotations:
    """The training annotations, checked against the config.

    Raises:
        InputError: what `load_split` raises, a contradicting `model.num_classes` or `data.train.proposals`, or a norm
            that cannot be trained.
    """
    check_proposals(config, "train")
    check_norms(config)
    data = load_split(config, "train")
    check_num_classes(config, data.categories)
    return data if config.data.keep_empty else data.without_empty()


def load_val_data(config: Config) -> CocoAnnotations:
    """The validation annotations: every image, with or without boxes.

    Raises:
        InputError: what `load_split` raises, or a contradicting `data.val.proposals`.
    """
    check_proposals(config, "val")
    return load_split(config, "val")


def load_split(config: Config, split: Split) -> CocoAnnotations:
    """The annotations of a split, with and without boxes; refused where too much of it cannot be used.

    Raises:
        InputError: what `read_split` raises, or all that `split_refusals` says, with a report of what is left out.
    """
    data = read_split(config, split)
    reasons = split_refusals(config, split, data)
    if reasons:
        found = [p for p in data.problems if p.defect.outcome in ("refused", "left out")]
        raise InputError("\n".join([*reasons, *([format_problems(found)] if found else [])]))
    return data


def read_split(config: Config, split: Split) -> CocoAnnotations:
    """The annotations of a split with all that is wrong in them, whether or not they can be used.

    Raises:
        InputError: nothing can be read at all.
    """
    paths = config.data.train if split == "train" else config.data.val
    return load_coco(paths.annotations, paths.images, follow_links=config.data.follow_links)


def split_refusals(config: Config, split: Split, data: CocoAnnotations) -> list[str]:
    """Why a split cannot be used under this config, one line each; empty if it can."""
    if split == "val":
        return val_refusals(data)
    return train_refusals(data, on_error=config.data.on_error, drop_limit=config.data.drop_limit)


def load_ground_truth(config: Config) -> GroundTruth:
    """What the evaluation compares with, read once per run; before the training, because it may be refused.

    Raises:
        InputError: what `read_ground_truth` raises.
    """
    return read_ground_truth(config.data.val.annotations)


def check_num_classes(config: Config, categories: Categories) -> Categories:
    """The categories; refuses a `model.num_classes` that contradicts them."""
    if config.model.num_classes not in (None, len(categories)):
        raise InputError(
            f"model.num_classes is {config.model.num_classes}, but the data set has {len(categories)} classes "
            f"({', '.join(map(printable, categories.names[:10]))}). Remove model.num_classes: the number comes from "
            "the data set"
        )
    return categories


def check_norms(config: Config) -> None:
    """Refuse to train layers that start at random under frozen batch norm, which would never normalise them.

    With `model.weights`, which layers those are shows when it is loaded. A batch norm that is trained must have an eps.
    """
    backbone = config.model.backbone
    if backbone.norm_eps == 0 and backbone.norm in ("bn", "sync_bn") and backbone.frozen_stages < 5:
        raise InputError(
            f"model.backbone.norm_eps is 0, under which norm {backbone.norm} cannot be trained: remove the key, or set "
            "model.backbone.norm to frozen_bn"
        )
    if config.model.weights is not None:
        return
    neck, head = config.model.neck, config.model.roi_head.box_head
    frozen = {
        "model.neck.norm": isinstance(neck, FpnConfig | PafpnConfig) and neck.norm == "frozen_bn",
        "model.roi_head.box_head.norm": isinstance(head, ConvFcConfig) and head.norm == "frozen_bn",
    }
    for key, is_frozen in frozen.items():
        if is_frozen:
            raise InputError(
                f"{key} is frozen_bn, whose identity statistics would never normalise layers that start at random: set "
                "it to bn, sync_bn, gn or none (frozen_bn there is for imported detectors)"
            )


def check_proposals(config: Config, split: Split) -> None:
    """Refuse fast_rcnn without a file of proposals, and the other kinds, which propose themselves, with one."""
    given, needed = getattr(config.data, split).proposals, config.model.kind == "fast_rcnn"
    if needed and given is None:
        raise InputError(
            f"data.{split}.proposals is not set, but model.kind fast_rcnn has no RPN. Make the file from a trained rpn "
            "or faster_rcnn, and set the key to it: python tools/proposals.py --config RPN.yaml --checkpoint RPN.pth "
            f"--split {split} --output {split}_proposals.npz"
        )
    if given is not None and not needed:
        raise InputError(
            f"data.{split}.proposals is {given}, but model.kind {config.model.kind} makes its own proposals; remove "
            "the key, or set model.kind to fast_rcnn"
        )


def image_reader(data: CocoAnnotations) -> Callable[[int], Tensor]:
    """Reads images of a split by their ids: (3, H, W) uint8 RGB.

    The function raises `InputError` for an image that cannot be read, or that was left out of the split.
    """
    places = {image_id: index for index, image_id in enumerate(data.image_ids.tolist())}

    def read(image_id: int) -> Tensor:
        if image_id not in places:
            raise InputError(f"{data.source}: image {image_id} was left out; tools/check_data.py says why")
        return load_annotated(data, places[image_id])

    return read


def load_proposals(path: Path | None) -> FixedProposals | None:
    """The fixed proposals of a split, if it has some."""
    return read_proposals(path) if path is not None else None


def build_train_loader(
    config: Config,
    data: CocoAnnotations,
    *,
    start_step: int = 0,
    process: Process | None = None,
    transform: TestTransform | None = None,
) -> DataLoader[Sample]:
    """The endless stream of training batches of this process, from `start_step` on.

    What happens to the images is `transform`, by default the augmentation that the config describes.
    With `data.on_error: drop`, images that cannot be read are replaced and named in `Batch.unreadable`.
    """
    process = process or Process()
    augment = TrainTransform(
        short_sides=config.data.short_sides,
        long_side=config.data.long_side,
        horizontal_flip=config.data.horizontal_flip,
        vertical_flip=config.data.vertical_flip,
        resize=config.data.resize,
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
        DetectionDataset(
            data,
            transform or augment,
            load_proposals(config.data.train.proposals),
            on_unreadable="replace" if config.data.on_error == "drop" else "fail",
        ),
        sampler,
        num_workers=config.data.num_workers,
        pin_memory=process.device.type == "cuda",
    )


def build_val_loader(
    config: Config, data: CocoAnnotations, *, process: Process | None = None, transform: TestTransform | None = None
) -> DataLoader[Sample]:
    """Batches of this process' share of the validation images, each image once over all processes.

    What happens to the images is `transform`, by default `build_test_transform`. Images that cannot be read are blank
    and named in `Batch.unreadable`.
    """
    process = process or Process()
    sampler = TestSampler(
        data.sizes, batch_size=config.eval.batch_size, rank=process.rank, world_size=process.world_size
    )
    return make_loader(
        DetectionDataset(
            data,
            transform or build_test_transform(config),
            load_proposals(config.data.val.proposals),
            on_unreadable="blank",
        ),
        sampler,
        num_workers=config.data.num_workers,
        pin_memory=process.device.type == "cuda",
    )


def build_val_views(config: Config, data: CocoAnnotations, *, process: Process | None = None) -> Iterator[View]:
    """This process' share of the validation images in each view of `build_test_transforms`, one after the other."""
    for transform in build_test_transforms(config):  # lazily: each loader has workers of its own
        batches = build_val_loader(config, data, process=process, transform=transform)
        yield View(batches=batches, flipped=transform.horizontal_flip)


def build_test_transform(config: Config) -> TestTransform:
    """What happens to an image before detection."""
    return TestTransform(
        short_side=config.data.test_short_side, long_side=config.data.long_side, resize=config.data.resize
    )


def build_test_transforms(config: Config) -> list[TestTransform]:
    """The views of an image whose detections are merged: those of `eval.tta`, or `build_test_transform` alone."""
    tta = config.eval.tta
    if tta is None:
        return [build_test_transform(config)]
    return [
        TestTransform(short_side=side, long_side=tta.long_side, resize=config.data.resize, horizontal_flip=flip)
        for side in tta.short_sides
        for flip in ((False, True) if tta.horizontal_flip else (False,))
    ]


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


def max_skipped(config: Config, steps: int) -> int:
    """Steps that may be skipped among 1,000: as configured, but at most a tenth of the run."""
    return min(config.train.max_skipped, steps // 10)


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
        fused=config.runtime.fused_optimizer,
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


def build_model(config: Config, num_classes: int, *, pretrained: bool) -> DetectionModel:
    """The detector.

    Args:
        config: what to build.
        num_classes: K, from the data set or a checkpoint.
        pretrained: whether to load `model.backbone.weights`; a checkpoint that is loaded next, such as
            `model.weights`, makes that needless.

    Raises:
        InputError: the backbone weights cannot be had or do not fit.
    """
    model = config.model
    weights = None
    if pretrained and model.weights is None and model.backbone.weights is not None:
        weights = read_classifier(model.backbone.name, model.backbone.weights)
    backbone = build_backbone(config)
    neck = build_neck(config, backbone)
    if weights is not None:
        load_pretrained(backbone, weights, config)
    parts: dict[str, Any] = {
        "backbone": backbone,
        "neck": neck,
        "pixel_mean": model.pixel_mean,
        "pixel_std": model.pixel_std,
    }
    match model.kind:
        case "faster_rcnn":
            rpn = build_rpn(config, neck)
            return FasterRCNN(**parts, rpn=rpn, roi_head=build_roi_head(config, neck, num_classes, weights))
        case "rpn":
            return ProposalNetwork(**parts, rpn=build_rpn(config, neck))
        case "fast_rcnn":
            return FastRCNN(**parts, roi_head=build_roi_head(config, neck, num_classes, weights))
        case _:
            assert_never(model.kind)


def place(config: Config, model: DetectionModel, device: torch.device) -> DetectionModel:
    """Move a detector to where and how it computes (`runtime`); its parameters stay the same objects."""
    model.memory_format = torch.channels_last if config.runtime.channels_last else torch.contiguous_format
    model.to(device, memory_format=model.memory_format)  # type: ignore[call-overload]
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.runtime.tf32
    if config.runtime.compile:
        parts = [model.backbone, model.neck, *([] if isinstance(model, FastRCNN) else [model.rpn.head])]
        for part in parts:
            part.compile(dynamic=True)  # one graph for all sizes of images
    return model


def config_for(state: State, path: Path, *, given: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config to use a checkpoint with: that of a file if one is given, else its own.

    Args:
        state: the checkpoint.
        path: where it comes from, for messages.
        given: a YAML file.
        overrides: as in `load_config`.

    Raises:
        InputError: what `load_config` raises.
    """
    if given is not None:
        return load_config(given, overrides)
    return parse_config(state["config"], source=f"the config in {path}", overrides=overrides)


def detected_categories(config: Config, state: State) -> Categories:
    """The classes of what the model of a checkpoint detects: its own, or for proposals, which are of none, "object"."""
    if config.model.kind == "rpn":
        return Categories(ids=(1,), names=("object",))
    return checkpoint_categories(state)


def load_detector(config: Config, path: Path, device: torch.device) -> tuple[DetectionModel, State]:
    """A trained detector on `device`, only to detect with, and the checkpoint that it comes from.

    Raises:
        InputError: the checkpoint cannot be read, or is of other classes or another architecture than the config.
    """
    state = load_checkpoint(path)
    return build_detector(config, state, path, device), state


def build_detector(config: Config, state: State, path: Path, device: torch.device) -> DetectionModel:
    """The detector of a checkpoint that was read from `path`; `load_detector` reads it, too."""
    num_classes = len(check_num_classes(config, checkpoint_categories(state)))
    model = build_model(config, num_classes, pretrained=False)
    load_weights(model, best_weights(state), path)
    fold_frozen_norms(model)
    if config.train.precision != "fp32":  # autocast would do it for every batch
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(DTYPES[config.train.precision])
    return place(config, model.eval(), device)


def build_backbone(config: Config) -> ResNet:
    """The body, without weights."""
    backbone, neck = config.model.backbone, config.model.neck
    match backbone.kind:
        case "resnet":
            return ResNet(
                name=backbone.name,
                norm=backbone.norm,
                norm_eps=backbone.norm_eps,
                frozen_stages=backbone.frozen_stages,
                stride_in_1x1=backbone.stride_in_1x1,
                last_stage=neck.stage if isinstance(neck, SingleLevelConfig) else 5,
            )
        case _:
            assert_never(backbone.kind)


def load_pretrained(module: ResNet | Res5Head, weights: dict[str, Tensor], config: Config) -> None:
    """Load `module` from the weights of a classifier."""
    try:
        module.load_classifier(weights)
    except ValueError as error:
        raise InputError(f"model.backbone.weights {config.model.backbone.weights}: {error}") from error


def build_neck(config: Config, backbone: ResNet) -> FPN | PAFPN | SingleLevel:
    """What stands between `backbone` and the heads."""
    neck = config.model.neck
    match neck:
        case FpnConfig():
            return FPN(
                in_channels=backbone.channels,
                channels=neck.channels,
                strides=backbone.strides,
                top_down=neck.top_down,
                lateral=neck.lateral,
                upsample=neck.upsample,
                smooth_top=neck.smooth_top,
                norm=neck.norm,
                finest_only=neck.finest_only,
            )
        case PafpnConfig():
            return PAFPN(
                in_channels=backbone.channels,
                channels=neck.channels,
                strides=backbone.strides,
                upsample=neck.upsample,
                smooth_top=neck.smooth_top,
                norm=neck.norm,
            )
        case SingleLevelConfig():
            return SingleLevel(in_channels=backbone.channels, strides=backbone.strides)
        case _:
            assert_never(neck)


def build_rpn(config: Config, neck: FPN | PAFPN | SingleLevel) -> RPN:
    """The region proposal network on top of `neck`."""
    model = config.model
    anchors = Anchors(
        sizes=model.anchors.level_sizes,
        ratios=model.anchors.ratios,
        strides=neck.strides,
        rounded=model.anchors.rounded,
        inferred_strides=model.anchors.inferred_strides,
    )
    heads = [
        RPNHead(
            in_channels=neck.channels,
            channels=model.rpn.channels,
            num_convs=model.rpn.num_convs,
            num_anchors=anchors.num_per_location,
        )
        for _ in range(1 if model.rpn.shared_head else len(neck.strides))
    ]
    return RPN(
        head=heads[0] if model.rpn.shared_head else UnsharedRPNHead(heads),
        anchors=anchors,
        delta_clamp=model.delta_clamp,
        **model.rpn.model_dump(exclude={"channels", "num_convs", "shared_head"}),
    )


def build_roi_head(
    config: Config, neck: FPN | PAFPN | SingleLevel, num_classes: int, weights: dict[str, Tensor] | None
) -> RoIHead | CascadeRoIHead:
    """The second stage on top of `neck`; `weights` of a classifier serve a head that is the body's last stage."""
    head = config.model.roi_head
    shared = {"num_classes": num_classes, "delta_clamp": config.model.delta_clamp} | head.model_dump(
        include={
            "background_rows",
            "num_samples",
            "positive_fraction",
            "class_agnostic",
            "box_loss",
            "smooth_l1_beta",
            "box_loss_weight",
            "score_thresh",
            "nms_thresh",
            "detections_per_image",
            "min_size",
        }
    )
    match head:
        case RoiHeadConfig():
            return RoIHead(
                pooler=build_pooler(head, neck),
                box_head=build_box_head(config, neck, weights),
                positive_iou=head.positive_iou,
                box_weights=head.box_weights,
                **shared,
            )
        case CascadeConfig():
            stages = [
                RoIHead(
                    pooler=build_pooler(head, neck),
                    box_head=build_box_head(config, neck, weights),
                    positive_iou=stage.positive_iou,
                    box_weights=stage.box_weights,
                    **shared,
                )
                for stage in head.stages
            ]
            return CascadeRoIHead(stages=stages, loss_weights=[stage.loss_weight for stage in head.stages])
        case _:
            assert_never(head)


def build_pooler(head: AnyRoiHeadConfig, neck: FPN | PAFPN | SingleLevel) -> MultiLevelRoIAlign:
    """RoIAlign over the levels of `neck` that RoIs are pooled from."""
    return MultiLevelRoIAlign(
        strides=neck.roi_strides,
        output_size=head.pool_size,
        sampling_ratio=head.sampling_ratio,
        aligned=head.aligned,
        canonical_level=head.canonical_level,
        canonical_size=head.canonical_size,
        level_eps=head.level_eps,
        level_bias=head.level_bias,
    )


def build_box_head(
    config: Config, neck: FPN | PAFPN | SingleLevel, weights: dict[str, Tensor] | None
) -> ConvFCHead | Res5Head:
    """The layers between pooling and prediction."""
    head, backbone = config.model.roi_head, config.model.backbone
    match head.box_head:
        case ConvFcConfig() as layers:
            return ConvFCHead(
                in_channels=neck.channels,
                pool_size=head.pool_size,
                num_convs=layers.num_convs,
                conv_channels=layers.conv_channels,
                num_fcs=layers.num_fcs,
                fc_dim=layers.fc_dim,
                norm=layers.norm,
            )
        case Res5Config():
            res5 = Res5Head(
                name=backbone.name,
                norm=backbone.norm,
                norm_eps=backbone.norm_eps,
                stride_in_1x1=backbone.stride_in_1x1,
            )
            if weights is not None:
                load_pretrained(res5, weights, config)
            return res5
        case _:
            assert_never(head.box_head)


def evaluate_model(
    config: Config,
    model: DetectionModel,
    views: Iterable[View],
    truth: GroundTruth,
    categories: Categories,
    *,
    process: Process,
) -> tuple[Metrics, ScoredBoxes] | None:
    """Metrics and detections of `model` on the validation images (collective); see `engine.evaluate.evaluate`."""
    return evaluate(
        model,
        views,
        truth=truth,
        categories=categories,
        backend=config.eval.backend,
        nms_thresh=config.model.roi_head.nms_thresh,
        max_detections=config.model.roi_head.detections_per_image,
        precision=config.train.precision,
        process=process,
    )


def evaluate_model_proposals(
    config: Config, model: DetectionModel, batches: DataLoader[Sample], truth: GroundTruth, *, process: Process
) -> ProposalMetrics | None:
    """Recall of the proposals of `model` on the validation images (collective)."""
    return evaluate_proposals(
        model,
        batches,
        truth=truth,
        backend=config.eval.backend,
        precision=config.train.precision,
        process=process,
    )
