"""Our detector against `torchvision.models.detection` with the same weights, pixels and samples.

Torchvision infers the strides of the levels from the padded size, which goes wrong at P6 unless that is a multiple of
64: the image sizes below are odd, but the largest pad to 128 x 192.
"""

from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from fpn_det.models import roi_head as roi_head_module
from fpn_det.models import rpn as rpn_module
from fpn_det.models.backbone import ResNet
from fpn_det.models.faster_rcnn import FasterRCNN
from fpn_det.structures import Batch

K = 3
SIZES = [(97, 131), (120, 187), (64, 165)]
BOXES = [
    [[10.2, 12.5, 60.7, 55.1], [70, 20, 125.5, 90.3]],
    [],
    [[5, 6, 27.5, 30], [40, 3, 140, 62], [100, 30, 131, 58]],
]
LABELS = [[0, 2], [], [1, 1, 0]]
RPN_OPTIONS = {"smooth_l1_beta": 1 / 9, "post_nms_top_k_train": 2000, "min_size": 1e-3}
ROI_OPTIONS = {"smooth_l1_beta": 1 / 9, "min_size": 1e-2, "num_samples": 128}
# Small canonical size: RoIs of all four levels occur in images this small.
POOLER_OPTIONS = {"aligned": False, "sampling_ratio": 2, "canonical_size": 56}
LOSS_NAMES = {
    "rpn_objectness": "loss_objectness",
    "rpn_box": "loss_rpn_box_reg",
    "roi_class": "loss_classifier",
    "roi_box": "loss_box_reg",
}


@dataclass
class Pair:
    ours: FasterRCNN
    theirs: TorchvisionFasterRCNN
    batch: Batch

    @property
    def images(self) -> list[Tensor]:
        normalized = self.ours.normalize(self.batch.images, self.batch.sizes)
        return [image[:, :h, :w] for image, (h, w) in zip(normalized, SIZES, strict=True)]

    @property
    def targets(self) -> list[dict[str, Tensor]]:
        targets = self.batch.targets
        return [
            {"boxes": boxes[valid], "labels": labels[valid] + 1}
            for boxes, labels, valid in zip(targets.boxes, targets.labels, targets.valid, strict=True)
        ]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to `tolerance` times the largest element, which must not be zero."""
    assert actual.shape == expected.shape
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=tolerance * scale)


def random_boxes(*shape: int) -> Tensor:
    """Boxes of 1 to 151 pixels, some of which leave the image."""
    corner = torch.rand(*shape, 2) * 100
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2) ** 2 * 150], dim=-1)


def background_first(rows: Tensor) -> Tensor:
    """Our order of classes (background last) -> torchvision's (background first)."""
    return torch.cat([rows[-1:], rows[:-1]])


def their_name(name: str) -> str:
    """Torchvision's name of a parameter or buffer of ours."""
    for old, new in [
        ("backbone.stem.0.", "backbone.body.conv1."),
        ("backbone.stem.1.", "backbone.body.bn1."),
        ("backbone.layer", "backbone.body.layer"),
        ("neck.lateral.", "backbone.fpn.inner_blocks."),
        ("neck.output.", "backbone.fpn.layer_blocks."),
        ("rpn.head.convs.0.", "rpn.head.conv.0.0."),
        ("rpn.head.objectness.", "rpn.head.cls_logits."),
        ("rpn.head.deltas.", "rpn.head.bbox_pred."),
        ("roi_head.box_head.fcs.0.", "roi_heads.box_head.fc6."),
        ("roi_head.box_head.fcs.1.", "roi_heads.box_head.fc7."),
        ("roi_head.class_logits.", "roi_heads.box_predictor.cls_score."),
        ("roi_head.box_deltas.", "roi_heads.box_predictor.bbox_pred."),
    ]:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            if "fpn" in name:
                level, kind = name.split(".")[-2:]
                name = f"{name.rsplit('.', 2)[0]}.{level}.0.{kind}"
            return name
    raise KeyError(name)


def as_theirs(name: str, value: Tensor) -> Tensor:
    """A parameter of ours, or its gradient, in torchvision's layout (deltas of the background: zero)."""
    if name.startswith("roi_head.class_logits."):
        return background_first(value)
    if name.startswith("roi_head.box_deltas."):
        return torch.cat([torch.zeros_like(value[:4]), value])
    return value


def build_theirs(ours: FasterRCNN) -> TorchvisionFasterRCNN:
    channels = ours.rpn.head.convs[0].in_channels
    fc_dim = ours.roi_head.class_logits.in_features
    body = torchvision.models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
    backbone = BackboneWithFPN(
        body,
        return_layers={f"layer{i + 1}": str(i) for i in range(4)},
        in_channels_list=[64, 128, 256, 512],
        out_channels=channels,
    )
    theirs = TorchvisionFasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in (16, 32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 5),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2, canonical_scale=56),
        box_head=TwoMLPHead(channels * 49, fc_dim),
        box_predictor=FastRCNNPredictor(fc_dim, K + 1),
        box_batch_size_per_image=ROI_OPTIONS["num_samples"],
    )
    theirs.transform.resize = lambda image, target=None: (image, target)
    # They get our normalised pixels, equal to the bit: else rounding decides about ReLUs near 0 and near ties.
    theirs.transform.normalize = lambda image: image
    state = {
        their_name(name): as_theirs(name, value)
        for name, value in ours.state_dict().items()
        if "rpn.anchors" not in name
    }
    theirs.load_state_dict(state)  # strict: nothing of theirs is left at random
    return theirs


@pytest.fixture
def pair(make_model, make_batch) -> Pair:
    body = ResNet(name="resnet18", norm="frozen_bn", frozen_stages=0)
    for module in body.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.3, 0.9)
            module.bias.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    ours = make_model(
        body=body, num_classes=K, rpn=RPN_OPTIONS, roi=ROI_OPTIONS, pooler=POOLER_OPTIONS, anchors={"rounded": True}
    )
    # Weights of the last layers for which logits spread over several units and deltas over a few tenths.
    for layer, std in [
        (ours.rpn.head.convs[0], 0.1),
        (ours.rpn.head.objectness, 1.0),
        (ours.rpn.head.deltas, 0.1),
        (ours.roi_head.class_logits, 3.0),
        (ours.roi_head.box_deltas, 1.0),
    ]:
        nn.init.normal_(layer.weight, std=std)
        nn.init.normal_(layer.bias, std=0.3)
    batch = make_batch(SIZES, BOXES, LABELS)
    with torch.no_grad():  # no class wins everywhere
        features = ours.features(batch)
        proposals = ours.eval().rpn.propose(*ours.rpn(features), batch.sizes)
        logits, _ = ours.roi_head(features, proposals.boxes)
        ours.roi_head.class_logits.bias -= logits[proposals.valid].mean(dim=0)
    return Pair(ours=ours, theirs=build_theirs(ours), batch=batch)


def test_normalized_pixels(pair: Pair) -> None:
    transform = GeneralizedRCNNTransform(800, 1333, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    images = [image[:, :h, :w] / 255 for image, (h, w) in zip(pair.batch.images, SIZES, strict=True)]
    expected = transform.batch_images([transform.normalize(image) for image in images])
    close(pair.ours.normalize(pair.batch.images, pair.batch.sizes), expected, tolerance=1e-6)


def test_features_and_rpn_outputs(pair: Pair) -> None:
    features = pair.ours.features(pair.batch)
    images, _ = pair.theirs.transform(pair.images)
    their_features = list(pair.theirs.backbone(images.tensors).values())
    assert len(features) == len(their_features) == 5
    for ours, theirs in zip(features, their_features, strict=True):
        close(ours, theirs)
    logits, deltas, anchors = pair.ours.rpn(features)
    their_logits, their_deltas = pair.theirs.rpn.head(their_features)
    for i in range(5):
        close(logits[i], their_logits[i].permute(0, 2, 3, 1).flatten(1))
        close(deltas[i].flatten(1), their_deltas[i].permute(0, 2, 3, 1).flatten(1))
        assert 0.5 < logits[0].std() < 20
    their_anchors = pair.theirs.rpn.anchor_generator(images, their_features)[0]
    assert torch.equal(torch.cat(anchors), their_anchors)


@pytest.mark.parametrize("training", [True, False])
def test_proposals(pair: Pair, training: bool) -> None:
    pair.ours.train(training)
    pair.theirs.train(training)
    features = pair.ours.features(pair.batch)
    logits, deltas, anchors = pair.ours.rpn(features)
    proposals = pair.ours.rpn.propose(logits, deltas, anchors, pair.batch.sizes)
    images, targets = pair.theirs.transform(pair.images, pair.targets)
    their_boxes, _ = pair.theirs.rpn(images, pair.theirs.backbone(images.tensors), targets)
    for i, theirs in enumerate(their_boxes):
        ours = proposals.boxes[i, proposals.valid[i]]
        assert len(ours) == len(theirs) > 100
        # Not in order: torchvision sorts by the sigmoid, to which different logits are equal.
        distance = (ours[:, None] - theirs).abs().amax(dim=-1)
        assert distance.amin(dim=0).max() < 0.01
        assert distance.amin(dim=1).max() < 0.01
        assert (distance.argmin(dim=1) - torch.arange(len(ours))).abs().max() <= 2


def test_roi_features_and_outputs(pair: Pair) -> None:
    features = pair.ours.features(pair.batch)
    boxes = random_boxes(3, 80)
    assert pair.ours.roi_head.pooler.assign_levels(boxes).unique().tolist() == [0, 1, 2, 3]
    images, _ = pair.theirs.transform(pair.images)
    their_features = pair.theirs.backbone(images.tensors)
    pooled = pair.ours.roi_head.pooler(features, boxes)
    their_pooled = pair.theirs.roi_heads.box_roi_pool(their_features, list(boxes), images.image_sizes)
    close(pooled, their_pooled)
    logits, deltas = pair.ours.roi_head(features, boxes)
    their_logits, their_deltas = pair.theirs.roi_heads.box_predictor(pair.theirs.roi_heads.box_head(their_pooled))
    close(logits.flatten(0, 1).roll(1, dims=1), their_logits)
    close(deltas.flatten(0, 1), their_deltas.view(240, K + 1, 4)[:, 1:])


@pytest.mark.parametrize("most", [30, 3000])
def test_detections(pair: Pair, most: int) -> None:
    pair.ours.eval().roi_head.detections_per_image = most
    pair.theirs.eval().roi_heads.detections_per_img = most
    detections = pair.ours.predict(pair.batch)
    with torch.no_grad():
        their_detections = pair.theirs(pair.images)
    if most == 3000:  # the test is worth something: all classes, high and low scores
        assert torch.cat([d.labels for d in detections]).unique().tolist() == list(range(K))
        assert all(d.scores.max() - d.scores.min() > 0.5 for d in detections)
    for ours, theirs in zip(detections, their_detections, strict=True):
        assert len(ours) == 30 if most == 30 else 100 < len(ours) < 3000
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=0, atol=1e-5)  # in order
        # Scores that differ by one rounding may be in another order: find each detection among theirs.
        same = (ours.labels[:, None] == theirs["labels"] - 1) & ((ours.scores[:, None] - theirs["scores"]).abs() < 1e-5)
        same &= (ours.boxes[:, None] - theirs["boxes"]).abs().amax(dim=-1) < 0.01
        assert same.any(dim=1).all()
        assert same.any(dim=0).all()
        assert same.diagonal().float().mean() > 0.98


def choose(positive: Tensor, negative: Tensor, num: int, fraction: float) -> Tensor:
    """Deterministic samples of one image: the last positives, then the last negatives (the ground truth is last)."""
    chosen = positive.nonzero().squeeze(1).flip(0)[: int(num * fraction)]
    return torch.cat([chosen, negative.nonzero().squeeze(1).flip(0)[: num - len(chosen)]])


def our_sampler(
    positive: Tensor, negative: Tensor, noise: Tensor, *, num: int, positive_fraction: float
) -> tuple[Tensor, ...]:
    index = torch.zeros(len(positive), num, dtype=torch.int64)
    is_positive, valid = torch.zeros_like(index, dtype=torch.bool), torch.zeros_like(index, dtype=torch.bool)
    for i in range(len(positive)):
        chosen = choose(positive[i], negative[i], num, positive_fraction)
        index[i, : len(chosen)] = chosen
        is_positive[i, : len(chosen)] = positive[i, chosen]
        valid[i, : len(chosen)] = True
    return index, is_positive, valid


class TheirSampler:
    """Stands in for `BalancedPositiveNegativeSampler`."""

    def __init__(self, num: int, fraction: float) -> None:
        self.num, self.fraction = num, fraction
        self.positives: list[int] = []
        self.count = 0

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        masks: tuple[list[Tensor], list[Tensor]] = ([], [])
        for label in labels:
            positive, negative = label >= 1, label == 0
            chosen = torch.zeros_like(positive)
            chosen[choose(positive, negative, self.num, self.fraction)] = True
            masks[0].append((positive & chosen).to(torch.uint8))
            masks[1].append((negative & chosen).to(torch.uint8))
        self.positives = [int(mask.sum()) for mask in masks[0]]
        self.count = sum(self.positives) + sum(int(mask.sum()) for mask in masks[1])
        return masks


@pytest.mark.parametrize("roi_samples", [128, 4000], ids=["full", "short"])
def test_losses_and_gradients(pair: Pair, monkeypatch: pytest.MonkeyPatch, roi_samples: int) -> None:
    """All of a training step but the random choice; "short" wants more RoIs than there are, so some are invalid.

    The losses of the second stage are then divided by what was wanted here, by what there is in torchvision.
    In double precision: we fold frozen norms into convolutions, whose rounding else decides about ReLUs near 0.
    """
    pair.ours.double()
    pair.theirs.double()
    monkeypatch.setattr(rpn_module, "sample", our_sampler)
    monkeypatch.setattr(roi_head_module, "sample", our_sampler)
    pair.ours.roi_head.num_samples = roi_samples
    anchor_sampler, roi_sampler = TheirSampler(256, 0.5), TheirSampler(roi_samples, 0.25)
    pair.theirs.rpn.fg_bg_sampler = anchor_sampler
    pair.theirs.roi_heads.fg_bg_sampler = roi_sampler
    pair.ours.train()
    pair.theirs.train()

    losses, stats = pair.ours(pair.batch)
    their_losses = pair.theirs(pair.images, pair.targets)
    share = roi_sampler.count / (roi_samples * 3)
    assert (share == 1) == (roi_samples == 128)
    for name in ("loss_classifier", "loss_box_reg"):
        their_losses[name] = their_losses[name] * share
    assert stats["rpn_positives"] == sum(anchor_sampler.positives) / 3 > 1
    assert stats["roi_positives"] == sum(roi_sampler.positives) / 3 > 1
    assert losses.keys() == LOSS_NAMES.keys()
    for ours, theirs in LOSS_NAMES.items():
        close(losses[ours], their_losses[theirs])

    torch.stack(list(losses.values())).sum().backward()
    torch.stack(list(their_losses.values())).sum().backward()
    their_grads = {name: p.grad for name, p in pair.theirs.named_parameters()}
    assert len(their_grads) == len(list(pair.ours.parameters()))
    for name, parameter in pair.ours.named_parameters():
        assert parameter.grad is not None, name
        close(as_theirs(name, parameter.grad), their_grads[their_name(name)])


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
def test_classifier_weights_give_the_same_features(name: str, norm: str) -> None:
    classifier = torchvision.models.get_model(name, weights=None).eval()
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    body = ResNet(name=name, norm=norm, frozen_stages=2).eval()
    body.load_classifier(classifier.state_dict())
    getter = IntermediateLayerGetter(classifier, {f"layer{i + 1}": str(i) for i in range(4)})
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        features, expected = body(images), list(getter(images).values())
    assert [f.shape[1] for f in features] == list(body.channels)
    for ours, theirs in zip(features, expected, strict=True):
        close(ours, theirs)
