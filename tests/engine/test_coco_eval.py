import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_det.engine.coco_eval import METRIC_NAMES, format_table, read_results, score
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
    metrics = score(folder / "gt.json", read_results(folder / "detections.json"), backend=backend)
    for name in METRIC_NAMES:
        assert metrics[name] == pytest.approx(expected[name], abs=1e-9), name
    assert len(metrics["per_class"]) == 80
    defined = [numbers["AP"] for numbers in metrics["per_class"].values() if numbers["AP"] > -1]
    assert np.mean(defined) == pytest.approx(metrics["AP"], abs=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_backends_equal_summarize_on_random_data(tmp_path: Path, seed: int) -> None:
    gt, results = random_case(seed)
    path = write(tmp_path / "gt.json", gt)
    ours = score(path, results)
    assert 0 < ours["AP"] < 1
    assert (twelve(ours) == reference(gt, results)).all()
    theirs = score(path, results, backend="hotcoco")
    np.testing.assert_allclose(twelve(theirs), twelve(ours), rtol=0, atol=1e-9)
    assert list(theirs["per_class"]) == list(ours["per_class"])
    for name, numbers in ours["per_class"].items():
        assert theirs["per_class"][name] == pytest.approx(numbers, abs=1e-9)


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
    ours, theirs = (score(path, results, backend=b, max_detections=max_detections) for b in BACKENDS)
    np.testing.assert_allclose(twelve(theirs), twelve(ours), rtol=0, atol=1e-9)
    assert ours["AR100"] == (1.0 if max_detections == 300 else 0.0)
    assert (ours["AP"] > 0) == (max_detections == 300)
    assert ours["max_detections"] == max_detections


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_detections", [1, 5, 10, 40, 100, 300])
def test_detection_limit_on_random_data(tmp_path: Path, backend, max_detections: int) -> None:
    gt, results = random_case(99, num_per_image=600)
    path = write(tmp_path / "gt.json", gt)
    metrics = score(path, results, backend=backend, max_detections=max_detections)
    # Keep the best by hand: then COCO's own limit of 100, or of 300, no longer matters.
    best: dict[tuple[int, int], list[dict]] = {}
    for r in sorted(results, key=lambda r: -r["score"]):
        best.setdefault((r["image_id"], r["category_id"]), []).append(r)
    assert max(map(len, best.values())) > 100
    kept = [r for group in best.values() for r in group[:max_detections]]
    again = score(path, kept, max_detections=1000) | {"max_detections": max_detections}
    np.testing.assert_allclose(twelve(metrics), twelve(again), rtol=0, atol=1e-9)
    if max_detections >= 10:  # below, pycocotools sorts its limits and reports others
        # AP is not compared: summarize() looks for 100 whatever the limits.
        np.testing.assert_allclose(twelve(metrics)[1:], reference(gt, results, max_detections)[1:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_analytic_case(tmp_path: Path, backend) -> None:
    """Two cats, one found exactly and one at IoU 0.6 (3 of 10 thresholds: .50 .55 .60); no dog."""
    path = write(tmp_path / "gt.json", ground_truth([(0, 0, 20, 20), (50, 50, 40, 40)]))
    metrics = score(path, [result((0, 0, 20, 20), 0.9), result((50, 50, 40, 24), 0.8)], backend=backend)
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
    metrics = score(write(tmp_path / "gt.json", ground_truth()), [], backend=backend)
    assert (metrics["AP"], metrics["AR100"], metrics["APs"], metrics["APl"]) == (0, 0, 0, -1)
    assert set(metrics["per_class"]["cat"].values()) == {0.0}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("results", [[], [result()]])
def test_no_annotations(tmp_path: Path, backend, results) -> None:
    metrics = score(write(tmp_path / "gt.json", ground_truth(boxes=())), results, backend=backend)
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
    metrics = score(path, [result(a["bbox"]) for a in gt["annotations"]], backend=backend)
    assert (metrics["AP"], metrics["APs"], metrics["APm"], metrics["APl"]) == pytest.approx((1, 1, 1, -1))
    assert path.read_bytes() == before
    assert capfd.readouterr() == ("", "")


def test_classes_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    gt = ground_truth(categories=[{"id": 3, "name": "cat"}, {"id": 5, "name": "cat"}])
    metrics = score(write(tmp_path / "gt.json", gt), [result()])
    assert {name: numbers["AP"] for name, numbers in metrics["per_class"].items()} == {
        "cat (id 3)": pytest.approx(1.0),
        "cat (id 5)": -1.0,
    }


def test_inputs_are_not_modified(tmp_path: Path) -> None:
    results = [result()]
    score(write(tmp_path / "gt.json", ground_truth()), results)
    assert results == [result()]


def test_results_of_other_data_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "gt.json", ground_truth())
    strangers = [result(image_id=i) for i in (108, 103, 101, 102, 104, 105, 106, 107)]
    with pytest.raises(InputError, match=r"8 image_id not in .*gt\.json: 101, 102, 103, 104, 105, \.\.\.;"):
        score(path, [result(), *strangers])
    with pytest.raises(InputError, match=r"1 category_id not in .*gt\.json: 4;"):
        score(path, [result(category_id=4)], backend="hotcoco")


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
        ({"image_id": "7"}, r"record 1: image_id must be an integer, got '7'"),
        ({"category_id": 1.5}, r"record 1: category_id must be an integer, got 1.5"),
    ],
)
def test_malformed_results(tmp_path: Path, changes: dict, message: str) -> None:
    records = [result(), result(**changes)]
    with pytest.raises(InputError, match=r"results\.json: " + message):
        read_results(write(tmp_path / "results.json", records))
    with pytest.raises(InputError, match=message):
        score(write(tmp_path / "gt.json", ground_truth()), records)


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
    with pytest.raises(InputError, match="record 0 must be an object, got 3"):
        read_results(write(tmp_path / "r.json", [3]))
    for content in (b"", b"[{", b"\xff\xfe\x00\x80"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.json: is not valid JSON"):
            read_results(tmp_path / "bad.json")
    assert read_results(write(tmp_path / "r.json", [])) == []


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
        (ground_truth(images=[{"id": 7}, {"file_name": "x"}]), r"images\[1\] needs an integer 'id', got None"),
        (ground_truth(images=[{"id": 7}, {"id": 7}]), r"images\[1\] repeats the id 7"),
        (ground_truth(categories=[{"id": 3}]), r"categories\[0\] needs a string 'name'"),
        (annotation_with(bbox=None), r"annotations\[1\] \(id 2\): bbox must be .* got None"),
        (annotation_with(bbox=[0, 0, float("nan"), 1]), r"annotations\[1\] \(id 2\): bbox must be .* nan"),
        (annotation_with(area="9"), r"annotations\[1\] \(id 2\): area must be .* '9'"),
        (annotation_with(image_id=8), r"annotations\[1\] \(id 2\): image_id must be .* images, got 8"),
        (annotation_with(category_id=None), r"annotations\[1\] \(id 2\): category_id must be .* categories, got None"),
    ],
)
def test_malformed_ground_truth(tmp_path: Path, content, message: str) -> None:
    with pytest.raises(InputError, match=r"gt\.json: .*" + message):
        score(write(tmp_path / "gt.json", content), [])


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        score(tmp_path / "none.json", [])
    path = write(tmp_path / "gt.json", ground_truth())
    with pytest.raises(InputError, match="max_detections must be at least 1, got 0"):
        score(path, [], max_detections=0)
    with pytest.raises(InputError, match="backend must be 'pycocotools' or 'hotcoco', got 'coco'"):
        score(path, [], backend="coco")  # type: ignore[arg-type]


def test_table(tmp_path: Path) -> None:
    metrics = score(write(tmp_path / "gt.json", ground_truth()), [result()], max_detections=300)
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
