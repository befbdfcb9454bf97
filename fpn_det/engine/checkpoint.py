"""Checkpoints: written atomically, read without executing code, refused with a reason.

A run's folder holds `step_NNNNNNNN.pth` (the last few; everything that resuming needs), `best.pth` (highest validation
AP) and `final.pth` (weights for use). All have the keys `model`, `categories`, `config` (YAML) and `step`; the step
files add `optimizer` and, with a moving average, `ema`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpn_det.structures import Categories, InputError

State = dict[str, Any]


def save_checkpoint(path: Path, state: State) -> None:
    """Write `state` so that `path` holds either its old content or all of the new, whatever happens meanwhile.

    Args:
        path: the file.
        state: tensors and plain data.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk is not made fuller
    folder = os.open(path.parent, os.O_RDONLY)  # the rename is durable once the folder is
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path) -> State:
    """Read a checkpoint to the CPU.

    Raises:
        InputError: the file is missing, damaged or not one of ours.
    """
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        nearby = sorted(p.name for p in folder.glob("*.pth"))
        hint = f"{folder} holds {', '.join(nearby)}" if nearby else "give the path of a .pth file that training wrote"
        raise InputError(f"{path}: no such checkpoint; {hint}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets other files with nearly any exception
        raise InputError(
            f"{path}: damaged, or not a checkpoint of tensors and plain data ({type(error).__name__}). Use another; "
            "a run whose last step_*.pth is deleted resumes from the one before"
        ) from error
    missing = {"model", "categories", "config", "step"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise InputError(f"{path}: not a checkpoint of fpn_det (it lacks {', '.join(sorted(missing))})")
    return state


def checkpoint_categories(state: State) -> Categories:
    """The class map that the weights were trained with."""
    return Categories.from_state_dict(state["categories"])


def check_categories(state: State, path: Path, categories: Categories, source: Path) -> None:
    """Refuse a checkpoint whose classes are not those of the data set.

    Args:
        state: of the checkpoint.
        path: the checkpoint.
        categories: of the data set.
        source: the data set's annotation file.

    Raises:
        InputError: naming both and their classes.
    """
    own = checkpoint_categories(state)
    if own != categories:
        raise InputError(
            f"{path} was trained on {len(own)} classes ({', '.join(own.names[:8])}; ids {list(own.ids[:8])}), but "
            f"{source} has {len(categories)} ({', '.join(categories.names[:8])}; ids {list(categories.ids[:8])}). "
            "Use a data set with the same categories"
        )


def best_weights(state: State) -> dict[str, Tensor]:
    """The weights to detect with: the moving average where there is one."""
    weights: dict[str, Tensor] = state.get("ema") or state["model"]
    return weights


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        InputError: naming what does not fit.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    misfit = sorted(k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape)
    if missing or unexpected or misfit:
        examples = [f"{k} is missing" for k in missing[:2]] + [f"{k} is not expected" for k in unexpected[:2]]
        examples += [f"{k} is {tuple(weights[k].shape)}, expected {tuple(own[k].shape)}" for k in misfit[:2]]
        raise InputError(
            f"{source}: the checkpoint is of another architecture than the config "
            f"({len(missing)} tensors missing, {len(unexpected)} unexpected, {len(misfit)} of another shape: "
            f"{'; '.join(examples)}). Use the config.yaml that lies beside the checkpoint"
        )
    model.load_state_dict(weights)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: State, source: Path) -> None:
    """Load the moments of the parameters; rates and decays stay those of `optimizer`, which the config gave.

    Raises:
        InputError: the optimiser is of another kind, or trains other layers.
    """
    own = optimizer.state_dict()["param_groups"]
    # `betas`: only AdamW has them.
    kind, saved_kind = ([("betas" in g, len(g["params"])) for g in groups] for groups in (own, saved["param_groups"]))
    if kind != saved_kind:
        raise InputError(
            f"{source}: the optimiser's state does not fit optim.kind or the trained layers of the config (such as "
            "model.backbone.frozen_stages). Resume with the config.yaml that lies beside it, or start a run of its own"
        )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
    # Moments keep the memory format that they were saved in; fused optimisers go through memory side by side.
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def latest_checkpoint(folder: Path) -> Path | None:
    """The step checkpoint of highest step in `folder`, if any."""
    return max(folder.glob("step_*.pth"), default=None)


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step_{step:08d}.pth"


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` step checkpoints."""
    for path in sorted(folder.glob("step_*.pth"))[:-keep]:
        path.unlink()
