"""What makes training fast changes nothing but rounding: each part beside its plain form, `runtime.*` on and off."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torchvision.ops import FrozenBatchNorm2d, roi_align

from fpn_det import build
from fpn_det.config import Config, load_config
from fpn_det.engine.checkpoint import save_checkpoint
from fpn_det.models import backbone
from fpn_det.models.faster_rcnn import FasterRCNN
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.models.rpn import RPNHead, UnsharedRPNHead
from fpn_det.structures import Batch, Categories

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


def pool_level_by_level(self: MultiLevelRoIAlign, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    level = self.assign_levels(boxes.flatten(0, 1))
    image = torch.arange(len(boxes)).repeat_interleave(boxes.shape[1])
    rois = torch.cat([image[:, None], boxes.flatten(0, 1)], 1)
    pooled = torch.zeros(len(rois), features[0].shape[1], self.output_size, self.output_size)
    for i, stride in enumerate(self.strides):
        options = {"spatial_scale": 1 / stride, "sampling_ratio": self.sampling_ratio, "aligned": self.aligned}
        pooled[level == i] = roi_align(features[i], rois[level == i], output_size=self.output_size, **options)
    return pooled


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


def test_twenty_steps_equal_the_plain_path(read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded norms, sampled RPN outputs, RoIAlign as an embedding bag, channels last, the fused optimiser."""
    config = read(*FROZEN, "optim.lr=5e-3", "optim.kind=sgd")
    batches = list(islice(build.build_train_loader(config, build.load_train_data(config)), 4))
    fast = twenty_losses(config, batches)
    monkeypatch.setattr(backbone, "apply_conv_norm", lambda conv, norm, x: norm(conv(x)))
    monkeypatch.setattr(RPNHead, "at", UnsharedRPNHead.at)
    monkeypatch.setattr(MultiLevelRoIAlign, "forward", pool_level_by_level)
    plain = twenty_losses(read(*FROZEN, "optim.lr=5e-3", "optim.kind=sgd", *RUNTIME_OFF), batches)
    assert plain[-1] < 0.9 * plain[0]  # it learns
    assert fast == pytest.approx(plain, rel=1e-5)
    assert fast != plain  # two paths were run


RUNTIME_OFF = ("runtime.channels_last=false", "runtime.fused_optimizer=false", "runtime.tf32=false")


def test_switches(read) -> None:
    def convolution(config: Config) -> Tensor:
        return build.place(config, build.build_model(config, 5, pretrained=False), CPU).backbone.layer2[0].conv1.weight

    assert convolution(read()).is_contiguous(memory_format=torch.channels_last)
    assert convolution(read("runtime.channels_last=false")).is_contiguous()
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
    plain = build.place(config, frozen_detector(config), CPU).train()
    compiled = build.place(read(*FROZEN, "runtime.compile=true"), copy.deepcopy(plain), CPU).train()
    frames = []
    data = build.load_train_data(config)
    for seed, size in enumerate((128, 160, 192, 224, 256)):
        resized = read(f"data.short_sides=[{size}]", f"data.long_side={size}")
        batch = next(iter(build.build_train_loader(resized, data)))
        for model in (plain, compiled):
            model.zero_grad()
            torch.manual_seed(seed)
            losses, _ = model(batch)
            torch.stack(list(losses.values())).sum().backward()
        for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
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
