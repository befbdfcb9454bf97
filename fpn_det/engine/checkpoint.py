"""Checkpoints: written atomically, read without executing code, refused with a reason.

A run's folder holds `step_NNNNNNNN.pth` (the last few; everything that resuming needs), `best.pth` (highest validation
AP) and `final.pth` (weights for use). All have the keys `model`, `categories`, `config` (YAML) and `step`; the step
files add `optimizer` and, with a moving average, `ema`.
"""

from __future__ import annotations

import os
import pickle
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
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
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
        nearby = sorted(p.name for p in path.parent.glob("*.pth")) if path.parent.is_dir() else []
        hint = f"; that folder holds {', '.join(nearby)}" if nearby else ""
        raise InputError(f"{path}: no such checkpoint{hint}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: damaged, or not a PyTorch checkpoint ({reason})") from error
    missing = {"model", "categories", "config", "step"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise InputError(f"{path}: not a checkpoint of fpn_det (it lacks {', '.join(sorted(missing))})")
    return state


def checkpoint_categories(state: State) -> Categories:
    """The class map that the weights were trained with."""
    return Categories.from_state_dict(state["categories"])


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
