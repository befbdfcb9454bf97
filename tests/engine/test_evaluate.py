"""Detection over a data set: frames, formats, modes, and metrics of a detector that knows the answers."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fpn_det.data.loader import collate
from fpn_det.data.transforms import TestTransform
from fpn_det.engine.coco_eval import GroundTruth, format_proposal_table, format_table, read_ground_truth
from fpn_det.engine.distributed import Process
from fpn_det.engine.evaluate import (
    MAX_UNREADABLE,
    View,
    detect,
    evaluate,
    evaluate_proposals,
    from_coco_results,
    merge_views,
    propose,
    to_coco_results,
)
from fpn_det.structures import Batch, Categories, Detections, InputError, Proposals, Sample

CATEGORIES = Categories((3, 7), ("cat", "dog"))
CPU = torch.device("cpu")
HALF, FULL, DOUBLE = (50, 50), (100, 100), (200, 200)


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


def ground_truth(folder: Path) -> GroundTruth:
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
    return read_ground_truth(folder / "truth.json")


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


def test_flipped_images_are_flipped_back():
    """Together with the change of size: 32 wide as the network sees it, 64 as the file has it."""
    oracle = Oracle({1: ([8.0, 4.0, 24.0, 32.0], 0)})
    batches = [batch_of((1, (64, 32), (32, 64)), (2, (64, 64), (64, 64)))]
    [(_, [found, _])] = detect(oracle, batches, device=CPU, precision="fp32", flipped=True)
    assert found.boxes.tolist() == [[16.0, 2.0, 48.0, 16.0]]
    # What the test transform does is undone to the bit: a detector that sees the truth reports the truth.
    boxes = torch.tensor([[10.25, 3.5, 41.0, 60.75], [0.0, 0.0, 100.0, 80.0]])
    sample = Sample(
        image=torch.zeros(3, 80, 100, dtype=torch.uint8),
        boxes=boxes,
        labels=torch.zeros(2, dtype=torch.int64),
        image_id=1,
        original_size=(80, 100),
    )
    seen = TestTransform(short_side=160, long_side=200, horizontal_flip=True)(sample, random.Random(0))
    assert seen.boxes.tolist() != (2 * boxes).tolist()

    class Mirror(Oracle):
        def predict(self, batch: Batch) -> list[Detections]:
            truth = batch.targets.boxes[0]
            return [Detections(boxes=truth, scores=torch.ones(2), labels=batch.targets.labels[0])]

    [(_, [found])] = detect(Mirror({}), [collate([seen])], device=CPU, precision="fp32", flipped=True)
    assert torch.equal(found.boxes, boxes)


def test_a_batch_comes_back_in_few_copies():
    """Three, however many images there are: each waits for the device."""
    found = [detections(*[([0.0, 0.0, float(i), 5.0], i / 10, i)] * i) for i in range(4)]
    copies: list[torch.Size] = []

    class Remote(torch.Tensor):
        """A tensor whose copies to the CPU are counted."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.cpu, torch.Tensor.to):
                copies.append(args[0].shape)
                return args[0].as_subclass(torch.Tensor)
            return super().__torch_function__(function, types, args, kwargs or {})

    class Far(Oracle):
        def predict(self, batch: Batch) -> list[Detections]:
            return [
                Detections(**{n: getattr(d, n).as_subclass(Remote) for n in ("boxes", "scores", "labels")})
                for d in found
            ]

    batch = batch_of(*((i, HALF, HALF) for i in range(4)))
    [(_, returned)] = detect(Far({}), [batch], device=CPU, precision="fp32")
    assert copies == [(6, 4), (6,), (6,)]
    for d, expected in zip(returned, found, strict=True):
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(getattr(d, name), getattr(expected, name))


def detections(*rows: tuple[list[float], float, int]) -> Detections:
    """From (box, score, label)."""
    return Detections(
        boxes=torch.tensor([box for box, _, _ in rows]).reshape(-1, 4),
        scores=torch.tensor([value for _, value, _ in rows]),
        labels=torch.tensor([label for _, _, label in rows], dtype=torch.int64),
    )


def test_views_are_merged_by_nms():
    first = detections(([0.0, 0.0, 10.0, 10.0], 0.9, 0), ([50.0, 0.0, 60.0, 10.0], 0.3, 0))
    second = detections(
        ([0.0, 0.0, 10.0, 5.0], 0.95, 1),  # another class
        ([0.0, 0.0, 10.0, 8.0], 0.8, 0),  # IoU 0.8 with the first of the other view
        ([0.0, 0.0, 10.0, 4.0], 0.7, 0),  # IoU 0.4
        ([50.0, 0.0, 60.0, 9.0], 0.5, 0),  # better than that of the other view, IoU 0.9
    )
    merged = merge_views([first, second], nms_thresh=0.5, top_k=100)
    assert merged.scores.tolist() == pytest.approx([0.95, 0.9, 0.7, 0.5])
    assert merged.labels.tolist() == [1, 0, 0, 0]
    assert merged.boxes[3].tolist() == [50.0, 0.0, 60.0, 9.0]
    assert len(merge_views([first, second], nms_thresh=0.85, top_k=100)) == 5
    assert merge_views([first, second], nms_thresh=0.5, top_k=2).scores.tolist() == pytest.approx([0.95, 0.9])
    assert merge_views([first], nms_thresh=0.5, top_k=100) is first
    nothing = detections()
    assert merge_views([first, nothing], nms_thresh=0.5, top_k=9).scores.tolist() == pytest.approx([0.9, 0.3])
    assert merge_views([nothing, nothing], nms_thresh=0.5, top_k=9).boxes.shape == (0, 4)


def test_what_one_view_alone_finds_is_found(tmp_path):
    """The dog of image 10 is found at half size only, that of image 11 at double size only, mirrored."""

    class Picky(Oracle):
        def predict(self, batch: Batch) -> list[Detections]:
            height = int(batch.sizes[0, 0])
            self.answers = {50: {10: ([10.0, 5.0, 30.0, 15.0], 1)}, 200: {11: ([140.0, 0.0, 200.0, 60.0], 1)}}[height]
            return super().predict(batch)

    half, double = ([batch_of((i, size, FULL)) for i in (10, 11, 12)] for size in (HALF, DOUBLE))
    options = {
        "truth": ground_truth(tmp_path),
        "categories": CATEGORIES,
        "backend": "pycocotools",
        "nms_thresh": 0.5,
        "max_detections": 100,
        "precision": "fp32",
        "process": Process(),
    }
    views = [View(batches=half), View(batches=double, flipped=True)]
    for used, recall in ((views[:1], 0.5), (views[1:], 0.5), (views, 1.0), (views * 2, 1.0)):
        metrics, results = evaluate(Picky({}), iter(used), **options)
        assert metrics["AR100"] == pytest.approx(recall)
        assert len(results) == 2 * recall
    assert results.boxes.tolist() == [[20.0, 10.0, 40.0, 20.0], [0.0, 0.0, 30.0, 30.0]]


def test_merging_takes_its_limits_from_the_evaluation(tmp_path):
    """The same box in two views and its half in a third: IoU 0.5."""
    views = [
        (Oracle({10: ([10.0, 5.0, 30.0, y2], 1)}), View(batches=[batch_of((10, HALF, FULL))])) for y2 in (15.0, 15, 10)
    ]

    class InTurn(Oracle):
        def predict(self, batch: Batch) -> list[Detections]:
            oracle, _ = views[len(self.seen) % 3]
            oracle.training = self.training
            self.seen.append(10)
            return oracle.predict(batch)

    for nms_thresh, max_detections, count in ((0.6, 100, 2), (0.4, 100, 1), (0.6, 1, 1)):
        _, results = evaluate(
            InTurn({}),
            [view for _, view in views],
            truth=ground_truth(tmp_path),
            categories=CATEGORIES,
            backend="pycocotools",
            nms_thresh=nms_thresh,
            max_detections=max_detections,
            precision="fp32",
            process=Process(),
        )
        assert len(results) == count


def test_coco_results_round_trip():
    found = Detections(
        boxes=torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 5.0, 5.0]]),
        scores=torch.tensor([0.9, 0.4]),
        labels=torch.tensor([1, 0]),
    )
    nothing = Detections(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64))
    results = to_coco_results([8, 2**53 + 1, 42], [found, nothing, found], CATEGORIES)
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in results.records()] == [
        (8, 7, [1.0, 2.0, 3.0, 6.0]),
        (8, 3, [0.0, 0.0, 5.0, 5.0]),
        (42, 7, [1.0, 2.0, 3.0, 6.0]),
        (42, 3, [0.0, 0.0, 5.0, 5.0]),
    ]
    assert results.scores.tolist() == found.scores.tolist() * 2
    assert found.boxes[0].tolist() == [1.0, 2.0, 4.0, 8.0]  # untouched
    back = from_coco_results(results[np.array([3, 2])], CATEGORIES)
    for name in ("boxes", "scores", "labels"):
        assert torch.equal(getattr(back, name), getattr(found, name))
        assert getattr(back, name).dtype == getattr(found, name).dtype
    for image_ids, detections in (([], []), ([1], [nothing])):
        results = to_coco_results(image_ids, detections, CATEGORIES)
        assert (results.boxes.shape, results.image_ids.dtype) == ((0, 4), np.int64)
        assert from_coco_results(results, CATEGORIES).boxes.shape == (0, 4)


@pytest.mark.parametrize("was_training", [True, False])
@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
def test_metrics_of_a_detector_that_knows(tmp_path, backend, was_training):
    oracle = Oracle({10: ([10.0, 5.0, 30.0, 15.0], 1), 11: ([0.0, 0.0, 15.0, 15.0], 0)})  # the second: wrong class
    oracle.train(was_training)
    evaluated = evaluate(
        oracle,
        [View(batches=[batch_of((12, HALF, FULL), (11, HALF, FULL)), batch_of((10, HALF, FULL))])],
        truth=ground_truth(tmp_path),
        categories=CATEGORIES,
        backend=backend,
        nms_thresh=0.5,
        max_detections=100,
        precision="fp32",
        process=Process(),
    )
    assert evaluated is not None
    metrics, results = evaluated
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in results.records()] == [
        (10, 7, [20.0, 10.0, 40.0, 20.0]),
        (11, 3, [0.0, 0.0, 30.0, 30.0]),
    ]
    assert metrics["per_class"]["dog"]["AR100"] == pytest.approx(0.5)
    assert metrics["AR100"] == pytest.approx(0.5)  # cat has no ground truth
    assert 0.5 <= metrics["AP"] < 0.51  # precision 1 up to recall 0.5: 51 of 101 points
    assert oracle.training is was_training


def test_detections_are_ordered_by_image_and_score(tmp_path):
    """Of equal scores those stay first that the detector gave first; enough of them for an unstable sort to show."""
    rows = [([0.0, 0.0, float(i + 1), 5.0], (i * 7 % 3) / 4, 0) for i in range(60)]

    class Many(Oracle):
        def predict(self, batch: Batch) -> list[Detections]:
            return [detections(*rows) for _ in batch.image_ids]

    batches = [batch_of((12, HALF, HALF), (10, HALF, HALF)), batch_of((11, HALF, HALF))]
    _, results = evaluate(
        Many({}),
        [View(batches=batches)],
        truth=ground_truth(tmp_path),
        categories=CATEGORIES,
        backend="hotcoco",
        nms_thresh=0.5,
        max_detections=100,
        precision="fp32",
        process=Process(),
    )
    assert results.image_ids.tolist() == [10] * 60 + [11] * 60 + [12] * 60
    widths = [box[2] for box, *_ in sorted(rows, key=lambda row: -row[1])]
    assert results.boxes[:, 2].tolist() == widths * 3
    one = results[results.image_ids == 11][np.arange(60)[::-1]]
    back = from_coco_results(one, CATEGORIES).boxes[:, 2].tolist()
    assert back == [r["bbox"][2] for r in sorted(one.records(), key=lambda r: -r["score"])] != one.boxes[:, 2].tolist()


def test_a_detector_that_finds_nothing(tmp_path):
    metrics, results = evaluate(
        Oracle({}),
        [View(batches=[])],
        truth=ground_truth(tmp_path),
        categories=CATEGORIES,
        backend="pycocotools",
        nms_thresh=0.5,
        max_detections=100,
        precision="fp32",
        process=Process(),
    )
    assert (metrics["AP"], len(results)) == (0.0, 0)


class Proposing:
    """Proposes three boxes per image, the second of them padding that would be the answer, and notes its mode."""

    def __init__(self) -> None:
        self.training = True

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def propose(self, batch: Batch) -> Proposals:
        assert not self.training
        assert not torch.is_grad_enabled()
        answers = {10: [10.0, 5.0, 30.0, 15.0], 11: [0.0, 0.0, 15.0, 15.0], 12: [1.0, 1.0, 2.0, 2.0]}
        boxes = torch.tensor([[[30.0, 30.0, 40.0, 40.0], answers[i], answers[i]] for i in batch.image_ids.tolist()])
        valid = torch.tensor([[True, False, i != 11] for i in batch.image_ids.tolist()])
        return Proposals(boxes=boxes, scores=torch.tensor([[0.9, 0.5, 0.1]]).expand(len(boxes), 3), valid=valid)


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
def test_recall_of_proposals(tmp_path, backend):
    """Of the boxes of images 10 and 11 the first is proposed; two processes find what one finds."""
    batches = [batch_of((12, HALF, FULL), (11, HALF, FULL)), batch_of((10, HALF, FULL))]
    options: dict[str, Any] = {"truth": ground_truth(tmp_path), "backend": backend, "precision": "fp32"}
    model = Proposing()
    metrics = evaluate_proposals(model, batches, **options, process=Process())
    assert metrics is not None
    assert (metrics["AR100"], metrics["ARs"], metrics["ARm"]) == pytest.approx((0.5, 0.5, -1))
    assert model.training

    sent: list[Any] = []

    class Main(Process):
        def gather(self, value: Any) -> list[Any]:
            return [value, *sent]

    class Other(Process):
        def gather(self, value: Any) -> list[Any]:
            sent[:] = [value]
            return []

    for split in (1, 2):  # the second time, one process has nothing to do
        other, main = Other(rank=1, world_size=2), Main(world_size=2)
        assert evaluate_proposals(Proposing(), batches[split:], **options, process=other) is None
        assert evaluate_proposals(Proposing(), batches[:split], **options, process=main) == metrics


# Images that could not be read


def unreadable(batch: Batch, *image_ids: int) -> Batch:
    return dataclasses.replace(batch, unreadable=torch.tensor(image_ids))


class Sharing(Process):
    """Processes that run one after the other, the main one last."""

    sent: list[Any]

    def gather(self, value: Any) -> list[Any]:
        self.sent.insert(0, value)
        return self.sent if self.is_main else []


def test_nothing_is_found_in_an_image_that_could_not_be_read(tmp_path):
    """Not even in another view of it; the metrics name those of all processes, the table says why they are low."""
    answers = {10: ([10.0, 5.0, 30.0, 15.0], 1), 11: ([0.0, 0.0, 15.0, 15.0], 1)}
    whole = [batch_of((12, HALF, FULL), (11, HALF, FULL)), batch_of((10, HALF, FULL))]
    [(_, [other, of_11]), (_, [of_10])] = detect(
        Oracle(answers), [unreadable(whole[0], 12, 11), whole[1]], device=CPU, precision="fp32"
    )
    assert (len(other), len(of_11), len(of_10)) == (0, 0, 1)
    assert (of_11.boxes.shape, of_11.labels.dtype) == ((0, 4), torch.int64)

    options = {
        "truth": ground_truth(tmp_path),
        "categories": CATEGORIES,
        "backend": "pycocotools",
        "nms_thresh": 0.5,
        "max_detections": 100,
        "precision": "fp32",
    }
    for batches in ([unreadable(whole[0], 12, 11), whole[1]], [unreadable(whole[0], 11, 12), whole[1]]):
        Sharing.sent = []
        share = [[View(batches=batches[rank:][:1]), View(batches=batches[rank:][:1])] for rank in (0, 1)]
        assert evaluate(Oracle(answers), share[0], **options, process=Sharing(rank=1, world_size=2)) is None
        metrics, results = evaluate(Oracle(answers), share[1], **options, process=Sharing(rank=0, world_size=2))
        assert metrics["unreadable_images"] == [11, 12]
        assert metrics["AR100"] == pytest.approx(0.5)
        assert results.image_ids.tolist() == [10]
        assert json.loads(json.dumps(metrics)) == metrics
        last = format_table(metrics).splitlines()[-1]
        assert last == "images that could not be read, and count as if nothing was found there: 2 (ids 11, 12)"

    metrics, _ = evaluate(Oracle(answers), [View(batches=whole)], **options, process=Process())
    assert "unreadable_images" not in metrics
    assert "could not be read" not in format_table(metrics)


def test_nothing_is_proposed_in_an_image_that_could_not_be_read(tmp_path):
    whole = [batch_of((12, HALF, FULL), (11, HALF, FULL)), batch_of((10, HALF, FULL))]
    found = list(propose(Proposing(), [unreadable(whole[0], 12), whole[1]], device=CPU, precision="fp32"))
    assert [[len(boxes) for boxes, _ in of_images] for _, of_images in found] == [[0, 1], [2]]
    assert [[len(scores) for _, scores in of_images] for _, of_images in found] == [[0, 1], [2]]

    options: dict[str, Any] = {"truth": ground_truth(tmp_path), "backend": "hotcoco", "precision": "fp32"}
    Sharing.sent = []
    other, main = Sharing(rank=1, world_size=2), Sharing(rank=0, world_size=2)
    assert evaluate_proposals(Proposing(), [unreadable(whole[1], 10)], **options, process=other) is None
    metrics = evaluate_proposals(Proposing(), [unreadable(whole[0], 12)], **options, process=main)
    assert metrics["unreadable_images"] == [10, 12]
    assert metrics["AR100"] == 0
    assert (
        format_proposal_table(metrics)
        .splitlines()[-1]
        .endswith("could not be read, and count as if nothing was found there: 2 (ids 10, 12)")
    )
    many = {**metrics, "unreadable_images": list(range(2000))}
    assert ": 2,000 (ids 0, 1, 2, 3, 4, ...)" in format_proposal_table(many)


def test_an_evaluation_without_any_image_is_refused_early():
    """A folder that is gone gives no AP of 0 after an hour."""
    batches = [unreadable(batch_of((i, HALF, FULL)), i) for i in [10, 11, 12] * 3 + [10]]
    assert len(batches) == MAX_UNREADABLE
    for call in (detect, propose):
        model = Proposing() if call is propose else Oracle({})
        with pytest.raises(InputError, match=r"none of the first 10 images can be read.*data\.val\.images.*id 10"):
            list(call(model, batches, device=CPU, precision="fp32"))
    one_good = [batch_of((99, HALF, FULL)), *batches, *batches]
    assert len(list(detect(Oracle({}), one_good, device=CPU, precision="fp32"))) == 21
    assert len(list(detect(Oracle({}), batches[1:], device=CPU, precision="fp32"))) == 9
