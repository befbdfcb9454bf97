"""What each part of the fast path gains: a training step with that part in its plain form, against the step as it is.

    python benchmarks/plain.py [--device cpu] [--body resnet50] [--size 480 640] [--batch 2] [--repeats 7]

The forms alternate step by step; medians are printed. tests/test_runtime.py shows that all compute the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import steps  # noqa: E402
from benchmarks.roofline import synchronize  # noqa: E402
from fpn_det.models import backbone, roi_head  # noqa: E402
from fpn_det.models.norms import activated  # noqa: E402
from fpn_det.models.roi_pool import MultiLevelRoIAlign  # noqa: E402
from fpn_det.models.rpn import RPNHead, UnsharedRPNHead  # noqa: E402


def pool_level_by_level(self: MultiLevelRoIAlign, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """torchvision's RoIAlign on the RoIs of each level."""
    level = self.assign_levels(boxes.flatten(0, 1))
    image = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
    rois = torch.cat([image[:, None], boxes.flatten(0, 1)], 1)
    pooled = rois.new_zeros(len(rois), features[0].shape[1], self.output_size, self.output_size)
    for i, stride in enumerate(self.strides):
        options = {"spatial_scale": 1 / stride, "sampling_ratio": self.sampling_ratio, "aligned": self.aligned}
        of_level = roi_align(features[i].float(), rois[level == i], output_size=self.output_size, **options)
        pooled[level == i] = of_level
    return pooled


def norm_after_convolution(
    conv: nn.Module, norm: nn.Module, x: Tensor, *, shortcut: Tensor | None = None, relu: bool = False
) -> Tensor:
    """The layers one after the other."""
    return activated(norm(conv(x)), shortcut, relu)


PLAIN_FORMS: dict[str, tuple[Any, str, Any]] = {
    "frozen norms after the convolutions": (backbone, "apply_conv_norm", norm_after_convolution),
    "RPN loss from the outputs of all anchors": (RPNHead, "at", UnsharedRPNHead.at),
    "torchvision's RoIAlign, level by level": (MultiLevelRoIAlign, "forward", pool_level_by_level),
    "first layer of the box head as a product": (roi_head, "linear_of_features", lambda fc, x: fc(x.flatten(1))),
}
"""Each part's plain form: where it belongs, the name there, and what to put in its place."""
SWITCHES_OFF = ("runtime.channels_last=false", "runtime.fused_optimizer=false")


@contextmanager
def plain(*names: str) -> Iterator[None]:
    """Within it, these parts have their plain forms; without names, all."""
    patches = [patch.object(*PLAIN_FORMS[name]) for name in names or PLAIN_FORMS]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def main() -> None:
    """Read the command line and print a table per precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--body", default="resnet50")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    for precision in ("fp32", "bf16"):
        height, width = args.size
        case = steps.Case("train", args.body, height, width, args.batch, precision)
        times = measure(case, torch.device(args.device), repeats=args.repeats)
        as_it_is = times["as it is"]
        print(f"\n{case.name}")
        for name, seconds in times.items():
            print(f"  {name:<45} {1e3 * seconds:7.0f} ms/step  {seconds / as_it_is:5.2f}x")


def measure(case: steps.Case, device: torch.device, *, repeats: int) -> dict[str, float]:
    """Median seconds of a step as it is, with each part in its plain form, and with all."""
    fast = steps.ours(case, device)
    runners = {switch: steps.ours(case, device, overrides=[switch]) for switch in SWITCHES_OFF}
    every = steps.ours(case, device, overrides=SWITCHES_OFF)
    samples: dict[str, list[float]] = {}

    def sample(name: str, runner: steps.Runner) -> None:
        synchronize(device)
        since = time.perf_counter()
        runner.run(1)
        synchronize(device)
        samples.setdefault(name, []).append(time.perf_counter() - since)

    for _ in range(repeats + 1):  # the first does not count
        sample("as it is", fast)
        for name in PLAIN_FORMS:
            with plain(name):
                sample(name, fast)
        for switch, runner in runners.items():
            sample(switch, runner)
        with plain():
            sample("all of them", every)
    return {name: statistics.median(seconds[1:]) for name, seconds in samples.items()}


if __name__ == "__main__":
    main()
