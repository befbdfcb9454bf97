"""tools/export.py: files that are the detector, and none where they would not be."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import onnx
import onnxruntime
import pytest
import torch
from torch.torch_version import TorchVersion

from fpn_det import build
from fpn_det.config import load_config
from fpn_det.data.loader import collate
from fpn_det.data.shapes import CATEGORIES
from fpn_det.data.transforms import load_image
from fpn_det.engine.evaluate import detect
from fpn_det.export.graph import DetectorGraph
from fpn_det.structures import Sample

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "docs/export_example.py"

ODD = (  # what imported weights need: the operators of ONNX that the standard detector does not use
    *("model.roi_head.aligned=false", "model.roi_head.sampling_ratio=2", "model.roi_head.min_size=none"),
    *("model.roi_head.class_agnostic=true", "model.roi_head.background_rows=2", "model.anchors.rounded=true"),
    *("model.anchors.inferred_strides=true", "model.delta_clamp=both", "data.resize=pillow"),
    *("data.test_short_side=80", "data.long_side=96", "model.roi_head.score_thresh=0.01"),
)


@pytest.fixture(scope="module")
def overrides(tiny, shapes) -> list[str]:
    """Of `tiny` with every odd convention; the 24 images of the training split are those of the check."""
    val = [f"data.val.images={shapes / 'train'}", f"data.val.annotations={shapes / 'annotations/train.json'}"]
    return [*tiny[2:], *ODD, *val]


@pytest.fixture(scope="module")
def trained(tool, tiny, overrides, tmp_path_factory) -> Path:
    """Checkpoint of a detector after 8 steps."""
    folder = tmp_path_factory.mktemp("runs") / "odd"
    outcome = tool("train", *tiny[:2], *overrides, "--output-dir", folder)
    assert (outcome.code, outcome.err) == (0, "")
    return folder / "final.pth"


@pytest.fixture(scope="module")
def onnx_file(tool, trained, tmp_path_factory) -> tuple[Path, str]:
    """The exported file, and what the tool printed."""
    path = tmp_path_factory.mktemp("exported") / "new" / "detector.onnx"
    outcome = tool("export", "--checkpoint", trained, "--format", "onnx", "--output", path)
    assert (outcome.code, outcome.err) == (0, "")
    return path, outcome.out


def test_the_file_says_what_it_is_and_how_it_was_checked(onnx_file, trained, shapes) -> None:
    path, printed = onnx_file
    proto = onnx.load(path)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    names = [category["name"] for category in json.loads(metadata["categories"])]
    assert names == list(CATEGORIES)
    assert json.loads(metadata["checkpoint"])["sha256"] == hashlib.sha256(trained.read_bytes()).hexdigest()
    assert json.loads(metadata["score_thresh"]) == 0.01
    assert json.loads(metadata["resize"]) == {"short_side": 80, "long_side": 96, "kind": "pillow"}
    assert "uint8" in metadata["input"]
    check = json.loads(metadata["check"])
    assert check["num_images"] == 24
    assert check["num_detections"] > 24
    assert check["max_box_difference_px"] < 0.1
    assert check["max_score_difference"] < 1e-3
    assert abs(check["file_AP"] - check["detector_AP"]) <= 1e-3
    assert check["detector_ms"] > 0 < check["file_ms"]
    for text in (f"{check['num_detections']}", f"{check['max_box_difference_px']:.2g} at most", "AP", "ms per image"):
        assert text in printed
    assert str(path) in printed
    assert {node.domain for node in proto.graph.node} == {""}  # nothing but standard operators
    assert str(ROOT).encode() not in path.read_bytes()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(v.name, v.shape) for v in session.get_inputs()] == [("images", ["num_images", 3, "height", "width"])]


def test_the_example_finds_what_the_detector_finds_without_this_package(
    onnx_file, trained, tiny, overrides, shapes, tmp_path
) -> None:
    path, _ = onnx_file
    photo = sorted((shapes / "val").iterdir())[0]
    blocked = f"""
import runpy, sys
for name in ("fpn_det", "torch", "torchvision"):
    sys.modules[name] = None
example = runpy.run_path({str(EXAMPLE)!r})
example["main"].__globals__["MIN_SCORE"] = 0.01
example["main"]({str(path)!r}, {str(photo)!r}, {str(tmp_path / "found.png")!r})
"""
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]

    config = load_config(Path(tiny[1]), overrides)
    model, state = build.load_detector(config, trained, torch.device("cpu"))
    sample = Sample.to_detect_in(load_image(photo))
    batch = collate([build.build_test_transform(config)(sample, Random(0))])
    [(_, [expected])] = detect(model, [batch], device=torch.device("cpu"), precision="fp32", show_progress=False)
    names = [category["name"] for category in state["categories"]]
    assert [name for name, *_ in found] == [names[label] for label in expected.labels]
    assert len(found) > 3
    numbers = torch.tensor([[float(x) for x in numbers] for _, *numbers in found])
    torch.testing.assert_close(numbers[:, 0], expected.scores, rtol=0, atol=2e-4)
    torch.testing.assert_close(numbers[:, 1:], expected.boxes, rtol=0, atol=0.02)
    assert not torch.equal(load_image(tmp_path / "found.png"), sample.image)
    assert len(EXAMPLE.read_text().splitlines()) <= 40


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:FutureWarning")
def test_a_file_that_is_not_the_detector_is_not_written(tool, trained, tmp_path, monkeypatch) -> None:
    path = tmp_path / "detector.pt"
    path.write_bytes(b"an older one")
    export = ("export", "--checkpoint", trained, "--format", "torchscript", "--output", path, "--num-images", 10)
    right = DetectorGraph.normalize
    with monkeypatch.context() as patch:
        patch.setattr(DetectorGraph, "normalize", lambda self, pixels, size: 1.03 * right(self, pixels, size))
        outcome = tool(*export)
    assert outcome.code == 2
    assert "not written, because the exported file would not be the detector" in outcome.err
    assert "detections differ" in outcome.err
    assert "ms per image" in outcome.out  # the numbers are there all the same
    assert path.read_bytes() == b"an older one"
    assert list(tmp_path.iterdir()) == [path]

    outcome = tool(*export)
    assert (outcome.code, outcome.err) == (0, "")
    extra = {"fpn_det.json": ""}
    torch.jit.load(path, _extra_files=extra)
    assert json.loads(json.loads(extra["fpn_det.json"])["check"])["num_differing"] == 0


def test_images_of_a_folder_are_enough_but_ten_must_be_readable(tool, trained, shapes, tmp_path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(shapes / "train", folder)
    broken = sorted(folder.iterdir())[:3]
    for path in broken:
        path.write_bytes(b"")
    export = ("export", "--checkpoint", trained, "--format", "torchscript", "--output", tmp_path / "d.pt")
    outcome = tool(*export, "--images", folder, "data.val.annotations=nowhere.json")
    assert outcome.code == 0
    assert outcome.err.count("skipped: ") == 3
    assert all(str(path) in outcome.err for path in broken)
    assert "21 images" in outcome.out
    assert "AP" not in outcome.out
    for path in sorted(folder.iterdir())[:15]:
        path.write_bytes(b"")
    outcome = tool(*export, "--images", folder)
    assert outcome.code == 2
    assert "9 images to check" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["model.kind=fast_rcnn", "data.val.proposals=p.npz"], "needs proposals of each image"),
        (["eval.tta={}"], "add eval.tta=none"),
        (["--num-images", "9"], "--num-images 9: a check needs at least 10 images"),
        (["data.val.annotations=nowhere.json"], "nowhere.json: no such file, but the exported file is checked"),
        (["--output", "."], "is a folder"),
        (["model.neck.channels=8"], "of another architecture"),
        (["model.roi_head.score_thresh=1.0"], "nothing to compare"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_line(tool, trained, tmp_path, monkeypatch, arguments, reason) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as on a machine without
    base = ("export", "--checkpoint", trained, "--format", "torchscript", "--output", tmp_path / "d.pt")
    outcome = tool(*base, "--num-images", 10, *arguments)
    assert outcome.code == 2
    assert reason in outcome.err
    assert outcome.err.count("error: ") == outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_command(tool, trained, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    outcome = tool("export", "--checkpoint", trained, "--format", "onnx", "--output", tmp_path / "d.onnx")
    assert outcome.code == 2
    assert "pip install -e '.[export]'" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_an_exporter_that_is_too_old_is_named(tool, trained, tmp_path, monkeypatch, format: str) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cpu"))
    outcome = tool("export", "--checkpoint", trained, "--format", format, "--output", tmp_path / "d.onnx")
    assert outcome.code == 2
    assert f"--format {format} needs PyTorch 2.11 or later" in outcome.err
    assert "this is 2.9.1+cpu" in outcome.err
    assert list(tmp_path.iterdir()) == []
