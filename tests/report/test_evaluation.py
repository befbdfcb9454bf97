"""The page of an evaluation in a browser: complete, inert, usable with many classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BOX, found, random_set, truth_of
from pages import EVIL, opened
from torch import Tensor

from fpn_det.engine.coco_eval import GroundTruth, ScoredBoxes, score
from fpn_det.report.analysis import analyse
from fpn_det.report.evaluation import CHARTS, write_report
from fpn_det.structures import InputError

SECTIONS = [
    *("Overview", "What costs AP", "Classes", "Precision and recall", "Confusions", "Calibration", "Size and shape"),
    *("Worst images", "Likely label errors", "Settings"),
]


def report_of(
    folder: Path, truth: GroundTruth, results: ScoredBoxes, *, with_images: bool = True, name: str = "mine"
) -> Path:
    def read_image(image_id: int) -> Tensor:
        if image_id == 11:
            raise InputError("11.png: <broken>")
        return torch.full((3, 90, 160), image_id % 256, dtype=torch.uint8)

    return write_report(
        folder,
        analyse(truth, results, score(truth, results)),
        truth,
        results,
        read_image=read_image if with_images else "they are not here",
        image_names={10: f"{name}.png"},
        about={"run": name, "annotations": str(truth.source)},
        config=f"name: {name}",
    )


def many_classes(num_images: int, *, num_classes: int = 80) -> tuple[GroundTruth, ScoredBoxes]:
    """A generated set of the shape of COCO's: 7 boxes and 36 detections per image."""
    rng = np.random.default_rng(0)
    count = 7 * num_images
    size = np.exp(rng.normal(4, 0.9, (count, 2))).clip(4, 400)
    boxes = np.concatenate([rng.uniform(0, 300, (count, 2)), size], axis=1)
    images, classes = np.sort(rng.integers(0, num_images, count)), rng.integers(0, num_classes, count)
    truth = GroundTruth(
        source=Path("gt.json"),
        image_ids=np.arange(num_images),
        category_ids=np.arange(num_classes),
        names=tuple(f"class {k}" for k in range(num_classes)),
        boxes=boxes,
        areas=boxes[:, 2] * boxes[:, 3],
        crowd=rng.random(count) < 0.01,
        images=images,
        classes=classes,
    )
    near = rng.integers(0, count, 36 * num_images)
    moved = boxes[near] * rng.normal(1, 0.08, (len(near), 4))
    return truth, ScoredBoxes(
        boxes=moved,
        scores=rng.beta(1, 3, len(near)),
        image_ids=images[near],
        category_ids=np.where(rng.random(len(near)) < 0.15, rng.integers(0, num_classes, len(near)), classes[near]),
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return report_of(tmp_path_factory.mktemp("large"), *many_classes(300), with_images=False)


def test_eighty_classes_stay_usable(browser, large: Path) -> None:
    assert large.stat().st_size < 3_000_000
    numbers = json.loads((large.parent / "report.json").read_text())
    with opened(browser, large) as tab:
        assert tab.locator("h2").all_inner_texts() == SECTIONS
        assert tab.locator("*").count() < 20_000
        table = tab.locator("section", has=tab.get_by_role("heading", name="Classes", exact=True))
        table.get_by_role("button", name="AP", exact=True).click()
        best = max(numbers["classes"], key=lambda c: c["ap"])
        cells = table.locator("tbody tr").first.locator("td").all_inner_texts()
        assert cells[:3] == [best["name"], f"{best['num_boxes']}", f"{100 * best['ap']:.1f}"]
        table.locator("input.filter").fill("class 7")
        assert table.locator("tbody tr:visible").count() == 11  # 7, 70..79
        curves = tab.locator("section", has=tab.get_by_role("heading", name="Precision and recall"))
        assert curves.locator("svg:visible").count() == 2
        curves.locator("select").select_option(index=41)
        assert curves.locator("option").nth(41).inner_text().startswith("class 40 (")
        assert curves.locator("svg:visible").first.get_attribute("aria-label") == "Precision over recall of class 40"
        assert "they are not here" in tab.locator("main").inner_text()
        assert tab.locator(".grid img").count() == 0


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1400, "light")])
def test_the_page_fits_the_screen(browser, large: Path, tmp_path: Path, width: int, scheme: str) -> None:
    with_images = report_of(tmp_path, *random_set(0))
    for path in (large, with_images):
        with opened(browser, path, width=width, scheme=scheme) as tab:
            assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_pictures_are_shown_and_enlarged(browser, tmp_path: Path) -> None:
    truth, results = random_set(0)
    path = report_of(tmp_path, truth, results)
    with opened(browser, path) as tab:
        worst = tab.locator("section", has=tab.get_by_role("heading", name="Worst images"))
        pictures = worst.locator(".grid img")
        numbers = json.loads((tmp_path / "report.json").read_text())
        assert pictures.count() == len(numbers["worst"]) - 1  # one cannot be read
        assert worst.get_by_text("(11.png: <broken>)").count() == 1
        first = numbers["worst"][0]
        assert f"missed {len(first['missed'])}" in worst.locator("figcaption").first.inner_text()
        worst.locator(".zoom").first.click()
        assert tab.locator("dialog").is_visible()
        tab.keyboard.press("ArrowRight")
        caption = worst.locator("figcaption").nth(1).inner_text()
        assert tab.locator("dialog p").inner_text() == f"2 / {pictures.count()} {caption}"
        tab.keyboard.press("Escape")
        errors = tab.locator("section", has=tab.get_by_role("heading", name="Likely label errors"))
        assert errors.locator(".grid img").count() > 3
        broken = tab.evaluate(
            "Promise.all([...document.images].filter(i => i.src).map(i => i.decode().then(() => 0, () => 1)))"
        )
        assert sum(broken) == 0
        assert len(broken) > 10


def test_hostile_names_are_inert(browser, tmp_path: Path) -> None:
    boxes = [(0, k, BOX) for k in range(len(EVIL))]
    truth = truth_of(boxes, num_classes=len(EVIL))
    object.__setattr__(truth, "names", tuple(EVIL))
    results = found([(0, (k + 1) % len(EVIL), BOX, 0.9 - k / 100) for k in range(len(EVIL))])
    path = report_of(tmp_path, truth, results, name=EVIL[0])
    with opened(browser, path, width=390) as tab:
        assert tab.title() == f"Evaluation: {EVIL[0]}"
        assert tab.locator("script").count() == 1
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        names = tab.locator(".filtered").first.locator("tbody td:first-child").all_inner_texts()
        assert names[:4] == EVIL[:4]


def test_charts_of_an_earlier_report_go(tmp_path: Path) -> None:
    report_of(tmp_path, truth_of([(0, 0, BOX)]), found([(0, 0, BOX, 0.9)]))
    assert {path.stem for path in tmp_path.glob("*.png")} == set(CHARTS)
    (tmp_path / "mine.png").touch()
    report_of(tmp_path, truth_of([]), found([]))
    assert {path.stem for path in tmp_path.glob("*.png")} == {"confusion", "mine"}


@pytest.mark.parametrize(
    ("boxes", "results", "said"),
    [
        ([(0, 0, BOX)], found([]), "There are no detections at all"),
        ([], found([(0, 0, BOX, 0.9)]), "There is no ground truth to find"),
        ([], found([]), "There is no ground truth to find"),
        ([(0, 0, BOX)], found([(0, 0, BOX, 0.9)]), "No image has a mistake"),
        ([(0, 0, BOX)], found([(0, 0, BOX, 9.0)]), "some scores lie outside 0..1"),
    ],
    ids=["no detections", "no boxes", "nothing", "all right", "logits"],
)
def test_empty_sets_have_a_page(browser, tmp_path: Path, boxes: list, results: ScoredBoxes, said: str) -> None:
    path = report_of(tmp_path, truth_of(boxes), results)
    with opened(browser, path) as tab:
        assert tab.locator("h2").all_inner_texts() == SECTIONS
        assert said in tab.locator("main").inner_text()
