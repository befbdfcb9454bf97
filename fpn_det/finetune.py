"""Training that starts from a whole detector (`model.weights`): its weights, and whether they mean here what they did.

What of the weights is taken says `fpn_det.weights.transfer`. Besides, keys of the config decide what weights mean:
those that the detector was trained under are in its checkpoint, and are compared with those of the run.
"""

from __future__ import annotations

from typing import Any

from torchvision.ops import FrozenBatchNorm2d

from fpn_det.config import Config, dump_yaml, parse_config
from fpn_det.engine.checkpoint import best_weights, checkpoint_categories, load_checkpoint
from fpn_det.models.faster_rcnn import DetectionModel
from fpn_det.structures import Categories, InputError
from fpn_det.weights.transfer import Transfer, transfer

BODY_KEYS = (
    "model.pixel_mean",
    "model.pixel_std",
    "model.backbone.name",
    "model.backbone.norm",
    "model.backbone.norm_eps",
    "model.backbone.stride_in_1x1",
)
"""What the weights of the body mean. There is nothing to gain from other values, so they are refused."""

PART_KEYS = {
    "neck": ("model.neck.kind", "model.neck.upsample", "model.neck.norm", "model.neck.top_down", "model.neck.lateral"),
    "rpn": (
        "model.anchors.sizes",
        "model.anchors.ratios",
        "model.anchors.rounded",
        "model.anchors.inferred_strides",
        "model.delta_clamp",
    ),
    "roi_head": (
        "model.roi_head.pool_size",
        "model.roi_head.sampling_ratio",
        "model.roi_head.aligned",
        "model.roi_head.canonical_level",
        "model.roi_head.canonical_size",
        "model.roi_head.box_weights",
        "model.roi_head.stages",
        "model.delta_clamp",
    ),
    "backbone": ("data.resize",),
}
"""What the weights of each part mean. Training makes up for other values, so they are only said."""

SAME_NORM = {"frozen_bn": "bn", "sync_bn": "bn"}
"""Kinds of norm with the same tensors that mean the same."""


def load_start_weights(config: Config, model: DetectionModel, categories: Categories) -> str:
    """Load `model.weights` into a detector that was just built.

    Args:
        config: of the run, with `model.weights` set.
        model: as initialised; changed in place.
        categories: of the data set.

    Returns:
        What was taken and what was not, and which keys differ, for the log.

    Raises:
        InputError: no such checkpoint; its body, or how that takes its images, is another than the config's; or layers
            that it lacks are under frozen norms here.
    """
    path = config.model.weights
    assert path is not None
    try:
        state = load_checkpoint(path)
    except InputError as error:
        raise InputError(
            f"model.weights: {error}. A detector of another framework becomes a checkpoint by tools/import_weights.py; "
            "ImageNet weights belong to model.backbone.weights"
        ) from error
    then = parse_config(state["config"], source=f"model.weights: the config in {path}")
    if differing := differences(then, config, BODY_KEYS):
        raise InputError(
            f"model.weights: the body in {path} was trained under other values of {', '.join(differing)}; set them as "
            f"they were there:\n{as_yaml(then, differing)}"
        )
    result = transfer(
        best_weights(state),
        model.state_dict(),
        source_categories=checkpoint_categories(state),
        categories=categories,
    )
    refuse_untrainable(result, model, config)
    model.load_state_dict(result.state_dict)
    parts = {row.part.partition(".")[0] for row in result.rows if row.num_taken}
    keys = [key for part, keys in PART_KEYS.items() if part in parts for key in keys]
    lines = [f"starting from {path}, trained on {len(state['categories'])} classes:", result.table()]
    if differing := differences(then, config, dict.fromkeys(keys)):
        lines.append(
            f"not as when those weights were trained, which training has to make up for: {', '.join(differing)}. As "
            f"they were:\n{as_yaml(then, differing)}"
        )
    return "\n".join(lines).rstrip()


def refuse_untrainable(result: Transfer, model: DetectionModel, config: Config) -> None:
    """Refuse a body that was not taken whole, and frozen norms that hold nothing of the source."""
    body = [layer for layer in result.initialised if layer.startswith("backbone.")]
    if body:
        raise InputError(
            f"model.weights: the body in {config.model.weights} has no {', '.join(body[:3])} that would fit; take "
            "model.backbone and model.neck from the config.yaml that lies beside it"
        )
    frozen = {name for name, module in model.named_modules() if isinstance(module, FrozenBatchNorm2d)}
    random = sorted(frozen.intersection(result.initialised))
    if random:
        raise InputError(
            f"model.weights: {config.model.weights} has nothing for {', '.join(random[:3])}, and frozen norms would "
            "never normalise layers that start at random: set their norm to bn, sync_bn, gn or none"
        )


def differences(then: Config, now: Config, keys: Any) -> list[str]:
    """Those of `keys` that both configs have, with values that differ in meaning."""
    return [key for key in keys if None not in (a := (_meaning(then, key), _meaning(now, key))) and a[0] != a[1]]


def as_yaml(config: Config, keys: list[str]) -> str:
    """The keys with their values in `config`, as lines for a YAML file."""
    nested: dict[str, Any] = {}
    values = config.model_dump(mode="json")
    for key in keys:
        *sections, last = key.split(".")
        source, target = values, nested
        for section in sections:
            source, target = source[section], target.setdefault(section, {})
        target[last] = source[last]
    return dump_yaml(nested)


def _meaning(config: Config, key: str) -> Any:
    """The value of a key as far as it decides what weights mean; None if the config has no such key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    if key == "model.backbone.norm_eps" and config.model.backbone.norm != "frozen_bn":
        return None  # a norm that is trained makes up for it
    if key.endswith(".norm"):
        return SAME_NORM.get(value, value) or "none"
    if key.endswith(".stages") and value is not None:
        return [stage.box_weights for stage in value]  # the other keys of a stage are about training
    return value
