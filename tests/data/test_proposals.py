"""Fixed proposals: what comes back from the file, and what the file refuses to be."""

from __future__ import annotations

import io
import random
import tempfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_det.data import proposals as module
from fpn_det.data.proposals import FixedProposals, ImageProposals, read_proposals, write_proposals
from fpn_det.data.transforms import TestTransform, TrainTransform, flip_horizontally, flip_vertically
from fpn_det.structures import InputError, Sample

SHA = "0123456789abcdef" * 4


def random_boxes(count: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Within an image of `size` (h, w), wider and higher than a hundredth of it."""
    rng = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=rng) * 0.98
    far = corners + 0.01 + torch.rand(count, 2, generator=rng) * (0.99 - corners)
    return torch.cat([corners, far], 1) * torch.tensor([size[1], size[0]]).repeat(2)


def descending_scores(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values


def encode(image_id: int, size: tuple[int, int], boxes: torch.Tensor, scores: torch.Tensor) -> ImageProposals:
    return ImageProposals.encode(image_id=image_id, size=size, boxes=boxes, scores=scores)


def write(path: Path, images: list[ImageProposals]) -> FixedProposals:
    write_proposals(path, images, config="r50_fpn", checkpoint_sha256=SHA)
    return read_proposals(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 5, 0 and 3 proposals of images 7, 8 and 30."""
    path = tmp_path / "proposals.npz"
    sizes = {30: (40, 60), 7: (480, 640), 8: (50, 50)}
    counts = {30: 3, 7: 5, 8: 0}
    write(path, [encode(i, sizes[i], random_boxes(n, sizes[i]), descending_scores(n)) for i, n in counts.items()])
    return path


# What comes back

images = st.dictionaries(
    st.integers(-(2**63), 2**63 - 1),
    st.tuples(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 30)),
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(images)
def test_round_trip(content: dict[int, tuple[int, int, int]]) -> None:
    """Any images in any order, down to none: at most half a step of 1/65535 of the side away, in the same order."""
    given_boxes = {i: random_boxes(n, (h, w), seed=n) for i, (h, w, n) in content.items()}
    given_scores = {i: descending_scores(n, seed=n) for i, (_, _, n) in content.items()}
    with tempfile.TemporaryDirectory() as folder:
        found = write(
            Path(folder) / "p.npz",
            [encode(i, (h, w), given_boxes[i], given_scores[i]) for i, (h, w, _) in content.items()],
        )
    assert len(found) == len(content)
    assert found.image_ids.tolist() == sorted(content)
    for image_id, (h, w, n) in content.items():
        boxes, scores = found.of(image_id)
        assert (boxes.shape, boxes.dtype, scores.shape, scores.dtype) == ((n, 4), torch.float32, (n,), torch.float32)
        bound = torch.tensor([w, h, w, h]) * (1 / 131070 + 2e-7)  # and the rounding of float32
        assert ((boxes - given_boxes[image_id]).abs() <= bound).all()
        assert (scores - given_scores[image_id]).abs().max() <= 2**-12 if n else True


def test_pixel_error_that_the_module_states(tmp_path: Path) -> None:
    """Reached, and not exceeded: 0.005 px of 640, 0.03 px of 4000."""
    for side, error in ((640, 0.005), (4000, 0.031)):
        boxes = random_boxes(100_000, (side, side))
        found, _ = write(tmp_path / "p.npz", [encode(1, (side, side), boxes, descending_scores(100_000))]).of(1)
        assert 0.9 * error < (found - boxes).abs().max() < error


@pytest.mark.parametrize("size", [(1, 1), (333, 640), (5000, 7)])
def test_boxes_are_clipped_and_borders_are_exact(tmp_path: Path, size: tuple[int, int]) -> None:
    h, w = size
    boxes = torch.tensor([[0, 0, w, h], [-3, -0.5, w + 9, h + 0.001], [0.5 * w, 0, 2 * w, h]])
    found, scores = write(tmp_path / "p.npz", [encode(1, size, boxes, torch.tensor([0.75, 0.5, 0.25]))]).of(1)
    assert found[:2].tolist() == [[0, 0, w, h]] * 2
    assert found[2, 1:].tolist() == [0, w, h]
    assert scores.tolist() == [0.75, 0.5, 0.25]


def test_boxes_without_area_are_left_out_with_their_scores(tmp_path: Path) -> None:
    """Beside the image, or too thin for the file."""
    boxes = torch.tensor([[9.0, 0, 12, 8], [1, 1, 1.00001, 8], [1, 2, 3, 4], [1, 5, 8, 5]])
    found, scores = write(tmp_path / "p.npz", [encode(1, (8, 8), boxes, torch.tensor([1, 0.75, 0.5, 0.25]))]).of(1)
    torch.testing.assert_close(found, boxes[2:3], atol=1e-4, rtol=0)
    assert scores.tolist() == [0.5]


def test_provenance_and_size(path: Path) -> None:
    found = read_proposals(path)
    assert (found.config, found.checkpoint_sha256, found.source) == ("r50_fpn", SHA, path)
    assert found.summary() == f"{path}: 8 proposals in 3 images, of config r50_fpn and checkpoint 0123456789ab"
    before = path.stat().st_size
    size = (480, 640)
    write(path, [encode(1, size, random_boxes(10_000, size), descending_scores(10_000))])
    assert path.stat().st_size < before + 10 * 10_000 + 100, "10 bytes per box"


def test_the_file_does_not_depend_on_the_order_of_the_images(path: Path, tmp_path: Path) -> None:
    size = (30, 40)
    images = [encode(i, size, random_boxes(i, size), descending_scores(i)) for i in range(5)]
    write(path, images)
    write(tmp_path / "other.npz", images[::-1])
    with np.load(path) as one, np.load(tmp_path / "other.npz") as other:
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_workers_that_are_not_forked_share_the_memory(path: Path) -> None:
    """As torch sends it to them."""
    found = read_proposals(path)
    sent = ForkingPickler.loads(ForkingPickler.dumps(found))
    assert all(torch.equal(a, b) for a, b in zip(sent.of(7), found.of(7), strict=True))
    found.boxes[0, 0] = found.boxes[0, 0].item() ^ 1
    assert sent.boxes[0, 0] == found.boxes[0, 0]


# Other images


@pytest.mark.parametrize("image_id", [-1, 9, 31])
def test_an_image_without_entry(path: Path, image_id: int) -> None:
    with pytest.raises(InputError, match=rf"proposals.npz: no proposals for image {image_id}; .*tools/proposals.py"):
        read_proposals(path).of(image_id)


def test_check_images(path: Path) -> None:
    found, annotations = read_proposals(path), Path("train.json")
    found.check_images(torch.tensor([30, 7]), torch.tensor([[40, 60], [480, 640]]), annotations)
    with pytest.raises(InputError) as missing:
        found.check_images(torch.tensor([30, 1, 7, 99]), torch.ones(4, 2, dtype=torch.int64), annotations)
    assert str(missing.value) == (
        f"{path}: no proposals for 2 of the 4 images of train.json (ids 1, 99); make it with tools/proposals.py from "
        "this data set"
    )
    with pytest.raises(InputError) as different:
        found.check_images(torch.tensor([7, 30]), torch.tensor([[480, 640], [60, 40]]), annotations)
    assert str(different.value) == (
        f"{path}: made for other images: image 30 was 60x40 (width x height), in train.json it is 40x60 (1 such "
        "images); make it with tools/proposals.py from this data set"
    )


def test_check_images_of_a_file_without_images(tmp_path: Path) -> None:
    found = write(tmp_path / "p.npz", [])
    with pytest.raises(InputError, match=r"no proposals for 7 of the 7 images .* 0, 1, 2, 3, 4, \.\.\.\)"):
        found.check_images(torch.arange(7), torch.ones(7, 2, dtype=torch.int64), Path("a.json"))


# Files that cannot be used


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_proposals(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "tools/proposals.py" in message
    assert "\n" not in message
    return message


def npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"<html>not found</html>", npy(np.zeros(3)), npy(np.zeros(()))]
)
def test_other_files(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "damaged, or not a file of proposals" in refusal(path)


def test_no_such_file(tmp_path: Path) -> None:
    assert "no such file of proposals" in refusal(tmp_path / "p.npz")
    assert "no such file of proposals" in refusal(tmp_path)


def test_nothing_is_unpickled(path: Path, tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    path.write_bytes(npz(version=np.array([Exploit()], dtype=object)))
    assert "damaged, or not a file of proposals (ValueError" in refusal(path)
    assert not (tmp_path / "executed").exists()


def test_cut_off_or_changed_anywhere(path: Path) -> None:
    """An error, or the same content (some bytes of a zip file mean nothing); never another content."""
    good, found = path.read_bytes(), read_proposals(path)
    rng = random.Random(0)
    refused = 0
    for trial in range(300):
        position = rng.randrange(len(good))
        bad = bytearray(good)
        bad[position] ^= 1 << rng.randrange(8)
        path.write_bytes(bad if trial % 3 else good[:position])
        try:
            changed = read_proposals(path)
        except InputError:
            refused += 1
        else:
            assert all(torch.equal(a, b) for i in (7, 8, 30) for a, b in zip(changed.of(i), found.of(i), strict=True))
    assert refused > 150


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def test_another_version(path: Path) -> None:
    path.write_bytes(npz(version=2, anything=np.zeros(3)))
    assert "(version 2, expected 1)" in refusal(path)


@pytest.mark.parametrize("name", sorted(module.LAYOUT))
def test_a_missing_array_is_named(path: Path, name: str) -> None:
    content = arrays(path)
    del content[name]
    path.write_bytes(npz(**content))
    assert f"(it lacks {name})" in refusal(path)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("version", lambda a: np.array("1"), "version is <U1"),
        ("version", lambda a: np.array([1, 1]), "version is int64 of shape (2,)"),
        ("config", lambda a: np.array(3), "config is int64"),
        ("image_ids", lambda a: a.astype(np.int32), "image_ids is int32"),
        ("image_ids", lambda a: a.astype(">i8"), "image_ids is >i8"),
        ("image_ids", lambda a: a[::-1], "image_ids must ascend"),
        ("image_ids", lambda a: a[[0, 0, 2]], "image_ids must ascend"),
        ("image_ids", lambda a: a[:2], "image_ids must ascend and be as many as sizes"),
        ("sizes", lambda a: a[:, :1], "sizes is int64 of shape (3, 1)"),
        ("sizes", lambda a: a[:2], "as many as sizes"),
        ("offsets", lambda a: a[:3], "one less than offsets"),
        ("offsets", lambda a: a + 1, "offsets must ascend from 0"),
        ("offsets", lambda a: np.array([1, 5, 5, 8]), "offsets must ascend from 0"),
        ("offsets", lambda a: np.array([0, 6, 5, 8]), "offsets must ascend from 0"),
        ("offsets", lambda a: np.array([0, 5, 5, 9]), "offsets must ascend from 0 to the number of boxes"),
        ("boxes", lambda a: a / np.float32(65535), "boxes is float32"),
        ("boxes", lambda a: a[:, :3], "boxes is uint16 of shape (8, 3)"),
        ("boxes", lambda a: a[:7], "number of boxes and of scores"),
        ("scores", lambda a: a[:7], "number of boxes and of scores"),
        ("scores", lambda a: a[:, None], "scores is float16 of shape (8, 1)"),
        ("boxes", lambda a: a[:, [2, 3, 0, 1]], "boxes without an area"),
        ("boxes", lambda a: a * np.uint16([1, 0, 1, 0]), "boxes without an area"),
        ("scores", lambda a: a - np.float16(2), "scores outside of 0..1"),
        ("scores", lambda a: a * np.float16("nan"), "scores outside of 0..1"),
    ],
)
def test_malformed_arrays_are_named(path: Path, name: str, change: object, reason: str) -> None:
    content = arrays(path)
    content[name] = change(content[name])  # type: ignore[operator]
    path.write_bytes(npz(**content))
    assert reason in refusal(path)


def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fail(file: io.BufferedWriter, **_: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(InputError, match="No space"):
        write_proposals(path, [], config="", checkpoint_sha256=SHA)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# Through the transforms


def sample(num_proposals: int | None, seed: int = 0) -> Sample:
    """The proposals are the boxes, so they must stay the same wherever they go."""
    boxes = random_boxes(num_proposals or 0, (60, 80), seed)
    scores = descending_scores(num_proposals or 0, seed)
    return Sample(
        image=torch.zeros(3, 60, 80, dtype=torch.uint8),
        boxes=boxes,
        labels=torch.zeros(len(boxes), dtype=torch.int64),
        image_id=1,
        original_size=(60, 80),
        proposals=None if num_proposals is None else boxes.clone(),
        proposal_scores=None if num_proposals is None else scores,
    )


@pytest.mark.parametrize("num_proposals", [0, 1, 20])
def test_proposals_move_like_boxes(num_proposals: int) -> None:
    """Resized, mirrored, both; in the same order, with the same scores."""
    before = sample(num_proposals)
    train = TrainTransform(short_sides=(33, 60, 90), long_side=110, horizontal_flip=0.5, vertical_flip=0.5)
    test = TestTransform(short_side=45, long_side=70)
    changed = 0
    for seed in range(30):
        for after in (
            train(before, random.Random(seed)),
            test(before, random.Random(seed)),
            flip_horizontally(before),
            flip_vertically(before),
        ):
            assert after.proposals is not None
            assert torch.equal(after.proposals, after.boxes)
            assert after.proposal_scores is before.proposal_scores
            changed += not torch.equal(after.proposals, before.boxes)
    assert changed > 100 if num_proposals else changed == 0


def test_samples_without_proposals_stay_so() -> None:
    train = TrainTransform(short_sides=(33,), long_side=110, horizontal_flip=1, vertical_flip=1)
    assert train(sample(None), random.Random(0)).proposals is None
