"""Proposals of a trained RPN for every image of a split, as a file for `model.kind: fast_rcnn`.

    python tools/proposals.py --config C --checkpoint K --split train|val --output FILE.npz
        [--top-k 1000] [key=value ...]
    torchrun --nproc-per-node 8 tools/proposals.py --config C --checkpoint K --split train --output FILE.npz

C and K are of a model of kind rpn or faster_rcnn. Images are resized as for detection, and each yields up to
`model.rpn.post_nms_top_k_test` proposals, best first. Then set data.train.proposals or data.val.proposals to FILE.
The FPN paper (Table 2) trains on 2000: add model.rpn.pre_nms_top_k_test=2000 model.rpn.post_nms_top_k_test=2000 for
the train split.

An image that cannot be read gets no proposals: standard error says which and why, and the exit code is 1.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from fpn_det import build
from fpn_det.cli import config_parser, count, say, user_errors
from fpn_det.config import Config, load_config
from fpn_det.data.loader import explain_unreadable
from fpn_det.data.proposals import ImageProposals, read_proposals, write_proposals
from fpn_det.engine.distributed import Process, launched_process
from fpn_det.engine.evaluate import propose
from fpn_det.structures import InputError, printable


def main() -> None:
    """Read the command line and propose."""
    parser = config_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights with an RPN")
    parser.add_argument("--split", choices=("train", "val"), required=True, help="which images")
    parser.add_argument("--output", type=Path, required=True, help="the file to write (.npz)")
    parser.add_argument("--top-k", type=count, help="proposals per image to keep (default: all that the model gives)")
    args = parser.parse_intermixed_args()
    with user_errors():
        config = load_config(args.config, args.overrides)
        with launched_process() as process:
            num_unreadable = run(config, args.checkpoint, args.split, args.output, top_k=args.top_k, process=process)
    sys.exit(1 if num_unreadable else 0)


def run(
    config: Config, checkpoint_path: Path, split: build.Split, output: Path, *, top_k: int | None, process: Process
) -> int:
    """Write the proposals of every image of `split` to `output` (collective).

    Returns:
        How many images could not be read, on the main process; 0 on the others.
    """
    if config.model.kind == "fast_rcnn":
        raise InputError("model.kind fast_rcnn has no RPN; give the config and checkpoint of an rpn or faster_rcnn")
    build.check_proposals(config, "train")
    build.check_proposals(config, "val")
    available = config.model.rpn.post_nms_top_k_test
    if top_k is not None and top_k > available:
        raise InputError(
            f"--top-k {top_k}: the model gives at most {available} proposals per image; add "
            f"model.rpn.post_nms_top_k_test={top_k}"
        )
    if output.is_dir():
        raise InputError(f"{output}: is a folder; --output is the file to write")
    output.parent.mkdir(parents=True, exist_ok=True)
    model, _ = build.load_detector(config, checkpoint_path, process.device)
    data = build.load_split(config, split)
    found: list[ImageProposals] = []
    unreadable: list[int] = []
    for batch, proposals in propose(
        model,
        build.build_val_loader(config, data, process=process),
        device=process.device,
        precision=config.train.precision,
        show_progress=process.is_main,
    ):
        process.doing("proposing")
        unreadable += batch.unreadable.tolist()
        for image_id, (h, w), (boxes, scores) in zip(
            batch.image_ids.tolist(), batch.original_sizes.tolist(), proposals, strict=True
        ):
            boxes, scores = boxes[:top_k], scores[:top_k]
            found.append(ImageProposals.encode(image_id=image_id, size=(h, w), boxes=boxes, scores=scores))
    gathered = process.gather((found, unreadable))
    if not process.is_main:
        return 0
    write_proposals(
        output,
        [image for of_process, _ in gathered for image in of_process],
        config=config.name,
        checkpoint_sha256=sha256(checkpoint_path),
    )
    say(read_proposals(output).summary())
    all_unreadable = sorted(image_id for _, of_process in gathered for image_id in of_process)
    for reason in explain_unreadable(data, all_unreadable):
        say(printable(reason), file=sys.stderr)
    return len(all_unreadable)


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
