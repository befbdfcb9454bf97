import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.ops import generalized_box_iou_loss

from fpn_det import boxes as box_ops
from fpn_det.models.roi_head import ConvFCHead, Res5Head, RoIHead, RoISamples
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.structures import Proposals, Targets

K = 3
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
SIZES = torch.tensor([[100, 150], [90, 60]])
SEEDS = torch.tensor([3, 4])


def make_head(**options) -> RoIHead:
    return RoIHead(
        pooler=MultiLevelRoIAlign(strides=(4, 8), output_size=2),
        box_head=ConvFCHead(in_channels=4, pool_size=2, fc_dim=8),
        num_classes=K,
        **options,
    )


class FixedHead(RoIHead):
    """A head whose logits and deltas are given."""

    def __init__(self, logits: Tensor, deltas: Tensor, **options) -> None:
        box_head = ConvFCHead(in_channels=1, pool_size=1, fc_dim=1)
        super().__init__(pooler=MultiLevelRoIAlign(strides=(4,)), box_head=box_head, num_classes=K, **options)
        self.given = logits, deltas

    def forward(self, features: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        return self.given


def propose(boxes: Tensor, valid: Tensor | None = None) -> Proposals:
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool) if valid is None else valid
    return Proposals(boxes=boxes, scores=torch.zeros(boxes.shape[:2]), valid=valid)


def logits_of(probabilities: list) -> Tensor:
    """(N, P, K) class scores -> logits with the rest for the background."""
    scores = torch.tensor(probabilities, dtype=torch.float32)
    return torch.cat([scores, 1 - scores.sum(dim=-1, keepdim=True)], dim=-1).log()


def test_shapes_and_init() -> None:
    features, boxes = [torch.randn(2, 4, 20, 20), torch.randn(2, 4, 10, 10)], torch.rand(2, 5, 4) * 20
    boxes[..., 2:] += 30
    for agnostic, count in [(False, K), (True, 1)]:
        head = make_head(class_agnostic=agnostic)
        logits, deltas = head(features, boxes)
        assert (logits.shape, deltas.shape) == ((2, 5, K + 1), (2, 5, count, 4))
        assert head.class_logits.weight.std().item() == pytest.approx(0.01, rel=0.5)
        assert head.box_deltas.weight.std().item() == pytest.approx(0.001, rel=0.5)
        assert not head.class_logits.bias.any()
        assert not head.box_deltas.bias.any()


def test_box_head_is_two_relu_layers() -> None:
    head = ConvFCHead(in_channels=4, pool_size=2, fc_dim=8)
    pooled = torch.randn(3, 4, 2, 2)
    fc1, fc2 = head.fcs
    hidden = (pooled.flatten(1) @ fc1.weight.T + fc1.bias).relu()
    torch.testing.assert_close(head(pooled), (hidden @ fc2.weight.T + fc2.bias).relu())


@pytest.mark.parametrize("norm", [None, "gn"])
def test_box_head_of_four_convolutions(norm: str | None) -> None:
    """Convolution, norm, ReLU, four times, then one layer; the norm replaces the bias."""
    head = ConvFCHead(in_channels=4, pool_size=3, num_convs=4, conv_channels=64, num_fcs=1, fc_dim=8, norm=norm)
    assert (head.out_channels, head.fcs[0].in_features, len(head.fcs)) == (8, 64 * 9, 1)
    names = {k.removesuffix(".weight") for k in head.state_dict() if k.endswith("weight")}
    assert names == {f"convs.{i}{x}" for i in range(4) for x in ((".0", ".1") if norm else ("",))} | {"fcs.0"}
    assert ("convs.0.0.bias" in head.state_dict()) is False
    for p in head.parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, -0.5, 0.5)
    pooled = torch.randn(5, 4, 3, 3)
    x = pooled
    for conv in head.convs:
        weight = conv[0].weight if norm else conv.weight
        x = nn.functional.conv2d(x, weight, None if norm else conv.bias, padding=1)
        x = nn.functional.group_norm(x, 32, conv[1].weight, conv[1].bias).relu() if norm else x.relu()
    (fc,) = head.fcs
    torch.testing.assert_close(head(pooled), (x.flatten(1) @ fc.weight.T + fc.bias).relu())
    first = (head.convs[0][0] if norm else head.convs[0]).weight
    assert first.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # fan-out, for ReLU


def test_res5_as_box_head() -> None:
    """The last stage of a body on cells of C4; classifier and boxes read the mean of its cells."""
    box_head = Res5Head(name="resnet18", norm="frozen_bn")
    head = RoIHead(
        pooler=MultiLevelRoIAlign(strides=(16,), output_size=6), box_head=box_head, num_classes=K, class_agnostic=True
    )
    c4, boxes = torch.randn(2, 256, 6, 8), torch.tensor([[[10.0, 20, 90, 80], [0, 0, 40, 70]]] * 2)
    logits, deltas = head([c4], boxes)
    assert (logits.shape, deltas.shape) == ((2, 2, K + 1), (2, 2, 1, 4))
    c5 = box_head.layer4(head.pooler([c4], boxes))
    assert c5.shape == (4, 512, 3, 3)
    hidden = c5.mean((2, 3))
    torch.testing.assert_close(logits.flatten(0, 1), head.class_logits(hidden))
    torch.testing.assert_close(deltas.flatten(0, 2), head.box_deltas(hidden))


def test_sample_labels_and_matches(make_targets) -> None:
    head = make_head(num_samples=8, positive_fraction=1.0)
    gt = [[10.0, 10, 50, 50], [60.0, 20, 90, 80]]
    boxes = torch.tensor(
        [[[12.0, 10, 50, 52], [10, 30, 50, 70], [60, 20, 90, 50], [100, 0, 120, 20], [10, 10, 50, 49]]] * 2
    )  # IoU 0.90 with gt 0; 1/3; exactly 0.5 with gt 1; 0; 0.975 but padding
    valid = torch.tensor([[True, True, True, True, False]] * 2)
    targets = make_targets([gt, []], [[2, 1], []])
    samples = head.sample(propose(boxes, valid), targets, SEEDS)
    assert samples.boxes.shape == (2, 7, 4)  # 5 proposals and 2 ground truths are fewer than 8

    found = {tuple(box): (label, tuple(match)) for box, label, match in zip(
        samples.boxes[0, samples.valid[0]].tolist(),
        samples.labels[0, samples.valid[0]].tolist(),
        samples.gt_boxes[0, samples.valid[0]].tolist(),
        strict=True,
    )}  # fmt: skip
    nothing = (0.0, 0.0, 0.0, 0.0)
    assert found == {
        (12, 10, 50, 52): (2, tuple(gt[0])),
        (10, 30, 50, 70): (K, nothing),
        (60, 20, 90, 50): (1, tuple(gt[1])),
        (100, 0, 120, 20): (K, nothing),
        tuple(gt[0]): (2, tuple(gt[0])),  # the ground truth itself
        tuple(gt[1]): (1, tuple(gt[1])),
    }
    # An image without objects: its four proposals, all background; the rest is padding.
    assert samples.valid[1].sum() == 4
    assert (samples.labels[1] == K).all()
    assert not samples.gt_boxes[1].any()
    assert not samples.boxes[1, ~samples.valid[1]].any()


def test_sample_fraction() -> None:
    head = make_head(num_samples=16, positive_fraction=0.25)
    box = torch.tensor([10.0, 10, 50, 50])
    boxes = torch.cat([box.expand(20, 4), torch.tensor([60.0, 60, 70, 70]).expand(20, 4)])[None]
    targets = Targets(boxes=box.view(1, 1, 4), labels=torch.tensor([[1]]), valid=torch.tensor([[True]]))
    samples = head.sample(propose(boxes), targets, SEEDS[:1])
    assert samples.valid.all()
    assert (samples.labels == 1).sum() == 4
    assert (samples.labels == K).sum() == 12


def test_sample_without_any_ground_truth_or_proposal(make_targets) -> None:
    head = make_head(num_samples=4)
    samples = head.sample(propose(torch.rand(2, 6, 4)), make_targets([[], []], [[], []]), SEEDS)
    assert samples.valid.all()
    assert (samples.labels == K).all()
    nothing = head.sample(propose(torch.zeros(2, 0, 4)), make_targets([[], []], [[], []]), SEEDS)
    assert nothing.boxes.shape == (2, 0, 4)
    logits, deltas = head([torch.randn(2, 4, 20, 20), torch.randn(2, 4, 10, 10)], nothing.boxes)
    losses = head.loss(logits, deltas, nothing)
    assert all(loss == 0 for loss in losses.values())


@pytest.mark.parametrize("image", [0, 1])
def test_samples_do_not_depend_on_the_other_images(make_targets, image: int) -> None:
    """Neither on how many objects they have nor on how many proposals, which this image is padded to."""
    head = make_head(num_samples=12, positive_fraction=0.5)
    gt = [[[10.0 * i, 10, 10 * i + 9, 50] for i in range(count)] for count in (8, 10)]
    labels = [[1] * 8, [2] * 10]
    boxes = torch.tensor([0.0, 60, 50, 70]) + torch.rand(2, 40, 4) * 12  # background: all positives are ground truth
    valid = torch.arange(40) < torch.tensor([[20], [40]])
    whole = head.sample(propose(boxes, valid), make_targets(gt, labels), SEEDS)
    assert whole.valid.all()
    assert (whole.labels < K).sum(1).tolist() == [6, 6]
    own = propose(boxes[image : image + 1, : int(valid[image].sum())])
    targets, seeds = make_targets(gt[image : image + 1], labels[image : image + 1]), SEEDS[image : image + 1]
    alone = head.sample(own, targets, seeds)
    for field in fields(alone):
        assert torch.equal(getattr(alone, field.name)[0], getattr(whole, field.name)[image])
    assert not torch.equal(head.sample(own, targets, seeds + 1).boxes, alone.boxes)


def one_positive() -> RoISamples:
    """A positive of class 1, two backgrounds, one not valid (with a label that must not count)."""
    return RoISamples(
        boxes=torch.tensor([[[0.0, 0, 10, 20]] * 4]),
        labels=torch.tensor([[1, K, K, 0]]),
        gt_boxes=torch.tensor([[[1.0, 4, 21, 24], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 5, 5]]]),
        valid=torch.tensor([[True, True, True, False]]),
    )


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_loss_by_hand(agnostic: bool, beta: float) -> None:
    head = make_head(smooth_l1_beta=beta, class_agnostic=agnostic, num_samples=4)
    logits = torch.tensor([[[0.0, 1, 2, 3], [1, 0, 0, 2], [0, 0, 0, 0], [9, 0, 0, 0]]], requires_grad=True)
    deltas = torch.full((1, 4, 1 if agnostic else K, 4), 7.0)
    deltas[0, 0, 0 if agnostic else 1] = torch.tensor([5.0, 2.0, 3.0, 0.5])
    deltas.requires_grad_()
    losses = head.loss(logits, deltas, one_positive())

    def cross_entropy(values: list[float], label: int) -> float:
        return math.log(sum(map(math.exp, values))) - values[label]

    expected = (
        cross_entropy([0, 1, 2, 3], 1) + cross_entropy([1, 0, 0, 2], 3) + cross_entropy([0, 0, 0, 0], 3)
    ) / 4  # RoIs that were wanted, not the three that there are
    assert losses["roi_class"].item() == pytest.approx(expected, rel=1e-5)
    # Centre (5, 10) -> (11, 14), size (10, 20) -> (20, 20): targets 10 * 0.6, 10 * 0.2, 5 * log 2, 0.
    target = [6.0, 2.0, 5 * math.log(2), 0.0]
    errors = [abs(p - t) for p, t in zip([5.0, 2.0, 3.0, 0.5], target, strict=True)]
    expected = sum(e - 0.5 * beta if e >= beta else 0.5 * e**2 / beta for e in errors) / 4
    assert losses["roi_box"].item() == pytest.approx(expected, rel=1e-5)

    torch.stack(list(losses.values())).sum().backward()
    assert logits.grad is not None
    assert deltas.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[0, 3].any()  # not valid
    assert deltas.grad.isfinite().all()
    assert not deltas.grad[0, 1:].any()  # background and not valid: no box loss
    assert deltas.grad[0, 0].any(dim=-1).tolist() == ([True] if agnostic else [False, True, False])


@pytest.mark.parametrize("agnostic", [False, True])
def test_iou_loss_and_weight(agnostic: bool) -> None:
    """The RoI decoded with the deltas of its class, (10, 10, 5, 5) undone; the weight is the box loss's alone."""
    logits, deltas = torch.randn(1, 4, K + 1), torch.randn(1, 4, 1 if agnostic else K, 4)
    samples = one_positive()
    options = {"box_loss": "giou", "class_agnostic": agnostic, "num_samples": 4}
    head = make_head(**options)
    losses = head.loss(logits, deltas, samples)
    pred = box_ops.decode(deltas[0, 0, 0 if agnostic else 1], samples.boxes[0, 0], WEIGHTS)
    expected = generalized_box_iou_loss(pred, samples.gt_boxes[0, 0]) / 4
    torch.testing.assert_close(losses["roi_box"], expected)
    weighted = make_head(**options, box_loss_weight=10.0).loss(logits, deltas, samples)
    torch.testing.assert_close(weighted["roi_box"], 10 * expected)
    assert torch.equal(weighted["roi_class"], losses["roi_class"])


def test_background_rows() -> None:
    """All rows share the probability; those after the classes are background, the first of them the label K."""
    head = make_head(background_rows=3, num_samples=4)
    assert head.class_logits.out_features == K + 3
    assert head.box_deltas.out_features == 4 * K
    logits = torch.randn(1, 4, K + 3)
    scores = head.scores(logits)
    assert scores.shape == (1, 4, K)
    torch.testing.assert_close(scores, logits.exp()[..., :K] / logits.exp().sum(-1, keepdim=True))
    assert not torch.allclose(scores, make_head().scores(logits[..., : K + 1]))
    loss = head.loss(logits, torch.zeros(1, 4, K, 4), one_positive())["roi_class"]
    torch.testing.assert_close(loss, cross_entropy(logits[0, :3], torch.tensor([1, K, K]), reduction="sum") / 4)


def test_background_rows_give_no_detections() -> None:
    logits = torch.tensor([[[0.0, 2.0, 0.0, 5.0, 6.0]]])
    head = FixedHead(logits, torch.zeros(1, 1, K, 4), background_rows=2, score_thresh=0.0)
    (found,) = head.predict([], propose(torch.tensor([[[20.0, 20, 60, 40]]])), SIZES[:1])
    assert found.labels.tolist()[0] == 1
    assert sorted(found.labels.tolist()) == [0, 1, 2]
    assert found.scores[0].item() == pytest.approx(math.exp(2) / (2 + math.exp(2) + math.exp(5) + math.exp(6)))


def test_predict_clamps_on_both_sides() -> None:
    deltas = torch.full((1, 1, K, 4), -1e3) * torch.tensor([0.0, 0, 1, 1])
    boxes, logits = torch.tensor([[[20.0, 20, 60, 40]]]), logits_of([[[0.9, 0.01, 0.01]]])
    (both,) = FixedHead(logits, deltas, delta_clamp="both").predict([], propose(boxes), SIZES[:1])
    expected = torch.tensor([[40 - 0.32, 30 - 0.16, 40 + 0.32, 30 + 0.16]])
    torch.testing.assert_close(both.boxes, expected, rtol=0, atol=1e-5)
    assert [len(d) for d in FixedHead(logits, deltas).predict([], propose(boxes), SIZES[:1])] == [0]


def test_losses_add_up_over_images() -> None:
    """Of two images that are alike in nothing, one of which has fewer RoIs than wanted: the mean of each alone."""
    head = make_head(num_samples=6)
    logits, deltas, samples = torch.randn(2, 4, K + 1), torch.randn(2, 4, K, 4), one_positive()
    both = {
        f.name: getattr(samples, f.name).repeat(2, *[1] * (getattr(samples, f.name).dim() - 1)) for f in fields(samples)
    }
    both["valid"][1, 1] = False
    both["labels"][1, 0] = 2
    losses = head.loss(logits, deltas, RoISamples(**both))
    alone = [
        head.loss(logits[i : i + 1], deltas[i : i + 1], RoISamples(**{k: v[i : i + 1] for k, v in both.items()}))
        for i in (0, 1)
    ]
    for name, loss in losses.items():
        assert alone[0][name] != alone[1][name]
        torch.testing.assert_close(loss, (alone[0][name] + alone[1][name]) / 2)


def test_loss_of_nothing_is_zero() -> None:
    samples = one_positive()
    empty = RoISamples(
        boxes=torch.zeros(1, 4, 4),
        labels=samples.labels,
        gt_boxes=torch.zeros(1, 4, 4),
        valid=torch.zeros_like(samples.valid),
    )
    losses = make_head().loss(torch.randn(1, 4, K + 1), torch.randn(1, 4, K, 4), empty)
    assert losses["roi_class"] == losses["roi_box"] == 0


def test_predict_decodes_the_deltas_of_the_class_and_clips() -> None:
    proposal = torch.tensor([20.0, 20, 60, 40])
    refined = torch.tensor([[22.0, 24, 50, 44], [-5, 10, 60, 130], [100, -3, 170, 20]])  # one box per class
    deltas = box_ops.encode(refined, proposal.expand(3, 4), WEIGHTS)[None, None]
    head = FixedHead(logits_of([[[0.3, 0.2, 0.4]]]), deltas)
    (found,) = head.predict([], propose(proposal.view(1, 1, 4)), SIZES[:1])
    assert found.labels.tolist() == [2, 0, 1]
    assert found.scores.tolist() == pytest.approx([0.4, 0.3, 0.2])
    expected = torch.tensor([[100.0, 0, 150, 20], [22, 24, 50, 44], [0, 10, 60, 100]])
    torch.testing.assert_close(found.boxes, expected, rtol=0, atol=1e-3)


def test_predict_class_agnostic() -> None:
    """One set of deltas serves every class."""
    proposals = torch.tensor([[[20.0, 20, 60, 40]]])
    head = FixedHead(logits_of([[[0.3, 0.1, 0.4]]]), torch.tensor([[[[1.0, 0, 0, 0]]]]), class_agnostic=True)
    (found,) = head.predict([], propose(proposals), SIZES[:1])
    assert found.labels.tolist() == [2, 0, 1]
    assert found.boxes.tolist() == [[24, 20, 64, 40]] * 3  # a tenth of the width to the right


def test_predict_thresholds_and_nms() -> None:
    """Per class: a duplicate goes, the same box of another class stays, 0.05 itself is too low."""
    boxes = torch.tensor([[[10.0, 10, 30, 30], [11, 10, 31, 30], [50, 50, 70, 70], [10, 10, 30, 30]]])
    scores = [[[0.6, 0.3, 0.05], [0.5, 0.02, 0.01], [0.04, 0.04, 0.9], [0.9, 0.01, 0.01]]]
    valid = torch.tensor([[True, True, True, False]])
    head = FixedHead(logits_of(scores), torch.zeros(1, 4, K, 4), score_thresh=0.0501)
    (found,) = head.predict([], propose(boxes, valid), SIZES[:1])
    assert found.labels.tolist() == [2, 0, 1]
    assert found.scores.tolist() == pytest.approx([0.9, 0.6, 0.3])
    assert found.boxes.tolist() == [[50, 50, 70, 70], [10, 10, 30, 30], [10, 10, 30, 30]]


def test_predict_keeps_the_best_of_all_classes() -> None:
    torch.manual_seed(0)
    corner = torch.rand(1, 50, 2) * 40
    boxes = torch.cat([corner, corner + 5], dim=-1)
    logits = torch.randn(1, 50, K + 1)
    head = FixedHead(logits, torch.zeros(1, 50, K, 4), detections_per_image=7, nms_thresh=1.0)
    (found,) = head.predict([], propose(boxes), SIZES[:1])
    best = logits.softmax(-1)[0, :, :K].flatten().sort(descending=True).values[:7]
    torch.testing.assert_close(found.scores, best)


def test_predict_drops_small_boxes() -> None:
    """Proposals beyond the image shrink to nothing when clipped; thin ones go by min_size."""
    boxes = torch.tensor([[[200.0, 10, 220, 30], [10, 10, 11.5, 40], [10, 10, 30, 40]]])
    logits = logits_of([[[0.9, 0.01, 0.01]] * 3])
    for min_size, count in [(0.0, 2), (2.0, 1)]:
        head = FixedHead(logits, torch.zeros(1, 3, K, 4), min_size=min_size)
        assert len(head.predict([], propose(boxes), SIZES[:1])[0]) == count


def test_predict_counts_empty_boxes_without_a_min_size() -> None:
    """Detectron2 drops detections without area at the very end: of the two best, one is beyond the image."""
    boxes = torch.tensor([[[200.0, 10, 220, 30], [10, 10, 11.5, 40], [50, 10, 70, 40]]])
    logits = logits_of([[[0.9, 0.01, 0.01], [0.8, 0.01, 0.01], [0.7, 0.01, 0.01]]])
    for min_size, kept in [(0.0, [1, 2]), (None, [1])]:
        head = FixedHead(logits, torch.zeros(1, 3, K, 4), min_size=min_size, detections_per_image=2)
        (found,) = head.predict([], propose(boxes), SIZES[:1])
        assert found.boxes.tolist() == boxes[0, kept].tolist()


def test_predict_keeps_boxes_without_area_if_asked_to() -> None:
    """As MMDetection does; one is beyond the image, one as wide as nothing."""
    boxes = torch.tensor([[[200.0, 10, 220, 30], [10, 10, 10, 40], [50, 10, 70, 40]]])
    logits = logits_of([[[0.9, 0.01, 0.01], [0.8, 0.01, 0.01], [0.7, 0.01, 0.01]]])
    (found,) = FixedHead(logits, torch.zeros(1, 3, K, 4), min_size=-1).predict([], propose(boxes), SIZES[:1])
    assert found.boxes.tolist() == [[150, 10, 150, 30], [10, 10, 10, 40], [50, 10, 70, 40]]


def test_predict_without_a_min_size_keeps_nan_out_of_nms() -> None:
    """One NaN would keep NMS from dropping anything."""
    boxes = torch.tensor([[[10.0, 10, 20, 20], [50, 10, 70, 40], [50, 10, 70, 41]]])
    deltas = torch.zeros(1, 3, K, 4)
    deltas[0, 0] = torch.nan
    logits = logits_of([[[0.9, 0.01, 0.01], [0.8, 0.01, 0.01], [0.7, 0.01, 0.01]]])
    (found,) = FixedHead(logits, deltas, min_size=None).predict([], propose(boxes), SIZES[:1])
    assert found.boxes.tolist() == boxes[0, 1:2].tolist()


def test_predict_images_are_independent_and_may_be_empty() -> None:
    boxes = torch.tensor([[[10.0, 10, 30, 30]], [[70, 80, 80, 110]]])
    head = FixedHead(logits_of([[[0.01, 0.01, 0.01]], [[0.01, 0.9, 0.01]]]), torch.zeros(2, 1, K, 4))
    empty, found = head.predict([], propose(boxes), torch.tensor([[100, 150], [95, 75]]))
    assert (len(empty), empty.boxes.shape, empty.labels.dtype) == (0, (0, 4), torch.int64)
    assert found.boxes.tolist() == [[70, 80, 75, 95]]  # clipped to its own size (h, w)
    assert found.labels.tolist() == [1]


def test_predict_without_proposals() -> None:
    features = [torch.randn(2, 4, 20, 20), torch.randn(2, 4, 10, 10)]
    none = make_head().eval().predict(features, propose(torch.zeros(2, 0, 4)), SIZES)
    padding = propose(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    assert [len(d) for d in none] == [len(d) for d in make_head().eval().predict(features, padding, SIZES)] == [0, 0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("num_rois", [0, 3, 511, 512])
def test_first_layer_reads_features_as_rows(num_rois: int, memory_format: torch.memory_format) -> None:
    """The float32 form on CPUs, a convolution, against the matrix product in float64, gradients too."""
    torch.manual_seed(0)
    head = ConvFCHead(in_channels=4, pool_size=5, fc_dim=6, num_fcs=2)
    x = torch.randn(num_rois, 4, 5, 5).contiguous(memory_format=memory_format).requires_grad_()
    first, second = head.fcs
    nn.init.normal_(first.bias)
    hidden = (x.double().flatten(1) @ first.weight.double().T + first.bias).relu()
    expected = (hidden @ second.weight.double().T + second.bias).relu()
    actual = head(x)
    assert actual.shape == (num_rois, 6)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)
    inputs = [x, *head.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(actual.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        scale = theirs.abs().amax().item() if theirs.numel() else 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * scale)
