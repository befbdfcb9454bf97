import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_det.draw import class_color, draw_boxes, draw_comparison, draw_detections, draw_points, draw_title
from fpn_det.structures import Detections

RED, BLUE = (255, 0, 0), (0, 0, 255)


def gray(height: int = 400, width: int = 500) -> torch.Tensor:
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def boxes_of(*boxes) -> torch.Tensor:
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def where(image: torch.Tensor, color) -> torch.Tensor:
    return (image == torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)).all(dim=0)


def extent(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """Half-open x1, y1, x2, y2 of what is set."""
    ys, xs = mask.nonzero(as_tuple=True)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def detections(*rows) -> Detections:
    """rows: (box, score, label)."""
    return Detections(
        boxes=boxes_of(*(box for box, _, _ in rows)),
        scores=torch.tensor([score for _, score, _ in rows]),
        labels=torch.tensor([label for _, _, label in rows], dtype=torch.int64),
    )


def test_line_covers_the_box_and_the_image_is_kept() -> None:
    image = gray()
    out = draw_boxes(image, boxes_of([100, 150, 200, 300]), [""], colors=[RED], width=3)
    drawn = where(out, RED)
    assert extent(drawn) == (100, 150, 200, 300)
    expected = torch.zeros(400, 500, dtype=torch.bool)
    expected[150:300, 100:200] = True
    expected[153:297, 103:197] = False
    assert torch.equal(drawn, expected)
    assert torch.equal(out[:, ~drawn], image[:, ~drawn])
    assert torch.equal(image, gray())


def test_default_width_follows_the_size() -> None:
    counts = []
    for side in (400, 1500):
        out = draw_boxes(gray(side, side), boxes_of([50, 50, 350, 350]), [""], colors=[RED])
        counts.append(int(where(out, RED)[200, :200].sum()))
    assert counts == [2, 5]


@pytest.mark.parametrize(
    ("size", "factor"), [((64, 64), 5), ((64, 100), 5), ((320, 400), 1), ((319, 400), 2), ((1, 1), 320), ((2, 2000), 1)]
)
def test_small_images_are_enlarged(size, factor: int) -> None:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    out = draw_boxes(image, boxes_of(), [], colors=[])
    assert torch.equal(out, image.repeat_interleave(factor, 1).repeat_interleave(factor, 2))
    if size == (64, 64):
        out = draw_boxes(image * 0, boxes_of([10, 20, 30, 50]), [""], colors=[RED])
        assert extent(where(out, RED)) == (50, 100, 150, 250)


@pytest.mark.parametrize(
    "box",
    [
        [100, 100, 100, 100],
        [200, 200, 100, 100],
        [-50, -50, 900, 900],
        [900, 900, 950, 950],
        [-90, -90, -50, -50],
        [float("nan"), 0, 10, 10],
        [float("-inf"), 0, float("inf"), 10],
        [1e30, 1e30, 2e30, 2e30],
    ],
)
def test_degenerate_boxes(box) -> None:
    out = draw_boxes(gray(), boxes_of(box, [10, 10, 90, 90]), ["odd", "good"], colors=[BLUE, RED])
    assert where(out, RED).any()
    assert where(out, BLUE).any() == (not np.isnan(box).any())


def test_text_stands_above_the_box_and_inside_the_image() -> None:
    out = draw_boxes(gray(), boxes_of([100, 150, 300, 300]), ["cat 0.93"], colors=[RED], width=1)
    x1, y1, x2, y2 = extent(where(out, RED))
    assert (x1, x2, y2) == (100, 300, 300)
    assert 150 - 25 < y1 < 150 - 8
    assert where(out, (0, 0, 0)).any()  # black on red
    assert extent(where(out, (0, 0, 0)))[3] <= 150
    # Wherever the box, the whole of the same label is visible: it has the same number of text pixels.
    inside = int(where(out, (0, 0, 0)).sum())
    for corner in ([0, 0], [480, 0], [0, 380], [490, 390], [600, 500]):
        out = draw_boxes(gray(), boxes_of([*corner, 500, 400]), ["cat 0.93"], colors=[RED], width=1)
        assert int(where(out, (0, 0, 0)).sum()) == inside, corner


def test_long_text_is_shortened() -> None:
    out = draw_boxes(gray(), boxes_of([200, 200, 300, 300]), ["w" * 500], colors=[BLUE])
    x1, _, x2, _ = extent(where(out, BLUE))
    assert 450 < x2 - x1 <= 500


def test_any_text_can_be_drawn() -> None:
    """Line breaks, NUL and surrogates would be errors of Pillow; a million letters must not take minutes."""
    for text in (
        "a\nb",
        "a\0b",
        "\ud800",
        "\x1b[2J\r\u202e",
        "赤血球",
        "e\u0301",
        "\u0301" * 3000,
        "\n" * 10**6,
        "i" * 10**6,
    ):
        out = draw_boxes(gray(), boxes_of([200, 200, 300, 300]), [text], colors=[BLUE])
        assert where(out, BLUE).any()
    shown = draw_boxes(gray(), boxes_of([200, 200, 300, 300]), [r"a\nb"], colors=[BLUE])
    assert torch.equal(draw_boxes(gray(), boxes_of([200, 200, 300, 300]), ["a\nb"], colors=[BLUE]), shown)


@pytest.mark.parametrize(("background", "text"), [((255, 255, 0), 0), ((0, 0, 120), 255), ((0, 255, 0), 0)])
def test_text_is_black_or_white_by_luminance(background, text: int) -> None:
    out = draw_boxes(gray(), boxes_of([200, 200, 300, 300]), ["cat"], colors=[background])
    assert where(out, (text,) * 3).any()
    assert not where(out, (255 - text,) * 3).any()


def test_class_colors_are_stable_and_distinct() -> None:
    colors = np.array([class_color(i) for i in range(20)], dtype=float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 999 * np.eye(20)
    assert distances.min() > 50
    assert all(np.linalg.norm(np.subtract(a, b)) > 120 for a, b in pairwise(colors[:10]))
    assert class_color(0) == (255, 25, 25)
    assert all(0 <= c <= 255 for i in range(1000) for c in class_color(i))


def test_detections_above_the_threshold_best_on_top() -> None:
    found = detections(([100, 100, 200, 200], 0.9, 1), ([100, 100, 200, 200], 0.5, 0), ([300, 300, 350, 350], 0.49, 2))
    out = draw_detections(gray(), found, ["a", "b", "c"])
    assert where(out, class_color(1))[100:200, 100].all()
    assert not where(out, class_color(0))[100:200, 100].any()
    assert not where(out, class_color(2)).any()
    assert where(draw_detections(gray(), found, ["a", "b", "c"], score_thresh=0.4), class_color(2)).any()


def test_detections_say_name_and_score() -> None:
    found = detections(([100, 100, 200, 200], 0.934, 0))
    expected = draw_boxes(gray(), found.boxes, ["cat 0.93"], colors=[class_color(0)])
    assert torch.equal(draw_detections(gray(), found, ["cat"]), expected)


def test_nothing_to_draw() -> None:
    assert torch.equal(draw_detections(gray(), detections(), ["cat"]), gray())
    out = draw_comparison(gray(), detections(), boxes_of(), torch.zeros(0, dtype=torch.int64), ["cat"])
    assert (out[:, -400:, :500] == 128).all()
    assert (out[:, -400:, -500:] == 128).all()


def test_comparison_shows_ground_truth_left_and_detections_right() -> None:
    out = draw_comparison(
        gray(), detections(([50, 60, 150, 160], 0.8, 1)), boxes_of([200, 210, 300, 310]), torch.tensor([0]), ["a", "b"]
    )
    left, right = out[:, -400:, :500], out[:, -400:, -500:]
    assert torch.equal(left, draw_boxes(gray(), boxes_of([200, 210, 300, 310]), ["a"], colors=[class_color(0)]))
    assert torch.equal(right, draw_detections(gray(), detections(([50, 60, 150, 160], 0.8, 1)), ["a", "b"]))
    strip = out[:, :-400]
    assert strip.shape[1] > 10
    assert where(strip[..., :250], (0, 0, 0)).any()  # both halves have a title
    assert where(strip[..., 504:754], (0, 0, 0)).any()


@pytest.mark.parametrize(
    ("image", "boxes", "labels", "message"),
    [
        (gray().float(), boxes_of(), [], "image must be"),
        (gray()[0], boxes_of(), [], "image must be"),
        (gray()[:, :0], boxes_of(), [], "image must be"),
        (gray(), torch.zeros(2, 5), ["a", "b"], r"\(2, 5\)"),
        (gray(), torch.zeros(2, 4), ["a"], r"\(2, 4\), 1, 2"),
    ],
)
def test_wrong_shapes(image, boxes, labels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_boxes(image, boxes, labels, colors=[RED] * len(boxes))


def test_real_image(test_data: Path) -> None:
    folder = test_data / "bccd"
    truth = json.loads((folder / "annotations" / "val.json").read_text())
    info = truth["images"][0]
    image = torch.from_numpy(np.array(Image.open(folder / "images" / info["file_name"]).convert("RGB"))).permute(
        2, 0, 1
    )
    rows = [a for a in truth["annotations"] if a["image_id"] == info["id"]]
    boxes = boxes_of(*(a["bbox"] for a in rows))
    boxes[:, 2:] += boxes[:, :2]
    out = draw_boxes(image, boxes, [""] * len(rows), colors=[RED] * len(rows), width=2)
    red = where(out, RED)
    assert out.shape == image.shape
    for x1, y1, x2, y2 in boxes.round().int().clamp(min=0).tolist():
        assert red[y1:y2, x1].all()
        assert red[y2 - 1, x1:x2].all()
    assert 0.01 < red.float().mean() < 0.3
    assert torch.equal(out[:, ~red], image[:, ~red])


def test_points_are_discs_and_rings() -> None:
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    picture = draw_points(image, torch.tensor([[20.0, 30], [60, 30]]), colors=[RED, RED], filled=[True, False])
    assert tuple(picture[:, 30, 20]) == RED
    assert not picture[:, 30, 60].any()
    assert (picture[:, 28:33, 57:64] == torch.tensor(RED)[:, None, None]).all(0).any()
    assert not picture[:, :20].any()
    assert torch.equal(draw_points(image, torch.zeros(0, 2), colors=[], filled=[]), image)


def test_a_title_stands_above_and_its_legend_takes_the_lines_it_needs() -> None:
    image = torch.full((3, 100, 200), 7, dtype=torch.uint8)
    heights = []
    for num in (0, 1, 20):
        picture = draw_title(image, "a title\x1b", [("P2: 12", RED)] * num)
        assert torch.equal(picture[:, -100:], image)
        assert picture.shape[2] == 200
        heights.append(picture.shape[1] - 100)
        found = int((picture == torch.tensor(RED)[:, None, None]).all(0).sum())
        assert 80 * num <= found <= 200 * num
    assert heights[0] < heights[1] < heights[2]
