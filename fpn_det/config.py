"""The configuration of one run: a typed, immutable schema, read from YAML and `key.sub=value` overrides.

Every default below belongs to one recipe, the 1x schedule of Faster R-CNN with ResNet-50 and FPN on COCO
(arXiv 1612.03144 with the settings of Detectron2), so that a YAML file states only what differs from it.

To add a choice: a field here, an argument of the class that needs it, and one line in `fpn_det.build`. To add an
alternative class: a section with a `kind` of its own, a member of the union, and a `case` in `fpn_det.build`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from fpn_det.structures import InputError

DEFAULT_STEPS = 90_000
COMMAND_LINE = "command line"
_ABSENT = object()

OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "max_iter": "train.steps",
    "iterations": "train.steps",
    "ims_per_batch": "train.batch_size",
    "image_size": "data.short_sides",
    "optimizer": "optim.kind",
    "amp": "train.precision",
}
"""What other frameworks call a key, where no word in it tells."""

SAME_SECTION = 0.1  # of the likeness of keys
ALIKE = 0.75

Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
"""A probability, an IoU or a share: 0..1."""
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Intensity = Annotated[float, Field(ge=0, le=255)]


class Section(BaseModel):
    """What all parts of the configuration share: no unknown keys, no changes after validation, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _kind(default: str) -> Discriminator:
    """Tells the members of a union apart by their `kind`, which a file need not state if it is the default."""

    def kind(value: Any) -> Any:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", None)

    return Discriminator(kind)


Norm = Literal["frozen_bn", "bn", "sync_bn", "gn"]


class BackboneConfig(Section):
    """The body whose stages C2..C5 feed the neck."""

    kind: Literal["resnet"] = "resnet"
    """Family of the body."""
    name: Literal[
        "resnet18",
        "resnet26",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnext101_32x4d",
        "resnext101_32x8d",
        "resnext101_64x4d",
        "wide_resnet50_2",
        "wide_resnet101_2",
    ] = "resnet50"
    """Torchvision's name of the body; resnet26 (bottlenecks 2-2-2-2) and resnext101_32x4d have no weights there."""
    weights: Annotated[str, Field(min_length=1)] | None = "IMAGENET1K_V1"
    """Torchvision's name of pretrained weights, the path of a local .pth file, or none to start from scratch; not read
    where `model.weights` is given."""
    norm: Norm = "frozen_bn"
    """Normalisation: batch norm with frozen statistics, trained, synchronised over processes, or group norm."""
    norm_eps: NonNegative = 1e-5
    """Added to the variance; 0 for torchvision's published detectors."""
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 2
    """How many stages are not trained: 0 none, 1 the stem, 2 the stem and layer1, up to 5 all."""
    stride_in_1x1: bool = False
    """Stride in the first 1x1 convolution of a stage instead of the 3x3, as the weights of MSRA expect."""

    @model_validator(mode="after")
    def _stride_has_a_place(self) -> Self:
        if self.stride_in_1x1 and self.name in ("resnet18", "resnet34"):
            raise ValueError(f"stride_in_1x1 is true, but the blocks of {self.name} have no 1x1 convolution: remove it")
        return self


def _check_groups(norm: Norm | None, key: str, channels: int) -> None:
    if norm == "gn" and channels % 32:
        raise ValueError(f"norm gn has 32 groups, but {key} is {channels}: set {key} to a multiple of 32")


class PyramidConfig(Section):
    """What the feature pyramids P2..P6 share."""

    channels: Count = 256
    """Channels of every level."""
    upsample: Literal["nearest", "bilinear", "deconv", "pixel_shuffle"] = "nearest"
    """How a coarse level is brought to the size of the finer one."""
    smooth_top: bool = True
    """A 3x3 convolution on the coarsest level too."""
    norm: Norm | None = None
    """Normalisation after each convolution; none has a bias instead."""

    @model_validator(mode="after")
    def _channels_fit_norm(self) -> Self:
        _check_groups(self.norm, "channels", self.channels)
        return self


class FpnConfig(PyramidConfig):
    """The feature pyramid of FPN, and the rows of the paper's ablation."""

    kind: Literal["fpn"] = "fpn"
    """Family of the neck."""
    top_down: bool = True
    """Add the upsampled coarser level; off is the paper's row (d)."""
    lateral: bool = True
    """Let each level have features of its own; off is the paper's row (e)."""
    finest_only: bool = False
    """Keep nothing but P2, with the anchors of all sizes on it; on is the paper's row (f)."""

    @model_validator(mode="after")
    def _something_flows(self) -> Self:
        if not self.top_down and not (self.lateral and not self.finest_only):
            raise ValueError(
                "top_down false goes with lateral true and finest_only false only: nothing else is a pyramid"
            )
        if not self.top_down and self.upsample != "nearest":
            raise ValueError(f"upsample {self.upsample} has no effect where top_down is false: remove it")
        if self.finest_only and not self.smooth_top:
            raise ValueError("smooth_top false has no effect where finest_only is true: remove it")
        return self


class PafpnConfig(PyramidConfig):
    """A feature pyramid with a second, bottom-up path (PANet)."""

    kind: Literal["pafpn"] = "pafpn"
    """Family of the neck."""


class SingleLevelConfig(Section):
    """No pyramid: one stage of the body, as in detectors before FPN."""

    kind: Literal["single"] = "single"
    """Family of the neck."""
    stage: Literal[4, 5] = 4
    """Which stage: C4, where the body then ends, or C5."""


NeckConfig = Annotated[
    Annotated[FpnConfig, Tag("fpn")]
    | Annotated[PafpnConfig, Tag("pafpn")]
    | Annotated[SingleLevelConfig, Tag("single")],
    _kind("fpn"),
]


class AnchorConfig(Section):
    """The boxes that the region proposal network starts from."""

    sizes: Annotated[
        tuple[Positive | Annotated[tuple[Positive, ...], Field(min_length=1)], ...], Field(min_length=1)
    ] = (32, 64, 128, 256, 512)
    """Square root of the anchor area in pixels: a number or a list of equal length per level, P2..P6 of a pyramid."""
    ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1, 2)
    """Height / width of the anchors at every location."""
    rounded: bool = False
    """Round the half sizes to whole pixels, as torchvision's weights expect."""
    inferred_strides: bool = False
    """Grid with torchvision's strides, padded image side / level side rounded down, as its weights expect."""

    @property
    def level_sizes(self) -> list[tuple[float, ...]]:
        """The sizes of each level as a list."""
        return [level if isinstance(level, tuple) else (level,) for level in self.sizes]

    @field_validator("sizes")
    @classmethod
    def _as_many_everywhere(cls, value: tuple[float | tuple[float, ...], ...]) -> tuple[float | tuple[float, ...], ...]:
        counts = [len(level) if isinstance(level, tuple) else 1 for level in value]
        if len(set(counts)) > 1:
            raise ValueError(f"must give every level as many sizes, received {counts}: one head serves all levels")
        return value


BoxWeights = tuple[Positive, Positive, Positive, Positive]


class BoxLossConfig(Section):
    """What the two stages share: how predicted boxes are compared with the ground truth."""

    box_loss: Literal["smooth_l1", "giou", "diou", "ciou"] = "smooth_l1"
    """Smooth L1 on the deltas, or an IoU-type loss on the boxes."""
    smooth_l1_beta: NonNegative = 0.0
    """Where smooth L1 turns from quadratic to linear; 0 is plain L1."""
    box_loss_weight: Positive = 1.0
    """Factor of the box loss; IoU-type losses are commonly weighted by 10 in the second stage."""

    @model_validator(mode="after")
    def _beta_is_used(self) -> Self:
        if self.box_loss != "smooth_l1" and self.smooth_l1_beta:
            raise ValueError(
                f"smooth_l1_beta {self.smooth_l1_beta:g} has no effect with box_loss {self.box_loss}: set it to 0"
            )
        return self


class RpnConfig(BoxLossConfig):
    """The region proposal network."""

    channels: Count | None = None
    """Channels of the head's 3x3 convolutions; none takes those of the neck."""
    num_convs: Count = 1
    """3x3 convolutions of the head."""
    shared_head: bool = True
    """One head for all levels instead of one for each."""
    positive_iou: PositiveFraction = 0.7
    """Anchors that overlap a ground-truth box at least this much are positive."""
    negative_iou: Fraction = 0.3
    """Anchors that overlap every ground-truth box less than this are negative."""
    min_match_iou: Fraction = 0.0
    """The best anchors of a ground-truth box are positive only if they overlap it, and at least this much."""
    num_samples: Count = 256
    """Anchors sampled per image for the losses."""
    positive_fraction: Fraction = 0.5
    """Largest share of positives among them."""
    pre_nms_top_k_train: Count = 2000
    """Proposals per level and image kept before NMS, while training."""
    pre_nms_top_k_test: Count = 1000
    """Proposals per level and image kept before NMS, while detecting."""
    post_nms_top_k_train: Count = 1000
    """Proposals per image kept after NMS over all levels, while training."""
    post_nms_top_k_test: Count = 1000
    """Proposals per image kept after NMS over all levels, while detecting."""
    nms_thresh: Fraction = 0.7
    """Of two proposals of a level that overlap more than this, the better one stays."""
    min_size: NonNegative = 0.0
    """Proposals must be wider and higher than this many pixels of the resized image."""

    @model_validator(mode="after")
    def _thresholds_in_order(self) -> Self:
        if self.negative_iou > self.positive_iou:
            raise ValueError(
                f"negative_iou {self.negative_iou} exceeds positive_iou {self.positive_iou}:"
                " an anchor would be both; lower negative_iou"
            )
        return self


class ConvFcConfig(Section):
    """3x3 convolutions, then fully connected layers."""

    kind: Literal["conv_fc"] = "conv_fc"
    """Family of the box head."""
    num_convs: NonNegativeInt = 0
    """3x3 convolutions before the fully connected layers."""
    conv_channels: Count = 256
    """Their channels."""
    num_fcs: Count = 2
    """Fully connected layers."""
    fc_dim: Count = 1024
    """Their width."""
    norm: Norm | None = None
    """Normalisation after each convolution; none has a bias instead."""

    @model_validator(mode="after")
    def _channels_fit_norm(self) -> Self:
        if self.num_convs == 0 and self.norm is not None:
            raise ValueError(f"norm {self.norm} has no effect where num_convs is 0: remove it")
        _check_groups(self.norm, "conv_channels", self.conv_channels)
        return self


class Res5Config(Section):
    """The last stage of the body, applied to each RoI of C4; pool_size 14 is common."""

    kind: Literal["res5"] = "res5"
    """Family of the box head."""


BoxHeadConfig = Annotated[
    Annotated[ConvFcConfig, Tag("conv_fc")] | Annotated[Res5Config, Tag("res5")], _kind("conv_fc")
]


class SharedRoiHeadConfig(BoxLossConfig):
    """What both kinds of second stage have."""

    num_samples: Count = 512
    """RoIs sampled per image for the losses."""
    positive_fraction: Fraction = 0.25
    """Largest share of positives among them."""
    pool_size: Count = 7
    """Cells per side of a pooled RoI."""
    sampling_ratio: NonNegativeInt = 0
    """RoIAlign samples per side of a cell; 0 adapts to the size of the RoI."""
    aligned: bool = True
    """Shift the coordinates of RoIAlign by half a cell, which is correct; off as in torchvision's weights."""
    canonical_level: Annotated[int, Field(ge=0, le=10)] = 4
    """Level k0 that a RoI of `canonical_size` is pooled from (clamped to P2..P5)."""
    canonical_size: Positive = 224
    """Square root of the area, in pixels, of the RoI that belongs to `canonical_level`."""
    level_eps: NonNegative = 0.0
    """Added to sqrt(w * h) / canonical_size before the logarithm (Detectron2 1e-8, MMDetection 2.5e-7)."""
    level_bias: NonNegative = 0.0
    """Added to the level before it is rounded down (torchvision 1e-6)."""
    box_head: BoxHeadConfig = ConvFcConfig()
    """Layers between pooling and prediction."""
    background_rows: Count = 1
    """Rows of the classifier that mean background; more than 1 in weights imported from torchvision only."""
    score_thresh: Fraction = 0.05
    """Detections must score more than this."""
    nms_thresh: Fraction = 0.5
    """Of two detections of a class that overlap more than this, the better one stays."""
    detections_per_image: Count = 100
    """Most detections per image; the evaluation uses the same number."""
    min_size: Annotated[float, Field(ge=-1)] | None = 0.0
    """Detections must be wider and higher than this many pixels of the resized image; -1: even those without an area
    stay (MMDetection); `none`: they go, but count among `detections_per_image` (Detectron2)."""


class RoiHeadConfig(SharedRoiHeadConfig):
    """The second stage: pooling, classification and box regression of the proposals."""

    kind: Literal["standard"] = "standard"
    """One classifier."""
    positive_iou: PositiveFraction = 0.5
    """RoIs that overlap a ground-truth box at least this much are positive, all others background."""
    class_agnostic: bool = False
    """Predict one box per RoI instead of one per class."""
    box_weights: BoxWeights = (10, 10, 5, 5)
    """Multipliers of the targets (dx, dy, dw, dh)."""


class CascadeStageConfig(Section):
    """One classifier of a cascade."""

    positive_iou: PositiveFraction
    """RoIs that overlap a ground-truth box at least this much are positive, all others background."""
    box_weights: BoxWeights
    """Multipliers of the targets (dx, dy, dw, dh)."""
    loss_weight: Positive = 1.0
    """Factor of the stage's losses."""


class CascadeConfig(SharedRoiHeadConfig):
    """Cascade R-CNN: classifiers in a row, each refining the boxes of the one before."""

    kind: Literal["cascade"] = "cascade"
    """Several classifiers."""
    class_agnostic: bool = True
    """Predict one box per RoI instead of one per class."""
    stages: Annotated[tuple[CascadeStageConfig, ...], Field(min_length=1)] = (
        CascadeStageConfig(positive_iou=0.5, box_weights=(10, 10, 5, 5), loss_weight=1.0),
        CascadeStageConfig(positive_iou=0.6, box_weights=(20, 20, 10, 10), loss_weight=0.5),
        CascadeStageConfig(positive_iou=0.7, box_weights=(30, 30, 15, 15), loss_weight=0.25),
    )
    """The classifiers, first to last."""


AnyRoiHeadConfig = Annotated[
    Annotated[RoiHeadConfig, Tag("standard")] | Annotated[CascadeConfig, Tag("cascade")], _kind("standard")
]


class ModelConfig(Section):
    """The detector."""

    kind: Literal["faster_rcnn", "rpn", "fast_rcnn"] = "faster_rcnn"
    """Both stages, the region proposal network alone, or the second stage alone on proposals from a file."""
    weights: Path | None = None
    """Checkpoint of a whole detector that training starts from, written by training or tools/import_weights.py. Rows of
    classes with the same names are kept; what does not fit is initialised, and a table in the log says which."""
    num_classes: Count | None = None
    """Classes without background; none takes the count from the data set, a number must agree with it."""
    pixel_mean: tuple[Intensity, Intensity, Intensity] = (123.675, 116.28, 103.53)
    """Subtracted from the RGB values 0..255."""
    pixel_std: tuple[Positive, Positive, Positive] = (58.395, 57.12, 57.375)
    """The RGB values are divided by this after the subtraction."""
    delta_clamp: Literal["upper", "both"] = "upper"
    """Bound the predicted log sizes from above, or on both sides, as MMDetection's weights expect."""
    backbone: BackboneConfig = BackboneConfig()
    """The body."""
    neck: NeckConfig = FpnConfig()
    """The feature pyramid."""
    anchors: AnchorConfig = AnchorConfig()
    """The anchors."""
    rpn: RpnConfig = RpnConfig()
    """The region proposal network."""
    roi_head: AnyRoiHeadConfig = RoiHeadConfig()
    """The second stage."""

    @field_validator("weights")
    @classmethod
    def _expand_home(cls, value: Path | None) -> Path | None:
        return value and value.expanduser()

    @model_validator(mode="after")
    def _scratch_can_learn(self) -> Self:
        body, reasons = self.backbone, []
        if self.weights is not None or body.weights is not None:
            return self
        if body.norm == "frozen_bn":
            reasons.append(
                "backbone.weights is none and backbone.norm is frozen_bn, whose identity statistics would never"
                " normalise: set backbone.norm to bn, sync_bn or gn, or give weights"
            )
        if body.frozen_stages > 0:
            reasons.append(
                f"backbone.weights is none and backbone.frozen_stages is {body.frozen_stages}, which would freeze"
                " random layers: set backbone.frozen_stages to 0, or give weights"
            )
        if reasons:
            raise ValueError("; ".join(reasons))
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        match self.neck:
            case SingleLevelConfig():
                num_levels = 1
            case FpnConfig(finest_only=True):
                num_levels = 1
            case _:
                num_levels = 5
        if self.kind != "fast_rcnn" and len(self.anchors.sizes) != num_levels:  # which has no anchors
            example = "[[32, 64, 128, 256, 512]]" if num_levels == 1 else "[32, 64, 128, 256, 512]"
            raise ValueError(
                f"anchors.sizes has {len(self.anchors.sizes)} entries, but the neck's levels are {num_levels}: give one"
                f" entry (a number or a list of numbers) per level, such as {example}"
            )
        on_c4 = isinstance(self.neck, SingleLevelConfig) and self.neck.stage == 4
        if self.kind != "rpn" and isinstance(self.roi_head.box_head, Res5Config) and not on_c4:
            raise ValueError("roi_head.box_head.kind res5 works on C4 only: set neck to {kind: single, stage: 4}")
        return self


class SplitConfig(Section):
    """One split of a data set in COCO format."""

    images: Path
    """Folder that the file names in the annotations are relative to."""
    annotations: Path
    """COCO JSON file."""
    proposals: Path | None = None
    """File of proposals (tools/proposals.py), for model.kind fast_rcnn."""

    @field_validator("images", "annotations", "proposals")
    @classmethod
    def _expand_home(cls, value: Path | None) -> Path | None:
        return value and value.expanduser()


class DataConfig(Section):
    """The data set and how its images reach the model."""

    train: SplitConfig = SplitConfig(
        images=Path("data/coco/train2017"), annotations=Path("data/coco/annotations/instances_train2017.json")
    )
    """What the model learns from."""
    val: SplitConfig = SplitConfig(
        images=Path("data/coco/val2017"), annotations=Path("data/coco/annotations/instances_val2017.json")
    )
    """What it is evaluated on."""
    short_sides: Annotated[tuple[Count, ...], Field(min_length=1)] = (640, 672, 704, 736, 768, 800)
    """Lengths in pixels of the shorter image side while training; each image draws one."""
    test_short_side: Count = 800
    """Length in pixels of the shorter image side while detecting."""
    long_side: Count = 1333
    """The longer image side is never longer than this many pixels."""
    resize: Literal["antialiased", "pillow", "float", "opencv"] = "antialiased"
    """How images are resized. The others are what imported weights were trained on, pixel by pixel: `pillow`
    Detectron2's, `opencv` MMDetection's, `float` torchvision's (four times the memory and transfer)."""
    horizontal_flip: Fraction = 0.5
    """Probability of mirroring left and right."""
    vertical_flip: Fraction = 0.0
    """Probability of mirroring top and bottom."""
    keep_empty: bool = False
    """Train on images without boxes too (the COCO recipes leave them out)."""
    group_by_aspect: bool = True
    """Do not mix landscape and portrait images in a batch, which saves padding."""
    num_workers: NonNegativeInt = 4
    """Loader processes per training process; 0 loads in the training process itself."""
    on_error: Literal["drop", "fail"] = "drop"
    """What to do with training images and boxes that cannot be used: leave them out and report them, or stop."""
    drop_limit: Fraction = 0.05
    """Largest share of the training images, and of their boxes, that may be left out; beyond it the run stops."""
    follow_links: bool = False
    """Use images that are links out of the image folder, or lie behind such a link; else they are left out."""

    @field_validator("train", "val", mode="before")
    @classmethod
    def _complete_split(cls, value: Any, info: ValidationInfo) -> Any:
        """Fill the key that a split does not state with the default of that split, as in every section."""
        if isinstance(value, dict) and info.field_name:
            return cls.model_fields[info.field_name].default.model_dump(mode="json") | value
        return value

    @model_validator(mode="after")
    def _sides_in_order(self) -> Self:
        longest = max(*self.short_sides, self.test_short_side)
        if longest > self.long_side:
            raise ValueError(
                f"long_side {self.long_side} is less than the largest short side {longest}: raise long_side"
            )
        return self


class OptimConfig(Section):
    """Optimiser and learning rate."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """The optimiser."""
    lr: Positive = 0.02
    """Learning rate at `base_batch_size` images per step."""
    base_batch_size: Count = 16
    """Batch size that `lr` is meant for."""
    scale_lr: bool = True
    """Multiply `lr` by train.batch_size / base_batch_size."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: NonNegative = 1e-4
    """Weight decay of everything but normalisation layers."""
    norm_weight_decay: NonNegative = 0.0
    """Weight decay of normalisation layers."""
    schedule: Literal["step", "cosine"] = "step"
    """How the learning rate falls: by `gamma` at each of `milestones`, or along half a cosine to 0."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.666667, 0.888889)
    """Where the step schedule falls, as increasing fractions of the run."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of the step schedule."""
    warmup_steps: NonNegativeInt = 1000
    """Steps over which the learning rate rises linearly from `warmup_factor` to 1 times its value; at most a tenth of
    the run."""
    warmup_factor: Annotated[float, Field(gt=0, le=1)] = 0.001
    """Where the warm-up starts."""
    clip_norm: Positive | None = None
    """Largest norm of the gradient of all parameters together; none does not clip."""

    @field_validator("milestones")
    @classmethod
    def _increasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"must increase, received {list(value)}")
        return value


class TrainConfig(Section):
    """Length and bookkeeping of the training run."""

    steps: Count | None = None
    """Length of the run in optimiser steps; exactly one of `steps` and `epochs` is set (neither: 90000 steps)."""
    epochs: Positive | None = None
    """Length of the run in passes over the training split."""
    batch_size: Count = 16
    """Images per optimiser step, over all processes."""
    accumulate: Count = 1
    """Micro-batches that a step is split into, to save memory; must divide `batch_size`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward pass; box coordinates and losses are float32 in any case. `fp16` scales the loss; it
    is for GPUs without bfloat16."""
    max_skipped: NonNegativeInt = 20
    """Steps with a loss or gradient that is not finite are skipped; more than this many among 1,000, or than a tenth
    of the run, stop it."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep a moving average of the weights with this decay per step and evaluate it; none does not."""
    log_every: Count = 20
    """Steps between two log lines."""
    save_every: Count | None = None
    """Steps between two checkpoints; none is a tenth of the run, at most 5000. The end of the run always saves."""
    keep_checkpoints: Count = 3
    """How many of the latest checkpoints stay on disk."""

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("steps") is None and data.get("epochs") is None:
            return data | {"steps": DEFAULT_STEPS}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps {self.steps} and epochs {self.epochs} exclude each other: give one")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        return self


class TtaConfig(Section):
    """Test-time augmentation: detections in several views of an image, merged by NMS; defaults of Detectron2."""

    short_sides: Annotated[tuple[Count, ...], Field(min_length=1)] = (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)
    """Lengths in pixels of the shorter image side, one view each."""
    long_side: Count = 4000
    """The longer image side is never longer than this many pixels."""
    horizontal_flip: bool = True
    """Look at the mirror image of each view too."""

    @model_validator(mode="after")
    def _sides_in_order(self) -> Self:
        if max(self.short_sides) > self.long_side:
            raise ValueError(
                f"long_side {self.long_side} is less than the largest short side {max(self.short_sides)}: raise"
                " long_side"
            )
        return self


class EvalConfig(Section):
    """Evaluation during and after training."""

    backend: Literal["hotcoco", "pycocotools"] = "hotcoco"
    """Which implementation of the COCO metrics computes the numbers: hotcoco is the faster one, pycocotools the
    reference. The numbers are the same to the last bit."""
    batch_size: Count = 8
    """Images per forward pass and process."""
    every: NonNegativeInt | None = None
    """Steps between two evaluations; none is a tenth of the run, at most 5000; 0 evaluates only at the end."""
    tensorboard_images: NonNegativeInt = 8
    """Validation images with ground truth and detections written to TensorBoard at each evaluation, and training images
    as the model sees them, of the first step."""
    tensorboard_classes: bool = False
    """Write the AP of each class to TensorBoard and log.jsonl at each evaluation, too: as many curves as classes."""
    tta: TtaConfig | None = None
    """Test-time augmentation of tools/eval.py and tools/predict.py; none looks at each image once, as training does
    in any case. A section with all defaults is `tta: {}`."""


class RuntimeConfig(Section):
    """How the work is done, not what: results differ by rounding at most. docs/performance.md has the figures."""

    channels_last: bool = True
    """Keep the channels of a pixel together in memory, as the convolutions of CPUs and of tensor cores want them."""
    compile: bool = False
    """Compile backbone, neck and RPN head with torch.compile: up to a minute before the first step, once for all image
    sizes, and once more for another mode or a batch of one. Needs a C++ compiler, on GPUs Triton."""
    fused_optimizer: bool = True
    """Update all weights in one kernel."""
    tf32: bool = True
    """Let GPUs multiply float32 matrices and convolve with 10 bits of mantissa; CPUs do not."""
    timeout_minutes: Positive = 30
    """How long a process of several may wait for the others before the job ends and says which one held it up. The main
    one computes the metrics alone."""


class Config(Section):
    """Everything that one run depends on."""

    name: str = ""
    """Name of the run, without slashes; `load_config` fills in the stem of the file."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of every random choice."""
    model: ModelConfig = ModelConfig()
    """The detector."""
    data: DataConfig = DataConfig()
    """The data set."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and learning rate."""
    train: TrainConfig = TrainConfig()
    """Length and bookkeeping of the training run."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""
    runtime: RuntimeConfig = RuntimeConfig()
    """How the work is done."""

    @model_validator(mode="after")
    def _views_have_detections(self) -> Self:
        if self.model.kind == "rpn" and self.eval.tta is not None:
            raise ValueError("eval.tta merges detections, but model.kind rpn gives proposals: set eval.tta to none")
        return self

    @field_validator("name")
    @classmethod
    def _no_slash(cls, value: str) -> str:
        if "/" in value or "\\" in value:
            raise ValueError(f"must not contain a slash, received {value!r}")
        return value


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply the overrides, and validate.

    Args:
        path: YAML file; what it does not state keeps its default.
        overrides: `key.sub=value`, the value in YAML (`model.anchors.sizes=[8,16,32,64,128]`). A mapping sets
            the keys it states and leaves the others. Later overrides win over earlier ones and over the file.

    Returns:
        The complete configuration, with exactly one of `train.steps` and `train.epochs` set.

    Raises:
        InputError: the file cannot be read, or it and the overrides do not make a valid configuration; all
            problems at once, one line each.
    """
    return parse_config(read_text(path), source=str(path), name=path.stem, overrides=overrides)


def read_text(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a text file: {error}") from error


def parse_config(text: str, *, source: str, name: str = "", overrides: Sequence[str] = ()) -> Config:
    """The same as `load_config` for YAML that is already in memory (from a checkpoint, say).

    Args:
        text: the YAML document.
        source: where it comes from, for error messages.
        name: name of the run if `text` gives none.
        overrides: as in `load_config`.

    Raises:
        InputError: as in `load_config`.
    """
    return trace_config(text, source=source, name=name, overrides=overrides)[0]


def trace_config(
    text: str, *, source: str, name: str = "", overrides: Sequence[str] = ()
) -> tuple[Config, dict[str, str]]:
    """The same as `parse_config`, and who gave the values.

    Returns:
        The configuration; dotted keys of all values that are given, in the file (`source`) or on the `COMMAND_LINE`.
        The others are defaults.

    Raises:
        InputError: as in `load_config`.
    """
    file = {"name": name} | _read_mapping(text, source)
    command_line, problems = _read_overrides(overrides)
    merged = _without_other_kinds(_merge(file, command_line), command_line, Config)

    for origin, mapping in ((source, file), (COMMAND_LINE, command_line)):
        if len(_run_lengths(mapping)) == 2:
            problems.append(f"{origin}: train: steps and epochs are both given; give one of them")
    lengths = _run_lengths(command_line) or _run_lengths(file)
    if lengths and isinstance(merged["train"], dict):  # the later source wins: the other key goes
        dropped = {"steps", "epochs"} - set(lengths[:1])
        merged["train"] = {key: value for key, value in merged["train"].items() if key not in dropped}

    try:
        # Strict JSON is what YAML means here: lists become tuples, text becomes paths, whole numbers become
        # floats, and nothing else is converted.
        config = Config.model_validate_json(json.dumps(merged, default=str), strict=True)
    except ValidationError as error:
        items = {_path(item, merged): item for item in reversed(error.errors(include_url=False))}
        for path, item in reversed(items.items()):  # of a union that failed, only the first member's complaint
            if not any(path == other[: len(path)] for other in items.keys() - {path}):  # nor what follows from others
                where = [_origin(path, source, file, command_line), _dotted(path), _explain(item, path, merged)]
                problems.append(": ".join(part for part in where if part))
    if problems:
        raise InputError("\n".join(problems))
    return config, {key: _origin(key.split("."), source, file, command_line) for key in flatten(merged)}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys; lists, also those of sections, are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def dump_config(config: Config) -> str:
    """Write the complete configuration as YAML that `load_config` reads back to an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


def dump_yaml(values: dict[str, Any]) -> str:
    """Write nested plain values as YAML that `load_config` reads back as they are."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def inline_yaml(value: Any) -> str:
    """One plain value, or a list or mapping of such, as YAML in one line."""
    match value:
        case None:
            return "none"
        case list():
            return f"[{', '.join(map(inline_yaml, value))}]"
        case dict():
            return f"{{{', '.join(f'{key}: {inline_yaml(item)}' for key, item in value.items())}}}"
        case float() if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
    lines = yaml.dump(value, Dumper=_Dumper, allow_unicode=True, width=float("inf")).removesuffix("...\n").splitlines()
    return lines[0] if len(lines) == 1 else json.dumps(value)


class _Loader(yaml.SafeLoader):
    """YAML with the plain values of version 1.2, `none` for null, and no duplicate keys.

    PyYAML's own resolvers follow version 1.1, where 1e-4 is text, 010 is 8, 1:30 is 90 and `on` is true.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's name

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(
                    problem="found a key that is not a name", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"found the key {key} a second time", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|none|None|NONE|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


class _Dumper(yaml.SafeDumper):
    """One key per line, `kind` first, plain lists in one line.

    Quotes exactly the text that `_Loader` reads as something else.
    """

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def sequence(self, values: list[Any]) -> yaml.SequenceNode:
        in_one_line = not any(isinstance(value, dict) for value in values)
        return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=in_one_line)

    def mapping(self, values: dict[str, Any]) -> yaml.MappingNode:
        return self.represent_mapping("tag:yaml.org,2002:map", sorted(values.items(), key=lambda kv: kv[0] != "kind"))


_Dumper.add_representer(list, _Dumper.sequence)
_Dumper.add_representer(dict, _Dumper.mapping)


def _load_yaml(text: str) -> Any:
    """Parse YAML; `ValueError` with line and column when it is not."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ValueError(" ".join(str(error).split())) from error


def _read_mapping(text: str, source: str) -> dict[str, Any]:
    try:
        mapping = _load_yaml(text)
    except ValueError as error:
        raise InputError(f"{source}: not valid YAML: {error}") from error
    if mapping is None:
        raise InputError(f"{source}: the file is empty; state at least one key, `name: my_run` for the defaults")
    if not isinstance(mapping, dict):
        raise InputError(f"{source}: must be a mapping of `key: value` lines, received {_shown(mapping)}")
    return mapping


def _read_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Turn `a.b=value` into nested mappings; also returns one line per override that is not of that form."""
    nested: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not key or not text:
            problems.append(f"{COMMAND_LINE}: {override!r}: must be key=value (key=null for no value)")
            continue
        try:
            value = _load_yaml(text)
        except ValueError as error:
            problems.append(f"{COMMAND_LINE}: {override!r}: the value is not valid YAML: {error}")
            continue
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = _merge(nested, value)
    return nested, problems


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `top`, section by section."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _without_other_kinds(
    merged: dict[str, Any], command_line: dict[str, Any], model: type[BaseModel]
) -> dict[str, Any]:
    """`merged` less the file's keys that a `kind` given on the command line does not have."""
    cleaned = dict(merged)
    for name, field in model.model_fields.items():
        section, given = merged.get(name), command_line.get(name)
        if not isinstance(section, dict) or not isinstance(given, dict):
            continue
        members = _sections(field.annotation)
        kind = section.get("kind", getattr(field.default, "kind", None))
        chosen = [m for m in members if len(members) == 1 or m.model_fields["kind"].default == kind]
        if len(members) > 1 and "kind" in given and chosen:
            section = {key: value for key, value in section.items() if key in chosen[0].model_fields or key in given}
        if chosen:
            section = _without_other_kinds(section, given, chosen[0])
        cleaned[name] = section
    return cleaned


def _run_lengths(mapping: dict[str, Any]) -> list[str]:
    """Which of `steps` and `epochs` the source gives."""
    train = mapping.get("train")
    return [key for key in ("steps", "epochs") if isinstance(train, dict) and train.get(key) is not None]


def _given(mapping: Any, loc: Sequence[int | str]) -> Any:
    """The value at `loc`, or the plain value or list that contains it; `_ABSENT` if the source is silent."""
    for part in loc:
        if not isinstance(mapping, dict):
            break
        mapping = mapping.get(part, _ABSENT)
    return mapping


def _origin(loc: Sequence[int | str], source: str, file: dict[str, Any], command_line: dict[str, Any]) -> str:
    """Who gave the value at `loc`; both for a section that they set together."""
    in_file, in_command_line = _given(file, loc), _given(command_line, loc)
    if in_command_line is _ABSENT:
        return source
    if isinstance(in_command_line, dict) and isinstance(in_file, dict):
        return f"{source} and {COMMAND_LINE}"
    return COMMAND_LINE


def _dotted(loc: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _path(item: ErrorDetails, merged: Any) -> tuple[int | str, ...]:
    """Where an error is in the file: pydantic also names the member of a union that it tried."""
    path: list[int | str] = []
    for i, part in enumerate(item["loc"]):
        is_new_key = i == len(item["loc"]) - 1 and item["type"] in ("extra_forbidden", "missing")
        in_mapping = isinstance(merged, dict) and (part in merged or is_new_key)
        in_list = isinstance(merged, list) and isinstance(part, int) and part < len(merged)
        if in_mapping or in_list:
            path.append(part)
            merged = merged.get(part) if isinstance(merged, dict) else merged[part]
    return tuple(path)


def _explain(item: ErrorDetails, loc: Sequence[int | str], merged: dict[str, Any]) -> str:
    """What is wrong, what was received and what is allowed, in the words of a YAML file."""
    match item["type"]:
        case "union_tag_invalid":
            return f"kind must be one of {item['ctx']['expected_tags']}, received {_shown(item['input']['kind'])}"
        case "missing" if isinstance(item["loc"][-1], int):
            allowed = "must have more items"
        case "missing":
            return "is needed"
        case "extra_forbidden":
            if _dotted(loc) in _known_keys(Config):
                section = _given(merged, loc[:-1])
                kind = section.get("kind") if isinstance(section, dict) else None
                return f"not a key of kind {kind}: remove it" if kind else "not a key of the default kind: state `kind`"
            nearest = _nearest(_dotted(loc))
            return f"unknown key; did you mean {' or '.join(nearest)}?" if nearest else "unknown key"
        case "value_error":
            return str(item["ctx"]["error"])
        case "tuple_type":
            allowed = "must be a list"
        case "model_type" | "model_attributes_type" | "union_tag_not_found":
            allowed = "must be a section with keys of its own"
        case _:
            allowed = item["msg"].replace("Input should", "must").replace("Tuple should", "must")
            allowed = allowed.replace("String should", "must").partition(" after validation")[0]
    return f"{allowed}, received {_shown(item['input'])}"


def _nearest(unknown: str) -> list[str]:
    """Full paths of the keys that an unknown one may mean: those whose last names are most alike."""
    section, _, name = re.sub(r"\[\d+\]", "", unknown).lower().rpartition(".")
    meant = [(key, *key.rpartition(".")[::2]) for key in _known_keys(Config)]
    meant += [(key, key.rpartition(".")[0], alias) for alias, key in OTHER_NAMES.items()]
    scores: dict[str, float] = {}
    for key, its_section, its_name in meant:
        score = _likeness(name, its_name) + SAME_SECTION * (section == its_section)
        scores[key] = max(score, scores.get(key, 0.0))
    best = max(scores.values())
    return [key for key, score in scores.items() if score == best][:3] if best >= ALIKE else []


def _likeness(a: str, b: str) -> float:
    """How alike two names are, 0..1: by spelling, or because all words of one are in the other, as in batch_size."""
    words, others = set(a.split("_")), set(b.split("_"))
    nested = words <= others or others <= words
    shared = 0.6 + 0.4 * len(words & others) / len(words | others) if nested else 0.0
    return max(shared, difflib.SequenceMatcher(None, a, b).ratio())


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section in _sections(field.annotation):
            keys += [key for key in _known_keys(section, f"{prefix}{name}.") if key not in keys]
    return keys


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold: one, the members of a union, or none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for member in get_args(annotation) for section in _sections(member)]


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
