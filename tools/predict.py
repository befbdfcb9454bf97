"""Detect in images: annotated copies and a file of results.

    python tools/predict.py --config C --checkpoint K --input IMAGE|FOLDER --output D
        [--score-thresh 0.5] [key=value ...]

Writes D/NAME.png per image, with the boxes that score at least the threshold, and D/predictions.json: all detections
in COCO's results format with the category ids of the training data, plus `file_name`; `image_id` counts the images
from 1 in the order of their names.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fpn_det import build
from fpn_det.cli import config_parser, user_errors
from fpn_det.config import Config, load_config
from fpn_det.data.loader import collate
from fpn_det.data.transforms import TestTransform, find_images, load_image
from fpn_det.draw import draw_detections
from fpn_det.engine import checkpoint
from fpn_det.engine.evaluate import detect, to_coco_results
from fpn_det.structures import Batch, InputError, Sample


def main() -> None:
    """Read the command line and predict."""
    parser = config_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights to use")
    parser.add_argument("--input", type=Path, required=True, help="an image, or a folder of images")
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures and predictions.json")
    parser.add_argument("--score-thresh", type=score, default=0.5, help="draw boxes that score at least this")
    args = parser.parse_intermixed_args()
    with user_errors():
        config = load_config(args.config, args.overrides)
        num_unreadable = predict(config, args.checkpoint, args.input, args.output, score_thresh=args.score_thresh)
    sys.exit(1 if num_unreadable else 0)


def predict(config: Config, checkpoint_path: Path, source: Path, folder: Path, *, score_thresh: float) -> int:
    """Detect in every image of `source`; returns how many could not be read."""
    paths = find_images(source)
    state = checkpoint.load_checkpoint(checkpoint_path)
    categories = checkpoint.checkpoint_categories(state)
    build.check_num_classes(config, categories)
    model = build.build_model(config, len(categories), pretrained=False)
    checkpoint.load_weights(model, checkpoint.best_weights(state), checkpoint_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = ImageBatches(paths, build.build_test_transform(config))

    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for batch, found in detect(model.to(device), batches, device=device, precision=config.train.precision):
        image_id = int(batch.image_ids[0])
        path = paths[image_id - 1]
        picture = draw_detections(batches.original, found[0], categories.names, score_thresh=score_thresh)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{path.name}.png")
        records += [{**r, "file_name": path.name} for r in to_coco_results(image_id, found[0], categories)]
    (folder / "predictions.json").write_text(json.dumps(records))
    drawn = sum(r["score"] >= score_thresh for r in records)
    print(
        f"{len(paths) - len(batches.unreadable)} images, {len(records)} detections, {drawn} of them drawn "
        f"(score >= {score_thresh:g}): {folder}/*.png, {folder}/predictions.json"
    )
    for error in batches.unreadable:
        print(f"skipped: {error}", file=sys.stderr)
    return len(batches.unreadable)


class ImageBatches:
    """Image files as batches of one: detections then do not depend on what else lies in the folder.

    Args:
        paths: image files; `image_id` counts them from 1.
        transform: applied to each image.

    Attributes:
        original: (3, H, W) uint8, the image of the current batch before the transform.
        unreadable: what could not be decoded, and why.
    """

    def __init__(self, paths: list[Path], transform: TestTransform) -> None:
        self.paths = paths
        self.transform = transform
        self.original: Tensor
        self.unreadable: list[str] = []

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Batch]:
        for image_id, path in enumerate(self.paths, start=1):
            try:
                self.original = load_image(path)
            except InputError as error:
                if len(self.paths) == 1:
                    raise
                self.unreadable.append(str(error))
                continue
            h, w = self.original.shape[1:]
            sample = Sample(
                image=self.original,
                boxes=torch.zeros(0, 4),
                labels=torch.zeros(0, dtype=torch.int64),
                image_id=image_id,
                original_size=(h, w),
            )
            yield collate([self.transform(sample, random.Random(0))])


def score(text: str) -> float:
    """A number 0..1 from the command line."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value


if __name__ == "__main__":
    main()
