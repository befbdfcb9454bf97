"""How often a step waits for the device: counted on the CPU, on CUDA's path, by the operators that wait there.

Copies between devices are not seen: the batch comes with `Batch.to`, the results leave with the caller's.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fpn_det.engine.optim import MovingAverage, make_optimizer
from fpn_det.models import nms
from fpn_det.models.faster_rcnn import FasterRCNN, ProposalNetwork
from fpn_det.models.roi_head import CascadeRoIHead
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.structures import Batch

WAITING = {
    "aten::_local_scalar_dense",  # item(), int(), bool()
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",  # without output_size
    "aten::lift_fresh",  # torch.tensor(data), new_tensor(data): a copy from pageable memory
    "torchvision::nms",
}
METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
"""They read the memory without an operator on the CPU."""

MASKING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""They wait if an index is a mask."""


class CountMethods(TorchFunctionMode):
    """Counts the calls of `METHODS`."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class CountOperators(TorchDispatchMode):
    """Counts the operators of `WAITING`, and indexing by masks."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in MASKING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            self.counts[f"{name} by a mask"] += 1
        elif name in WAITING or (f"{name}.{func._overloadname}" in WAITING and kwargs.get("output_size") is None):
            self.counts[name] += 1
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nms, "prefers_fixed_shape", lambda device: True)
    monkeypatch.setattr(MultiLevelRoIAlign, "_sum_cells", MultiLevelRoIAlign._sum_levels)


@contextmanager
def count_syncs() -> Iterator[Counter[str]]:
    """What waits within the context, by name."""
    counts: Counter[str] = Counter()
    with CountMethods(counts), CountOperators(counts):
        yield counts


def count(model: FasterRCNN | ProposalNetwork, batch: Batch, *, training: bool) -> Counter[str]:
    model.train(training)
    with count_syncs() as counts:
        if training:
            losses, _ = model(batch)
            torch.stack(list(losses.values())).sum().backward()
        else:
            model.predict(batch)
    return counts


@pytest.fixture
def batch_of(make_batch: Callable[..., Batch]) -> Callable[[int], Batch]:
    """batch_of(n): one image without objects if there are several."""

    def make(n: int) -> Batch:
        boxes, labels = [[[10, 12, 60, 50], [30, 20, 90, 90]], [[5, 5, 40, 30]], []], [[0, 2], [1], []]
        return make_batch([(96, 128), (90, 100), (64, 128)][:n], boxes[:n], labels[:n])

    return make


@pytest.mark.parametrize("options", [{}, {"class_agnostic": True, "box_loss": "giou"}], ids=["plain", "giou"])
def test_training_waits_no_more_for_more_images(make_model, batch_of, options: dict[str, Any]) -> None:
    model = make_model(roi=options, rpn={"box_loss": options.get("box_loss", "smooth_l1")})
    counts = [count(model, batch_of(n), training=True) for n in (1, 3)]
    assert counts[0] == counts[1]
    assert counts[0].total() <= 4, counts[0]


def test_a_whole_step_waits_no_more(make_model, batch_of) -> None:
    """With the gradient's norm, clipping, the optimiser and the moving average."""
    model = make_model().train()
    optimizer = make_optimizer(
        model, kind="sgd", lr=1e-3, momentum=0.9, weight_decay=1e-4, norm_weight_decay=0.0, fused=True
    )
    average = MovingAverage(model, decay=0.9)
    counts = []
    for batch in (batch_of(1), batch_of(3)):
        with count_syncs() as found:
            losses, _ = model(batch)
            torch.stack(list(losses.values())).sum().backward()
            grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, grad_norm)
            optimizer.step()
            average.update(model)
        counts.append(found)
    assert counts[0] == counts[1]
    assert counts[0].total() == 1, counts[0]


def test_long_chains_wait_seldom() -> None:
    """Anchors of a blank page: 2000 neighbours in a row, each of which decides about the next."""
    left = torch.arange(2000.0) * 4
    boxes = torch.stack([left, torch.zeros(2000), left + 32, torch.full((2000,), 32.0)], dim=1)[None]
    with count_syncs() as counts:
        keep = nms.solve(boxes, torch.ones(1, 2000, dtype=torch.bool), iou_thresh=0.7)
    assert keep.sum() == 1000
    assert counts.total() <= 7


@pytest.mark.parametrize("min_size", [0.0, None])
def test_detection_waits_no_more_for_more_images(make_model, batch_of, min_size: float | None) -> None:
    model = make_model(roi={"score_thresh": 0.0, "min_size": min_size, "detections_per_image": 20})
    counts = [count(model, batch_of(n), training=False) for n in (1, 3)]
    assert counts[0] == counts[1]
    assert counts[0].total() <= 4, counts[0]


def test_cascade_and_proposals_wait_no_more_for_more_images(make_model, batch_of) -> None:
    model = make_model()
    parts = {"backbone": model.backbone, "neck": model.neck, "pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3}
    heads = CascadeRoIHead(stages=[make_model().roi_head for _ in range(3)], loss_weights=(1.0, 1.0, 1.0))
    for detector in (FasterRCNN(**parts, rpn=model.rpn, roi_head=heads), ProposalNetwork(**parts, rpn=model.rpn)):
        for training in (True, False):
            counts = [count(detector, batch_of(n), training=training) for n in (1, 3)]
            assert counts[0] == counts[1]
            assert counts[0].total() <= 4, counts[0]


def test_the_count_sees_what_it_should() -> None:
    x, n = torch.arange(6.0), torch.tensor([1, 2])
    for operation, expected in (
        (lambda: x.sum().item(), 1),
        (lambda: x.tolist(), 1),
        (lambda: x[x > 2], 1),
        (lambda: x.clone().__setitem__(x > 2, torch.ones(3)), 1),
        (lambda: x.nonzero(), 1),
        (lambda: x.unique(), 1),
        (lambda: x.int().bincount(), 1),
        (lambda: bool((x > 2).any()), 1),
        (lambda: n.repeat_interleave(n), 1),
        (lambda: x.new_tensor([1.0]), 1),
        (lambda: n.repeat_interleave(n, output_size=3), 0),
        (lambda: n.repeat_interleave(2), 0),
        (lambda: x[n] + torch.where(x[n] > 1, x[n], 0), 0),
        (lambda: x.topk(2).values.sort(stable=True), 0),
    ):
        with count_syncs() as counts:
            operation()
        assert counts.total() == expected, counts
