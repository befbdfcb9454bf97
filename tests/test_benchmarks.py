"""benchmarks/bench.py: that it runs and writes, that its contenders do the same work, and that it counts right."""

from __future__ import annotations

import json
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import steps, tables  # noqa: E402
from benchmarks.roofline import OPTIMIZER, Counter  # noqa: E402
from fpn_det.structures import InputError  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run the script with these arguments; returns what it printed."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cpu", "--tiny", *map(str, arguments)])
        runpy.run_path(str(ROOT / "benchmarks/bench.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.soak
def test_tiny_run_writes_everything_and_survives_what_fails(bench, tmp_path):
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    output = tmp_path / "results"
    out = bench("--output", output, "--markdown", document, "--repeats", 2, "--variants", "eager$|n$|2$")
    [file] = output.glob("*.json")
    results = json.loads(file.read_text())
    assert {case["mode"] for case in results["cases"].values()} == {"train", "predict", "loop"}
    for case in results["cases"].values():
        for variant in ("fpn_det eager", "torchvision"):
            row = case["variants"][variant]
            assert 0 < row["quartiles_s"][0] <= row["median_s"] <= row["quartiles_s"][1]
            assert row["tflops"] == pytest.approx(row["gflop"] / row["median_s"] / 1e3)
    assert results["parts"].keys() == {"roofline", "scaling"}
    if not find_spec("detectron2"):
        assert "detectron2 in 2 cases: ModuleNotFoundError: No module named 'detectron2'" in out
    assert "| train resnet18 64x96 batch 1 fp32 " in out
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| train resnet18 64x96 batch 1 fp32 " in text


def test_no_time_left_is_said_and_the_next_run_adds_to_the_file(bench, tmp_path):
    arguments = ["--output", tmp_path, "--repeats", 2, "--variants", "^torchvision$", "--parts", "cases"]
    bench(*arguments, "--minutes", 0)
    [file] = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    assert results["cases"] == {}
    assert results["not_measured"]["train resnet18 64x96 batch 1 fp32"].startswith("TimeoutError")
    bench(*arguments, "--cases", "train")
    bench(*arguments, "--cases", "predict")
    results = json.loads(file.read_text())
    assert [case.split()[0] for case in results["cases"]] == ["train", "predict"]
    assert len(results["not_measured"]) == 1  # the loop


@pytest.mark.parametrize("mode", ["train", "predict"])
def test_contenders_do_the_same_work(mode):
    case = steps.Case(mode, "resnet18", 64, 96, 2, "fp32", num_gt=4, num_proposals=100)
    flops = {}
    for build in (steps.ours, steps.torchvision):
        runner = build(case, CPU)
        with Counter() as counter:
            runner.run(1)
        flops[build.__name__] = sum(counter.flops.values())
    assert flops["ours"] == pytest.approx(flops["torchvision"], rel=0.05)


def test_weights_are_shared_and_make_boxes_compete():
    case = steps.Case("predict", "resnet18", 128, 160, 1, "fp32")
    batch = steps.make_batch(case)
    theirs = steps.torchvision_model(case, min_size=128, max_size=160).eval()
    with torch.no_grad():
        [found] = theirs([batch.images[0, :, :128, :160] / 255])
    [ours] = steps.our_model(steps.config_of(case), case, CPU).predict(batch)
    assert 10 < len(found["boxes"]) <= 100
    assert len(ours) == pytest.approx(len(found["boxes"]), rel=0.3)


def test_flops_and_bytes_of_a_convolution_and_a_linear_layer_are_the_analytic_ones():
    class Detector(nn.Module):
        """Two parts by the names that ours have."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.roi_head = nn.Linear(8, 5, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.roi_head(self.backbone(x).mean(dim=(2, 3)))

    model, images = Detector(), torch.randn(2, 3, 10, 12)
    with torch.no_grad(), Counter() as forward:
        model(images)
    conv, linear = 2 * (2 * 8 * 10 * 12) * (3 * 3 * 3), 2 * 2 * 5 * 8
    assert dict(forward.flops) == {"body": conv, "box head": linear}
    assert forward.bytes["body"] == 4 * (2 * 3 * 10 * 12 + 8 * 3 * 3 * 3 + 2 * 8 * 10 * 12)
    assert forward.bytes["box head"] == 4 * (2 * 8 + 5 * 8 + 2 * 5)  # the transposed weight is a view

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    with Counter() as step:
        model(images.requires_grad_()).sum().backward()
        optimizer.step()
    assert dict(step.flops) == {"body": 3 * conv, "box head": 3 * linear}
    num_weights = sum(p.numel() for p in model.parameters())
    assert step.bytes[OPTIMIZER] >= 4 * 3 * num_weights  # p and its gradient are read, p is written


def test_ratios_are_those_to_the_fastest_of_torchvision():
    seconds = {"torchvision": 2.0, "torchvision compiled": 1.0, "fpn_det eager": 0.5}
    case = {"batch": 4, "variants": {variant: {"median_s": s} for variant, s in seconds.items()}}
    row = tables.summary({"some case": case}).split("\n")[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["some case", "4 (compiled)", "8 **2.00x**"]


def test_document_without_markers_is_refused(tmp_path):
    path = tmp_path / "other.md"
    path.write_text("text")
    with pytest.raises(InputError, match=r"other\.md: needs the lines"):
        tables.write_markdown(path, tmp_path)
    assert path.read_text() == "text"


def test_kernels_are_on_while_a_setting_of_theirs_runs(monkeypatch) -> None:
    monkeypatch.delenv("FPN_DET_TRITON", raising=False)
    seen = []
    steps.with_kernels(lambda n: seen.append((n, os.environ["FPN_DET_TRITON"])))(3)
    assert seen == [(3, "1")]
    assert "FPN_DET_TRITON" not in os.environ
