"""Pictures of boxes: detections, and ground truth beside them.

Images are (3, H, W) uint8 RGB, boxes XYXY in pixels of the image given. Images too small for readable text come back
enlarged by a whole number.
"""

from __future__ import annotations

import colorsys
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import count

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fpn_det.structures import Detections, printable

Color = tuple[int, int, int]

_MIN_SIDE_PX = 320  # below this, text would hide the picture ..
_MAX_SIDE_PX = 1280  # .. but a very long image is not enlarged beyond this
_GAP_PX = 4  # between pictures side by side


def class_color(label: int) -> Color:
    """The RGB colour of a class index, the same in every picture.

    Hues go round in an irrational step, which keeps neighbours apart; every seven classes saturation and brightness
    change, because the eye tells only few hues apart. Among the steps and blocks tried these leave the first 8
    colours (43) and the first 20 (28) far from each other in CIELAB.
    """
    saturation, value = ((0.9, 1.0), (0.45, 1.0), (1.0, 0.6))[(label // 7) % 3]
    red, green, blue = colorsys.hsv_to_rgb((label * 0.5698403) % 1.0, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def text_color(background: Color) -> Color:
    """Black or white, whichever has more contrast (WCAG's relative luminance, with gamma 2.2)."""
    red, green, blue = ((c / 255) ** 2.2 for c in background)
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else (255, 255, 255)


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    labels: Sequence[str],
    *,
    colors: Sequence[Color],
    width: int | None = None,
    enlarge: bool = True,
) -> Tensor:
    """Draw labelled boxes on a copy of an image; later boxes lie on top.

    Args:
        image: (3, H, W) uint8, RGB.
        boxes: (B, 4) XYXY, in pixels of `image`; parts outside are not drawn, boxes with NaN neither.
        labels: B texts; an empty one draws the box alone. Control characters are shown as escapes.
        colors: B RGB colours.
        width: of the lines, in pixels; by default it follows the image's size.
        enlarge: whether small images come back larger.

    Returns:
        (3, k*H, k*W) uint8 on the CPU. k is 1 unless the short side is below 320 pixels and `enlarge`, where k is the
        smallest whole number that lifts it to that (or the largest that keeps the long side within 1280).

    Raises:
        ValueError: a shape or dtype other than these, or counts that differ.
    """
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8 or image.numel() == 0:
        raise ValueError(f"image must be (3, H, W) uint8, got {tuple(image.shape)} {image.dtype}")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes) == len(labels) == len(colors):
        raise ValueError(
            f"need boxes (B, 4), B labels, B colors; got {tuple(boxes.shape)}, {len(labels)}, {len(colors)}"
        )
    short_px, long_px = sorted(image.shape[1:])
    factor = max(1, min(-(-_MIN_SIDE_PX // short_px), _MAX_SIDE_PX // long_px)) if enlarge else 1
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    if width is None:
        width = max(2, round(min(picture.size) / 300))

    # A continuous box x1..x2 covers the pixels x1..x2-1; Pillow's rectangles include both ends.
    boxes = boxes.detach().cpu().double() * factor
    limit = torch.tensor(picture.size, dtype=torch.float64)
    low = boxes[:, :2].round().clamp(min=torch.zeros(2).double(), max=limit - 1)
    high = (boxes[:, 2:].round() - 1).clamp(min=low, max=limit - 1)
    corners = torch.cat([low, high], dim=1)
    shown = [i for i, box in enumerate(boxes.isnan().any(dim=1).tolist()) if not box]
    for i in shown:
        draw.rectangle(corners[i].int().tolist(), outline=colors[i], width=width)
    for i in shown:  # texts last, so that no line crosses them
        if labels[i]:
            x1, y1, _, _ = corners[i].int().tolist()
            _draw_label(draw, labels[i], x1, y1, color=colors[i], canvas=picture.size)
    return _to_tensor(picture)


def draw_detections(
    image: Tensor,
    detections: Detections,
    class_names: Sequence[str],
    *,
    score_thresh: float = 0.5,
    enlarge: bool = True,
) -> Tensor:
    """Draw the detections that score at least `score_thresh`, the best on top.

    Args:
        image: (3, H, W) uint8, RGB.
        detections: in the frame of `image`.
        class_names: K names.
        score_thresh: 0..1.
        enlarge: as of `draw_boxes`.

    Returns:
        (3, k*H, k*W) uint8, enlarged as `draw_boxes` says.
    """
    keep = (detections.scores >= score_thresh).nonzero().flatten().flip(0)  # ascending scores
    labels = detections.labels[keep].tolist()
    scores = detections.scores[keep].tolist()
    return draw_boxes(
        image,
        detections.boxes[keep],
        [f"{class_names[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)],
        colors=[class_color(label) for label in labels],
        enlarge=enlarge,
    )


def draw_comparison(
    image: Tensor,
    detections: Detections,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    class_names: Sequence[str],
    *,
    score_thresh: float = 0.5,
) -> Tensor:
    """Ground truth on the left, detections on the right, under a line that says so.

    Args:
        image: (3, H, W) uint8, RGB.
        detections: in the frame of `image`.
        gt_boxes: (G, 4) XYXY, in the frame of `image`.
        gt_labels: (G,) int64, 0..K-1.
        class_names: K names.
        score_thresh: detections below are left out.

    Returns:
        (3, H', W') uint8, the two pictures of `draw_boxes`' size side by side.
    """
    truth = draw_boxes(
        image,
        gt_boxes,
        [class_names[label] for label in gt_labels.tolist()],
        colors=[class_color(label) for label in gt_labels.tolist()],
    )
    found = draw_detections(image, detections, class_names, score_thresh=score_thresh)
    num_found = int((detections.scores >= score_thresh).sum())
    return side_by_side(
        {f"ground truth: {len(gt_boxes)}": truth, f"detections >= {score_thresh:g}: {num_found}": found}
    )


def side_by_side(pictures: Mapping[str, Tensor]) -> Tensor:
    """Pictures of one size beside each other, each under its title.

    Args:
        pictures: title -> (3, H, W) uint8, RGB.

    Returns:
        (3, H', W') uint8: their width together and the gaps, their height and that of the titles.
    """
    height, width = next(iter(pictures.values())).shape[1:]
    font = _font((width, height))
    strip_px = round(1.8 * font.size)
    step_px = width + _GAP_PX
    picture = Image.new("RGB", (len(pictures) * step_px - _GAP_PX, height + strip_px), "white")
    draw = ImageDraw.Draw(picture)
    for x, (title, part) in zip(count(0, step_px), pictures.items(), strict=False):
        picture.paste(Image.fromarray(part.permute(1, 2, 0).numpy()), (x, strip_px))
        draw.text((x + font.size // 2, strip_px // 2), printable(title), fill="black", font=font, anchor="lm")
    return _to_tensor(picture)


def draw_points(image: Tensor, points: Tensor, *, colors: Sequence[Color], filled: Sequence[bool]) -> Tensor:
    """Draw discs, and rings where not `filled`, on a copy of an image.

    Args:
        image: (3, H, W) uint8, RGB.
        points: (B, 2) (x, y) of the centres, in pixels of `image`.
        colors: B RGB colours.
        filled: B times whether to draw a disc.

    Returns:
        (3, H, W) uint8 on the CPU.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    draw = ImageDraw.Draw(picture)
    radius = max(2.0, min(picture.size) / 160)
    for (x, y), color, is_filled in zip(points.tolist(), colors, filled, strict=True):
        corners = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(corners, fill=color if is_filled else None, outline="black" if is_filled else color)
    return _to_tensor(picture)


def draw_title(picture: Tensor, title: str, legend: Sequence[tuple[str, Color]] = ()) -> Tensor:
    """A picture under a strip with a title and, below that, what its colours mean.

    Args:
        picture: (3, H, W) uint8, RGB.
        title: one line; what does not fit is cut off.
        legend: names and colours, in as many lines as they need.

    Returns:
        (3, H', W) uint8 on the CPU.
    """
    height, width = picture.shape[1:]
    font = _font((width, height))
    pad, line_px = round(font.size / 2), round(1.6 * font.size)
    places: list[tuple[float, int]] = []
    x, line = float(pad), 1
    for name, _ in legend:
        entry_px = 1.3 * font.size + font.getlength(name) + 2 * pad
        if x > pad and x + entry_px > width:
            x, line = pad, line + 1
        places.append((x, line))
        x += entry_px
    strip_px = line_px * (line + 1 if legend else 1) + pad // 2
    canvas = Image.new("RGB", (width, height + strip_px), "white")
    canvas.paste(Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()), (0, strip_px))
    draw = ImageDraw.Draw(canvas)
    draw.text((pad, line_px // 2 + pad // 4), printable(title), fill="black", font=font, anchor="lm")
    for (name, color), (x, line) in zip(legend, places, strict=True):
        y = line_px * line + line_px // 2
        draw.rectangle((x, y - font.size // 2, x + font.size, y + font.size // 2), fill=color, outline="black")
        draw.text((x + 1.3 * font.size, y), printable(name), fill="black", font=font, anchor="lm")
    return _to_tensor(canvas)


def _draw_label(draw: ImageDraw.ImageDraw, text: str, x: int, y: int, *, color: Color, canvas: tuple[int, int]) -> None:
    """Write `text` on a filled background above (x, y), or below it where the canvas ends."""
    font = _font(canvas)
    pad = max(1, round(font.size / 6))
    limit = canvas[0] - 2 * pad
    text = printable(text[: canvas[0]])  # hardly a letter is narrower than a pixel
    if font.getlength(text) > limit:
        num_fitting = (
            bisect_right(range(len(text)), limit, key=lambda end: math.ceil(font.getlength(text[:end] + "…"))) - 1
        )
        text = f"{text[: max(num_fitting, 0)]}…"
    ascent, descent = font.getmetrics()
    width, height = round(font.getlength(text)) + 2 * pad, ascent + descent
    x = max(0, min(x, canvas[0] - width))
    y = y - height if y >= height else max(0, min(y, canvas[1] - height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    draw.text((x + pad, y + ascent), text, fill=text_color(color), font=font, anchor="ls")


def _font(canvas: tuple[int, int]) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=max(12, round(min(canvas) / 36)))
    assert isinstance(font, ImageFont.FreeTypeFont)  # what a `size` asks for
    return font


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
