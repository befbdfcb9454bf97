"""Detect in images: annotated copies and a file of results.

    python tools/predict.py --config C --checkpoint K --input IMAGE|FOLDER --output D
        [--score-thresh 0.5] [key=value ...]

Writes D/NAME.png per image, with the boxes that score at least the threshold, and D/predictions.json: all detections
in COCO's results format with the category ids of the training data, plus `file_name`; `image_id` counts the images
from 1 in the order of their names. `model.kind` rpn gives its proposals, all of category 1, "object". With
`eval.tta={}` the detections in several sizes of each image and its mirror image are merged.

In a folder, an image that cannot be read is passed over: standard error says why, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fpn_det import build
from fpn_det.cli import config_parser, say, user_errors
from fpn_det.config import Config, load_config
from fpn_det.data.loader import collate
from fpn_det.data.transforms import TestTransform, find_images, load_image
from fpn_det.draw import draw_detections
from fpn_det.engine import checkpoint
from fpn_det.engine.evaluate import DetectionModel, detect, merge_views, to_coco_results
from fpn_det.engine.precision import Precision
from fpn_det.files import write_errors, write_text
from fpn_det.structures import Categories, Detections, InputError, Sample, printable


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
    if config.model.kind == "fast_rcnn":
        raise InputError("model.kind fast_rcnn needs proposals of each image; predict with faster_rcnn or rpn")
    paths = find_images(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, state = build.load_detector(config, checkpoint_path, device)
    categories = checkpoint.checkpoint_categories(state)
    if config.model.kind == "rpn":
        categories = Categories(ids=(1,), names=("object",))  # proposals are of no class
    transforms, head = build.build_test_transforms(config), config.model.roi_head

    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    records, unreadable = [], []
    for image_id, path in enumerate(
        tqdm(paths, desc="detecting", unit="image", disable=None, file=sys.stderr), start=1
    ):
        try:
            image = load_image(path)
        except InputError as error:
            if len(paths) == 1:
                raise
            unreadable.append(str(error))
            continue
        views = [look(model, image, t, device=device, precision=config.train.precision) for t in transforms]
        found = merge_views(views, nms_thresh=head.nms_thresh, top_k=head.detections_per_image)
        picture = draw_detections(image, found, categories.names, score_thresh=score_thresh)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{path.name}.png")
        results = to_coco_results([image_id], [found], categories)
        records += [{**r, "file_name": path.name} for r in results.records()]
    write_text(folder / "predictions.json", json.dumps(records))
    drawn = sum(r["score"] >= score_thresh for r in records)
    say(
        f"{len(paths) - len(unreadable)} images, {len(records)} detections, {drawn} of them drawn "
        f"(score >= {score_thresh:g}): {folder}/*.png, {folder}/predictions.json"
    )
    for reason in unreadable:
        say(f"skipped: {printable(reason)}", file=sys.stderr)
    return len(unreadable)


def look(
    model: DetectionModel, image: Tensor, transform: TestTransform, *, device: torch.device, precision: Precision
) -> Detections:
    """Detections in one view of an image, in the frame of the image.

    In a batch of one, so that they do not depend on what else lies in the folder.
    """
    h, w = image.shape[1:]
    sample = Sample(
        image=image,
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        image_id=0,
        original_size=(h, w),
    )
    batch = collate([transform(sample, random.Random(0))])
    flipped = transform.horizontal_flip
    outputs = detect(model, [batch], device=device, precision=precision, flipped=flipped, show_progress=False)
    [(_, [found])] = outputs
    return found


def score(text: str) -> float:
    """A number 0..1 from the command line."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value


if __name__ == "__main__":
    main()
