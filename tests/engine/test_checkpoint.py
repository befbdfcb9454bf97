"""Checkpoints: what was written comes back or is refused with a reason."""

import copy
import pickle
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fpn_det.engine import checkpoint
from fpn_det.engine.optim import make_optimizer
from fpn_det.structures import Categories, InputError

CATEGORIES = Categories((3, 7), ("cat", "dog"))


def state(step: int = 5, **changes) -> dict:
    model = nn.Linear(3, 2).state_dict()
    return {"model": model, "categories": CATEGORIES.state_dict(), "config": "name: x", "step": step} | changes


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        checkpoint.load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_moments_follow_the_memory_format_of_their_parameters(kind: str) -> None:
    """A run that goes on with another `runtime.channels_last` than it began with: as if nothing had changed."""
    torch.manual_seed(0)
    options = {"kind": kind, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "norm_weight_decay": 0.0, "fused": True}

    def steps(conv: nn.Conv2d, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            optimizer.zero_grad()
            conv(torch.randn(2, 3, 8, 8)).square().sum().backward()
            optimizer.step()

    straight = nn.Conv2d(3, 4, 3)
    resumed = copy.deepcopy(straight)
    optimizer = make_optimizer(straight, **options)
    steps(straight, optimizer, range(3))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(straight.state_dict())
    steps(straight, optimizer, range(3, 6))

    resumed.to(memory_format=torch.channels_last)
    resumed.load_state_dict(weights)
    optimizer = make_optimizer(resumed, **options)
    checkpoint.load_optimizer(optimizer, saved, Path("x.pth"))
    steps(resumed, optimizer, range(3, 6))
    torch.testing.assert_close(resumed.weight, straight.weight)


def test_round_trip(tmp_path):
    given = state()
    checkpoint.save_checkpoint(tmp_path / "final.pth", given)
    found = checkpoint.load_checkpoint(tmp_path / "final.pth")
    assert found["step"] == 5
    assert found["config"] == "name: x"
    assert torch.equal(found["model"]["weight"], given["model"]["weight"])
    assert checkpoint.checkpoint_categories(found) == CATEGORIES
    assert [p.name for p in tmp_path.iterdir()] == ["final.pth"]


@pytest.mark.parametrize("offset", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_in_a_tensor_is_found(tmp_path, offset, bit):
    """`torch.load` reads such a file without a word."""
    path = tmp_path / "final.pth"
    weights = torch.randn(10_000)
    checkpoint.save_checkpoint(path, state(model={"weight": weights}))
    content = bytearray(path.read_bytes())
    first = content.index(weights.numpy().tobytes())
    content[first + int(offset * 40_000)] ^= 1 << bit
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["weight"], weights)
    assert "checksum" in refusal(path)


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_whatever_bit_flips_the_content_is_right_or_refused(position, bit):
    whole = pickled()
    content = bytearray(whole)
    content[int(position * len(content))] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "final.pth"
        path.write_bytes(content)
        try:
            found = checkpoint.load_checkpoint(path)
        except InputError:
            return
    assert torch.equal(found["model"]["weight"], torch.arange(500.0))
    assert (found["step"], found["config"]) == (5, "name: x")


@cache
def pickled() -> bytes:
    """A checkpoint as it lies on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "final.pth"
        checkpoint.save_checkpoint(path, state(model={"weight": torch.arange(500.0)}))
        return path.read_bytes()


def test_compressed_files_are_refused(tmp_path):
    """They could unpack to more than the memory holds."""
    path = tmp_path / "final.pth"
    checkpoint.save_checkpoint(path, state())
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert "compressed" in refusal(packed)


def test_missing_file_names_its_neighbours(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "nowhere" / "final.pth")
    checkpoint.save_checkpoint(tmp_path / "best.pth", state())
    assert "best.pth" in refusal(tmp_path / "final.pth")
    assert "best.pth" in refusal(tmp_path)  # the folder instead of the file


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "final.pth"
    checkpoint.save_checkpoint(path, state())
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8).numpy().tobytes() for n in range(200)]
    for content in [*(whole[:n] for n in (0, 1, 10, len(whole) // 2, len(whole) - 1)), *noise, b"hello", b"\x80\x02."]:
        path.write_bytes(content)
        assert "not a checkpoint" in refusal(path)


class Mine:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_a_checkpoint_cannot_run_code(tmp_path, save):
    save(state(model=Mine(tmp_path / "executed")), tmp_path / "final.pth")
    assert "not a checkpoint" in refusal(tmp_path / "final.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "lacks"),
    [
        ({"state_dict": {}, "epoch": 3}, "categories, config, model, step"),
        ({"model": {}, "categories": [], "config": ""}, "step"),
        ([1, 2], "categories"),
        (torch.zeros(3), "categories"),
    ],
)
def test_foreign_checkpoints_are_refused(tmp_path, content, lacks):
    torch.save(content, tmp_path / "theirs.pth")
    assert f"lacks {lacks}" in refusal(tmp_path / "theirs.pth")


def test_weights_of_another_architecture_are_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    weights = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 2)).state_dict()
    before = model[0].weight.clone()
    with pytest.raises(InputError) as caught:
        checkpoint.load_weights(model, weights, Path("runs/a/final.pth"))
    message = str(caught.value)
    assert message.startswith("runs/a/final.pth: ")
    assert "2 tensors missing, 2 unexpected, 2 of another shape" in message
    assert "1.bias is missing" in message
    assert "2.bias is not expected" in message
    assert "0.weight is (4, 3), expected (2, 3)" in message
    assert "config.yaml" in message
    assert torch.equal(model[0].weight, before)


def test_the_moving_average_is_what_detects():
    assert checkpoint.best_weights(state(ema={"w": torch.ones(1)})) == {"w": torch.ones(1)}
    plain = state()
    assert checkpoint.best_weights(plain) is plain["model"]


def test_other_categories_are_refused():
    own = state()
    checkpoint.check_categories(own, Path("final.pth"), CATEGORIES, Path("val.json"))
    for other in (Categories((3, 8), ("cat", "dog")), Categories((3, 7), ("cat", "cow")), Categories((3,), ("cat",))):
        with pytest.raises(InputError, match=r"final\.pth was trained on 2 classes.*val\.json has"):
            checkpoint.check_categories(own, Path("final.pth"), other, Path("val.json"))
    other = Categories((3, 7), ("cat", "\nerror: no"))
    with pytest.raises(InputError, match=r"has 2 classes \(cat, \\nerror: no; ids 3, 7\)"):
        checkpoint.check_categories(own, Path("final.pth"), other, Path("val.json"))


def make(kind: str, model: nn.Module, **options) -> torch.optim.Optimizer:
    optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind](model.parameters(), **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return optimizer


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_optimizer_state_with_the_decay_of_the_config(kind):
    model = nn.Linear(2, 2)
    options = {"momentum": 0.9} if kind == "sgd" else {}
    old = make(kind, model, lr=0.1, weight_decay=0.5, **options)
    old.step()
    new = make(kind, model, lr=0.2, weight_decay=0.25, **options)
    checkpoint.load_optimizer(new, old.state_dict(), Path("step.pth"))
    assert (new.param_groups[0]["lr"], new.param_groups[0]["weight_decay"]) == (0.2, 0.25)
    assert all(p is q for p, q in zip(new.param_groups[0]["params"], model.parameters(), strict=True))
    moment = "momentum_buffer" if kind == "sgd" else "exp_avg"
    assert torch.equal(new.state[model.weight][moment], old.state[model.weight][moment])


def test_optimizer_of_another_kind_or_other_layers_is_refused():
    model = nn.Linear(2, 2)
    saved = make("sgd", model, lr=0.1, momentum=0.9).state_dict()
    for other in (make("adamw", model, lr=0.1), make("sgd", nn.Linear(2, 2, bias=False), lr=0.1, momentum=0.9)):
        with pytest.raises(InputError, match=r"step\.pth: .*optim\.kind.*frozen_stages"):
            checkpoint.load_optimizer(other, saved, Path("step.pth"))
