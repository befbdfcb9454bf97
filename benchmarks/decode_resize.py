"""Time per image of decoding and resizing, ours against the usual paths, on one thread and the same files.

    python benchmarks/decode_resize.py FOLDER [--short-side 800] [--long-side 1333]

The ways alternate image by image; the medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_tensor

from fpn_det.data.transforms import find_images, load_image, resized_size


def main() -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="RGB images")
    parser.add_argument("--short-side", type=int, default=800)
    parser.add_argument("--long-side", type=int, default=1333)
    args = parser.parse_args()
    torch.set_num_threads(1)

    def size_of(h: int, w: int) -> tuple[int, int]:
        return resized_size((h, w), short_side=args.short_side, long_side=args.long_side)

    def ours(path: Path) -> Tensor:
        image = load_image(path)
        return interpolate(image[None], size=size_of(*image.shape[1:]), mode="bilinear", antialias=True)[0]

    def pillow(path: Path) -> Tensor:
        image = Image.open(path).convert("RGB")
        h, w = size_of(image.height, image.width)
        return to_tensor(image.resize((w, h), Image.Resampling.BILINEAR))

    def float_interpolate(path: Path) -> Tensor:
        image = to_tensor(Image.open(path).convert("RGB"))
        return interpolate(image[None], size=size_of(*image.shape[1:]), mode="bilinear")[0]

    ways: dict[str, Callable[[Path], Tensor]] = {
        "fpn_det: uint8 tensor, antialiased": ours,
        "Pillow resize, then float": pillow,
        "Pillow, float, interpolate (torchvision)": float_interpolate,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for path in find_images(args.folder)[:200]:
        for name, way in ways.items():
            start = time.perf_counter()
            way(path)
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        print(f"{name:<42} {1e3 * statistics.median(times):7.2f} ms  x{statistics.median(times) / base:.2f}")


if __name__ == "__main__":
    main()
