"""Fixtures that several test files share."""

import contextlib
import io
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch

from fpn_det.data.shapes import generate

ROOT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs where the tests that need one are left out, as by default: others fork, or compare to the bit."""
    if "not cuda" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """Tests write nothing to the user's cache, and find nothing there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """A process that was started in the background may ignore SIGINT from the start."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real images and annotations, named by the environment variable FPN_DET_TEST_DATA."""
    folder = os.environ.get("FPN_DET_TEST_DATA")
    if not folder:
        pytest.skip("FPN_DET_TEST_DATA is not set: it names the folder of real data for tests")
    return Path(folder)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A generated data set of 24 + 8 images of 64 pixels."""
    folder = tmp_path_factory.mktemp("shapes")
    generate(folder, num_train=24, num_val=8, size=64)
    return folder


@pytest.fixture(scope="session")
def tiny(shapes) -> list[str]:
    """`--config` and overrides that make the quickstart small enough for a test: 8 steps of 4 images."""
    overrides = {
        "data.train.images": shapes / "train",
        "data.train.annotations": shapes / "annotations/train.json",
        "data.val.images": shapes / "val",
        "data.val.annotations": shapes / "annotations/val.json",
        "data.short_sides": "[64]",
        "data.test_short_side": 64,
        "data.long_side": 64,
        "data.num_workers": 0,
        "model.neck.channels": 16,
        "model.rpn.pre_nms_top_k_train": 50,
        "model.rpn.post_nms_top_k_train": 50,
        "model.rpn.pre_nms_top_k_test": 50,
        "model.rpn.post_nms_top_k_test": 50,
        "model.roi_head.num_samples": 32,
        "model.roi_head.box_head.fc_dim": 32,
        "optim.warmup_steps": 2,
        "train.steps": 8,
        "train.batch_size": 4,
        "train.log_every": 1,
        "eval.tensorboard_images": 1,
    }
    return ["--config", str(ROOT / "configs/quickstart.yaml"), *(f"{k}={v}" for k, v in overrides.items())]


@dataclass(frozen=True)
class Outcome:
    """What a command-line tool did."""

    code: int
    out: str
    err: str


Tool = Callable[..., Outcome]


@pytest.fixture(scope="session")
def tool() -> Tool:
    """Run tools/NAME.py with these arguments, in this process and the current folder."""
    torch.set_num_threads(1)  # sums then do not depend on how the work is split

    def run(name: str, *arguments: object) -> Outcome:
        out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
        sys.argv = [name, *map(str, arguments)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        finally:
            sys.argv = argv
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium (a `playwright.sync_api.Browser`): the system's, or the one that `playwright install` got."""
    from playwright.sync_api import Error, sync_playwright  # a second that only tests with a browser spend

    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    sandbox = () if os.geteuid() else ("--no-sandbox",)  # which Chromium refuses to use as root
    manager = sync_playwright()
    with manager as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=which("chromium"), args=[*quiet, *sandbox])
        except Error as error:
            pytest.skip(f"no browser: install the package chromium, or run `playwright install chromium` ({error})")
        yield chromium
        chromium.close()
        # It would wait for the end of a pipe, which processes hold that were forked meanwhile and still live, as the
        # workers of a loader do that a failed test left behind.
        manager._client._transport._proc.kill()
