"""The stream of batches: a pure function of (seed, step), whatever the processes and workers."""

from __future__ import annotations

import fcntl
import gc
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_det.cli import user_errors
from fpn_det.data import loader
from fpn_det.data.coco import CocoAnnotations, load_coco
from fpn_det.data.loader import (
    MAX_REPLACEMENTS,
    WINDOW_BATCHES,
    BatchLoader,
    DetectionDataset,
    Key,
    OnUnreadable,
    TestSampler,
    TrainSampler,
    collate,
    explain_unreadable,
    make_loader,
    why_unreadable,
    worker_errors,
)
from fpn_det.data.proposals import FixedProposals, ImageProposals, read_proposals, write_proposals
from fpn_det.data.transforms import TestTransform, TrainTransform
from fpn_det.structures import Batch, InputError, Sample


def random_sizes(n: int, seed: int = 0) -> torch.Tensor:
    """About half portrait, a few square."""
    return torch.randint(30, 40, (n, 2), generator=torch.Generator().manual_seed(seed))


def take(sampler: TrainSampler, count: int) -> list[list[Key]]:
    return list(itertools.islice(sampler, count))


# Training stream


@pytest.mark.parametrize("start", [1, 5, 15, 16, 17, 40])
@pytest.mark.parametrize("n", [3, 7, 100])
def test_starting_at_a_step_equals_skipping_to_it(n: int, start: int) -> None:
    """Also where the micro-batches are several per step."""
    for options in ({}, {"accumulate": 2}, {"world_size": 2, "rank": 1}):
        straight = TrainSampler(random_sizes(n), batch_size=4, seed=3, **options)
        resumed = TrainSampler(random_sizes(n), batch_size=4, seed=3, start_step=start, **options)
        skipped = start * options.get("accumulate", 1)
        assert take(resumed, 30) == take(straight, skipped + 30)[skipped:]


def test_the_stream_can_be_started_twice() -> None:
    sampler = TrainSampler(random_sizes(9), batch_size=4, seed=3, start_step=2)
    assert take(sampler, 20) == take(sampler, 20)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 4), (4, 2), (8, 1)])
def test_ranks_and_micro_batches_share_out_the_same_steps(world_size: int, accumulate: int) -> None:
    num_steps, sizes = 40, random_sizes(50)
    whole = take(TrainSampler(sizes, batch_size=8, seed=1), num_steps)
    streams = [
        take(
            TrainSampler(sizes, batch_size=8, seed=1, rank=r, world_size=world_size, accumulate=accumulate),
            num_steps * accumulate,
        )
        for r in range(world_size)
    ]
    assert {len(micro) for stream in streams for micro in stream} == {8 // (world_size * accumulate)}
    for step in range(num_steps):
        shares = [micro for stream in streams for micro in stream[step * accumulate : (step + 1) * accumulate]]
        assert [key for share in shares for key in share] == whole[step]


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (1, 4), (3, 8), (64, 4), (100, 4), (63, 1), (1000, 8)])
def test_every_image_comes_once_per_epoch(n: int, batch_size: int) -> None:
    """After whole windows the counts differ by one at most; where n divides them, they are equal."""
    sampler = TrainSampler(random_sizes(n), batch_size=batch_size, seed=0)
    counts = Counter(dict.fromkeys(range(n), 0))
    for window in range(1, 30):
        counts.update(i for batch in sampler.window(window - 1) for i, _ in batch)
        seen = window * WINDOW_BATCHES * batch_size
        assert set(counts.values()) == {seen // n, -(-seen // n)}
        assert counts.total() == seen


def test_epochs_and_seeds_give_other_batches() -> None:
    sizes = torch.full((WINDOW_BATCHES * 4, 2), 10)  # one window is one epoch

    def company(seed: int, window: int) -> set[tuple[int, ...]]:
        """Which images share a batch, whatever the order of the batches."""
        return {tuple(i for i, _ in batch) for batch in TrainSampler(sizes, batch_size=4, seed=seed).window(window)}

    companies = [company(0, 0), company(0, 1), company(0, 2), company(1, 0)]
    assert all(sorted(i for batch in c for i in batch) == list(range(len(sizes))) for c in companies)
    assert all(len(a & b) < 3 for a, b in itertools.combinations(companies, 2))
    assert company(0, 0) == companies[0]


def test_the_augmentation_seed_differs_between_occurrences() -> None:
    seeds = [
        seed
        for run in (0, 1)
        for batch in take(TrainSampler(random_sizes(5), batch_size=4, seed=run), 400)
        for _, seed in batch
    ]
    assert len(set(seeds)) == len(seeds) == 3200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) >= 2**62, "63 bits: collisions do not happen, and they fit a tensor"


def test_portrait_and_landscape_are_apart_in_all_but_one_batch_of_a_window() -> None:
    sizes = random_sizes(1000)
    portrait = (sizes[:, 0] > sizes[:, 1]).tolist()
    grouped = TrainSampler(sizes, batch_size=8, seed=0)
    ungrouped = TrainSampler(sizes, batch_size=8, seed=0, group_by_aspect=False)

    def mixed(sampler: TrainSampler, number: int) -> int:
        return sum(len({portrait[i] for i, _ in batch}) == 2 for batch in sampler.window(number))

    assert all(mixed(grouped, number) <= 1 for number in range(20))
    assert all(mixed(ungrouped, number) > 8 for number in range(20))
    # Not all landscape batches first: within a window the batches come in random order.
    kinds = [[portrait[batch[0][0]] for batch in grouped.window(number)] for number in range(20)]
    assert all(sum(a != b for a, b in itertools.pairwise(k)) > 1 for k in kinds)
    same_images = [sorted(i for b in s.window(0) for i, _ in b) for s in (grouped, ungrouped)]
    assert same_images[0] == same_images[1]


def test_a_window_of_a_large_data_set_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The permutation of an epoch is drawn once, not once per image or window."""
    drawn = []
    original = TrainSampler._permutation
    monkeypatch.setattr(TrainSampler, "_permutation", lambda self, epoch: drawn.append(epoch) or original(self, epoch))
    take(TrainSampler(random_sizes(5000), batch_size=16, seed=0), 1000)
    assert drawn == [0, 1, 2, 3]


# Test stream


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 10, 33])
def test_every_test_image_comes_once_in_batches_that_no_world_size_changes(n: int, batch_size: int) -> None:
    sizes = random_sizes(n)
    alone = list(TestSampler(sizes, batch_size=batch_size))
    assert sorted(i for batch in alone for i, _ in batch) == list(range(n))
    assert [len(batch) for batch in alone[:-1]] == [batch_size] * (len(alone) - 1)
    for world_size in (1, 2, 3, 7, 50):
        shares = [TestSampler(sizes, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)]
        batches = [batch for share in shares for batch in share]
        assert sorted(batches) == sorted(alone)
        assert [len(share) for share in shares] == [len(list(share)) for share in shares]
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1


def test_test_batches_hold_similar_aspects() -> None:
    sizes = random_sizes(64)
    aspects = [[(sizes[i, 1] / sizes[i, 0]).item() for i, _ in batch] for batch in TestSampler(sizes, batch_size=4)]
    flat = [a for batch in aspects for a in batch]
    assert flat == sorted(flat)


# Collate


def sample(height: int, width: int, num_boxes: int, image_id: int = 1) -> Sample:
    return Sample(
        image=torch.randint(1, 256, (3, height, width), dtype=torch.uint8),
        boxes=torch.rand(num_boxes, 4) + 1,
        labels=torch.arange(num_boxes) + 1,
        image_id=image_id,
        original_size=(2 * height, 3 * width),
    )


def test_collate_pads_at_the_right_and_the_bottom() -> None:
    samples = [sample(33, 20, 2, image_id=-(2**63)), sample(10, 64, 0, image_id=2**63 - 1), sample(5, 7, 3)]
    samples[1] = replace(samples[1], seed=2**63 - 1)
    batch = collate(samples)
    assert batch.seeds.tolist() == [0, 2**63 - 1, 0]
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.sizes.tolist() == [[33, 20], [10, 64], [5, 7]]
    assert batch.original_sizes.tolist() == [[66, 60], [20, 192], [10, 21]]
    assert batch.image_ids.tolist() == [-(2**63), 2**63 - 1, 1]
    targets = batch.targets
    assert (targets.boxes.shape, targets.labels.shape, targets.valid.shape) == ((3, 3, 4), (3, 3), (3, 3))
    assert (targets.boxes.dtype, targets.labels.dtype, targets.valid.dtype) == (
        torch.float32,
        torch.int64,
        torch.bool,
    )
    assert targets.valid.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    for i, s in enumerate(samples):
        h, w = s.image.shape[1:]
        assert torch.equal(batch.images[i, :, :h, :w], s.image)
        assert batch.images[i].count_nonzero() == s.image.numel(), "padding is zero"
        assert torch.equal(targets.boxes[i][targets.valid[i]], s.boxes)
        assert torch.equal(targets.labels[i][targets.valid[i]], s.labels)
    assert targets.boxes[~targets.valid].count_nonzero() == 0
    assert targets.labels[~targets.valid].count_nonzero() == 0


def test_collate_without_any_box() -> None:
    batch = collate([sample(32, 64, 0), sample(32, 64, 0)])
    assert batch.images.shape == (2, 3, 32, 64), "a multiple of 32 stays"
    assert batch.targets.boxes.shape == (2, 0, 4)
    assert batch.targets.labels.shape == batch.targets.valid.shape == (2, 0)


def test_collate_keeps_float_images() -> None:
    halves = replace(sample(33, 20, 1), image=torch.full((3, 33, 20), 0.5))
    images = collate([halves, halves]).images
    assert images.dtype == torch.float32
    assert images[:, :, :33, :20].eq(0.5).all()


def test_collate_lists_what_could_not_be_read() -> None:
    samples = [sample(9, 9, 1), *(replace(sample(9, 9, 1), unreadable=ids) for ids in ((5, 2**63 - 1), (7,)))]
    unreadable = collate(samples).unreadable
    assert (unreadable.tolist(), unreadable.dtype) == ([5, 2**63 - 1, 7], torch.int64)
    unreadable = collate(samples[:1]).unreadable
    assert (unreadable.shape, unreadable.dtype) == ((0,), torch.int64)


def test_collate_to_another_divisor() -> None:
    assert collate([sample(65, 128, 1)], size_divisor=64).images.shape == (1, 3, 128, 128)


@pytest.mark.parametrize("in_worker", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_collate_writes_every_pixel_of_memory_that_was_in_use(
    monkeypatch: pytest.MonkeyPatch, in_worker: bool, dtype: torch.dtype
) -> None:
    """Channels last; in a worker it is the memory that the main process reads."""
    memory = []

    def used(*arguments: Any) -> torch.Tensor:
        memory.append(original(*arguments).fill_(77))
        return memory[0]

    original = loader._empty_images
    monkeypatch.setattr(loader, "_empty_images", used)
    monkeypatch.setattr(loader, "get_worker_info", lambda: object() if in_worker else None)
    samples = [sample(33, 20, 2), sample(64, 7, 0), sample(5, 32, 1)]
    samples = [replace(s, image=s.image.to(dtype)) for s in samples]
    images = collate(samples).images
    assert images.data_ptr() == memory[0].data_ptr()
    assert images.is_shared() == in_worker
    assert images.stride() == (64 * 32 * 3, 1, 32 * 3, 3)
    assert images.dtype == dtype
    for image, s in zip(images, samples, strict=True):
        h, w = s.image.shape[1:]
        assert torch.equal(image[:, :h, :w], s.image)
        assert image.count_nonzero() == s.image.numel(), "padding is zero"


def with_proposals(before: Sample, count: int) -> Sample:
    scores = torch.rand(count).sort(descending=True).values
    return replace(before, proposals=torch.rand(count, 4) + 1, proposal_scores=scores)


def test_collate_pads_proposals_apart_from_boxes() -> None:
    samples = [with_proposals(sample(9, 9, g), p) for g, p in ((4, 2), (0, 0), (1, 5))]
    batch = collate(samples)
    proposals = batch.proposals
    assert proposals is not None
    assert batch.targets.boxes.shape == (3, 4, 4)
    assert (proposals.boxes.shape, proposals.scores.shape, proposals.valid.shape) == ((3, 5, 4), (3, 5), (3, 5))
    assert (proposals.boxes.dtype, proposals.scores.dtype, proposals.valid.dtype) == (
        torch.float32,
        torch.float32,
        torch.bool,
    )
    assert proposals.valid.tolist() == [[True, True, False, False, False], [False] * 5, [True] * 5]
    for i, s in enumerate(samples):
        assert torch.equal(proposals.boxes[i][proposals.valid[i]], s.proposals)
        assert torch.equal(proposals.scores[i][proposals.valid[i]], s.proposal_scores)
    assert proposals.boxes[~proposals.valid].count_nonzero() == 0
    assert proposals.scores[~proposals.valid].count_nonzero() == 0


def test_collate_without_any_proposal() -> None:
    """None of them fixed is not the same as fixed and none of them."""
    assert collate([sample(9, 9, 1), sample(9, 9, 2)]).proposals is None
    proposals = collate([with_proposals(sample(9, 9, 1), 0)] * 2).proposals
    assert proposals is not None
    assert (proposals.boxes.shape, proposals.scores.shape, proposals.valid.shape) == ((2, 0, 4), (2, 0), (2, 0))


# End to end


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> CocoAnnotations:
    """Ten images of noise in portrait and landscape, one without a box."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    images, boxes = [], []
    for i in range(10):
        height, width = (48, 64) if i % 3 else (64, 40)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{i}.jpg")
        images.append({"id": 100 - i, "file_name": f"{i}.jpg", "width": width, "height": height})
        boxes += [{"id": len(boxes), "image_id": 100 - i, "category_id": 1, "bbox": [j, 3, 9, 8]} for j in range(i)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}))
    return load_coco(path, folder)


TRAIN = TrainTransform(short_sides=(32, 40, 48), long_side=80, horizontal_flip=0.5, vertical_flip=0.5)


def train_loader(
    annotations: CocoAnnotations, *, num_workers: int, on_unreadable: OnUnreadable = "fail", **of_sampler: int
) -> BatchLoader:
    sampler = TrainSampler(annotations.sizes, batch_size=4, seed=5, **of_sampler)
    dataset = DetectionDataset(annotations, TRAIN, on_unreadable=on_unreadable)
    return make_loader(dataset, sampler, num_workers=num_workers, pin_memory=False)


def batches(annotations: CocoAnnotations, *, num_workers: int, **options: Any) -> Iterator[Any]:
    return iter(train_loader(annotations, num_workers=num_workers, **options))


def workers_of(loader: BatchLoader) -> list[multiprocessing.Process]:
    return loader._iterator._workers


def identical(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(a, b)
        for part, reference in ((one, other), (one.targets, other.targets))
        for a, b in ((v, getattr(reference, k)) for k, v in vars(part).items() if isinstance(v, torch.Tensor))
    )


def test_workers_change_nothing_and_resuming_goes_on(annotations: CocoAnnotations) -> None:
    """Nor does the state of the global random generators."""
    torch.manual_seed(1)
    straight = list(itertools.islice(batches(annotations, num_workers=0), 12))
    torch.manual_seed(2)
    parallel = list(itertools.islice(batches(annotations, num_workers=2), 12))
    resumed = list(itertools.islice(batches(annotations, num_workers=0, start_step=7), 5))
    assert all(identical(a, b) for a, b in zip(straight, parallel, strict=True))
    assert all(identical(a, b) for a, b in zip(straight[7:], resumed, strict=True))
    assert not identical(straight[0], straight[1])
    assert {tuple(b.images.shape[:2]) for b in straight} == {(4, 3)}
    assert all(side % 32 == 0 for b in straight for side in b.images.shape[2:])


def test_test_batches_in_a_persistent_loader_can_be_read_again(annotations: CocoAnnotations) -> None:
    dataset = DetectionDataset(annotations, TestTransform(short_side=32, long_side=64))
    loader = make_loader(dataset, TestSampler(annotations.sizes, batch_size=3), num_workers=1, pin_memory=False)
    first, second = list(loader), list(loader)
    assert all(identical(a, b) for a, b in zip(first, second, strict=True))
    ids = [i for batch in first for i in batch.image_ids.tolist()]
    assert sorted(ids) == list(range(91, 101))
    for batch in first:
        for i, image_id in enumerate(batch.image_ids.tolist()):
            index = 100 - image_id
            h, w = annotations.sizes[index].tolist()
            boxes, _ = annotations.targets(index)
            assert batch.original_sizes[i].tolist() == [h, w]
            scale = torch.tensor([batch.sizes[i, 1] / w, batch.sizes[i, 0] / h]).repeat(2)
            torch.testing.assert_close(batch.targets.boxes[i][batch.targets.valid[i]], boxes * scale)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_arrive_channels_last(annotations: CocoAnnotations, num_workers: int) -> None:
    """Also the batch of one image, whose strides torch takes for either layout."""
    dataset = DetectionDataset(annotations, TRAIN)
    for batch_size in (1, 3):
        sampler = TestSampler(annotations.sizes, batch_size=batch_size)
        for batch in make_loader(dataset, sampler, num_workers=num_workers, pin_memory=False):
            _, _, h, w = batch.images.shape
            assert batch.images.stride() == (3 * h * w, 1, 3 * w, 3)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="only forked workers share memory")
def test_the_collector_of_a_worker_leaves_the_memory_of_the_parent_alone(annotations: CocoAnnotations) -> None:
    """It writes to all it looks at, and what is written to is shared no more."""

    def count(sample: Sample, rng: random.Random) -> Sample:
        return replace(sample, image_id=gc.get_freeze_count())

    sampler = TestSampler(annotations.sizes, batch_size=10)
    [batch] = make_loader(DetectionDataset(annotations, count), sampler, num_workers=1, pin_memory=False)
    assert batch.image_ids.min() > 10_000
    assert gc.get_freeze_count() < 1000


@pytest.fixture
def proposals(annotations: CocoAnnotations, tmp_path: Path) -> FixedProposals:
    """The boxes of every image as its proposals, which then must coincide with the targets."""
    images = []
    for index, image_id in enumerate(annotations.image_ids.tolist()):
        h, w = annotations.sizes[index].tolist()
        boxes, _ = annotations.targets(index)
        scores = torch.linspace(1, 0.5, len(boxes))
        images.append(ImageProposals.encode(image_id=image_id, size=(h, w), boxes=boxes, scores=scores))
    write_proposals(tmp_path / "p.npz", images, config="", checkpoint_sha256="")
    return read_proposals(tmp_path / "p.npz")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_fixed_proposals_come_with_their_image(
    annotations: CocoAnnotations, proposals: FixedProposals, num_workers: int
) -> None:
    """Through resizing and mirroring, whatever the order of the images, and without the images that are left out."""
    data = annotations.without_empty()
    assert len(data) < len(annotations)
    loader = make_loader(
        DetectionDataset(data, TRAIN, proposals),
        TrainSampler(data.sizes, batch_size=4, seed=5),
        num_workers=num_workers,
        pin_memory=False,
    )
    seen = 0
    for batch in itertools.islice(loader, 10):
        assert torch.equal(batch.proposals.valid, batch.targets.valid)
        torch.testing.assert_close(batch.proposals.boxes, batch.targets.boxes, atol=2e-3, rtol=0)
        assert (batch.proposals.scores.diff() <= 0).all()
        seen += batch.proposals.valid.sum()
    assert seen > 100


def test_fixed_proposals_of_other_images_are_refused(annotations: CocoAnnotations, proposals: FixedProposals) -> None:
    other = replace(annotations, image_ids=annotations.image_ids + 1)
    with pytest.raises(InputError, match=rf"no proposals for 1 of the 10 images of {annotations.source} \(ids 101\)"):
        DetectionDataset(other, TRAIN, proposals)
    turned = replace(annotations, sizes=annotations.sizes.flip(1))
    with pytest.raises(InputError, match="made for other images: image 100 was 40x64"):
        DetectionDataset(turned, TRAIN, proposals)


def test_a_process_without_a_share_gets_no_batch(annotations: CocoAnnotations) -> None:
    dataset = DetectionDataset(annotations, TestTransform(short_side=32, long_side=64))
    sampler = TestSampler(annotations.sizes, batch_size=10, rank=1, world_size=2)
    assert list(make_loader(dataset, sampler, num_workers=0, pin_memory=False)) == []


def test_the_data_set_reaches_workers_that_are_not_forked(annotations: CocoAnnotations) -> None:
    """On macOS and Windows workers are started anew and get a pickled copy."""
    copied = pickle.loads(pickle.dumps(DetectionDataset(annotations, TRAIN)))
    assert len(copied) == 10
    one, other = copied[4, 99], DetectionDataset(annotations, TRAIN)[4, 99]
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.boxes, other.boxes)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_is_named_in_one_line(annotations: CocoAnnotations, tmp_path: Path, num_workers: int) -> None:
    """Also out of a worker, whose traceback comes with it."""
    for source in annotations.folder.glob("*.jpg"):
        (tmp_path / source.name).write_bytes(source.read_bytes()[:-50])
    bad = load_coco(annotations.source, tmp_path)
    stderr = io.StringIO()
    with pytest.raises(SystemExit) as caught, redirect_stderr(stderr), user_errors():
        next(batches(bad, num_workers=num_workers))
    assert caught.value.code == 2
    [line] = stderr.getvalue().splitlines()
    assert line.startswith(f"error: {tmp_path}{os.sep}")
    assert "jpg: cannot decode the image (OSError: image file is truncated" in line
    with pytest.raises(InputError):
        next(batches(bad, num_workers=num_workers))


# Images that cannot be read


@pytest.fixture
def broken(annotations: CocoAnnotations, tmp_path: Path) -> CocoAnnotations:
    """Images 100 (truncated), 97 (missing) and 92 (of another size) of the ten cannot be read."""
    folder = tmp_path / "broken"
    shutil.copytree(annotations.folder, folder)
    data = load_coco(annotations.source, folder)
    (folder / "0.jpg").write_bytes((folder / "0.jpg").read_bytes()[:-50])
    (folder / "3.jpg").unlink()
    Image.new("RGB", (7, 8)).save(folder / "8.jpg")
    return data


UNREADABLE = {100, 97, 92}


def test_an_unreadable_image_is_replaced_by_one_that_the_seed_decides(
    annotations: CocoAnnotations, broken: CocoAnnotations
) -> None:
    """The same for any number of workers and processes and after resuming; all else is as without the broken files."""
    options: dict[str, Any] = {"on_unreadable": "replace"}
    straight = list(itertools.islice(batches(broken, num_workers=0, **options), 20))
    parallel = list(itertools.islice(batches(broken, num_workers=2, **options), 20))
    resumed = list(itertools.islice(batches(broken, num_workers=0, start_step=7, **options), 13))
    shares = [batches(broken, num_workers=0, rank=r, world_size=2, **options) for r in (0, 1)]
    assert all(identical(a, b) for a, b in zip(straight, parallel, strict=True))
    assert all(identical(a, b) for a, b in zip(straight[7:], resumed, strict=True))

    healthy = itertools.islice(batches(annotations, num_workers=0), 20)
    replaced = []
    for batch, expected in zip(straight, healthy, strict=True):
        halves = [next(share) for share in shares]
        assert batch.unreadable.tolist() == [i for half in halves for i in half.unreadable.tolist()]
        assert batch.image_ids.tolist() == [i for half in halves for i in half.image_ids.tolist()]
        assert not UNREADABLE & set(batch.image_ids.tolist())
        assert set(batch.unreadable.tolist()) == UNREADABLE & set(batch.unreadable.tolist())
        for i, image_id in enumerate(expected.image_ids.tolist()):
            if image_id in UNREADABLE:
                assert image_id in batch.unreadable
                replaced.append(int(batch.image_ids[i]))
            else:
                assert batch.image_ids[i] == image_id
                h, w = batch.sizes[i].tolist()
                assert torch.equal(batch.images[i, :, :h, :w], expected.images[i, :, :h, :w])
    assert len(replaced) > 15
    assert len(set(replaced)) > 4, "any other image, not the next one"


def test_a_replacement_comes_with_its_own_boxes_and_ids(broken: CocoAnnotations) -> None:
    dataset = DetectionDataset(broken, TRAIN, on_unreadable="replace")
    for seed in range(40):
        sample = dataset[3, seed]
        index = 100 - sample.image_id
        assert sample.unreadable[0] == 97
        assert set(sample.unreadable) <= UNREADABLE
        assert len(set(sample.unreadable)) == len(sample.unreadable)
        assert sample.original_size == tuple(broken.sizes[index].tolist())
        assert len(sample.boxes) == len(broken.targets(index)[0])
        assert dataset[5, seed].unreadable == ()
    lengths = {len(dataset[3, seed].unreadable) for seed in range(40)}
    assert lengths >= {1, 2}, "a replacement that cannot be read either is named, too"


@pytest.mark.parametrize("on_unreadable", ["fail", "replace"])
def test_a_file_system_that_is_gone_ends_the_run(
    annotations: CocoAnnotations, tmp_path: Path, on_unreadable: OnUnreadable
) -> None:
    gone = replace(annotations, folder=tmp_path / "gone")
    with pytest.raises(InputError, match="cannot read the image") as caught:
        next(batches(gone, num_workers=0, on_unreadable=on_unreadable))
    many = f"{MAX_REPLACEMENTS + 1} images in a row, drawn at random from {tmp_path}/gone, could not be read"
    assert (many in str(caught.value)) == (on_unreadable == "replace")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_evaluation_gets_a_blank_image_that_changes_no_other(
    annotations: CocoAnnotations, broken: CocoAnnotations, num_workers: int
) -> None:
    """Nor the padding of its batch."""
    transform, sampler = TestTransform(short_side=32, long_side=64), TestSampler(annotations.sizes, batch_size=4)
    healthy, blank = (
        list(make_loader(dataset, sampler, num_workers=num_workers, pin_memory=False))
        for dataset in (
            DetectionDataset(annotations, transform),
            DetectionDataset(broken, transform, on_unreadable="blank"),
        )
    )
    assert {i for batch in blank for i in batch.unreadable.tolist()} == UNREADABLE
    for batch, expected in zip(blank, healthy, strict=True):
        assert torch.equal(batch.sizes, expected.sizes)
        assert torch.equal(batch.image_ids, expected.image_ids)
        assert torch.equal(batch.original_sizes, expected.original_sizes)
        is_blank = torch.isin(batch.image_ids, batch.unreadable)
        assert torch.equal(batch.images[~is_blank], expected.images[~is_blank])
        assert batch.images[is_blank].count_nonzero() == 0


def test_a_blank_image_of_an_absurd_annotation_costs_no_memory(broken: CocoAnnotations) -> None:
    """A hundred thousand pixels high and wide: 30 GB."""
    absurd = replace(broken, sizes=torch.full_like(broken.sizes, 100_000))
    dataset = DetectionDataset(absurd, TestTransform(short_side=32, long_side=64), on_unreadable="blank")
    sample = dataset[3, 0]
    assert sample.image.shape == (3, 32, 32)
    assert sample.unreadable == (97,)


def test_the_reason_is_found_by_the_id(broken: CocoAnnotations) -> None:
    reasons = [why_unreadable(broken, image_id) for image_id in (100, 97, 92, 99)]
    for reason, name, part in zip(
        reasons,
        (0, 3, 8, 1),
        ("image file is truncated", "No such file", "the image is 7x8", "could not be read before, and can be now"),
        strict=True,
    ):
        assert reason.startswith(f"{broken.folder / str(name)}.jpg: ")
        assert part in reason
    assert explain_unreadable(broken, [100, 97]) == [f"unreadable: {reason}" for reason in reasons[:2]]
    assert explain_unreadable(broken, [97, 100, 92], limit=1) == [
        f"unreadable: {reasons[1]}",
        "unreadable: 2 more, ids 100, 92",
    ]
    assert explain_unreadable(broken, []) == []


# Signals

LEFT_OVER = """
    import sys
    from pathlib import Path
    from fpn_det.data.coco import load_coco
    from fpn_det.data.loader import DetectionDataset, TrainSampler, make_loader
    from fpn_det.data.transforms import TestTransform

    data = load_coco(Path(sys.argv[1]), Path(sys.argv[1]).parent)
    loader = make_loader(
        DetectionDataset(data, TestTransform(short_side=32, long_side=64)),
        TrainSampler(data.sizes, batch_size=2, seed=0), num_workers=1, pin_memory=False,
    )
    stream = iter(loader)
    next(stream)
    print("loaded", flush=True)
    raise RuntimeError
"""


def test_workers_do_not_keep_an_ending_process_alive(annotations: CocoAnnotations) -> None:
    """A loader that is still referenced at exit, as by the traceback of an error, is left to Python to clean up."""
    command = [sys.executable, "-c", textwrap.dedent(LEFT_OVER), str(annotations.source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loaded\n"
        try:
            assert process.wait(timeout=20) == 1
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_workers_outlive_a_signal_to_all(annotations: CocoAnnotations, name: str) -> None:
    """Ctrl-C and the end of a cluster job reach every process; the main one still finishes its step."""
    loader = train_loader(annotations, num_workers=1)
    stream = iter(loader)
    next(stream)
    [worker] = workers_of(loader)
    os.kill(worker.pid, getattr(signal, name))
    time.sleep(0.3)
    expected = batches(annotations, num_workers=0)
    next(expected)
    for _ in range(5):  # more than what was prefetched
        assert identical(next(stream), next(expected))
    assert worker.is_alive()
    del stream, loader
    worker.join(5)
    assert worker.exitcode == 0


# Workers that die, and workers that are left


DEATH = """
    import os, signal, sys
    from pathlib import Path
    from fpn_det.cli import user_errors
    from fpn_det.data.coco import load_coco
    from fpn_det.data.loader import DetectionDataset, TrainSampler, make_loader
    from fpn_det.data.transforms import TestTransform

    data = load_coco(Path(sys.argv[1]), Path(sys.argv[1]).parent)
    loader = make_loader(
        DetectionDataset(data, TestTransform(short_side=32, long_side=64)),
        TrainSampler(data.sizes, batch_size=2, seed=0), num_workers=2, pin_memory=False,
    )
    with user_errors():
        for step, batch in enumerate(loader):
            if step == 3:
                if sys.argv[2] == "unnoticed":
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
            sum(range(100_000))  # torch raises its error here, or while the next batch is awaited
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("signal_is", ["noticed", "unnoticed"])
def test_a_worker_that_dies_is_one_clear_error(annotations: CocoAnnotations, signal_is: str) -> None:
    """Also where another library took the signal by which torch notices; in a process of its own, for torch would
    raise the error again in this one."""
    command = [sys.executable, "-c", textwrap.dedent(DEATH), str(annotations.source), signal_is]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: a process that loads images died (")  # as torch says it, or as a broken connection
    for part in ("data.num_workers", "/dev/shm", "tools/check_data.py"):
        assert part in line


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError()], ids=repr)
def test_a_worker_that_dies_while_it_hands_over_a_batch(error: Exception) -> None:
    """torch asks for the batch before it knows of the death; outside of the loader these are errors like others."""
    with pytest.raises(InputError, match=r"a process that loads images died \((.*reset by peer|EOFError)\)"):
        list(loader._naming_errors(map(raise_it, [error])))
    with pytest.raises(type(error)), worker_errors():
        raise error


def raise_it(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("awaiting", [False, True])
def test_other_errors_stay_what_they_are(awaiting: bool) -> None:
    with pytest.raises(RuntimeError, match="shapes differ") as caught, worker_errors(awaiting=awaiting):
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, InputError)


KILLED = """
    import fcntl, os, sys, time
    from pathlib import Path
    from fpn_det.data.coco import load_coco
    from fpn_det.data.loader import DetectionDataset, TrainSampler, make_loader
    from fpn_det.data.transforms import TestTransform

    lock = open(sys.argv[2], "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    data = load_coco(Path(sys.argv[1]), Path(sys.argv[1]).parent)
    loader = make_loader(
        DetectionDataset(data, TestTransform(short_side=32, long_side=64)),
        TrainSampler(data.sizes, batch_size=2, seed=0), num_workers=2, pin_memory=False,
    )
    stream = iter(loader)
    next(stream)
    print(*(worker.pid for worker in loader._iterator._workers), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_workers_of_a_killed_process_leave_and_let_go_of_its_locks(
    annotations: CocoAnnotations, tmp_path: Path
) -> None:
    """They look for their parent every 5 seconds; until then they hold what they inherited."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(annotations.source), str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        process.kill()
        process.wait()
        lock = (tmp_path / "lock").open()
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        deadline = time.monotonic() + 20
        while any(map(is_running, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(is_running, workers))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.close()


def is_running(pid: int) -> bool:
    """Whether any thread is left; a process whose parent does not fetch its exit code stays listed without one."""
    tasks = Path(f"/proc/{pid}/task")
    if not tasks.parent.parent.exists():  # macOS
        with suppress(ProcessLookupError):
            os.kill(pid, 0)
            return True
        return False
    with suppress(FileNotFoundError, ProcessLookupError):
        return any((task / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX" for task in tasks.iterdir())
    return False
