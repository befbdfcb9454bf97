import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou_loss

from fpn_det import boxes as box_ops
from fpn_det.models.anchors import Anchors
from fpn_det.models.rpn import RPN, AnchorSamples, RPNHead, UnsharedRPNHead

SHAPES = [(8, 10), (4, 5)]
SIZES = torch.tensor([[31, 37], [20, 40]])
SEEDS = torch.tensor([3, 4])


def make_rpn(**options) -> RPN:
    anchors = Anchors(sizes=((8,), (16,)), ratios=(0.5, 1, 2), strides=(4, 8))
    return RPN(head=RPNHead(in_channels=4, num_anchors=3), anchors=anchors, **options)


def outputs(rpn: RPN, n: int = 2) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Random logits and deltas for the anchors of SHAPES."""
    anchors = rpn.anchors(SHAPES)
    logits = [torch.randn(n, len(a)) * 2 for a in anchors]
    return logits, [torch.randn(n, len(a), 4) * 0.3 for a in anchors], anchors


def pick(logits: list[Tensor], deltas: list[Tensor], samples: AnchorSamples) -> tuple[Tensor, Tensor]:
    """The outputs of the samples among those of all anchors."""
    index = samples.index
    return torch.cat(logits, 1).gather(1, index), torch.cat(deltas, 1).gather(1, index[..., None].expand(-1, -1, 4))


def test_head_order_is_that_of_the_anchors() -> None:
    head = RPNHead(in_channels=4, num_anchors=3)
    feature = torch.randn(2, 4, 5, 6)
    (logits,), (deltas,) = head([feature])
    hidden = head.convs[0](feature).relu()
    raw_logits, raw_deltas = head.objectness(hidden), head.deltas(hidden).unflatten(1, (3, 4))
    for row, column, ratio in [(0, 0, 0), (0, 5, 2), (3, 2, 1), (4, 5, 2)]:
        index = (row * 6 + column) * 3 + ratio
        assert torch.equal(logits[:, index], raw_logits[:, ratio, row, column])
        assert torch.equal(deltas[:, index], raw_deltas[:, ratio, :, row, column])


def test_forward_shapes_and_init() -> None:
    rpn = make_rpn()
    logits, deltas, anchors = rpn([torch.randn(2, 4, *shape) for shape in SHAPES])
    assert [x.shape for x in logits] == [(2, 240), (2, 60)]
    assert [x.shape for x in deltas] == [(2, 240, 4), (2, 60, 4)]
    assert [x.shape for x in anchors] == [(240, 4), (60, 4)]
    head = RPNHead(in_channels=128, num_anchors=3)
    for conv in (*head.convs, head.objectness, head.deltas):
        assert not conv.bias.any()
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.2)


def test_head_of_two_convolutions() -> None:
    head = RPNHead(in_channels=4, num_anchors=3, channels=6, num_convs=2)
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in head.convs] == [(4, 6, (3, 3)), (6, 6, (3, 3))]
    for module in (*head.convs, head.objectness, head.deltas):
        torch.nn.init.normal_(module.weight)
        torch.nn.init.normal_(module.bias)
    feature = torch.randn(2, 4, 5, 7)
    (logits,), (deltas,) = head([feature])
    hidden = head.convs[1](head.convs[0](feature).relu()).relu()
    assert torch.equal(logits, head.objectness(hidden).permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(deltas.flatten(1), head.deltas(hidden).permute(0, 2, 3, 1).flatten(1))
    assert [c.out_channels for c in RPNHead(in_channels=4, num_anchors=3, num_convs=2).convs] == [4, 4]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["0 convs", "1 conv", "2 convs", "3 convs", "unshared"])
def test_outputs_of_some_anchors(kind: str, memory_format: torch.memory_format) -> None:
    """Of every anchor, those at the borders of all levels included, and one twice: as of the whole levels, so are the
    gradients of features and weights."""
    heads = [
        RPNHead(in_channels=4, num_anchors=3, channels=6 if "conv" in kind and kind[0] > "0" else 4, num_convs=convs)
        for convs in ([1, 1, 1] if kind == "unshared" else [int(kind[0])])
    ]
    head = UnsharedRPNHead(heads) if kind == "unshared" else heads[0]
    head.double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    shapes = [(5, 4), (3, 6), (1, 2)]
    features = [
        torch.randn(2, 4, *s, dtype=torch.float64).to(memory_format=memory_format).requires_grad_() for s in shapes
    ]
    index = torch.stack([torch.randperm(120), torch.randperm(120)])
    index = torch.cat([index, index[:, :1]], 1)
    inputs = [*features, *head.parameters()]
    logits, deltas = head(features)
    expected = torch.cat(logits, 1).gather(1, index), torch.cat(deltas, 1).gather(1, index[..., None].expand(-1, -1, 4))
    actual = head.at(features, index)
    grad = [torch.randn_like(x) for x in expected]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    theirs = torch.autograd.grad(expected, inputs, grad)
    for a, b in zip(torch.autograd.grad(actual, inputs, grad), theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_losses_are_those_of_the_outputs_of_all_anchors(make_targets) -> None:
    rpn = make_rpn(num_samples=40, positive_iou=0.4)
    features = [torch.randn(2, 4, *shape) for shape in SHAPES]
    targets = make_targets([[[4, 4, 22, 18]], [[3, 1, 30, 19]]], [[0], [1]])
    losses, stats = rpn.losses(features, targets, SEEDS)
    logits, deltas, anchors = rpn(features)
    samples = rpn.sample(anchors, targets, SEEDS)
    expected = rpn.loss(*pick(logits, deltas, samples), samples)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])
    assert stats["rpn_positives"] == samples.is_positive.sum() / 2 > 0


def test_unshared_head() -> None:
    """One set of weights per level; equal ones are the shared head."""
    features = [torch.randn(2, 4, *shape) for shape in SHAPES]
    shared = RPNHead(in_channels=4, num_anchors=3)
    unshared = UnsharedRPNHead([RPNHead(in_channels=4, num_anchors=3) for _ in SHAPES])
    assert len(list(unshared.parameters())) == 2 * len(list(shared.parameters()))
    for level in unshared.levels:
        level.load_state_dict(shared.state_dict())
    for ours, theirs in zip(unshared(features), shared(features), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    torch.nn.init.ones_(unshared.levels[1].objectness.bias)
    torch.nn.init.ones_(unshared.levels[1].deltas.bias)
    (fine, coarse), (fine_deltas, coarse_deltas) = unshared(features)
    (logits, deltas) = shared(features)
    assert torch.equal(fine, logits[0])
    assert torch.equal(fine_deltas, deltas[0])
    torch.testing.assert_close(coarse, logits[1] + 1)
    torch.testing.assert_close(coarse_deltas, deltas[1] + 1)
    with pytest.raises(ValueError, match="shorter than"):
        unshared(features[:1])


def test_sample(make_targets) -> None:
    """Ground truth equal to an anchor, one that no anchor matches well, one image without."""
    rpn = make_rpn(num_samples=10, positive_fraction=0.5)
    anchors = rpn.anchors(SHAPES)
    all_anchors = torch.cat(anchors)
    exact, thin = all_anchors[100].tolist(), [4.0, 4.0, 30.0, 6.0]
    samples = rpn.sample(anchors, make_targets([[exact, thin], []], [[0, 1], []]), SEEDS)
    assert samples.index.shape == (2, 10)
    assert samples.valid.all()
    assert not samples.is_positive[1].any()
    assert torch.equal(samples.gt_boxes[1], samples.anchors[1])
    iou = box_iou(torch.tensor([exact, thin]), all_anchors)
    assert iou[1].max() < 0.3  # only its best anchors are positive, which else were negative
    best = (iou >= 0.7).any(0) | (iou == iou.amax(1, keepdim=True)).any(0)
    assert 100 in best.nonzero()
    picked = samples.index[0][samples.is_positive[0]]
    assert best[picked].all()
    assert len(picked) == min(5, int(best.sum()))
    assert (iou[:, samples.index[0][~samples.is_positive[0]]] < 0.3).all()
    assert torch.equal(samples.anchors, all_anchors[samples.index])
    negative = ~samples.is_positive[0]
    assert torch.equal(samples.gt_boxes[0][negative], samples.anchors[0][negative])
    for index, gt_box in zip(picked, samples.gt_boxes[0], strict=False):
        assert torch.equal(gt_box, torch.tensor([exact, thin])[iou[:, index].argmax()])


def test_sample_thresholds(make_targets) -> None:
    """IoUs of the anchors 1 (its own), 0.6, 0.5 and 0.2 with the ground truth."""
    rpn = make_rpn(num_samples=4, positive_fraction=1.0, positive_iou=0.6, negative_iou=0.5)
    anchors = [torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 5], [0, 0, 10, 2]])]
    samples = rpn.sample(anchors, make_targets([[[0, 0, 10, 10]]], [[0]]), SEEDS[:1])
    assert sorted(samples.index[0][samples.is_positive[0]].tolist()) == [0, 1]  # positive_iou itself is positive
    assert samples.index[0][samples.valid[0] & ~samples.is_positive[0]].tolist() == [3]  # negative_iou itself is not
    assert samples.valid[0].tolist() == [True, True, True, False]


def test_anchors_beyond_the_image_take_part(make_targets) -> None:
    """One that reaches over the border is positive (IoU 9/11), one wholly outside negative (arXiv 1612.03144, 5.1)."""
    rpn = make_rpn(num_samples=2, positive_fraction=0.5)
    anchors = [torch.tensor([[-1.0, 0, 9, 10], [-30, -30, -10, -10]])]
    samples = rpn.sample(anchors, make_targets([[[0, 0, 10, 10]]], [[0]]), SEEDS[:1])
    assert samples.valid.all()
    assert samples.index[samples.is_positive].tolist() == [0]
    assert samples.index[~samples.is_positive].tolist() == [1]


def test_min_match_iou(make_targets) -> None:
    targets = make_targets([[[0, 0, 10, 2]]], [[0]])
    anchors = [torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])]  # IoU 0.2 and 0
    assert make_rpn(min_match_iou=0.2).sample(anchors, targets, SEEDS[:1]).is_positive.sum() == 1
    assert make_rpn(min_match_iou=0.3).sample(anchors, targets, SEEDS[:1]).is_positive.sum() == 0


def test_no_ground_truth_at_all(make_targets) -> None:
    rpn = make_rpn(num_samples=8)
    logits, deltas, anchors = outputs(rpn)
    samples = rpn.sample(anchors, make_targets([[], []], [[], []]), SEEDS)
    assert samples.valid.all()
    assert not samples.is_positive.any()
    losses = rpn.loss(*pick(logits, deltas, samples), samples)
    assert losses["rpn_box"] == 0
    assert losses["rpn_objectness"] > 0


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_loss_by_hand(beta: float) -> None:
    """Samples 0 and 3 positive, 4 (of the second level) negative; then a sample that is not valid."""
    rpn = make_rpn(num_samples=5, smooth_l1_beta=beta)
    logits = [torch.tensor([[0.5, 9.0, 9.0]]), torch.tensor([[-1.0, 2.0, 9.0]])]
    deltas = [torch.full((1, 3, 4), 9.0), torch.full((1, 3, 4), 9.0)]
    deltas[0][0, 0] = torch.tensor([0.1, -0.2, 0.0, 1.0])
    deltas[1][0, 0] = torch.tensor([0.0, 0.0, 0.0, 0.3])
    anchors = torch.tensor([[10.0, 10, 30, 30]]).expand(1, 4, 4)
    targets = torch.zeros(1, 4, 4)
    targets[0, 0, 3] = -0.5
    samples = AnchorSamples(
        index=torch.tensor([[0, 3, 4, 1]]),
        is_positive=torch.tensor([[True, True, False, False]]),
        valid=torch.tensor([[True, True, True, False]]),
        anchors=anchors,
        gt_boxes=box_ops.decode(targets, anchors),
    )
    losses = rpn.loss(*pick(logits, deltas, samples), samples)

    def distance(x: float) -> float:
        x = abs(x)
        return x - 0.5 * beta if x >= beta else 0.5 * x**2 / beta

    softplus = [math.log1p(math.exp(x)) for x in (-0.5, 1.0, 2.0)]
    assert losses["rpn_objectness"].item() == pytest.approx(sum(softplus) / 5, rel=1e-5)
    box = sum(map(distance, (0.1, -0.2, 0.0, 1.5, 0.3)))
    assert losses["rpn_box"].item() == pytest.approx(box / 5, rel=1e-5)


def test_iou_loss_and_weight(make_targets) -> None:
    """The anchors decoded with their deltas against the matched ground truth; the weight is the box loss's alone."""
    rpn = make_rpn(num_samples=40, positive_iou=0.4, box_loss="giou")
    logits, deltas, anchors = outputs(rpn)
    samples = rpn.sample(anchors, make_targets([[[4, 4, 22, 18]], [[3, 1, 30, 19]]], [[0], [1]]), SEEDS)
    outputs_of_samples = pick(logits, deltas, samples)
    losses = rpn.loss(*outputs_of_samples, samples)
    positive = samples.is_positive
    assert positive.any(1).all()
    pred = box_ops.decode(outputs_of_samples[1][positive], samples.anchors[positive])
    expected = generalized_box_iou_loss(pred, samples.gt_boxes[positive], reduction="sum") / 80
    torch.testing.assert_close(losses["rpn_box"], expected)
    weighted = make_rpn(num_samples=40, box_loss="giou", box_loss_weight=3.0).loss(*outputs_of_samples, samples)
    torch.testing.assert_close(weighted["rpn_box"], 3 * expected)
    assert torch.equal(weighted["rpn_objectness"], losses["rpn_objectness"])


@pytest.mark.parametrize("kind", ["smooth_l1", "giou", "diou", "ciou"])
def test_every_box_loss_trains(make_targets, kind: str) -> None:
    rpn = make_rpn(num_samples=40, positive_fraction=0.2, box_loss=kind)
    logits, deltas, anchors = outputs(rpn)
    for delta in deltas:
        delta.requires_grad_()
    samples = rpn.sample(anchors, make_targets([[torch.cat(anchors)[100].tolist()], []], [[0], []]), SEEDS)
    rpn.loss(*pick(logits, deltas, samples), samples)["rpn_box"].backward()
    grad = torch.cat([d.grad for d in deltas], dim=1)
    assert grad.isfinite().all()
    chosen = torch.zeros(grad.shape[:2], dtype=torch.bool).scatter(1, samples.index, samples.is_positive)
    assert torch.equal(grad.any(-1), chosen)


def test_proposals_are_clamped_on_both_sides() -> None:
    """A delta of -100 leaves 16 / 1000 of the anchor, or nothing."""
    anchor = torch.tensor([[0.0, 0, 30, 20]])
    logits, deltas = [torch.ones(1, 1)], [torch.tensor([[[0.0, 0, -100, -100]]])]
    both = make_rpn(delta_clamp="both").propose(logits, deltas, [anchor], SIZES[:1])
    assert both.valid.all()
    box = torch.tensor([[[15 - 0.24, 10 - 0.16, 15 + 0.24, 10 + 0.16]]])
    torch.testing.assert_close(both.boxes, box, rtol=0, atol=1e-5)
    assert not make_rpn().propose(logits, deltas, [anchor], SIZES[:1]).valid.any()


def test_loss_divisor_counts_images() -> None:
    """The same image twice: the same loss."""
    rpn = make_rpn(num_samples=7)
    logits, deltas = torch.randn(1, 3), torch.randn(1, 3, 4)
    samples = {
        "index": torch.tensor([[2, 0, 5]]),
        "is_positive": torch.tensor([[True, False, False]]),
        "valid": torch.ones(1, 3, dtype=torch.bool),
        "anchors": torch.tensor([[[0.0, 0, 10, 10]] * 3]),
        "gt_boxes": torch.tensor([[[1.0, 2, 30, 40]] * 3]),
    }
    one = rpn.loss(logits, deltas, AnchorSamples(**samples))
    twice = {name: x.repeat(2, *[1] * (x.dim() - 1)) for name, x in samples.items()}
    two = rpn.loss(logits.repeat(2, 1), deltas.repeat(2, 1, 1), AnchorSamples(**twice))
    for name in ("rpn_objectness", "rpn_box"):
        assert two[name].item() == pytest.approx(one[name].item(), rel=1e-5)


def slow_proposals(
    rpn: RPN, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], image: int, pre: int, post: int
) -> list[tuple[float, list[float]]]:
    """(score, box) of one image by the definition: per level top-k, decode, clip, drop small, NMS; then the best."""
    kept = []
    h, w = SIZES[image].tolist()
    for logit, delta, anchor in zip(logits, deltas, anchors, strict=True):
        order = sorted(range(len(anchor)), key=lambda a: -logit[image, a].item())[:pre]
        of_level: list[tuple[float, list[float]]] = []
        for a in order:
            x1, y1, x2, y2 = anchor[a].tolist()
            dx, dy, dw, dh = delta[image, a].tolist()
            cx, cy = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
            bw, bh = (x2 - x1) * math.exp(dw), (y2 - y1) * math.exp(dh)
            box = [cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2]
            box = [min(max(v, 0), limit) for v, limit in zip(box, (w, h, w, h), strict=True)]
            if min(box[2] - box[0], box[3] - box[1]) <= rpn.min_size:
                continue
            others = torch.tensor([b for _, b in of_level]).reshape(-1, 4)
            if (box_iou(torch.tensor([box]), others) > rpn.nms_thresh).any():
                continue
            of_level.append((logit[image, a].item(), box))
        kept += of_level
    kept.sort(key=lambda x: -x[0])
    return [(1 / (1 + math.exp(-score)), box) for score, box in kept[:post]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("post_train", "post_test"), [(25, 12), (500, 400)], ids=["full", "padded"])
def test_propose_equals_loops(training: bool, post_train: int, post_test: int) -> None:
    rpn = make_rpn(
        pre_nms_top_k_train=40,
        pre_nms_top_k_test=30,
        post_nms_top_k_train=post_train,
        post_nms_top_k_test=post_test,
        nms_thresh=0.5,
        min_size=3.0,
    ).train(training)
    logits, deltas, anchors = outputs(rpn)
    proposals = rpn.propose(logits, deltas, anchors, SIZES)
    pre, post = (40, post_train) if training else (30, post_test)
    assert proposals.boxes.shape == (2, min(post, 2 * pre), 4)
    for i in range(2):
        expected = slow_proposals(rpn, logits, deltas, anchors, i, pre, post)
        d = len(expected)
        assert 5 < d < 2 * pre
        assert proposals.valid[i].tolist() == [True] * d + [False] * (proposals.valid.shape[1] - d)
        assert proposals.scores[i, :d].tolist() == pytest.approx([score for score, _ in expected], abs=1e-5)
        torch.testing.assert_close(proposals.boxes[i, :d], torch.tensor([b for _, b in expected]), rtol=0, atol=1e-3)
        assert not proposals.boxes[i, d:].any()
        assert not proposals.scores[i, d:].any()


def test_nms_is_within_levels() -> None:
    """The same box on two levels stays twice, on one level once."""
    rpn = make_rpn().eval()
    box = torch.tensor([[2.0, 2, 20, 20], [2, 2, 20, 20]])
    logits, zeros = torch.tensor([[1.0, 0.5]]), torch.zeros(1, 2, 4)
    one = rpn.propose([logits], [zeros], [box], SIZES[:1])
    two = rpn.propose([logits, logits], [zeros, zeros], [box, box], SIZES[:1])
    assert (one.valid.sum(), two.valid.sum()) == (1, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_outputs_are_dropped(bad: float) -> None:
    """Neither the boxes nor the padding carry them on; NaN sorts first, so it is what padding would repeat."""
    rpn = make_rpn().eval()
    logits, deltas, anchors = outputs(rpn, n=2)
    expected = rpn.propose([x[:, 1:] for x in logits], [x[:, 1:] for x in deltas], [x[1:] for x in anchors], SIZES)
    for x in logits:
        x[:, 0] = bad
    found = rpn.propose(logits, deltas, anchors, SIZES)
    for i in range(2):
        assert torch.equal(found.boxes[i, found.valid[i]], expected.boxes[i, expected.valid[i]])
    for logit, delta in zip(logits, deltas, strict=True):
        logit[:, 0] = 50
        delta[:, 0, 0] = bad
    worse = rpn.propose(logits, deltas, anchors, SIZES)
    for proposals in (found, worse):
        assert proposals.boxes.isfinite().all()
        assert proposals.scores.isfinite().all()
        assert not proposals.boxes[~proposals.valid].any()
    for i in range(2):
        assert torch.equal(worse.boxes[i, worse.valid[i]], expected.boxes[i, expected.valid[i]])


def test_proposals_are_detached() -> None:
    rpn = make_rpn()
    logits, deltas, anchors = outputs(rpn)
    proposals = rpn.propose([x.requires_grad_() for x in logits], [x.requires_grad_() for x in deltas], anchors, SIZES)
    assert not proposals.boxes.requires_grad
    assert not proposals.scores.requires_grad


def test_labels_are_what_is_sampled_from(make_targets) -> None:
    """Anchors are positive, negative, or neither; which of them count is the only choice of `sample`.

    The third box is so small that its best anchors overlap it less than negatives may.
    """
    rpn = make_rpn(num_samples=10_000, positive_fraction=1.0)
    anchors = rpn.anchors(SHAPES)
    targets = make_targets([[[2, 2, 14, 12], [20, 10, 30, 30], [3, 21, 5, 23]], []], [[0, 1, 2], []])
    labels = rpn.label(torch.cat(anchors), targets)
    samples = rpn.sample(anchors, targets, SEEDS)
    assert not (labels.is_positive & labels.is_negative).any()
    assert (~labels.is_positive & ~labels.is_negative).any()
    for i in range(2):
        index, is_positive = samples.index[i][samples.valid[i]], samples.is_positive[i][samples.valid[i]]
        assert index[is_positive].sort().values.tolist() == labels.is_positive[i].nonzero().flatten().tolist()
        assert index[~is_positive].sort().values.tolist() == labels.is_negative[i].nonzero().flatten().tolist()
    assert (labels.gt_index[0][labels.is_positive[0]] == 2).any()
    owners = labels.gt_index[0][labels.is_positive[0]]
    iou = box_iou(torch.cat(anchors)[labels.is_positive[0]], targets.boxes[0])
    assert torch.equal(iou.argmax(1), owners)
