"""Data loading: which images make up which step, and how they become one `Batch`.

The training stream is a pure function of (seed, step): it does not depend on the number of workers, and a run that
resumes at step t sees what it would have seen. All randomness of a sample comes from a seed that travels with its
index; the workers have no random state.

Dimensions: N images of a batch, G boxes and P fixed proposals (largest count in the batch), n images in the data set.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from multiprocessing.synchronize import Event
from typing import Any, Literal, assert_never

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.proposals import FixedProposals
from fpn_det.data.transforms import load_image, max_pixels
from fpn_det.structures import Batch, InputError, Proposals, Sample, Targets

Transform = Callable[[Sample, random.Random], Sample]
Key = tuple[int, int]
"""(index of the image, seed of its augmentation and of the samples that the model draws in it)"""

OnUnreadable = Literal["fail", "replace", "blank"]
"""What becomes of an image that cannot be read.

- `fail`: an InputError.
- `replace`: another image takes its place, for training.
- `blank`: a black image takes its place, for the evaluation, which then ignores what is detected there.

Under the latter two, the ids of these images travel in `Batch.unreadable`.
"""

MAX_REPLACEMENTS = 10
"""So many images drawn at random, none of which can be read, are more than single broken files."""

WINDOW_BATCHES = 16
"""Batches of one aspect are formed among this many consecutive ones; the rest of a window is mixed."""


class DetectionDataset(Dataset[Sample]):
    """Images with boxes, decoded and transformed when asked for.

    Args:
        annotations: what to load.
        transform: applied to each sample, with the random state of its key.
        proposals: fixed proposals that the samples carry along, if any.
        on_unreadable: what becomes of an image that cannot be read.

    Raises:
        InputError: `proposals` are of other images.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        transform: Transform,
        proposals: FixedProposals | None = None,
        *,
        on_unreadable: OnUnreadable = "fail",
    ) -> None:
        if proposals is not None:
            proposals.check_images(annotations.image_ids, annotations.sizes, annotations.source)
        self.annotations = annotations
        self.transform = transform
        self.proposals = proposals
        self.on_unreadable: OnUnreadable = on_unreadable

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: Key) -> Sample:
        """The sample of `key`.

        Raises:
            InputError: the image cannot be read, nor any that should replace it.
        """
        index, seed = key
        index, image, unreadable = self._load(index, seed)
        h, w = self.annotations.sizes[index].tolist()
        boxes, labels = self.annotations.targets(index)
        image_id = int(self.annotations.image_ids[index])
        proposals, scores = self.proposals.of(image_id) if self.proposals is not None else (None, None)
        sample = Sample(
            image=image,
            boxes=boxes,
            labels=labels,
            image_id=image_id,
            original_size=(h, w),
            seed=seed,
            proposals=proposals,
            proposal_scores=scores,
            unreadable=unreadable,
        )
        return self.transform(sample, random.Random(seed))

    def _load(self, index: int, seed: int) -> tuple[int, Tensor, tuple[int, ...]]:
        """Index and pixels of the image at `index`, or of what stands for it, and the ids that could not be read."""
        try:
            return index, load_annotated(self.annotations, index), ()
        except InputError:
            match self.on_unreadable:
                case "fail":
                    raise
                case "blank":
                    return index, self._blank(index), (int(self.annotations.image_ids[index]),)
                case "replace":
                    return self._replacement(index, seed)
                case _:
                    assert_never(self.on_unreadable)

    def _blank(self, index: int) -> Tensor:
        """A black image of the annotated size: the batch is then padded as if the image could be read."""
        h, w = self.annotations.sizes[index].tolist()
        # No image may have a size beyond the limit, so the annotation is wrong; its black image must not fill memory.
        return torch.zeros((3, h, w) if h * w <= max_pixels() else (3, 1, 1), dtype=torch.uint8)

    def _replacement(self, index: int, seed: int) -> tuple[int, Tensor, tuple[int, ...]]:
        """The first image that can be read of those that `seed` alone decides."""
        unreadable = [int(self.annotations.image_ids[index])]
        for other in np.random.default_rng((seed, 4)).integers(len(self), size=MAX_REPLACEMENTS).tolist():
            try:
                return other, load_annotated(self.annotations, other), tuple(dict.fromkeys(unreadable))
            except InputError as error:
                unreadable.append(int(self.annotations.image_ids[other]))
                reason = str(error)
        raise InputError(
            f"{1 + MAX_REPLACEMENTS} images in a row, drawn at random from {self.annotations.folder}, could not be "
            f"read; is the file system there, and data.train.images right? The last one: {reason}"
        )


def load_annotated(annotations: CocoAnnotations, index: int) -> Tensor:
    """The pixels of an image of a data set, see `load_image`.

    Raises:
        InputError: it cannot be read, or is of another size than annotated.
    """
    h, w = annotations.sizes[index].tolist()
    return load_image(annotations.path(index), size=(h, w))


def why_unreadable(annotations: CocoAnnotations, image_id: int) -> str:
    """The path of an image of `Batch.unreadable` and why it cannot be read, in one line; tries once more.

    Args:
        annotations: of the data set.
        image_id: the data set's own id.
    """
    [index] = (annotations.image_ids == image_id).nonzero().flatten().tolist()
    try:
        load_annotated(annotations, index)
    except InputError as error:
        return str(error)
    return f"{annotations.path(index)}: could not be read before, and can be now; is the file system overloaded?"


def explain_unreadable(annotations: CocoAnnotations, image_ids: Sequence[int], limit: int = 10) -> list[str]:
    """`why_unreadable` of the first `limit` images, and a line that counts the others."""
    lines = [f"unreadable: {why_unreadable(annotations, image_id)}" for image_id in image_ids[:limit]]
    if len(image_ids) > limit:
        lines.append(f"unreadable: {len(image_ids) - limit:,} more, ids {', '.join(map(str, image_ids[limit:]))}")
    return lines


class TrainSampler(Sampler[list[Key]]):
    """Endless micro-batches of one process, in the order of the steps.

    The stream of images is one permutation after the other, without a boundary at which workers would restart, cut
    into windows of `WINDOW_BATCHES` steps: after any number of whole windows, no image was seen more than once more
    than another. Within a window, landscape and portrait images are put into separate batches (less padding; at most
    one batch is mixed), and the batches shuffled.

    Args:
        sizes: (n, 2) (h, w) of the images.
        batch_size: images per step over all processes and micro-batches.
        seed: of the run.
        start_step: the first step to yield.
        rank, world_size: this process among all.
        accumulate: micro-batches per step and process.
        group_by_aspect: whether to separate landscape from portrait.
    """

    def __init__(
        self,
        sizes: Tensor,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        group_by_aspect: bool = True,
    ) -> None:
        self.portrait = (sizes[:, 0] > sizes[:, 1]).numpy() & group_by_aspect
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.rank = rank
        self.accumulate = accumulate
        self.micro_batch_size = batch_size // (world_size * accumulate)
        self.permutation = lru_cache(maxsize=2)(self._permutation)
        assert self.micro_batch_size * world_size * accumulate == batch_size, "batch size does not divide"

    def __iter__(self) -> Iterator[list[Key]]:
        step = self.start_step
        window = self.window(step // WINDOW_BATCHES)
        while True:
            keys = window[step % WINDOW_BATCHES]
            for micro in range(self.accumulate):
                start = (self.rank * self.accumulate + micro) * self.micro_batch_size
                yield keys[start : start + self.micro_batch_size]
            step += 1
            if step % WINDOW_BATCHES == 0:
                window = self.window(step // WINDOW_BATCHES)

    def window(self, number: int) -> list[list[Key]]:
        """The global batches of steps `number * WINDOW_BATCHES` onward."""
        n, length = len(self.portrait), WINDOW_BATCHES * self.batch_size
        positions = np.arange(number * length, (number + 1) * length)
        indices = np.array([self.permutation(p // n)[p % n] for p in positions])
        # 63 bits: they fit a tensor, and are positive, as random.Random takes the absolute value.
        seeds = np.random.SeedSequence((self.seed, 1, number)).generate_state(length, np.uint64) >> np.uint64(1)
        order = np.argsort(self.portrait[indices], kind="stable")
        batches = np.random.default_rng((self.seed, 2, number)).permutation(order.reshape(-1, self.batch_size))
        return [[(int(indices[i]), int(seeds[i])) for i in batch] for batch in batches]

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.portrait))


class TestSampler(Sampler[list[Key]]):
    """Every image once over all processes, in batches of similar aspect.

    The batches do not depend on the number of processes (padding is part of what the network sees), only their
    distribution does, so results are the same for any number.

    Args:
        sizes: (n, 2) (h, w) of the images.
        batch_size: images per batch.
        rank, world_size: this process among all.
    """

    __test__ = False  # not a pytest class

    def __init__(self, sizes: Tensor, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        order = (sizes[:, 1] / sizes[:, 0]).argsort(stable=True).tolist()
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in self.batches:
            yield [(index, 0) for index in batch]


def collate(samples: Sequence[Sample], size_divisor: int = 32) -> Batch:
    """Pad samples to one size, one box count and one count of fixed proposals; images channels last in memory.

    Args:
        samples: N samples of any sizes, their images of one type.
        size_divisor: height and width of the batch are multiples of this, the coarsest stride of the backbone.
    """
    n = len(samples)
    sizes = torch.tensor([tuple(s.image.shape[1:]) for s in samples])
    h, w = ((sizes.amax(0) + size_divisor - 1) // size_divisor * size_divisor).tolist()
    g = max(len(s.boxes) for s in samples)
    images = _empty_images((n, h, w), samples[0].image.dtype)
    boxes = torch.zeros((n, g, 4))
    labels = torch.zeros((n, g), dtype=torch.int64)
    valid = torch.zeros((n, g), dtype=torch.bool)
    for i, s in enumerate(samples):
        height, width = s.image.shape[1:]
        images[i, :, :height, :width] = s.image
        images[i, :, :height, width:] = 0
        images[i, :, height:] = 0
        boxes[i, : len(s.boxes)] = s.boxes
        labels[i, : len(s.boxes)] = s.labels
        valid[i, : len(s.boxes)] = True
    return Batch(
        images=images,
        sizes=sizes,
        targets=Targets(boxes=boxes, labels=labels, valid=valid),
        image_ids=torch.tensor([s.image_id for s in samples]),
        original_sizes=torch.tensor([s.original_size for s in samples]),
        seeds=torch.tensor([s.seed for s in samples]),
        proposals=_collate_proposals(samples),
        unreadable=torch.tensor([i for s in samples for i in s.unreadable], dtype=torch.int64),
    )


def _empty_images(size: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Uninitialised (N, 3, H, W), channels last in memory.

    A worker makes it in memory that the main process shares; moved there afterwards, images cost more than to decode.
    """
    n, h, w = size
    if get_worker_info() is None:
        return torch.empty((n, 3, h, w), dtype=dtype, memory_format=torch.channels_last)
    storage = torch.UntypedStorage._new_shared(n * h * w * 3 * dtype.itemsize)  # what default_collate does, too
    return torch.empty(0, dtype=dtype).set_(storage).view(n, h, w, 3).permute(0, 3, 1, 2)


def _collate_proposals(samples: Sequence[Sample]) -> Proposals | None:
    """Pad the fixed proposals of the samples to one count; None where the samples have none."""
    boxes = [s.proposals for s in samples if s.proposals is not None]
    scores = [s.proposal_scores for s in samples if s.proposal_scores is not None]
    if not boxes:
        return None
    assert len(boxes) == len(scores) == len(samples), "fixed proposals for some of the samples only"
    return Proposals(
        boxes=pad_sequence(boxes, batch_first=True),
        scores=pad_sequence(scores, batch_first=True),
        valid=pad_sequence([torch.ones(len(b), dtype=torch.bool) for b in boxes], batch_first=True),
    )


class BatchLoader(DataLoader[Sample]):
    """A loader of `Batch`es that says what to do when one of its processes dies."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Start the workers and yield the batches.

        Raises:
            InputError: an image cannot be read, or a loader process died.
        """
        with worker_errors(awaiting=True):
            return _naming_errors(super().__iter__())


def _naming_errors(stream: Iterator[Any]) -> Iterator[Any]:
    while True:
        with worker_errors(awaiting=True):
            batch = next(stream, None)
        if batch is None:
            return
        yield batch


@contextmanager
def worker_errors(*, awaiting: bool = False) -> Iterator[None]:
    """Turn the death of a loader process into an InputError.

    torch notices it while a batch is awaited, or at any other moment by a signal: hence this should also surround
    what is done with the batches.

    Args:
        awaiting: a batch is awaited inside; then a broken connection is a loader process that died handing one over.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        is_death = str(error).startswith("DataLoader worker") if isinstance(error, RuntimeError) else awaiting
        if not is_death:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0].strip()
        raise InputError(
            f"a process that loads images died ({reason}). Mostly memory or /dev/shm ran out: lower data.num_workers, "
            "or give the job more. If it happens again at the same step, an image crashes its decoder: "
            "tools/check_data.py finds the file"
        ) from error


def make_loader(
    dataset: DetectionDataset, sampler: TrainSampler | TestSampler, *, num_workers: int, pin_memory: bool
) -> BatchLoader:
    """A loader that yields `Batch`es; its workers, if any, live as long as its iterator.

    Args:
        dataset: what to load.
        sampler: which images make up which batch.
        num_workers: processes that load; 0 loads in the calling process.
        pin_memory: whether batches come in page-locked memory (for a GPU).
    """
    ending = multiprocessing.Event()
    atexit.register(ending.set)
    return BatchLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=partial(_start_worker, ending=ending),
    )


def _start_worker(worker_id: int, *, ending: Event) -> None:
    """Keep the parent's memory shared, and leave signals to it.

    A garbage collection writes to every object it looks at: 40 MB of the parent's would be copied into each worker.

    Signals reach all processes of a terminal or job; the workers must outlive the step that the main one finishes.
    At its exit Python sends SIGTERM to the workers that are left and waits for them: that one they must obey.
    """

    def obey_at_exit(*_: object) -> None:
        if ending.is_set():
            os._exit(0)

    if multiprocessing.get_start_method() == "fork":
        gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, obey_at_exit)
