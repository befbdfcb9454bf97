"""Training from JPEG files, each framework with its own loader: the cases of mode `loop`.

Ours is `fpn_det.engine.train.train` itself with the loader of `fpn_det.build`; torchvision's is the loop of its
reference scripts: Pillow decodes and flips, workers send float images, the model resizes. Files are 3/5 of the case's
size and are enlarged to it. Both have the same number of workers, images, flips, and page-locked transfers.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.io import write_jpeg
from torchvision.transforms.functional import convert_image_dtype, hflip, pil_to_tensor

from benchmarks import steps
from benchmarks.steps import NUM_CLASSES, Case, Runner
from fpn_det import build
from fpn_det.config import Config
from fpn_det.data.coco import CocoAnnotations
from fpn_det.engine.diagnosis import SkippedSteps
from fpn_det.engine.distributed import Process
from fpn_det.engine.precision import loss_scaler
from fpn_det.engine.train import train

NUM_FILES = 64
FOLDER = tempfile.TemporaryDirectory(prefix="fpn_det_bench_")


def ours(case: Case, device: torch.device, *, overrides: tuple[str, ...] = (), triton: bool = False) -> Runner:
    """Ours: images to weights as `tools/train.py` runs it, in slices of the training loop; `triton` as in steps.py."""
    config, data = dataset(case, overrides)
    model = steps.our_model(config, case, device)
    optimizer = build.build_optimizer(config, model)
    process = Process(device=device)
    stream = iter(build.build_train_loader(config, data, process=process))
    scalars: dict[str, float] = {}
    log = SimpleNamespace(advance=lambda: None, training=lambda step, record, eta: scalars.update(record))
    done = 0

    def run(num_steps: int) -> None:
        nonlocal done
        done = train(
            model,
            stream,
            optimizer=optimizer,
            scaler=loss_scaler(device, "fp32"),
            lr_at=build.build_schedule(config, 90_000),
            start_step=done,
            num_steps=done + num_steps,
            seed=0,
            process=process,
            log=log,  # type: ignore[arg-type]
            skipped=SkippedSteps(limit=20),
            note_unreadable=lambda image_ids: None,
            save=lambda step: None,
            evaluate=lambda step: False,
            precision="bf16" if case.precision == "bf16" else "fp32",
        )
        runner.data_wait = scalars["speed/data_wait_share"]

    runner = Runner(model, optimizer, steps.with_kernels(run) if triton else run)
    return runner


def torchvision(case: Case, device: torch.device, *, channels_last: bool = False, compiled: bool = False) -> Runner:
    """torchvision's, with the settings of `steps.torchvision`."""
    _, data = dataset(case)
    model = steps.torchvision_model(case, min_size=case.height, max_size=case.width)
    steps.to_device(model, device, channels_last=channels_last, compiled=compiled)
    dataset_of_files = TheirDataset(data)
    stream = iter(
        DataLoader(
            dataset_of_files,
            batch_size=case.batch,
            # Without end: epochs as short as these would stop the workers every few steps, which COCO's do not.
            sampler=RandomSampler(dataset_of_files, num_samples=10**7),
            num_workers=num_workers(),
            collate_fn=transpose,
            pin_memory=device.type == "cuda",
        )
    )
    waited = 0.0

    def losses() -> dict[str, Tensor]:
        nonlocal waited
        since = time.perf_counter()
        images, targets = next(stream)
        waited += time.perf_counter() - since
        return dict(model(steps.moved(images, device), steps.moved(targets, device)))

    inner = steps.training(model, losses, case, device)

    def run(num_steps: int) -> None:
        nonlocal waited
        since, waited = time.perf_counter(), 0.0
        inner.run(num_steps)
        if device.type == "cuda":
            torch.cuda.synchronize()
        runner.data_wait = waited / (time.perf_counter() - since)

    runner = Runner(model, inner.optimizer, run)
    return runner


class TheirDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Files as `references/detection` reads them, with its preset `hflip`."""

    def __init__(self, data: CocoAnnotations) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = Image.open(self.data.path(index)).convert("RGB")
        boxes, labels = self.data.targets(index)
        boxes = boxes.clone()
        if torch.rand(()) < 0.5:
            image = hflip(image)
            boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
        return convert_image_dtype(pil_to_tensor(image)), {"boxes": boxes, "labels": labels + 1}


def transpose(samples: list[tuple[Any, Any]]) -> tuple[list[Any], ...]:
    """Their collation: a list of images and a list of targets."""
    return tuple(map(list, zip(*samples, strict=True)))


def num_workers() -> int:
    """One per core up to 8, and none where there are fewer than 4 cores."""
    cores = os.cpu_count() or 1
    return min(8, cores) if cores >= 4 else 0


@cache
def write_files(height: int, width: int, num_gt: int) -> Path:
    """JPEG files and their annotations; returns the folder."""
    folder = Path(FOLDER.name) / f"{height}x{width}_{num_gt}"
    folder.mkdir()
    batch = steps.make_batch(Case("loop", "resnet50", height, width, NUM_FILES, "fp32", num_gt=num_gt))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, (image, boxes, labels) in enumerate(
        zip(batch.images, batch.targets.boxes, batch.targets.labels.tolist(), strict=True)
    ):
        name = f"{i:03}.jpg"
        noisy = image[:, :height, :width].int() + torch.randint(-8, 9, (1, height, width))  # or it decodes too fast
        write_jpeg(noisy.clamp(0, 255).to(torch.uint8), str(folder / name), quality=90)
        images.append({"id": i, "file_name": name, "height": height, "width": width})
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels, strict=True):
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": label + 1, **box})
    categories = [{"id": i + 1, "name": f"class {i}"} for i in range(NUM_CLASSES)]
    record = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(record))
    return folder


def dataset(case: Case, overrides: tuple[str, ...] = ()) -> tuple[Config, CocoAnnotations]:
    """Our config of the case on the files, and their annotations."""
    folder = write_files(case.height * 3 // 5, case.width * 3 // 5, case.num_gt)
    values = {
        "data.train.images": folder,
        "data.train.annotations": folder / "annotations.json",
        "data.short_sides": f"[{min(case.height, case.width)}]",
        "data.test_short_side": min(case.height, case.width),
        "data.long_side": max(case.height, case.width),
        "data.num_workers": num_workers(),
        "train.batch_size": case.batch,
        "optim.scale_lr": "false",
    }
    config = steps.config_of(case, (*overrides, *(f"{key}={value}" for key, value in values.items())))
    return config, build.load_train_data(config)
