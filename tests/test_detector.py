"""The Python interface: what goes in, what comes out, and that it is what the evaluation finds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from detecting import CATEGORIES, ColorModel, save_untrained
from PIL import Image, ImageDraw
from torch import Tensor

from fpn_det import Detector, Prediction
from fpn_det.data.transforms import TestTransform
from fpn_det.structures import Categories, InputError


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("detector") / "random.pth", tiny)


@pytest.fixture(scope="module")
def detector(checkpoint) -> Detector:
    return Detector.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def photos(shapes) -> list[Path]:
    return sorted((shapes / "val").glob("*.jpg"))


def assert_same(one: Prediction, other: Prediction, tolerance: float = 0.0) -> None:
    assert len(one) > 5
    assert one.size == other.size
    assert one.labels.tolist() == other.labels.tolist()
    assert one.boxes == pytest.approx(other.boxes, abs=tolerance * 100)
    assert one.scores == pytest.approx(other.scores, abs=tolerance)


# What goes in


def test_every_form_of_an_image_gives_the_same(detector, photos, tmp_path) -> None:
    picture = Image.open(photos[0]).convert("RGB")
    path = tmp_path / "lossless.png"
    picture.save(path)
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = detector.predict(path, score_thresh=0)
    for image in (str(path), Image.open(path), picture, array, array[:, ::-1][:, ::-1], tensor, tensor.contiguous()):
        assert_same(detector.predict(image, score_thresh=0), expected)
    swapped = detector.predict(array[:, :, ::-1], score_thresh=0)
    assert swapped.scores[:5].tolist() != expected.scores[:5].tolist()  # RGB matters


def test_images_are_turned_upright(detector, photos, tmp_path) -> None:
    picture = Image.open(photos[0]).convert("RGB").resize((90, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = picture.transpose(Image.Transpose.ROTATE_270)
    expected = detector.predict(upright, score_thresh=0)
    assert expected.size == (90, 64)
    for image in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert_same(detector.predict(image, score_thresh=0), expected)


def test_a_list_equals_its_images_one_by_one(detector, photos) -> None:
    images = [Image.open(p).resize(size) for p, size in zip(photos, [(64, 64), (64, 30), (30, 64)] * 3, strict=False)]
    several = detector.predict(images, score_thresh=0, batch_size=3)
    assert [p.size for p in several] == [(image.height, image.width) for image in images]
    for one, image in zip(several, images, strict=True):
        assert_same(one, detector.predict(image, score_thresh=0), 1e-5)
    assert detector.predict([]) == []


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8), np.uint8), r"array of shape \(8, 8\).*\(H, W, 3\) uint8, RGB"),
        (np.zeros((8, 8, 4), np.uint8), r"\(8, 8, 4\)"),
        (np.zeros((8, 8, 3), np.float32), "type float32"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"tensor of shape \(8, 8, 3\).*\(3, H, W\)"),
        (torch.zeros(3, 8, 8), r"float32"),
        ("https://example.org/a.jpg", "download the file"),
        (".", "a folder; give the images in it"),
        ("nothing.jpg", "nothing.jpg: cannot read the image"),
        (7, "a int is no image"),
    ],
)
def test_what_is_no_image_is_refused(detector, image, words) -> None:
    with pytest.raises(InputError, match=words):
        detector.predict(image)


def test_a_damaged_pillow_image_is_refused(detector, photos, tmp_path) -> None:
    (tmp_path / "cut.jpg").write_bytes(photos[0].read_bytes()[:700])
    with Image.open(tmp_path / "cut.jpg") as cut, pytest.raises(InputError, match="Pillow image cannot be used"):
        detector.predict(cut)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score_thresh": 50}, "score_thresh is 50; it must be between 0 and 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"tile_size": 4}, "tile_size is 4"),
        ({"tile_overlap": 1.0}, "tile_overlap is 1.0"),
        ({"classes": ["circel"]}, r"no class 'circel'; did you mean circle\?"),
        ({"classes": ["zebra"]}, "no class 'zebra'; there are circle, square, triangle, cross, ring"),
    ],
)
def test_options_out_of_range_are_refused(detector, photos, options, words) -> None:
    with pytest.raises(InputError, match=words):
        detector.predict(photos[0], **options)


# What comes out


def test_predictions_are_those_of_the_evaluation(tool, tiny, checkpoint, detector, shapes, tmp_path) -> None:
    assert tool("eval", *tiny, "eval.batch_size=1", "--checkpoint", checkpoint, "--output-dir", tmp_path).code == 0
    expected = json.loads((tmp_path / "predictions.json").read_text())
    images = json.loads((shapes / "annotations/val.json").read_text())["images"]
    predictions = detector.predict([shapes / "val" / i["file_name"] for i in images], score_thresh=0, batch_size=1)
    found = [r for image, p in zip(images, predictions, strict=True) for r in p.to_coco(image["id"])]
    found.sort(key=lambda r: r["image_id"])  # stable: best first within an image
    assert found == expected
    assert len({r["image_id"] for r in found}) == len(images) == 8


def test_a_prediction_is_arrays_with_names(detector, photos) -> None:
    everything = detector.predict(photos[0], score_thresh=0)
    assert (everything.boxes.dtype, everything.scores.dtype, everything.labels.dtype) == (
        np.float32,
        np.float32,
        np.int64,
    )
    assert everything.boxes.shape == (len(everything), 4)
    assert (np.diff(everything.scores) <= 0).all()
    assert everything.class_names == [CATEGORIES.names[label] for label in everything.labels]
    assert everything.category_ids.tolist() == [CATEGORIES.ids[label] for label in everything.labels]
    assert detector.class_names == list(CATEGORIES.names)

    chosen = everything.class_names[3]
    thresh = float(np.median(everything.scores))
    some = detector.predict(photos[0], score_thresh=thresh, classes=[chosen])
    keep = [i for i, name in enumerate(everything.class_names) if name == chosen and everything.scores[i] >= thresh]
    assert 0 < len(keep) < len(everything)
    assert some.scores.tolist() == everything.scores[keep].tolist()
    assert some.class_names == [chosen] * len(keep)


def test_supervision(detector, photos) -> None:
    prediction = detector.predict(photos[0], score_thresh=0)
    detections = prediction.to_supervision()
    assert detections.xyxy.tolist() == prediction.boxes.tolist()
    assert detections.confidence.tolist() == prediction.scores.tolist()
    assert detections.class_id.tolist() == prediction.labels.tolist()
    assert detections["class_name"].tolist() == prediction.class_names
    assert (
        len(detections[detections.confidence > prediction.scores[3]])
        == (prediction.scores > prediction.scores[3]).sum()
    )
    assert len(prediction.filter(score_thresh=1).to_supervision()) == 0


def test_draw(detector, photos) -> None:
    image = Image.open(photos[0]).convert("RGB")
    prediction = detector.predict(image, score_thresh=0)
    drawn = prediction.draw(image, enlarge=False)
    assert drawn.size == image.size
    x1, y1 = prediction.boxes[0, :2].round().astype(int).clip(0, 63)
    assert drawn.getpixel((int(x1), int(y1))) != image.getpixel((int(x1), int(y1)))
    assert prediction.filter(score_thresh=1).draw(image, enlarge=False).tobytes() == image.tobytes()
    assert prediction.draw(image).size == (image.width * 7, image.height * 7)
    with pytest.raises(InputError, match="the image to draw on is 32x64"):
        prediction.draw(image.resize((32, 64)))


def test_threads_may_share_a_detector(detector, photos) -> None:
    expected = [detector.predict(p, score_thresh=0) for p in photos]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda p: detector.predict(p, score_thresh=0), photos * 3))
    for one, other in zip(found, expected * 3, strict=True):
        assert_same(one, other)


def test_a_stream_is_read_as_it_is_used(detector, photos) -> None:
    taken = 0

    def endless() -> Iterator[Path | str]:
        nonlocal taken
        while True:
            taken += 1
            yield "missing.jpg" if taken == 2 else photos[0]

    outcomes = detector.stream(endless(), batch_size=2, score_thresh=0)
    (image, first), second, (_, third) = next(outcomes), next(outcomes), next(outcomes)
    assert isinstance(second, InputError)
    assert "missing.jpg" in str(second)
    assert_same(first, third, 1e-5)
    assert isinstance(image, Tensor)
    assert (image.dtype, tuple(image.shape[1:])) == (torch.uint8, first.size)
    assert taken <= 4 * 2 + 1
    outcomes.close()


# Tiles


LABELS = {(250, 10 * i, 30): i % 3 for i in range(1, 13)}
"""Colours of the twelve objects, with their classes."""


@pytest.fixture(scope="module")
def large() -> tuple[Image.Image, dict[tuple[int, ...], int]]:
    """4,000 x 4,000 pixels with objects of 40 pixels, on and off the borders of tiles, and larger ones; their boxes."""
    corners = [
        (5, 5),
        (3955, 3955),
        (1000, 500),
        (740, 740),
        (810, 10),
        (2000, 1010),
        (1300, 2960),
        (3500, 780),
        (33, 3111),
    ]
    boxes = [(x, y, x + 40, y + 40) for x, y in corners]
    boxes += [(1500, 1300, 2000, 1420), (600, 2000, 720, 3300), (2600, 2600, 3700, 3500)]  # the last in many tiles
    image = Image.new("RGB", (4000, 4000), (30, 60, 90))
    draw = ImageDraw.Draw(image)
    for (x1, y1, x2, y2), color in zip(boxes, LABELS, strict=True):
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=color)
    return image, dict(zip(boxes, LABELS.values(), strict=True))


def color_detector(flips: tuple[bool, ...] = (False,)) -> Detector:
    return Detector(
        ColorModel(LABELS),
        categories=Categories(ids=(1, 2, 3), names=("a", "b", "c")),
        transforms=[TestTransform(short_side=800, long_side=800, horizontal_flip=flip) for flip in flips],
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("flips", [(False,), (False, True)])
def test_tiles_find_what_the_whole_image_does_not_show(large, flips) -> None:
    image, truth = large
    detector = color_detector(flips)
    plain = detector.predict(image, score_thresh=0)
    small = [box for box in truth if box[2] - box[0] == 40]
    assert len(small) == 9
    assert len(plain) == 3  # resized to a fifth, the others are too small

    tiled = detector.predict(image, score_thresh=0, tile_size=800, tile_overlap=0.2)
    found = {
        tuple(box.round().astype(int).tolist()): label for box, label in zip(tiled.boxes, tiled.labels, strict=True)
    }
    assert len(tiled) == len(truth)  # no object twice, none in pieces
    for box, label in truth.items():
        [nearest] = [
            b
            for b in found
            if max(abs(p - q) for p, q in zip(b, box, strict=True))
            <= (0 if box in small else 10)  # seen wholly in the resized whole only
        ]
        assert found[nearest] == label


def test_an_image_that_fits_into_a_tile_is_looked_at_once(detector, photos) -> None:
    whole = detector.predict(photos[0], score_thresh=0)
    assert_same(detector.predict(photos[0], score_thresh=0, tile_size=64), whole)
    assert detector.predict(photos[0], score_thresh=0, tile_size=40).scores.tolist() != whole.scores.tolist()


# Loading


def test_the_checkpoint_brings_its_config_and_overrides_change_it(checkpoint, photos) -> None:
    few = Detector.load(
        checkpoint, overrides=["model.roi_head.detections_per_image=3", "eval.tta={short_sides: [48], long_side: 64}"]
    )
    assert len(few.transforms) > 1
    assert len(few.predict(photos[0], score_thresh=0)) == 3
    with pytest.raises(InputError, match="detections_per_imag"):
        Detector.load(checkpoint, overrides=["model.roi_head.detections_per_imag=3"])
    with pytest.raises(InputError, match="no such checkpoint"):
        Detector.load(checkpoint.with_name("none.pth"))
    with pytest.raises(InputError, match="device nonsense cannot be used"):
        Detector.load(checkpoint, device="nonsense")


def test_other_kinds_of_models(tiny, checkpoint, photos, tmp_path) -> None:
    rpn = Detector.load(save_untrained(tmp_path / "rpn.pth", tiny, "model.kind=rpn"))
    prediction = rpn.predict(photos[0], score_thresh=0)
    assert set(prediction.class_names) == {"object"} == set(rpn.class_names)
    assert len(prediction) > 5
    with pytest.raises(InputError, match="fast_rcnn needs proposals"):
        Detector.load(checkpoint, overrides=["model.kind=fast_rcnn"])


def test_importing_the_package_costs_nothing() -> None:
    code = "import fpn_det, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0
    with pytest.raises(ImportError):
        from fpn_det import Nothing  # noqa: F401
