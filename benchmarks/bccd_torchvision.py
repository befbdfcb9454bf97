"""Train torchvision's own Faster R-CNN on the budget of one of our configs, as the peer of the README's table.

    python benchmarks/bccd_torchvision.py --config configs/bccd.yaml --output-dir runs/bccd_torchvision_0 seed=0

Body, FPN width, head width, anchors, samples per image, images, augmentation, batches, optimiser, schedule and steps
are those of the config; model, losses, matching and post-processing are torchvision's, left at their defaults.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import resnet
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from tqdm import tqdm

from fpn_det.boxes import rescale
from fpn_det.build import (
    build_optimizer,
    build_schedule,
    build_train_loader,
    build_val_loader,
    load_ground_truth,
    load_train_data,
    load_val_data,
    num_steps,
)
from fpn_det.config import Config, ConvFcConfig, FpnConfig, load_config
from fpn_det.engine.coco_eval import ScoredBoxes, format_table, score, write_results
from fpn_det.engine.evaluate import to_coco_results
from fpn_det.structures import Batch, Categories, Detections


def build_torchvision(config: Config, num_classes: int) -> FasterRCNN:
    """torchvision's detector with the body and widths of `config`; label 0 is its background."""
    model, backbone = config.model, config.model.backbone
    neck, box_head = model.neck, model.roi_head.box_head
    assert isinstance(neck, FpnConfig)
    assert isinstance(box_head, ConvFcConfig)
    body = getattr(resnet, backbone.name)(weights=None, norm_layer=torch.nn.BatchNorm2d)
    channels = [body.inplanes // 8 * 2**i for i in range(4)]
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    fpn = BackboneWithFPN(body, layers, channels, neck.channels)
    fc_dim, pool_size = box_head.fc_dim, model.roi_head.pool_size
    return FasterRCNN(
        fpn,
        min_size=config.data.test_short_side,
        max_size=config.data.long_side,
        image_mean=[m / 255 for m in model.pixel_mean],
        image_std=[s / 255 for s in model.pixel_std],
        rpn_anchor_generator=AnchorGenerator(
            tuple(model.anchors.level_sizes), (model.anchors.ratios,) * len(model.anchors.sizes)
        ),
        rpn_batch_size_per_image=model.rpn.num_samples,
        box_batch_size_per_image=model.roi_head.num_samples,
        box_roi_pool=MultiScaleRoIAlign(
            ["0", "1", "2", "3"],
            output_size=pool_size,
            sampling_ratio=2,
            canonical_scale=model.roi_head.canonical_size,
            canonical_level=model.roi_head.canonical_level,
        ),
        box_head=TwoMLPHead(neck.channels * pool_size**2, fc_dim),
        box_predictor=FastRCNNPredictor(fc_dim, num_classes + 1),
    )


def images_and_targets(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Our batch in torchvision's terms: float images 0..1 without padding, labels from 1."""
    images, targets = [], []
    for image, size, boxes, labels, valid in zip(
        batch.images, batch.sizes.tolist(), batch.targets.boxes, batch.targets.labels, batch.targets.valid, strict=True
    ):
        images.append(image[:, : size[0], : size[1]] / 255)
        targets.append({"boxes": boxes[valid], "labels": labels[valid] + 1})
    return images, targets


@torch.no_grad()
def detect(model: FasterRCNN, batches: Iterable[Batch], categories: Categories) -> ScoredBoxes:
    """COCO results in the frame of the original images."""
    model.eval()
    image_ids, detections = [], []
    for batch in batches:
        images, _ = images_and_targets(batch)
        for i, output in enumerate(model(images)):
            boxes = rescale(output["boxes"], batch.sizes[i], batch.original_sizes[i])
            detections.append(Detections(boxes=boxes, scores=output["scores"], labels=output["labels"] - 1))
            image_ids.append(int(batch.image_ids[i]))
    return to_coco_results(image_ids, detections, categories)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(config.seed)
    train, test = load_train_data(config), load_val_data(config)
    steps = num_steps(config, len(train))
    model = build_torchvision(config, len(train.categories))
    optimizer = build_optimizer(config, model)
    lr_at = build_schedule(config, steps)
    batches = iter(build_train_loader(config, train))
    start = time.perf_counter()
    model.train()
    progress = tqdm(range(steps), desc="torchvision", disable=None)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        losses = model(*images_and_targets(next(batches)))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        if config.optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        if step % config.train.log_every == 0:
            print(f"step {step} loss {loss.item():.3f} seconds {time.perf_counter() - start:.0f}", flush=True)
    seconds = time.perf_counter() - start

    results = detect(model, build_val_loader(config, test), test.categories)
    metrics = score(load_ground_truth(config), results)
    print(format_table(metrics))
    torch.save(model.state_dict(), args.output_dir / "final.pth")
    write_results(args.output_dir / "predictions.json", results)
    (args.output_dir / "metrics.json").write_text(json.dumps({**metrics, "train_seconds": seconds}, indent=2))


if __name__ == "__main__":
    main()
