"""The same weights and image files through MMDetection and through fpn_det, from reading the file to the boxes.

    python benchmarks/parity_mmdetection.py [VARIANT ...] [--images F] [--full-size 3] [--seed 0] [--double] [--keep F]

Needs MMDetection 3. Per variant: its model from its own config, with random weights under which hundreds of boxes
compete, is saved as training saves it, or without a config under a name of the model zoo. MMDetection reads that file,
runs its test pipeline on image files and its model on the outcome; fpn_det reads what tools/import_weights.py made of
the file. Printed: how far matching detections (same label) are apart, and how many images have one without match within
0.05 px and 1e-4 of the score. Under --double both models are in double precision, where rounding makes no image differ.
"""

from __future__ import annotations

import argparse
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fpn_det.build import build_model, build_test_transform
from fpn_det.config import load_config
from fpn_det.data.loader import collate
from fpn_det.data.transforms import find_images, load_image
from fpn_det.engine.checkpoint import checkpoint_categories, load_checkpoint, load_weights
from fpn_det.engine.evaluate import detect
from fpn_det.structures import Detections, Sample

try:
    import mmdet
    from mmcv.transforms import Compose
    from mmdet.apis import init_detector
    from mmdet.datasets import CocoDataset
    from mmengine.config import Config as TheirConfig
    from mmengine.runner import load_checkpoint as load_theirs
    from mmengine.runner import save_checkpoint
except ImportError as error:
    sys.exit(
        f"error: MMDetection cannot be imported ({error}); install it next to fpn_det: "
        'pip install openmim "setuptools<81"; mim install mmengine "mmcv>=2.0,<2.2" mmdet'
    )

# name -> config, and the name of the file of weights if it has no config and is to be told by its name
VARIANTS = {
    "r50": ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco", ""),
    "r50_caffe": ("faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco", ""),
    "r50_caffe_named": (
        "faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco",
        "faster_rcnn_r50_caffe_fpn_1x_coco_bbox_mAP-0.378_20200504_180032-c5925ee5.pth",
    ),
    "r101": ("faster_rcnn/faster-rcnn_r101_fpn_1x_coco", ""),
    "x101_32x4d": ("faster_rcnn/faster-rcnn_x101-32x4d_fpn_1x_coco", ""),
    "x101_32x8d": ("faster_rcnn/faster-rcnn_x101-32x8d_fpn_ms-3x_coco", ""),
    "x101_64x4d": ("faster_rcnn/faster-rcnn_x101-64x4d_fpn_1x_coco", ""),
    "rpn": ("rpn/rpn_r50_fpn_1x_coco", ""),
    "rpn_caffe": ("rpn/rpn_r50-caffe_fpn_1x_coco", ""),
    "fast_rcnn": ("fast_rcnn/fast-rcnn_r50_fpn_1x_coco", ""),
}

# (width, height): landscape, portrait, square, odd, thin, enlarged, reduced, limited by the long side
SIZES = [
    *[(640, 480), (1001, 1499), (1600, 700), (480, 640), (500, 333), (333, 500), (224, 224), (801, 799), (97, 61)],
    *[(61, 97), (16, 12), (600, 150), (70, 700), (2049, 513), (1201, 1999), (160, 160), (161, 213), (320, 267)],
]
SMALL = (192, 320)
MAX_BOX_PX, MAX_SCORE = 0.05, 1e-4
NUM_FIXED_PROPOSALS = 600


def main() -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)}; by default all")
    parser.add_argument("--images", type=Path, help="up to 12 image files of this folder, besides the generated ones")
    parser.add_argument("--full-size", type=int, default=3, help="how many images are compared at 800 to 1333 px too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--double", action="store_true", help="both models in double precision, from the body on")
    parser.add_argument("--keep", type=Path, help="leave images and weights in this folder")
    args = parser.parse_args()
    if unknown := [name for name in args.variants if name not in VARIANTS]:
        parser.error(f"unknown variants {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        paths = draw_images(folder / "images", args.seed)
        if args.images:
            paths = find_images(args.images)[:12] + paths
        print(f"{'variant':<16} {'short..long':>11} {'images':>6} {'detections':>10} {'box px':>9} {'score':>9} differ")
        for name in args.variants or VARIANTS:
            torch.manual_seed(args.seed)
            compare_variant(name, paths, args.full_size, folder, double=args.double)


def compare_variant(name: str, paths: Sequence[Path], num_full_size: int, folder: Path, *, double: bool) -> None:
    """Print a row of detections at small size, and one at the size of the config."""
    file_name = VARIANTS[name][1]
    model = init_detector(their_config(name), device="cpu")
    resize_to(model.cfg, SMALL)
    randomise(model, [their_input(model.cfg, path) for path in paths[:: len(paths) // 5]])
    weights = folder / (file_name or f"{name}.pth")
    meta: dict[str, Any] = {"dataset_meta": CocoDataset.METAINFO, "epoch": 12}
    if not file_name:  # as training does
        meta["cfg"] = their_config(name).pretty_text
    save_checkpoint({"meta": meta, "state_dict": model.state_dict()}, str(weights))
    checkpoint = import_weights(weights)

    full_size = paths[:: len(paths) // max(num_full_size, 1)][:num_full_size]
    for sides, some in ((SMALL, paths), (None, full_size)):
        theirs = their_detector(name, sides, weights, double=double)
        ours = our_detector(checkpoint, sides, double=double)
        count, box_px, score, differing = 0, 0.0, 0.0, []
        for path in some:
            expected, found = theirs(path), ours(path)
            problems, box, of_score = compare(found, expected)
            count, box_px, score = count + len(expected), max(box_px, box), max(score, of_score)
            if problems:
                differing.append(f"{path.name}: {len(problems)}: " + "; ".join(problems[:3]))
        sides_text = f"{sides[0]}..{sides[1]}" if sides else "800..1333"
        print(
            f"{name:<16} {sides_text:>11} {len(some):>6} {count:>10} {box_px:>9.1e} {score:>9.1e} {len(differing)}",
            *(f"  {line}" for line in differing),
            sep="\n" if differing else "",
            flush=True,
        )


def compare(ours: Detections, theirs: Detections) -> tuple[list[str], float, float]:
    """What has no match, and the largest differences in pixels and score of what has.

    Scores equal but for rounding may be in another order, so that detections are matched and not compared in order.
    """
    box = (ours.boxes[:, None] - theirs.boxes).abs().amax(dim=-1)
    score = (ours.scores[:, None] - theirs.scores).abs()
    same = (ours.labels[:, None] == theirs.labels) & (box <= MAX_BOX_PX) & (score <= MAX_SCORE)
    problems = [] if len(ours) == len(theirs) else [f"{len(ours)} detections, theirs are {len(theirs)}"]
    for side, found, matched in (("ours", ours, same.any(dim=1)), ("theirs", theirs, same.any(dim=0))):
        for i in (~matched).nonzero().flatten().tolist():
            corners = ", ".join(f"{x:.2f}" for x in found.boxes[i].tolist())
            problems.append(f"{side} {i} alone: class {found.labels[i]}, score {found.scores[i]:.5f}, ({corners})")
    if not same.any():
        return problems, 0.0, 0.0
    # Of several matches, the nearest.
    values, index = (box / MAX_BOX_PX + score / MAX_SCORE).masked_fill(~same, torch.inf).min(dim=1)
    rows = values.isfinite().nonzero().flatten()
    pairs = rows, index[rows]
    return problems, float(box[pairs].max()), float(score[pairs].max())


# --- MMDetection's side ---


def their_config(variant: str) -> Any:
    """The config as MMDetection comes with it."""
    folder = Path(mmdet.__file__).parent
    configs = next((f for f in (folder / ".mim" / "configs", folder.parent / "configs") if f.is_dir()), None)
    if configs is None:
        sys.exit(f"error: MMDetection in {folder} came without its folder of configs; install it with mim or pip")
    return TheirConfig.fromfile(configs / f"{VARIANTS[variant][0]}.py")


def resize_to(cfg: Any, sides: tuple[int, int]) -> None:
    """Let the test pipeline resize to these (short, long) sides, in place."""
    pipeline = list(cfg.test_dataloader.dataset.pipeline)
    while pipeline:
        transform = pipeline.pop()
        pipeline += transform.get("transforms", [])
        if transform["type"] == "Resize":
            transform["scale"] = sides[::-1]


def their_input(cfg: Any, path: Path) -> dict[str, Any]:
    """What the test pipeline makes of an image file, as a batch of one; with fixed proposals if it takes some."""
    pipeline = cfg.test_dataloader.dataset.pipeline
    record: dict[str, Any] = {"img_path": str(path), "img_id": 0}
    if any(transform["type"] == "LoadProposals" for transform in pipeline):
        boxes, scores = fixed_proposals(path)
        record["proposals"] = {"bboxes": boxes, "scores": scores}
    packed = Compose(pipeline)(record)
    return {key: [packed[key]] for key in ("inputs", "data_samples")}


def their_detector(
    variant: str, sides: tuple[int, int] | None, weights: Path, *, double: bool
) -> Callable[[Path], Detections]:
    """MMDetection with the weights of a file."""
    model = init_detector(their_config(variant), device="cpu")
    load_theirs(model, str(weights), map_location="cpu", strict=True, logger="silent")
    if sides:
        resize_to(model.cfg, sides)
    if double:
        to_double(model)

    @torch.no_grad()
    def detect_one(path: Path) -> Detections:
        [output] = model.test_step(their_input(model.cfg, path))
        found = output.pred_instances
        return Detections(boxes=found.bboxes, scores=found.scores, labels=found.labels)

    return detect_one


@torch.no_grad()
def randomise(model: Any, batches: Sequence[dict[str, Any]]) -> None:
    """Weights for which every layer says something, in place.

    The norms are calibrated on images, the last layers on the first of them, so that logits spread over several units
    and no class or anchor wins everywhere.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, norm in norms.items():
        # Residual branches as small as in trained networks: else deep random bodies amplify rounding errors.
        nn.init.uniform_(norm.weight, *((0.1, 0.3) if name.endswith("bn3") else (0.5, 1.0)))
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = None  # average over all batches
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    model.eval()
    for norm in norms.values():
        norm.train()
    for batch in batches:
        model.test_step(batch)
    model.eval()

    done: set[nn.Module] = set()
    handles = []
    # MMDetection ranks proposals by float32 sigmoids; with greater logits many would be equal, in an order of chance.
    for name, std in {"rpn_cls": 1.0, "rpn_reg": 0.15, "fc_cls": 1.5, "fc_reg": 0.5}.items():
        layer = next((module for path, module in model.named_modules() if path.endswith(name)), None)
        if layer is None:
            continue

        def calibrate(
            layer: Any, args: tuple[Tensor], output: Tensor, std: float = std, name: str = name
        ) -> Tensor | None:
            if layer in done:  # the RPN's head sees all levels; the first is the largest
                return None
            done.add(layer)
            channels = output.movedim(1, 0).flatten(1)
            scale = std / channels.std(dim=1).mean()
            layer.weight *= scale
            layer.bias.copy_((layer.bias - channels.mean(dim=1)) * scale)
            if name == "rpn_reg":  # one anchor in three: around the clamp that others do not have, the lower one
                layer.bias[2:4] -= math.log(1000 / 16)
            again: Tensor = layer(*args)
            return again

        nn.init.normal_(layer.weight, std=0.1)
        handles.append(layer.register_forward_hook(calibrate))
    model.test_step(batches[0])
    for handle in handles:
        handle.remove()


# --- Our side ---


def import_weights(weights: Path) -> Path:
    """Run the tool; the checkpoint that it wrote."""
    checkpoint = weights.with_name(f"{weights.stem}_imported.pth")
    tool = Path(__file__).parents[1] / "tools" / "import_weights.py"
    command = [sys.executable, str(tool), str(weights), str(checkpoint), "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"tools/import_weights.py failed on {weights}:\n{done.stderr}")
    return checkpoint


def our_detector(checkpoint: Path, sides: tuple[int, int] | None, *, double: bool) -> Callable[[Path], Detections]:
    """fpn_det with the imported pair of files."""
    overrides = []
    if sides:
        overrides = [f"data.test_short_side={sides[0]}", f"data.long_side={sides[1]}", f"data.short_sides=[{sides[0]}]"]
    config = load_config(checkpoint.with_suffix(".yaml"), overrides)
    state = load_checkpoint(checkpoint)
    model = build_model(config, len(checkpoint_categories(state)), pretrained=False)
    load_weights(model, state["model"], checkpoint)
    if double:
        to_double(model)
    transform = build_test_transform(config)

    def detect_one(path: Path) -> Detections:
        image = load_image(path)
        proposals = proposal_scores = None
        if config.model.kind == "fast_rcnn":
            proposals, proposal_scores = (torch.from_numpy(x) for x in fixed_proposals(path))
        sample = Sample.to_detect_in(image, proposals=proposals, proposal_scores=proposal_scores)
        batch = collate([transform(sample, random.Random(0))])
        [(_, [found])] = detect(model, [batch], device=torch.device("cpu"), precision="fp32", show_progress=False)
        return found

    return detect_one


# --- What both see ---


def to_double(model: Any) -> None:
    """Compute in double precision from the body on, in place."""
    model.double()
    model.backbone.register_forward_pre_hook(lambda _, args: (args[0].double(),))


def draw_images(folder: Path, seed: int) -> list[Path]:
    """Clouds with rectangles in front, of `SIZES`; every third is a JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for i, (width, height) in enumerate(SIZES):
        clouds = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        image = clouds.resize((width, height), Image.Resampling.BICUBIC)
        for _ in range(12):
            w, h = (int(rng.integers(1, max(2, side // 2))) for side in (width, height))
            x, y = int(rng.integers(width)), int(rng.integers(height))
            image.paste(tuple(rng.integers(0, 256, 3).tolist()), (x, y, x + w, y + h))
        paths.append(folder / f"{width}x{height}.{'jpg' if i % 3 == 0 else 'png'}")
        image.save(paths[-1])
    return paths


def fixed_proposals(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Random boxes (P, 4) float32 in pixels of the image file, and descending scores (P,)."""
    with Image.open(path) as image:
        sides = np.array([image.width, image.height])
    rng = np.random.default_rng(int(sides.prod()))
    corners = rng.random((2, NUM_FIXED_PROPOSALS, 2)) * sides
    boxes = np.concatenate([corners.min(axis=0), corners.max(axis=0)], axis=1).astype(np.float32)
    return boxes, np.linspace(1, 0, NUM_FIXED_PROPOSALS, dtype=np.float32)


if __name__ == "__main__":
    main()
