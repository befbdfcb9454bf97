import dataclasses

import pytest
import torch

from fpn_det.structures import Batch, Categories, Detections, InputError, Proposals, Targets, printable


@pytest.fixture
def batch() -> Batch:
    targets = Targets(
        boxes=torch.rand(2, 3, 4), labels=torch.ones(2, 3, dtype=torch.int64), valid=torch.ones(2, 3, dtype=torch.bool)
    )
    return Batch(
        images=torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        sizes=torch.tensor([[30, 32], [32, 20]]),
        targets=targets,
        image_ids=torch.tensor([4, 9]),
        original_sizes=torch.tensor([[60, 64], [64, 40]]),
        seeds=torch.tensor([7, 2**63 - 1]),
    )


@pytest.fixture
def batch_with_proposals(batch: Batch) -> Batch:
    proposals = Proposals(boxes=torch.rand(2, 5, 4), scores=torch.rand(2, 5), valid=torch.ones(2, 5, dtype=torch.bool))
    return dataclasses.replace(batch, proposals=proposals)


def devices(value: object) -> set[str]:
    """Of all tensors, however deep."""
    if value is None:
        return set()
    if isinstance(value, torch.Tensor):
        return {value.device.type}
    return set().union(*(devices(getattr(value, field.name)) for field in dataclasses.fields(value)))


def test_to_moves_every_tensor_but_the_unreadable(batch: Batch) -> None:
    """Those are looked at in every step, which must not wait for a device."""
    moved = dataclasses.replace(batch, unreadable=torch.tensor([7, 8])).to("meta")
    assert isinstance(moved, Batch)
    assert isinstance(moved.targets, Targets)
    assert moved.unreadable.tolist() == [7, 8]
    assert devices(dataclasses.replace(moved, unreadable=moved.images)) == {"meta"}
    assert devices(batch) == {"cpu"}
    assert moved.targets.boxes.shape == (2, 3, 4)


def test_to_keeps_values_and_types(batch: Batch) -> None:
    same = batch.to("cpu", non_blocking=True)
    for old, new in [(batch, same), (batch.targets, same.targets)]:
        for field in dataclasses.fields(old):
            if field.name not in ("targets", "proposals"):
                value = getattr(new, field.name)
                assert torch.equal(value, getattr(old, field.name))
                assert value.dtype == getattr(old, field.name).dtype


def test_fixed_proposals_move_along_or_stay_absent(batch: Batch, batch_with_proposals: Batch) -> None:
    moved = batch_with_proposals.to("meta")
    assert isinstance(moved.proposals, Proposals)
    assert devices(moved.proposals) == {"meta"}
    assert moved.proposals.boxes.shape == (2, 5, 4)
    assert batch.to("meta").proposals is None


def test_by_default_every_image_could_be_read(batch: Batch) -> None:
    assert (batch.unreadable.shape, batch.unreadable.dtype) == ((0,), torch.int64)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_pin_memory(batch: Batch, batch_with_proposals: Batch) -> None:
    pinned = batch.pin_memory()
    assert pinned.images.is_pinned()
    assert pinned.targets.boxes.is_pinned()
    assert pinned.proposals is None
    assert batch_with_proposals.pin_memory().proposals.boxes.is_pinned()
    assert pinned.unreadable.tolist() == []
    assert not batch.images.is_pinned()


def test_values_do_not_change_and_have_names(batch: Batch) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.images = torch.zeros(0)  # type: ignore[misc]
    with pytest.raises(TypeError):
        Proposals(torch.zeros(1, 0, 4), torch.zeros(1, 0), torch.zeros(1, 0))  # type: ignore[misc]


def test_length_of_detections() -> None:
    for d in (0, 3):
        found = Detections(boxes=torch.zeros(d, 4), scores=torch.zeros(d), labels=torch.zeros(d, dtype=torch.int64))
        assert len(found) == d
        assert len(found.to("meta")) == d


def test_categories_survive_a_checkpoint() -> None:
    categories = Categories((3, 7, 90), ("cat", "Hund", "椅子"))
    assert len(categories) == 3
    state = categories.state_dict()
    assert state[1] == {"index": 1, "id": 7, "name": "Hund"}
    assert Categories.from_state_dict(state) == categories


def test_input_error_is_a_value_error() -> None:
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("red blood cell", "red blood cell"),
        (
            "Käfer, жук, 甲虫, 딱정벌레, חיפושית, भृंग, e\u0301, 🪲 \\x1b",
            "Käfer, жук, 甲虫, 딱정벌레, חיפושית, भृंग, e\u0301, 🪲 \\x1b",
        ),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("cat\nstep 1: AP 99.9\r\t", r"cat\nstep 1: AP 99.9\r\t"),
        ("a\0b\x7f\x9b2J", r"a\x00b\x7f\x9b2J"),
        ("gpj.\u202etac\u2066 \u200b\ufeff\U000e0041", r"gpj.\u202etac\u2066 \u200b\ufeff\U000e0041"),
        ("\ud800 \udc80 \U0010ffff \ue000", r"\ud800 \udc80 \U0010ffff \ue000"),
        ("a\u2028b\u2029c\x85d\xa0e", r"a\u2028b\u2029c\x85d\xa0e"),
        ("", ""),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text, keep="\n") == "\n".join(map(printable, text.split("\n")))
    assert printable(shown) == shown
    shown.encode("utf-8")
