"""The benchmark of fpn_det against torchvision, and Detectron2 where it can be imported, on identical work.

    python benchmarks/bench.py [--device cuda] [--quick] [--minutes 9] [--markdown docs/performance.md]
    python benchmarks/bench.py --cases "train resnet50 480x640 batch 2" --variants "eager|torchvision" --parts cases
    python benchmarks/bench.py --parts --markdown docs/performance.md      (measures nothing, writes the tables anew)

The settings of a case alternate, block by block of steps, within one process; medians and quartiles are kept. What a
step is says benchmarks/steps.py. Results go to a JSON file per device; a case that is measured again replaces what the
file says of it. What fails or is left out is named with the reason, and the rest goes on. Compilation starts from an
empty cache, so that the time of a first step is what a user waits for.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import loop, roofline, steps, tables  # noqa: E402
from benchmarks.roofline import synchronize  # noqa: E402
from benchmarks.steps import Case, Runner  # noqa: E402
from fpn_det.cli import user_errors  # noqa: E402
from fpn_det.structures import InputError  # noqa: E402

EAGER, COMPILED = "runtime.compile=false", "runtime.compile=true"
AS_TORCHVISION = ("model.roi_head.sampling_ratio=2", "model.roi_head.aligned=false")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fpn_det eager": ("ours", {"overrides": (EAGER,)}),
    "fpn_det eager, Triton": ("ours", {"overrides": (EAGER,), "triton": True}),
    "fpn_det compiled": ("ours", {"overrides": (COMPILED,)}),
    "RoIAlign as torchvision's: fpn_det eager": ("ours", {"overrides": (EAGER, *AS_TORCHVISION)}),
    "torchvision": ("torchvision", {}),
    "torchvision channels_last": ("torchvision", {"channels_last": True}),
    "torchvision compiled": ("torchvision", {"compiled": True}),
    "torchvision channels_last compiled": ("torchvision", {"channels_last": True, "compiled": True}),
    "detectron2": ("detectron2", {}),
}
"""Function of steps.py, or of loop.py for cases of mode `loop`, and its settings."""
COUNTED = ("torchvision", "fpn_det eager")
"""The first of these that runs is the one whose FLOPs are counted, once for all variants of a case."""
CPU_MEGAPIXELS = 2.2
"""Larger batches take minutes per step on a CPU; they are measured if `--cases` names them."""
ELSEWHERE = {  # part: module and function of another file of this folder
    "loader": ("data", "loader_breakdown"),
    "annotations": ("data", "annotations"),
    "evaluator": ("evaluator", "evaluator"),
    "matching": ("parts", "matching_memory"),
    "nms": ("parts", "nms_times"),
}
PARTS = ["cases", "roofline", "scaling", *ELSEWHERE]


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="by default all; none only writes tables anew")
    parser.add_argument(
        "--cases", type=pattern, help="regular expression of case names; by default all that the device can do"
    )
    parser.add_argument("--variants", type=pattern, default="", help="regular expression of settings")
    parser.add_argument("--quick", action="store_true", help="one size and batch, 3 repeats")
    parser.add_argument("--tiny", action="store_true", help="images of 64 pixels, to see that it runs")
    parser.add_argument("--repeats", type=int, help="blocks of steps per setting (default: 7; 3 with --quick)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop in order after so long")
    parser.add_argument("--memory", action="store_true", help="CPU: peak memory too, in a process per setting")
    parser.add_argument("--images", type=Path, help="folder of images for the loader (default: generated)")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the JSON files")
    parser.add_argument("--markdown", type=Path, help="document whose tables are written anew")
    parser.add_argument("--peak-of", nargs=2, metavar=("CASE", "SETTING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    with user_errors():
        if args.device != "cpu" and not torch.cuda.is_available():
            raise InputError(f"--device {args.device}: PyTorch finds no NVIDIA GPU here; use cpu")
        if args.markdown:
            tables.read_document(args.markdown)  # refused now rather than after an hour
        if args.peak_of:
            print(peak_resident(Case(**json.loads(args.peak_of[0])), args.peak_of[1]))
            return
        if args.parts != []:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
                bench = Bench(args)
                bench.run()
            print(tables.report(bench.results))
            print(f"\nwritten: {bench.path}")
        if args.markdown:
            tables.write_markdown(args.markdown, args.output)
            print(f"written: {args.markdown}")


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression, or an error that argparse reports."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r}: not a regular expression: {error}") from error


class Bench:
    """One run: the options, the clock, and the results, which are saved after each case and part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        self.deadline = time.monotonic() + 60 * args.minutes
        self.repeats = args.repeats or (3 if args.quick or args.tiny else 7)
        here = [name for name, (_, settings) in VARIANTS.items() if self.cuda or not settings.get("triton")]
        self.variants = [name for name in here if re.search(args.variants, name)]
        if not self.variants:
            raise InputError(f"--variants {args.variants.pattern}: matches none of {', '.join(here)}")
        self.stamp = {"commit": args.commit or commit(), "date": datetime.date.today().isoformat()}
        about = describe(self.device)
        self.path = args.output / (re.sub(r"\W+", "_", about["name"]).strip("_").lower() + ".json")
        self.results: dict[str, Any] = {"device": about, "ceilings": {}, "cases": {}, "parts": {}, "not_measured": {}}
        if self.path.exists():
            self.results = json.loads(self.path.read_text(encoding="utf-8"))
            if self.results["device"] != about:
                raise InputError(
                    f"{self.path}: holds results of {self.results['device']}, this is {about}; move it away"
                )

    def run(self) -> None:
        """Measure all parts that were asked for, in the order of `PARTS`."""
        self.results["ceilings"] = roofline.ceilings(self.device, tiny=self.args.tiny)
        own = {"roofline": self.measure_roofline, "scaling": self.measure_scaling}
        for part in self.args.parts or (PARTS[:3] if self.args.tiny else PARTS):
            if part == "cases":
                self.measure_cases()
                self.save()
                continue
            try:
                self.check_time()
                self.results["parts"][part] = own[part]() if part in own else self.measure_elsewhere(part)
                self.results["not_measured"].pop(part, None)
            except Exception as error:
                self.leave_out(part, one_line(error))
            self.save()

    def check_time(self) -> None:
        """Raise an error if the time that `--minutes` gives is over."""
        if time.monotonic() > self.deadline:
            raise TimeoutError(f"the {self.args.minutes:g} minutes were over")

    def leave_out(self, what: str, why: str) -> None:
        """Note what is missing in the results."""
        self.results["not_measured"][what] = why

    def save(self) -> None:
        """Write the results so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    # --- training and inference ---

    def measure_cases(self) -> None:
        """All cases, the most telling first."""
        for case in (progress := tqdm(self.cases(), disable=None)):
            progress.set_description(case.name)
            try:
                self.check_time()
            except TimeoutError as error:
                self.leave_out(case.name, one_line(error))
                continue
            rows = self.measure(case, self.contenders(case))
            self.results["cases"][case.name] = {**asdict(case), **self.stamp, "variants": rows}
            self.results["not_measured"].pop(case.name, None)
            self.save()

    def all_cases(self) -> list[Case]:
        """What there is, the most telling first: on a GPU, inference of one image, training of many."""
        if self.args.tiny:
            return [Case(mode, "resnet18", 64, 96, 1, "fp32", 4, 20) for mode in ("train", "predict", "loop")]
        sizes, batches, precisions = [(480, 640), (800, 1333)], [2, 1, 16], ["fp32", "bf16"]
        if self.cuda:
            sizes, batches, precisions = sizes[::-1], [16, 1, 2], ["bf16", "tf32", "fp32"]
        modes, bodies = ("train", "predict"), ("resnet50", "resnet18")
        every = [
            Case(mode, body, *size, batch, precision)
            for mode, body, size, batch, precision in itertools.product(modes, bodies, sizes, batches, precisions)
        ]
        if self.cuda:
            every.append(Case("loop", "resnet50", 800, 1333, 16, "bf16"))
        every.sort(
            key=lambda case: (
                sizes.index((case.height, case.width)),
                not self.is_typical(case),
                bodies.index(case.body),
                precisions.index(case.precision),
                batches.index(case.batch),
            )
        )
        return every

    def is_typical(self, case: Case) -> bool:
        """Of the batch that users have."""
        return case.batch == (2 if not self.cuda else 1 if case.mode == "predict" else 16)

    def cases(self) -> list[Case]:
        """What is to be measured of it."""
        every = self.all_cases()
        if self.args.cases:
            if not (named := [case for case in every if self.args.cases.search(case.name)]):
                raise InputError(f"--cases {self.args.cases.pattern}: matches none, such as {every[0].name!r}")
            return named
        if self.args.quick:
            return [case for case in every if self.is_typical(case) and case.height == every[0].height]
        if self.cuda or self.args.tiny:
            return every
        few = [case for case in every if case.batch * case.height * case.width <= 1e6 * CPU_MEGAPIXELS]
        large = sorted({f"{case.height}x{case.width} batch {case.batch}" for case in every if case not in few})
        self.leave_out(", ".join(large), f"more than {CPU_MEGAPIXELS} megapixels per step take minutes on a CPU")
        self.leave_out("training from files", "left to GPUs: on a CPU a step takes a hundred times what loading does")
        return few

    def contenders(self, case: Case) -> list[str]:
        """The settings to measure; training from files has the fastest of each framework, if they are known."""
        if case.mode != "loop":
            return self.variants
        same = self.results["cases"].get(replace(case, mode="train").name, {"variants": {}})
        fastest = [tables.best_of(same, framework)[0] for framework in ("fpn_det", "torchvision")]
        return fastest if all(fastest) else [name for name in self.variants if name != "detectron2"]

    def measure(self, case: Case, variants: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Seconds, FLOP/s, memory, synchronisations and kernels of a step of each variant, or the error."""
        torch._dynamo.reset()
        clear_memory()
        roofline.set_tf32(steps.allows_tf32(case))
        rows: dict[str, dict[str, Any]] = {name: {} for name in variants}
        samples: dict[str, list[float]] = {name: [] for name in variants}
        runners: dict[str, Runner] = {}

        def attempt(work: Callable[[str], None], name: str) -> None:
            try:
                work(name)
                return
            except Exception as error:
                rows[name] = {"error": one_line(error)}
            runners.pop(name, None)
            clear_memory()

        def start(name: str) -> None:
            self.check_time()
            runners[name] = build_runner(name, case, self.device)
            rows[name]["first_s"] = self.seconds(runners[name], 1)
            runners[name].run(2)

        # A GPU is fed ahead within a block, as in training; what loaders read while others were at work is used up.
        block, unmeasured = (20, 20) if self.cuda and case.mode == "loop" else (5 if self.cuda else 1, 0)

        def sample(name: str) -> None:
            runners[name].run(unmeasured)
            samples[name].append(self.seconds(runners[name], block) / block)
            rows[name]["data_wait"] = runners[name].data_wait

        for name in variants:
            attempt(start, name)
        for repeat in range(self.repeats):
            if repeat >= 2 and time.monotonic() > self.deadline:
                break
            for name in list(runners)[:: 1 if repeat % 2 == 0 else -1]:
                attempt(sample, name)

        flops, ceiling = count_flops(runners), self.results["ceilings"][case.precision]
        for name, runner in runners.items():
            row = rows[name]
            low, median, high = np.percentile(samples[name], [25, 50, 75]).tolist()
            row |= {"median_s": median, "quartiles_s": [low, high], "blocks": len(samples[name]), "steps": block}
            if flops:
                tflops = flops / 1e12 / median
                row |= {"gflop": flops / 1e9, "tflops": tflops, "of_ceiling": tflops / ceiling}
            try:
                if self.cuda:
                    row |= cuda_details(runner)
                elif self.args.memory and case.mode != "loop":
                    row["peak_gib"] = self.peak_in_process(case, name)
            except Exception as error:
                self.leave_out(f"{case.name}, {name}: memory, synchronisations, kernels", one_line(error))
        return rows

    def seconds(self, runner: Runner, num_steps: int) -> float:
        """Time of so many steps, until the device is done."""
        synchronize(self.device)
        since = time.perf_counter()
        runner.run(num_steps)
        synchronize(self.device)
        return time.perf_counter() - since

    def peak_in_process(self, case: Case, variant: str) -> float:
        """Peak memory of a step on the CPU, of a fresh process, in GiB."""
        command = [sys.executable, __file__, "--device", "cpu", "--peak-of", json.dumps(asdict(case)), variant]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(ended.stdout.split()[-1]) / 2**30

    # --- the other parts ---

    def measure_roofline(self) -> dict[str, Any]:
        """FLOPs and bytes of our training step by part, and the least time that they take here."""
        tiny = self.args.tiny
        size, batch = ((64, 96), 1) if tiny else ((800, 1333), 16) if self.cuda else ((480, 640), 2)
        found = {}
        for precision in ("fp32", "bf16"):
            case = Case("train", "resnet18" if tiny else "resnet50", *size, batch, precision)
            runner = build_runner("fpn_det eager", case, self.device)
            runner.run(1)
            with roofline.Counter() as counter:
                runner.run(1)
            peak, bandwidth = self.results["ceilings"][case.precision], self.results["ceilings"]["GB/s"]
            parts = {
                part: {
                    "gflop": counter.flops[part] / 1e9,
                    "gbyte": counter.bytes[part] / 1e9,
                    "compute_ms": counter.flops[part] / peak / 1e9,
                    "memory_ms": counter.bytes[part] / bandwidth / 1e6,
                }
                for part in sorted(counter.bytes, key=lambda part: -counter.flops[part])
            }
            rows = self.results["cases"].get(case.name, {}).get("variants", {})
            measured = {v: r["median_s"] for v, r in rows.items() if v.startswith("fpn_det") and "median_s" in r}
            found[case.name] = {"parts": parts, "measured_s": measured}
            clear_memory()
        return found

    def measure_scaling(self) -> dict[str, Any]:
        """Seconds per training step, one quantity of the case at a time."""
        base, sides = Case("train", "resnet18", 320, 320, 2, "fp32"), [160, 320, 480, 640]
        if self.cuda:
            base, sides = replace(base, height=800, width=800, batch=4, precision="bf16"), [400, 800, 1200, 1600]
        batches, proposals, gts = [1, 2, 4, 8], [250, 500, 1000, 2000], [1, 10, 100, 500]
        if self.args.tiny:
            base, sides = replace(base, height=64, width=64, batch=1, num_proposals=20), [32, 64]
            batches, proposals, gts = [1, 2], [20], [8]
        axes = {
            "image side": [(side, replace(base, height=side, width=side)) for side in sides],
            "batch": [(batch, replace(base, batch=batch)) for batch in batches],
            "proposals": [(count, replace(base, num_proposals=count)) for count in proposals],
            "gt per image": [(count, replace(base, num_gt=count)) for count in gts],
        }
        found: dict[str, Any] = {"base": base.name, **self.stamp, "axes": {}}
        for axis, points in axes.items():
            found["axes"][axis] = []
            for value, case in points:
                rows = self.measure(case, ["fpn_det eager", "torchvision"])
                seconds = {variant: row.get("median_s") for variant, row in rows.items()}
                found["axes"][axis].append({"value": value, "seconds": seconds})
                for variant, row in rows.items():
                    if "error" in row:
                        self.leave_out(f"scaling, {axis} {value}, {variant}", row["error"])
        return found

    def measure_elsewhere(self, part: str) -> dict[str, Any]:
        """What another file of this folder measures; in a process of its own, because this one has grown."""
        file, function = ELSEWHERE[part]
        folder = [str(self.args.images or loop.write_files(480, 640, 8))] if part == "loader" else []
        code = f"from benchmarks.{file} import {function} as f; print(json.dumps(f(*map(pathlib.Path, sys.argv[1:]))))"
        command = [sys.executable, "-c", f"import json, pathlib, sys; {code}", *folder]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode != 0:
            raise RuntimeError(ended.stderr.strip().rpartition("\n")[2])
        measured: dict[str, Any] = json.loads(ended.stdout.strip().rpartition("\n")[2])
        return {**measured, **self.stamp}


def build_runner(variant: str, case: Case, device: torch.device) -> Runner:
    """A framework with its settings, ready for steps of the case."""
    framework, settings = VARIANTS[variant]
    runner: Runner = getattr(loop if case.mode == "loop" else steps, framework)(case, device, **settings)
    return runner


def count_flops(runners: dict[str, Runner]) -> int:
    """FLOPs of a step of an eager runner; 0 if there is none."""
    for name in COUNTED:
        if name in runners:
            with roofline.Counter() as counter:
                runners[name].run(1)
            return sum(counter.flops.values())
    return 0


def cuda_details(runner: Runner) -> dict[str, Any]:
    """Peak memory as if the runner were alone, host synchronisations and kernels of one step."""
    if runner.optimizer is not None:
        runner.optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner.run(1)
    peak = torch.cuda.max_memory_allocated() - before + runner.static_bytes()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runner.run(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        runner.run(1)
        torch.cuda.synchronize()
    on_device = [
        e.name for e in profiler.events() if str(e.device_type) == "DeviceType.CUDA" and not e.is_user_annotation
    ]
    return {
        "peak_gib": peak / 2**30,
        "syncs": sum("synchronizing CUDA operation" in str(warning.message) for warning in caught),
        "kernels": sum(not name.startswith(("Memcpy", "Memset")) for name in on_device),
    }


def peak_resident(case: Case, variant: str) -> int:
    """Bytes that a step of this process takes at its peak beyond those of the interpreter and libraries (Linux)."""

    def resident(key: str) -> int:
        return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]

    before = resident("VmRSS")
    runner = build_runner(variant, case, torch.device("cpu"))
    runner.run(1)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    runner.run(1)
    return resident("VmHWM") - before


def clear_memory() -> None:
    """Give back what nobody refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    """An error in a line of a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    about: dict[str, Any] = {"name": f"{cpu}, {torch.get_num_threads()} threads"}
    if device.type == "cuda":
        cudnn = torch.backends.cudnn.version()
        about = {"name": torch.cuda.get_device_name(device), "CUDA": torch.version.cuda, "cuDNN": cudnn, "CPU": cpu}
    about |= {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "Python": platform.python_version()}
    for package in ("torch", "torchvision", "fpn_det"):
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = "not installed"
    if find_spec("detectron2"):
        about["detectron2"] = getattr(importlib.import_module("detectron2"), "__version__", "of unknown version")
    return about


def commit() -> str:
    """The commit of this working tree, marked if files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    main()
