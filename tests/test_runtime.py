"""What makes training fast changes nothing but rounding: each part beside its plain form, `runtime.*` on and off."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torchvision.ops import FrozenBatchNorm2d

from fpn_det import build
from fpn_det.config import Config, load_config
from fpn_det.engine.checkpoint import save_checkpoint
from fpn_det.models.faster_rcnn import FasterRCNN
from fpn_det.structures import Batch, Categories

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.plain import SWITCHES_OFF, plain

CPU = torch.device("cpu")
CATEGORIES = Categories(tuple(range(1, 6)), ("circle", "square", "triangle", "cross", "ring"))


@pytest.fixture
def read(tiny):
    """Read `tiny` with more overrides."""
    return lambda *overrides: load_config(Path(tiny[1]), [*tiny[2:], *overrides])


def frozen_detector(config: Config, seed: int = 0) -> FasterRCNN:
    """A detector with norms that normalise, as pre-trained ones do, and outputs that depend on its features."""
    torch.manual_seed(seed)
    model = build.build_model(config, 5, pretrained=False)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.2, 0.6)
            module.bias.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    head = model.rpn.head
    for layer in (head.convs[0], head.objectness, head.deltas, model.roi_head.class_logits, model.roi_head.box_deltas):
        nn.init.normal_(layer.weight, std=0.1)
    return model


FROZEN = ("model.backbone.norm=frozen_bn", "model.backbone.weights=IMAGENET1K_V1", "model.backbone.frozen_stages=2")


def twenty_losses(config: Config, batches: Sequence[Batch]) -> list[float]:
    model = build.place(config, frozen_detector(config), CPU).train()
    optimizer = build.build_optimizer(config, model)
    found = []
    for step in range(20):
        torch.manual_seed(step)
        losses, _ = model(batches[step % len(batches)])
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_twenty_steps_equal_the_plain_path(read) -> None:
    """Folded norms, sampled RPN outputs, RoIAlign as an embedding bag, a layer as a convolution, `runtime.*`."""
    config = read(*FROZEN, "optim.lr=5e-3", "optim.kind=sgd")
    batches = list(islice(build.build_train_loader(config, build.load_train_data(config)), 4))
    fast = twenty_losses(config, batches)
    with plain():
        expected = twenty_losses(read(*FROZEN, "optim.lr=5e-3", "optim.kind=sgd", *SWITCHES_OFF), batches)
    assert expected[-1] < 0.9 * expected[0]  # it learns
    assert fast == pytest.approx(expected, rel=1e-5)
    assert fast != expected  # two paths were run


def test_switches(read) -> None:
    batch = next(iter(build.build_train_loader(read(), build.load_train_data(read()))))
    formats = {(): torch.channels_last, ("runtime.channels_last=false",): torch.contiguous_format}
    for overrides, memory_format in formats.items():
        model = build.place(read(*overrides), build.build_model(read(), 5, pretrained=False), CPU)
        assert model.backbone.layer2[0].conv2.weight.is_contiguous(memory_format=memory_format)
        assert model.features(batch)[0].is_contiguous(memory_format=memory_format)
    for overrides, fused in (((), True), (("runtime.fused_optimizer=false",), False)):
        for kind in ("sgd", "adamw"):
            config = read(f"optim.kind={kind}", *overrides)
            optimizer = build.build_optimizer(config, build.build_model(config, 5, pretrained=False))
            assert [bool(group["fused"]) for group in optimizer.param_groups] == [fused, fused]


def test_compiled(read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same losses and gradients; sizes of images do not compile anew; a copy does not run the original's weights."""
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    config = read(*FROZEN)
    eager = build.place(config, frozen_detector(config), CPU).train()
    compiled = build.place(read(*FROZEN, "runtime.compile=true"), copy.deepcopy(eager), CPU).train()
    frames = []
    data = build.load_train_data(config)
    for seed, size in enumerate((128, 160, 192, 224, 256)):
        resized = read(f"data.short_sides=[{size}]", f"data.long_side={size}")
        batch = next(iter(build.build_train_loader(resized, data)))
        for model in (eager, compiled):
            model.zero_grad()
            torch.manual_seed(seed)
            losses, _ = model(batch)
            torch.stack(list(losses.values())).sum().backward()
        for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad)
        frames.append(counter.frame_count)
    assert frames[0] >= 3  # backbone, neck, RPN head
    assert frames[2] == frames[-1] <= 8
    twin = copy.deepcopy(compiled).eval()
    nn.init.zeros_(twin.backbone.stem[0].weight)
    with torch.no_grad():
        features, changed = (m.eval().backbone(torch.randn(2, 3, 64, 64)) for m in (compiled, twin))
    assert not torch.equal(features[0], changed[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loaded_detectors_detect_as_trained_ones(read, tmp_path: Path, precision: str) -> None:
    """Norms are folded and weights converted once; the detections are the same to the bit."""
    config = read(*FROZEN, f"train.precision={precision}", "model.roi_head.score_thresh=0")
    trained = build.place(config, frozen_detector(config, seed=1), CPU).eval()
    path = tmp_path / "final.pth"
    state = {"model": trained.state_dict(), "categories": CATEGORIES.state_dict(), "config": json.dumps({}), "step": 1}
    save_checkpoint(path, state)
    loaded, _ = build.load_detector(config, path, CPU)
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in loaded.modules())
    assert loaded.roi_head.box_head.fcs[0].weight.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    batch = next(iter(build.build_val_loader(config, build.load_val_data(config))))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        for ours, theirs in zip(loaded.predict(batch), trained.predict(batch), strict=True):
            assert len(theirs) > 5
            assert torch.equal(ours.boxes, theirs.boxes)
            assert torch.equal(ours.scores, theirs.scores)
            assert torch.equal(ours.labels, theirs.labels)
