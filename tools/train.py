"""Train a detector.

    python tools/train.py --config configs/r50_fpn.yaml [--output-dir D] [--resume] [--profile] [key=value ...]
    python tools/train.py --config configs/r50_fpn.yaml --overfit 8
    torchrun --nproc-per-node 8 tools/train.py --config configs/r50_fpn.yaml

Writes to runs/NAME (or D): config.yaml, data_report.json, log.txt, log.jsonl, tensorboard/, checkpoints,
predictions.json and metrics.json; diagnosis.json if training diverged. SIGINT and SIGTERM save a checkpoint and exit
with code 0; --resume goes on from the newest one that is whole. `torchrun --max-restarts N` goes on by itself when a
process is lost.

--overfit N is a check: it trains on the same N images until their AP exceeds 0.9 (exit code 0), or says which stage
fails, with numbers and the way out (exit code 1). It writes to runs/NAME_overfit.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

from fpn_det.cli import config_parser, user_errors
from fpn_det.config import dump_config, load_config
from fpn_det.engine.distributed import launched_process
from fpn_det.overfit import overfit, overrides
from fpn_det.run import run
from fpn_det.structures import InputError


def main() -> None:
    """Read the command line and train."""
    parser = config_parser(__doc__)
    parser.add_argument("--output-dir", type=Path, help="folder of the run (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    parser.add_argument(
        "--profile", action="store_true", help="profile ten steps: the top operators in the log, trace.json.gz"
    )
    parser.add_argument(
        "--overfit", type=int, metavar="N", help="train on N images until AP > 0.9, or say why that fails"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    args = parser.parse_intermixed_args()
    with user_errors():
        config = load_config(args.config, args.overrides)
        if args.overfit is not None:
            if args.overfit < 1:
                raise InputError(f"--overfit {args.overfit}: must be at least 1; 8 is common")
            if args.resume or args.profile:
                raise InputError("--overfit starts anew each time: leave out --resume and --profile")
            config = load_config(args.config, overrides(config, args.overfit, args.overrides))
        if args.print_config:
            print(dump_config(config), end="")
            return
        folder = args.output_dir or Path("runs") / config.name
        with launched_process(timeout=timedelta(minutes=config.runtime.timeout_minutes)) as process:
            if args.overfit is not None:
                folder = args.output_dir or folder.with_name(f"{folder.name}_overfit")
                sys.exit(0 if overfit(config, folder, num_images=args.overfit, process=process) else 1)
            run(config, folder, resume=args.resume, profile=args.profile, process=process)


if __name__ == "__main__":
    main()
