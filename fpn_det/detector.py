"""A trained detector for use from Python.

    from fpn_det import Detector

    detector = Detector.load("runs/mine/best.pth")
    found = detector.predict("photo.jpg")
    print(found.boxes, found.scores, found.class_names)

docs/python.md shows more. Dimensions: D detections of one image. Boxes are XYXY, absolute and continuous, in pixels of
the image as a viewer shows it. Sizes are (height, width).
"""

from __future__ import annotations

import difflib
import math
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fpn_det import build
from fpn_det.ahead import ahead
from fpn_det.data.loader import collate
from fpn_det.data.transforms import TestTransform, from_pillow, load_image, resized_size
from fpn_det.draw import draw_detections
from fpn_det.engine.checkpoint import load_checkpoint
from fpn_det.engine.evaluate import DetectionModel, detect, merge_views, to_coco_results
from fpn_det.engine.precision import Precision
from fpn_det.engine.tiling import Window, merge_windows, windows_of
from fpn_det.extras import require
from fpn_det.structures import Batch, Categories, Detections, InputError, Sample, printable

ImageLike = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor
"""An image: the path of a file, a Pillow image, (H, W, 3) uint8 array or (3, H, W) uint8 tensor, both RGB."""

WINDOW_BATCHES = 2
"""Batches of one size are formed among the images of this many consecutive ones."""

WINDOW_BYTES = 2**28
"""So many bytes of decoded images are enough for that."""

NUM_THREADS = min(4, os.cpu_count() or 1)
"""Threads that read and resize images while the model is busy."""

SIZE_DIVISOR = 32
"""Images are padded to multiples of this, as for training."""

_RANGES = {
    "score_thresh": "between 0 and 1",
    "batch_size": "at least 1",
    "tile_size": "at least 16 pixels",
    "tile_overlap": "at least 0 and below 1",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What was detected in one image, best first.

    Attributes:
        boxes: (D, 4) float32 XYXY, in pixels of the image.
        scores: (D,) float32 in 0..1.
        labels: (D,) int64, indices into the detector's classes, 0..K-1.
        categories: the detector's classes.
        size: (h, w) of the image.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    categories: Categories = field(repr=False)
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def class_names(self) -> list[str]:
        """D names, one per detection."""
        return [self.categories.names[label] for label in self.labels]

    @property
    def category_ids(self) -> NDArray[np.int64]:
        """(D,) int64, the ids of the classes in the data set that the detector was trained on."""
        return np.array(self.categories.ids, np.int64)[self.labels]

    def filter(self, *, score_thresh: float = 0.0, classes: Sequence[str] | None = None) -> Self:
        """The detections that score at least `score_thresh`, of some classes if `classes` names them.

        Raises:
            InputError: there is no such class.
        """
        keep = self.scores >= score_thresh
        if classes is not None:
            keep &= np.isin(self.labels, class_labels(classes, self.categories))
        return replace(self, boxes=self.boxes[keep], scores=self.scores[keep], labels=self.labels[keep])

    def draw(self, image: ImageLike, *, enlarge: bool = True) -> Image.Image:
        """The image with the boxes, class names and scores drawn on it.

        Args:
            image: the one that was predicted.
            enlarge: whether a small image comes back larger, by a whole number, so that the texts can be read.

        Raises:
            InputError: it cannot be read, or is of another size.
        """
        pixels = read_image(image)
        if tuple(pixels.shape[1:]) != self.size:
            (h, w), (own_h, own_w) = pixels.shape[1:], self.size
            raise InputError(
                f"the image to draw on is {w}x{h} (width x height), but these detections are of one of {own_w}x{own_h}"
            )
        picture = draw_detections(pixels, self._detections(), self.categories.names, score_thresh=0.0, enlarge=enlarge)
        return Image.fromarray(picture.permute(1, 2, 0).numpy())

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Records of COCO's results format, with the data set's category ids.

        Args:
            image_id: of this image.
        """
        return to_coco_results([image_id], [self._detections()], self.categories).records()

    def to_supervision(self) -> Any:
        """The same as a `supervision.Detections`: `class_id` is the label, `data["class_name"]` its name.

        Raises:
            InputError: the package supervision is not installed.
        """
        supervision = require("supervision", extra="supervision", purpose="Converting to supervision.Detections")
        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.class_names, dtype=np.str_)},
        )

    def _detections(self) -> Detections:
        boxes, scores, labels = (torch.from_numpy(array) for array in (self.boxes, self.scores, self.labels))
        return Detections(boxes=boxes, scores=scores, labels=labels)


class Detector:
    """A trained detector, as a rule from `Detector.load`.

    Several threads may call it at the same time, unless `runtime.compile` is on: nothing of it changes.

    Args:
        model: the detector, on `device`.
        categories: its classes.
        transforms: the views of an image whose detections are merged; one without test-time augmentation.
        device: where the model is.
        precision: of the forward pass.
        nms_thresh: of the merging of views and tiles.
        max_detections: per image, or per tile of it.
        batch_size: images per forward pass where a call does not say.
    """

    def __init__(
        self,
        model: DetectionModel,
        *,
        categories: Categories,
        transforms: Sequence[TestTransform],
        device: torch.device,
        precision: Precision = "fp32",
        nms_thresh: float = 0.5,
        max_detections: int = 100,
        batch_size: int = 8,
    ) -> None:
        self.model = model
        self.categories = categories
        self.transforms = tuple(transforms)
        self.device = device
        self.precision: Precision = precision
        self.nms_thresh = nms_thresh
        self.max_detections = max_detections
        self.batch_size = batch_size

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        overrides: Sequence[str] = (),
        device: str | torch.device | None = None,
    ) -> Self:
        """The detector of a checkpoint that training or tools/import_weights.py wrote.

        Args:
            checkpoint: the file.
            config: a YAML file to use in the place of the config that the checkpoint holds.
            overrides: values that replace those of the config, as on the command line: `eval.tta={}` looks at each
                image in several sizes and mirrored, `model.roi_head.score_thresh=0.01` keeps weaker detections.
            device: where to compute; the first GPU if there is one, else the CPU.

        Raises:
            InputError: a file cannot be read, a value of the config is wrong, or the model needs proposals
                (`model.kind: fast_rcnn`).
        """
        path = Path(checkpoint)
        state = load_checkpoint(path)
        given = Path(config) if config is not None else None
        settings = build.config_for(state, path, given=given, overrides=overrides)
        if settings.model.kind == "fast_rcnn":
            raise InputError("model.kind fast_rcnn needs proposals of each image; predict with faster_rcnn or rpn")
        place = _device(device)
        return cls(
            build.build_detector(settings, state, path, place),
            categories=build.detected_categories(settings, state),
            transforms=build.build_test_transforms(settings),
            device=place,
            precision=settings.train.precision,
            nms_thresh=settings.model.roi_head.nms_thresh,
            max_detections=settings.model.roi_head.detections_per_image,
            batch_size=settings.eval.batch_size,
        )

    @property
    def class_names(self) -> list[str]:
        """The K names of the classes, by label."""
        return list(self.categories.names)

    @overload
    def predict(
        self,
        images: ImageLike,
        *,
        score_thresh: float = ...,
        classes: Sequence[str] | None = ...,
        batch_size: int | None = ...,
        tile_size: int | None = ...,
        tile_overlap: float = ...,
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        score_thresh: float = ...,
        classes: Sequence[str] | None = ...,
        batch_size: int | None = ...,
        tile_size: int | None = ...,
        tile_overlap: float = ...,
    ) -> list[Prediction]: ...

    def predict(
        self,
        images: ImageLike | list[Any] | tuple[Any, ...],
        *,
        score_thresh: float = 0.5,
        classes: Sequence[str] | None = None,
        batch_size: int | None = None,
        tile_size: int | None = None,
        tile_overlap: float = 0.2,
    ) -> Prediction | list[Prediction]:
        """Detect in an image, or in each of a list.

        Arrays are RGB. OpenCV's are BGR, which nothing can tell from their values: give `array[:, :, ::-1]`.
        Files and Pillow images are turned upright as their EXIF data says, and the boxes are in that frame.

        Args:
            images: one image, or a list of them; paths, Pillow images, (H, W, 3) uint8 arrays or (3, H, W) uint8
                tensors.
            score_thresh: detections that score less are left out; those below `model.roi_head.score_thresh`, 0.05 by
                default, always are. 0 gives what an evaluation needs.
            classes: names of the classes to detect; all by default.
            batch_size: images per forward pass; `eval.batch_size` by default. Only images that become the same size
                share one, so that results do not depend on what else is in the list (but for rounding in the last
                digits, since other shapes may be summed in another order).
            tile_size: look at larger images in square tiles of this side in pixels, besides as a whole, to find what
                is too small for the detector in the resized whole.
            tile_overlap: of neighbouring tiles, as a fraction of `tile_size`. Objects up to this size are seen wholly.

        Returns:
            A `Prediction`, or a list of them if `images` is a list.

        Raises:
            InputError: an image cannot be read, or there is no such class.
        """
        listed = images if isinstance(images, list | tuple) else [images]
        predictions = []
        for outcome in self.stream(
            listed,
            score_thresh=score_thresh,
            classes=classes,
            batch_size=batch_size,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
        ):
            if isinstance(outcome, InputError):
                raise outcome
            predictions.append(outcome[1])
        return predictions if listed is images else predictions[0]

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        score_thresh: float = 0.5,
        classes: Sequence[str] | None = None,
        batch_size: int | None = None,
        tile_size: int | None = None,
        tile_overlap: float = 0.2,
        show_progress: bool = False,
    ) -> Iterator[tuple[Tensor, Prediction] | InputError]:
        """Detect in many images, or in the frames of a video, without holding all of them.

        Images are read by threads while the model is busy: up to four batches of them ahead, or one image with a
        `batch_size` of 1, which is for cameras.

        Args:
            images: any number of them.
            score_thresh, classes, batch_size, tile_size, tile_overlap: as of `predict`.
            show_progress: whether what takes many batches, such as an image of many tiles, shows a bar on a terminal.

        Yields:
            In order, for each image its pixels, (3, H, W) uint8 RGB, and the prediction; for one that cannot be read,
            the error in their place.

        Raises:
            InputError: there is no such class, or another argument is out of its range.
        """
        batch_size = self.batch_size if batch_size is None else batch_size
        for name, value, valid in (
            ("score_thresh", score_thresh, 0 <= score_thresh <= 1),
            ("batch_size", batch_size, batch_size >= 1),
            ("tile_size", tile_size, tile_size is None or tile_size >= 16),
            ("tile_overlap", tile_overlap, 0 <= tile_overlap < 1),
        ):
            if not valid:
                raise InputError(f"{name} is {value}; it must be {_RANGES[name]}")
        if classes is not None:
            class_labels(classes, self.categories)
        return self._stream(images, score_thresh, classes, batch_size, tile_size, tile_overlap, show_progress)

    def _stream(
        self,
        images: Iterable[ImageLike],
        score_thresh: float,
        classes: Sequence[str] | None,
        batch_size: int,
        tile_size: int | None,
        tile_overlap: float,
        show_progress: bool,
    ) -> Iterator[tuple[Tensor, Prediction] | InputError]:
        most = 1 if batch_size == 1 else WINDOW_BATCHES * batch_size
        for read in _groups(ahead(_try_to_read, images, depth=most, num_threads=NUM_THREADS), most=most):
            pixels = [image for image in read if isinstance(image, Tensor)]
            views = [windows_of(_size(image), tile_size=tile_size, overlap=tile_overlap) for image in pixels]
            found = iter(self._detect(pixels, views, batch_size=batch_size, show_progress=show_progress))
            for image in read:
                if isinstance(image, Tensor):
                    prediction = self._prediction(next(found), _size(image))
                    yield image, prediction.filter(score_thresh=score_thresh, classes=classes)
                else:
                    yield image

    def _prediction(self, found: Detections, size: tuple[int, int]) -> Prediction:
        return Prediction(
            boxes=found.boxes.numpy(),
            scores=found.scores.numpy(),
            labels=found.labels.numpy(),
            categories=self.categories,
            size=size,
        )

    def _detect(
        self, images: Sequence[Tensor], windows: Sequence[Sequence[Window]], *, batch_size: int, show_progress: bool
    ) -> list[Detections]:
        """Detections in each of some images, which are looked at through their `windows` in all views."""
        looks = [_Look(i, window, t) for i in range(len(images)) for window in windows[i] for t in self.transforms]
        found: dict[_Look, Detections] = {}
        for flipped in (False, True):
            batches = _batches([look for look in looks if look.transform.horizontal_flip == flipped], batch_size)
            loaded = ahead(partial(_load, images), batches, depth=2, num_threads=NUM_THREADS)
            detected = detect(
                self.model,
                loaded,
                device=self.device,
                precision=self.precision,
                flipped=flipped,
                show_progress=False,
                memory_remedy="Lower the batch size (batch_size, on the command line --batch-size) or "
                "data.test_short_side",
            )
            quiet = not show_progress or len(batches) <= 2 * WINDOW_BATCHES
            with tqdm(total=len(batches), desc="batches", unit="batch", leave=False, disable=quiet or None) as bar:
                for batch, (_, detections) in zip(batches, detected, strict=True):
                    found.update(zip(batch, detections, strict=True))
                    bar.update()
        return [
            merge_windows(
                [
                    merge_views(
                        [found[_Look(i, window, t)] for t in self.transforms],
                        nms_thresh=self.nms_thresh,
                        top_k=self.max_detections,
                    )
                    for window in windows[i]
                ],
                windows[i],
                size=_size(image),
                iou_thresh=self.nms_thresh,
            )
            for i, image in enumerate(images)
        ]


class _Look(NamedTuple):
    """What the model is to see: a window of an image in one view."""

    image: int
    window: Window
    transform: TestTransform

    def padded_size(self) -> tuple[int, int]:
        """(h, w) that `collate` pads it to."""
        x1, y1, x2, y2 = self.window
        t = self.transform
        h, w = resized_size((y2 - y1, x2 - x1), short_side=t.short_side, long_side=t.long_side, resize=t.resize)
        return _padded(h), _padded(w)


def _padded(side: int) -> int:
    return math.ceil(side / SIZE_DIVISOR) * SIZE_DIVISOR


def _batches(looks: Sequence[_Look], batch_size: int) -> list[list[_Look]]:
    """Looks of one padded size together, at most `batch_size` of them."""
    by_size: dict[tuple[int, int], list[_Look]] = defaultdict(list)
    for look in looks:
        by_size[look.padded_size()].append(look)
    return [group[i : i + batch_size] for group in by_size.values() for i in range(0, len(group), batch_size)]


def _load(images: Sequence[Tensor], looks: Sequence[_Look]) -> Batch:
    samples = [
        transform(Sample.to_detect_in(images[i][:, y1:y2, x1:x2], image_id=i), random.Random(0))
        for i, (x1, y1, x2, y2), transform in looks
    ]
    return collate(samples, size_divisor=SIZE_DIVISOR)


def _size(image: Tensor) -> tuple[int, int]:
    """(h, w) of an image (3, h, w)."""
    return image.shape[1], image.shape[2]


def _groups(images: Iterable[Tensor | InputError], *, most: int) -> Iterator[list[Tensor | InputError]]:
    """Consecutive images, `most` of them or fewer that fill `WINDOW_BYTES`."""
    group: list[Tensor | InputError] = []
    num_bytes = 0
    for image in images:
        group.append(image)
        num_bytes += image.nbytes if isinstance(image, Tensor) else 0
        if len(group) == most or num_bytes >= WINDOW_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _try_to_read(image: ImageLike) -> Tensor | InputError:
    try:
        return read_image(image)
    except InputError as error:
        return error


def read_image(image: ImageLike) -> Tensor:
    """The pixels of an image, however it is given; see `ImageLike`.

    Returns:
        (3, H, W) uint8, RGB.

    Raises:
        InputError: it cannot be read, or is no such thing.
    """
    if isinstance(image, str | os.PathLike):
        name = os.fspath(image)
        if "://" in name:
            raise InputError(f"{name}: addresses are not read; download the file and give its path")
        if Path(name).is_dir():
            raise InputError(f"{name}: a folder; give the images in it: sorted(Path({name!r}).glob('*.jpg'))")
        return load_image(Path(name))
    if isinstance(image, Image.Image):
        return from_pillow(image)
    if isinstance(image, np.ndarray):
        if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and image.size:
            return torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)
        raise InputError(
            f"an array of shape {image.shape} and type {image.dtype} is no image here: it must be (H, W, 3) uint8, RGB "
            "(PIL.Image.fromarray(array).convert('RGB') makes that of grey and transparent ones)"
        )
    if isinstance(image, Tensor):
        if image.ndim == 3 and image.shape[0] == 3 and image.dtype == torch.uint8 and image.numel():
            return image.cpu()
        raise InputError(
            f"a tensor of shape {tuple(image.shape)} and type {image.dtype} is no image here: it must be (3, H, W) "
            "uint8, RGB, 0..255"
        )
    raise InputError(
        f"a {type(image).__name__} is no image: give a path, a Pillow image, an (H, W, 3) uint8 array or a (3, H, W) "
        "uint8 tensor"
    )


def class_labels(names: Sequence[str], categories: Categories) -> list[int]:
    """The class indices of some names; of a name that several classes have, all of them.

    Raises:
        InputError: there is no such class; the message has the nearest names.
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in categories.names:
            near = difflib.get_close_matches(name, categories.names, n=3)
            known = ", ".join(map(printable, near or categories.names[:20]))
            raise InputError(
                f"no class {name!r}; {'did you mean' if near else 'there are'} {known}{'?' if near else ''}"
            )
    return [label for label, name in enumerate(categories.names) if name in names]


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise InputError(f"device {device} cannot be used ({str(error).splitlines()[0]}); give cpu or cuda") from error
