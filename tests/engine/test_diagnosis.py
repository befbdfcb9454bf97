"""Why steps fail, from made-up evidence."""

from __future__ import annotations

import math

import pytest
import torch

from fpn_det.engine.diagnosis import Diverged, FailedStep, SkippedSteps, likely_causes
from fpn_det.structures import Batch, Targets

CALM = [(step, 1.0, 2.0) for step in range(0, 200, 20)]


def failed(step: int, ids: list[int], *, width: float = 20.0, counts: bool = True, **losses: float) -> FailedStep:
    n = len(ids)
    box = torch.tensor([5.0, 5.0, 5.0 + width, 25.0])
    targets = Targets(
        boxes=box.expand(n, 1, 4), labels=torch.zeros(n, 1).long(), valid=torch.ones(n, 1, dtype=torch.bool)
    )
    sizes = torch.full((n, 2), 64)
    batch = Batch(
        images=torch.zeros(n, 3, 0, 0),
        sizes=sizes,
        targets=targets,
        image_ids=torch.tensor(ids),
        original_sizes=sizes,
        seeds=torch.zeros(n, dtype=torch.int64),
    )
    norms = {"total": math.nan, "backbone": math.nan}
    return FailedStep(
        step=step, lr=0.02, losses=losses, gradient_norms=norms, loss_scale=1.0, counts=counts, batches=[batch]
    )


def causes(steps: list[FailedStep], history: list = CALM, precision: str = "fp32", finite: bool = True) -> list[str]:
    return [c["cause"] for c in likely_causes(steps, history, precision=precision, weights_finite=finite)]


LR, DATA, HALF = "a learning rate that is too high", "images whose boxes break a loss", "overflow in float16"


@pytest.mark.parametrize(
    ("steps", "history", "precision", "expected"),
    [
        # the same image whenever it comes
        ([failed(10, [7, 1], loss=math.nan), failed(90, [2, 7], loss=math.nan)], CALM, "fp32", [DATA, LR]),
        # one after the other after the loss rose
        ([failed(s, [s], loss=math.nan) for s in (220, 221, 222)], [*CALM, (210, 9.0, 50.0)], "fp32", [LR]),
        ([failed(s, [s], loss=math.nan) for s in (220, 221, 222)], CALM, "fp32", [LR]),
        # a single one with a box that resizing made thin
        ([failed(10, [7], width=0.3, loss=math.nan)], CALM, "fp32", [DATA, LR]),
        ([failed(10, [7], loss=math.nan)], CALM, "fp16", [HALF, LR]),
        ([failed(10, [7], loss=1.0), failed(30, [8], loss=1.0)], CALM, "fp16", [HALF, LR]),
    ],
)
def test_the_likeliest_cause_comes_first(steps, history, precision, expected):
    assert causes(steps, history, precision) == expected


def test_broken_weights_come_before_all_else():
    steps = [failed(10, [7], loss=math.nan)]
    assert causes(steps, finite=False)[0] == "weights that are not finite"
    with pytest.raises(Diverged, match="weights that are not finite"):  # whatever the limit
        SkippedSteps(limit=9).add(steps, precision="fp32", weights_finite=False)


def test_images_and_boxes_are_named():
    [data, _] = likely_causes([failed(10, [7, 9], width=0.3)], CALM, precision="fp32", weights_finite=True)
    assert "images 7, 9 have boxes thinner than 1 pixel" in data["evidence"]
    content = failed(10, [7], width=0.25).as_dict()
    assert content["images"][0]["boxes"] == [[5.0, 5.0, 5.25, 25.0]]
    assert content["images"][0]["resized_size_hw"] == [64, 64]


def test_the_limit_holds_for_a_thousand_steps():
    skipped = SkippedSteps(limit=2)
    for step in (0, 10, 1000, 1010, 2009):  # never three within 1,000
        skipped.add([failed(step, [step])], precision="fp32", weights_finite=True)
    skipped.add([failed(2010, [1], counts=False)], precision="fp16", weights_finite=True)
    assert skipped.count == 6
    with pytest.raises(Diverged, match="3 of the last 1,000 steps") as caught:
        skipped.add([failed(2011, [3]), failed(2012, [4])], precision="fp32", weights_finite=True)
    assert caught.value.diagnosis["skipped_steps"] == 8
