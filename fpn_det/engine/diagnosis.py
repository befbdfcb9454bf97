"""Steps whose loss or gradient is not finite: what is known of them, how many are too many, and why they fail.

Dimensions: N images of a micro-batch, G ground-truth boxes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from fpn_det.structures import Batch, InputError

WINDOW_STEPS = 1000
"""The limit holds for the skipped steps among this many."""
THIN_PX = 1.0
"""Boxes with a side below this, in the resized image, are named as suspicious."""


class Diverged(InputError):
    """Too many steps had to be skipped.

    Attributes:
        diagnosis: what is known, as plain data.
    """

    def __init__(self, message: str, diagnosis: dict[str, Any]) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedStep:
    """A step that was skipped, as one process or, once they are `merged`, all of them saw it.

    Attributes:
        step: its number, as the log counts: the first is 1.
        lr: learning rate.
        losses: of the process, mean over its micro-batches.
        gradient_norms: of each part of the model, and `total`.
        loss_scale: what the loss was multiplied by (fp16).
        counts: whether the step counts: at a large loss scale the gradients of fp16 overflow as a matter of course.
        batches: the micro-batches, on the CPU.
    """

    step: int
    lr: float
    losses: Mapping[str, float]
    gradient_norms: Mapping[str, float]
    loss_scale: float
    counts: bool
    batches: Sequence[Batch]

    def culprits(self) -> list[str]:
        """The losses that are not finite, else the parts of the model whose gradient is not."""
        losses = [name for name, value in self.losses.items() if not math.isfinite(value) and name != "loss"]
        parts = [name for name, value in self.gradient_norms.items() if not math.isfinite(value) and name != "total"]
        return [f"{name} is {self.losses[name]}" for name in losses] or [
            f"the gradient of {name} is {self.gradient_norms[name]}" for name in parts
        ]

    def image_ids(self) -> list[int]:
        """The images of all micro-batches."""
        return [image_id for batch in self.batches for image_id in batch.image_ids.tolist()]

    def summary(self) -> str:
        """One line."""
        scale = f", loss scale {self.loss_scale:g}" if self.loss_scale != 1 else ""
        ids = ", ".join(map(str, self.image_ids()))
        return f"step {self.step} skipped: {', '.join(self.culprits())} (lr {self.lr:.3g}{scale}; images {ids})"

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data; boxes are XYXY in pixels of the resized images."""
        images = []
        for batch in self.batches:
            targets = batch.targets
            for i, image_id in enumerate(batch.image_ids.tolist()):
                boxes, labels = targets.boxes[i, targets.valid[i]], targets.labels[i, targets.valid[i]]
                images.append(
                    {
                        "id": image_id,
                        "original_size_hw": batch.original_sizes[i].tolist(),
                        "resized_size_hw": batch.sizes[i].tolist(),
                        "boxes": boxes.tolist(),
                        "labels": labels.tolist(),
                    }
                )
        return {
            "step": self.step,
            "lr": self.lr,
            "loss_scale": self.loss_scale,
            "losses": _as_json(self.losses),
            "gradient_norms": _as_json(self.gradient_norms),
            "images": images,
        }


def merged(of_processes: Sequence[Sequence[FailedStep]]) -> list[FailedStep]:
    """Failed steps as all processes saw them, one list each: the losses and batches of those that are to blame.

    The gradient is that of all processes, so a loss that is not finite tells which one had the cause; where none has,
    all may have had it.
    """
    steps = []
    for same in zip(*of_processes, strict=True):
        guilty = [f for f in same if not all(map(math.isfinite, f.losses.values()))] or list(same)
        steps.append(replace(guilty[0], batches=[batch for f in guilty for batch in f.batches]))
    return steps


class SkippedSteps:
    """Counts the steps that were skipped, and ends the run beyond a limit.

    Args:
        limit: the most that may be skipped among `WINDOW_STEPS` steps.
        state: of an earlier part of the run (`state_dict`).

    Attributes:
        count: all that were skipped in this run.
    """

    def __init__(self, *, limit: int, state: Mapping[str, Any] | None = None) -> None:
        self.limit = limit
        self.count: int = state["count"] if state else 0
        self._recent: list[int] = list(state["recent"]) if state else []
        self._failed: list[FailedStep] = []
        self._history: deque[tuple[int, float, float]] = deque(maxlen=50)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"count": self.count, "recent": list(self._recent)}

    def note(self, step: int, *, loss: float, grad_norm: float) -> None:
        """Note the means of the good steps since the last record."""
        self._history.append((step, loss, grad_norm))

    def add(self, failed: Sequence[FailedStep], *, precision: str, weights_finite: bool) -> None:
        """Count failed steps.

        Args:
            failed: all since the last call, in order, of all processes (`merged`).
            precision: of the run.
            weights_finite: whether all weights of the model are finite.

        Raises:
            Diverged: there are too many.
        """
        self.count += len(failed)
        first = failed[-1].step - WINDOW_STEPS + 1
        self._recent = [step for step in [*self._recent, *(f.step for f in failed if f.counts)] if step >= first]
        self._failed = [f for f in [*self._failed, *failed] if f.step >= first]
        if len(self._recent) <= self.limit and weights_finite:
            return
        causes = likely_causes(self._failed, list(self._history), precision=precision, weights_finite=weights_finite)
        diagnosis = {
            "skipped_steps": self.count,
            "limit": self.limit,
            "likely_causes": causes,
            "means_before": [{"step": step, "loss": loss, "gradient_norm": norm} for step, loss, norm in self._history],
            "failed_steps": [f.as_dict() for f in self._failed],
        }
        raise Diverged(
            f"training diverged: {len(self._recent)} of the last {WINDOW_STEPS:,} steps had a loss or gradient that is "
            f"not finite (train.max_skipped {self.limit}), first {self._failed[0].summary()}. Most likely: "
            f"{causes[0]['cause']} ({causes[0]['evidence']}). {causes[0]['remedy']}. diagnosis.json has more",
            diagnosis,
        )


def likely_causes(
    failed: Sequence[FailedStep],
    history: Sequence[tuple[int, float, float]],
    *,
    precision: str,
    weights_finite: bool,
) -> list[dict[str, str]]:
    """Why steps fail, the likeliest first: cause, evidence and remedy of each.

    Args:
        failed: the steps, in order.
        history: (step, loss, norm of the gradient) means of good steps before, in order.
        precision: of the run.
        weights_finite: whether all weights of the model are finite.
    """
    found: list[tuple[float, dict[str, str]]] = []

    def add(likelihood: float, cause: str, evidence: str, remedy: str) -> None:
        found.append((likelihood, {"cause": cause, "evidence": evidence, "remedy": remedy}))

    if not weights_finite:
        add(
            1.0,
            "weights that are not finite",
            "some weight of the model is NaN or infinite",
            "Look at what the run started from (model.backbone.weights), or resume from an earlier step_*.pth",
        )

    in_a_row = all(b.step - a.step == 1 for a, b in pairwise(failed))
    shared = set.intersection(*(set(f.image_ids()) for f in failed)) if len(failed) > 1 else set()
    thin = sorted({image_id for f in failed for image_id in _thin_boxes(f)})
    named = sorted(shared) or thin
    if named:
        add(
            0.9 if shared and not in_a_row else 0.5,
            "images whose boxes break a loss",
            f"images {', '.join(map(str, named[:10]))} "
            + ("are in every failed step" if shared else f"have boxes thinner than {THIN_PX:g} pixel once resized"),
            "Look at them: python tools/check_data.py, and their boxes in diagnosis.json; correct or remove them",
        )

    losses = [loss for _, loss, _ in history]
    norms = [norm for _, _, norm in history]
    rising = [
        f"{name} rose from {statistics.median(values[:-1]):.3g} (median) to {values[-1]:.3g} before it failed"
        for name, values in (("the loss", losses), ("the gradient's norm", norms))
        if len(values) > 2 and values[-1] > 3 * statistics.median(values[:-1])
    ]
    add(
        0.95 if rising else 0.8 if in_a_row and len(failed) > 2 else 0.4,
        "a learning rate that is too high",
        "; ".join(rising)
        if rising
        else f"{len(failed)} failed steps{' in a row' if in_a_row else ''}, lr {failed[-1].lr:.3g}",
        f"Lower optim.lr (now {failed[-1].lr:.3g} at this step), lengthen optim.warmup_steps or set optim.clip_norm",
    )
    if precision == "fp16":
        forward = any(not math.isfinite(f.losses.get("loss", 0.0)) for f in failed)
        add(
            0.85 if forward else 0.6,
            "overflow in float16",
            "the loss itself is not finite, whatever its scale"
            if forward
            else "gradients overflow at a loss scale of 1",
            "Set train.precision=bf16, or fp32",
        )
    return [cause for _, cause in sorted(found, key=lambda pair: -pair[0])]


def _thin_boxes(failed: FailedStep) -> list[int]:
    """Ids of images with a box that is thinner than `THIN_PX`, or not finite."""
    ids = []
    for batch in failed.batches:
        boxes, valid = batch.targets.boxes, batch.targets.valid
        sides = (boxes[..., 2:] - boxes[..., :2]).amin(-1)
        bad = (valid & ~(sides >= THIN_PX)).any(1)
        ids += batch.image_ids[bad].tolist()
    return ids


def _as_json(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
