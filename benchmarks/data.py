"""The data side: time per image of a loader worker against torchvision's reference, and opening a data set like COCO.

    python benchmarks/data.py [FOLDER]

FOLDER holds photographs, at best JPEG of 640x480 as in COCO. The annotation file is generated.
"""

import argparse
import json
import os
import random
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import cycle, islice
from multiprocessing import get_context, set_start_method
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import functional as tv

from fpn_det.data.coco import TENSORS, CocoAnnotations, load_coco
from fpn_det.data.loader import DetectionDataset, Key, TestSampler, TrainSampler, collate, make_loader
from fpn_det.data.transforms import TrainTransform, find_images, flip_horizontally, load_image, resize_to, resized_size
from fpn_det.models.faster_rcnn import Pyramid
from fpn_det.structures import Batch, Sample

SHORT_SIDE, LONG_SIDE = 800, 1333
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BOXES_PER_IMAGE = 7
NUM_WORKERS = 10

Times = defaultdict[str, list[float]]


def main() -> None:
    """Read the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="photographs; without it, only annotations are measured")
    args = parser.parse_args()
    if args.folder is not None:
        _print_table(f"Loading {args.folder}", loader_breakdown(args.folder))
    _print_table("Annotations: 118,000 images, 860,000 boxes", annotations())


def _print_table(title: str, results: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, value in results.items():
        if isinstance(value, dict):
            _print_table(name, value)
        else:
            print(f"  {name:<32}{value:10.2f}")


# Loading


def loader_breakdown(folder: Path, *, batch_size: int = 4, num_batches: int = 50) -> dict[str, Any]:
    """From image files to a batch: ours against torchvision's reference (its presets over Pillow, its transform).

    One thread; the sides alternate batch by batch; every second image is mirrored. All times are of the processor, so
    that other work on the machine counts less.

    Args:
        folder: photographs.
        batch_size: images per batch.
        num_batches: measured per side.

    Returns:
        Medians in ms per image (per mirrored one for `flip_ms`) and images/s. `normalise_ms`, to float and normalised,
        is no part of our total: the device does it. `worker_images_per_s` is what a loader's worker delivers, transport
        included; torchvision's leaves all of the transform to the model. `speedup` is torchvision's time by ours:
        `total`; `total_normalised`, with normalising on our side, too; `worker`.
    """
    paths = find_images(folder)
    stream = list(islice(cycle(paths), batch_size * (num_batches + 1)))
    ours, theirs = Times(list), Times(list)
    pixel_mean, pixel_std = ([255 * x for x in values] for values in (MEAN, STD))
    pyramid = Pyramid(backbone=nn.Identity(), neck=nn.Identity(), pixel_mean=pixel_mean, pixel_std=pixel_std)
    transform = GeneralizedRCNNTransform(SHORT_SIDE, LONG_SIDE, MEAN, STD)
    with _one_thread():
        for batch in (stream[i : i + batch_size] for i in range(0, len(stream), batch_size)):
            with _timed(ours, "total"):
                loaded = _load(batch, ours)
            with _timed(ours, "normalise"):
                pyramid.normalize(loaded.images, loaded.sizes)
            with _timed(theirs, "total"):
                _load_like_torchvision(batch, theirs, transform)
        rates = _worker_rates(paths, batch_size=batch_size, num_batches=num_batches)
    per_batch = ("total", "collate", "normalise", "transform")
    result, peer = (
        {
            f"{name}_ms": 1e3 * statistics.median(seconds[1:]) / (batch_size if name in per_batch else 1)  # 1: warm-up
            for name, seconds in times.items()
        }
        for times in (ours, theirs)
    )
    for side, rate in zip((result, peer), rates, strict=True):
        side["images_per_s"] = 1e3 / side["total_ms"]
        side["worker_images_per_s"] = rate
    speedup = {
        "total": peer["total_ms"] / result["total_ms"],
        "total_normalised": peer["total_ms"] / (result["total_ms"] + result["normalise_ms"]),
        "worker": rates[0] / rates[1],
    }
    return {**result, "torchvision": peer, "speedup": speedup}


def _load(paths: Sequence[Path], times: Times) -> Batch:
    samples = []
    for i, path in enumerate(paths):
        with _timed(times, "decode"):
            image = load_image(path)
        sample = Sample(
            image=image,
            boxes=torch.ones(BOXES_PER_IMAGE, 4),
            labels=torch.zeros(BOXES_PER_IMAGE, dtype=torch.int64),
            image_id=i,
            original_size=(image.shape[1], image.shape[2]),
        )
        with _timed(times, "resize"):
            size = resized_size(sample.original_size, short_side=SHORT_SIDE, long_side=LONG_SIDE)
            sample = resize_to(sample, size)
        if i % 2:
            with _timed(times, "flip"):
                sample = flip_horizontally(sample)
        samples.append(sample)
    with _timed(times, "collate"):
        return collate(samples)


def _load_like_torchvision(paths: Sequence[Path], times: Times, transform: GeneralizedRCNNTransform) -> None:
    images, targets = [], []
    for i, path in enumerate(paths):
        with _timed(times, "decode"):
            images.append(_decode_like_torchvision(path, flip=bool(i % 2)))
        targets.append({"boxes": torch.ones(BOXES_PER_IMAGE, 4)})
    with _timed(times, "transform"):
        transform(images, targets)


def _decode_like_torchvision(path: Path, *, flip: bool) -> Tensor:
    """As references/detection with its default backend: CocoDetection, RandomHorizontalFlip, PILToTensor, ToDtype."""
    image = Image.open(path).convert("RGB")
    image = tv.hflip(image) if flip else image
    return tv.convert_image_dtype(tv.pil_to_tensor(image), torch.float32)


class _TorchvisionDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """What a worker of torchvision's reference does, less the conversion of the annotations."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        target = {"boxes": torch.ones(BOXES_PER_IMAGE, 4), "labels": torch.zeros(BOXES_PER_IMAGE, dtype=torch.int64)}
        return _decode_like_torchvision(self.paths[index], flip=bool(index % 2)), target


def _worker_rates(paths: Sequence[Path], *, batch_size: int, num_batches: int) -> tuple[float, float]:
    """Images per second of processor time of one worker, ours and torchvision's."""
    with TemporaryDirectory() as folder:
        annotations = _annotate(paths, Path(folder))
    ours = make_loader(
        DetectionDataset(annotations, TrainTransform(short_sides=(SHORT_SIDE,), long_side=LONG_SIDE)),
        TrainSampler(annotations.sizes, batch_size=batch_size, seed=0),
        num_workers=1,
        pin_memory=False,
    )
    repeated = list(islice(cycle(paths), (num_batches + 10) * batch_size))
    theirs = DataLoader(_TorchvisionDataset(repeated), batch_size=batch_size, num_workers=1, collate_fn=_transpose)
    rates = []
    for loader in (ours, theirs):
        batches: Any = iter(loader)
        next(batches)
        [worker] = batches._workers
        start = _processor_seconds(worker.pid)
        for _ in islice(batches, num_batches):
            pass
        rates.append(batch_size * num_batches / (_processor_seconds(worker.pid) - start))
        del batches  # ends the worker
    return rates[0], rates[1]


def _processor_seconds(pid: int) -> float:
    """What a process has used, all threads together (Linux)."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def _transpose(samples: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(zip(*samples, strict=True))


def _annotate(paths: Sequence[Path], folder: Path) -> CocoAnnotations:
    """Annotations of these images, which lie in one folder, with a few boxes each."""
    entries = []
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            entries.append({"id": i, "file_name": path.name, "height": image.height, "width": image.width})
    boxes = [
        {"id": i, "image_id": i // BOXES_PER_IMAGE, "category_id": 1, "bbox": [1, 2, 30, 40]}
        for i in range(BOXES_PER_IMAGE * len(paths))
    ]
    content = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    file = folder / "annotations.json"
    file.write_text(json.dumps(content))
    return load_coco(file, paths[0].parent)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _timed(times: Times, name: str) -> Iterator[None]:
    start = time.thread_time()
    yield
    times[name].append(time.thread_time() - start)


# Annotations


def annotations(num_images: int = 118_000, num_boxes: int = 860_000) -> dict[str, float]:
    """Time and memory to open a data set of COCO's size, generated, with polygons, from files in the page cache.

    Returns:
        `file_mb`: the annotation file. `first_s`, `cached_s`: `load_coco` the first time, and from then on, in new
        processes. `first_peak_mb`, `cached_peak_mb`: the memory of those. `memory_mb`: what the annotations take.
        `workers_mb`: by how much ten workers that have read all annotations raise the memory in use;
        `workers_few_mb`: the same for 640 of the images, which is what ten such processes take themselves.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        file = folder / "annotations.json"
        _generate(file, folder / "images", num_images=num_images, num_boxes=num_boxes)
        first_s, first_peak_mb = _in_new_process(_open, folder)
        cached_s, cached_peak_mb = _in_new_process(_open, folder)
        memory_mb, workers_mb = _in_new_process(_read_with_workers, folder, num_images)
        _, workers_few_mb = _in_new_process(_read_with_workers, folder, 640)
        return {
            "file_mb": file.stat().st_size / 1e6,
            "first_s": first_s,
            "cached_s": cached_s,
            "first_peak_mb": first_peak_mb,
            "cached_peak_mb": cached_peak_mb,
            "memory_mb": memory_mb,
            "workers_mb": workers_mb,
            "workers_few_mb": workers_few_mb,
        }


def _generate(file: Path, folder: Path, *, num_images: int, num_boxes: int) -> None:
    """A file like COCO's, key by key, and an empty file per image: opening the data set decodes none."""
    rng = random.Random(0)
    sizes = [rng.choice([(480, 640), (427, 640), (640, 480)]) for _ in range(num_images)]
    polygon = ", ".join(f"{rng.uniform(0, 640):.2f}" for _ in range(48))
    with file.open("w") as out:
        categories = [{"supercategory": "thing", "id": i, "name": f"thing {i}"} for i in range(1, 81)]
        out.write(f'{{"info": {{"year": 2017}}, "licenses": [], "categories": {json.dumps(categories)}, "images": [')
        for i, (h, w) in enumerate(sizes):
            name = f"{i:012d}.jpg"
            (folder / name).touch()
            out.write(", " * (i > 0) + f'{{"license": 3, "file_name": "{name}", "height": {h}, "width": {w}, ')
            out.write(f'"coco_url": "http://images.cocodataset.org/train2017/{name}", "id": {i}}}')
        out.write('], "annotations": [')
        for i in range(num_boxes):
            image_id = rng.randrange(num_images)
            h, w = sizes[image_id]
            x, y = rng.uniform(0, w - 30), rng.uniform(0, h - 30)
            box = f"{x:.2f}, {y:.2f}, {rng.uniform(1, w - x):.2f}, {rng.uniform(1, h - y):.2f}"
            out.write(", " * (i > 0) + f'{{"segmentation": [[{polygon}]], "area": 702.1, "bbox": [{box}], ')
            out.write(f'"iscrowd": {int(i % 86 == 0)}, "image_id": {image_id}, ')
            out.write(f'"category_id": {rng.randrange(1, 81)}, "id": {i}}}')
        out.write("]}")


def _in_new_process(measure: Any, *arguments: Any) -> tuple[float, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, measure, *arguments).result()


def _measure(measure: Any, folder: Path, *arguments: Any) -> tuple[float, float]:
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    set_start_method("fork", force=True)  # of the workers, as usual on Linux
    torch.set_num_threads(1)
    return measure(folder, *arguments)


def _open(folder: Path) -> tuple[float, float]:
    """Seconds to open the data set, and the process' peak memory in MB."""
    start = time.perf_counter()
    load_coco(folder / "annotations.json", folder / "images")
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


class _WithoutPixels(DetectionDataset):
    """All that is read of the annotations, for images that do not exist."""

    def __getitem__(self, key: Key) -> Sample:
        index, _ = key
        h, w = self.annotations.sizes[index].tolist()
        boxes, labels = self.annotations.targets(index)
        assert self.annotations.path(index).suffix == ".jpg"
        return Sample(
            image=torch.zeros(3, 1, 1, dtype=torch.uint8),
            boxes=boxes,
            labels=labels,
            image_id=int(self.annotations.image_ids[index]),
            original_size=(h, w),
        )


def _read_with_workers(folder: Path, num_images: int) -> tuple[float, float]:
    """The annotations' size in MB, and what `NUM_WORKERS` workers that read these images' add to the memory in use."""
    data = load_coco(folder / "annotations.json", folder / "images")
    dataset = _WithoutPixels(data, TrainTransform(short_sides=(SHORT_SIDE,), long_side=LONG_SIDE))
    sampler = TestSampler(data.sizes[:num_images], batch_size=64)
    before = _proportional_mb(os.getpid())
    batches = iter(make_loader(dataset, sampler, num_workers=NUM_WORKERS, pin_memory=False))
    for _ in batches:
        pass
    pids = [os.getpid(), *(worker.pid for worker in batches._workers)]  # type: ignore[attr-defined]
    added = sum(_proportional_mb(pid) for pid in pids) - before
    return sum(getattr(data, name).nbytes for name in TENSORS) / 1e6, added


def _proportional_mb(pid: int) -> float:
    """Memory of a process, in which a page that k processes share counts 1/k."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3


if __name__ == "__main__":
    main()
