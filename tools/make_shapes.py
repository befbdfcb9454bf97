"""Generate the shapes data set, a small one in COCO format for trying everything out (seconds, no download).

python tools/make_shapes.py [--output data/shapes] [--seed 0] [--num-train 2000] [--num-val 200] [--size 128]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fpn_det.data.shapes import generate
from fpn_det.structures import InputError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for unusable input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/shapes"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another data set")
    parser.add_argument("--num-train", type=int, default=2000, help="images for training")
    parser.add_argument("--num-val", type=int, default=200, help="images for validation")
    parser.add_argument("--size", type=int, default=128, help="longer side of the images in pixels")
    given = parser.parse_args(arguments)
    try:
        generate(given.output, num_train=given.num_train, num_val=given.num_val, size=given.size, seed=given.seed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
