"""Optimisers, the learning-rate schedule and its scaling with the batch."""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


class MovingAverage:
    """An exponential moving average of a model's weights and buffers.

    `torch.optim.swa_utils.AveragedModel` does the same, but copies from the host, and so waits for a GPU, at each step.

    Args:
        model: the model; its state after the first update is where the average begins.
        decay: weight of the average against that of the new values, per update.
        num_updates: that were made before.

    Attributes:
        module: a copy of the model that holds the average.
    """

    def __init__(self, model: nn.Module, *, decay: float, num_updates: int = 0) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.num_updates = num_updates

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's values; counts are copied."""
        ours, theirs = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        pairs = list(zip(ours, theirs, strict=True))
        averages, values = zip(*[pair for pair in pairs if pair[0].is_floating_point()], strict=True)
        if self.num_updates == 0:
            torch._foreach_copy_(averages, values)
        else:
            torch._foreach_lerp_(averages, values, 1 - self.decay)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)
        self.num_updates += 1


class RunningStatistics:
    """The running statistics of batch norms: a step that is skipped must not leave its NaN there.

    Args:
        model: in which to look for them.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self.tensors = [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]

    def keep(self) -> None:
        """Note the values before a step."""
        if self.tensors:
            self._before = torch.cat(self.tensors)

    @torch.no_grad()
    def restore_unless(self, finite: Tensor) -> None:
        """Go back to the noted values unless `finite`, a bool on the device, which is not waited for."""
        if self.tensors:
            values = torch.where(finite, torch.cat(self.tensors), self._before)
            torch._foreach_copy_(self.tensors, values.split([len(t) for t in self.tensors]))


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Update the weights unless the gradient is not `finite` (bool, on the device).

    A fused optimiser decides on the device, in the way that `torch.amp.GradScaler` uses it; others wait for it.
    """
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()


NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def make_optimizer(
    model: nn.Module,
    *,
    kind: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    norm_weight_decay: float,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """An optimiser over the trainable parameters, with a decay of its own for the affine parameters of norms.

    Args:
        model: the detector.
        kind: `sgd` or `adamw`.
        lr: learning rate at the peak of the schedule.
        momentum: of SGD; AdamW keeps its betas (0.9, 0.999).
        weight_decay: of weights and biases.
        norm_weight_decay: of the scales and shifts of normalisation layers.
        fused: whether to update all parameters in one kernel.
    """
    norm_ids = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in norm_ids], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in norm_ids], "weight_decay": norm_weight_decay},
    ]
    groups = [group for group in groups if group["params"]]
    if kind == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused)
        if momentum > 0:  # else a first step that is skipped would leave them uninitialised
            for parameter in trainable:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    raise ValueError(f"kind must be 'sgd' or 'adamw', not {kind!r}")


def lr_factor(
    step: int,
    *,
    num_steps: int,
    schedule: str,
    milestones: Sequence[float],
    gamma: float,
    warmup_steps: int,
    warmup_factor: float,
) -> float:
    """What the peak learning rate is multiplied by at `step`: a pure function, so that a resumed run needs no state.

    Args:
        step: 0..num_steps - 1.
        num_steps: length of the run.
        schedule: `step` (times `gamma` at each milestone) or `cosine` (to zero at the end).
        milestones: fractions of the run, ascending.
        gamma: factor per milestone.
        warmup_steps: steps of linear warm-up, on top of the schedule.
        warmup_factor: where the warm-up begins.
    """
    if schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    elif schedule == "step":
        factor = gamma ** bisect.bisect_right([round(m * num_steps) for m in milestones], step)
    else:
        raise ValueError(f"schedule must be 'step' or 'cosine', not {schedule!r}")
    if step < warmup_steps:
        factor *= warmup_factor + (1 - warmup_factor) * step / warmup_steps
    return factor


def scaled_lr(lr: float, *, batch_size: int, base_batch_size: int) -> float:
    """The learning rate for the actual batch size (linear scaling rule, Goyal et al., arXiv 1706.02677)."""
    return lr * batch_size / base_batch_size
