"""On a GPU: the same losses, gradients and detections as on the CPU, and hardly any waiting for the device."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms as reference_nms

from fpn_det import kernels
from fpn_det.engine.memory import explained_memory_errors
from fpn_det.engine.optim import MovingAverage, RunningStatistics, make_optimizer, step_if
from fpn_det.engine.train import gradient_norms, trained_parts
from fpn_det.models import nms
from fpn_det.models.backbone import ResNet
from fpn_det.models.faster_rcnn import FasterRCNN, FastRCNN, ProposalNetwork
from fpn_det.models.fpn import Upsample
from fpn_det.models.roi_head import CascadeRoIHead
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.structures import Batch, InputError, Proposals

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = [(96, 128), (90, 100), (64, 128)]
BOXES = [[[10, 12, 60, 50], [30, 20, 90, 90]], [[5, 5, 40, 30]], []]
LABELS = [[0, 2], [1], []]

Model = FasterRCNN | ProposalNetwork | FastRCNN


@pytest.fixture(autouse=True, params=[False, True], ids=["PyTorch", "Triton"])
def _with_kernels(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("FPN_DET_TRITON", str(int(request.param)))
    assert kernels.serve(torch.zeros(1, device=CUDA)) == request.param


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    """Convolutions and products in float32, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def batch(make_batch: Callable[..., Batch]) -> Batch:
    """Three images, one of them without objects."""
    return make_batch(SIZES, BOXES, LABELS)


@pytest.fixture
def model(make_model: Callable[..., FasterRCNN], request: pytest.FixtureRequest) -> Model:
    """The detector of the kind that a test names."""
    match request.param:
        case "plain":
            return make_model(roi={"score_thresh": 0.01})
        case "giou":
            options: dict[str, Any] = {"box_loss": "giou"}
            return make_model(roi={"class_agnostic": True, "score_thresh": 0.01, **options}, rpn=options)
        case "resnet":
            return make_model(body=ResNet(name="resnet18", norm="frozen_bn", frozen_stages=2))
        case kind:
            plain = make_model()
            parts = {"backbone": plain.backbone, "neck": plain.neck, "pixel_mean": [120.0] * 3, "pixel_std": [60.0] * 3}
            if kind == "rpn":
                return ProposalNetwork(**parts, rpn=plain.rpn)
            heads = [make_model(roi={"positive_iou": iou, "score_thresh": 0.01}).roi_head for iou in (0.5, 0.6, 0.7)]
            return FasterRCNN(
                **parts, rpn=plain.rpn, roi_head=CascadeRoIHead(stages=heads, loss_weights=(1.0, 0.5, 0.25))
            )


KINDS = pytest.mark.parametrize("model", ["plain", "giou", "resnet", "rpn", "cascade"], indirect=True)


def twins(model: Model) -> tuple[Model, Model]:
    """The model, and its copy on the GPU, which gets the proposals of the first.

    Proposals whose scores differ by rounding alone come in any order, and which of them are sampled depends on it.
    """
    twin = copy.deepcopy(model).to(CUDA, memory_format=torch.channels_last)
    if isinstance(model, FasterRCNN) and isinstance(twin, FasterRCNN):
        found: list[Proposals] = []
        propose = model.rpn.predict

        def note(features: list[Tensor], sizes: Tensor) -> Proposals:
            found.append(propose(features, sizes))
            return found[-1]

        def repeat(features: list[Tensor], sizes: Tensor) -> Proposals:
            boxes, scores, valid = (x.to(CUDA) for x in (found[-1].boxes, found[-1].scores, found[-1].valid))
            return Proposals(boxes=boxes, scores=scores, valid=valid)

        model.rpn.predict, twin.rpn.predict = note, repeat  # type: ignore[method-assign]
    return model, twin


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` times the largest element."""
    expected = expected.to(actual.device)
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max() if actual.numel() else torch.zeros(())
    assert difference <= tolerance * expected.abs().max().clamp(min=1e-6), (difference, expected.abs().max())


@KINDS
def test_losses_and_gradients(model: Model, batch: Batch) -> None:
    model, twin = twins(model)
    found = []
    for each, device in ((model, CPU), (twin, CUDA)):
        losses, stats = each.train()(batch.to(device))
        torch.stack(list(losses.values())).sum().backward()
        found.append((losses, stats))
    (losses, stats), (on_gpu, stats_on_gpu) = found
    for name in losses:
        close(on_gpu[name], losses[name], 1e-4)
    assert {name: value.item() for name, value in stats_on_gpu.items()} == {n: v.item() for n, v in stats.items()}
    num_compared = 0
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            close(theirs.grad, ours.grad, 1e-2)  # ReLU has kinks: rounding of 3e-7 moves them by 1e-3
            num_compared += 1
    assert num_compared >= 10


@KINDS
def test_detections(model: Model, batch: Batch) -> None:
    if not isinstance(model, FastRCNN):
        model.rpn.pre_nms_top_k[False] = 100
    if isinstance(model, FasterRCNN):
        for head in model.roi_head.heads if isinstance(model.roi_head, CascadeRoIHead) else [model.roi_head]:
            head.class_logits.weight.data *= 100  # scores that differ by more than rounding
    model, twin = twins(model)
    expected = model.eval().predict(batch)
    found = twin.eval().predict(batch.to(CUDA))
    assert sum(map(len, expected)) > 50
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs)
        order, their_order = (_order(d.scores, d.boxes) for d in (ours, theirs))
        close(ours.scores.cpu()[order], theirs.scores[their_order], 1e-4)
        close(ours.boxes.cpu()[order], theirs.boxes[their_order], 1e-4)
        assert torch.equal(ours.labels.cpu()[order], theirs.labels[their_order])


def _order(scores: Tensor, boxes: Tensor) -> Tensor:
    """By rounded position: scores that differ by rounding alone come in any order."""
    keys = boxes.cpu().round().tolist()
    return torch.tensor(sorted(range(len(scores)), key=lambda i: (keys[i], -scores[i].item())), dtype=torch.int64)


def random_boxes(num: int, *, side: float, dice: torch.Generator) -> Tensor:
    corner = torch.rand(num, 2, generator=dice) * side
    return torch.cat([corner, corner + torch.rand(num, 2, generator=dice) * side / 2], dim=1)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 700, 2000])
def test_nms_keeps_what_torchvision_keeps(count: int) -> None:
    dice = torch.Generator().manual_seed(count)
    boxes = torch.stack([random_boxes(count, side=200, dice=dice) for _ in range(6)])
    valid = torch.rand(6, count, generator=dice) < 0.9
    keep = nms.solve(boxes.to(CUDA), valid.to(CUDA), iou_thresh=0.6).cpu()
    for i in range(6):
        chosen = valid[i].nonzero().squeeze(1)
        expected = torch.zeros(count, dtype=torch.bool)
        descending = torch.linspace(1, 0, count)
        expected[chosen[reference_nms(boxes[i, chosen], descending[chosen], 0.6)]] = True
        assert torch.equal(keep[i], expected)


@pytest.mark.parametrize("options", [{}, {"sampling_ratio": 2, "aligned": False}], ids=["adaptive", "torchvision's"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_roi_align(options: dict[str, Any], memory_format: torch.memory_format) -> None:
    """Forward and backward, with empty boxes and boxes beyond the image."""
    dice = torch.Generator().manual_seed(0)
    pooler = MultiLevelRoIAlign(strides=(4, 8, 16, 32), canonical_size=56, **options)
    boxes = torch.stack([random_boxes(200, side=300, dice=dice) - 20 for _ in range(2)])
    boxes[:, 0], boxes[:, 1] = 0, torch.tensor([-50.0, -50, 500, 500])
    features = [torch.randn(2, 24, 256 // s, 320 // s, generator=dice) for s in pooler.strides]
    weight = torch.randn(400, 24, 7, 7, generator=dice)
    results = []
    for device in (CPU, CUDA):
        leaves = [f.to(device, memory_format=memory_format, copy=True).requires_grad_() for f in features]
        pooled = pooler(leaves, boxes.to(device))
        (pooled * weight.to(device)).sum().backward()
        results.append([pooled.detach(), *[leaf.grad for leaf in leaves]])
    for theirs, ours in zip(*results, strict=True):
        close(ours, theirs, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roi_align_of_short_formats(dtype: torch.dtype) -> None:
    """Rounded, but for sums in float32."""
    dice = torch.Generator().manual_seed(0)
    pooler = MultiLevelRoIAlign(strides=(4, 8, 16, 32), canonical_size=56)
    boxes = torch.stack([random_boxes(200, side=300, dice=dice) - 20 for _ in range(2)])
    features = [torch.randn(2, 72, 256 // s, 320 // s, generator=dice).to(dtype) for s in pooler.strides]
    weight = torch.randn(400, 72, 7, 7, generator=dice).to(dtype)
    results = []
    for device, of in ((CPU, torch.float32), (CUDA, dtype)):
        leaves = [f.to(device, of).requires_grad_() for f in features]
        pooled = pooler(leaves, boxes.to(device))
        results.append([pooled.detach(), *torch.autograd.grad(pooled, leaves, weight.to(device, pooled.dtype))])
    for theirs, ours in zip(*results, strict=True):
        close(ours.float(), theirs, 2**-8 if dtype == torch.bfloat16 else 2**-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", ["resnet"], indirect=True)
def test_short_number_formats(model: Model, batch: Batch, dtype: torch.dtype) -> None:
    """A step by autocast: losses near those of float32, gradients of all that learns, none of them NaN."""
    model = model.to(CUDA, memory_format=torch.channels_last).train()
    on_device = batch.to(CUDA)
    expected, _ = model(on_device)
    with torch.autocast("cuda", dtype=dtype):
        losses, _ = model(on_device)
    torch.stack(list(losses.values())).sum().backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.1, abs=0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for ps in trained_parts(model).values() for p in ps)


def test_nearest_upsampling_keeps_the_short_format() -> None:
    """Autocast would do it in float32."""
    x = torch.randn(1, 8, 3, 4, device=CUDA, dtype=torch.bfloat16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = Upsample(channels=8, kind="nearest")(x, (6, 8))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@contextmanager
def waits() -> Iterator[list[str]]:
    """Where the host waits for the device within the context, as PyTorch reports it."""
    found: list[str] = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]


@pytest.mark.parametrize("model", ["plain", "giou", "rpn", "cascade"], indirect=True)
def test_a_step_waits_once(model: Model, make_batch: Callable[..., Batch]) -> None:
    """For the convergence of NMS, however many images there are; the transfer to the device included."""
    model = model.to(CUDA, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(
        model, kind="sgd", lr=1e-3, momentum=0.9, weight_decay=1e-4, norm_weight_decay=0.0, fused=True
    )
    parts, statistics, average = trained_parts(model), RunningStatistics(model), MovingAverage(model, decay=0.9)
    for n in (1, 1, 3):  # the first step allocates
        batch = make_batch(SIZES[:n], BOXES[:n], LABELS[:n]).pin_memory()
        with waits() as found:
            optimizer.zero_grad()
            statistics.keep()
            losses, _ = model(batch.to(CUDA, non_blocking=True))
            loss = torch.stack(list(losses.values())).sum()
            (loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)).backward()
            norms = gradient_norms(parts, CUDA)
            finite = norms.norm().isfinite()
            step_if(finite, optimizer)
            statistics.restore_unless(finite)
            average.update(model)
    at_most = 0 if isinstance(model, ProposalNetwork) else 1  # an RPN alone needs no proposals to learn
    assert len(found) <= at_most, found


@pytest.mark.parametrize("model", ["plain", "cascade", "rpn"], indirect=True)
def test_detecting_waits_no_more_for_more_images(model: Model, make_batch: Callable[..., Batch]) -> None:
    model = model.to(CUDA, memory_format=torch.channels_last).eval()
    counts = []
    for n in (1, 1, 3):
        batch = make_batch(SIZES[:n], BOXES[:n], LABELS[:n]).pin_memory()
        with waits() as found:
            model.predict(batch.to(CUDA, non_blocking=True))
        counts.append(len(found))
    assert counts[1] == counts[2] <= 4, found


@pytest.mark.parametrize("model", ["resnet"], indirect=True)
def test_compiled_parts_give_the_same(model: Model, batch: Batch) -> None:
    torch.compiler.reset()
    twin = copy.deepcopy(model).to(CUDA, memory_format=torch.channels_last).train()
    for part in (twin.backbone, twin.neck, twin.rpn.head):
        part.compile(dynamic=True)
    model = model.to(CUDA, memory_format=torch.channels_last).train()
    on_device = batch.to(CUDA)
    for each in (model, twin):
        losses, _ = each(on_device)
        torch.stack(list(losses.values())).sum().backward()
    expected, _ = model(on_device)
    for name, loss in losses.items():
        close(loss.detach(), expected[name].detach(), 1e-3)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            close(ours.grad, theirs.grad, 1e-2)


@pytest.mark.parametrize("model", ["resnet"], indirect=True)
def test_running_out_of_memory_says_what_to_lower(model: Model, make_batch: Callable[..., Batch]) -> None:
    model = model.to(CUDA).train()
    batch = make_batch([(4096, 4096)], [[[10, 10, 50, 50]]], [[0]])
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5 * 2**30 / total)
    try:
        with (
            pytest.raises(InputError, match=r"out of memory on cuda: 1 images padded to 4096x4096 .* Lower it\."),
            explained_memory_errors(batch, CUDA, remedy="Lower it."),
        ):
            model(batch.to(CUDA))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
