"""The exported graph against the detector, in every variant of the model, through the formats' own runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from fpn_det import build
from fpn_det.config import Config, load_config
from fpn_det.data.loader import collate
from fpn_det.engine.evaluate import detect
from fpn_det.export.formats import Format, Outputs, export, suppress_each, suppress_together
from fpn_det.export.graph import DetectorGraph
from fpn_det.export.resize import Resize
from fpn_det.models.faster_rcnn import DetectionModel, FasterRCNN, FastRCNN
from fpn_det.models.roi_head import RoIHead
from fpn_det.structures import Detections, Sample

NUM_CLASSES = 5

ODD = (  # all that imported weights need at once
    *("model.roi_head.aligned=false", "model.roi_head.sampling_ratio=2", "model.roi_head.background_rows=3"),
    *("model.roi_head.level_bias=1e-6", "model.roi_head.level_eps=1e-8", "model.roi_head.min_size=none"),
    *("model.anchors.rounded=true", "model.anchors.inferred_strides=true", "model.delta_clamp=both"),
    *("model.roi_head.class_agnostic=true", "model.rpn.min_size=2", "data.resize=float", "data.test_short_side=96"),
    "data.long_side=150",
)
VARIANTS = {
    "standard": (),
    "odd": ODD,
    "cascade": ("model.roi_head.kind=cascade", "data.resize=opencv", "data.long_side=80", "data.test_short_side=72"),
    "c4": (
        *("model.neck={kind: single, stage: 4}", "model.anchors.sizes=[[16, 32, 64]]", "data.resize=pillow"),
        *("model.roi_head.box_head={kind: res5}", "data.test_short_side=50", "model.roi_head.class_agnostic=true"),
    ),
    "pafpn": ("model.neck={kind: pafpn, channels: 32, upsample: bilinear}", "model.rpn.shared_head=false"),
    "convs": (
        *("model.neck.upsample=pixel_shuffle", "model.roi_head.box_head={num_convs: 2, num_fcs: 1, norm: gn}"),
        *("model.roi_head.box_head.conv_channels=32", "model.roi_head.detections_per_image=7"),
        "model.rpn.pre_nms_top_k_test=300",  # more than the coarse levels have anchors
    ),
    "deconv": ("model.neck.upsample=deconv", "model.neck.smooth_top=false", "model.roi_head.score_thresh=0.3"),
    "rpn": ("model.kind=rpn", "model.rpn.post_nms_top_k_test=20"),
}


def detector(tiny: list[str], overrides: Sequence[str]) -> tuple[Config, DetectionModel]:
    """A detector of random weights whose detections differ from each other."""
    torch.manual_seed(0)
    has_neither = any("kind: single" in override for override in overrides)
    keys = ("model.neck.channels", "model.roi_head.box_head.fc_dim") if has_neither else ()
    config = load_config(Path(tiny[1]), [*(x for x in tiny[2:] if not x.startswith(keys)), *overrides])
    model = build.build_model(config, NUM_CLASSES, pretrained=False)
    for name, parameter in model.named_parameters():
        if name.endswith(("objectness.weight", "class_logits.weight", "deltas.weight")):
            torch.nn.init.normal_(parameter, std=0.2 if "deltas" in name else 1.0)
            parameter.data /= parameter[0].numel() ** 0.5
    # Running statistics as of training: those of fresh layers would let the features grow from stage to stage.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        model.neck(model.backbone(torch.randn(4, 3, 96, 96)))
    return config, build.place(config, model.eval(), torch.device("cpu"))


def images(*shape: int) -> Tensor:
    """Noise of several scales, (*shape) uint8."""
    generator = torch.Generator().manual_seed(sum(shape))
    n, _, h, w = shape
    coarse = torch.rand(n, 3, max(h // 16, 1), max(w // 16, 1), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(h, w), mode="bilinear")
    return (255 * (0.8 * smooth + 0.2 * torch.rand(n, 3, h, w, generator=generator))).to(torch.uint8)


def look(config: Config, model: DetectionModel, image: Tensor) -> Detections:
    """What the detector itself finds in an image (3, H, W), in the frame of the image."""
    batch = collate([build.build_test_transform(config)(Sample.to_detect_in(image), Random(0))])
    [(_, [found])] = detect(model, [batch], device=torch.device("cpu"), precision="fp32", show_progress=False)
    return found


def assert_same(config: Config, model: DetectionModel, batch: Tensor, outputs: Outputs) -> int:
    """Compare outputs for a batch with the detector's; returns the number of detections."""
    boxes, scores, labels = outputs
    assert (boxes.dtype, scores.dtype, labels.dtype) == (torch.float32, torch.float32, torch.int64)
    head, rpn = config.model.roi_head, config.model.rpn
    most = rpn.post_nms_top_k_test if config.model.kind == "rpn" else head.detections_per_image
    assert boxes.shape == (len(batch), most, 4)
    assert scores.shape == labels.shape == boxes.shape[:2]
    total = 0
    for i, image in enumerate(batch):
        expected = look(config, model, image)
        count = len(expected)
        assert torch.equal(labels[i, :count], expected.labels)
        torch.testing.assert_close(scores[i, :count], expected.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(boxes[i, :count], expected.boxes, rtol=0, atol=2e-3)
        assert (labels[i, count:] == -1).all()
        assert scores[i, count:].count_nonzero() == boxes[i, count:].count_nonzero() == 0
        total += count
    return total


def assert_exported(tiny: list[str], overrides: Sequence[str], format: Format) -> None:
    """Export, and compare on other numbers and sizes of images than the exporter saw."""
    config, model = detector(tiny, overrides)
    assert not isinstance(model, FastRCNN)
    transform = build.build_test_transform(config)
    resize = Resize(short_side=transform.short_side, long_side=transform.long_side, kind=transform.resize)
    exported = export(format, model, resize)
    total = 0
    for shape in ((1, 3, 64, 64), (1, 3, 50, 133), (3, 3, 150, 90)):
        batch = images(*shape)
        total += assert_same(config, model, batch, exported.run(batch))
    assert total > 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_as_torchscript(tiny, variant: str) -> None:
    assert_exported(tiny, VARIANTS[variant], "torchscript")


def test_torch_export(tiny) -> None:
    assert_exported(tiny, (), "torch_export")


def test_an_image_in_which_nothing_is_found(tiny) -> None:
    config, model = detector(tiny, ["model.roi_head.score_thresh=0.999"])
    assert not isinstance(model, FastRCNN)
    resize = Resize(short_side=64, long_side=64, kind="antialiased")
    for suppress in (suppress_each, suppress_together):
        graph = DetectorGraph(model, resize=resize, suppress=suppress)
        assert assert_same(config, model, images(2, 3, 64, 64), graph(images(2, 3, 64, 64))) == 0


@pytest.mark.parametrize("min_size", [None, -1.0, 0.0, 20.0])
@pytest.mark.parametrize("agnostic", [False, True])
def test_detections_are_selected_as_the_detector_does(tiny, min_size: float | None, agnostic: bool) -> None:
    _, model = detector(tiny, ["model.roi_head.detections_per_image=25"])
    assert isinstance(model, FasterRCNN)
    head = model.roi_head
    assert isinstance(head, RoIHead)
    head.min_size = min_size
    generator = torch.Generator().manual_seed(0)
    corners = 60 * torch.rand(2, 30, 1 if agnostic else NUM_CLASSES, 2, generator=generator)
    sides = 40 * torch.rand(corners.shape, generator=generator)
    sides[torch.rand(sides.shape, generator=generator) < 0.3] = 0  # boxes without area
    boxes = torch.cat([corners, corners + sides], dim=3)
    scores = torch.rand(2, 30, NUM_CLASSES, generator=generator)
    valid = torch.rand(2, 30, generator=generator) < 0.8
    graph = DetectorGraph(model, resize=Resize(short_side=64, long_side=64, kind="float"), suppress=suppress_each)
    found_boxes, found_scores, found_labels, kept = graph.select(head, scores, boxes, valid)
    for i, expected in enumerate(head.select(scores, boxes, valid)):
        count = len(expected)
        assert kept[i].tolist() == [True] * count + [False] * (25 - count)
        assert torch.equal(found_boxes[i, :count], expected.boxes)
        assert torch.equal(found_scores[i, :count], expected.scores)
        assert torch.equal(found_labels[i, :count], expected.labels)


def test_both_ways_of_nms_keep_the_same_boxes() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = 1300 * torch.rand(30, 40, 2, generator=generator)
    boxes = torch.cat([corners, corners + 300 * torch.rand(30, 40, 2, generator=generator)], dim=2)
    scores = torch.rand(30, 40, generator=generator).mul(8).round() / 8  # many are equal
    scores[torch.rand(30, 40, generator=generator) < 0.2] = -torch.inf
    scores[3] = -torch.inf
    keep = suppress_each(boxes, scores, 0.3)
    assert torch.equal(suppress_together(boxes, scores, 0.3), keep)
    assert 0 < keep.sum() < scores.isfinite().sum()
    assert not keep[scores.isinf()].any()
