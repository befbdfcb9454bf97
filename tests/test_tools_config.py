"""tools/config.py: where values come from, what differs, and the files that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fpn_det.config import dump_config, load_config, trace_config
from fpn_det.engine.checkpoint import save_checkpoint
from fpn_det.schema import config_reference, config_schema

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
QUICKSTART = ROOT / "configs/quickstart.yaml"


def comments(text: str) -> dict[str, str]:
    """Dotted key -> comment, of what `show` prints."""
    found: dict[str, str] = {}
    path: list[str] = []
    for line in text.splitlines():
        code, _, comment = line.partition(" # ")
        key = code.partition(":")[0]
        path = [*path[: (len(key) - len(key.lstrip())) // 2], key.strip()]
        if comment:
            found[".".join(path)] = comment
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of the quickstart with another learning rate."""
    config = load_config(QUICKSTART, ["optim.lr=0.5"])
    state = {"model": {"a": torch.zeros(1)}, "categories": [], "config": dump_config(config), "step": 1}
    save_checkpoint(tmp_path / "best.pth", state)
    return tmp_path / "best.pth"


def test_origins() -> None:
    text = "optim: {lr: 1, kind: sgd}\ntrain: {epochs: 3}\nmodel: {neck: {top_down: true, channels: 64}}"
    overrides = ["optim.lr=2", "train.steps=9", "model.neck.kind=pafpn", "data.val={images: x}"]
    config, origins = trace_config(text, source="f.yaml", name="f", overrides=overrides)
    assert (config.optim.lr, config.train.steps, config.train.epochs) == (2, 9, None)
    assert origins == {
        "name": "f.yaml",
        "optim.lr": "command line",
        "optim.kind": "f.yaml",
        "train.steps": "command line",  # and the file's epochs are gone, as is top_down, which PAFPN lacks
        "model.neck.channels": "f.yaml",
        "model.neck.kind": "command line",
        "data.val.images": "command line",
    }


def test_show_says_where_each_value_comes_from(tool) -> None:
    outcome = tool("config", "show", QUICKSTART, "optim.lr=0.01", "train.epochs=3", "model.roi_head.kind=cascade")
    assert outcome.code == 0, outcome.err
    found = comments(outcome.out)
    assert found["optim.lr"] == "command line (default 0.02)"
    assert found["optim.momentum"] == "default"
    assert found["model.backbone.name"] == f"{QUICKSTART} (default resnet50)"
    assert found["model.backbone.weights"] == f"{QUICKSTART} (default IMAGENET1K_V1)"
    assert found["name"] == str(QUICKSTART)
    assert found["train.epochs"] == "command line (default none)"
    assert found["train.steps"] == "follows from others (default 90000)"
    assert found["model.roi_head.class_agnostic"] == "default"  # of the cascade, where it is true
    assert found["model.roi_head.stages"] == "default"
    assert found["data.train.images"] == f"{QUICKSTART} (default data/coco/train2017)"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_show_prints_is_the_config(tool, tmp_path: Path, path: Path) -> None:
    outcome = tool("config", "show", path, "data.val.images='a # b: [c'")
    (tmp_path / "shown.yaml").write_text(outcome.out)
    assert load_config(tmp_path / "shown.yaml") == load_config(path, ["data.val.images='a # b: [c'"])


def test_diff_with_the_defaults(tool) -> None:
    outcome = tool("config", "diff", ROOT / "configs/r50_cascade.yaml")
    assert outcome.code == 1
    rows = [line.split() for line in outcome.out.splitlines()]
    assert rows[0] == ["key", "defaults", "->", str(ROOT / "configs/r50_cascade.yaml")]
    assert ["model.rpn.post_nms_top_k_train", "1000", "->", "2000"] in rows
    assert ["model.roi_head.kind", "standard", "->", "cascade"] in rows
    assert ["model.roi_head.positive_iou", "0.5", "->", "-"] in rows  # a key that cascades have in their stages
    assert len(rows) == 7
    outcome = tool("config", "diff", ROOT / "configs/r50_fpn.yaml")
    assert (outcome.code, outcome.out) == (0, "no difference\n")


def test_diff_of_two_and_of_a_checkpoint(tool, checkpoint: Path) -> None:
    outcome = tool("config", "diff", QUICKSTART, checkpoint)
    assert outcome.code == 1
    assert [line.split() for line in outcome.out.splitlines()] == [
        ["key", str(QUICKSTART), "->", str(checkpoint)],
        ["optim.lr", "0.002", "->", "0.5"],
    ]
    assert tool("config", "diff", checkpoint, checkpoint).code == 0
    assert comments(tool("config", "show", checkpoint).out)["optim.lr"] == f"{checkpoint} (default 0.02)"


def test_files(tool, tmp_path: Path) -> None:
    assert tool("config", "schema", "--output", tmp_path / "schema.json").code == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == config_schema()
    assert tool("config", "reference", "--output", tmp_path / "page.md").code == 0
    assert (tmp_path / "page.md").read_text() == config_reference()
    assert tool("config", "reference").out == config_reference()


def test_errors_are_one_line(tool, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("optim: {lrr: 1}")
    (tmp_path / "bad.pth").write_bytes(b"junk")
    for arguments, message in [
        (["show", tmp_path / "bad.yaml"], "optim.lrr: unknown key; did you mean optim.lr?"),
        (["show", tmp_path / "none.yaml"], "no such file"),
        (["show", QUICKSTART, "lr"], "must be key=value"),
        (["diff", QUICKSTART, tmp_path / "bad.pth"], "damaged, or not a checkpoint"),
        (["diff", QUICKSTART, tmp_path / "none.pth"], "no such checkpoint"),
        (["schema", "--output", tmp_path / "no" / "schema.json"], "Its folder is gone, or never was"),
    ]:
        outcome = tool("config", *arguments)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
        assert message in outcome.err


def test_names_cannot_steer_the_terminal(tool, tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text('name: "\\e[2J"\ndata: {val: {images: "a\\nb # \\e[2J"}}')
    (tmp_path / "evil\x1b[2J.yaml").write_text("seed: 1")
    for arguments in (
        ["show", tmp_path / "evil.yaml"],
        ["diff", tmp_path / "evil.yaml"],
        ["show", tmp_path / "evil\x1b[2J.yaml"],
        ["diff", tmp_path / "evil\x1b[2J.yaml", QUICKSTART],
    ):
        outcome = tool("config", *arguments)
        assert "\x1b" not in outcome.out + outcome.err
        assert outcome.out


def test_names_cannot_write_lines(tool, tmp_path: Path) -> None:
    plain, evil = tmp_path / "plain.yaml", tmp_path / "evil\nseed: 7\n#.yaml"
    for path in (plain, evil):
        path.write_text("optim: {lr: 1}")
    for arguments in (["show"], ["diff"]):
        expected = tool("config", *arguments, plain).out.count("\n")
        assert tool("config", *arguments, evil).out.count("\n") == expected
    assert tool("config", "diff", evil, plain).out.count("\n") == 2  # the titles, the name
