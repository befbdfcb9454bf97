"""From a config to objects: what arrives where, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import islice
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from fpn_det import build
from fpn_det.config import Config, load_config, parse_config
from fpn_det.engine.distributed import Process
from fpn_det.models.backbone import BODIES
from fpn_det.models.faster_rcnn import DetectionModel, FasterRCNN, FastRCNN, ProposalNetwork
from fpn_det.models.fpn import FPN, PAFPN, SingleLevel
from fpn_det.models.roi_head import CascadeRoIHead, ConvFCHead, Res5Head, RoIHead
from fpn_det.models.rpn import RPNHead, UnsharedRPNHead
from fpn_det.structures import Batch, InputError, Proposals, Targets


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
    with pytest.raises(InputError, match=r"no usable box[\s\S]*annotations left out: bbox without area"):
        build.load_train_data(config(f"data.train.annotations={tmp_path / 'flat.json'}"))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.neck.norm=frozen_bn", "model.neck.norm"),
        ("model.roi_head.box_head={num_convs: 1, norm: frozen_bn}", "model.roi_head.box_head.norm"),
    ],
)
def test_random_layers_are_not_trained_under_frozen_norms(config, override: str, key: str):
    config = config("model.neck.channels=32", override)
    with pytest.raises(InputError, match=rf"^{re.escape(key)} is frozen_bn.* set it to bn"):
        build.load_train_data(config)
    build.build_model(config, 5, pretrained=False)  # to evaluate an imported one


def test_a_batch_norm_without_eps_is_not_trained(config):
    eps = "model.backbone.norm_eps=0"
    with pytest.raises(InputError, match=r"^model\.backbone\.norm_eps is 0, under which norm bn cannot be trained"):
        build.load_train_data(config(eps))
    build.load_train_data(config(eps, "model.weights=detector.pth", "model.backbone.norm=frozen_bn"))


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


# Variants of the model


SMALL = """
model:
  backbone: {name: resnet18, weights: none, norm: bn, frozen_stages: 0}
  rpn: {num_samples: 64, pre_nms_top_k_train: 50, pre_nms_top_k_test: 20, post_nms_top_k_train: 50}
  roi_head: {num_samples: 32, score_thresh: 0}
"""
NUM_CLASSES = 10  # at least those of the shapes
C4 = ("model.neck.kind=single", "model.anchors.sizes=[[32, 64]]")
RES5 = (*C4, "model.roi_head={pool_size: 4, box_head: {kind: res5}}")
NARROW = ("model.neck.channels=32", "model.roi_head.box_head.fc_dim=64")
CASCADE = "model.roi_head.kind=cascade"
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, type]]] = {
    "default": (
        NARROW,
        {
            "": FasterRCNN,
            "neck": FPN,
            "rpn.head": RPNHead,
            "roi_head": RoIHead,
            "roi_head.box_head": ConvFCHead,
        },
    ),
    "bottom-up only": ((*NARROW, "model.neck.top_down=false"), {"neck": FPN}),
    "top-down only": ((*NARROW, "model.neck.lateral=false"), {"neck": FPN}),
    "finest only": ((*NARROW, "model.neck.finest_only=true", "model.anchors.sizes=[[16, 32, 64]]"), {"neck": FPN}),
    "bilinear": ((*NARROW, "model.neck.upsample=bilinear"), {"neck": FPN}),
    "deconv": ((*NARROW, "model.neck.upsample=deconv"), {"neck.upsample.0.conv": nn.ConvTranspose2d}),
    "pixel shuffle": ((*NARROW, "model.neck.upsample=pixel_shuffle"), {"neck.upsample.0.conv": nn.Conv2d}),
    "rough top": ((*NARROW, "model.neck.smooth_top=false"), {"neck.output.3": nn.Identity}),
    "neck with a norm": ((*NARROW, "model.neck.norm=gn"), {"neck.lateral.0.1": nn.GroupNorm}),
    "PAFPN": ((*NARROW, "model.neck.kind=pafpn", "model.neck.norm=bn"), {"neck": PAFPN}),
    "C4": ((*C4, "model.rpn.channels=32"), {"neck": SingleLevel}),
    "C5": ((*C4, "model.neck.stage=5", "model.rpn.channels=32"), {"neck": SingleLevel}),
    "res5": (RES5, {"neck": SingleLevel, "roi_head.box_head": Res5Head}),
    "res5 cascade": ((*RES5, CASCADE), {"roi_head": CascadeRoIHead, "roi_head.stages.2.box_head": Res5Head}),
    "stride in 1x1": (
        (*NARROW, "model.backbone={name: resnet26, stride_in_1x1: true, norm: gn}"),
        {"backbone.stem.1": nn.GroupNorm},
    ),
    "unshared RPN": (
        (*NARROW, "model.rpn={shared_head: false, num_convs: 2, channels: 8}"),
        {"rpn.head": UnsharedRPNHead},
    ),
    "IoU losses": ((*NARROW, "model.rpn.box_loss=giou", "model.roi_head.box_loss=ciou"), {"roi_head": RoIHead}),
    "class-agnostic": ((*NARROW, "model.roi_head={class_agnostic: true, box_loss: diou}"), {"roi_head": RoIHead}),
    "4conv1fc": (
        (*NARROW, "model.roi_head.box_head={num_convs: 4, num_fcs: 1, conv_channels: 32, norm: bn}"),
        {"roi_head.box_head.convs.3.1": nn.BatchNorm2d},
    ),
    "cascade": ((*NARROW, CASCADE), {"roi_head": CascadeRoIHead, "roi_head.stages.2.box_head": ConvFCHead}),
    "class-specific cascade": (
        (*NARROW, CASCADE, "model.roi_head.class_agnostic=false", "model.roi_head.box_loss=giou"),
        {"roi_head": CascadeRoIHead},
    ),
    "RPN": ((*NARROW, "model.kind=rpn"), {"": ProposalNetwork}),
    "RPN on C4": ((*C4, "model.rpn.channels=32", "model.kind=rpn"), {"": ProposalNetwork, "neck": SingleLevel}),
    "Fast R-CNN": ((*NARROW, "model.kind=fast_rcnn"), {"": FastRCNN}),
    "Fast R-CNN on C4": ((*RES5, "model.kind=fast_rcnn"), {"": FastRCNN, "roi_head.box_head": Res5Head}),
    "cascade Fast R-CNN": (
        (*NARROW, CASCADE, "model.kind=fast_rcnn", "model.neck.finest_only=true"),
        {"": FastRCNN, "roi_head": CascadeRoIHead},
    ),
}


def small(*overrides: str) -> Config:
    return parse_config(SMALL, source="small", overrides=overrides)


def part(model: DetectionModel, path: str) -> object:
    return attrgetter(path)(model) if path else model


@pytest.fixture(scope="module")
def batch(shapes) -> Batch:
    """Four images with their ground truth, some of it as proposals."""
    options = parse_config(
        f"data: {{train: {{images: '{shapes / 'train'}', annotations: '{shapes / 'annotations/train.json'}'}},"
        " short_sides: [64], num_workers: 0}\ntrain: {batch_size: 4}",
        source="test",
    )
    loaded = next(iter(build.build_train_loader(options, build.load_train_data(options))))
    boxes = torch.cat([loaded.targets.boxes, torch.tensor([[[0.0, 0, 60, 60], [30, 5, 50, 64]]]).expand(4, 2, 4)], 1)
    proposals = Proposals(boxes=boxes, scores=boxes[..., 0], valid=boxes.any(-1))
    return dataclasses.replace(loaded, proposals=proposals)


def emptied(batch: Batch) -> Batch:
    """The images without ground truth and without given proposals."""
    boxes, flags = torch.zeros(4, 0, 4), torch.zeros(4, 0, dtype=torch.bool)
    return dataclasses.replace(
        batch,
        targets=Targets(boxes=boxes, labels=flags.long(), valid=flags),
        proposals=Proposals(boxes=boxes, scores=flags.float(), valid=flags),
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str, batch: Batch):
    """It is what it says; every trained parameter gets a gradient, which DistributedDataParallel waits for."""
    overrides, types = VARIANTS[name]
    model = build.build_model(small(*overrides), NUM_CLASSES, pretrained=True).train()
    for path, expected in types.items():
        assert type(part(model, path)) is expected, path
    for images in (batch, emptied(batch)):
        model.zero_grad(set_to_none=True)
        losses, stats = model(images)
        assert all(x.isfinite() for x in (losses | stats).values())
        torch.stack(list(losses.values())).sum().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
    detections = model.eval().predict(batch)
    assert len(detections) == 4
    assert all(len(d) > 0 and d.boxes.isfinite().all() for d in detections)
    if isinstance(model, FastRCNN):
        assert [len(d) for d in model.predict(emptied(batch))] == [0] * 4


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("model.pixel_mean=[1, 2, 3]", "pixel_mean.shape", (3, 1, 1)),
        ("model.delta_clamp=both", "rpn.delta_clamp", "both"),
        ("model.delta_clamp=both", "roi_head.delta_clamp", "both"),
        ("model.backbone={name: resnet26, stride_in_1x1: true}", "backbone.layer3.0.conv1.stride", (2, 2)),
        ("model.backbone.norm_eps=0", "backbone.stem.1.eps", 0),
        ("model.neck.channels=48", "neck.channels", 48),
        ("model.neck.upsample=bilinear", "neck.upsample.0.kind", "bilinear"),
        ("model.anchors.inferred_strides=true", "rpn.anchors.inferred_strides", True),
        ("model.anchors.sizes=[[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]", "rpn.head.objectness.out_channels", 6),
        ("model.anchors.ratios=[1, 2]", "rpn.head.deltas.out_channels", 8),
        ("model.rpn={num_convs: 3, channels: 5}", "rpn.head.convs.2.in_channels", 5),
        ("model.rpn={box_loss: diou}", "rpn.box_loss", "diou"),
        ("model.rpn.smooth_l1_beta=0.5", "rpn.smooth_l1_beta", 0.5),
        ("model.rpn.box_loss_weight=7", "rpn.box_loss_weight", 7),
        ("model.roi_head.box_loss=giou", "roi_head.box_loss", "giou"),
        ("model.roi_head.box_loss_weight=7", "roi_head.box_loss_weight", 7),
        ("model.roi_head.smooth_l1_beta=0.5", "roi_head.smooth_l1_beta", 0.5),
        ("model.roi_head.background_rows=11", "roi_head.class_logits.out_features", 14),
        ("model.roi_head.box_weights=[1, 2, 3, 4]", "roi_head.box_weights", (1, 2, 3, 4)),
        ("model.roi_head.positive_iou=0.4", "roi_head.positive_iou", 0.4),
        ("model.roi_head.min_size=2", "roi_head.min_size", 2),
        ("model.roi_head.min_size=none", "roi_head.min_size", None),
        ("model.roi_head.detections_per_image=7", "roi_head.detections_per_image", 7),
        ("model.roi_head.pool_size=5", "roi_head.pooler.output_size", 5),
        ("model.roi_head.pool_size=5", "roi_head.box_head.fcs.0.in_features", 256 * 25),
        ("model.roi_head.sampling_ratio=2", "roi_head.pooler.sampling_ratio", 2),
        ("model.roi_head.aligned=false", "roi_head.pooler.aligned", False),
        ("model.roi_head.canonical_level=5", "roi_head.pooler.canonical_level", 5),
        ("model.roi_head.canonical_size=112", "roi_head.pooler.canonical_size", 112),
        ("model.roi_head.level_eps=1e-8", "roi_head.pooler.level_eps", 1e-8),
        ("model.roi_head.level_bias=1e-6", "roi_head.pooler.level_bias", 1e-6),
        ("model.roi_head.box_head={num_convs: 2, conv_channels: 8}", "roi_head.box_head.convs.1.in_channels", 8),
        ("model.roi_head.box_head={num_fcs: 3, fc_dim: 9}", "roi_head.box_head.fcs.2.in_features", 9),
        ("model.roi_head={kind: cascade, nms_thresh: 0.25}", "roi_head.stages.2.nms_thresh", 0.25),
        ("model.roi_head={kind: cascade, box_loss_weight: 3}", "roi_head.stages.1.box_loss_weight", 3),
        ("model.roi_head.kind=cascade", "roi_head.loss_weights", (1, 0.5, 0.25)),
        ("model.roi_head.kind=cascade", "roi_head.stages.0.positive_iou", 0.5),
        ("model.roi_head.kind=cascade", "roi_head.stages.2.positive_iou", 0.7),
        ("model.roi_head.kind=cascade", "roi_head.stages.1.box_weights", (20, 20, 10, 10)),
        ("model.roi_head.kind=cascade", "roi_head.stages.0.box_deltas.out_features", 4),
        ("model.roi_head={kind: cascade, class_agnostic: false}", "roi_head.stages.0.box_deltas.out_features", 12),
    ],
)
def test_value_arrives(override: str, path: str, expected: object):
    with torch.device("meta"):  # shapes alone
        model = build.build_model(small(override), 3, pretrained=False)
    assert part(model, path) == expected


def test_anchors_follow_the_config():
    model = build.build_model(small("model.anchors={rounded: true, ratios: [0.5]}"), 3, pretrained=False)
    assert [level[0].tolist() for level in model.rpn.anchors([(1, 1)] * 5)][:2] == [
        [-23, -11, 23, 11],
        [-45, -23, 45, 23],
    ]
    c4 = build.build_model(small(*C4, "model.kind=rpn", "model.rpn.channels=8"), 3, pretrained=False)
    (anchors,) = c4.rpn.anchors([(2, 2)])
    assert len(anchors) == 2 * 2 * 6
    torch.testing.assert_close(anchors[-1] - anchors[5], torch.full((4,), 16.0))  # the stride of C4


@pytest.mark.parametrize("kind", ["standard", "cascade"])
@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_pretrained_c4_and_res5(tmp_path, kind: str, norm: str):
    """The classifier's layer4 goes into every box head, the rest into the body."""
    classifier = torchvision.models.ResNet(**BODIES["resnet18"]).state_dict()
    torch.save(classifier, tmp_path / "body.pth")
    backbone = f"model.backbone={{weights: {tmp_path / 'body.pth'}, norm: {norm}, norm_eps: 1e-3}}"
    options = small(*RES5, backbone, f"model.roi_head.kind={kind}")
    model = build.build_model(options, 3, pretrained=True)
    heads = model.roi_head.heads if kind == "cascade" else [model.roi_head]
    assert len(heads) == (3 if kind == "cascade" else 1)
    for head in heads:
        state = head.box_head.state_dict()
        assert {k for k in state if "num_batches" not in k} == {
            k for k in classifier if k.startswith("layer4.") and "num_batches" not in k
        }
        assert all(torch.equal(v, classifier[k]) for k, v in state.items())
        assert {m.eps for m in head.box_head.modules() if "Norm" in type(m).__name__} == {1e-3}
    assert torch.equal(model.backbone.stem[0].weight, classifier["conv1.weight"])
    assert torch.equal(model.backbone.layer3[1].conv2.weight, classifier["layer3.1.conv2.weight"])
    assert not hasattr(model.backbone, "layer4")
    untrained = build.build_model(options, 3, pretrained=False)
    head = untrained.roi_head.heads[0] if kind == "cascade" else untrained.roi_head
    assert not torch.equal(head.box_head.layer4[0].conv1.weight, classifier["layer4.0.conv1.weight"])

    torch.save({k: v for k, v in classifier.items() if k != "layer4.0.conv1.weight"}, tmp_path / "body.pth")
    with pytest.raises(InputError, match=r"^model\.backbone\.weights .*: .*missing \['layer4\.0\.conv1\.weight'\]"):
        build.build_model(options, 3, pretrained=True)


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
