"""Checkpoints: written atomically, checked by their sums, read without executing code, refused with a reason.

A run's folder holds `step_NNNNNNNN.pth` (the last few; everything that resuming needs), `best.pth` (highest validation
AP) and `final.pth` (weights for use). All have the keys `model`, `categories`, `config` (YAML), `step` and `versions`;
the step files add `optimizer`, `stream` (what decides which images come next), `skipped` (steps) and, where there are
such, `ema` and `scaler`.

Random numbers need no state: those of a step are a function of the run's seed, the step and the image.
"""

from __future__ import annotations

import platform
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from fpn_det.files import replacing
from fpn_det.structures import Categories, InputError, printable

State = dict[str, Any]


class DamagedCheckpoint(InputError):
    """The content of a checkpoint is not what was written."""


def save_checkpoint(path: Path, state: State) -> None:
    """Write `state` so that `path` holds either its old content or all of the new, whatever happens meanwhile.

    Args:
        path: the file.
        state: tensors and plain data.

    Raises:
        InputError: it cannot be written.
    """
    with replacing(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> State:
    """Read a checkpoint to the CPU.

    Raises:
        InputError: the file is missing or not one of ours; `DamagedCheckpoint` if it is damaged.
    """
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        nearby = sorted(p.name for p in folder.glob("*.pth"))
        hint = f"{folder} holds {', '.join(nearby)}" if nearby else "give the path of a .pth file that training wrote"
        raise InputError(f"{path}: no such checkpoint; {hint}")
    try:
        _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError as error:  # says nothing about the file
        raise InputError(f"{path}: not enough memory to read it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # zipfile and the unpickler meet other files with nearly any exception
        reason = error if isinstance(error, ValueError) else type(error).__name__  # torch advises to run what is in it
        raise DamagedCheckpoint(
            f"{path}: damaged, or not a checkpoint of tensors and plain data ({reason}). Use another; training with "
            "--resume takes the newest step_*.pth that is whole"
        ) from error
    missing = {"model", "categories", "config", "step"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise InputError(f"{path}: not a checkpoint of fpn_det (it lacks {', '.join(sorted(missing))})")
    return state


def _check_sums(path: Path) -> None:
    """Compare the content with the CRC-32 that `torch.save` writes along with each tensor; `torch.load` does not.

    Raises:
        ValueError, zipfile.BadZipFile: they differ, or it is no such file.
    """
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError(
                "a compressed file, which torch.save does not write"
            )  # and which could unpack to terabytes
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} differs")


def versions() -> dict[str, str]:
    """What wrote a checkpoint: bits are promised for the same versions and number of threads only."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "threads": str(torch.get_num_threads()),  # sums on CPUs depend on how the work is split
    }


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
            f"{path} was trained on {_described(own)}, but {source} has {_described(categories)}. "
            "Use a data set with the same categories"
        )


def _described(categories: Categories) -> str:
    names, ids = (", ".join(map(printable, map(str, some[:8]))) for some in (categories.names, categories.ids))
    more = ", .." if len(categories) > 8 else ""
    return f"{len(categories)} classes ({names}{more}; ids {ids}{more})"


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
