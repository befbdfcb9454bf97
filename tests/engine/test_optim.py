"""Learning-rate schedule, its scaling, and which parameters an optimiser receives."""

import pytest
import torch
from torch import nn

from fpn_det.engine.optim import lr_factor, make_optimizer, scaled_lr
from fpn_det.models.norms import SyncBatchNorm

COCO_1X = {
    "num_steps": 90_000,
    "schedule": "step",
    "milestones": (0.666667, 0.888889),
    "gamma": 0.1,
    "warmup_steps": 1000,
    "warmup_factor": 0.001,
}


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.001),
        (250, 0.001 + 0.999 * 0.25),
        (999, 0.001 + 0.999 * 0.999),
        (1000, 1.0),
        (59_999, 1.0),
        (60_000, 0.1),
        (79_999, 0.1),
        (80_000, 0.01),
        (89_999, 0.01),
    ],
)
def test_step_schedule_of_the_1x_recipe(step, factor):
    assert lr_factor(step, **COCO_1X) == pytest.approx(factor, rel=1e-12)


def test_cosine_schedule():
    options = COCO_1X | {"schedule": "cosine", "num_steps": 1000, "warmup_steps": 0}
    assert [lr_factor(s, **options) for s in (0, 250, 500, 1000)] == pytest.approx([1, 0.8535534, 0.5, 0])
    assert 0 < lr_factor(999, **options) < 1e-5


def test_warmup_multiplies_the_schedule():
    options = COCO_1X | {"schedule": "cosine", "num_steps": 100, "warmup_steps": 100, "warmup_factor": 0.5}
    assert lr_factor(50, **options) == pytest.approx(0.75 * 0.5)
    # A warm-up that reaches past a milestone does not undo it.
    assert lr_factor(50, **COCO_1X | {"num_steps": 60, "warmup_steps": 100, "warmup_factor": 0.5}) == pytest.approx(
        0.75 * 0.1
    )


def test_unknown_schedule_and_kind_are_refused():
    with pytest.raises(ValueError, match="'linear'"):
        lr_factor(0, **COCO_1X | {"schedule": "linear"})
    with pytest.raises(ValueError, match="'lion'"):
        make_optimizer(nn.Linear(1, 1), kind="lion", lr=1, momentum=0, weight_decay=0, norm_weight_decay=0)


def test_lr_scales_with_the_batch():
    assert scaled_lr(0.02, batch_size=4, base_batch_size=16) == 0.005
    assert scaled_lr(0.02, batch_size=64, base_batch_size=16) == 0.08


@pytest.mark.parametrize(("kind", "cls"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_groups(kind, cls):
    conv, frozen = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
    norms = [nn.BatchNorm2d(4), SyncBatchNorm(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)]
    frozen.requires_grad_(False)
    norms[0].weight.requires_grad_(False)
    model = nn.Sequential(conv, frozen, nn.Sequential(*norms))
    optimizer = make_optimizer(model, kind=kind, lr=0.1, momentum=0.8, weight_decay=0.3, norm_weight_decay=0.0)
    assert type(optimizer) is cls
    decayed, undecayed = optimizer.param_groups
    assert [decayed["weight_decay"], undecayed["weight_decay"]] == [0.3, 0.0]
    assert {id(p) for p in decayed["params"]} == {id(conv.weight), id(conv.bias)}
    expected = {id(p) for norm in norms for p in norm.parameters()} - {id(norms[0].weight)}
    assert {id(p) for p in undecayed["params"]} == expected
    if kind == "sgd":
        assert decayed["momentum"] == undecayed["momentum"] == 0.8


def test_norms_do_not_shrink():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    optimizer = make_optimizer(model, kind="sgd", lr=1.0, momentum=0, weight_decay=0.5, norm_weight_decay=0.0)
    before = model[0].weight.clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(model[0].weight, before / 2)
    assert torch.equal(model[1].weight, torch.ones(2))


def test_a_model_without_norms_has_one_group():
    optimizer = make_optimizer(nn.Linear(2, 2), kind="sgd", lr=1, momentum=0, weight_decay=0.1, norm_weight_decay=0)
    assert len(optimizer.param_groups) == 1
