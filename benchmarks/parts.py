"""Parts of a step by themselves: memory of matching at its largest, time of NMS on fixed shapes.

python benchmarks/parts.py
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fpn_det.models.matching import match
from fpn_det.models.nms import nms_per_level
from fpn_det.structures import Targets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matching_memory(num_gt: int = 3000, num_anchors: int = 270_000) -> dict[str, float]:
    """Most memory beyond the inputs, and seconds, of matching one image on one thread; in a fresh process.

    Returns:
        `gt`, `anchors`, `peak_mb` (MiB), `seconds` (the process's first call).
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_matching_memory, (num_gt, num_anchors))


def _matching_memory(num_gt: int, num_anchors: int) -> dict[str, float]:
    torch.set_num_threads(1)
    boxes = _random_boxes(num_anchors)
    labels, valid = torch.zeros(1, num_gt, dtype=torch.int64), torch.ones(1, num_gt, dtype=torch.bool)
    targets = Targets(boxes=_random_boxes(num_gt)[None], labels=labels, valid=valid).to(DEVICE)
    match(boxes[:10], targets)  # what the first call of any size allocates
    before = _most_memory()
    start = time.perf_counter()
    match(boxes, targets)
    _wait()
    seconds = time.perf_counter() - start
    return {"gt": num_gt, "anchors": num_anchors, "peak_mb": round(_most_memory() - before, 1), "seconds": seconds}


def nms_times(
    batch_size: int = 2, level_sizes: tuple[int, ...] = (2000, 2000, 2000, 2000, 819), repeats: int = 5
) -> dict[str, float]:
    """Median milliseconds for a batch of NMS per level, the two implementations in turn, on the current device.

    Returns:
        `torchvision_ms` (a call per image and level), `fixed_shape_ms`, and `ratio`, the first over the second.
    """
    boxes = torch.stack([_random_boxes(sum(level_sizes)) for _ in range(batch_size)])
    scores = torch.rand(batch_size, sum(level_sizes), device=DEVICE)
    scores = torch.cat([x.sort(dim=1, descending=True).values for x in scores.split(list(level_sizes), dim=1)], dim=1)
    valid = torch.ones_like(scores, dtype=torch.bool)

    def run(fixed_shape: bool) -> Callable[[], object]:
        return lambda: nms_per_level(
            boxes, scores, valid, level_sizes=level_sizes, iou_thresh=0.7, top_k=1000, fixed_shape=fixed_shape
        )

    one_by_one, at_once = _medians(run(False), run(True), repeats=repeats)
    return {"torchvision_ms": one_by_one, "fixed_shape_ms": at_once, "ratio": one_by_one / at_once}


def _random_boxes(num: int) -> Tensor:
    """(num, 4) of 8 to 300 pixels in 800 x 1333, around a tenth as many centres."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.rand(num // 10 + 1, 2, generator=generator) * torch.tensor([1333.0, 800.0])
    center = centers[torch.randint(len(centers), (num,), generator=generator)]
    center = center + 4 * torch.randn(num, 2, generator=generator)
    half = 4 + 146 * torch.rand(num, 2, generator=generator)
    return torch.cat([center - half, center + half], dim=1).to(DEVICE)


def _medians(*functions: Callable[[], object], repeats: int) -> list[float]:
    """Median milliseconds of each, in turn; the first round does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, taken in zip(functions, times, strict=True):
            _wait()
            start = time.perf_counter()
            function()
            _wait()
            taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken[1:]) for taken in times]


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _most_memory() -> float:
    """MiB, the most that this process ever held: on the device, or resident."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    """Print both as JSON."""
    torch.set_num_threads(1)
    print(json.dumps({"device": str(DEVICE), "matching": matching_memory(), "nms": nms_times()}, indent=2))


if __name__ == "__main__":
    main()
