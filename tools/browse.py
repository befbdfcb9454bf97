"""Look at the training data as the model sees them: augmented images, boxes, anchors, RoIs, and figures of all boxes.

    python tools/browse.py --config configs/mine.yaml [--checkpoint K] [--num-images 16] [--start-step 0]
        [--output-dir D] [key=value ...]

Writes to runs/NAME/browse (or D): index.html, one page that needs no other file and no network, and its pictures as
PNG, in the place of those of an earlier call. They show the images of the first training steps (from --start-step on)
of this very config, with the anchors that these steps train on, by level. The RoIs come from proposals: those of the
checkpoint K, or those of the file that `model.kind: fast_rcnn` has; without either there are none to show, as those of
random weights would mean nothing.

Prints the sizes of all boxes of the split at training scale, the best recall that the anchors allow, and other anchors
where they would cover the boxes better. --num-images 0 gives the figures alone.

An image that cannot be read is replaced, as in training: standard error says which and why, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fpn_det import build
from fpn_det.cli import config_parser, say, user_errors
from fpn_det.config import Config, FpnConfig, SingleLevelConfig, load_config
from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.loader import explain_unreadable
from fpn_det.data.statistics import training_boxes
from fpn_det.engine import checkpoint
from fpn_det.engine.precision import autocast
from fpn_det.files import replacing, write_errors, write_text
from fpn_det.models.faster_rcnn import DetectionModel, FastRCNN, ProposalNetwork
from fpn_det.report.browse import browse_page, format_overview
from fpn_det.report.page import Picture
from fpn_det.report.survey import Survey, advice, make_survey
from fpn_det.report.training_view import (
    anchor_views,
    draw_anchors,
    draw_rois,
    draw_targets,
    first_head,
    padded_image,
    roi_views,
)
from fpn_det.structures import Batch, Categories, printable

PAGE_PX = 1000
"""Pictures in the page are no longer than this; the files have all pixels."""

PICTURE_NAME = re.compile(r"\d{3,}_(boxes|anchors|rois)\.png")
"""What the files are called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """The pictures of one image of a batch.

    Attributes:
        caption: the step and the image, in words.
        pictures: name of the kind -> (3, H, W) uint8.
    """

    caption: str
    pictures: dict[str, Tensor]


def main() -> None:
    """Read the command line and browse."""
    parser = config_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="weights whose proposals are shown as RoIs")
    parser.add_argument("--num-images", type=count, default=16, help="how many images to draw (default: 16)")
    parser.add_argument("--start-step", type=count, default=0, help="the first step to show (default: 0)")
    parser.add_argument("--output-dir", type=Path, help="folder of the page (default: runs/NAME/browse)")
    args = parser.parse_intermixed_args()
    with user_errors():
        config = load_config(args.config, args.overrides)
        folder = args.output_dir or Path("runs") / config.name / "browse"
        unreadable = browse(config, args.checkpoint, folder, num_images=args.num_images, start_step=args.start_step)
    sys.exit(1 if unreadable else 0)


def browse(
    config: Config, checkpoint_path: Path | None, folder: Path, *, num_images: int, start_step: int
) -> list[int]:
    """Print the figures of the training split, and write pictures and page; returns ids of images not readable."""
    data = build.load_train_data(config)
    say(data.summary())
    model = build_detector(config, data, checkpoint_path)
    survey = survey_of(config, data, model)
    is_rpn = isinstance(model, ProposalNetwork)
    hints = advice(
        survey,
        short_sides=config.data.short_sides,
        detections_per_image=None if is_rpn else config.model.roi_head.detections_per_image,
    )
    say(format_overview(survey))
    if hints:
        say("\nworth a look:")
        say("\n".join(f"- {hint}" for hint in hints))

    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    build.place(config, model, torch.device("cuda" if torch.cuda.is_available() else "cpu")).train()
    has_proposals = checkpoint_path is not None or isinstance(model, FastRCNN)
    unreadable: list[int] = []
    shown = draw_steps(config, data, model, start_step=start_step, has_proposals=has_proposals, unreadable=unreadable)
    samples = write_pictures(shown, folder, num_images=num_images)
    note = "" if has_proposals or is_rpn else "No RoIs: proposals of random weights mean nothing. Give --checkpoint."
    page = browse_page(survey, name=config.name, source=data.summary(), advice=hints, samples=samples, note=note)
    write_text(folder / "index.html", page)
    for reason in explain_unreadable(data, unreadable):
        say(printable(reason), file=sys.stderr)
    say(f"written: {folder / 'index.html'}")
    return unreadable


def build_detector(config: Config, data: CocoAnnotations, path: Path | None) -> DetectionModel:
    """The model that the config trains, with the weights of a checkpoint or random ones.

    Raises:
        InputError: the checkpoint cannot be read, or is of other classes or another architecture.
    """
    torch.manual_seed(config.seed)
    model = build.build_model(config, len(data.categories), pretrained=False)
    if path is not None:
        state = checkpoint.load_checkpoint(path)
        checkpoint.check_categories(state, path, data.categories, data.source)
        checkpoint.load_weights(model, checkpoint.best_weights(state), path)
    return model


def survey_of(config: Config, data: CocoAnnotations, model: DetectionModel) -> Survey:
    """Figures of all boxes under the anchors and levels of `model`."""
    scales = config.data.short_sides
    boxes = training_boxes(data, short_sides=scales, long_side=config.data.long_side, resize=config.data.resize)
    return make_survey(
        data,
        boxes,
        num_scales=len(scales),
        anchors=None if isinstance(model, FastRCNN) else model.rpn.anchors,
        sizes=config.model.anchors.level_sizes,
        ratios=config.model.anchors.ratios,
        positive_iou=config.model.rpn.positive_iou,
        pooler=None if isinstance(model, ProposalNetwork) else first_head(model.roi_head).pooler,
        level_names=level_names(config),
    )


def level_names(config: Config) -> list[str]:
    """Names of the levels of the neck, fine to coarse, as papers call them."""
    match config.model.neck:
        case SingleLevelConfig(stage=stage):
            return [f"C{stage}"]
        case FpnConfig(finest_only=True):
            return ["P2"]
        case _:
            return ["P2", "P3", "P4", "P5", "P6"]


def draw_steps(
    config: Config,
    data: CocoAnnotations,
    model: DetectionModel,
    *,
    start_step: int,
    has_proposals: bool,
    unreadable: list[int],
) -> Iterator[Shown]:
    """Draw the images of one step after the other, without end.

    Args:
        config: of the run.
        data: its training split.
        model: in training mode, on the device to compute on.
        start_step: the first step.
        has_proposals: whether its proposals mean something.
        unreadable: takes the ids of images that cannot be read.
    """
    device = next(model.parameters()).device
    names, position = data.names(), {image_id: i for i, image_id in enumerate(data.image_ids.tolist())}
    loader = build.build_train_loader(config, data, start_step=start_step)
    for micro_step, batch in enumerate(loader):
        unreadable += [i for i in batch.unreadable.tolist() if i not in unreadable]
        step = start_step + micro_step // config.train.accumulate
        drawings = draw_batch(config, model, batch.to(device), data.categories, has_proposals=has_proposals)
        for i, pictures in enumerate(drawings):
            image_id = int(batch.image_ids[i])
            yield Shown(caption=f"step {step}, {names[position[image_id]]} (id {image_id})", pictures=pictures)


def draw_batch(
    config: Config,
    model: DetectionModel,
    batch: Batch,
    categories: Categories,
    *,
    has_proposals: bool,
) -> Iterator[dict[str, Tensor]]:
    """Draw each image of a batch: its boxes, its anchors, its RoIs, as far as the model has them."""
    class_names, levels = categories.names, level_names(config)
    anchors = rois = None
    if not isinstance(model, FastRCNN):
        anchors = anchor_views(model.rpn, batch)
    if not isinstance(model, ProposalNetwork) and has_proposals:
        with torch.no_grad(), autocast(batch.images.device, config.train.precision):
            proposals = model.propose(batch)
        rois = roi_views(model.roi_head, proposals, batch)
    for i in range(len(batch.images)):
        image = padded_image(batch, i, config.model.pixel_mean)
        pictures = {"boxes": draw_targets(image, batch, i, class_names)}
        if anchors is not None:
            pictures["anchors"] = draw_anchors(image, batch, i, anchors[i], class_names, levels)
        if rois is not None:
            pictures["rois"] = draw_rois(image, batch, i, rois[i], class_names, levels)
        yield pictures


def write_pictures(shown: Iterator[Shown], folder: Path, *, num_images: int) -> list[list[Picture]]:
    """Write the first images as PNG files to `folder`, where none of an earlier run stay.

    Returns:
        The pictures of each image, for the page.
    """
    samples, written = [], set()
    for number in tqdm(range(num_images), desc="drawing", unit="image", disable=None, file=sys.stderr):
        each, pictures = next(shown), []
        for kind, picture in each.pictures.items():
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            path = folder / f"{number:03d}_{kind}.png"
            with replacing(path) as file:
                image.save(file, format="PNG")
            written.add(path)
            pictures.append(Picture(encoded(image), f"{kind}: {each.caption}", f"{kind} of {each.caption}"))
        samples.append(pictures)
    with write_errors(folder):
        for path in folder.iterdir():
            if PICTURE_NAME.fullmatch(path.name) and path not in written:
                path.unlink()
    return samples


def encoded(image: Image.Image) -> bytes:
    """A picture as JPEG for the page."""
    image = image.copy()
    image.thumbnail((PAGE_PX, PAGE_PX))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def count(text: str) -> int:
    """A number of at least 0 from the command line."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, is {text}")
    return value


if __name__ == "__main__":
    main()
