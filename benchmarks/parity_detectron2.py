"""The same weights and image files through Detectron2 and through fpn_det, from reading the file to the boxes.

    python benchmarks/parity_detectron2.py [VARIANT ...] [--images FOLDER] [--full-size 3] [--seed 0] [--keep FOLDER]

Needs Detectron2 (0.5 or newer). Per variant: its model from its model zoo's config, with random weights under which
hundreds of boxes compete, is saved as a file of the model zoo (.pkl) or of training (.pth). Detectron2 reads the file
with DetectionCheckpointer, images with its DatasetMapper; fpn_det reads what tools/import_weights.py made of the file.
Printed: how far matching detections (same label) are apart, and how many images have one without match within 0.05 px
and 1e-4 of the score. Of the ImageNet bodies, which the tool imports alone, the features are compared; of training, the
losses and gradients of two images, of which all anchors and proposals are sampled, so that no dice are thrown.
"""

from __future__ import annotations

import argparse
import pickle
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fpn_det.build import build_backbone, build_model, build_test_transform
from fpn_det.config import Config, load_config
from fpn_det.data.loader import collate
from fpn_det.data.transforms import find_images, load_image
from fpn_det.engine.checkpoint import checkpoint_categories, load_checkpoint, load_weights
from fpn_det.engine.evaluate import detect
from fpn_det.models.backbone import read_classifier
from fpn_det.structures import Detections, Sample
from fpn_det.weights.detectron2 import convert
from fpn_det.weights.read import WeightFile

try:
    from detectron2 import model_zoo
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.data import DatasetMapper
    from detectron2.layers import FrozenBatchNorm2d
    from detectron2.modeling import build_model as build_theirs
    from detectron2.structures import Boxes, BoxMode, Instances
    from detectron2.utils.events import EventStorage
except ImportError as error:
    sys.exit(f"error: Detectron2 cannot be imported ({error}); install it as its INSTALL.md says, next to fpn_det")

# name -> config of the model zoo, suffix of the file of weights
DETECTORS = {
    "r50": ("faster_rcnn_R_50_FPN_1x", ".pkl"),
    "r101": ("faster_rcnn_R_101_FPN_3x", ".pth"),
    "x101": ("faster_rcnn_X_101_32x8d_FPN_3x", ".pkl"),
    "rpn": ("rpn_R_50_FPN_1x", ".pth"),
    "fast_rcnn": ("fast_rcnn_R_50_FPN_1x", ".pkl"),
}
# name -> config whose body it is, and whether the norms hold statistics or scale and shift alone.
BODIES = {
    "body_r50": ("faster_rcnn_R_50_FPN_1x", True),
    "body_r50_affine": ("faster_rcnn_R_50_FPN_1x", False),
    "body_x101": ("faster_rcnn_X_101_32x8d_FPN_3x", True),
}
TRAINING = "train_r50"
LOSSES = {
    "loss_rpn_cls": "rpn_objectness",
    "loss_rpn_loc": "rpn_box",
    "loss_cls": "roi_class",
    "loss_box_reg": "roi_box",
}

# (width, height): landscape, portrait, square, odd, thin, enlarged, reduced, limited by the long side
SIZES = [
    *[(640, 480), (1001, 1499), (1600, 700), (480, 640), (500, 333), (333, 500), (224, 224), (801, 799), (97, 61)],
    *[(61, 97), (16, 12), (600, 150), (70, 700), (2049, 513), (1201, 1999), (160, 160), (161, 213), (320, 267)],
]
SMALL, FULL = (192, 320), (800, 1333)
MAX_BOX_PX, MAX_SCORE = 0.05, 1e-4
NUM_FIXED_PROPOSALS = 600
EVERY_ANCHOR, EVERY_ROI = 200_000, 4_000  # more samples than there are

Proposals = tuple[np.ndarray, np.ndarray]


def main() -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*DETECTORS, *BODIES, TRAINING]
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(names)}; by default all")
    parser.add_argument("--images", type=Path, help="up to 12 image files of this folder, besides the generated ones")
    parser.add_argument("--full-size", type=int, default=3, help="how many images are compared at 800 to 1333 px too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="leave images and weights in this folder")
    args = parser.parse_args()
    if unknown := [name for name in args.variants if name not in names]:
        parser.error(f"unknown variants {', '.join(unknown)}; there are {', '.join(names)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        paths = draw_images(folder / "images", args.seed)
        if args.images:
            paths = find_images(args.images)[:12] + paths
        print(f"{'variant':<22} {'short..long':>11} {'images':>6} {'detections':>10} {'box px':>9} {'score':>9} differ")
        for name in args.variants or names:
            torch.manual_seed(args.seed)
            if name in BODIES:
                compare_body(name, paths[-1], folder)
            elif name == TRAINING:
                compare_training(paths[-2:], folder)
            else:
                compare_detector(name, paths, args.full_size, folder)


def compare_detector(name: str, paths: Sequence[Path], num_full_size: int, folder: Path) -> None:
    """Print a row of detections at small size, and one at full size."""
    zoo_config, suffix = DETECTORS[name]
    weights = folder / f"{name}{suffix}"
    cfg = their_config(zoo_config, SMALL)
    model = build_theirs(cfg).eval()
    randomise(model, [their_input(cfg, path) for path in paths[:: len(paths) // 5]])
    save(model.state_dict(), weights)
    checkpoint = import_weights(weights)
    for sides, some in ((SMALL, paths), (FULL, paths[:: len(paths) // num_full_size][:num_full_size])):
        theirs, ours = their_detector(zoo_config, sides, weights), our_detector(checkpoint, sides)
        count, box_px, score, differing = 0, 0.0, 0.0, []
        for path in some:
            expected, found = theirs(path), ours(path)
            problems, box, of_score = compare(found, expected)
            count, box_px, score = count + len(expected), max(box_px, box), max(score, of_score)
            if problems:
                differing.append(f"{path.name}: " + "; ".join(problems[:3]))
        sides_text = f"{sides[0]}..{sides[1]}"
        print(
            f"{name + suffix:<22} {sides_text:>11} {len(some):>6} {count:>10} {box_px:>9.1e} {score:>9.1e} "
            f"{len(differing)}",
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
    # Of several matches, the nearest.
    nearest = (box / MAX_BOX_PX + score / MAX_SCORE).masked_fill(~same, torch.inf)
    if not same.any():
        return problems, 0.0, 0.0
    values, index = nearest.min(dim=1)
    rows = values.isfinite().nonzero().flatten()
    pairs = rows, index[rows]
    return problems, float(box[pairs].max()), float(score[pairs].max())


def compare_body(name: str, path: Path, folder: Path) -> None:
    """Print a row of the features of an ImageNet body that both read from a file in Caffe2's names."""
    zoo_config, statistics = BODIES[name]
    cfg = their_config(zoo_config, SMALL)
    source = build_theirs(cfg).eval()
    randomise(source, [their_input(cfg, path)])
    prefix = "backbone.bottom_up."
    tensors = {k.removeprefix(prefix): v for k, v in source.state_dict().items() if k.startswith(prefix)}
    if not statistics:
        tensors = affine(tensors)
    weights = folder / f"{name}.pkl"
    weights.write_bytes(pickle.dumps({caffe2_name(k, statistics): v.numpy() for k, v in tensors.items()}, protocol=2))

    theirs = build_theirs(cfg).eval()
    DetectionCheckpointer(theirs.backbone.bottom_up).load(str(weights))
    checkpoint = import_weights(weights)
    # The config of a body is for training on it, with our resizing.
    config = load_config(checkpoint.with_suffix(".yaml"), [*sides_overrides(SMALL), "data.resize=pillow"])
    ours = build_backbone(config).eval()
    ours.load_classifier(read_classifier(config.model.backbone.name, str(checkpoint)))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.model.pixel_mean, config.model.pixel_std))
    with torch.no_grad():
        batch = collate([our_sample(config, path)])
        h, w = batch.sizes[0].tolist()
        image = torch.zeros(batch.images.shape)
        image[0, :, :h, :w] = (batch.images[0, :, :h, :w] - mean) / std
        expected = theirs.backbone.bottom_up(theirs.preprocess_image([their_input(cfg, path)]).tensor)
        levels = zip(ours(image), (expected[f"res{i}"] for i in (2, 3, 4, 5)), strict=True)
        off = [float((a - b).abs().max() / b.abs().max()) for a, b in levels]
    print(
        f"{name + '.pkl':<22} largest difference of C2..C5 by their largest value: " + " ".join(f"{x:.1e}" for x in off)
    )


def compare_training(paths: Sequence[Path], folder: Path) -> None:
    """Print a row of losses, theirs and ours, and of gradients in training mode."""
    weights = folder / f"{TRAINING}.pth"
    cfg = their_config(DETECTORS["r50"][0], SMALL)
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = EVERY_ANCHOR, EVERY_ROI
    cfg.MODEL.RPN.POSITIVE_FRACTION = cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0
    theirs = build_theirs(cfg).eval()
    inputs = [their_input(cfg, path) for path in paths]
    randomise(theirs, inputs)
    save(theirs.state_dict(), weights)
    checkpoint = import_weights(weights)
    overrides = [f"model.rpn.num_samples={EVERY_ANCHOR}", f"model.roi_head.num_samples={EVERY_ROI}"]
    overrides += ["model.rpn.positive_fraction=1.0", "model.roi_head.positive_fraction=1.0"]
    config = load_config(checkpoint.with_suffix(".yaml"), [*sides_overrides(SMALL), *overrides])
    state = load_checkpoint(checkpoint)
    ours = build_model(config, len(checkpoint_categories(state)), pretrained=False)
    load_weights(ours, state["model"], checkpoint)

    samples = []
    for path, record in zip(paths, inputs, strict=True):
        sample = our_sample(config, path)
        height, width = sample.image.shape[1:]
        frame = torch.tensor([width, height, width, height])
        boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.3, 0.2, 0.9, 0.9], [0.55, 0.6, 0.65, 0.7]]) * frame
        labels = torch.tensor([3, 17, 79])
        samples.append(replace(sample, boxes=boxes, labels=labels))
        record["instances"] = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=labels)
    with EventStorage():
        expected = theirs.train()(inputs)
    batch = collate(samples)
    losses, _ = ours.train()(batch)
    # Theirs are divided by the RoIs that there are, ours by those that were wanted.
    num_rois = int(ours.propose(batch).valid.sum()) + int(batch.targets.valid.sum())
    for name in ("roi_class", "roi_box"):
        losses[name] = losses[name] * (EVERY_ROI * len(samples) / num_rois)
    for total in (sum(expected.values()), sum(losses.values())):
        total.backward()
    gradients = {k: torch.zeros_like(v) for k, v in theirs.state_dict().items()}
    gradients |= {k: v.grad for k, v in theirs.named_parameters() if v.grad is not None}
    renamed = convert(WeightFile(gradients, {}, weights)).state_dict
    trained = {k: v.grad for k, v in ours.named_parameters() if v.grad is not None}
    untrained = [k for k, v in renamed.items() if k not in trained and v.any()]
    # Of the whole tensor: a ReLU whose input is all but 0 opens on one side alone and moves single elements.
    off = max(float((v - renamed[k]).norm() / renamed[k].norm()) for k, v in trained.items())
    print(f"{weights.name:<22}", *(f"{k} {expected[k]:.6f} {losses[v]:.6f}," for k, v in LOSSES.items()), end=" ")
    print(f"{len(trained)} gradients at most {off:.1e} apart; not trained by ours: {untrained or 'none'}", flush=True)


# --- Detectron2's side ---


def their_config(name: str, sides: tuple[int, int]) -> Any:
    """The model zoo's config, on the CPU."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(f"COCO-Detection/{name}.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = sides
    return cfg


def their_input(cfg: Any, path: Path) -> dict[str, Any]:
    """What DatasetMapper makes of an image file, with fixed proposals if the config asks for some."""
    record: dict[str, Any] = {"file_name": str(path), "image_id": 1}
    if cfg.MODEL.LOAD_PROPOSALS:
        boxes, scores = fixed_proposals(path)
        record |= {"proposal_boxes": boxes, "proposal_objectness_logits": scores}
        record["proposal_bbox_mode"] = BoxMode.XYXY_ABS
    return dict(DatasetMapper(cfg, is_train=False)(record))


def their_detector(zoo_config: str, sides: tuple[int, int], weights: Path) -> Callable[[Path], Detections]:
    """Detectron2 with the weights of a file."""
    cfg = their_config(zoo_config, sides)
    model = build_theirs(cfg).eval()
    DetectionCheckpointer(model).load(str(weights))

    @torch.no_grad()
    def detect_one(path: Path) -> Detections:
        [output] = model([their_input(cfg, path)])
        if "proposals" in output:
            found = output["proposals"]
            scores = found.objectness_logits.sigmoid()
            labels = torch.zeros(len(scores), dtype=torch.int64)
            return Detections(boxes=found.proposal_boxes.tensor, scores=scores, labels=labels)
        found = output["instances"]
        return Detections(boxes=found.pred_boxes.tensor, scores=found.scores, labels=found.pred_classes)

    return detect_one


@torch.no_grad()
def randomise(model: nn.Module, inputs: Sequence[dict[str, Any]]) -> None:
    """Weights for which every layer says something, in place.

    The norms are calibrated on some images, the last layers so that logits spread over several units and no class or
    anchor wins everywhere.
    """
    handles = []

    def calibrate_norm(norm: Any, args: tuple[Tensor]) -> None:
        norm.running_mean.copy_(args[0].mean(dim=(0, 2, 3)))
        norm.running_var.copy_(args[0].var(dim=(0, 2, 3)) + 1e-3)

    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            # Residual branches as small as in trained networks: else deep random bodies amplify rounding errors.
            nn.init.uniform_(module.weight, *((0.1, 0.3) if name.endswith("conv3.norm") else (0.5, 1.0)))
            nn.init.normal_(module.bias, std=0.2)
            handles.append(module.register_forward_pre_hook(calibrate_norm))
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    done: set[nn.Module] = set()
    last = {"objectness_logits": 2.0, "anchor_deltas": 0.15, "cls_score": 1.5, "bbox_pred": 0.5}
    for name, layer in model.named_modules():
        if (std := last.get(name.rpartition(".")[2])) is None:
            continue

        def calibrate(layer: Any, args: tuple[Tensor], output: Tensor, std: float = std) -> Tensor | None:
            if layer in done:  # the RPN's head sees all levels; the first is the largest
                return None
            done.add(layer)
            channels = output.movedim(1, 0).flatten(1)
            scale = std / channels.std(dim=1).mean()
            layer.weight *= scale
            layer.bias.copy_((layer.bias - channels.mean(dim=1)) * scale)
            again: Tensor = layer(*args)
            return again

        nn.init.normal_(layer.weight, std=0.1)
        handles.append(layer.register_forward_hook(calibrate))
    model(list(inputs))
    for handle in handles:
        handle.remove()


def save(state_dict: dict[str, Tensor], path: Path) -> None:
    """As the model zoo's files (.pkl) or as training's (.pth)."""
    if path.suffix == ".pth":
        torch.save({"model": state_dict, "iteration": 89999}, path)
    else:
        arrays = {name: value.numpy() for name, value in state_dict.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))


def affine(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norms as scale and shift alone, as MSRA's: the statistics are folded into them."""
    folded = {name: value for name, value in tensors.items() if ".running_" not in name}
    for name in [name for name in folded if name.endswith(".norm.weight")]:
        stem = name.removesuffix("weight")
        folded[name] = tensors[name] / (tensors[f"{stem}running_var"] + 1e-5).sqrt()
        folded[f"{stem}bias"] = tensors[f"{stem}bias"] - folded[name] * tensors[f"{stem}running_mean"]
    return folded


def caffe2_name(name: str, statistics: bool) -> str:
    """`res2.0.conv1.norm.weight` -> `res2_0_branch2a_bn_gamma`, or `.._bn_s` without statistics."""
    gamma, beta = ("gamma", "beta") if statistics else ("s", "b")
    norms = {"weight": gamma, "bias": beta, "running_mean": "running_mean", "running_var": "running_var"}
    stem, norm, part = re.fullmatch(r"(.*?)(\.norm)?\.(\w+)", name).groups()  # type: ignore[union-attr]
    suffix = f"bn_{norms[part]}" if norm else "w"
    if stem == "stem.conv1":
        return f"res_conv1_{suffix}" if norm and not statistics else f"conv1_{suffix}"
    stage, block, layer = stem.split(".")
    branch = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}[layer]
    return f"{stage}_{block}_branch{branch}_{suffix}"


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


def sides_overrides(sides: tuple[int, int]) -> list[str]:
    return [f"data.test_short_side={sides[0]}", f"data.long_side={sides[1]}", f"data.short_sides=[{sides[0]}]"]


def our_sample(config: Config, path: Path) -> Sample:
    """The image file, resized, with fixed proposals if the config asks for some."""
    boxes = scores = None
    if config.model.kind == "fast_rcnn":
        boxes, scores = (torch.from_numpy(x) for x in fixed_proposals(path))
    sample = Sample.to_detect_in(load_image(path), proposals=boxes, proposal_scores=scores)
    return build_test_transform(config)(sample, random.Random(0))


def our_detector(checkpoint: Path, sides: tuple[int, int]) -> Callable[[Path], Detections]:
    """fpn_det with the imported pair of files."""
    config = load_config(checkpoint.with_suffix(".yaml"), sides_overrides(sides))
    state = load_checkpoint(checkpoint)
    model = build_model(config, len(checkpoint_categories(state)), pretrained=False)
    load_weights(model, state["model"], checkpoint)

    def detect_one(path: Path) -> Detections:
        batch = collate([our_sample(config, path)])
        [(_, [found])] = detect(model, [batch], device=torch.device("cpu"), precision="fp32", show_progress=False)
        return found

    return detect_one


# --- What both see ---


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


def fixed_proposals(path: Path) -> Proposals:
    """Random boxes (P, 4) float32 in pixels of the image file, and descending scores (P,)."""
    with Image.open(path) as image:
        sides = np.array([image.width, image.height])
    rng = np.random.default_rng(image.width * image.height)
    corners = rng.random((2, NUM_FIXED_PROPOSALS, 2)) * sides
    boxes = np.concatenate([corners.min(axis=0), corners.max(axis=0)], axis=1).astype(np.float32)
    return boxes, np.linspace(1, 0, NUM_FIXED_PROPOSALS, dtype=np.float32)


if __name__ == "__main__":
    main()
