"""eval.py --report and compare.py, end to end."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from pages import opened

from fpn_det.report.evaluation import CHARTS


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def run(tool, tiny, tmp_path_factory) -> Path:
    """Folder of a run of 8 steps."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    outcome = tool("train", *tiny, "model.roi_head.score_thresh=0.01", "--output-dir", folder)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="module")
def better(run, shapes) -> Path:
    """Folder of a run whose detections are the ground truth, a little moved."""
    folder = run.with_name("other")
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*.pth", ".lock"))
    truth = json.loads((shapes / "annotations/val.json").read_text())
    results = [
        {k: a[k] for k in ("image_id", "category_id")}
        | {"bbox": [v + 0.7 for v in a["bbox"]], "score": 0.5 + 0.4 * (i % 2)}
        for i, a in enumerate(truth["annotations"])
    ]
    (folder / "predictions.json").write_text(json.dumps(results))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 7"))
    return folder


def test_report_of_a_checkpoint(tool, run: Path, browser, tmp_path: Path) -> None:
    outcome = tool("eval", "--checkpoint", run / "final.pth", "--report", "--output-dir", tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.endswith(f"written: {tmp_path / 'report/report.html'}\n")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"report.html", "report.json"} | {f"{chart}.png" for chart in CHARTS}
    numbers = json.loads((tmp_path / "report/report.json").read_text())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics.pop("step") == 8
    assert (
        numbers["metrics"]
        == metrics
        == {k: v for k, v in json.loads((run / "metrics.json").read_text()).items() if k != "step"}
    )
    assert numbers["about"]["checkpoint"] == str(run / "final.pth")
    assert numbers["num_detections"] == len(json.loads((tmp_path / "predictions.json").read_text()))
    recall = tool("eval", "--checkpoint", run / "final.pth", "--proposals", "--output-dir", tmp_path)
    assert recall.code == 0
    measured = json.loads((tmp_path / "proposal_metrics.json").read_text())
    assert numbers["proposals"] == {k: v for k, v in measured.items() if k != "step"}
    with opened(browser, tmp_path / "report/report.html") as tab:
        assert "Proposals" in tab.locator("h2").all_inner_texts()
        shown = tab.locator(".card", has=tab.get_by_text("AP50", exact=True)).locator("dd").inner_text()
        assert shown.startswith(f"{100 * metrics['AP50']:.1f}")


def test_report_of_a_file(tool, better: Path, browser) -> None:
    config, results = better / "config.yaml", better / "predictions.json"
    outcome = tool("eval", "--predictions", results, "--config", config, "--report")
    assert (outcome.code, outcome.err) == (0, "")
    page = better / "report/report.html"
    numbers = json.loads(page.with_name("report.json").read_text())
    assert numbers["metrics"]["AP50"] == pytest.approx(1.0)
    assert numbers["proposals"] is None
    with opened(browser, page) as tab:
        assert "Proposals" not in tab.locator("h2").all_inner_texts()
    for value in ("nowhere", better):  # no folder; a folder without images
        outcome = tool("eval", "--predictions", results, "--config", config, "--report", f"data.val.images={value}")
        assert outcome.code == 0, outcome.err
        with opened(browser, page) as tab:
            assert tab.locator(".grid img").count() == 0


def test_reports_that_cannot_be(tool, tiny, run: Path, better: Path, monkeypatch) -> None:
    outcome = tool("eval", "--checkpoint", run / "final.pth", "--report", "--proposals")
    assert (outcome.code, "leave --proposals out" in outcome.err) == (2, True)
    outcome = tool("eval", "--predictions", better / "predictions.json", "--report")
    assert (outcome.code, "--predictions needs --config" in outcome.err) == (2, True)
    outcome = tool("eval", *tiny, "--checkpoint", run / "final.pth", "--report", "model.kind=rpn")
    assert (outcome.code, "model.kind rpn only proposes" in outcome.err) == (2, True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = tool("eval", "--checkpoint", run / "final.pth", "--report")
    assert (outcome.code, outcome.out, "pip install -e '.[report]'" in outcome.err) == (2, "", True)


def test_comparison_of_two_runs(tool, run: Path, better: Path, shapes: Path, browser, tmp_path: Path) -> None:
    outcome = tool("compare", run, better, "--resamples", 30, "--output-dir", tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert "seed: 0 | 7" in outcome.out
    assert outcome.out.endswith(f"written: {tmp_path / 'comparison.html'}\n")
    assert len(list(tmp_path.glob("curve_*.png"))) == 2  # loss and AP, as log.jsonl of a run calls them
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    ap = numbers["metrics"][0]
    assert ap["a"] == json.loads((run / "metrics.json").read_text())["AP"]
    assert ap["b"] > 0.5
    assert ap["clear"]
    assert ap["low"] <= ap["delta"] <= ap["high"]
    with opened(browser, tmp_path / "comparison.html") as tab:
        assert tab.locator("h2").all_inner_texts() == [
            *("Overview", "Classes", "What costs AP", "Training", "Configs", "Images that differ most", "Settings")
        ]
        assert tab.locator("tr.marked td").first.inner_text() == "AP"
        pictures = tab.locator(".grid img")
        assert pictures.count() == len(numbers["images"])
        ratio = pictures.first.evaluate("image => image.decode().then(() => image.naturalWidth / image.naturalHeight)")
        first = numbers["images"][0]["image_id"]
        size = next(i for i in json.loads((shapes / "annotations/val.json").read_text())["images"] if i["id"] == first)
        assert ratio == pytest.approx(3 * size["width"] / size["height"], rel=0.15)  # three pictures side by side
    with opened(browser, tmp_path / "comparison.html", width=390) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_comparison_of_two_files(tool, run: Path, better: Path, shapes: Path, tmp_path: Path) -> None:
    files = (run / "predictions.json", better / "predictions.json")
    truth = ("--annotations", shapes / "annotations/val.json", "--resamples", 0, "--output-dir", tmp_path)
    outcome = tool("compare", *files, *truth)
    assert (outcome.code, outcome.err) == (0, "")
    assert "interval" not in outcome.out
    assert not (tmp_path / "differences.png").exists()
    page = (tmp_path / "comparison.html").read_text()
    assert "nothing was resampled" in page
    assert "give their folder with --images" in page
    outcome = tool("compare", *files, *truth, "--images", shapes / "val")
    assert outcome.code == 0
    assert "give their folder with --images" not in (tmp_path / "comparison.html").read_text()
    outcome = tool("compare", *files)
    assert (outcome.code, "give it with --annotations" in outcome.err) == (2, True)


def test_the_page_lies_beside_b_by_default(tool, run: Path, better: Path) -> None:
    a = run.with_name("lr0.02")
    shutil.copytree(run, a, ignore=shutil.ignore_patterns("*.pth", ".lock"))
    outcome = tool("compare", a, better, "--resamples", 0)
    assert outcome.out.endswith(f"written: {better / 'compare_lr0.02/comparison.html'}\n")


def test_runs_that_cannot_be_compared(tool, run: Path, better: Path, shapes: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(better, other)
    config = (other / "config.yaml").read_text()
    copied = tmp_path / "val.json"
    shutil.copy(shapes / "annotations/val.json", copied)
    elsewhere = config.replace(str(shapes / "annotations/val.json"), str(copied))
    assert elsewhere != config
    (other / "config.yaml").write_text(elsewhere)
    arguments = (run, other, "--resamples", 0, "--output-dir", tmp_path / "out")
    assert tool("compare", *arguments).code == 0  # another file of the same content
    copied.write_text(copied.read_text() + " ")
    outcome = tool("compare", *arguments)
    assert (outcome.code, "evaluated on different data" in outcome.err) == (2, True)
    (other / "config.yaml").write_text(config.replace("detections_per_image: 100", "detections_per_image: 7"))
    outcome = tool("compare", *arguments)
    assert (outcome.code, "is 7 and 100" in outcome.err) == (2, True)
    (other / "predictions.json").unlink()
    outcome = tool("compare", *arguments)
    assert (outcome.code, "there is no predictions.json" in outcome.err) == (2, True)
    assert tool("compare", run, tmp_path / "nothing").code == 2
    assert tool("compare", run, better, "--resamples", -1).code == 2
