"""Export a trained detector to a file that runs without this package.

    python tools/export.py --checkpoint K --format onnx|torchscript|torch_export --output FILE
        [--config C] [--images FOLDER] [--num-images 50] [--device cpu|cuda] [key=value ...]

The file holds the whole path from images as they are, (N, 3, H, W) uint8 RGB of any number and size, to boxes in their
pixels, scores and labels: resizing, padding, normalisation, both stages, NMS. docs/export.md says how to use it.

Before it is written it is checked: at least 10 images, of `data.val` or of --images, go through it and through the
detector, one by one, and some also in batches, turned and cropped. If boxes, scores or AP differ by more than rounding,
nothing is written and the exit code is 2. The differences, the speed of both, the classes and what else a user of the
file must know are in its metadata.

The config is the checkpoint's own unless --config gives another; `key=value` changes either, as in
model.roi_head.score_thresh=0.3. The file computes in float32, whatever `train.precision` is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from fpn_det import build
from fpn_det.cli import say, user_errors
from fpn_det.config import Config
from fpn_det.data.loader import collate
from fpn_det.data.transforms import TestTransform, find_images, load_image
from fpn_det.engine import checkpoint
from fpn_det.engine.coco_eval import GroundTruth, ScoredBoxes, score, score_proposals
from fpn_det.engine.evaluate import DetectionModel, detect, to_coco_results
from fpn_det.export.check import AP_TOLERANCE, MIN_IMAGES, Comparison, check
from fpn_det.export.formats import Exported, Format, export
from fpn_det.export.resize import Resize
from fpn_det.files import replacing, write_errors
from fpn_det.models.faster_rcnn import FastRCNN
from fpn_det.structures import Categories, Detections, InputError, Sample, printable

FIXED = ("train.precision=fp32", "runtime.compile=false", "runtime.tf32=false")
"""How every file computes, whatever the run did."""


def main() -> None:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights to export")
    parser.add_argument("--format", choices=get_args(Format), required=True)
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--config", type=Path, help="YAML file instead of the checkpoint's own config")
    parser.add_argument("--images", type=Path, help="folder of images to check on, instead of data.val")
    parser.add_argument("--num-images", type=int, default=50, help="how many images to check on, at least 10")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where torchscript and torch_export files will run"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the config")
    args = parser.parse_intermixed_args()
    with user_errors():
        export_checkpoint(
            args.checkpoint,
            args.format,
            args.output,
            config_path=args.config,
            overrides=args.overrides,
            folder=args.images,
            num_images=args.num_images,
            device=torch.device(args.device),
        )


def export_checkpoint(
    checkpoint_path: Path,
    format: Format,
    output: Path,
    *,
    config_path: Path | None,
    overrides: Sequence[str],
    folder: Path | None,
    num_images: int,
    device: torch.device,
) -> None:
    """Convert, check, report, and write if the check passes."""
    if output.is_dir():
        raise InputError(f"{output}: is a folder; give the path of the file to write")
    if num_images < MIN_IMAGES:
        raise InputError(f"--num-images {num_images}: a check needs at least {MIN_IMAGES} images")
    if device.type == "cuda" and (format == "onnx" or not torch.cuda.is_available()):
        reason = "an ONNX file is of no device" if format == "onnx" else "torch sees no GPU"
        raise InputError(f"--device cuda: {reason}; leave it out")
    state = checkpoint.load_checkpoint(checkpoint_path)
    config = config_for_export(state, checkpoint_path, config_path, overrides)
    model = build.build_detector(config, state, checkpoint_path, device)
    categories = build.detected_categories(config, state)
    assert not isinstance(model, FastRCNN), "config_for_export refuses it"
    images = load_check_images(config, state, checkpoint_path, folder, num_images)
    with write_errors(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)

    transform = build.build_test_transform(config)
    resize = Resize(short_side=transform.short_side, long_side=transform.long_side, kind=transform.resize)
    exported = export(format, model, resize.to(device))
    is_rpn = config.model.kind == "rpn"
    score_thresh = 0.0 if is_rpn else config.model.roi_head.score_thresh
    max_detections = config.model.rpn.post_nms_top_k_test if is_rpn else config.model.roi_head.detections_per_image
    comparison = check(
        lambda batch: look(model, batch, transform, device),
        lambda batch: split(*exported.run(batch)),
        images.pixels,
        score_thresh=score_thresh,
        max_detections=max_detections,
    )
    metrics = compare_metrics(config, images, comparison, categories)
    say(report(comparison, metrics, exported))
    if failures := [*comparison.failures(), *metric_failures(metrics)]:
        raise InputError(
            f"{output}: not written, because the exported file would not be the detector: {'; '.join(failures)}. "
            "Please report it, with the versions above and the config; another --format may do meanwhile"
        )
    with checkpoint_path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    metadata = describe(config, format, categories, max_detections, score_thresh) | {
        "checkpoint": json.dumps({"sha256": sha256, "step": state["step"]}),
        "check": json.dumps(summary(comparison, metrics, exported)),
    }
    with replacing(output) as file:
        exported.write(file, metadata)
    say(f"written: {output} ({output.stat().st_size / 1e6:.1f} MB)")


def config_for_export(
    state: checkpoint.State, checkpoint_path: Path, config_path: Path | None, overrides: Sequence[str]
) -> Config:
    """The config of what is exported; refuses what cannot be."""
    config = build.config_for(state, checkpoint_path, given=config_path, overrides=[*overrides, *FIXED])
    if config.model.kind == "fast_rcnn":
        raise InputError("model.kind fast_rcnn needs proposals of each image; export faster_rcnn or rpn")
    if config.eval.tta is not None:
        raise InputError("eval.tta looks at each image several times, an exported file once; add eval.tta=none")
    return config


@dataclass(frozen=True, kw_only=True)
class CheckImages:
    """What a file is checked on.

    Attributes:
        pixels: (3, H, W) uint8 each.
        ids: of the images in `truth`, or 1, 2, ..
        truth: their ground truth, if there is any.
    """

    pixels: list[Tensor]
    ids: list[int]
    truth: GroundTruth | None


def load_check_images(
    config: Config, state: checkpoint.State, checkpoint_path: Path, folder: Path | None, num_images: int
) -> CheckImages:
    """Images spread evenly over the folder or `data.val`; those that cannot be read are named and passed over.

    Raises:
        InputError: there are not enough.
    """
    truth = None
    if folder is not None:
        paths = find_images(folder)
        ids = list(range(1, len(paths) + 1))
    else:
        annotations = config.data.val.annotations
        if not annotations.is_file():
            raise InputError(
                f"{annotations}: no such file, but the exported file is checked on data.val. Give "
                f"data.val.images=FOLDER data.val.annotations=FILE, or --images FOLDER with {MIN_IMAGES} images or more"
            )
        data, truth = build.load_val_data(config), build.load_ground_truth(config)
        checkpoint.check_categories(state, checkpoint_path, data.categories, data.source)
        paths, ids = [data.path(i) for i in range(len(data))], data.image_ids.tolist()
    chosen = np.linspace(0, len(paths) - 1, min(num_images, len(paths))).round().astype(int).tolist()
    pixels, ids_read = [], []
    for i in chosen:
        try:
            pixels.append(load_image(paths[i]))
        except InputError as error:
            say(f"skipped: {printable(str(error))}", file=sys.stderr)
        else:
            ids_read.append(ids[i])
    if len(pixels) < MIN_IMAGES:
        where = folder or f"data.val ({config.data.val.annotations})"
        raise InputError(
            f"{where}: {len(pixels)} images to check the exported file on, at least {MIN_IMAGES} are needed; give "
            "--images FOLDER with more"
        )
    return CheckImages(pixels=pixels, ids=ids_read, truth=truth and only(truth, ids_read))


def only(truth: GroundTruth, ids: Sequence[int]) -> GroundTruth:
    """The ground truth of some images."""
    rows = np.isin(truth.image_ids[truth.images], ids)
    columns = {name: getattr(truth, name)[rows] for name in ("boxes", "areas", "crowd", "images", "classes")}
    return replace(truth, **columns)


def look(model: DetectionModel, images: Tensor, transform: TestTransform, device: torch.device) -> list[Detections]:
    """What the detector finds in one image, (1, 3, H, W) uint8, in the frame of the image."""
    [image] = images
    batch = collate([transform(Sample.to_detect_in(image), Random(0))])
    [(_, found)] = detect(model, [batch], device=device, precision="fp32", show_progress=False)
    return found


def split(boxes: Tensor, scores: Tensor, labels: Tensor) -> list[Detections]:
    """The outputs of an exported file as detections of each image."""
    counts = (labels >= 0).sum(1).tolist()
    return [
        Detections(boxes=boxes[i, :count], scores=scores[i, :count], labels=labels[i, :count])
        for i, count in enumerate(counts)
    ]


Metric = tuple[str, float, float]
"""Name, and value of the detector and of the file, 0..1."""


def compare_metrics(
    config: Config, images: CheckImages, comparison: Comparison, categories: Categories
) -> Metric | None:
    """AP of both, or AR at 1000 of proposals; None without ground truth."""
    if images.truth is None:
        return None
    results: list[ScoredBoxes] = [
        to_coco_results(images.ids, side, categories) for side in (comparison.expected, comparison.found)
    ]
    if config.model.kind == "rpn":
        expected, found = (score_proposals(images.truth, of_side)["AR1000"] for of_side in results)
        return "AR1000", expected, found
    limit = config.model.roi_head.detections_per_image
    expected, found = (score(images.truth, of_side, max_detections=limit)["AP"] for of_side in results)
    return "AP", expected, found


def metric_failures(metric: Metric | None) -> list[str]:
    """Why the metric says that the file is not the detector."""
    if metric is None or abs(metric[2] - metric[1]) <= AP_TOLERANCE:
        return []
    name, expected, found = metric
    return [f"{name} is {100 * found:.2f} instead of {100 * expected:.2f}"]


def report(comparison: Comparison, metric: Metric | None, exported: Exported) -> str:
    """The check as a table."""
    expected_ms, found_ms = comparison.median_ms
    rows = [
        ("", "detector", "file", "difference"),
        ("boxes, px", "", "", f"{comparison.box_difference:.2g} at most"),
        ("scores", "", "", f"{comparison.score_difference:.2g} at most"),
        ("detections", f"{comparison.num_detections}", "", f"{comparison.num_differing} differ"),
    ]
    if metric is not None:
        name, expected, found = metric
        rows.append((name, f"{100 * expected:.2f}", f"{100 * found:.2f}", f"{100 * (found - expected):+.2f}"))
    rows.append(("ms per image", f"{expected_ms:.1f}", f"{found_ms:.1f}", f"{found_ms / expected_ms:.2f} x"))
    lines = [f"{a:<14}{b:>10}{c:>10}  {d}".rstrip() for a, b, c, d in rows]
    return "\n".join([*lines, f"{comparison.num_images} images; {conditions(exported)}"])


def conditions(exported: Exported) -> str:
    """What the times are of."""
    threads = torch.get_num_threads()
    return f"{exported.runtime} on the {exported.device}, {threads} threads; times are medians of batches of one image"


def summary(comparison: Comparison, metric: Metric | None, exported: Exported) -> dict[str, object]:
    """The check as metadata."""
    expected_ms, found_ms = comparison.median_ms
    values: dict[str, object] = {
        "num_images": comparison.num_images,
        "num_detections": comparison.num_detections,
        "num_differing": comparison.num_differing,
        "max_box_difference_px": comparison.box_difference,
        "max_score_difference": comparison.score_difference,
        "detector_ms": expected_ms,
        "file_ms": found_ms,
        "conditions": conditions(exported),
    }
    if metric is not None:
        name, expected, found = metric
        values |= {f"detector_{name}": expected, f"file_{name}": found}
    return values


def describe(
    config: Config, format: Format, categories: Categories, max_detections: int, score_thresh: float
) -> dict[str, str]:
    """What a user of the file must know, as text by name; all but the first two are JSON."""
    model, data = config.model, config.data
    return {
        "input": "images: (num_images, 3, height, width) uint8, RGB, any number and size, not resized, not normalised",
        "outputs": f"boxes (num_images, {max_detections}, 4) float32, x1 y1 x2 y2 in pixels of the input; scores "
        f"(num_images, {max_detections}) float32, descending; labels (num_images, {max_detections}) int64, places in "
        "`categories`; label -1, score 0 and a box of zeros where there are no more",
        "categories": json.dumps(categories.state_dict()),
        "score_thresh": json.dumps(score_thresh),
        "nms_thresh": json.dumps(model.rpn.nms_thresh if model.kind == "rpn" else model.roi_head.nms_thresh),
        "resize": json.dumps({"short_side": data.test_short_side, "long_side": data.long_side, "kind": data.resize}),
        "pixels": json.dumps({"mean": model.pixel_mean, "std": model.pixel_std}),
        "model": json.dumps({"kind": model.kind, "backbone": model.backbone.name, "format": format}),
        "versions": json.dumps(checkpoint.versions() | {"fpn_det": own_version()}),
    }


def own_version() -> str:
    """Of this package, which a checkout can be used without installing."""
    try:
        return importlib.metadata.version("fpn_det")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
