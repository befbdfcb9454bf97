"""What travels between the data, the model and the evaluation.

Shapes are fixed on the device; raggedness ends in `fpn_det.data.loader.collate`.

Dimensions: N images, G ground-truth boxes (the batch's largest count), P proposals, D detections of one image.
Boxes are XYXY, absolute and continuous, in pixels: width = x2 - x1. Sizes are (height, width).
Labels are class indices 0..K-1; the data set's own category ids appear only where files are read and written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


class InputError(ValueError):
    """Something the user gave (config, data, checkpoint, path) cannot be used.

    The message is one that a user can act on: it names the thing, the value received and the way out.
    The command-line tools print it without a traceback and exit with code 2.
    """


def printable(text: str, *, keep: str = "") -> str:
    """Text of unknown origin for people to read: what a terminal would obey or not show, as Python's escapes.

    Class and file names may hold anything: sequences that clear the screen, line breaks that forge a line of the log,
    marks that reverse the order of what follows, halves of characters that no encoding takes.

    Args:
        text: any string.
        keep: control characters to leave as they are; a newline where a text may have several lines.

    Returns:
        Letters, signs and accents of all scripts and plain spaces as they are; control and formatting characters, other
        spaces, unpaired surrogates and unassigned characters as `\\x1b` or `\\u202e`.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode("ascii") for char in text
    )


@dataclass(frozen=True, slots=True)
class Categories:
    """The one map between a data set's categories and the class indices 0..K-1; stored in every checkpoint.

    Attributes:
        ids: the data set's category ids, ascending; class index = position. Any integers, holes allowed.
        names: the names, in the same order.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def state_dict(self) -> list[dict[str, int | str]]:
        """The map as plain data, one entry per class."""
        return [{"index": i, "id": self.ids[i], "name": self.names[i]} for i in range(len(self))]

    @classmethod
    def from_state_dict(cls, state: list[dict[str, int | str]]) -> Self:
        """Inverse of `state_dict`."""
        return cls(tuple(int(c["id"]) for c in state), tuple(str(c["name"]) for c in state))


class _TensorFields:
    """Device moves for the dataclasses below, all of whose fields are tensors, such dataclasses or None."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return a copy whose tensors lie on `device`."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory (`DataLoader(pin_memory=True)` calls this)."""
        return self._map(lambda value: value.pin_memory())

    def clone(self) -> Self:
        """Return a copy that shares no memory."""
        return self._map(lambda value: value.clone())

    def _map(self, change: Callable[[Any], Any]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return type(self)(**{name: None if value is None else change(value) for name, value in values.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image with its boxes, as it comes out of the transforms.

    Attributes:
        image: (3, H, W) uint8, or float32 in 0..255 (`data.resize: float`), RGB.
        boxes: (G, 4) float32, in the frame of `image`.
        labels: (G,) int64, 0..K-1.
        image_id: the data set's own id of the image.
        original_size: (h, w) of the image file as a viewer shows it, before resizing.
        seed: of all that is random about this image in this step, 0..2**63-1; without effect on detection.
        proposals: (P, 4) float32, in the frame of `image`, best first; None unless proposals are fixed (Fast R-CNN).
        proposal_scores: (P,) float32 in 0..1, along with `proposals`.
        unreadable: ids of the images that could not be read and that this sample stands for.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    image_id: int
    original_size: tuple[int, int]
    seed: int = 0
    proposals: Tensor | None = None
    proposal_scores: Tensor | None = None
    unreadable: tuple[int, ...] = ()

    @classmethod
    def to_detect_in(
        cls, image: Tensor, *, image_id: int = 0, proposals: Tensor | None = None, proposal_scores: Tensor | None = None
    ) -> Self:
        """An image (3, H, W) as it is, without objects."""
        return cls(
            image=image,
            boxes=torch.zeros(0, 4),
            labels=torch.zeros(0, dtype=torch.int64),
            image_id=image_id,
            original_size=(image.shape[1], image.shape[2]),
            proposals=proposals,
            proposal_scores=proposal_scores,
        )


@dataclass(frozen=True, kw_only=True)
class Targets(_TensorFields):
    """Ground truth of a batch, padded to the same count per image.

    Attributes:
        boxes: (N, G, 4) float32, in the frame of the resized images; zeros where not valid.
        labels: (N, G) int64, 0..K-1; zeros where not valid.
        valid: (N, G) bool; False marks padding. G may be 0.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor


@dataclass(frozen=True, kw_only=True)
class Batch(_TensorFields):
    """Images of one step on one device, with their targets.

    Attributes:
        images: (N, 3, H, W) uint8 or float32, as in `Sample`, RGB, zero-padded at the right and the bottom to a
            common size, channels last in memory.
        sizes: (N, 2) int64, (h, w) of each image before padding.
        targets: ground truth in the frame of `images`.
        image_ids: (N,) int64, the data set's own ids.
        original_sizes: (N, 2) int64, (h, w) of the image files.
        seeds: (N,) int64, what the random choices of anchors and RoIs in each image depend on.
        proposals: fixed proposals (Fast R-CNN), padded to the batch's largest count; None where the model has an RPN.
        unreadable: (M,) int64, ids of the images that could not be read, replaced or left blank; M is almost always 0.
            Always on the CPU: whoever looks does not wait for a device.
    """

    images: Tensor
    sizes: Tensor
    targets: Targets
    image_ids: Tensor
    original_sizes: Tensor
    seeds: Tensor
    proposals: Proposals | None = None
    unreadable: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return a copy whose tensors, but for `unreadable`, lie on `device`."""
        return replace(super().to(device, non_blocking), unreadable=self.unreadable)

    def without_pixels(self) -> Batch:
        """A copy that can be kept: all but the images, whose height and width become 0."""
        n = len(self.images)
        return replace(self, images=self.images.new_empty((n, 3, 0, 0))).clone()


@dataclass(frozen=True, kw_only=True)
class Proposals(_TensorFields):
    """Output of the region proposal network, detached from the graph, or fixed proposals that a file gave.

    Attributes:
        boxes: (N, P, 4) float32, in the frame of the resized images, clipped to them; zeros where not valid.
        scores: (N, P) float32 objectness in 0..1, descending; zeros where not valid.
        valid: (N, P) bool; False marks padding.
    """

    boxes: Tensor
    scores: Tensor
    valid: Tensor


@dataclass(frozen=True, kw_only=True)
class Detections(_TensorFields):
    """Final detections of one image, sorted by descending score.

    Attributes:
        boxes: (D, 4) float32. `FasterRCNN.predict` gives them in the frame of the resized image,
            `fpn_det.engine.evaluate.detect` in that of the original image.
        scores: (D,) float32 in 0..1.
        labels: (D,) int64, 0..K-1.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.boxes.shape[0]
