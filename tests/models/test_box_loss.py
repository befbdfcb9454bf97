import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from fpn_det import boxes as box_ops
from fpn_det.models.box_loss import box_loss, iou_loss

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
IOU_KINDS = ["giou", "diou", "ciou"]


def loss_of_pair(pred: list[float], gt: list[float], kind: str) -> float:
    """The definitions of arXiv 1902.09630 (GIoU) and 1911.08287 (DIoU, CIoU) for two boxes."""
    (px1, py1, px2, py2), (gx1, gy1, gx2, gy2) = pred, gt
    pw, ph, gw, gh = px2 - px1, py2 - py1, gx2 - gx1, gy2 - gy1
    inter = max(0, min(px2, gx2) - max(px1, gx1)) * max(0, min(py2, gy2) - max(py1, gy1))
    union = pw * ph + gw * gh - inter
    iou = inter / union
    hull_w, hull_h = max(px2, gx2) - min(px1, gx1), max(py2, gy2) - min(py1, gy1)
    if kind == "giou":
        return 1 - iou + (hull_w * hull_h - union) / (hull_w * hull_h)
    distance = ((px1 + px2 - gx1 - gx2) ** 2 + (py1 + py2 - gy1 - gy2) ** 2) / 4
    loss = 1 - iou + distance / (hull_w**2 + hull_h**2)
    if kind == "ciou":
        v = 4 / math.pi**2 * (math.atan(gw / gh) - math.atan(pw / ph)) ** 2
        loss += v * v / (1 - iou + v)
    return loss


def scene() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deltas, references, ground truth and positives of 2 images of 5 RoIs, some of them padding."""
    torch.manual_seed(1)
    corner = torch.rand(2, 5, 2) * 50
    reference = torch.cat([corner, corner + 10 + torch.rand(2, 5, 2) * 40], dim=-1)
    gt_boxes = reference + torch.rand(2, 5, 4) * 6
    is_positive = torch.tensor([[True, False, True, False, False], [False, True, True, False, True]])
    gt_boxes = gt_boxes * is_positive[..., None]
    reference[:, 3] = 0  # padding
    return torch.randn(2, 5, 4), reference, gt_boxes, is_positive


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), WEIGHTS])
@pytest.mark.parametrize("kind", IOU_KINDS)
def test_iou_losses_by_hand(kind: str, weights: box_ops.Weights) -> None:
    deltas, reference, gt_boxes, is_positive = scene()
    found = box_loss(deltas, reference, gt_boxes, is_positive, kind=kind, weights=weights)
    pred = box_ops.decode(deltas, reference, weights)
    pairs = zip(pred[is_positive].tolist(), gt_boxes[is_positive].tolist(), strict=True)
    expected = [loss_of_pair(p, g, kind) for p, g in pairs]
    assert len(expected) == 5
    assert found.shape == ()
    assert found.item() == pytest.approx(sum(expected), rel=1e-4)


@pytest.mark.parametrize("kind", IOU_KINDS)
def test_iou_losses_equal_torchvision(kind: str) -> None:
    """Values and gradients; boxes overlap, touch, are equal or apart."""
    reference = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}[kind]
    corner, size = torch.randint(0, 6, (2, 400, 2)).float(), torch.randint(1, 5, (2, 400, 2))
    pred, gt_boxes = torch.cat([corner, corner + size], dim=-1)
    overlap = torch.minimum(pred[:, 2:], gt_boxes[:, 2:]) - torch.maximum(pred[:, :2], gt_boxes[:, :2])
    smaller = overlap.amin(dim=1)
    assert set(smaller.sign().tolist()) == {-1, 0, 1}
    assert (pred == gt_boxes).all(dim=1).any()
    ours, theirs = (pred.clone().requires_grad_() for _ in range(2))
    found, expected = iou_loss(ours, gt_boxes, kind=kind), reference(theirs, gt_boxes)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), WEIGHTS])
@pytest.mark.parametrize("beta", [0.0, 1 / 9, 2.0])
def test_smooth_l1_by_hand(beta: float, weights: box_ops.Weights) -> None:
    deltas, reference, gt_boxes, is_positive = scene()
    found = box_loss(deltas, reference, gt_boxes, is_positive, beta=beta, weights=weights)
    target = box_ops.encode(gt_boxes[is_positive], reference[is_positive], weights)
    errors = (deltas[is_positive] - target).abs().flatten().tolist()
    expected = [e - beta / 2 if e >= beta else e**2 / (2 * beta) for e in errors]
    assert found.item() == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("giou", 1 + 4 / 12), ("diou", 1 + 16 / 40), ("ciou", 1 + 16 / 40), ("smooth_l1", 2)],
)
def test_disjoint_boxes(kind: str, expected: float) -> None:
    """Two squares of side 2, 2 apart: the hull is 6 x 2, of which the union covers 8; the centres are 4 apart."""
    reference, gt_box = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[4.0, 0, 6, 2]])
    deltas = torch.zeros(1, 4, requires_grad=True)
    loss = box_loss(deltas, reference, gt_box, torch.tensor([True]), kind=kind)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert deltas.grad is not None
    assert deltas.grad[0, 0] < 0  # to the right, although nothing overlaps


@pytest.mark.parametrize("kind", ["smooth_l1", *IOU_KINDS])
def test_perfect_boxes_cost_nothing(kind: str) -> None:
    _, reference, gt_boxes, is_positive = scene()
    deltas = box_ops.encode(gt_boxes, reference, WEIGHTS)
    deltas = torch.where(is_positive[..., None], deltas, 3)
    loss = box_loss(deltas, reference, gt_boxes, is_positive, kind=kind, weights=WEIGHTS)
    assert loss.item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("kind", ["smooth_l1", *IOU_KINDS])
def test_gradient_of_positives_only(kind: str) -> None:
    """Padding and boxes without width, whose targets are infinite, have gradient 0, not NaN."""
    deltas, reference, gt_boxes, is_positive = scene()
    reference[0, 1, 2] = reference[0, 1, 0]  # no width
    reference[1, 0] = torch.tensor([5.0, 5, 5, 5])
    deltas.requires_grad_()
    box_loss(deltas, reference, gt_boxes, is_positive, kind=kind, weights=WEIGHTS).backward()
    assert deltas.grad is not None
    assert deltas.grad.isfinite().all()
    assert deltas.grad.any(-1).tolist() == is_positive.tolist()


@pytest.mark.parametrize("shape", [(2, 5), (2, 0), (0,)])
@pytest.mark.parametrize("kind", ["smooth_l1", *IOU_KINDS])
def test_zero_without_positives(kind: str, shape: tuple[int, ...]) -> None:
    """With a gradient, so that nothing is left unused."""
    deltas = torch.randn(*shape, 4, requires_grad=True)
    nothing = torch.zeros(*shape, 4)
    loss = box_loss(deltas, nothing, nothing, torch.zeros(shape, dtype=torch.bool), kind=kind)
    assert loss.shape == ()
    assert loss == 0
    loss.backward()
    assert deltas.grad is not None
    assert not deltas.grad.any()


@pytest.mark.parametrize("delta_clamp", ["upper", "both"])
def test_clamp_of_decoded_boxes(delta_clamp: box_ops.DeltaClamp) -> None:
    """Clamped below, the predicted box has 16/1000 of the anchor's side; else it is smaller by far."""
    deltas, reference = torch.tensor([[0.0, 0.0, -9.0, -9.0]]), torch.tensor([[0.0, 0.0, 1000.0, 1000.0]])
    side = 16.0 if delta_clamp == "both" else 1000 * math.exp(-9)
    pred, gt_box = [500 - side / 2, 500 - side / 2, 500 + side / 2, 500 + side / 2], [480.0, 480.0, 520.0, 520.0]
    positive = torch.tensor([True])
    found = box_loss(deltas, reference, torch.tensor([gt_box]), positive, kind="giou", delta_clamp=delta_clamp)
    assert found.item() == pytest.approx(loss_of_pair(pred, gt_box, "giou"), rel=1e-4)
