"""The files under configs/: each builds and learns, and the rows of the FPN paper differ in what they should."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fpn_det import build
from fpn_det.config import Config, SingleLevelConfig, dump_config, load_config, parse_config
from fpn_det.structures import Batch, Proposals, Targets

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PAPER = sorted((ROOT / "configs/paper").glob("*.yaml"))
NUM_CLASSES = 3

SINGLE = {"model.anchors.sizes": [[32, 64, 128, 256, 512]]}
MANY = {"model.rpn.pre_nms_top_k_train": 12000, "model.rpn.pre_nms_top_k_test": 6000}
C4 = {"model.neck.kind": "single"}
C5 = {"model.neck.kind": "single", "model.neck.stage": 5}
BOTTOM_UP, TOP_DOWN = {"model.neck.top_down": False}, {"model.neck.lateral": False}
FINEST = {"model.neck.finest_only": True}
RES5 = {"model.roi_head.pool_size": 14, "model.roi_head.box_head.kind": "res5"}
R101 = {"model.backbone.name": "resnet101"}
R101_PROPOSALS = {
    f"data.{split}.proposals": f"runs/table1_c_fpn_r101/proposals_{split}.npz" for split in ("train", "val")
}
SIDES = list(range(400, 1201, 100))
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "table1_a_c4": ("table1_c_fpn", C4 | SINGLE | MANY),
    "table1_b_c5": ("table1_c_fpn", C5 | SINGLE | MANY),
    "table1_d_bottom_up": ("table1_c_fpn", BOTTOM_UP),
    "table1_e_top_down": ("table1_c_fpn", TOP_DOWN),
    "table1_f_finest": ("table1_c_fpn", FINEST | SINGLE | MANY),
    "section4_1_separate_heads": ("table1_c_fpn", {"model.rpn.shared_head": False}),
    "section5_1_separate_heads": ("table1_d_bottom_up", {"model.rpn.shared_head": False}),
    "table2_a_c4": ("table2_c_fpn", C4 | RES5),
    "table2_b_c5": ("table2_c_fpn", C5),
    "table2_d_bottom_up": ("table2_c_fpn", BOTTOM_UP),
    "table2_e_top_down": ("table2_c_fpn", TOP_DOWN),
    "table2_f_finest": ("table2_c_fpn", FINEST),
    "table3_a_c4": ("table3_c_fpn", C4 | SINGLE | MANY | RES5),
    "table3_b_c5": ("table3_c_fpn", C5 | SINGLE | MANY),
    "section4_2_k0_5": ("table3_c_fpn", {"model.roi_head.canonical_level": 5}),
    "table4_r101_fpn": ("table5_r101_unshared", {"train.steps": 160_000}),
    "table5_r50_shared": ("table3_c_fpn", {}),
    "table5_r101_shared": ("table5_r50_shared", R101),
    "table5_r50_unshared": ("table2_c_fpn", {}),
    "table5_r101_unshared": ("table5_r50_unshared", R101 | R101_PROPOSALS),
    "figure1_a_image_pyramid": ("table3_a_c4", {"data.short_sides": SIDES, "data.long_side": 2000, "eval.tta": {}}),
}
"""Each file: the one it is compared with, and all keys in which it differs from that."""
BASES = {"table1_c_fpn", "table2_c_fpn", "table3_c_fpn"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


def leaves(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def stated(name: str) -> dict[str, Any]:
    """The keys that a file of the paper states."""
    return dict(leaves(yaml.safe_load((ROOT / f"configs/paper/{name}.yaml").read_text(encoding="utf-8"))))


def shrunk(path: Path, *overrides: str) -> Config:
    """The config with a small body from scratch, narrow layers and few proposals."""
    full = load_config(path, overrides).model
    small = ["weights=none", "norm=bn", "frozen_stages=0"]
    small += [] if full.backbone.name == "resnet26" else ["name=resnet18"]
    small += [] if full.backbone.norm_eps else ["norm_eps=1e-5"]  # torch trains no batch norm with 0
    changes = [f"model.backbone.{change}" for change in small]
    changes += [f"model.rpn.{when}_nms_top_k_{mode}=50" for when in ("pre", "post") for mode in ("train", "test")]
    changes += ["model.rpn.channels=16", "model.rpn.num_samples=16", "model.roi_head.num_samples=8"]
    changes += ["model.roi_head.score_thresh=0"]
    if not isinstance(full.neck, SingleLevelConfig):
        changes += ["model.neck.channels=32"]
    if full.roi_head.box_head.kind == "conv_fc":
        changes += ["model.roi_head.box_head.fc_dim=16", "model.roi_head.box_head.conv_channels=32"]
    return load_config(path, [*overrides, *changes])


def two_images(kind: str) -> Batch:
    """64x96 and 96x64, the second without boxes; fixed proposals for Fast R-CNN."""
    torch.manual_seed(0)
    sizes = torch.tensor([[64, 96], [96, 64]])
    boxes = torch.tensor([[[8.0, 8, 60, 40], [50, 20, 90, 60]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    corners = torch.rand(2, 20, 2, 2).sort(dim=2).values.flatten(2) * 63 + torch.tensor([0, 0, 1, 1])
    return Batch(
        images=torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8),
        sizes=sizes,
        targets=Targets(
            boxes=boxes, labels=torch.tensor([[2, 0], [0, 0]]), valid=torch.tensor([[True, True], [False, False]])
        ),
        image_ids=torch.arange(2),
        original_sizes=sizes,
        seeds=torch.arange(2),
        proposals=Proposals(boxes=corners, scores=torch.rand(2, 20), valid=torch.ones(2, 20, dtype=torch.bool))
        if kind == "fast_rcnn"
        else None,
    )


def check_builds_and_learns(config: Config) -> None:
    torch.manual_seed(0)
    batch = two_images(config.model.kind)
    model = build.build_model(config, NUM_CLASSES, pretrained=False)
    losses, stats = model(batch)
    assert losses
    assert all(torch.isfinite(value) for value in (losses | stats).values())
    assert all(value > 0 for name, value in losses.items() if name in ("rpn_objectness", "roi_class"))
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    model.eval()
    for detections, (h, w) in zip(model.predict(batch), batch.sizes.tolist(), strict=True):
        assert len(detections.boxes) > 0
        assert torch.isfinite(detections.boxes).all()
        assert torch.isfinite(detections.scores).all()
        assert (detections.boxes >= 0).all()
        assert (detections.boxes <= torch.tensor([w, h, w, h])).all()
        assert (detections.labels < (1 if config.model.kind == "rpn" else NUM_CLASSES)).all()


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_loads_and_dumps(path: Path):
    config = load_config(path)
    assert config.name == path.stem
    assert parse_config(dump_config(config), source="dump") == config
    for split in ("train", "val"):
        build.check_proposals(config, split)
    defaults, values = (dict(leaves(c.model_dump(mode="json"))) for c in (Config(), config))
    for key, value in leaves(yaml.safe_load(path.read_text(encoding="utf-8"))):
        if value == {}:
            assert any(k.startswith(f"{key}.") for k in values)  # a section of defaults instead of none
            continue
        assert values.get(key) != defaults.get(key, "absent"), f"{path.name} states the default of {key}"


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_builds_and_learns(path: Path):
    check_builds_and_learns(shrunk(path))


@pytest.mark.parametrize(
    "override",
    [
        "model.neck.upsample=bilinear",
        "model.neck.upsample=deconv",
        "model.neck.upsample=pixel_shuffle",
        "model.neck.smooth_top=false",
        "model.neck.kind=pafpn",
    ],
)
def test_documented_variants_of_the_neck(override: str):
    """As the header of fpn18.yaml gives them."""
    path = ROOT / "configs/fpn18.yaml"
    key, _, value = override.partition("=")
    assert re.search(rf"{re.escape(key)}=.*\b{value}\b", path.read_text(encoding="utf-8"))
    check_builds_and_learns(shrunk(path, override))


@pytest.mark.parametrize("name", ROWS)
def test_row_differs_where_it_should(name: str):
    base, expected = ROWS[name]
    base_keys, keys = stated(base), stated(name)
    assert {key: value for key, value in keys.items() if base_keys.get(key) != value} == expected
    assert not base_keys.keys() - keys.keys()


def test_every_file_of_the_paper_is_compared():
    assert {path.stem for path in PAPER} == ROWS.keys() | BASES


def test_settings_of_the_paper():
    """Sections 5.1 and 5.2: lr 0.02, then 0.002, for 30k + 10k and 60k + 20k steps of 16 images of 800 pixels."""
    for path in PAPER:
        config = load_config(path)
        steps = 40_000 if config.model.kind == "rpn" else 160_000 if path.stem.startswith("table4") else 80_000
        assert config.train.steps == steps
        assert [m * steps for m in config.optim.milestones] == [0.75 * steps]
        assert (build.peak_lr(config), config.optim.gamma, config.train.batch_size) == (0.02, 0.1, 16)
        assert (config.optim.weight_decay, config.optim.momentum) == (1e-4, 0.9)
        assert (config.data.test_short_side, config.model.rpn.post_nms_top_k_test) == (800, 1000)
        sides = tuple(SIDES) if path.stem.startswith("figure1") else (800,)
        assert config.data.short_sides == sides
        if config.model.kind == "faster_rcnn":
            assert config.model.rpn.post_nms_top_k_train == 2000
        if config.model.kind != "rpn":
            assert (config.model.roi_head.num_samples, config.model.roi_head.smooth_l1_beta) == (512, 1)
        if config.model.kind != "fast_rcnn":
            assert config.model.rpn.num_samples == 256
            assert config.model.rpn.smooth_l1_beta == pytest.approx(1 / 9, rel=1e-5)
            sizes = config.model.anchors.level_sizes
            assert sum(len(level) for level in sizes) * len(config.model.anchors.ratios) == 15


@pytest.mark.parametrize(
    ("name", "thousands"),
    [
        ("a_c4", 47),
        ("b_c5", 12),
        ("c_fpn", 200),
        ("d_bottom_up", 200),
        ("e_top_down", 200),
        ("f_finest", 750),
    ],
)
def test_number_of_anchors(name: str, thousands: int):
    """Column "# anchors" of Table 1, which is that of an image of 800x1000 pixels."""
    rpn = build.build_model(shrunk(ROOT / f"configs/paper/table1_{name}.yaml"), NUM_CLASSES, pretrained=False).rpn
    anchors = rpn.anchors([(math.ceil(800 / stride), math.ceil(1000 / stride)) for stride in rpn.anchors.strides])
    assert round(sum(map(len, anchors)) / 1000) == thousands


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_header_of_the_paper(path: Path):
    """Table, row and published numbers (or that there are none) are named."""
    text = path.read_text(encoding="utf-8")
    match = re.fullmatch(r"(table|section|figure)(\d)_([a-z0-9]+)_?.*", path.stem)
    assert match
    kind, number, row = match.groups()
    place = f"{number}.{row}" if kind == "section" else f"{number}({row})" if len(row) == 1 else number
    assert text.startswith(f"# {kind.title()} {place}")
    for words in ("(arXiv 1612.03144)", "torchrun", "\n# Cost:", "on minival: not measured here. Published"):
        assert words in text


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_commands_of_the_header(path: Path):
    """Files exist, overrides are valid, and what trains on fixed proposals says how to make them."""
    comment = "\n".join(line[1:] for line in path.read_text(encoding="utf-8").split("\n") if line.startswith("#"))
    commands = re.findall(r"(?:python|torchrun) .*", re.sub(r"\\\n", "", comment))
    made: set[str] = set()
    needed: set[str] = set()
    sources = set()
    for words in map(shlex.split, commands):
        if "--config" not in words:  # import_weights.py
            continue
        source = ROOT / words[words.index("--config") + 1]
        sources.add(source)
        config = load_config(source, [word for word in words if re.match(r"[a-z_0-9.]+=", word)])
        needed |= {str(split.proposals) for split in (config.data.train, config.data.val) if split.proposals}
        assert (ROOT / next(word for word in words if word.startswith("tools/"))).exists()
        if "--output" in words:
            split, output = (words[words.index(option) + 1] for option in ("--split", "--output"))
            made.add(output)
            assert output.endswith(f"/proposals_{split}.npz")
            assert Path(words[words.index("--checkpoint") + 1]).parent == Path(output).parent
            assert config.model.kind == "rpn"
            assert config.model.rpn.post_nms_top_k_test == {"train": 2000, "val": 1000}[split]
    assert path in sources
    assert needed == made
