"""A small detector for tests, without training, and one that finds coloured rectangles exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fpn_det import build
from fpn_det.config import dump_config, load_config
from fpn_det.engine.checkpoint import save_checkpoint
from fpn_det.structures import Batch, Categories, Detections

CATEGORIES = Categories(ids=(3, 7, 8, 21, 90), names=("circle", "square", "triangle", "cross", "ring"))
"""Those of the generated data set."""

Color = tuple[int, int, int]


def save_untrained(path: Path, config: Sequence[str], *overrides: str) -> Path:
    """Write a checkpoint of random weights whose scores and boxes vary, for the arguments of a tool in `config`."""
    torch.manual_seed(0)
    settings = load_config(Path(config[1]), [*config[2:], *overrides])
    model = build.build_model(settings, len(CATEGORIES), pretrained=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("roi_head.class_logits.weight", "roi_head.box_deltas.weight", "rpn.head.objectness")):
                parameter.mul_(30)
    save_checkpoint(
        path,
        {
            "model": model.state_dict(),
            "categories": CATEGORIES.state_dict(),
            "config": dump_config(settings),
            "step": 0,
            "versions": {},
        },
    )
    return path


MIN_SIDE_PX = 8
"""`ColorModel` finds nothing smaller, as real detectors do not."""


class ColorModel:
    """Finds each of some colours as one box around its pixels, in batches of images that are uint8.

    The smaller a box, the better its score: parts of objects beat the whole, which is the hard case.

    Args:
        labels: the class of each colour.
    """

    training = False

    def __init__(self, labels: dict[Color, int]) -> None:
        self.labels = labels

    def train(self, mode: bool = True) -> ColorModel:
        return self

    def predict(self, batch: Batch) -> list[Detections]:
        return [self._of_image(image) for image in batch.images]

    def _of_image(self, image: torch.Tensor) -> Detections:
        code = (image.int() * torch.tensor([1 << 16, 1 << 8, 1])[:, None, None]).sum(0)
        boxes, labels = [], []
        for (red, green, blue), label in self.labels.items():
            ys, xs = (code == (red << 16 | green << 8 | blue)).nonzero().unbind(1)
            if len(xs) == 0:
                continue
            box = [xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1]
            if min(box[2] - box[0], box[3] - box[1]) >= MIN_SIDE_PX:
                boxes.append(box)
                labels.append(label)
        found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        scores = 1 / (1 + (found[:, 2:] - found[:, :2]).prod(1).sqrt() / 1000)
        order = scores.argsort(descending=True)
        return Detections(
            boxes=found[order], scores=scores[order], labels=torch.tensor(labels, dtype=torch.int64)[order]
        )
