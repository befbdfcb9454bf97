"""Fixed proposals: the boxes that a second stage trains and detects on without an RPN (Fast R-CNN, arXiv 1504.08083).

The file is an uncompressed .npz of flat arrays, 10 bytes per box: corners as uint16 fractions of the image's width and
height, scores as float16. A corner is thus off by at most 1/131070 of the side: 0.005 px of 640, 0.03 px of 4000.

Dimensions: I images, T boxes of all images, P boxes of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fpn_det.files import replacing
from fpn_det.structures import InputError

VERSION = 1
STEPS = 65535
"""The fraction 1 as stored."""
REMEDY = "make it with tools/proposals.py"
LAYOUT: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
    "version": (np.integer, ()),
    "config": (np.str_, ()),
    "checkpoint_sha256": (np.str_, ()),
    "image_ids": (np.int64, (-1,)),
    "sizes": (np.int64, (-1, 2)),
    "offsets": (np.int64, (-1,)),
    "boxes": (np.uint16, (-1, 4)),
    "scores": (np.float16, (-1,)),
}
"""The arrays of a file; -1 is any length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProposals:
    """Proposals of one image as the file stores them.

    Attributes:
        image_id: the data set's own id.
        size: (h, w) of the original image.
        boxes: (P, 4) uint16 XYXY, in 1/65535 of width and height.
        scores: (P,) float16.
    """

    image_id: int
    size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray

    @classmethod
    def encode(cls, *, image_id: int, size: tuple[int, int], boxes: Tensor, scores: Tensor) -> ImageProposals:
        """Clip to the image and quantise; boxes that have no area after that are left out.

        Args:
            image_id: the data set's own id.
            size: (h, w) of the original image.
            boxes: (P, 4) float XYXY in pixels of the original image, best first.
            scores: (P,) in 0..1, descending.
        """
        h, w = size
        fractions = boxes.double().cpu() / torch.tensor([w, h, w, h])
        corners = (fractions.clamp(0, 1) * STEPS).round().to(torch.int32).numpy()
        keep = (corners[:, 2:] > corners[:, :2]).all(1)
        return cls(
            image_id=image_id,
            size=size,
            boxes=corners[keep].astype(np.uint16),
            scores=scores.half().cpu().numpy()[keep],
        )


@dataclass(frozen=True, kw_only=True)
class FixedProposals:
    """Proposals of a data set, as a handful of tensors that loader workers share.

    Attributes:
        source: the file.
        config: name of the config that made it.
        checkpoint_sha256: of the weights that made it.
        image_ids: (I,) int64, ascending.
        sizes: (I, 2) int64, (h, w) of the original images.
        offsets: (I + 1,) int64; the proposals of image i are `boxes[offsets[i]:offsets[i + 1]]`, best first.
        boxes: (T, 4) uint16 XYXY, in 1/65535 of width and height.
        scores: (T,) float16 in 0..1.
    """

    source: Path
    config: str
    checkpoint_sha256: str
    image_ids: Tensor
    sizes: Tensor
    offsets: Tensor
    boxes: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.image_ids)

    def of(self, image_id: int) -> tuple[Tensor, Tensor]:
        """Boxes (P, 4) float32 XYXY in pixels of the original image and scores (P,) float32, best first.

        Raises:
            InputError: the file has no entry for this image.
        """
        index = int(torch.searchsorted(self.image_ids, image_id))
        if index == len(self) or self.image_ids[index] != image_id:
            raise InputError(f"{self.source}: no proposals for image {image_id}; {REMEDY} from all images")
        start, end = self.offsets[index : index + 2].tolist()
        h, w = self.sizes[index].tolist()
        # In this order a corner at the border of the image stays there.
        return self.boxes[start:end].float() / STEPS * torch.tensor([w, h, w, h]), self.scores[start:end].float()

    def check_images(self, image_ids: Tensor, sizes: Tensor, annotations: Path) -> None:
        """Refuse a data set that these proposals were not made for.

        Args:
            image_ids: of the data set.
            sizes: (..., 2) (h, w) of these images.
            annotations: where they are from, for the message.

        Raises:
            InputError: images without entry, or of another size than the proposals were made for.
        """
        missing = image_ids[~torch.isin(image_ids, self.image_ids)].tolist()
        if missing:
            raise InputError(
                f"{self.source}: no proposals for {len(missing):,} of the {len(image_ids):,} images of {annotations} "
                f"(ids {', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}); {REMEDY} from "
                "this data set"
            )
        own_sizes = self.sizes[torch.searchsorted(self.image_ids, image_ids)]
        different = (own_sizes != sizes).any(1).nonzero().flatten().tolist()
        if different:
            (own_h, own_w), (h, w) = own_sizes[different[0]].tolist(), sizes[different[0]].tolist()
            raise InputError(
                f"{self.source}: made for other images: image {image_ids[different[0]]} was {own_w}x{own_h} (width x "
                f"height), in {annotations} it is {w}x{h} ({len(different):,} such images); {REMEDY} from this "
                "data set"
            )

    def summary(self) -> str:
        """One line: how many, and where they are from."""
        return (
            f"{self.source}: {len(self.boxes):,} proposals in {len(self):,} images, of config "
            f"{self.config or 'without name'} and checkpoint {self.checkpoint_sha256[:12]}"
        )


def write_proposals(path: Path, images: Sequence[ImageProposals], *, config: str, checkpoint_sha256: str) -> None:
    """Write a file such that `path` holds either its old content or all of the new, whatever happens meanwhile.

    Args:
        path: the file; the suffix is the caller's.
        images: in any order, each image once.
        config: name of the config, for provenance.
        checkpoint_sha256: of the file of weights, for provenance.
    """
    images = sorted(images, key=lambda image: image.image_id)
    offsets = np.cumsum([0, *(len(image.boxes) for image in images)], dtype=np.int64)
    with replacing(path) as file:
        np.savez(
            file,
            version=np.int64(VERSION),
            config=np.str_(config),
            checkpoint_sha256=np.str_(checkpoint_sha256),
            image_ids=np.array([image.image_id for image in images], np.int64),
            sizes=np.array([image.size for image in images], np.int64).reshape(-1, 2),
            offsets=offsets,
            boxes=np.concatenate([np.zeros((0, 4), np.uint16), *(image.boxes for image in images)]),
            scores=np.concatenate([np.zeros(0, np.float16), *(image.scores for image in images)]),
        )


def read_proposals(path: Path) -> FixedProposals:
    """Read a file of `write_proposals`; nothing in it is executed.

    Raises:
        InputError: the file is missing, damaged, not one of ours or of another version.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file of proposals; {REMEDY}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # zipfile and numpy meet other files with many exceptions
        raise InputError(
            f"{path}: damaged, or not a file of proposals ({type(error).__name__}: {error}); {REMEDY}"
        ) from error
    if problem := _problem(arrays):
        raise InputError(f"{path}: not a file of proposals that this program reads ({problem}); {REMEDY}")
    tensors = {name: torch.from_numpy(arrays[name]) for name, (_, shape) in LAYOUT.items() if shape}
    return FixedProposals(
        source=path, config=str(arrays["config"]), checkpoint_sha256=str(arrays["checkpoint_sha256"]), **tensors
    )


def _problem(arrays: dict[str, np.ndarray]) -> str:
    """What is wrong with the content of a file; empty if nothing is."""
    for name, (kind, shape) in LAYOUT.items():
        array = arrays.get(name)
        if array is None:
            return f"it lacks {name}"
        same_shape = array.ndim == len(shape) and all(n in (-1, m) for n, m in zip(shape, array.shape, strict=True))
        if not (np.issubdtype(array.dtype, kind) and array.dtype.isnative and same_shape):
            return f"{name} is {array.dtype} of shape {array.shape}"
        if name == "version" and array != VERSION:  # before the rest, which may differ for that reason
            return f"version {array}, expected {VERSION}"
    image_ids, sizes, offsets, boxes, scores = (
        arrays[name] for name in ("image_ids", "sizes", "offsets", "boxes", "scores")
    )
    if not len(image_ids) == len(sizes) == len(offsets) - 1 or (image_ids[1:] <= image_ids[:-1]).any():
        return "image_ids must ascend and be as many as sizes, one less than offsets"
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or not offsets[-1] == len(boxes) == len(scores):
        return "offsets must ascend from 0 to the number of boxes and of scores"
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        return "boxes without an area"
    if not ((scores >= 0) & (scores <= 1)).all():
        return "scores outside of 0..1"
    return ""
