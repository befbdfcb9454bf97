"""Where a step spends its time on a GPU: how long it takes, how long the device is busy, with which kernels.

    python benchmarks/profile_step.py [--mode train] [--batch 16 2] [--precision bf16] [--frameworks torchvision]

The steps are those of bench.py, which compares; here the frameworks come one after the other. If the device is busy for
much less than a step takes, the host is what the step waits for: then fewer kernels count, not faster ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import roofline, steps
from benchmarks.steps import Case, Runner
from benchmarks.tables import table
from fpn_det.cli import count, user_errors
from fpn_det.structures import InputError

NUM_STEPS = 5


def main() -> None:
    """Read the command line, profile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", nargs="+", choices=["train", "predict"], default=["train", "predict"])
    parser.add_argument("--batch", nargs="+", type=count, default=[1, 16], help="images per step")
    parser.add_argument("--size", nargs=2, type=count, default=[800, 1333], metavar=("H", "W"))
    parser.add_argument("--body", choices=["resnet18", "resnet50"], default="resnet50")
    parser.add_argument("--precision", nargs="+", choices=["bf16", "tf32", "fp32"], default=["bf16"])
    parser.add_argument("--frameworks", nargs="+", choices=["fpn_det", "torchvision"], default=["fpn_det"])
    parser.add_argument("--kernels", type=count, default=20, help="how many to list")
    args = parser.parse_args()
    with user_errors():
        if not torch.cuda.is_available():
            raise InputError("PyTorch finds no NVIDIA GPU here; for CPUs there is train.py --profile")
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        height, width = args.size
        for mode in args.mode:
            for batch in args.batch:
                for precision in args.precision:
                    case = Case(mode, args.body, height, width, batch, precision)
                    for framework in args.frameworks:
                        profile(framework, case, num_kernels=args.kernels)


def profile(framework: str, case: Case, *, num_kernels: int) -> None:
    """Print what a step of a framework takes; torchvision is channels-last."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    roofline.set_tf32(steps.allows_tf32(case))
    runner = steps.ours(case, device) if framework == "fpn_det" else steps.torchvision(case, device, channels_last=True)
    runner.run(4)
    wall = sorted(seconds(runner) for _ in range(5))[2]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        runner.run(NUM_STEPS)
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in profiler.events() or []:
        if str(event.device_type) == "DeviceType.CUDA" and not event.is_user_annotation:
            times[event.name] += event.device_time
            counts[event.name] += 1
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"\n{framework}, {case.name}: {1e3 * wall:.1f} ms per step, {case.batch / wall:.1f} images/s; the device is "
        f"busy for {times.total() / NUM_STEPS / 1e3:.1f} ms, with {counts.total() / NUM_STEPS:.0f} kernels and copies; "
        f"peak {peak:.2f} GiB"
    )
    rows = [
        [f"{spent / NUM_STEPS / 1e3:.3f}", f"{counts[name] / NUM_STEPS:g}", name[:90]]
        for name, spent in times.most_common(num_kernels)
    ]
    print(table(["ms", "calls", "kernel"], rows))


def seconds(runner: Runner) -> float:
    """Of a step, on average over a few."""
    torch.cuda.synchronize()
    since = time.perf_counter()
    runner.run(NUM_STEPS)
    torch.cuda.synchronize()
    return (time.perf_counter() - since) / NUM_STEPS


if __name__ == "__main__":
    main()
