"""Packages that only some commands need, imported late; one that is missing says the command that installs it."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Literal

from fpn_det.structures import InputError

Extra = Literal["report", "export", "video", "demo", "supervision"]
"""The groups of `[project.optional-dependencies]` in pyproject.toml."""


def require(module: str, *, extra: Extra, purpose: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: its name, as in `import`.
        extra: the group that installs it.
        purpose: what cannot be done without it, as the start of a sentence ("Writing a report").

    Raises:
        InputError: it is not installed; any other error of the import is raised as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, something that it needs is not
        raise InputError(
            f"{purpose} needs the package {package}, which is not installed: pip install -e '.[{extra}]' in the folder "
            "that holds pyproject.toml"
        ) from error
