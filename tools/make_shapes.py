"""Generate the shapes data set, a small one in COCO format for trying everything out (seconds, no download).

python tools/make_shapes.py [--output data/shapes] [--seed 0] [--num-train 2000] [--num-val 200] [--size 128]
        [--smallest 18] [--distractors 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fpn_det.cli import user_errors
from fpn_det.data.shapes import SMALLEST_PX, generate


def main() -> None:
    """Read the command line and generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/shapes"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another data set")
    parser.add_argument("--num-train", type=int, default=2000, help="images for training")
    parser.add_argument("--num-val", type=int, default=200, help="images for validation")
    parser.add_argument("--size", type=int, default=128, help="longer side of the images in pixels")
    parser.add_argument(
        "--smallest", type=int, default=SMALLEST_PX, help="longest side of the smallest shape in pixels"
    )
    parser.add_argument("--distractors", type=int, default=0, help="most shapes per image that belong to no category")
    args = parser.parse_args()
    with user_errors():
        generate(
            args.output,
            num_train=args.num_train,
            num_val=args.num_val,
            size=args.size,
            smallest=args.smallest,
            distractors=args.distractors,
            seed=args.seed,
        )


if __name__ == "__main__":
    main()
