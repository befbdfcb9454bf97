"""Cascade R-CNN: what one stage hands to the next, and what all of them together give."""

import pytest
import torch
from torch import Tensor, nn

from fpn_det import boxes as box_ops
from fpn_det.models.roi_head import CascadeRoIHead, ConvFCHead, RoIHead
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.structures import Proposals

K = 3
IOUS = (0.5, 0.6, 0.7)
BOX_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
SIZES = torch.tensor([[100, 150]])
SEEDS = torch.tensor([3, 4])


class Scripted(RoIHead):
    """A stage that moves every box to `target`, or leaves it, has fixed logits, and remembers what it was given."""

    def __init__(self, *, target: list[float] | None = None, logits: Tensor | None = None, **options) -> None:
        super().__init__(
            pooler=MultiLevelRoIAlign(strides=(4,)),
            box_head=ConvFCHead(in_channels=1, pool_size=1, fc_dim=1),
            num_classes=K,
            **({"class_agnostic": True} | options),
        )
        self.target = target
        self.logits = logits
        self.bias = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, features: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(boxes)
        deltas = torch.zeros_like(boxes)
        if self.target is not None:
            deltas = box_ops.encode(boxes.new_tensor(self.target).expand_as(boxes), boxes, self.box_weights)
        logits = torch.zeros(*boxes.shape[:2], K + 1) if self.logits is None else self.logits
        deltas = torch.where(deltas.isfinite(), deltas, 0)  # of padding
        return logits + self.bias, (deltas + self.bias)[:, :, None]


def cascade(*stages: RoIHead, loss_weights: tuple[float, ...] | None = None) -> CascadeRoIHead:
    return CascadeRoIHead(stages=stages, loss_weights=loss_weights or (1.0,) * len(stages))


def scripted(*targets: list[float] | None, **options) -> CascadeRoIHead:
    stages = zip(targets, IOUS, BOX_WEIGHTS, strict=False)
    return cascade(*(Scripted(target=t, positive_iou=iou, box_weights=w, **options) for t, iou, w in stages))


def propose(*boxes: list[float], valid: list[bool] | None = None) -> Proposals:
    tensor = torch.tensor([boxes], dtype=torch.float32)
    marks = torch.tensor([valid or [True] * len(boxes)])
    return Proposals(boxes=tensor, scores=torch.zeros(1, len(boxes)), valid=marks)


def test_each_stage_matches_what_it_was_given(make_targets) -> None:
    """A proposal of IoU 0.55 that stage 1 refines to 0.65: positive for 0.5 and 0.6, not for 0.7."""
    gt, proposal, refined = [0.0, 0, 100, 100], [0.0, 0, 100, 55], [0.0, 0, 100, 65]
    head = scripted(refined, None, None)
    _, stats = head.losses([], propose(proposal), make_targets([[gt]], [[1]]), SIZES, SEEDS[:1])
    # Two samples, since the ground truth itself is one: of stage 1 alone, which moves it too.
    assert {k: v.item() for k, v in stats.items()} == {
        "roi_positives_1": 2,
        "roi_positives_2": 2,
        "roi_positives_3": 0,
    }
    first, second, third = (stage.seen[0] for stage in head.heads)
    assert sorted(first[0].tolist()) == sorted([gt, proposal])
    torch.testing.assert_close(second, torch.tensor([[refined] * 2]))
    torch.testing.assert_close(third, second)
    assert not second.requires_grad
    assert not third.requires_grad


def test_each_stage_trains_only_itself(make_targets) -> None:
    head = scripted([0.0, 0, 100, 65], [0.0, 0, 100, 90], None)
    losses, _ = head.losses([], propose([0.0, 0, 100, 55]), make_targets([[[0, 0, 100, 100]]], [[1]]), SIZES, SEEDS[:1])
    (losses["roi_class_3"] + losses["roi_box_3"]).backward()
    assert [stage.bias.grad is not None for stage in head.heads] == [False, False, True]


def test_targets_of_a_later_stage_by_hand(make_targets) -> None:
    """From the refined box to the ground truth, times the weights of the stage."""
    gt, refined = [10.0, 10, 90, 90], [10.0, 10, 90, 70]  # IoU 0.75
    head = scripted(refined, None, None, num_samples=2, positive_fraction=1.0)
    losses, _ = head.losses([], propose([10.0, 10, 90, 60]), make_targets([[gt]], [[1]]), SIZES, SEEDS[:1])
    dy, dh = 10 / 60, torch.tensor(80 / 60).log().item()
    for stage, (_, wy, _, wh) in ((2, BOX_WEIGHTS[1]), (3, BOX_WEIGHTS[2])):
        assert losses[f"roi_box_{stage}"].item() == pytest.approx(wy * dy + wh * dh, rel=1e-5)


def test_class_specific_refinement_follows_the_likeliest_class(make_targets) -> None:
    """Not the background, however likely."""

    class Both(Scripted):
        def forward(self, features: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
            self.seen.append(boxes)
            logits = torch.tensor([0.0, 1.0, 0.5, 9.0]).expand(*boxes.shape[:2], 4)
            deltas = torch.zeros(*boxes.shape[:2], K, 4)
            deltas[:, :, 1, 0] = 5.0  # half a width to the right
            return logits, deltas

    head = cascade(Both(class_agnostic=False), Both(class_agnostic=False))
    targets = make_targets([[]], [[]])
    head.losses([], propose([20.0, 20, 60, 40]), targets, SIZES, SEEDS[:1])
    assert head.heads[1].seen[0].tolist() == [[[40, 20, 80, 40]]]
    head.predict([], propose([20.0, 20, 60, 40]), SIZES)
    assert head.heads[1].seen[1].tolist() == [[[40, 20, 80, 40]]]


def test_boxes_that_leave_the_image_do_not_train_the_next_stage(make_targets) -> None:
    """Clipped to nothing: not valid, and not counted by the loss."""
    logits = torch.tensor([[[0.0, 0, 0, 2.0], [0.0, 0, 0, 2.0]]])
    head = cascade(Scripted(target=[200.0, 20, 240, 40]), Scripted(logits=logits))
    gt = [[0.0, 0, 50, 50]]
    losses, stats = head.losses([], propose([0.0, 0, 40, 50]), make_targets([gt], [[1]]), SIZES, SEEDS[:1])
    assert stats["roi_positives_1"] == 2
    assert stats["roi_positives_2"] == 0
    assert losses["roi_class_1"] > 0
    assert losses["roi_class_2"] == losses["roi_box_2"] == 0
    assert not head.heads[1].seen[0].any()


def test_predict_by_hand() -> None:
    """Scores are the mean over the stages, boxes those of the last stage, refined three times."""
    logits = [torch.randn(1, 1, K + 1) for _ in range(3)]
    stages = [
        Scripted(logits=logits[0], target=[30.0, 20, 70, 40], box_weights=BOX_WEIGHTS[0]),
        Scripted(logits=logits[1], target=[30.0, 20, 90, 40], box_weights=BOX_WEIGHTS[1]),
        Scripted(logits=logits[2], target=[-5.0, 20, 90, 200], box_weights=BOX_WEIGHTS[2], score_thresh=0.0),
    ]
    (found,) = cascade(*stages).predict([], propose([20.0, 20, 60, 40]), SIZES)
    torch.testing.assert_close(stages[1].seen[0], torch.tensor([[[30.0, 20, 70, 40]]]))
    torch.testing.assert_close(stages[2].seen[0], torch.tensor([[[30.0, 20, 90, 40]]]))
    mean = sum(x.softmax(-1)[0, 0, :K] for x in logits) / 3
    torch.testing.assert_close(found.scores, mean.sort(descending=True).values)
    assert found.labels.tolist() == mean.argsort(descending=True).tolist()
    torch.testing.assert_close(found.boxes, torch.tensor([[0.0, 20, 90, 100]]).expand(3, 4), rtol=0, atol=1e-3)


def test_thresholds_are_those_of_the_last_stage() -> None:
    stages = [Scripted(score_thresh=0.9), Scripted(score_thresh=0.0, detections_per_image=2)]
    (found,) = cascade(*stages).predict([], propose([20.0, 20, 60, 40]), SIZES)
    assert len(found) == 2
    assert [len(d) for d in cascade(*reversed(stages)).predict([], propose([20.0, 20, 60, 40]), SIZES)] == [0]


def test_padding_and_lost_boxes_give_no_detections() -> None:
    lost = cascade(Scripted(target=[200.0, 20, 240, 40]), Scripted(score_thresh=0.0))
    assert [len(d) for d in lost.predict([], propose([20.0, 20, 60, 40]), SIZES)] == [0]
    padded = cascade(Scripted(), Scripted(score_thresh=0.0))
    (found,) = padded.predict([], propose([20.0, 20, 60, 40], [0, 0, 0, 0], valid=[True, False]), SIZES)
    assert found.boxes.tolist() == [[20, 20, 60, 40]] * K


# With real heads


def real_stage(**options) -> RoIHead:
    return RoIHead(
        pooler=MultiLevelRoIAlign(strides=(4, 8), output_size=2),
        box_head=ConvFCHead(in_channels=4, pool_size=2, fc_dim=8),
        num_classes=K,
        **({"class_agnostic": True, "num_samples": 16} | options),
    )


@pytest.fixture
def scene(make_targets) -> tuple:
    """Features, proposals, ground truth and sizes of two images, the second without objects."""
    features = [torch.randn(2, 4, 25, 38), torch.randn(2, 4, 13, 19)]
    corner = torch.rand(2, 30, 2) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(2, 30, 2) * 35], dim=-1)
    proposals = Proposals(boxes=boxes, scores=torch.zeros(2, 30), valid=torch.rand(2, 30) < 0.9)
    targets = make_targets([[[10, 10, 50, 50], [40, 20, 70, 80]], []], [[2, 0], []])
    return features, proposals, targets, torch.tensor([[100, 150], [90, 120]])


def spread(head: nn.Module) -> None:
    """Logits of several units and deltas that move boxes."""
    for name, parameter in head.named_parameters():
        if "class_logits" in name or "box_deltas" in name:
            nn.init.normal_(parameter, std=1.0)


@pytest.mark.parametrize("agnostic", [True, False])
def test_one_stage_is_the_plain_head(scene, agnostic: bool) -> None:
    features, proposals, targets, sizes = scene
    plain, stage = real_stage(class_agnostic=agnostic), real_stage(class_agnostic=agnostic)
    spread(plain)
    stage.load_state_dict(plain.state_dict())
    runs = []
    for head in (plain, cascade(stage)):
        runs.append(head.losses(features, proposals, targets, sizes, SEEDS))
    (losses, stats), (cascade_losses, cascade_stats) = runs
    assert all(loss > 0 for loss in losses.values())
    assert cascade_losses == {f"{name}_1": loss for name, loss in losses.items()}
    assert cascade_stats == {f"{name}_1": stat for name, stat in stats.items()}
    expected = plain.predict(features, proposals, sizes)
    found = cascade(stage).predict(features, proposals, sizes)
    for ours, other in zip(found, expected, strict=True):
        assert len(other) > 5
        assert all(torch.equal(getattr(ours, x), getattr(other, x)) for x in ("boxes", "scores", "labels"))


def test_loss_weights(scene) -> None:
    features, proposals, targets, sizes = scene
    stages = [real_stage(positive_iou=iou) for iou in IOUS]
    runs = []
    for weights in ((1.0, 1.0, 1.0), (1.0, 0.5, 0.25)):
        losses, _ = cascade(*stages, loss_weights=weights).losses(features, proposals, targets, sizes, SEEDS)
        assert losses.keys() == {f"roi_{x}_{i}" for x in ("class", "box") for i in (1, 2, 3)}
        runs.append(losses)
    for i, weight in enumerate((1.0, 0.5, 0.25), start=1):
        for name in (f"roi_class_{i}", f"roi_box_{i}"):
            assert runs[0][name] > 0
            torch.testing.assert_close(runs[1][name], weight * runs[0][name])


def test_stages_need_a_loss_weight_each() -> None:
    with pytest.raises(AssertionError):
        cascade(Scripted(), loss_weights=(1.0, 0.5))


@pytest.mark.parametrize("count", [0, 1])
def test_no_objects_or_no_proposals(scene, make_targets, count: int) -> None:
    """Every stage has a loss and finite gradients; boxes cost nothing."""
    features, _, _, sizes = scene
    head = cascade(*(real_stage(positive_iou=iou) for iou in IOUS))
    boxes = torch.tensor([[[10.0, 10, 50, 50]]] * 2)[:, :count]
    proposals = Proposals(boxes=boxes, scores=boxes[..., 0], valid=torch.ones(2, count, dtype=torch.bool))
    losses, stats = head.losses(features, proposals, make_targets([[], []], [[], []]), sizes, SEEDS)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert all(stat == 0 for stat in stats.values())
    assert all(losses[f"roi_box_{i}"] == 0 for i in (1, 2, 3))
    assert all((losses[f"roi_class_{i}"] > 0) == (count > 0) for i in (1, 2, 3))
    assert [len(d) for d in head.predict(features, proposals, sizes)] <= [K * count] * 2


def test_a_diverged_stage_does_not_break_the_next(scene) -> None:
    """NaN reaches the losses, which the training loop reports, not the indices of a pooler."""
    features, proposals, targets, sizes = scene
    head = cascade(real_stage(), real_stage())
    nn.init.constant_(head.heads[0].box_deltas.bias, torch.nan)
    losses, _ = head.losses(features, proposals, targets, sizes, SEEDS)
    assert losses["roi_box_1"].isnan()
    assert [len(d) for d in head.predict(features, proposals, sizes)] == [0, 0]
