"""The configuration: defaults, merging of file and command line, error messages, and the shipped files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from fpn_det import config as config_module
from fpn_det.config import (
    OTHER_NAMES,
    BackboneConfig,
    Config,
    DataConfig,
    ModelConfig,
    Section,
    SplitConfig,
    TrainConfig,
    dump_config,
    flatten,
    load_config,
    parse_config,
)
from fpn_det.models.backbone import BODIES
from fpn_det.structures import InputError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse_config(text, source="f.yaml", overrides=overrides)
    return str(caught.value).split("\n")


def leaves(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# Defaults and shape of the schema


def test_defaults_are_the_1x_coco_recipe():
    config = parse_config("name: x", source="f.yaml")
    assert (config.train.steps, config.train.epochs, config.train.batch_size) == (90_000, None, 16)
    assert [round(90_000 * m) for m in config.optim.milestones] == [60_000, 80_000]
    assert config.data.short_sides == (640, 672, 704, 736, 768, 800)
    assert config.data.train.images == Path("data/coco/train2017")
    assert config.data.val.annotations == Path("data/coco/annotations/instances_val2017.json")
    assert config.model.anchors.sizes == (32, 64, 128, 256, 512)
    assert config.optim.lr == 0.02
    assert Config(name="x") == config


def test_every_section_is_frozen_and_described():
    sections = [v for v in vars(config_module).values() if isinstance(v, type) and issubclass(v, Section)]
    assert len(sections) > 20
    for section in sections:
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["frozen"]
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no description"
    with pytest.raises(ValidationError, match="frozen"):
        Config().model.neck.channels = 1
    assert isinstance(hash(Config()), int)


def test_python_construction_keeps_the_rules():
    assert DataConfig(val=SplitConfig(images=Path("a"), annotations=Path("b"))).val.images == Path("a")
    with pytest.raises(ValidationError, match="would never normalise"):
        ModelConfig(backbone=BackboneConfig(weights=None, frozen_stages=0))
    with pytest.raises(ValidationError, match="exclude each other"):
        TrainConfig(steps=3, epochs=1)


# Reading


def test_values_are_converted_only_where_nothing_is_lost():
    text = "optim: {lr: 1e-4, clip_norm: 10}\ndata: {short_sides: [320, 480], val: {images: a b}}\nseed: 9_0"
    config = parse_config(text, source="f.yaml")
    assert config.optim.lr == 1e-4
    assert config.optim.clip_norm == 10.0
    assert isinstance(config.optim.clip_norm, float)
    assert config.data.short_sides == (320, 480)
    assert config.data.val.images == Path("a b")
    assert config.data.val.annotations == Config().data.val.annotations
    assert config.seed == 90


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+.0001", "1e-04", ".1e-3", "10_0.0e-6"])
def test_numbers_in_any_notation(written: str):
    assert parse_config(f"optim: {{lr: {written}}}", source="f").optim.lr == pytest.approx(1e-4, rel=1e-12)
    config = parse_config("seed: 0", source="f", overrides=[f"optim.lr={written}"])
    assert config.optim.lr == pytest.approx(1e-4, rel=1e-12)


@pytest.mark.parametrize("word", ["none", "None", "null", "~"])
def test_none_is_null_in_both_sources(word: str):
    body = f"{{weights: {word}, norm: bn, frozen_stages: 0}}"
    assert parse_config(f"model: {{backbone: {body}}}", source="f").model.backbone.weights is None
    overrides = [
        f"model.backbone.weights={word}",
        "model.backbone.norm=gn",
        "model.backbone.frozen_stages=0",
    ]
    assert parse_config("seed: 0", source="f", overrides=overrides).model.backbone.weights is None


@pytest.mark.parametrize("stem", ["mine", "2024-01-01", "on", "none", "1e-4", "1:30", "010"])
def test_name_is_the_stem_and_survives_the_round_trip(tmp_path: Path, stem: str):
    config = load_config(write(tmp_path, "seed: 3", f"{stem}.yaml"))
    assert config.name == stem
    assert load_config(write(tmp_path, dump_config(config), "other.yaml")) == config


def test_stated_name_wins(tmp_path: Path):
    assert load_config(write(tmp_path, "name: given")).name == "given"
    assert load_config(write(tmp_path, "name: given"), ["name=later"]).name == "later"


def test_overrides():
    config = parse_config(
        "data: {val: {images: from_file, annotations: from_file.json}}\noptim: {lr: 5}",
        source="f.yaml",
        overrides=[
            "model.anchors.sizes=[8,16,32,64,128]",
            "data.val={annotations: new.json}",
            "optim.lr = 1",
            "optim.lr=2",
            "data.train.images=a=b",
        ],
    )
    assert config.model.anchors.sizes == (8, 16, 32, 64, 128)
    assert config.data.val == SplitConfig(images=Path("from_file"), annotations=Path("new.json"))
    assert config.optim.lr == 2
    assert config.data.train.images == Path("a=b")


def test_dump_is_complete_and_loads_to_an_equal_config(tmp_path: Path):
    overrides = ["train.epochs=0.5", "optim.lr=3.3e-7", 'data.val.images="ü: #z"', "data.short_sides=[8]"]
    config = load_config(write(tmp_path, "seed: 1"), overrides)
    text = dump_config(config)
    assert load_config(write(tmp_path, text, "other.yaml")) == config
    stated = dict(leaves(yaml.safe_load(text)))
    assert stated.keys() == dict(leaves(config.model_dump())).keys()
    assert stated["data.val.images"] == "ü: #z"
    assert load_config(write(tmp_path, dump_config(Config()))) == Config()


# Length of the run


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("seed: 0", [], (90_000, None)),
        ("train: {batch_size: 8}", [], (90_000, None)),
        ("train: {epochs: 12}", [], (None, 12)),
        ("train: {steps: 7, epochs: null}", [], (7, None)),
        ("train: {epochs: 12}", ["train.steps=20"], (20, None)),
        ("train: {steps: 7, epochs: null}", ["train.epochs=2"], (None, 2)),
        ("train: {epochs: 12}", ["train={steps: 20}"], (20, None)),
        ("train: {epochs: 12}", ["train.epochs=null"], (90_000, None)),
        ("train: {epochs: 12}", ["train.epochs=3"], (None, 3)),
        ("seed: 0", ["train.epochs=3"], (None, 3)),
    ],
)
def test_steps_and_epochs(text: str, overrides: list[str], expected: tuple[int | None, float | None]):
    train = parse_config(text, source="f.yaml", overrides=overrides).train
    assert (train.steps, train.epochs) == expected


def test_steps_and_epochs_in_one_source():
    assert problems("train: {steps: 7, epochs: 12}") == [
        "f.yaml: train: steps and epochs are both given; give one of them"
    ]
    assert problems("train: {steps: 7}", "train.steps=1", "train.epochs=2") == [
        "command line: train: steps and epochs are both given; give one of them"
    ]
    assert problems("train: {steps: 7, epochs: 12}", "train.steps=1") == [
        "f.yaml: train: steps and epochs are both given; give one of them"
    ]


# Sections of several kinds


VARIANTS = [
    "neck: {top_down: false}",
    "neck: {lateral: false, upsample: deconv}",
    "{neck: {finest_only: true}, anchors: {sizes: [[32, 64]]}}",
    "neck: {kind: pafpn, norm: gn, smooth_top: false}",
    "{neck: {kind: single, stage: 5}, anchors: {sizes: [64], inferred_strides: true}}",
    "{neck: {kind: single}, anchors: {sizes: [[1, 2.5]]}, roi_head: {box_head: {kind: res5}}}",
    "roi_head: {kind: cascade}",
    "roi_head: {kind: cascade, stages: [{positive_iou: 0.5, box_weights: [1, 1, 1, 1]}]}",
    "roi_head: {box_head: {num_convs: 4, num_fcs: 1, norm: bn}, box_loss: ciou, background_rows: 11}",
    "{kind: rpn, rpn: {shared_head: false, num_convs: 2, channels: 64, box_loss: giou}}",
    "{kind: fast_rcnn, delta_clamp: both}",
    "backbone: {name: resnext101_32x4d, weights: x.pth, norm_eps: 0, stride_in_1x1: true}",
]


@pytest.mark.parametrize("model", VARIANTS)
def test_every_variant_survives_the_round_trip(model: str):
    text = f"model: {{{model}}}" if model[0] != "{" else f"model: {model}"
    config = parse_config(text, source="f")
    assert config != Config()
    dumped = dump_config(config)
    assert parse_config(dumped, source="f") == config
    again = parse_config(dumped, source="f", overrides=["seed=1"])  # as in a checkpoint, with a change
    assert (again.model, again.seed) == (config.model, 1)


def test_kind_comes_first():
    """A section of a kind says so before its keys, wherever the schema has it."""
    lines = dump_config(parse_config("model: {roi_head: {kind: cascade}}", source="f")).splitlines()
    for i, line in enumerate(lines):
        if line.strip() in ("model:", "backbone:", "neck:", "roi_head:", "box_head:", "optim:"):
            assert lines[i + 1].strip().startswith("kind: "), line
    assert sum(line.strip().startswith("kind: ") for line in lines) == 6
    assert "  roi_head:\n    kind: cascade" in "\n".join(lines)


def test_the_default_kind_need_not_be_stated():
    model = parse_config("model: {neck: {channels: 8}, roi_head: {box_head: {fc_dim: 4}}}", source="f").model
    assert (model.neck.kind, model.neck.channels) == ("fpn", 8)
    assert (model.roi_head.kind, model.roi_head.box_head.kind, model.roi_head.box_head.fc_dim) == (
        "standard",
        "conv_fc",
        4,
    )
    assert parse_config("model: {neck: {}}", source="f").model == Config().model


def test_command_line_and_file_give_parts_of_a_kind():
    """The kind of one source, the keys of the other; keys that both kinds have stay."""

    def neck(text: str, *overrides: str) -> tuple[str, int, str]:
        found = parse_config(f"model: {{neck: {text}}}", source="f", overrides=overrides).model.neck
        return found.kind, found.channels, found.upsample

    assert neck("{channels: 8}", "model.neck.kind=pafpn") == ("pafpn", 8, "nearest")
    assert neck("{kind: pafpn, channels: 8}", "model.neck.upsample=deconv") == ("pafpn", 8, "deconv")
    assert neck("{kind: pafpn, channels: 8}", "model.neck={kind: fpn}") == ("fpn", 8, "nearest")
    head = parse_config("model: {roi_head: {num_samples: 9}}", source="f", overrides=["model.roi_head.kind=cascade"])
    assert (head.model.roi_head.kind, head.model.roi_head.num_samples) == ("cascade", 9)
    # Keys of the file that a kind from the command line does not have are passed over, those beside it are not.
    assert neck("{channels: 8, top_down: false}", "model.neck.kind=pafpn") == ("pafpn", 8, "nearest")
    text = "model: {neck: {channels: 8}, roi_head: {box_head: {fc_dim: 9}}}"
    overrides = ["model.neck.kind=single", f"model.anchors.sizes={[[32]]}", "model.roi_head.box_head.kind=res5"]
    model = parse_config(text, source="f", overrides=overrides).model
    assert (model.neck.kind, model.roi_head.box_head.kind) == ("single", "res5")
    (problem,) = problems("seed: 0", "model.neck={kind: pafpn, top_down: false}")
    assert problem == "command line: model.neck.top_down: not a key of kind pafpn: remove it"
    (problem,) = problems("model: {neck: {kind: pafpn}}", "model.neck.top_down=false")
    assert problem == "command line: model.neck.top_down: not a key of kind pafpn: remove it"
    (problem,) = problems("model: {neck: {stage: 4}}")
    assert problem == "f.yaml: model.neck.stage: not a key of the default kind: state `kind`"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.neck={top_down: false, upsample: deconv}", "upsample deconv has no effect where top_down is false"),
        ("model.neck={finest_only: true, smooth_top: false}", "smooth_top false has no effect where finest_only is"),
        ("model.rpn={box_loss: giou, smooth_l1_beta: 1}", "smooth_l1_beta 1 has no effect with box_loss giou"),
        ("model.roi_head.box_head={norm: bn}", "norm bn has no effect where num_convs is 0"),
    ],
)
def test_keys_without_effect_are_refused(override: str, message: str):
    (problem,) = problems("seed: 0", override)
    assert message in problem
    assert problem.startswith(f"command line: {override.partition('=')[0]}: ")


def test_views_of_proposals_are_refused():
    (problem,) = problems("model: {kind: rpn}", "eval.tta={}")
    assert problem.endswith(": eval.tta merges detections, but model.kind rpn gives proposals: set eval.tta to none")
    assert ": : " not in problem


def test_bodies_of_the_schema_are_those_of_the_model():
    assert list(get_args(BackboneConfig.model_fields["name"].annotation)) == list(BODIES)


STAGE = "{positive_iou: 0.5, box_weights: [1, 1, 1, 1]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: mask", "kind: must be 'faster_rcnn', 'rpn' or 'fast_rcnn', received \"mask\""),
        ("neck: {kind: bifpn}", "neck: kind must be one of 'fpn', 'pafpn', 'single', received \"bifpn\""),
        ("neck: {kind: [1]}", "neck: kind must be one of 'fpn', 'pafpn', 'single', received [1]"),
        ("neck: fpn", 'neck: must be a section with keys of its own, received "fpn"'),
        ("neck: {stage: 5}", "neck.stage: not a key of the default kind: state `kind`"),
        ("neck: {kind: single, channels: 4}", "neck.channels: not a key of kind single: remove it"),
        ("neck: {kind: pafpn, lateral: false}", "neck.lateral: not a key of kind pafpn: remove it"),
        ("neck: {chanels: 4}", "neck.chanels: unknown key; did you mean model.neck.channels?"),
        ("neck: {kind: single, stage: 3}", "neck.stage: must be 4 or 5, received 3"),
        (
            "neck: {top_down: false, lateral: false}",
            "neck: top_down false goes with lateral true and finest_only false only: nothing else is a pyramid",
        ),
        (
            "neck: {top_down: false, finest_only: true}",
            "neck: top_down false goes with lateral true and finest_only false only: nothing else is a pyramid",
        ),
        (
            "neck: {norm: gn, channels: 48}",
            "neck: norm gn has 32 groups, but channels is 48: set channels to a multiple of 32",
        ),
        (
            "roi_head: {box_head: {num_convs: 4, norm: gn, conv_channels: 100}}",
            "roi_head.box_head: norm gn has 32 groups, but conv_channels is 100: set conv_channels to a multiple of 32",
        ),
        ("roi_head: {kind: double}", "roi_head: kind must be one of 'standard', 'cascade', received \"double\""),
        (
            "roi_head: {box_head: {kind: mlp}}",
            "roi_head.box_head: kind must be one of 'conv_fc', 'res5', received \"mlp\"",
        ),
        (
            "roi_head: {kind: cascade, box_head: {kind: res5, fc_dim: 3}}",
            "roi_head.box_head.fc_dim: not a key of kind res5: remove it",
        ),
        ("roi_head: {kind: cascade, positive_iou: 0.5}", "roi_head.positive_iou: not a key of kind cascade: remove it"),
        (f"roi_head: {{stages: [{STAGE}]}}", "roi_head.stages: not a key of the default kind: state `kind`"),
        (
            f"roi_head: {{kind: cascade, stages: [{STAGE}, {{positive_iou: 0.6}}]}}",
            "roi_head.stages[1].box_weights: is needed",
        ),
        (
            "roi_head: {kind: cascade, stages: [{positive_iou: 0.6, box_weights: [1, 2, 3]}]}",
            "roi_head.stages[0].box_weights: must have more items, received [1, 2, 3]",
        ),
        ("pixel_std: [1]", "pixel_std: must have more items, received [1]"),
        (
            "roi_head: {kind: cascade, stages: [{positive_iou: 0.6, box_weights: [1, 2, 3, 4], los_weight: 1}]}",
            "roi_head.stages[0].los_weight: unknown key; did you mean model.roi_head.stages.loss_weight?",
        ),
        ("roi_head: {kind: cascade, stages: []}", "roi_head.stages: must have at least 1 item, received []"),
        ("anchors: {sizes: [8, 16, [32], [], 64]}", "anchors.sizes[3]: must be a valid number, received []"),
        (
            "anchors: {sizes: [8, 16, [32, 40], 64, 128]}",
            "anchors.sizes: must give every level as many sizes, received [1, 1, 2, 1, 1]: one head serves all levels",
        ),
        (
            "backbone: {name: resnet34, stride_in_1x1: true}",
            "backbone: stride_in_1x1 is true, but the blocks of resnet34 have no 1x1 convolution: remove it",
        ),
    ],
)
def test_model_refusals(text: str, message: str):
    assert problems(f"model: {{{text}}}") == [f"f.yaml: model.{message}"]


def test_parts_that_do_not_fit_together():
    pyramid = "give one entry (a number or a list of numbers) per level, such as [32, 64, 128, 256, 512]"
    single = "give one entry (a number or a list of numbers) per level, such as [[32, 64, 128, 256, 512]]"
    for neck in ("{kind: single}", "{finest_only: true}"):
        assert problems(f"model: {{neck: {neck}}}") == [
            f"f.yaml: model: anchors.sizes has 5 entries, but the neck's levels are 1: {single}"
        ]
        parse_config(f"model: {{neck: {neck}, anchors: {{sizes: [[32, 64]]}}}}", source="f")
        parse_config(f"model: {{neck: {neck}, kind: fast_rcnn}}", source="f")  # has no anchors
    for neck in ("{}", "{kind: pafpn}"):
        assert problems(f"model: {{neck: {neck}, anchors: {{sizes: [[32, 64]]}}}}") == [
            f"f.yaml: model: anchors.sizes has 1 entries, but the neck's levels are 5: {pyramid}"
        ]
    res5 = "roi_head: {box_head: {kind: res5}}"
    for neck in ("{}", "{kind: single, stage: 5}"):
        sizes = 1 if "single" in neck else 5
        assert problems(f"model: {{neck: {neck}, anchors: {{sizes: {[32] * sizes}}}, {res5}}}") == [
            "f.yaml: model: roi_head.box_head.kind res5 works on C4 only: set neck to {kind: single, stage: 4}"
        ]
    parse_config(f"model: {{kind: rpn, {res5}}}", source="f")  # has no such head


# Refusals


def test_other_names_lead_to_keys():
    values = flatten(Config(name="x").model_dump(mode="json"))
    assert set(OTHER_NAMES.values()) <= values.keys()
    assert not {name for name in OTHER_NAMES if any(key.split(".")[-1] == name for key in values)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("roi_head.nms_thresh=1", "roi_head: unknown key; did you mean model.roi_head?"),
        ("optm.lr=1", "optm: unknown key; did you mean optim?"),
        ("lr=1", "lr: unknown key; did you mean optim.lr?"),
        ("batch_size=1", "batch_size: unknown key; did you mean train.batch_size or eval.batch_size?"),
        ("optim.learning_rate=1", "optim.learning_rate: unknown key; did you mean optim.lr?"),
        ("optim.leraning_rate=1", "optim.leraning_rate: unknown key; did you mean optim.lr?"),
        ("base_lr=1", "base_lr: unknown key; did you mean optim.lr?"),
        ("optim.weight_decy=1", "optim.weight_decy: unknown key; did you mean optim.weight_decay?"),
        ("num_epochs=1", "num_epochs: unknown key; did you mean train.epochs?"),
        ("train.max_epochs=1", "train.max_epochs: unknown key; did you mean train.epochs?"),
        ("train.batch=1", "train.batch: unknown key; did you mean train.batch_size?"),
        ("batch=1", "batch: unknown key; did you mean train.batch_size or eval.batch_size?"),
        ("workers=1", "workers: unknown key; did you mean data.num_workers?"),
        ("data.workers=1", "data.workers: unknown key; did you mean data.num_workers?"),
        ("train.lr=1", "train.lr: unknown key; did you mean optim.lr?"),
        ("max_iter=1", "max_iter: unknown key; did you mean train.steps?"),
        ("eval.batchsize=1", "eval.batchsize: unknown key; did you mean eval.batch_size?"),
        ("model.backbone.nme=1", "model.backbone.nme: unknown key; did you mean model.backbone.name?"),
        ("optimizer=adamw", "optimizer: unknown key; did you mean optim.kind?"),
        ("zzzzqq=1", "zzzzqq: unknown key"),
        ("optim.lr='3'", 'optim.lr: must be a valid number, received "3"'),
        ("optim.lr=true", "optim.lr: must be a valid number, received true"),
        ("optim.lr=0", "optim.lr: must be greater than 0, received 0"),
        ("optim.lr.x=0", 'optim.lr: must be a valid number, received {"x": 0}'),
        ("optim.momentum=.inf", "optim.momentum: must be a finite number, received Infinity"),
        ("optim.milestones=[0.5,0.5]", "optim.milestones: must increase, received [0.5, 0.5]"),
        ("optim.milestones=[0.5,1]", "optim.milestones[1]: must be less than 1, received 1"),
        ("train.steps=true", "train.steps: must be a valid integer, received true"),
        ("train.steps=1.5", "train.steps: must be a valid integer, received 1.5"),
        ("train.steps=0", "train.steps: must be greater than or equal to 1, received 0"),
        ("train.precision=fp8", "train.precision: must be 'fp32', 'bf16' or 'fp16', received \"fp8\""),
        ("name=5", "name: must be a valid string, received 5"),
        ("name=a/b", "name: must not contain a slash, received 'a/b'"),
        ("data.val.images=5", "data.val.images: must be a valid string, received 5"),
        ("data.keep_empty=yes", 'data.keep_empty: must be a valid boolean, received "yes"'),
        ("data.keep_empty=1", "data.keep_empty: must be a valid boolean, received 1"),
        ("data.short_sides=800", "data.short_sides: must be a list, received 800"),
        ("data.short_sides=[]", "data.short_sides: must have at least 1 item, received []"),
        ("model=null", "model: must be a section with keys of its own, received null"),
        (
            "model.anchors.sizes=[8,16]",
            "model: anchors.sizes has 2 entries, but the neck's levels are 5: give one entry (a number or a list of "
            "numbers) per level, such as [32, 64, 128, 256, 512]",
        ),
        (
            "model.backbone.frozen_stages=6",
            "model.backbone.frozen_stages: must be less than or equal to 5, received 6",
        ),
        (
            "data.long_side=799",
            "data: long_side 799 is less than the largest short side 800: raise long_side",
        ),
        (
            "model.rpn.negative_iou=0.8",
            "model.rpn: negative_iou 0.8 exceeds positive_iou 0.7: an anchor would be both; lower negative_iou",
        ),
        ("train.accumulate=3", "train: accumulate 3 does not divide batch_size 16"),
        ("nothing", "'nothing': must be key=value (key=null for no value)"),
        ("=1", "'=1': must be key=value (key=null for no value)"),
        ("optim.lr=", "'optim.lr=': must be key=value (key=null for no value)"),
    ],
)
def test_command_line_refusals(override: str, message: str):
    assert problems("seed: 0", override) == [f"command line: {message}"]


def test_override_that_is_not_yaml():
    (problem,) = problems("seed: 0", "optim.milestones=[0.5")
    assert problem.startswith("command line: 'optim.milestones=[0.5': the value is not valid YAML: line 1, col")


def test_scratch_needs_a_norm_that_learns_and_no_frozen_stage():
    (both,) = problems("model: {backbone: {weights: none}}")
    assert both.startswith("f.yaml: model: backbone.weights is none and backbone.norm is frozen_bn")
    assert "set backbone.norm to bn, sync_bn or gn, or give weights" in both
    assert "set backbone.frozen_stages to 0, or give weights" in both
    (norm,) = problems("model: {backbone: {weights: none, frozen_stages: 0}}")
    assert "frozen_stages" not in norm
    (stages,) = problems("model: {backbone: {weights: none, norm: gn}}")
    assert "frozen_stages is 2, which would freeze random layers" in stages
    assert "norm" not in stages
    parse_config("model: {backbone: {weights: none, norm: gn, frozen_stages: 0}}", source="f")
    parse_config("model: {weights: detector.pth, backbone: {weights: none}}", source="f")  # nothing starts at random


def test_all_problems_at_once_each_with_its_source():
    text = "optim: {lrr: 1, gamma: 2}\nmodel: {backbone: {norm: bn, frozen_stages: 0}}\ntrain: {steps: x}"
    assert sorted(problems(text, "seed=-1", "train.steps=y", "noequals")) == [
        "command line: 'noequals': must be key=value (key=null for no value)",
        "command line: seed: must be greater than or equal to 0, received -1",
        'command line: train.steps: must be a valid integer, received "y"',
        "f.yaml: optim.gamma: must be less than or equal to 1, received 2",
        "f.yaml: optim.lrr: unknown key; did you mean optim.lr?",
    ]


def test_contradiction_between_the_sources_names_both():
    text = "model: {backbone: {weights: none, norm: bn, frozen_stages: 0}}"
    (problem,) = problems(text, "model.backbone.norm=frozen_bn")
    assert problem.startswith("f.yaml and command line: model: backbone.weights is none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml: the file is empty; state at least one key, `name: my_run` for the defaults"),
        ("# only a comment\n", "f.yaml: the file is empty; state at least one key"),
        ("- 1\n- 2\n", "f.yaml: must be a mapping of `key: value` lines, received [1, 2]"),
        ("just words", 'f.yaml: must be a mapping of `key: value` lines, received "just words"'),
        ("seed: 0\nseed: 1\n", "f.yaml: not valid YAML: line 2, column 1: found the key seed a second time"),
        (
            "optim:\n  lr: 1\n  gamma: 1\n  lr: 2\n",
            "f.yaml: not valid YAML: line 4, column 3: found the key lr a second time",
        ),
        ("1: 2", "f.yaml: not valid YAML: line 1, column 1: found a key that is not a name"),
        ("? [a]\n: 2", "f.yaml: not valid YAML: line 1, column 3: found a key that is not a name"),
        ("seed: 0\noptim: {lr: 1\ntrain: 2", "f.yaml: not valid YAML: line 3, column 6: "),
        ("seed: \x00", "f.yaml: not valid YAML: unacceptable character"),
        ("optim: 5", "f.yaml: optim: must be a section with keys of its own, received 5"),
        ("optim:\n", "f.yaml: optim: must be a section with keys of its own, received null"),
        ("optim: {lr: 010}", 'f.yaml: optim.lr: must be a valid number, received "010"'),
        ("train: 5", "f.yaml: train: must be a section with keys of its own, received 5"),
        ("seed: !!python/name:os.system x", "f.yaml: not valid YAML: line 1, column 7: could not determine"),
    ],
)
def test_file_refusals(text: str, message: str):
    (problem,) = problems(text)
    assert problem.startswith(message)


def test_file_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="cannot be read as a text file"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.yaml: cannot be read as a text file"):
        load_config(tmp_path / "binary.yaml")


# The shipped files


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config(path: Path, tmp_path: Path):
    config = load_config(path)
    assert config.name == path.stem
    assert (config.train.steps is None) != (config.train.epochs is None)
    assert load_config(write(tmp_path, dump_config(config))) == config

    text = path.read_text(encoding="utf-8")
    for word in (f"--config configs/{path.name}", "torchrun", "# Cost:", "# Box AP"):
        assert word in text
    defaults, values = (dict(leaves(c.model_dump(mode="json"))) for c in (Config(), config))
    for key in dict(leaves(yaml.safe_load(text))):
        assert values[key] != defaults[key], f"{path.name} states the default of {key}"


def test_shipped_names():
    names = {path.stem for path in CONFIGS}
    assert names >= {
        "r50_fpn",
        "r50_fpn_3x",
        "r101_fpn",
        "x101_32x8d_fpn",
        "r18_fpn",
        "quickstart",
        "bccd",
    }


@pytest.mark.parametrize("name", ["r50_fpn_3x", "r101_fpn", "x101_32x8d_fpn"])
def test_3x_schedule(name: str):
    config = load_config(CONFIGS[0].parent / f"{name}.yaml")
    assert config.train.steps == 270_000
    assert [round(270_000 * m) for m in config.optim.milestones] == [210_000, 250_000]


def test_home_is_expanded(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {train: {images: ~/train, annotations: ~/train.json}}")
    split = load_config(path).data.train
    assert split.images == Path.home() / "train"
    assert split.annotations == Path.home() / "train.json"
