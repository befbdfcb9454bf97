"""What a checkpoint keeps of a detector that is trained."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fpn_det.config import load_config
from fpn_det.data.shapes import CATEGORIES
from fpn_det.learner import Learner
from fpn_det.structures import Categories

SOURCE = Path("step_00000002.pth")


@pytest.fixture
def make(tiny):
    """A learner of the tiny config with these overrides."""

    def make(*overrides: str) -> Learner:
        config = load_config(Path(tiny[1]), [*tiny[2:], *overrides])
        categories = Categories(ids=tuple(CATEGORIES.values()), names=tuple(CATEGORIES))
        return Learner(config, categories, device=torch.device("cpu"), pretrained=False)

    return make


def take_two_steps(learner: Learner) -> None:
    for _ in range(2):
        for parameter in learner.model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        learner.optimizer.step()
        if learner.ema is not None:
            learner.ema.update(learner.model)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_resuming_goes_on_as_if_nothing_had_been(make):
    straight, resumed = make("train.ema_decay=0.9"), make("train.ema_decay=0.9", "seed=1")
    take_two_steps(straight)
    resumed.load_state_dict(deepcopy(straight.state_dict()) | {"step": 2}, SOURCE)
    for learner in (straight, resumed):
        torch.manual_seed(7)
        take_two_steps(learner)
    assert_same(resumed.model.state_dict(), straight.model.state_dict())
    assert_same(resumed.detector.state_dict(), straight.detector.state_dict())
    pairs = zip(straight.model.parameters(), straight.detector.parameters(), strict=True)
    assert sum(not torch.equal(value, average) for value, average in pairs) > 50


def test_an_average_that_is_new_begins_at_the_weights(make):
    without, resumed = make(), make("train.ema_decay=0.9", "seed=1")
    take_two_steps(without)
    assert without.detector is without.model
    assert without.state_dict().keys() == {"model", "optimizer"}
    resumed.load_state_dict(deepcopy(without.state_dict()) | {"step": 2}, SOURCE)
    assert resumed.detector is not resumed.model
    assert_same(resumed.detector.state_dict(), without.model.state_dict())
