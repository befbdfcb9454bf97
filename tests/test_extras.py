"""Packages that only some commands need."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from fpn_det.extras import Extra, require
from fpn_det.structures import InputError

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def test_a_package_that_is_there_is_imported() -> None:
    assert require("json.decoder", extra="report", purpose="Reading") is sys.modules["json.decoder"]


def test_a_missing_package_says_the_command() -> None:
    with pytest.raises(InputError, match=r"Drawing needs the package no_such_thing.*pip install -e '\.\[report\]'"):
        require("no_such_thing.part", extra="report", purpose="Drawing")


def test_a_package_that_is_broken_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("import no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        require("broken_package", extra="report", purpose="Drawing")


def test_every_extra_exists() -> None:
    assert set(get_args(Extra)) | {"dev", "all"} == PROJECT["optional-dependencies"].keys()


def test_dev_has_what_the_extras_have() -> None:
    groups = PROJECT["optional-dependencies"]
    everything = [line for name in get_args(Extra) for line in groups[name]]
    assert sorted(groups["all"]) == sorted(everything)
    assert "fpn_det[all]" in groups["dev"]


WITHOUT_EXTRAS = """
import importlib, pathlib, pkgutil, runpy, sys

import torchvision  # which looks for some of them, too, but does not need them


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
import fpn_det

for module in pkgutil.walk_packages(fpn_det.__path__, "fpn_det."):
    if module.name != "fpn_det.demo.app":  # which tools/demo.py imports after it has looked
        importlib.import_module(module.name)
for tool in pathlib.Path("tools").glob("*.py"):
    runpy.run_path(str(tool), run_name="imported")
fpn_det.Detector
"""


def test_everything_can_be_imported_without_the_extras() -> None:
    names = ["matplotlib", "onnx", "onnxruntime", "onnxscript", "cv2", "starlette", "uvicorn", "supervision", "anyio"]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *names], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
