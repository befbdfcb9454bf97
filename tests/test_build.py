"""From a config to objects: what arrives where, and what is refused."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from fpn_det import build
from fpn_det.config import Config, load_config
from fpn_det.engine.distributed import Process
from fpn_det.structures import InputError


@pytest.fixture
def config(tiny):
    """Read `tiny` with more overrides."""

    def read(*overrides: str) -> Config:
        return load_config(Path(tiny[1]), [*tiny[2:], *overrides])

    return read


def keys(config: Config, count: int, **options) -> list:
    data = build.load_train_data(config)
    return list(islice(build.build_train_loader(config, data, **options).batch_sampler, count))


def test_steps_from_epochs(tiny):
    def steps(epochs: float, num_images: int) -> int:
        without_steps = [o for o in tiny[2:] if not o.startswith("train.steps")]
        return build.num_steps(load_config(Path(tiny[1]), [*without_steps, f"train.epochs={epochs}"]), num_images)

    assert [steps(1, 24), steps(1, 25), steps(0.5, 24), steps(12, 100), steps(0.001, 24)] == [6, 7, 3, 300, 1]


def test_given_steps(config):
    assert build.num_steps(config("train.steps=5"), 1000) == 5


def test_learning_rate_follows_the_batch(config):
    assert build.peak_lr(config("optim.lr=0.02", "optim.base_batch_size=16")) == 0.005
    assert build.peak_lr(config("optim.lr=0.02", "optim.base_batch_size=16", "optim.scale_lr=false")) == 0.02
    schedule = build.build_schedule(config("optim.lr=0.02", "optim.base_batch_size=16", "optim.schedule=step"), 90)
    assert [schedule(s) for s in (0, 2, 59, 60, 80)] == pytest.approx([5e-6, 5e-3, 5e-3, 5e-4, 5e-5])


def test_a_short_run_leaves_its_warm_up(config):
    schedule = build.build_schedule(config("optim.warmup_steps=1000", "optim.warmup_factor=0.001"), 40)
    assert schedule(0) == pytest.approx(0.001 * schedule(4), rel=0.03)
    assert schedule(4) > schedule(5) > schedule(39)


@pytest.mark.parametrize(
    ("every", "steps", "expected"), [(None, 90_000, 5000), (None, 600, 60), (None, 3, 1), (7, 600, 7), (0, 600, 0)]
)
def test_interval(every, steps, expected):
    assert build.interval(every, steps) == expected


def test_empty_images(config):
    everything, filled = (build.load_train_data(config(f"data.keep_empty={v}")) for v in ("true", "false"))
    counts = everything.box_offsets.diff()
    assert len(everything) == 24
    assert len(filled) == int((counts > 0).sum())
    assert len(build.load_val_data(config("data.keep_empty=false"))) == 8


def test_num_classes(config):
    number = len(build.load_train_data(config()).categories)
    assert build.load_train_data(config(f"model.num_classes={number}"))
    with pytest.raises(InputError, match=r"model\.num_classes is 20, but the data set has"):
        build.load_train_data(config("model.num_classes=20"))


def test_unusable_boxes_are_shown_when_none_is_left(config, shapes, tmp_path):
    content = json.loads((shapes / "annotations/train.json").read_text())
    for annotation in content["annotations"]:
        annotation["bbox"][2] = 0
    (tmp_path / "flat.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"no usable box[\s\S]*x bbox without area"):
        build.load_train_data(config(f"data.train.annotations={tmp_path / 'flat.json'}"))


def test_train_loader_resumes_and_shares_out(config):
    options = config("train.accumulate=2", "train.batch_size=8")
    whole = keys(options, 12)
    assert all(len(batch) == 2 for batch in keys(options, 12, process=Process(world_size=2)))
    assert keys(options, 6, start_step=3) == whole[6:]  # 2 micro-batches of 4 per step
    ranks = [keys(options, 4, process=Process(rank=r, world_size=2)) for r in (0, 1)]
    step = [key for rank in ranks for batch in rank[:2] for key in batch]
    assert sorted(step) == sorted(key for batch in whole[:2] for key in batch)
    assert len(set(step)) == 8
    assert keys(config("train.accumulate=2", "train.batch_size=8", "seed=1"), 12) != whole


def test_train_loader_refuses_what_does_not_divide(config):
    with pytest.raises(InputError, match=r"train\.batch_size 4 does not divide into 3 processes x train\.accumulate 2"):
        keys(config("train.accumulate=2"), 1, process=Process(world_size=3))


def test_transforms(config):
    options = config("data.short_sides=[96]", "data.long_side=200", "data.horizontal_flip=1", "data.test_short_side=32")
    data = build.load_train_data(options)
    batch = next(iter(build.build_train_loader(options, data)))
    assert batch.sizes.amin(1).tolist() == [96] * 4
    plain = next(iter(build.build_train_loader(config("data.short_sides=[96]", "data.long_side=200"), data)))
    assert torch.equal(batch.image_ids, plain.image_ids)
    val = next(iter(build.build_val_loader(options, build.load_val_data(options))))
    assert val.sizes.amin(1).tolist() == [32] * 8
    for loader in (
        build.build_train_loader(config("data.resize=float"), data),
        build.build_val_loader(config("data.resize=float"), data),
    ):
        assert next(iter(loader)).images.dtype == torch.float32


def test_views_of_an_image(config):
    """Test-time augmentation: every size, each plain and mirrored, over the same batches."""
    options = config("eval.tta={short_sides: [32, 48], long_side: 50}", "eval.batch_size=1")
    transforms = build.build_test_transforms(options)
    assert [(t.short_side, t.long_side, t.horizontal_flip) for t in transforms] == [
        (32, 50, False),
        (32, 50, True),
        (48, 50, False),
        (48, 50, True),
    ]
    data = build.load_val_data(options)
    views = [(next(iter(v.batches)), v.flipped) for v in build.build_val_views(options, data)]
    assert [flipped for _, flipped in views] == [False, True, False, True]
    (plain, _), (mirrored, _), (larger, _), _ = views
    width = int(plain.sizes[0, 1])
    assert torch.equal(mirrored.images[..., :width], plain.images[..., :width].flip(3))
    assert not torch.equal(mirrored.images, plain.images)
    assert plain.sizes.min() == 32
    assert larger.sizes.max() == 50
    assert all(torch.equal(v.image_ids, plain.image_ids) for v, _ in views)

    [only] = build.build_val_views(config(), data)
    assert not only.flipped
    assert next(iter(only.batches)).sizes.tolist() == next(iter(build.build_val_loader(config(), data))).sizes.tolist()
    assert len(build.build_test_transforms(config("eval.tta={horizontal_flip: false}"))) == 9
    with pytest.raises(InputError, match=r"eval\.tta .* model\.kind rpn"):
        build.build_test_transforms(config("eval.tta={}", "model.kind=rpn"))


def test_val_loader_shows_every_image_once(config):
    data = build.load_val_data(config())
    loaders = [
        build.build_val_loader(config("eval.batch_size=3"), data, process=Process(rank=r, world_size=2)) for r in (0, 1)
    ]
    ids = [i for loader in loaders for batch in loader for i in batch.image_ids.tolist()]
    assert sorted(ids) == sorted(data.image_ids.tolist())


def test_model_follows_the_config(config):
    options = config(
        "model.roi_head.score_thresh=0.3", "model.roi_head.class_agnostic=true", "model.rpn.nms_thresh=0.6"
    )
    model = build.build_model(options, 5, pretrained=True)
    assert (model.roi_head.num_classes, model.roi_head.score_thresh) == (5, 0.3)
    assert model.roi_head.class_logits.out_features == 6
    assert model.roi_head.box_deltas.out_features == 4
    assert (model.rpn.nms_thresh, model.rpn.pre_nms_top_k) == (0.6, {True: 50, False: 50})
    frozen = build.build_model(config("model.backbone.norm=gn"), 5, pretrained=False)
    assert any(isinstance(m, torch.nn.GroupNorm) for m in frozen.backbone.modules())


def test_backbone_weights(config, tmp_path):
    """Loaded if wanted, and refused with the key and the tensor when they do not fit."""
    source = build.build_model(config(), 2, pretrained=False).backbone.state_dict()
    renamed = {
        k.replace("stem.0.", "conv1.").replace("stem.1.", "bn1."): v + 1 if v.is_floating_point() else v
        for k, v in source.items()
    }
    torch.save(renamed, tmp_path / "body.pth")
    given = config(f"model.backbone.weights={tmp_path / 'body.pth'}")
    loaded = build.build_model(given, 2, pretrained=True).backbone.state_dict()
    assert torch.equal(loaded["layer2.0.conv1.weight"], source["layer2.0.conv1.weight"] + 1)
    assert torch.equal(loaded["stem.0.weight"], source["stem.0.weight"] + 1)
    fresh = build.build_model(given, 2, pretrained=False).backbone.state_dict()
    assert not torch.equal(fresh["layer2.0.conv1.weight"], loaded["layer2.0.conv1.weight"])

    torch.save({k: v for k, v in renamed.items() if k != "layer1.0.conv1.weight"}, tmp_path / "body.pth")
    with pytest.raises(
        InputError, match=r"^model\.backbone\.weights .*body\.pth: .*missing \['layer1\.0\.conv1\.weight'\]"
    ):
        build.build_model(given, 2, pretrained=True)


def test_frozen_parameters_are_not_optimised(config, tmp_path):
    model = build.build_model(config("model.neck.channels=8"), 2, pretrained=False)
    for p in model.backbone.layer1.parameters():
        p.requires_grad_(False)
    optimizer = build.build_optimizer(config("optim.kind=adamw", "optim.norm_weight_decay=0.125"), model)
    held = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert held.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    assert held[id(model.backbone.layer2[0].bn1.weight)] == 0.125
    assert held[id(model.backbone.layer2[0].conv1.weight)] == 0.01
