import contextlib
import copy
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_det.engine.coco_eval import (
    METRIC_NAMES,
    PROPOSAL_METRIC_NAMES,
    ScoredBoxes,
    format_proposal_table,
    format_table,
    read_ground_truth,
    read_results,
    score,
    score_proposals,
    write_results,
)
from fpn_det.structures import InputError

BACKENDS = ("pycocotools", "hotcoco")


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def ground_truth(boxes=((10, 10, 20, 20),), **changes) -> dict:
    """One 100x100 image (id 7) of class 'cat' (id 3), 'dog' (id 5) absent."""
    return {
        "images": [{"id": 7, "width": 100, "height": 100, "file_name": "7.jpg"}],
        "categories": [{"id": 5, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": i + 1, "image_id": 7, "category_id": 3, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
    } | changes


def result(box=(10, 10, 20, 20), value=0.9, **changes) -> dict:
    return {"image_id": 7, "category_id": 3, "bbox": list(box), "score": value} | changes


def arrays(records: list[dict]) -> ScoredBoxes:
    return ScoredBoxes(
        boxes=np.array([r["bbox"] for r in records], float).reshape(-1, 4),
        scores=np.array([r["score"] for r in records], float),
        image_ids=np.array([r["image_id"] for r in records], np.int64),
        category_ids=np.array([r["category_id"] for r in records], np.int64),
    )


def metrics_of(path: Path, records: list[dict], **options):
    """From the file of the ground truth, and results as COCO's files have them."""
    return score(read_ground_truth(path), arrays(records), **options)


def recalls_of(path: Path, proposals: ScoredBoxes, **options):
    return score_proposals(read_ground_truth(path), proposals, **options)


def random_case(seed: int, num_per_image: int = 40) -> tuple[dict, list[dict]]:
    """Crowds, mask areas unlike the box's, tied scores, empty images, a class that never occurs."""
    rng = np.random.default_rng(seed)
    images = [{"id": int(i), "width": 400, "height": 300} for i in rng.permutation(50)[:8]]
    categories = [{"id": int(i), "name": f"class {i}"} for i in rng.permutation(20)[:4]]
    annotations, results = [], []
    for image in images[:-1]:  # the last has no ground truth
        for _ in range(rng.integers(0, 12)):
            size = rng.choice([12, 50, 160]) * rng.uniform(0.5, 1.5, size=2)
            x, y, w, h = *rng.uniform(0, 200, size=2), *size
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": categories[rng.integers(3)]["id"],
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "area": float(w * h * rng.uniform(0.4, 1)),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
    for image in images[1:]:  # the first has no detections
        near = [a for a in annotations if a["image_id"] == image["id"]]
        for _ in range(rng.integers(0, num_per_image)):
            if near and rng.random() < 0.7:
                target = near[rng.integers(len(near))]
                box = np.array(target["bbox"]) * rng.normal(1, 0.08, size=4)
                category_id = target["category_id"]
            else:
                box = rng.uniform(1, 150, size=4)
                category_id = categories[rng.integers(4)]["id"]
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": category_id,
                    "bbox": box.round(2).tolist(),
                    "score": float(round(rng.random(), 1)),
                }
            )
    return {"images": images, "categories": categories, "annotations": annotations}, results


def reference(gt: dict, results: list[dict], max_detections: int = 100) -> np.ndarray:
    """pycocotools' own twelve numbers."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(gt) | {"info": {}}
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
        evaluator.params.maxDets = [1, 10, max_detections]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


def twelve(metrics) -> np.ndarray:
    return np.array([metrics[name] for name in METRIC_NAMES])


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_coco_numbers(test_data: Path, backend) -> None:
    folder = test_data / "coco_eval"
    expected = json.loads((folder / "expected.json").read_text())
    metrics = score(read_ground_truth(folder / "gt.json"), read_results(folder / "detections.json"), backend=backend)
    for name in METRIC_NAMES:
        assert metrics[name] == pytest.approx(expected[name], abs=1e-9), name
    assert len(metrics["per_class"]) == 80
    defined = [numbers["AP"] for numbers in metrics["per_class"].values() if numbers["AP"] > -1]
    assert np.mean(defined) == pytest.approx(metrics["AP"], abs=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_backends_equal_summarize_on_random_data(tmp_path: Path, seed: int) -> None:
    gt, results = random_case(seed)
    path = write(tmp_path / "gt.json", gt)
    ours, theirs = (metrics_of(path, results, backend=b) for b in BACKENDS)
    assert 0 < ours["AP"] < 1
    assert (twelve(ours) == reference(gt, results)).all()
    assert theirs == ours  # to the bit, and of every class, in the same order
    assert list(theirs["per_class"]) == list(ours["per_class"])


def odd_case(seed: int) -> tuple[dict, list[dict], int]:
    """Whatever files may hold, and a limit: few scores and few boxes, so that nearly everything ties or repeats."""
    rng = np.random.default_rng(seed)
    images = [{"id": int(i)} for i in rng.choice([-5, 0, 1, 2**53, 2**53 + 1, 2**63 - 1], rng.integers(1, 6), False)]
    categories = [{"id": int(i), "name": f"{i}"} for i in rng.choice([-3, 0, 2, 2**53, 2**53 + 1], 3, False)]
    places = rng.integers(0, 4, (12, 2)) * 8.0
    sizes = rng.choice([0.0, 8.0, 32.0, 40.0, 96.0, 130.5], (12, 2))
    boxes = np.concatenate([places, sizes], 1).tolist()
    negative = [[5.0, 5.0, -3.0, 7.0], [5.0, 5.0, -3.0, -7.0], [-20.0, -20.0, 30.0, 30.0]]
    scores = rng.random(3)

    def some(entries: list[dict]) -> int:
        return entries[rng.integers(len(entries))]["id"]

    annotations = []
    for _ in range(rng.integers(0, 40)):
        annotation = {"image_id": some(images), "category_id": some(categories[:2]), "bbox": boxes[rng.integers(12)]}
        if rng.random() < 0.5:
            annotation["area"] = float(rng.choice([0, 32**2, 96**2, 1e5, 1e11]))
        if rng.random() < 0.5:
            annotation |= {"iscrowd": int(rng.random() < 0.4), "id": int(rng.integers(3))}
        annotations.append(annotation)
    results = [
        {
            "image_id": some(images),
            "category_id": some(categories),
            "bbox": (boxes + negative)[rng.integers(15)],
            "score": float(rng.choice(scores)),
        }
        for _ in range(rng.integers(0, 400))
    ]
    limit = int(rng.choice([1, 2, 9, 10, 11, 100, 300]))
    return {"images": images, "categories": categories, "annotations": annotations}, results, limit


@pytest.mark.parametrize("seed", range(30))
def test_backends_are_identical_on_odd_data(tmp_path: Path, seed: int) -> None:
    gt, results, limit = odd_case(seed)
    path = write(tmp_path / "gt.json", gt)
    ours, theirs = (metrics_of(path, results, backend=b, max_detections=limit) for b in BACKENDS)
    assert theirs == ours
    assert recalls_of(path, arrays(results), backend="hotcoco") == recalls_of(
        path, arrays(results), backend="pycocotools"
    )


@pytest.mark.parametrize("max_detections", [1, 5, 10, 100, 300])
def test_detection_limit(tmp_path: Path, max_detections: int) -> None:
    """250 detections of one image and class: 25 boxes, each found by the last of ten attempts only."""
    boxes = [(x * 40, y * 40, 30, 30) for x in range(5) for y in range(5)]
    gt = ground_truth(boxes)
    results = [
        result(box if attempt == 9 else (900, 900, 5, 5), 0.9 - 0.01 * attempt)
        for attempt in range(10)
        for box in boxes
    ]
    path = write(tmp_path / "gt.json", gt)
    ours, theirs = (metrics_of(path, results, backend=b, max_detections=max_detections) for b in BACKENDS)
    np.testing.assert_allclose(twelve(theirs), twelve(ours), rtol=0, atol=1e-9)
    assert ours["AR100"] == (1.0 if max_detections == 300 else 0.0)
    assert (ours["AP"] > 0) == (max_detections == 300)
    assert ours["max_detections"] == max_detections


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_detections", [1, 5, 10, 40, 100, 300])
def test_detection_limit_on_random_data(tmp_path: Path, backend, max_detections: int) -> None:
    gt, results = random_case(99, num_per_image=600)
    path = write(tmp_path / "gt.json", gt)
    metrics = metrics_of(path, results, backend=backend, max_detections=max_detections)
    # Keep the best by hand: then COCO's own limit of 100, or of 300, no longer matters.
    best: dict[tuple[int, int], list[dict]] = {}
    for r in sorted(results, key=lambda r: -r["score"]):
        best.setdefault((r["image_id"], r["category_id"]), []).append(r)
    assert max(map(len, best.values())) > 100
    kept = [r for group in best.values() for r in group[:max_detections]]
    again = metrics_of(path, kept, max_detections=1000) | {"max_detections": max_detections}
    np.testing.assert_allclose(twelve(metrics), twelve(again), rtol=0, atol=1e-9)
    if max_detections >= 10:  # below, pycocotools sorts its limits and reports others
        # AP is not compared: summarize() looks for 100 whatever the limits.
        np.testing.assert_allclose(twelve(metrics)[1:], reference(gt, results, max_detections)[1:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_analytic_case(tmp_path: Path, backend) -> None:
    """Two cats, one found exactly and one at IoU 0.6 (3 of 10 thresholds: .50 .55 .60); no dog."""
    path = write(tmp_path / "gt.json", ground_truth([(0, 0, 20, 20), (50, 50, 40, 40)]))
    metrics = metrics_of(path, [result((0, 0, 20, 20), 0.9), result((50, 50, 40, 24), 0.8)], backend=backend)
    half = 51 / 101  # precision 1 up to recall 0.5
    assert metrics["AP"] == pytest.approx(0.3 + 0.7 * half)
    assert (metrics["AP50"], metrics["AP75"]) == pytest.approx((1.0, half))
    assert (metrics["APs"], metrics["APm"], metrics["APl"]) == pytest.approx((1.0, 0.3, -1.0))
    assert (metrics["AR1"], metrics["AR10"], metrics["AR100"]) == pytest.approx((0.5, 0.65, 0.65))
    assert list(metrics["per_class"]) == ["cat", "dog"]  # by category id
    assert metrics["per_class"]["cat"] == pytest.approx({"AP": metrics["AP"], "AP50": 1.0, "AR100": 0.65})
    assert set(metrics["per_class"]["dog"].values()) == {-1.0}
    assert json.loads(json.dumps(metrics)) == metrics


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_results(tmp_path: Path, backend) -> None:
    metrics = metrics_of(write(tmp_path / "gt.json", ground_truth()), [], backend=backend)
    assert (metrics["AP"], metrics["AR100"], metrics["APs"], metrics["APl"]) == (0, 0, 0, -1)
    assert set(metrics["per_class"]["cat"].values()) == {0.0}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("results", [[], [result()]])
def test_no_annotations(tmp_path: Path, backend, results) -> None:
    metrics = metrics_of(write(tmp_path / "gt.json", ground_truth(boxes=())), results, backend=backend)
    assert (twelve(metrics) == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_incomplete_ground_truth_is_filled(tmp_path: Path, backend, capfd) -> None:
    """No info, area, iscrowd; ids that are 0 or repeated; a file that stays as it was."""
    gt = ground_truth([(0, 0, 20, 20), (50, 50, 40, 40), (0, 60, 20, 20)])
    gt["images"] = [{"id": 7}]
    for annotation in gt["annotations"]:
        del annotation["area"], annotation["iscrowd"]
        annotation["id"] = 0
    gt["annotations"][1]["area"] = None
    del gt["annotations"][2]["id"]
    path = write(tmp_path / "gt.json", gt)
    before = path.read_bytes()
    metrics = metrics_of(path, [result(a["bbox"]) for a in gt["annotations"]], backend=backend)
    assert (metrics["AP"], metrics["APs"], metrics["APm"], metrics["APl"]) == pytest.approx((1, 1, 1, -1))
    assert path.read_bytes() == before
    assert capfd.readouterr() == ("", "")


def test_classes_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    gt = ground_truth(categories=[{"id": 3, "name": "cat"}, {"id": 5, "name": "cat"}])
    metrics = metrics_of(write(tmp_path / "gt.json", gt), [result()])
    assert {name: numbers["AP"] for name, numbers in metrics["per_class"].items()} == {
        "cat (id 3)": pytest.approx(1.0),
        "cat (id 5)": -1.0,
    }


def test_results_of_other_data_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "gt.json", ground_truth())
    strangers = [result(image_id=i) for i in (108, 103, 101, 102, 104, 105, 106, 107)]
    with pytest.raises(InputError, match=r"8 image_id not in .*gt\.json: 101, 102, 103, 104, 105, \.\.\.;"):
        metrics_of(path, [result(), *strangers])
    with pytest.raises(InputError, match=r"1 category_id not in .*gt\.json: 4;"):
        metrics_of(path, [result(category_id=4)], backend="hotcoco")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": float("nan")}, r"record 1: score must be a finite number, got nan"),
        ({"score": "0.5"}, r"record 1: score .* got '0.5'"),
        ({"score": True}, r"record 1: score .* got True"),
        ({"bbox": [0, 0, float("inf"), 1]}, r"record 1: bbox must be 4 finite numbers .* inf"),
        ({"bbox": [0, 0, 10**400, 1]}, r"record 1: bbox"),
        ({"bbox": [0, 0, 1]}, r"record 1: bbox"),
        ({"bbox": None}, r"record 1: bbox .* got None"),
        ({"bbox": "1234"}, r"record 1: bbox .* got '1234'"),
        ({"bbox": {"1": 1, "2": 1, "3": 1, "4": 1}}, r"record 1: bbox .* got \{"),
        ({"bbox": [0, 0, True, 1]}, r"record 1: bbox .* True"),
        ({"image_id": True}, r"record 1: image_id must be an integer of 64 bits, got True"),
        ({"image_id": 2**63}, r"record 1: image_id must be an integer of 64 bits, got 9223372036854775808"),
        ({"image_id": "7"}, r"record 1: image_id must be an integer of 64 bits, got '7'"),
        ({"category_id": 1.5}, r"record 1: category_id must be an integer of 64 bits, got 1.5"),
    ],
)
def test_malformed_results(tmp_path: Path, changes: dict, message: str) -> None:
    records = [result(), result(**changes)]
    with pytest.raises(InputError, match=r"results\.json: " + message):
        read_results(write(tmp_path / "results.json", records))


def test_boxes_whose_lengths_make_up_for_each_other(tmp_path: Path) -> None:
    records = [result(), result(bbox=[0, 0, 1, 1, 1]), result(bbox=[0, 0, 1])]
    with pytest.raises(InputError, match=r"record 1: bbox must be 4 finite numbers .* got \[0, 0, 1, 1, 1\]"):
        read_results(write(tmp_path / "results.json", records))


@pytest.mark.parametrize("key", ["image_id", "category_id", "bbox", "score"])
def test_results_with_missing_fields(tmp_path: Path, key: str) -> None:
    record = result()
    del record[key]
    with pytest.raises(InputError, match=rf"record 2 lacks '{key}'"):
        read_results(write(tmp_path / "results.json", [result(), result(), record]))


def test_unreadable_results(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: cannot be read \(No such file"):
        read_results(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"list of records, got \{'annotations'"):
        read_results(write(tmp_path / "r.json", {"annotations": []}))
    for record in (3, "bbox", ["bbox"], None):
        with pytest.raises(InputError, match="record 1 must be an object, got "):
            read_results(write(tmp_path / "r.json", [result(), record]))
    broken = {b"": "the file is empty", b"[{": "is cut off", b"\xff\xfe\x00\x80": "is not valid JSON"}
    for content, said in broken.items():
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(InputError, match=rf"bad\.json: {said}"):
            read_results(tmp_path / "bad.json")
    nothing = read_results(write(tmp_path / "r.json", []))
    assert (nothing.boxes.shape, nothing.scores.shape, nothing.records()) == ((0, 4), (0,), [])


def test_results_nested_without_end(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("[" * 200_000)
    with pytest.raises(InputError, match=re.escape(f"{path}: is not valid JSON")):
        read_results(path)


def test_results_are_written_as_json_writes_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for boxes, scores in ((rng.normal(0, 100, (50, 4)), rng.random(50)), (np.array([[0, -0.0, 1e-7, 1e22]]), [1.0])):
        found = ScoredBoxes(
            boxes=boxes.astype(np.float32),
            scores=np.array(scores, np.float32),
            image_ids=rng.integers(-(2**63), 2**63, len(boxes)),
            category_ids=rng.integers(0, 90, len(boxes)),
        )
        write_results(tmp_path / "results.json", found)
        assert (tmp_path / "results.json").read_text() == json.dumps(found.records())
        assert list(found.records()[0]) == ["image_id", "category_id", "bbox", "score"]
        back = read_results(tmp_path / "results.json")
        for name in ("boxes", "scores", "image_ids", "category_ids"):
            assert getattr(back, name).tolist() == getattr(found, name).tolist()
    write_results(tmp_path / "results.json", found[np.zeros(0, np.int64)])
    assert (tmp_path / "results.json").read_text() == "[]"


def test_rows_and_parts() -> None:
    first, second = arrays([result(value=0.1), result(value=0.2)]), arrays([result(value=0.3, image_id=8)])
    both = ScoredBoxes.join([first, second])
    assert both.records() == [*first.records(), *second.records()]
    assert both[np.array([2, 0])].records() == [result(value=0.3, image_id=8), result(value=0.1)]
    assert both[both.image_ids == 8].records() == second.records()


def annotation_with(**changes) -> dict:
    gt = ground_truth([(10, 10, 20, 20), (50, 50, 40, 40)])
    gt["annotations"][1] |= changes
    return gt


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"must be a JSON object, got \[\]"),
        ({}, r"'images' is missing"),
        ({"images": [{"id": 7}], "categories": [{"id": 3, "name": "cat"}]}, r"'annotations' is missing"),
        (ground_truth(annotations={"a": 1}), r"'annotations' holds {'a': 1}"),
        (ground_truth(annotations=[1]), r"'annotations' holds \[1\]"),
        (ground_truth(images=[]), r"'images' is empty"),
        (ground_truth(categories=[]), r"'categories' is empty"),
        (
            ground_truth(images=[{"id": 7}, {"file_name": "x"}]),
            r"images\[1\] needs an integer 'id' of 64 bits, got None",
        ),
        (ground_truth(images=[{"id": 7}, {"id": 7}]), r"images\[1\] repeats the id 7"),
        (ground_truth(categories=[{"id": 3}]), r"categories\[0\] needs a string 'name'"),
        (annotation_with(bbox=None), r"annotations\[1\] \(id 2\): bbox must be .* got None"),
        (annotation_with(bbox=[0, 0, float("nan"), 1]), r"annotations\[1\] \(id 2\): bbox must be .* nan"),
        (annotation_with(area="9"), r"annotations\[1\] \(id 2\): area must be .* '9'"),
        (annotation_with(iscrowd="0"), r"annotations\[1\] \(id 2\): iscrowd must be 0 or 1, got '0'"),
        (annotation_with(image_id=8), r"annotations\[1\] \(id 2\): image_id must be .* images, got 8"),
        (annotation_with(category_id=None), r"annotations\[1\] \(id 2\): category_id must be .* categories, got None"),
    ],
)
def test_malformed_ground_truth(tmp_path: Path, content, message: str) -> None:
    with pytest.raises(InputError, match=r"gt\.json: .*" + message):
        metrics_of(write(tmp_path / "gt.json", content), [])


def test_bad_areas_are_counted(tmp_path: Path) -> None:
    content = annotation_with(area="9")
    content["annotations"][0]["area"] = float("inf")
    with pytest.raises(
        InputError, match=r"annotations\[0\] \(id 1\): area .* got inf \(one of 2 such annotations\)\. .* leave it out"
    ):
        metrics_of(write(tmp_path / "gt.json", content), [])


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        metrics_of(tmp_path / "none.json", [])
    path = write(tmp_path / "gt.json", ground_truth())
    with pytest.raises(InputError, match="max_detections must be at least 1, got 0"):
        metrics_of(path, [], max_detections=0)
    with pytest.raises(InputError, match="backend must be 'pycocotools' or 'hotcoco', got 'coco'"):
        metrics_of(path, [], backend="coco")  # type: ignore[arg-type]


def test_table(tmp_path: Path) -> None:
    metrics = metrics_of(write(tmp_path / "gt.json", ground_truth()), [result()], max_detections=300)
    lines = format_table(metrics).splitlines()
    assert lines[0] == "box metrics in percent, 300 detections per image and class"
    assert lines[1].split() == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert lines[2].split() == ["100.0", "100.0", "100.0", "100.0", "-", "-"]
    assert lines[3].split() == ["AR1", "AR10", "AR300", "ARs", "ARm", "ARl"]
    assert lines[6].split() == ["class", "AP", "AP50", "AR"]
    assert lines[7].split() == ["cat", "100.0", "100.0", "100.0"]
    assert lines[8].split() == ["dog", "-", "-", "-"]
    assert len({len(line) for line in lines[6:]}) == 1
    assert len(lines) == 9


@pytest.mark.parametrize(("num_classes", "num_columns"), [(1, 1), (40, 1), (41, 3), (80, 3), (1203, 3)])
def test_table_of_many_classes(num_classes: int, num_columns: int) -> None:
    names = [f"class {i:04d}" for i in range(num_classes)]
    numbers = {"AP": 0.5, "AP50": 1.0, "AR100": -1.0}
    metrics = dict.fromkeys(METRIC_NAMES, 0.25) | {"max_detections": 100, "per_class": dict.fromkeys(names, numbers)}
    lines = format_table(metrics).splitlines()  # type: ignore[arg-type]
    assert lines[6].count("class") == num_columns
    assert max(map(len, lines)) <= 110
    assert len(lines) == 7 + -(-num_classes // num_columns)
    columns = [[line.split("|")[i] for line in lines[7:] if line.count("|") >= i] for i in range(num_columns)]
    assert [" ".join(row.split()[:2]) for column in columns for row in column] == names  # down, then right


def test_table_of_any_names() -> None:
    names = ["cat", "\x1b[2J\r\n\u202e\ud800\0", "赤血球", "e\u0301te\u0301", "赤" * 20, "x" * 10**6, "a|b <b>*c*"]
    numbers = {"AP": 0.5, "AP50": 1.0, "AR100": -1.0}
    metrics = dict.fromkeys(METRIC_NAMES, 0.25) | {"max_detections": 100, "per_class": dict.fromkeys(names, numbers)}
    lines = format_table(metrics).split("\n")[7:]  # type: ignore[arg-type]
    shown = ["cat", r"\x1b[2J\r\n\u202e\ud800\x00", "赤血球", "e\u0301te\u0301", "赤" * 15 + "…", "x" * 31 + "…"]
    num_columns = [3, 27, 6, 3, 31, 32, 10]
    for line, name, width in zip(lines, [*shown, "a|b <b>*c*"], num_columns, strict=True):
        assert line == name + " " * (32 - width) + "  50.0 100.0     -"


# Proposals


def proposals_of(*rows: tuple[int, tuple[float, ...], float]) -> ScoredBoxes:
    """From (image id, XYXY box, score)."""
    boxes = np.array([box for _, box, _ in rows], np.float32).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    return ScoredBoxes(
        boxes=boxes,
        scores=np.array([value for _, _, value in rows], np.float32),
        image_ids=np.array([image_id for image_id, _, _ in rows], np.int64),
        category_ids=np.zeros(len(rows), np.int64),
    )


def random_proposals(gt: dict, seed: int, num_per_image: int) -> ScoredBoxes:
    """Boxes near ground truth and elsewhere, tied scores, an image without any; the images interleaved."""
    rng = np.random.default_rng(seed)
    rows = []
    for image in gt["images"][1:]:
        near = [a["bbox"] for a in gt["annotations"] if a["image_id"] == image["id"]]
        for _ in range(num_per_image):
            x, y, w, h = rng.uniform(1, 150, size=4)
            if near and rng.random() < 0.3:
                x, y, w, h = np.array(near[rng.integers(len(near))]) * rng.normal(1, 0.1, size=4)
            rows.append((image["id"], (x, y, x + w, y + h), round(rng.random(), 2)))
    rng.shuffle(rows)
    return proposals_of(*rows)


def reference_recalls(gt: dict, proposals: ScoredBoxes) -> np.ndarray:
    """pycocotools with `useCats` off."""
    results = [r | {"category_id": gt["categories"][0]["id"]} for r in proposals.records()]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(gt) | {"info": {}}
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluator.params.useCats = 0
        evaluator.params.maxDets = [1, 100, 1000]
        evaluator.evaluate()
        evaluator.accumulate()
    recall = evaluator.eval["recall"]
    assert recall.shape == (10, 1, 4, 3)
    means = recall[:, 0].mean(0)  # area x limit
    return np.array([means[0, 1], *means[:, 2], *means[1:, 1]])


def recalls(metrics) -> np.ndarray:
    return np.array([metrics[name] for name in PROPOSAL_METRIC_NAMES])


@pytest.mark.parametrize(("seed", "num_per_image"), [(s, 250) for s in range(6)] + [(6, 1300)])
def test_proposal_recall_equals_coco_without_classes(tmp_path: Path, seed: int, num_per_image: int) -> None:
    gt, _ = random_case(seed)
    # The same box twice, of two classes and two sizes: it matters which is matched first.
    for annotation in [a for a in gt["annotations"] if a["category_id"] == gt["categories"][0]["id"]]:
        again = {"id": len(gt["annotations"]) + 1, "category_id": gt["categories"][1]["id"], "area": 500.0}
        gt["annotations"].append(annotation | again)
    proposals = random_proposals(gt, seed, num_per_image)
    path = write(tmp_path / "gt.json", gt)
    expected = reference_recalls(gt, proposals)
    assert 0 < expected[0] < expected[1] < 1
    for backend in BACKENDS:
        metrics = recalls_of(path, proposals, backend=backend)
        np.testing.assert_allclose(recalls(metrics), expected, rtol=0, atol=1e-9, err_msg=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("left", "right", "expected"), [(3, 5, 1.0), (5, 3, 0.5)])
def test_proposals_that_tie_between_objects(tmp_path: Path, backend, left, right, expected) -> None:
    """The first proposal covers half of itself with each object and takes the one of the last category."""
    gt = ground_truth([(0, 0, 10, 10), (10, 0, 10, 10)])
    for annotation, category_id in zip(gt["annotations"], (left, right), strict=True):
        annotation["category_id"] = category_id
    proposals = proposals_of((7, (0, 0, 20, 10), 0.9), (7, (0, 0, 10, 10), 0.8))
    metrics = recalls_of(write(tmp_path / "gt.json", gt), proposals, backend=backend)
    assert metrics["AR100"] == pytest.approx(0.1 * expected + 0.9 * 0.5)  # the tie is above the first threshold only
    np.testing.assert_allclose(recalls(metrics)[:3], reference_recalls(gt, proposals)[:3], rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_proposal_recall_on_real_data(test_data: Path, backend) -> None:
    gt = json.loads((test_data / "coco_eval/gt.json").read_text())
    proposals = read_results(test_data / "coco_eval/detections.json")  # their classes do not matter
    metrics = recalls_of(test_data / "coco_eval/gt.json", proposals, backend=backend)
    np.testing.assert_allclose(recalls(metrics), reference_recalls(gt, proposals), rtol=0, atol=1e-9)
    assert 0.3 < metrics["AR100"] <= metrics["AR1000"] < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_proposal_recall_by_hand(tmp_path: Path, backend) -> None:
    """A small cat is found at IoU 0.62 (3 of 10 thresholds: .50 .55 .60), a medium dog is not."""
    gt = ground_truth([(0, 0, 20, 20), (50, 50, 40, 40)])
    gt["annotations"][1]["category_id"] = 5
    path = write(tmp_path / "gt.json", gt)
    found = (7, (0.0, 0.0, 20.0, 12.4), 0.5)
    metrics = recalls_of(path, proposals_of(found), backend=backend)
    assert (metrics["AR100"], metrics["AR1000"]) == pytest.approx((0.15, 0.15))
    assert (metrics["ARs"], metrics["ARm"], metrics["ARl"]) == pytest.approx((0.3, 0.0, -1.0))
    assert (metrics["ARs100"], metrics["ARm100"], metrics["ARl100"]) == pytest.approx((0.3, 0.0, -1.0))
    # One box for two objects in the same place counts for one of them; a crowd is not to be found.
    gt["annotations"] = [gt["annotations"][0] | {"id": i, "iscrowd": int(i == 3)} for i in (1, 2, 3)]
    whole = (7, (0.0, 0.0, 20.0, 20.0), 0.9)
    metrics = recalls_of(write(path, gt), proposals_of(whole), backend=backend)
    assert (metrics["AR100"], metrics["ARs"]) == pytest.approx((0.5, 0.5))
    metrics = recalls_of(path, proposals_of(whole, found), backend=backend)
    assert metrics["AR100"] == pytest.approx(0.65)
    assert json.loads(json.dumps(metrics)) == metrics


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("place", "expected"), [(99, (1, 1)), (100, (0, 1)), (999, (0, 1)), (1000, (0, 0))])
@pytest.mark.parametrize("tied", [True, False])
def test_proposal_limits(tmp_path: Path, backend, place: int, expected: tuple, tied) -> None:
    """The object is found by the proposal at one place of 1001; with equal scores, the order of the rows decides."""
    path = write(tmp_path / "gt.json", ground_truth([(10, 10, 20, 20)]))
    rows = [
        (7, (10.0, 10.0, 30.0, 30.0) if i == place else (60.0, 60.0, 65.0, 65.0), 0.5 if tied else 1 - i / 2000)
        for i in range(1001)
    ]
    metrics = recalls_of(path, proposals_of(*(rows if tied else rows[::-1])), backend=backend)
    assert (metrics["AR100"], metrics["AR1000"]) == pytest.approx(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_proposals_of_images_with_huge_ids(tmp_path: Path, backend) -> None:
    """float64 cannot tell these apart."""
    ids = [0, 2**53, 2**53 + 1]
    gt = ground_truth(boxes=[(10, 10, 20, 20)] * 3, images=[{"id": i} for i in reversed(ids)])
    for annotation, image_id in zip(gt["annotations"], ids, strict=True):
        annotation["image_id"] = image_id
    proposals = proposals_of((2**53 + 1, (10, 10, 30, 30), 0.9), (2**53 + 1, (10, 10, 30, 30), 0.8))
    metrics = recalls_of(write(tmp_path / "gt.json", gt), proposals, backend=backend)
    assert metrics["AR100"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_proposals_and_nothing_to_propose(tmp_path: Path, backend) -> None:
    path = write(tmp_path / "gt.json", ground_truth())
    metrics = recalls_of(path, proposals_of(), backend=backend)
    assert (metrics["AR100"], metrics["AR1000"], metrics["ARs"], metrics["ARl"]) == (0, 0, 0, -1)
    write(path, ground_truth(boxes=()))
    for proposals in (proposals_of(), proposals_of((7, (0, 0, 1, 1), 0.5))):
        assert (recalls(recalls_of(path, proposals, backend=backend)) == -1).all()


def test_malformed_proposals(tmp_path: Path) -> None:
    path = write(tmp_path / "gt.json", ground_truth())
    good = proposals_of((7, (0, 0, 1, 1), 0.5), (7, (0, 0, 1, 1), 0.5))
    for strangers in ((6,), (8, 9)):
        bad = proposals_of(*((i, (0.0, 0.0, 1.0, 1.0), 0.5) for i in (7, *strangers)))
        shown = ", ".join(map(str, strangers))
        with pytest.raises(InputError, match=rf"{len(strangers)} image_id not in .*gt\.json: {shown};"):
            recalls_of(path, bad)
    for row, values in (((0, 0, np.nan, 1), 0.5), ((0, 0, 1, 1), np.inf)):
        bad = proposals_of((7, (0, 0, 1, 1), 0.5), (7, row, values))
        with pytest.raises(InputError, match=r"must be finite, got .* in row 1 of image 7"):
            recalls_of(path, bad)
    for changes in ({"scores": good.scores[:1]}, {"boxes": good.boxes[:, :3]}, {"image_ids": good.image_ids[:1]}):
        with pytest.raises(InputError, match=r"proposals: .* one row per box, got shapes \("):
            recalls_of(path, replace(good, **changes))
    with pytest.raises(InputError, match="backend must be 'pycocotools' or 'hotcoco', got 'coco'"):
        recalls_of(path, good, backend="coco")  # type: ignore[arg-type]


def test_table_of_proposals(tmp_path: Path, capfd) -> None:
    path = write(tmp_path / "gt.json", ground_truth([(0, 0, 20, 20), (50, 50, 40, 40)]))
    metrics = recalls_of(path, proposals_of((7, (0, 0, 20, 20), 0.5)))
    assert [line.split() for line in format_proposal_table(metrics).splitlines()[1:]] == [
        ["proposals", "AR", "ARs", "ARm", "ARl"],
        ["100", "50.0", "100.0", "0.0", "-"],
        ["1000", "50.0", "100.0", "0.0", "-"],
    ]
    assert capfd.readouterr() == ("", "")
