"""Greedy non-maximum suppression in two launches, without waiting for the device.

The first compares all pairs of boxes of a problem, and writes a bit for each better box that overlaps. The second goes
from the best boxes to the worst, 32 at once: a box stays unless a better one that stays overlaps it.

Dimensions: N images, L levels, B boxes of an image, P = N * L problems, C = boxes of the largest level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = tl.constexpr(32)
"""Boxes whose bits are one int32."""

WORDS_PER_PROGRAM = tl.constexpr(4)
"""Words of a row that a program of `find_overlaps` writes."""


def solve(
    boxes: Tensor, valid: Tensor, *, level_sizes: Sequence[int], iou_thresh: float, labels: Tensor | None = None
) -> Tensor:
    """As `fpn_det.models.nms.solve`, to the bit. Takes P * C * C / 8 bytes, one C rounded up to a power of 2.

    Args:
        boxes: (N, B, 4) float32 XYXY, level by level, by descending score within each level.
        valid: (N, B) bool.
        level_sizes: how many boxes each level has; their sum is B.
        iou_thresh: what float32 IoUs must exceed, itself a float32: see `fpn_det.models.nms.largest_float32_up_to`.
        labels: (N, B) int64; boxes of different labels do not compete. None: all do.

    Returns:
        (N, B) bool, which boxes stay.
    """
    boxes, valid, labels = boxes.contiguous(), valid.contiguous(), None if labels is None else labels.contiguous()
    keep = torch.empty_like(valid)
    if keep.numel() == 0:
        return keep
    sizes, most = tuple(level_sizes), max(level_sizes)
    num_problems, num_words = len(boxes) * len(sizes), triton.cdiv(most, WORD.value)
    row_length = max(WORDS_PER_PROGRAM.value, triton.next_power_of_2(num_words))
    overlaps = torch.empty((num_problems, most, row_length), dtype=torch.int32, device=boxes.device)
    grid = (num_words, triton.cdiv(num_words, WORDS_PER_PROGRAM.value), num_problems)
    with torch.cuda.device_of(boxes):  # Triton launches on the current device
        find_overlaps[grid](
            boxes,
            labels,
            overlaps,
            sizes,
            boxes.shape[1],
            most,
            iou_thresh,
            ROW_LENGTH=row_length,
            enable_fp_fusion=False,  # each product is rounded, as in PyTorch
            num_warps=8,
        )
        choose[(num_problems,)](
            overlaps,
            valid,
            keep,
            sizes,
            boxes.shape[1],
            most,
            ROW_LENGTH=row_length,
            num_warps=max(1, row_length // 64),  # one warp has no barriers
        )
    return keep


@triton.jit(do_not_specialize=["num_boxes", "most"])
def find_overlaps(
    boxes: tl.tensor,
    labels: tl.tensor | None,
    overlaps: tl.tensor,
    sizes: tl.tuple,
    num_boxes: tl.tensor,
    most: tl.tensor,
    iou_thresh: tl.tensor,
    ROW_LENGTH: tl.constexpr,
) -> None:
    """Which boxes are better than each and overlap it: bit j of word w of a box's row speaks of box 32 w + j.

    Program (i, j, p) writes words 4 j .. 4 j + 3 of the rows of boxes 32 i .. 32 i + 31 of problem p. Words after the
    i-th would be of worse boxes; they are zeros or, as nobody reads them, not written.
    """
    block, segment, problem = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, count = level_of(problem, sizes, num_boxes)
    if block * WORD < count and segment * WORDS_PER_PROGRAM <= block:
        row = block * WORD + tl.arange(0, WORD)
        column = segment * WORDS_PER_PROGRAM * WORD + tl.arange(0, WORDS_PER_PROGRAM * WORD)
        is_row, is_column = row < count, column < count
        corner, better_corner = boxes + (first + row) * 4, boxes + (first + column) * 4
        x1, better_x1 = tl.load(corner, is_row)[:, None], tl.load(better_corner, is_column)[None]
        y1, better_y1 = tl.load(corner + 1, is_row)[:, None], tl.load(better_corner + 1, is_column)[None]
        x2, better_x2 = tl.load(corner + 2, is_row)[:, None], tl.load(better_corner + 2, is_column)[None]
        y2, better_y2 = tl.load(corner + 3, is_row)[:, None], tl.load(better_corner + 3, is_column)[None]
        # The arithmetic of `better_overlaps`. A NaN is in the area too, so minima and maxima need not hand it on.
        area, better_area = (x2 - x1) * (y2 - y1), (better_x2 - better_x1) * (better_y2 - better_y1)
        width = tl.maximum(tl.minimum(x2, better_x2) - tl.maximum(x1, better_x1), 0.0)
        overlap = width * (tl.minimum(y2, better_y2) - tl.maximum(y1, better_y1))
        # `/` may be off by a bit. (Triton 3.4 takes subnormal numbers for zeros here.)
        iou = tl.math.div_rn(overlap, area + better_area - overlap)
        suppresses = (iou > iou_thresh) & (column[None] < row[:, None])
        if labels is not None:
            label, better_label = tl.load(labels + first + row, is_row), tl.load(labels + first + column, is_column)
            suppresses = suppresses & (label[:, None] == better_label[None])
        bits = suppresses.to(tl.int32) << (column % WORD)[None]
        words = tl.sum(tl.reshape(bits, [WORD, WORDS_PER_PROGRAM, WORD]), axis=2)
        place = (problem.to(tl.int64) * most + row) * ROW_LENGTH
        word = segment * WORDS_PER_PROGRAM + tl.arange(0, WORDS_PER_PROGRAM)
        tl.store(overlaps + place[:, None] + word[None], words, is_row[:, None])


@triton.jit(do_not_specialize=["num_boxes", "most"])
def choose(
    overlaps: tl.tensor,
    valid: tl.tensor,
    keep: tl.tensor,
    sizes: tl.tuple,
    num_boxes: tl.tensor,
    most: tl.tensor,
    ROW_LENGTH: tl.constexpr,
) -> None:
    """Which boxes stay, from the best 32 to the worst; one program per problem."""
    problem = tl.program_id(0)
    first, count = level_of(problem, sizes, num_boxes)
    bit, word = tl.arange(0, WORD), tl.arange(0, ROW_LENGTH)
    kept = tl.zeros([ROW_LENGTH], tl.int32)  # bits of the blocks so far
    block = 0
    while block * WORD < count:  # the interpreter of Triton 3.6 cannot count to a tensor with NumPy 2.4
        box = block * WORD + bit
        is_box = box < count
        row = overlaps + (problem.to(tl.int64) * most + box) * ROW_LENGTH
        # From this block on a row holds anything, but `kept` nothing yet.
        before = tl.load(row[:, None] + word[None], is_box[:, None], other=0)
        within = tl.load(row + block, is_box, other=0)
        takes_part = tl.load(valid + first + box, is_box, other=0)
        candidate = takes_part & (tl.max(((before & kept[None]) != 0).to(tl.int32), axis=1) == 0)
        # A box's fate is right after as many rounds as boxes of this block decide about one another; then none changes.
        stays = tl.sum(candidate.to(tl.int32) << bit)
        changes = True
        while changes:
            previous = stays
            stays = tl.sum((candidate & ((within & previous) == 0)).to(tl.int32) << bit)
            changes = stays != previous
        kept = tl.where(word == block, stays, kept)
        tl.store(keep + first + box, ((stays >> bit) & 1) != 0, is_box)
        block += 1


@triton.jit
def level_of(problem: tl.tensor, sizes: tl.tuple, num_boxes: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Where the boxes of a problem begin among those of all images, and how many there are."""
    level = problem % len(sizes)
    first, count = (problem // len(sizes)).to(tl.int64) * num_boxes, 0
    for i in tl.static_range(len(sizes)):
        first += tl.where(i < level, sizes[i], 0)
        count += tl.where(i == level, sizes[i], 0)
    return first, count
