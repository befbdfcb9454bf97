"""Geometry and losses are float32 under autocast: float16 has steps of 2 pixels beyond 2048, bfloat16 of 16.

The image is 64 x 4096, its boxes lie at the right end, at fractions of a pixel. With equal inputs the results of each
stage are equal to the bit.
"""

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from fpn_det import boxes as box_ops
from fpn_det.models.backbone import ResNet
from fpn_det.models.box_loss import box_loss
from fpn_det.models.faster_rcnn import FasterRCNN
from fpn_det.models.matching import match, pairwise_iou
from fpn_det.models.nms import nms_per_class, nms_per_level
from fpn_det.models.roi_head import CascadeRoIHead
from fpn_det.structures import Batch, Proposals

SIZES = torch.tensor([[64, 4096]])
GT = [[4000.6, 10.3, 4060.25, 50.7], [3001.4, 5.1, 3101.9, 60.2]]
pytestmark = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture
def batch(make_batch) -> Batch:
    return make_batch([(64, 4096)], [GT], [[0, 1]])


@pytest.fixture
def far_boxes() -> Tensor:
    """(1, 60, 4) around the ground truth."""
    return torch.tensor(GT).repeat(30, 1)[None] + torch.rand(1, 60, 4) * 6 - 3


def tensors_of(result: object) -> list[Tensor]:
    """All tensors of a tensor, a dictionary, a sequence or a dataclass."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        return tensors_of(list(result.values()))
    if isinstance(result, list | tuple):
        return [x for part in result for x in tensors_of(part)]
    return tensors_of([getattr(result, f.name) for f in fields(result)])  # type: ignore[arg-type]


def check_same(compute: Callable[[], object], dtype: torch.dtype) -> list[Tensor]:
    """Under autocast as without it."""
    expected = tensors_of(compute())
    with torch.autocast("cpu", dtype=dtype):
        found = tensors_of(compute())
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == exact.dtype
        assert ours.dtype not in (torch.float16, torch.bfloat16)
        assert torch.equal(ours, exact)
    return found


def test_box_arithmetic(far_boxes: Tensor, dtype: torch.dtype) -> None:
    """Deltas may come in the low precision, boxes come out in float32."""
    reference = torch.tensor(GT).repeat(30, 1)[None]
    low = (torch.randn(1, 60, 4) / 10).to(dtype)
    weights = (10.0, 10.0, 5.0, 5.0)
    check_same(lambda: box_ops.encode(far_boxes, reference, weights), dtype)
    (decoded,) = check_same(lambda: box_ops.decode(low, reference, weights), dtype)
    assert torch.equal(decoded, box_ops.decode(low.float(), reference, weights))
    assert (decoded[..., 2] > 4000).any()
    assert (decoded % 1 != 0).all()
    check_same(lambda: box_ops.clip(decoded, SIZES[:, None]), dtype)
    check_same(lambda: box_ops.rescale(decoded, SIZES[0], torch.tensor([48, 3072])), dtype)


def test_matching(make_targets, far_boxes: Tensor, dtype: torch.dtype) -> None:
    targets = make_targets([GT], [[0, 1]])
    check_same(lambda: pairwise_iou(targets.boxes, far_boxes), dtype)
    check_same(lambda: match(far_boxes, targets), dtype)


def test_nms(far_boxes: Tensor, dtype: torch.dtype) -> None:
    scores = torch.rand(1, 60).sort(descending=True).values
    valid, labels = torch.ones(1, 60, dtype=torch.bool), torch.arange(60)[None] % 3
    for fixed_shape in (False, True):
        options = {"iou_thresh": 0.8, "top_k": 30, "fixed_shape": fixed_shape}
        check_same(lambda options=options: nms_per_level(far_boxes, scores, valid, level_sizes=[60], **options), dtype)
        check_same(lambda options=options: nms_per_class(far_boxes, scores, labels, valid, **options), dtype)


def test_anchors_samples_and_proposals(make_model, batch: Batch, dtype: torch.dtype) -> None:
    rpn = make_model().rpn
    shapes = [(16, 1024), (8, 512), (4, 256), (2, 128), (1, 64)]
    anchors = check_same(lambda: rpn.anchors(shapes), dtype)
    assert all(level[:, 2].max() > 4000 for level in anchors)
    check_same(lambda: rpn.sample(anchors, batch.targets, batch.seeds), dtype)
    logits = [torch.randn(1, len(level)) for level in anchors]
    deltas = [torch.randn(1, len(level), 4) / 10 for level in anchors]
    boxes, *_ = check_same(lambda: rpn.propose(logits, deltas, anchors, batch.sizes), dtype)
    assert (boxes[..., 2] > 2048).sum() > 100


@pytest.mark.parametrize("on_cuda", [False, True])
def test_roi_coordinates(make_model, far_boxes: Tensor, on_cuda: bool, dtype: torch.dtype) -> None:
    """Features of low precision are pooled at float32 coordinates, on the path of CUDA as well."""
    pooler = make_model().roi_head.pooler
    pool = pooler._sum_levels if on_cuda else pooler.forward
    low = [torch.randn(1, 4, 64 // stride, 4096 // stride).to(dtype) for stride in pooler.strides]
    features = [x.float() for x in low]
    check_same(lambda: pooler.assign_levels(far_boxes), dtype)
    (pooled,) = check_same(lambda: pool(features, far_boxes), dtype)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(pooler(low, far_boxes), pooled) or on_cuda
    assert not torch.equal(pool(features, far_boxes.to(dtype).float()), pooled)


@pytest.mark.parametrize("kind", ["smooth_l1", "giou", "diou", "ciou"])
def test_box_losses(far_boxes: Tensor, kind: str, dtype: torch.dtype) -> None:
    deltas, gt_boxes = torch.randn(1, 60, 4) / 10, torch.tensor(GT).repeat(30, 1)[None]
    is_positive = torch.rand(1, 60) < 0.5
    check_same(lambda: box_loss(deltas, far_boxes, gt_boxes, is_positive, kind=kind), dtype)


def test_second_stage(make_model, batch: Batch, far_boxes: Tensor, dtype: torch.dtype) -> None:
    """Samples, losses, refined boxes and detections, from the same logits and deltas."""
    head = make_model(roi={"score_thresh": 0.0}).roi_head
    valid = torch.ones(1, 60, dtype=torch.bool)
    proposals = Proposals(boxes=far_boxes, scores=torch.rand(1, 60), valid=valid)
    samples = head.sample(proposals, batch.targets, batch.seeds)
    assert (samples.labels < 3).any()
    check_same(lambda: head.sample(proposals, batch.targets, batch.seeds), dtype)
    s = samples.labels.shape[1]
    logits, deltas = torch.randn(1, s, 4), torch.randn(1, s, 3, 4)
    check_same(lambda: head.loss(logits, deltas, samples), dtype)
    check_same(lambda: CascadeRoIHead.refine(head, logits, deltas, samples.boxes, SIZES), dtype)
    scores = head.scores(logits)
    check_same(lambda: head.scores(logits), dtype)
    check_same(lambda: head.select(scores, head.decode(deltas, samples.boxes, SIZES), samples.valid), dtype)


@pytest.mark.parametrize("norm", ["bn", "gn", "frozen_bn"])
def test_a_step_of_low_precision(make_model, make_batch, norm: str, dtype: torch.dtype) -> None:
    """Losses of float32 logits and deltas, near those of a float32 step; finite gradients in float32."""
    batch = make_batch([(64, 96)], [[[10.5, 12, 60, 50], [50, 5, 90, 40]]], [[0, 1]])
    model = make_model(body=ResNet(name="resnet18", norm=norm, frozen_stages=0)).train()
    exact, _ = model(batch)
    given: list[torch.dtype] = []
    for stage in (model.rpn, model.roi_head):
        loss = stage.loss
        stage.loss = lambda *args, loss=loss: given.extend(x.dtype for x in args[:2]) or loss(*args)
    with torch.autocast("cpu", dtype=dtype):
        assert model.features(batch)[0].dtype == dtype
        losses, stats = model(batch)
    assert [*given, *(value.dtype for value in [*losses.values(), *stats.values()])] == [torch.float32] * 10
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.15), name  # which proposals are positive differs
    assert losses["roi_box"] > 0
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_sums_beyond_the_range_of_float16(make_model, batch: Batch, dtype: torch.dtype) -> None:
    """Logits of 100 that are wrong, 2048 times: their sum is 204,800, the largest float16 65,504."""
    model: FasterRCNN = make_model(rpn={"num_samples": 2048}, roi={"num_samples": 2048})
    nn.init.constant_(model.rpn.head.objectness.bias, 100)
    nn.init.zeros_(model.rpn.head.objectness.weight)
    nn.init.zeros_(model.roi_head.class_logits.weight)
    model.roi_head.class_logits.bias.data[0] = 100
    with torch.autocast("cpu", dtype=dtype):
        features = model.features(batch)
        losses, stats = model.rpn.losses(features, batch.targets, batch.seeds)
        corner = torch.rand(1, 2100, 2) * torch.tensor([4000, 20])
        boxes = torch.cat([corner, corner + 10 + 30 * torch.rand(1, 2100, 2)], dim=-1)
        proposals = Proposals(boxes=boxes, scores=boxes[..., 0], valid=torch.ones(1, 2100, dtype=torch.bool))
        roi_losses, roi_stats = model.roi_head.losses(features, proposals, batch.targets, batch.sizes, batch.seeds)
    background = 1 - stats["rpn_positives"].item() / 2048
    assert losses["rpn_objectness"].item() == pytest.approx(100 * background, rel=1e-3)
    background = 1 - roi_stats["roi_positives"].item() / 2048
    assert roi_losses["roi_class"].item() == pytest.approx(100 * background, rel=1e-2)
