"""Time of COCO's box metrics, ours with hotcoco against pycocotools as everyone runs it, on the same generated data.

    python benchmarks/evaluator.py [--num-images 5000] [--detections-per-image 100] [--repeats 3]

The data are of the size and make-up of COCO's val2017: 80 classes of very different frequency, 7.2 boxes per image with
outlines, 1% crowds, and detections of which two fifths lie near ground truth. Both sides begin with the ground-truth
file and with detections in memory, each in its own form (records for pycocotools, arrays for ours), and end with all
numbers. They alternate, and medians are reported. hotcoco uses all cores; RAYON_NUM_THREADS=1 holds it to one.

Dimensions: T IoU thresholds, R recall thresholds, K classes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_det.engine.coco_eval import METRIC_NAMES, ScoredBoxes, read_ground_truth, read_results, score, write_results

Result = TypeVar("Result")
HEIGHT, WIDTH, NUM_CLASSES, BOXES_PER_IMAGE = 480, 640, 80, 7.2


def main() -> None:
    """Read the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--detections-per-image", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for name, value in evaluator(args.num_images, args.detections_per_image, repeats=args.repeats).items():
        print(f"{name:<20} {value:.3g}")


def evaluator(num_images: int = 5000, detections_per_image: int = 100, *, repeats: int = 3) -> dict[str, float]:
    """Measure both sides on the same data.

    Returns:
        Medians in seconds unless said otherwise.

        - `pycocotools_s`: COCO(file), loadRes, evaluate, accumulate, summarize;
        - `hotcoco_s`: `read_ground_truth` and `score`, that is `parse_s`, needed once per run, and `score_s`;
        - `ratio`: `pycocotools_s` / `hotcoco_s`;
        - `largest_difference`: between the numbers of both sides, the twelve and those of every class;
        - `AP`, 0..1;
        - `write_s`, `json_dumps_s`: predictions.json by `write_results`, and by `json.dumps` of records;
        - `read_s`: `read_results` of that file.
    """
    content, found = generate(num_images, detections_per_image)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        annotations, predictions = Path(folder, "gt.json"), Path(folder, "predictions.json")
        annotations.write_text(json.dumps(content))
        for _ in range(repeats):
            truth = _timed(seconds, "parse_s", read_ground_truth, annotations)
            metrics = _timed(seconds, "score_s", score, truth, found)
            records = found.records()  # anew: loadRes writes into them
            reference = _timed(seconds, "pycocotools_s", _pycocotools, annotations, records)
            _timed(seconds, "write_s", write_results, predictions, found)
            _timed(seconds, "read_s", read_results, predictions)
            _timed(seconds, "json_dumps_s", lambda: predictions.write_text(json.dumps(found.records())))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    hotcoco_s = median["parse_s"] + median["score_s"]
    per_class = [tuple(numbers.values()) for numbers in metrics["per_class"].values()]
    ours = np.concatenate([[metrics[name] for name in METRIC_NAMES], *per_class])  # type: ignore[literal-required]
    return {
        **median,
        "hotcoco_s": hotcoco_s,
        "ratio": median["pycocotools_s"] / hotcoco_s,
        "largest_difference": float(np.abs(ours - reference).max()),
        "AP": metrics["AP"],
    }


def generate(num_images: int, detections_per_image: int, *, seed: int = 0) -> tuple[dict[str, Any], ScoredBoxes]:
    """Content of a ground-truth file, and detections of which some find something."""
    rng = np.random.default_rng(seed)
    num_boxes, num_found = round(BOXES_PER_IMAGE * num_images), detections_per_image * num_images
    image_ids = np.sort(rng.choice(600_000, num_images, replace=False))
    category_ids = np.sort(rng.choice(np.arange(1, 91), NUM_CLASSES, replace=False))

    def random_boxes(count: int) -> NDArray[np.float64]:
        sizes = np.exp(rng.normal(4, 1, (count, 2))).clip(4, 400)  # small, medium and large
        return np.concatenate([rng.random((count, 2)) * ([WIDTH, HEIGHT] - sizes), sizes], 1)

    images = np.sort(rng.integers(num_images, size=num_boxes))
    classes = rng.zipf(1.4, num_boxes) % NUM_CLASSES
    boxes = random_boxes(num_boxes).round(2)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = (1 + np.stack([np.cos(angles), np.sin(angles)], 1)) / 2
    outlines = (boxes[:, None, :2] + boxes[:, None, 2:] * circle).round(2).reshape(num_boxes, -1)
    columns = (image_ids[images], category_ids[classes], boxes, boxes[:, 2:].prod(1) * 0.785, outlines)
    content = {
        "images": [{"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"} for i in image_ids.tolist()],
        "categories": [{"id": i, "name": f"class {i}"} for i in category_ids.tolist()],
        "annotations": [
            {
                "id": i + 1,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": box,
                "area": area,
                "segmentation": [outline],
                "iscrowd": int(i % 100 == 0),
            }
            for i, (image_id, category_id, box, area, outline) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True)
            )
        ],
    }

    owners = np.repeat(np.arange(num_images), detections_per_image)
    counts = np.bincount(images, minlength=num_images)
    near = (rng.random(num_found) < 0.4) & (counts[owners] > 0)
    # One of the boxes of its image, which lie side by side; unused where the image has none.
    targets = (np.searchsorted(images, owners) + rng.random(num_found) * counts[owners]).astype(np.int64)
    targets = targets.clip(max=num_boxes - 1)
    noise = rng.normal(0, 0.12, (num_found, 4))
    jittered = boxes[targets] + noise * np.tile(boxes[targets, 2:], 2)
    scores = np.where(near, rng.beta(2, 2, num_found) * np.exp(-2 * np.abs(noise).sum(1)), rng.beta(0.6, 8, num_found))
    found = ScoredBoxes(
        boxes=np.where(near[:, None], jittered, random_boxes(num_found)).astype(np.float32),
        scores=(0.05 + 0.95 * scores).astype(np.float32),
        image_ids=image_ids[owners],
        category_ids=category_ids[
            np.where(near & (rng.random(num_found) < 0.85), classes[targets], rng.zipf(1.4, num_found) % NUM_CLASSES)
        ],
    )
    return content, found[np.lexsort((-found.scores, owners))]


def _pycocotools(annotations: Path, records: list[dict[str, Any]]) -> NDArray[np.float64]:
    """The twelve numbers, then AP, AP50 and AR100 of each class."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(records), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, 2]  # (T, R, K)
    recall = evaluation.eval["recall"][..., 0, 2]  # (T, K)
    per_class = [
        np.mean(values[values > -1]) if (values > -1).any() else -1
        for k in range(precision.shape[2])
        for values in (precision[..., k], precision[0, :, k], recall[:, k])
    ]
    return np.concatenate([evaluation.stats, per_class])


def _timed(seconds: dict[str, list[float]], name: str, call: Callable[..., Result], *args: Any) -> Result:
    start = time.perf_counter()
    result = call(*args)
    seconds.setdefault(name, []).append(time.perf_counter() - start)
    return result


if __name__ == "__main__":
    main()
