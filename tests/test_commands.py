"""Every command that the documents show is run, in a folder where the files that it names exist.

Trainings are made small by overrides that are added to those of the command; before that, the config is read exactly as
the command has it. `torchrun` starts two processes whatever the number shown. What cannot be run is in `NOT_RUN`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from fpn_det.config import load_config
from fpn_det.structures import InputError

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "NOTES.md", "data/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = ("python", "torchrun", "make", "tensorboard", "pip", "sbatch", "git")

NOT_RUN = {
    "git clone": "needs a network",
    "python -m venv": "each run of CI does it",
    "python -m pytest": "is what runs this",
    "python benchmarks/": "takes minutes to an hour; tests/test_benchmarks.py has their parts",
    "sbatch": "tests/soak/test_processes.py::test_the_slurm_script runs it",
    "make test": "is what runs this",
    "make soak": "takes half an hour",
    "make lint": "each run of CI does it",
}

SMALL_MODEL = {
    "model.backbone.name": "resnet18",
    "model.backbone.weights": "none",
    "model.backbone.norm": "bn",
    "model.backbone.frozen_stages": 0,
    "model.neck.channels": 16,
    "model.rpn.pre_nms_top_k_train": 50,
    "model.rpn.post_nms_top_k_train": 50,
    "model.rpn.pre_nms_top_k_test": 50,
    "model.rpn.post_nms_top_k_test": 50,
    "model.roi_head.num_samples": 32,
    "model.roi_head.box_head.fc_dim": 32,
}
SMALL_RUN = {
    "data.train.images": "data/mine/train",
    "data.train.annotations": "data/mine/train.json",
    "data.val.images": "data/mine/val",
    "data.val.annotations": "data/mine/val.json",
    "data.short_sides": "[64]",
    "data.test_short_side": 64,
    "data.long_side": 64,
    "data.num_workers": 0,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.accumulate": 1,
    "eval.batch_size": 8,
}


def commands() -> Iterator[tuple[str, str]]:
    """Where a command stands, and the command."""
    for path in DOCUMENTS:
        where = str(path.relative_to(ROOT))
        text = path.read_text(encoding="utf-8")
        fence = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
        for language, block in fence.findall(text):
            if language in ("", "bash"):
                yield from ((where, line) for line in lines_of(block))
        for span in re.findall(r"`([^`\n]+)`", fence.sub("", text)):
            if re.match(r"python tools/|make \w|tensorboard ", span):
                yield where, span


def lines_of(block: str) -> Iterator[str]:
    """The commands in a fenced block."""
    for line in block.replace("\\\n", " ").split("\n"):
        for command in re.split(r" && ", re.sub(r"(^|\s)#.*", "", line.strip())):
            if command.split(" ")[0] in PROGRAMS:
                yield command.strip()


COMMANDS = list(dict.fromkeys(commands()))


def test_commands_are_found():
    assert len(COMMANDS) > 40
    assert {where for where, _ in COMMANDS} >= {"README.md", "data/README.md"}


@pytest.fixture(scope="module")
def checkout(shapes: Path, tool, tmp_path_factory) -> Path:
    """A folder as that of a user who followed the documents so far."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("tools", "fpn_det", "Makefile", "requirements.txt", "pyproject.toml", "benchmarks", "docs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    mine = folder / "data/mine"
    mine.mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(shapes / split, mine / split)
        shutil.copy(shapes / f"annotations/{split}.json", mine / f"{split}.json")
    (folder / "configs/mine.yaml").write_text("data: {keep_empty: true}\n")
    shutil.copytree(shapes / "val", folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = [f"{key}={value}" for key, value in (SMALL_MODEL | SMALL_RUN).items()]
        assert tool("train", "--config", "configs/mine.yaml", *small, "eval.every=1").code == 0
        shutil.copytree("runs/mine", "runs/other")
    return folder


@pytest.fixture
def copy(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a command may write to; the current folder, too."""
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder, symlinks=True, copy_function=os.link)  # files are replaced, not written into
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[f"{w}: {c}" for w, c in COMMANDS])
def test_command(where: str, command: str, copy: Path, tool: Callable) -> None:
    assert not re.search(r"\.\.\. |\.\.\.$|\[|(^|[ =])[A-Z]+\b(?!=)", re.sub(r"=\[.*?\]|HOST:", "", command)), (
        f"{where}: a placeholder cannot be run; use the names of tests/test_commands.py"
    )
    if any(command.startswith(start) for start in NOT_RUN):
        return
    program, *words = shlex.split(command)
    match program:
        case "python" | ".venv/bin/python":
            run_tool(words, copy, tool)
        case "torchrun":
            run_torchrun(words)
        case "make":
            run_make(words, copy, tool)
        case "pip":
            check_pip(words)
        case "tensorboard":
            serve([sys.executable, "-m", "tensorboard.main", *words, "--port", "0"])
        case _:
            raise AssertionError(f"do not know how to run {program}")


def run_tool(words: list[str], folder: Path, tool: Callable) -> None:
    name, arguments = Path(words[0]).stem, words[1:]
    assert words[0] == f"tools/{name}.py"
    arguments = made_small(arguments)
    if name == "demo":
        serve([sys.executable, *words[:1], *arguments, "--port", "0"])
        return
    if name == "train" and "--resume" not in arguments:
        config = load_config(Path(arguments[arguments.index("--config") + 1]))
        shutil.rmtree(folder / "runs" / config.name, ignore_errors=True)
    outcome = tool(name, *arguments)
    allowed = (0, 1) if name == "check_data" else (0,)  # 1: there are problems, with which training goes on
    assert outcome.code in allowed, outcome.err or outcome.out


def made_small(arguments: list[str]) -> list[str]:
    """The arguments of a tool with overrides that make a run small, where the tool takes a config."""
    if "--config" not in arguments and "--checkpoint" not in arguments:
        return arguments
    overrides = [a for a in arguments if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", a)]
    rest = [a for a in arguments if a not in overrides]
    if "--config" not in arguments:
        return [*rest, *overrides]
    path = Path(arguments[arguments.index("--config") + 1])
    load_config(path, overrides)  # what the command says is right as it stands
    imported = path.parts[0] == "weights"
    small = SMALL_RUN | ({} if imported else SMALL_MODEL)
    kept = [o for o in overrides if o.partition("=")[0] not in {*small, "train.epochs"}]
    added = [f"{key}={value}" for key, value in small.items()]
    return [*rest, *kept, *(one for one in added if is_accepted(path, kept, one))]


def is_accepted(path: Path, overrides: list[str], one: str) -> bool:
    """Whether a config takes another override; models of other kinds have other keys."""
    try:
        load_config(path, [*overrides, one])
    except InputError as error:
        if "not a key of" in str(error):
            return False
    return True


def run_torchrun(words: list[str]) -> None:
    options = get_args_parser().parse_args(words)
    script = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", options.training_script]
    arguments = made_small(options.training_script_args)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    arguments += ["--output-dir", "runs/of_torchrun"] if options.training_script.endswith("train.py") else []
    done = subprocess.run(
        [sys.executable, *script, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_make(words: list[str], folder: Path, tool: Callable) -> None:
    shown = subprocess.run(["make", "-n", *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    steps = [c for line in shown.replace("\\\n", " ").split("\n") if "tools/" in (c := line.strip()) and c[0] == "."]
    assert steps
    for step in steps:
        _, *arguments = shlex.split(step)
        run_tool(arguments, folder, tool)


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for word in words[1:]:
        named = re.search(r"\[(.*)\]", word)
        assert named is None or set(named[1].split(",")) <= extras.keys(), word
        assert not word.endswith(".txt") or (ROOT / word).exists(), word


def serve(command: list[str]) -> None:
    """Start a server, open its page, end it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as server:
        try:
            assert server.stdout is not None
            said = ""
            while not (address := re.search(r"http://[\w.]+:\d+", said)):
                line = server.stdout.readline()
                assert line, said
                said += line
            url = address[0].replace("localhost", "127.0.0.1")
            with urllib.request.urlopen(url, timeout=60) as page:
                assert page.status == 200
        finally:
            server.terminate()
