"""What is in the data and what is wrong with it: as a table, and as data_report.json.

data_report.json:

    {"splits": {NAME: {
        "annotations": file, "images": folder,
        "refused": [reason, ...],                 # empty if this split can be used
        "num_images": {"in_file", "left_out", "with_boxes", "without_boxes"},
        "num_boxes": {"in_file", "crowd", "left_out", "clipped", "used"},
        "classes": [{"id", "name", "num_boxes"}, ...],
        "problems": [PROBLEM, ...]}, ...},        # all of them
     "between_splits": [PROBLEM, ...]}             # images that are in both

PROBLEM is {"file", "what", "id", "position", "value", "defect", "reason", "outcome", "remedy"}: the annotation file;
"file", "category", "image" or "annotation"; its id, or null; its place in the list of the file from 0, or null; what
the file says, in words; a name and words of the defect; "refused", "left out", "clipped" or "kept"; what to do.
A split that cannot be read at all has "refused" only. Boxes that are left out include those of images that are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.problems import Problem, as_record
from fpn_det.files import write_json


def write_report(
    path: Path,
    splits: Mapping[str, CocoAnnotations | None],
    *,
    refused: Mapping[str, Sequence[str]] | None = None,
    between: Sequence[Problem] = (),
) -> None:
    """Write data_report.json.

    Args:
        path: the file; its folder is made.
        splits: `train` and `val` with what was read of them, None where nothing could be.
        refused: why a split cannot be used, as `checks.train_refusals` and `val_refusals` say.
        between: problems of the splits together (`checks.compare_splits`).
    """
    refused = refused or {}
    content = {
        "splits": {
            name: {"refused": list(refused.get(name, ())), **(_split(data) if data is not None else {})}
            for name, data in splits.items()
        },
        "between_splits": [as_record(p, data.source) for data in [splits.get("val")] if data for p in between],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def format_counts(splits: Mapping[str, CocoAnnotations]) -> str:
    """A table of what is in the splits and what becomes of it, one column each."""
    columns = {
        name: {
            **{f"images: {key}": number for key, number in _num_images(data).items()},
            **{f"boxes: {key}": number for key, number in _num_boxes(data).items()},
            "classes": len(data.categories),
        }
        for name, data in splits.items()
    }
    keys = next(iter(columns.values()), {})
    rows = [[key.replace("_", " "), *(f"{column[key]:,}" for column in columns.values())] for key in keys]
    return "\n".join(f"{row[0]:<24}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in [["", *columns], *rows])


def _split(data: CocoAnnotations) -> dict[str, Any]:
    counts = torch.bincount(data.labels, minlength=len(data.categories)).tolist()
    classes = zip(data.categories.ids, data.categories.names, counts, strict=True)
    return {
        "annotations": str(data.source),
        "images": str(data.folder),
        "num_images": _num_images(data),
        "num_boxes": _num_boxes(data),
        "classes": [{"id": i, "name": name, "num_boxes": count} for i, name, count in classes],
        "problems": [as_record(p, data.source) for p in data.problems],
    }


def _num_images(data: CocoAnnotations) -> dict[str, int]:
    left_out = sum(p.defect.what == "image" and p.defect.outcome == "left out" for p in data.problems)
    with_boxes = int((data.box_offsets.diff() > 0).sum())
    return {
        "in_file": data.num_images_in_file,
        "left_out": left_out,
        "with_boxes": with_boxes,
        "without_boxes": data.num_images_in_file - left_out - with_boxes,
    }


def _num_boxes(data: CocoAnnotations) -> dict[str, int]:
    return {
        "in_file": data.num_annotations,
        "crowd": data.num_crowd,
        "left_out": data.num_boxes_lost,
        "clipped": sum(p.defect.outcome == "clipped" for p in data.problems),
        "used": len(data.boxes),
    }
