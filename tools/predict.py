"""Detect in images: annotated copies and a file of results.

    python tools/predict.py --config C --checkpoint K --input IMAGE|FOLDER --output D [--score-thresh 0.5] [key=value ...]

Writes D/NAME.png per image, with the boxes that score at least the threshold, and D/predictions.json: all detections
in COCO's results format with the category ids of the training data, plus `file_name`; `image_id` counts the images
from 1 in the order of their names.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torchvision.io import write_png

from fpn_det import build
from fpn_det.cli import config_parser, user_errors
from fpn_det.config import Config, load_config
from fpn_det.data.transforms import find_images, load_image
from fpn_det.draw import draw_detections
from fpn_det.engine import checkpoint
from fpn_det.engine.evaluate import detect, to_coco_results
from fpn_det.structures import InputError


def main() -> None:
    """Read the command line and predict."""
    parser = config_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights to use")
    parser.add_argument("--input", type=Path, required=True, help="an image, or a folder of images")
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures and predictions.json")
    parser.add_argument("--score-thresh", type=score, default=0.5, help="draw boxes that score at least this")
    args = parser.parse_args()
    with user_errors():
        config = load_config(args.config, args.overrides)
        num_unreadable = predict(config, args.checkpoint, args.input, args.output, score_thresh=args.score_thresh)
    sys.exit(1 if num_unreadable else 0)


def predict(config: Config, checkpoint_path: Path, source: Path, folder: Path, *, score_thresh: float) -> int:
    """Detect in every image of `source`; returns how many could not be read."""
    state = checkpoint.load_checkpoint(checkpoint_path)
    categories = checkpoint.checkpoint_categories(state)
    build.check_num_classes(config, categories)
    model = build.build_model(config, len(categories), pretrained=False)
    checkpoint.load_weights(model, checkpoint.best_weights(state), checkpoint_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)

    paths = find_images(source)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    loader = build.build_file_loader(config, paths)
    for batch, found in detect(model, loader, device=device, precision=config.train.precision):
        ...
    return 0


def score(text: str) -> float:
    """A number 0..1 from the command line."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value


if __name__ == "__main__":
    main()
