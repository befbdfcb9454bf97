"""tools/browse.py: the page, the pictures and the table, for every kind of model."""

from __future__ import annotations

import json
import re
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from pages import opened
from PIL import Image

from fpn_det import build
from fpn_det.config import load_config
from fpn_det.data.coco import load_coco
from fpn_det.data.proposals import ImageProposals, write_proposals
from fpn_det.engine.checkpoint import save_checkpoint

EVIL_NAMES = ["<script>alert(1)</script>", "\x1b[2Jcat", "a\nb", "gpj.\u202etac", "x" * 300]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> Path:
    """Of a detector that has not learnt anything."""
    path = tmp_path_factory.mktemp("weights") / "final.pth"
    config = load_config(Path(tiny[1]), tiny[2:])
    data = build.load_train_data(config)
    torch.manual_seed(0)
    model = build.build_model(config, len(data.categories), pretrained=False)
    state = {"model": model.state_dict(), "categories": data.categories.state_dict(), "config": "", "step": 0}
    save_checkpoint(path, state)
    return path


@pytest.fixture
def evil(shapes, tmp_path) -> list[str]:
    """Overrides: the training split with hostile names of classes and files."""
    content = json.loads((shapes / "annotations/train.json").read_text())
    for category, name in zip(content["categories"], EVIL_NAMES, strict=True):
        category["name"] = name
    shutil.copytree(shapes / "train", tmp_path / "images")
    for i, entry in enumerate(content["images"]):
        name = f"<b>{i}\x1b.png"
        (tmp_path / "images" / entry["file_name"]).rename(tmp_path / "images" / name)
        entry["file_name"] = name
    (tmp_path / "train.json").write_text(json.dumps(content))
    return [f"data.train.images={tmp_path / 'images'}", f"data.train.annotations={tmp_path / 'train.json'}"]


def test_the_page_opens_anywhere(tool, tiny, evil, browser) -> None:
    """Hostile names are inert; nothing is loaded; neither a phone nor a wide screen has to scroll sideways."""
    outcome = tool("browse", *tiny, *evil, "--num-images", 3)
    assert (outcome.code, outcome.err) == (0, "")
    assert all(line.isprintable() for line in outcome.out.splitlines())
    page = Path("runs/quickstart/browse/index.html").resolve()
    assert f"written: {page.relative_to(Path.cwd())}" in outcome.out
    for width in (390, 1400):
        with opened(browser, page, width=width) as tab:
            tab.wait_for_function("[...document.querySelectorAll('figure img')].every(image => image.naturalWidth > 0)")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.locator("script").count() == 1
            assert tab.locator("main figure img").count() == 2 * 3
            assert "No RoIs" in tab.locator("main").inner_text()
            assert tab.locator("#s4 tbody tr td:first-child").first.inner_text() == EVIL_NAMES[0]


def test_pictures_are_of_the_steps_of_training(tool, tiny, checkpoint) -> None:
    outcome = tool(
        *("browse", *tiny, "--checkpoint", checkpoint, "--num-images", 6, "--start-step", 3, "--output-dir", "new/d"),
        "train.accumulate=2",
    )
    assert (outcome.code, outcome.err) == (0, "")
    config = load_config(Path(tiny[1]), [*tiny[2:], "train.accumulate=2"])
    data = build.load_train_data(config)
    batches = islice(build.build_train_loader(config, data, start_step=3), 3)
    expected = [(3 + i // 2, image_id) for i, batch in enumerate(batches) for image_id in batch.image_ids.tolist()]
    page = Path("new/d/index.html").read_text()
    captions = re.findall(r"<figcaption>(\w+): step (\d+), [^<]* \(id (\d+)\)</figcaption>", page)
    kinds = ("boxes", "anchors", "rois")
    assert captions == [(kind, str(step), str(image_id)) for step, image_id in expected for kind in kinds]
    files = {f"{i:03d}_{kind}.png" for i in range(6) for kind in kinds}
    assert {path.name for path in Path("new/d").iterdir()} == files | {"index.html"}
    for name in files:
        assert Image.open(Path("new/d") / name).size[0] == 320  # five times 64


def test_no_picture_of_an_earlier_call_stays(tool, tiny, tmp_path) -> None:
    (tmp_path / "003_mine.png").write_text("of the user")
    for count in (2, 1, 0):
        outcome = tool("browse", *tiny, "--num-images", count, "--output-dir", tmp_path)
        assert (outcome.code, outcome.err) == (0, "")
        pictures = {f"{i:03d}_{kind}.png" for i in range(count) for kind in ("boxes", "anchors")}
        assert {path.name for path in tmp_path.iterdir()} == pictures | {"index.html", "003_mine.png"}


def test_figures_alone(tool, tiny) -> None:
    """What the table recommends can be given as it is, and then nothing is recommended any more."""
    outcome = tool("browse", *tiny, "--num-images", 0, "model.anchors.sizes=[64,128,256,512,1024]")
    assert (outcome.code, outcome.err) == (0, "")
    assert [path.name for path in Path("runs/quickstart/browse").iterdir()] == ["index.html"]
    assert "What the model sees" not in Path("runs/quickstart/browse/index.html").read_text()
    recall = dict(re.findall(r"^(as configured|other sizes) +([\d.]+)%", outcome.out, re.MULTILINE))
    assert float(recall["other sizes"]) > float(recall["as configured"]) + 20
    suggested = re.findall(r"^  (model\.anchors\.\w+=\S+)$", outcome.out, re.MULTILINE)
    assert suggested
    again = tool("browse", *tiny, "--num-images", 0, *suggested)
    assert re.search(rf"^as configured +{recall['other sizes']}%", again.out, re.MULTILINE) or len(suggested) > 1
    assert "The anchors as configured are fine" in again.out
    config = load_config(Path(tiny[1]), [*tiny[2:], *suggested])
    data = build.load_train_data(config)
    losses, stats = build.build_model(config, len(data.categories), pretrained=False)(
        next(iter(build.build_train_loader(config, data)))
    )
    assert all(loss.isfinite() for loss in losses.values())
    assert stats["rpn_positives"] > 0


def test_an_rpn_has_no_rois_and_a_second_stage_no_anchors(tool, tiny, shapes, tmp_path) -> None:
    data = load_coco(shapes / "annotations/train.json", shapes / "train")
    proposals = [
        ImageProposals.encode(
            image_id=image_id,
            size=(h, w),
            boxes=torch.tensor([[1.0, 1, 20, 30], [5, 5, 60, 60]]),
            scores=torch.ones(2),
        )
        for image_id, (h, w) in zip(data.image_ids.tolist(), data.sizes.tolist(), strict=True)
    ]
    write_proposals(tmp_path / "p.npz", proposals, config="", checkpoint_sha256="")
    second = ("model.kind=fast_rcnn", f"data.train.proposals={tmp_path / 'p.npz'}")
    for overrides, kinds in ((("model.kind=rpn",), {"boxes", "anchors"}), (second, {"boxes", "rois"})):
        outcome = tool("browse", *tiny, *overrides, "--num-images", 1, "--output-dir", tmp_path / overrides[0])
        assert (outcome.code, outcome.err) == (0, "")
        assert {path.stem for path in (tmp_path / overrides[0]).glob("*.png")} == {f"000_{kind}" for kind in kinds}


def test_errors_are_one_line(tool, tiny, shapes, checkpoint, tmp_path) -> None:
    content = json.loads((shapes / "annotations/train.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps(content | {"annotations": []}))
    content["categories"][0]["name"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(content))
    for arguments, said in (
        (("--checkpoint", checkpoint, f"data.train.annotations={tmp_path / 'other.json'}"), "trained on 5 classes"),
        (("--checkpoint", checkpoint, "model.neck.channels=8"), "another architecture"),
        (("--checkpoint", "nowhere.pth"), "nowhere.pth: "),
        ((f"data.train.annotations={tmp_path / 'empty.json'}",), "no usable box"),
        (("--output-dir", checkpoint, "--num-images", 0), "cannot be written"),
    ):
        outcome = tool("browse", *tiny, *arguments)
        assert outcome.code == 2
        assert said in outcome.err
        assert outcome.err.count("\n") == 1
    outcome = tool("browse", *tiny, "--num-images", -1)
    assert outcome.code == 2
    assert "must not be negative" in outcome.err


def test_an_image_that_cannot_be_read_is_named(tool, tiny, shapes, tmp_path) -> None:
    shutil.copytree(shapes / "train", tmp_path / "images")
    for path in sorted((tmp_path / "images").iterdir())[:12]:
        path.write_bytes(b"no image")
    outcome = tool("browse", *tiny, f"data.train.images={tmp_path / 'images'}", "--num-images", 8)
    assert outcome.code == 1
    assert outcome.err.startswith("unreadable: ")
    assert "written: " in outcome.out
