"""Files of strangers: nothing in them is executed, whatever they are given as; no call in the code could do it."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fpn_det import config
from fpn_det.config import load_config
from fpn_det.data.proposals import read_proposals
from fpn_det.engine.checkpoint import load_checkpoint
from fpn_det.models.backbone import read_classifier
from fpn_det.structures import InputError
from fpn_det.weights.read import read_weights

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path.relative_to(ROOT) for folder in ("fpn_det", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


# --- Hostile files ---


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def hostile_zip(value: Touch) -> bytes:
    file = io.BytesIO()
    torch.save({"model": value, "state_dict": value, "categories": [], "config": "", "step": 0}, file)
    return file.getvalue()


def hostile_stream(value: Touch) -> bytes:
    file = io.BytesIO()
    torch.save({"model": value, "state_dict": value}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def hostile_pickle(value: Touch) -> bytes:
    return pickle.dumps({"model": value, "state_dict": value}, 2)


def hostile_npz(value: Touch) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=True, version=np.array([value], dtype=object))
    return file.getvalue()


def hostile_yaml(value: Touch) -> bytes:
    return f"seed: !!python/object/apply:os.system ['touch {value.marker}']\n".encode()


ENTRANCES: dict[str, Callable[[Path], object]] = {
    "checkpoint": load_checkpoint,
    "body": lambda path: read_classifier("resnet18", str(path)),
    "import": read_weights,
    "proposals": read_proposals,
    "config": load_config,
}
HOSTILE: dict[str, Callable[[Touch], bytes]] = {
    "zip": hostile_zip,
    "stream": hostile_stream,
    "pickle": hostile_pickle,
    "npz": hostile_npz,
    "yaml": hostile_yaml,
}


@pytest.mark.parametrize("content", list(HOSTILE))
@pytest.mark.parametrize("entrance", list(ENTRANCES))
def test_no_entrance_executes_a_file(tmp_path: Path, entrance: str, content: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / f"evil.{content}"
    path.write_bytes(HOSTILE[content](Touch(marker)))
    with pytest.raises(InputError, match=r"evil\."):
        ENTRANCES[entrance](path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "load"),
    [
        ("zip", lambda path: torch.load(path, weights_only=False)),
        ("stream", lambda path: torch.load(path, weights_only=False)),
        ("pickle", lambda path: pickle.loads(path.read_bytes())),
        ("npz", lambda path: np.load(path, allow_pickle=True)["version"]),
        ("yaml", lambda path: yaml.load(path.read_text(), Loader=yaml.UnsafeLoader)),
    ],
)
def test_the_exploits_are_real(tmp_path: Path, content: str, load: Callable[[Path], object]) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil"
    path.write_bytes(HOSTILE[content](Touch(marker)))
    load(path)
    assert marker.exists()


def test_a_hostile_file_is_one_line_of_the_tool(tool, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "evil.pth").write_bytes(hostile_zip(Touch(marker)))
    (tmp_path / "evil.yaml").write_bytes(hostile_yaml(Touch(marker)))
    for name, *arguments in (
        ("train", "--config", tmp_path / "evil.yaml"),
        ("train", "--config", ROOT / "configs/quickstart.yaml", "seed=!!python/object/apply:os.getpid []"),
        ("import_weights", tmp_path / "evil.pth", tmp_path / "ours.pth"),
        ("predict", "--config", ROOT / "configs/quickstart.yaml", "--checkpoint", tmp_path / "evil.pth")
        + ("--input", ROOT / "docs/ablation.png", "--output", tmp_path / "out"),
    ):
        outcome = tool(name, *arguments)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
        assert outcome.err.startswith("error: ")
    assert not marker.exists()


# --- What people see ---


EVIL_NAMES = ["\x1b[2J\x1b]0;owned\x07", "cat\nstep 9: AP 99.9", "gpj.\u202etac", "\ud800", "a\0b", "<b>|`x`", "赤血球"]


def test_hostile_class_names_are_shown_escaped_and_written_exactly(tool, tmp_path: Path) -> None:
    truth = {
        "images": [{"id": 1, "file_name": "1.png", "height": 10, "width": 10}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": i, "bbox": [0, 0, 5, 5]} for i in range(len(EVIL_NAMES))
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(EVIL_NAMES)],
    }
    results = [{"image_id": 1, "category_id": i, "bbox": [0, 0, 5, 5], "score": 0.5} for i in range(len(EVIL_NAMES))]
    for name, content in (("gt.json", truth), ("results.json", results)):
        (tmp_path / name).write_text(json.dumps(content))
    outcome = tool(
        *("eval", "--config", ROOT / "configs/quickstart.yaml", "--predictions", tmp_path / "results.json"),
        f"data.val.annotations={tmp_path / 'gt.json'}",
    )
    assert outcome.code == 0, outcome.err
    lines = outcome.out.split("\n")
    assert all(line.isprintable() for line in lines)
    for shown in (
        r"\x1b[2J\x1b]0;owned\x07",
        r"cat\nstep 9: AP 99.9",
        r"gpj.\u202etac",
        r"\ud800",
        r"a\x00b",
        "<b>|`x`",
    ):
        assert sum(line.startswith(f"{shown} ") for line in lines) == 1, shown
    metrics = (tmp_path / "metrics.json").read_bytes()
    assert metrics.isascii()
    assert list(json.loads(metrics)["per_class"]) == EVIL_NAMES


# --- The code ---


FORBIDDEN_MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "pty", "telnetlib", "ftplib", "requests"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "yaml.unsafe_load"),
    *("yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "torch.jit.load", "torch.hub.load", "numpy.fromfile"),
    *("torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file", "pickle.load", "pickle.loads"),
    *("pickle.Unpickler", "pandas.read_pickle", "shutil.unpack_archive"),
}
NETWORK = ("urllib.request.", "http.client.", "socket.", "ftplib.", "ssl.create")
NETWORK_USERS = {
    "fpn_det/download.py": "fetches files",
    "tools/demo.py": "listens, to this machine alone unless it is told otherwise",
}
PRINTERS = {
    "fpn_det/cli.py": "say, and `interrupted`",
    "fpn_det/engine/runlog.py": "RunLog",
    "fpn_det/download.py": "escapes by itself",
    "fpn_det/data/shapes.py": "a path that the user gave",
    "fpn_det/engine/distributed.py": "escapes by itself",
    "tools/train.py": "a config, which YAML escapes",
}
"""Who may call `print`; all others call `fpn_det.cli.say`, which escapes."""


def violations(source: str, path: str) -> list[str]:
    """Calls that could execute a file, reach the network, or print what was not escaped."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # of this file -> of what it imports
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                names[alias.asname or root] = alias.name if alias.asname else root
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            modules = [node.module or ""]
        else:
            continue
        found += [name for name in modules if name.split(".")[0] in FORBIDDEN_MODULES]

    def full_name(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{full_name(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = {full_name(base) for base in node.bases}
            if bases & {"pickle.Unpickler", "pickle._Unpickler"} and path != "fpn_det/weights/read.py":
                found.append(node.name)
            continue
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            name in FORBIDDEN_CALLS
            or name.endswith((".get_state_dict", ".extractall"))
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name == "numpy.load" and given.get("allow_pickle") != "False")
            or (name == "yaml.load" and (path, given.get("Loader")) != ("fpn_det/config.py", "_Loader"))
            or (name.startswith(NETWORK) and path not in NETWORK_USERS)
            or (given.get("shell", "False") != "False")
            or (name == "print" and path.startswith(("fpn_det/", "tools/")) and path not in PRINTERS)
        ):
            found.append(f"{name} (line {node.lineno})")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_call_could_execute_a_file(path: Path) -> None:
    assert violations((ROOT / path).read_text(encoding="utf-8"), path.as_posix()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f, weights_only=False)",
        "from torch import load\nload(f, weights_only=flag)",
        "import numpy as np\nnp.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import pickle\npickle.loads(b)",
        "from pickle import load as read\nread(f)",
        "import pickle\nclass Mine(pickle.Unpickler): pass",
        "import marshal",
        "from joblib import load",
        "import yaml\nyaml.load(t, Loader=yaml.Loader)",
        "import yaml\nyaml.unsafe_load(t)",
        "eval(t)",
        "def f():\n    exec(t)",
        "import os\nos.system(t)",
        "import subprocess\nsubprocess.run(t, shell=True)",
        "import urllib.request\nurllib.request.urlopen(u)",
        "from urllib.request import urlopen as u\nu(a)",
        "import requests",
        "import http.client\nhttp.client.HTTPConnection(h)",
        "weights.get_state_dict(progress=True)",
        "import torch.hub\ntorch.hub.load_state_dict_from_url(u)",
        "archive.extractall(folder)",
        "print(name)",
    ],
)
def test_the_check_finds(source: str) -> None:
    assert len(violations(source, "fpn_det/data/coco.py")) == 1


def test_the_check_allows() -> None:
    source = (
        "import torch, yaml, pickle, subprocess\nimport numpy as np\n"
        "torch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)\npickle.dumps(v)\n"
        "model.eval()\nre.compile(p)\nsubprocess.run(['ls'])\njson.load(f)"
    )
    assert violations(source, "fpn_det/data/coco.py") == []
    assert len(SOURCES) > 60


def test_the_exceptions_are_what_they_are_trusted_to_be() -> None:
    assert issubclass(config._Loader, yaml.SafeLoader)
    assert set(PRINTERS) <= {path.as_posix() for path in SOURCES}
