"""Detection over a data set: frames, formats, modes, and metrics of a detector that knows the answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fpn_det.data.loader import collate
from fpn_det.engine.distributed import Process
from fpn_det.engine.evaluate import detect, evaluate, from_coco_results, to_coco_results
from fpn_det.structures import Batch, Categories, Detections, Sample

CATEGORIES = Categories((3, 7), ("cat", "dog"))
CPU = torch.device("cpu")


class Oracle:
    """Detects one box per image, that of `answers` (XYXY in the frame of the resized image), and notes its mode."""

    def __init__(self, answers: dict[int, tuple[list[float], int]]) -> None:
        self.answers = answers
        self.training = True
        self.seen: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def predict(self, batch: Batch) -> list[Detections]:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.dtypes.add((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        self.seen += batch.image_ids.tolist()
        found = [self.answers.get(i) for i in batch.image_ids.tolist()]
        return [
            Detections(
                boxes=torch.tensor([f[0]] if f else []).reshape(-1, 4),
                scores=torch.full((int(f is not None),), 0.75),
                labels=torch.tensor([f[1]] if f else [], dtype=torch.int64),
            )
            for f in found
        ]


def batch_of(*samples: tuple[int, tuple[int, int], tuple[int, int]]) -> Batch:
    """A batch of (image id, (h, w) resized, (h, w) of the file)."""
    return collate(
        [
            Sample(
                image=torch.zeros(3, *size, dtype=torch.uint8),
                boxes=torch.zeros(0, 4),
                labels=torch.zeros(0, dtype=torch.int64),
                image_id=image_id,
                original_size=original,
            )
            for image_id, size, original in samples
        ]
    )


def ground_truth(folder: Path) -> Path:
    boxes = {10: [20, 10, 40, 20], 11: [0, 0, 30, 30]}  # of the files, XYWH
    content = {
        "images": [{"id": i, "width": 100, "height": 100, "file_name": f"{i}.jpg"} for i in (10, 11, 12)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 7, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, box in boxes.items()
        ],
    }
    (folder / "truth.json").write_text(json.dumps(content))
    return folder / "truth.json"


def test_boxes_return_in_the_frame_of_the_file():
    oracle = Oracle({1: ([8.0, 4.0, 16.0, 32.0], 0)})
    [(_, [found, nothing])] = detect(
        oracle, [batch_of((1, (64, 32), (32, 64)), (2, (64, 64), (64, 64)))], device=CPU, precision="fp32"
    )
    assert found.boxes.tolist() == [[16.0, 2.0, 32.0, 16.0]]  # x doubled, y halved: not those of the padded batch
    assert len(nothing) == 0
    assert nothing.boxes.shape == (0, 4)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(precision, dtype):
    oracle = Oracle({})
    list(detect(oracle, [batch_of((1, (32, 32), (32, 32)))], device=CPU, precision=precision))
    assert oracle.dtypes == {dtype}


def test_coco_results_round_trip():
    found = Detections(
        boxes=torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 5.0, 5.0]]),
        scores=torch.tensor([0.9, 0.4]),
        labels=torch.tensor([1, 0]),
    )
    results = to_coco_results(42, found, CATEGORIES)
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in results] == [
        (42, 7, [1.0, 2.0, 3.0, 6.0]),
        (42, 3, [0.0, 0.0, 5.0, 5.0]),
    ]
    assert found.boxes[0].tolist() == [1.0, 2.0, 4.0, 8.0]  # untouched
    assert json.loads(json.dumps(results)) == results
    back = from_coco_results(results[::-1], CATEGORIES)
    for name in ("boxes", "scores", "labels"):
        assert torch.equal(getattr(back, name), getattr(found, name))
    assert from_coco_results([], CATEGORIES).boxes.shape == (0, 4)
    assert to_coco_results(1, from_coco_results([], CATEGORIES), CATEGORIES) == []


@pytest.mark.parametrize("was_training", [True, False])
@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
def test_metrics_of_a_detector_that_knows(tmp_path, backend, was_training):
    oracle = Oracle({10: ([10.0, 5.0, 30.0, 15.0], 1), 11: ([0.0, 0.0, 15.0, 15.0], 0)})  # the second: wrong class
    oracle.train(was_training)
    evaluated = evaluate(
        oracle,
        [batch_of((12, (50, 50), (100, 100)), (11, (50, 50), (100, 100))), batch_of((10, (50, 50), (100, 100)))],
        annotations=ground_truth(tmp_path),
        categories=CATEGORIES,
        backend=backend,
        max_detections=100,
        precision="fp32",
        process=Process(),
    )
    assert evaluated is not None
    metrics, results = evaluated
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in results] == [
        (10, 7, [20.0, 10.0, 40.0, 20.0]),
        (11, 3, [0.0, 0.0, 30.0, 30.0]),
    ]
    assert metrics["per_class"]["dog"]["AR100"] == pytest.approx(0.5)
    assert metrics["AR100"] == pytest.approx(0.5)  # cat has no ground truth
    assert 0.5 <= metrics["AP"] < 0.51  # precision 1 up to recall 0.5: 51 of 101 points
    assert oracle.training is was_training


def test_a_detector_that_finds_nothing(tmp_path):
    metrics, results = evaluate(
        Oracle({}),
        [],
        annotations=ground_truth(tmp_path),
        categories=CATEGORIES,
        backend="pycocotools",
        max_detections=100,
        precision="fp32",
        process=Process(),
    )
    assert (metrics["AP"], results) == (0.0, [])
