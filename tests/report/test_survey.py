"""Figures of a split, from boxes whose figures are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.statistics import training_boxes
from fpn_det.models.anchors import Anchors
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.report.browse import browse_page, format_overview
from fpn_det.report.survey import Survey, advice, by_class, by_size, level_shares, make_survey
from fpn_det.structures import Categories

LEVELS = ("P2", "P3", "P4", "P5", "P6")
SIZES = ((32,), (64,), (128,), (256,), (512,))


def annotations(boxes: Tensor, labels: Tensor, per_image: int, names: tuple[str, ...]) -> CocoAnnotations:
    """`per_image` boxes for each image of 512 pixels."""
    num = len(boxes) // per_image
    return CocoAnnotations(
        source=Path("gt.json"),
        folder=Path(),
        categories=Categories(tuple(range(len(names))), names),
        name_bytes=torch.zeros(0, dtype=torch.uint8),
        name_offsets=torch.zeros(num + 1, dtype=torch.int64),
        image_ids=torch.arange(num),
        sizes=torch.full((num, 2), 512),
        box_offsets=torch.arange(num + 1) * per_image,
        boxes=boxes,
        labels=labels,
        num_images_in_file=num,
        num_images_lost=0,
        num_annotations=len(boxes),
        num_crowd=0,
        problems=(),
    )


def survey(sides: list[float], labels: list[int] | None = None, per_image: int = 1, **changes: Any) -> Survey:
    """Squares of these sides, each centred on a point of all grids (256, 256)."""
    side = torch.tensor(sides)[:, None]
    boxes = torch.cat([256 - side / 2, 256 + side / 2], 1)[:, [0, 0, 1, 1]]
    names = changes.pop("names", ("small", "<b>large\x1b</b>"))
    data = annotations(boxes, torch.tensor(labels or [0] * len(sides)), per_image, names)
    short_sides = changes.pop("short_sides", (512,))
    strides = (4, 8, 16, 32, 64)
    arguments: dict[str, Any] = {
        "num_scales": len(short_sides),
        "anchors": Anchors(sizes=SIZES, ratios=(0.5, 1, 2), strides=strides),
        "sizes": SIZES,
        "ratios": (0.5, 1, 2),
        "positive_iou": 0.7,
        "pooler": MultiLevelRoIAlign(strides=strides[:4]),
        "level_names": LEVELS,
    }
    return make_survey(data, training_boxes(data, short_sides=short_sides, long_side=9999), **(arguments | changes))


def test_figures_of_boxes_on_the_grid() -> None:
    """32, 64, 256 are anchors; of a square of 5 the best anchor is that of 32, of one of 45 that of 32 or 64."""
    found = survey([32, 64, 256, 5, 45], [0, 0, 1, 1, 1])
    present = found.present
    assert present is not None
    best = [1, 1, 1, 25 / 1024, 32**2 / 45**2]
    assert present.best.iou.tolist() == pytest.approx(best)
    assert present.recall(0.7) == pytest.approx(3 / 5)
    assert present.recall(0.5) == pytest.approx(4 / 5)
    assert present.mean_iou() == pytest.approx(sum(best) / 5)
    assert level_shares(found, present.best.level) == [3 / 5, 1 / 5, 0, 1 / 5, 0]
    assert found.roi_level is not None
    assert level_shares(found, found.roi_level) == [4 / 5, 0, 1 / 5, 0, 0]
    small, large = by_class(found)
    assert (small.num_boxes, large.num_boxes) == (2, 3)
    assert present.recall(0.7, small.of) == 1
    assert present.recall(0.7, large.of) == pytest.approx(1 / 3)
    sizes = {group.name: group.num_boxes for group in by_size(found)}
    assert sizes == {"below 8": 1, "8 to 16": 0, "16 to 32": 0, "32 to 64": 2, "64 to 128": 1, "128 to 256": 0} | {
        "256 to 512": 1
    }
    assert found.images_per_class.tolist() == [2, 3]


def test_all_scales_count() -> None:
    found = survey([30, 60], short_sides=(512, 1024))
    assert found.side.tolist() == pytest.approx([30, 60, 60, 120])
    assert [(group.name, group.num_boxes) for group in by_size(found)] == [("16 to 32", 0.5), ("32 to 64", 1)] + [
        ("64 to 128", 0.5)
    ]


def hints(found: Survey, limit: int | None = 100) -> list[str]:
    return advice(found, short_sides=(512,), detections_per_image=limit)


def test_advice() -> None:
    assert hints(survey([32, 64] * 60, [0, 1] * 60)) == []
    tiny = survey([32, 64] * 60 + [5] * 2, [0, 1] * 60 + [1, 1])
    assert len(hints(tiny)) == 1
    assert "1.6% of the boxes are smaller than 8 px" in hints(tiny)[0]
    assert r"<b>large\x1b</b>)" in hints(tiny)[0]  # for a terminal; the page escapes the rest
    rare = survey([32.0] * 60 + [64] * 3, [0] * 60 + [1] * 3)
    assert "1 of 2 classes have fewer than 50 boxes" in hints(rare)[0]
    assert "(3)" in hints(rare)[0]
    crowded = survey([32.0] * 120, per_image=60, names=("a",))
    assert "2 images hold more than 59 boxes (up to 60)" in hints(crowded, 59)[0]
    assert hints(crowded, 60) == hints(crowded, None) == []


def test_anchors_are_suggested_where_they_help_and_only_there() -> None:
    assert survey([32, 64, 128] * 40, names=("a",)).suggested is None
    found = survey([12, 20, 45] * 40, names=("a",))
    present, suggested = found.present, found.suggested
    assert present is not None
    assert suggested is not None
    assert suggested.recall(0.7) > present.recall(0.7) + 0.3
    assert hints(found) == []
    assert suggested.overrides()[0] in format_overview(found)
    assert f"{suggested.overrides()[0]}</li>" in browse_page(found, name="", source="", advice=[], samples=[], note="")
    few = survey([12, 20] * 10, names=("a",))
    assert (few.suggested, len(few.anchor_sets)) == (None, 1)
    assert "Too few boxes" in format_overview(few)


def test_ratios_are_suggested_where_all_boxes_are_long() -> None:
    centre = torch.tensor([256.0, 256.0])
    half = torch.tensor([[100.0, 10.0], [60.0, 6.0]]).repeat(50, 1) / 2
    data = annotations(torch.cat([centre - half, centre + half], 1), torch.zeros(100, dtype=torch.int64), 1, ("a",))
    base = survey([32.0])
    assert base.present is not None
    found = make_survey(
        data,
        training_boxes(data, short_sides=(512,), long_side=999),
        num_scales=1,
        anchors=base.present.anchors,
        sizes=SIZES,
        ratios=(0.5, 1, 2),
        positive_iou=0.7,
        pooler=None,
        level_names=LEVELS,
    )
    assert found.suggested is not None
    assert list(found.suggested.ratios) == [0.1]
    assert "model.anchors.ratios=[0.1]" in format_overview(found)


@pytest.mark.parametrize("changes", [{}, {"anchors": None}, {"pooler": None}])
def test_page_and_table_have_what_there_is(changes: dict[str, Any]) -> None:
    found = survey([5, 32, 45] * 30, [0, 1, 1] * 30, **changes)
    page = browse_page(found, name="n", source="s", advice=hints(found), samples=[], note="")
    assert ("best anchor is of" in page) == ("Anchors</h2>" in page) == ("anchors" not in changes)
    assert ("pooled from" in page) == ("pooler" not in changes)
    assert ("best possible recall" in format_overview(found)) == ("anchors" not in changes)
    assert "<b>" not in page
    assert "&lt;b&gt;large\\x1b&lt;/b&gt;" in page


def test_a_class_without_boxes_has_a_row() -> None:
    found = replace(survey([32.0] * 3), suggested=None)
    page = browse_page(found, name="n", source="s", advice=hints(found), samples=[], note="")
    assert "nan" not in page
    assert [group.num_boxes for group in by_class(found)] == [3, 0]
