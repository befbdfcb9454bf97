"""Boxes at training scale are those that the transforms make."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from fpn_det.data.coco import load_coco
from fpn_det.data.statistics import training_boxes
from fpn_det.data.transforms import TrainTransform
from fpn_det.structures import Sample

IMAGES = ((48, 64), (100, 33), (64, 64), (75, 301))


@pytest.fixture
def data(tmp_path: Path):
    """Four images, the third without boxes."""
    boxes = [(0, 0, 64, 48), (3.5, 4.25, 10, 1), (1, 1, 7, 90), (10, 5, 290.5, 60)]
    owners = (0, 0, 1, 3)
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": h, "width": w} for i, (h, w) in enumerate(IMAGES)],
        "annotations": [
            {"id": i, "image_id": owner, "category_id": 1 + i % 2, "bbox": box}
            for i, (owner, box) in enumerate(zip(owners, boxes, strict=True))
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    for i in range(len(IMAGES)):
        (tmp_path / f"{i}.jpg").touch()
    (tmp_path / "gt.json").write_text(json.dumps(content))
    return load_coco(tmp_path / "gt.json", tmp_path)


@pytest.mark.parametrize("resize", ["antialiased", "pillow", "float", "opencv"])
def test_boxes_are_those_of_the_transform(data, resize) -> None:
    short_sides, long_side = (40, 61), 130
    found = training_boxes(data, short_sides=short_sides, long_side=long_side, resize=resize)
    boxes, labels, sizes = [], [], []
    for short_side in short_sides:
        transform = TrainTransform(short_sides=[short_side], long_side=long_side, horizontal_flip=0, resize=resize)
        for i, (h, w) in enumerate(IMAGES):
            image = torch.zeros(h, w, 3, dtype=torch.uint8).permute(2, 0, 1)
            own_boxes, own_labels = data.targets(i)
            sample = Sample(image=image, boxes=own_boxes, labels=own_labels, image_id=i, original_size=(h, w))
            sample = transform(sample, random.Random(0))
            boxes.append(sample.boxes)
            labels.append(sample.labels)
            sizes += [tuple(sample.image.shape[1:])] * len(sample.boxes)
    assert torch.equal(found.boxes, torch.cat(boxes))
    assert torch.equal(found.labels, torch.cat(labels))
    assert found.image_sizes.tolist() == [list(size) for size in sizes]
    assert torch.equal(found.padded_sizes() % 32, torch.zeros(8, 2, dtype=torch.int64))
    assert ((found.padded_sizes() - found.image_sizes) < 32).all()


def test_side_ratio_and_sample(data) -> None:
    found = training_boxes(data, short_sides=[48], long_side=1000)
    assert found.side[0].item() == pytest.approx((64 * 48) ** 0.5)
    assert found.ratio[0].item() == 48 / 64
    few = found.sample(2)
    assert torch.equal(few.boxes, found.boxes[[0, 3]])
    assert torch.equal(few.image_sizes, found.image_sizes[[0, 3]])
    assert found.sample(4) is found
