"""Whether data sets can be used as they are: too much left out, splits that do not go together; quick, at every start.

What is only seen in the image files themselves is found by `fpn_det.data.decoding`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal

from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.loader import why_unreadable
from fpn_det.data.problems import Defect, Problem, shown
from fpn_det.structures import InputError, printable


def train_refusals(data: CocoAnnotations, *, on_error: Literal["drop", "fail"], drop_limit: float) -> list[str]:
    """Why a model should not be trained on this.

    Args:
        data: as `load_coco` reads it, with the images without boxes.
        on_error: `fail` (data.on_error) allows nothing to be left out.
        drop_limit: the share of the images, and of the boxes, that may be left out (data.drop_limit).

    Returns:
        One line per reason, with the way out; empty if training is fine.
    """
    reasons = _file_refusals(data)
    if len(data.boxes) == 0:
        if not reasons:
            reasons.append(
                f"{data.source}: no usable box, so nothing to train on; set data.train.annotations to a file with boxes"
            )
        return reasons
    num_left_out = sum(p.defect.outcome == "left out" for p in data.problems)
    if on_error == "fail" and num_left_out:
        return [
            *reasons,
            f"{data.source}: {num_left_out:,} of its images or annotations cannot be used, and data.on_error is fail. "
            "Correct them, or train without them with data.on_error=drop",
        ]
    for name, lost, total in (
        ("images", data.num_images_lost, data.num_images_lost + len(data)),
        ("boxes", data.num_boxes_lost, data.num_annotations - data.num_crowd),
    ):
        if lost > drop_limit * total:
            reasons.append(
                f"{data.source}: {lost:,} of the {total:,} {name} ({lost / total:.1%}) cannot be used, more than "
                f"data.drop_limit {drop_limit:g} allows. Correct the data, or raise data.drop_limit"
            )
    return reasons


def val_refusals(data: CocoAnnotations) -> list[str]:
    """Why metrics on this would mean something else than its file says.

    Every image must be usable: the score of a part of the images cannot be compared with anybody's. Boxes are not
    looked at: the evaluation reads the file itself, and has rules of its own (`engine.coco_eval.read_ground_truth`).

    Returns:
        One line per reason, with the way out; empty if there is none.
    """
    reasons = _file_refusals(data)
    images = [p for p in data.problems if p.defect.what == "image" and p.defect.outcome == "left out"]
    if images and not reasons:
        reasons.append(
            f"{data.source}: {len(images):,} of the {data.num_images_in_file:,} images cannot be used, but a "
            "validation set must be complete: leaving images out would change its metrics. Correct the file, or "
            "delete these images and their annotations from it"
        )
    return reasons


def _file_refusals(data: CocoAnnotations) -> list[str]:
    """What makes a file unfit for any purpose."""
    missing = [p for p in data.problems if p.defect is Defect.IMAGE_MISSING]
    reasons = []
    if missing and len(data) == 0:
        reasons.append(
            f"{data.folder}: {len(missing):,} of the {data.num_images_in_file:,} images of {data.source} are missing, "
            f"first {missing[0].value}. Set data.train.images and data.val.images to the folder that holds them"
        )
    elif len(data) == 0:
        reasons.append(f"{data.source}: none of the {data.num_images_in_file:,} images can be used. Correct the file")
    for defect in Defect:
        alike = [p for p in data.problems if p.defect is defect] if defect.outcome == "refused" else []
        if alike:
            what = "" if defect.what == "file" else f"{len(alike):,} x {defect.what} with "
            reasons.append(f"{data.source}: {what}{defect.reason} ({alike[0].value}). {defect.remedy}")
    return reasons


def check_same_categories(train: CocoAnnotations, val: CocoAnnotations) -> None:
    """Refuse a validation set whose classes differ from the training set's: its AP would mean nothing.

    Raises:
        InputError: naming both files and the differing categories.
    """
    if train.categories != val.categories:
        ours = set(zip(train.categories.ids, train.categories.names, strict=True))
        theirs = set(zip(val.categories.ids, val.categories.names, strict=True))
        raise InputError(
            f"{train.source} and {val.source} define different categories: only in the first "
            f"{shown(sorted(ours - theirs))}, only in the second {shown(sorted(theirs - ours))}. Give both files the "
            "same list `categories`"
        )


def compare_splits(train: CocoAnnotations, val: CocoAnnotations) -> list[Problem]:
    """Warnings about images that are in both splits, by their paths; their ids are those of validation.

    Two splits that are one file are one warning: to fit a few images on purpose is a common test of a set-up.
    """
    if os.path.samefile(train.source, val.source):
        return [Problem(Defect.SAME_FILE, None, None, str(val.source))]
    known = set(_paths(train))
    return [
        Problem(Defect.IMAGE_IN_BOTH, None, image_id, shown(path))
        for image_id, path in zip(val.image_ids.tolist(), _paths(val), strict=True)
        if path in known
    ]


class UnreadableImages:
    """The training images that could not be read while a run was under way, and how many may be.

    Args:
        data: what is trained on.
        drop_limit: the share of the images that may be left out in all (data.drop_limit).
        known: what was found in an earlier part of the run (`state_dict`).
    """

    def __init__(self, data: CocoAnnotations, *, drop_limit: float, known: Mapping[int, str] | None = None) -> None:
        self.data = data
        self.drop_limit = drop_limit
        self._reasons = dict(known or {})

    def state_dict(self) -> dict[int, str]:
        """What a resumed run must know: the ids, and why the images cannot be read."""
        return dict(self._reasons)

    def note(self, image_ids: Sequence[int]) -> list[str]:
        """Note images, which may be known already; the path of each new one and why it cannot be read."""
        new = {i: printable(why_unreadable(self.data, i)) for i in image_ids if i not in self._reasons}
        self._reasons |= new
        return [f"replaced by another image: {reason}" for reason in new.values()]

    def without(self) -> CocoAnnotations:
        """The data as they turned out to be, for the report."""
        indices = {image_id: index for index, image_id in enumerate(self.data.image_ids.tolist())}
        return self.data.without(
            {
                indices[image_id]: Problem(Defect.IMAGE_UNREADABLE, None, image_id, reason)
                for image_id, reason in self._reasons.items()
                if image_id in indices
            }
        )

    def refusal(self) -> str:
        """Why the run must end; empty if it may go on."""
        lost = self.data.num_images_lost + len(self._reasons)
        total = self.data.num_images_lost + len(self.data)
        if lost <= self.drop_limit * total:
            return ""
        return (
            f"{self.data.source}: {lost:,} of the {total:,} images ({lost / total:.1%}) cannot be used, "
            f"{len(self._reasons):,} of them turned out so during training (the log and data_report.json name them); "
            f"data.drop_limit {self.drop_limit:g} allows no more. Replace them, or raise data.drop_limit, and go on "
            "with --resume"
        )


def _paths(data: CocoAnnotations) -> list[str]:
    """Where the images lie; the folder is resolved, its files are not: that takes a call for each."""
    root = os.path.realpath(data.folder)
    return [os.path.normpath(f"{root}/{name}") for name in data.names()]
