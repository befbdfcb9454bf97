"""From a converted file to its config, model and detections, as the tools go."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fpn_det.build import build_model, build_test_transform
from fpn_det.config import Config, dump_yaml, parse_config
from fpn_det.data.loader import collate
from fpn_det.data.transforms import load_image
from fpn_det.engine.evaluate import detect
from fpn_det.structures import Detections, Sample
from fpn_det.weights.rename import Converted


def blank(names_and_shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.zeros(()).expand(shape) for name, shape in names_and_shapes.items()}


def parse(converted: Converted) -> Config:
    return parse_config(dump_yaml(converted.config), source="imported.yaml", name="imported")


def draw(path: Path, width: int, height: int) -> None:
    coarse = np.random.default_rng(width).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)


def predict(model: torch.nn.Module, config: Config, path: Path) -> Detections:
    sample = Sample.to_detect_in(load_image(path))
    batch = collate([build_test_transform(config)(sample, random.Random(0))])
    [(_, [found])] = detect(model, [batch], device=torch.device("cpu"), precision="fp32", show_progress=False)
    return found


def assert_same_detections(ours: Detections, theirs: tuple[Tensor, Tensor, Tensor]) -> None:
    boxes, scores, labels = theirs
    assert len(ours) == len(scores)
    same = (ours.labels[:, None] == labels) & ((ours.scores[:, None] - scores).abs() <= 1e-4)
    same &= (ours.boxes[:, None] - boxes).abs().amax(dim=-1) <= 0.05
    assert same.any(dim=1).all()
    assert same.any(dim=0).all()


def assert_builds(converted: Converted, num_classes: int = 80) -> Config:
    """The config builds a model whose tensors are exactly those."""
    config = parse(converted)
    with torch.device("meta"):
        own = build_model(config, num_classes, pretrained=False).state_dict()
    assert {k: tuple(v.shape) for k, v in own.items()} == {k: tuple(v.shape) for k, v in converted.state_dict.items()}
    return config
