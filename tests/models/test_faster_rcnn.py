import copy
import dataclasses

import pytest
import torch

from fpn_det.models import roi_head as roi_head_module
from fpn_det.models import rpn as rpn_module
from fpn_det.models.backbone import ResNet
from fpn_det.models.faster_rcnn import FasterRCNN, FastRCNN, ProposalNetwork
from fpn_det.models.matching import noise
from fpn_det.models.roi_head import CascadeRoIHead, RoIHead
from fpn_det.structures import Batch, Detections, Proposals, Targets

SIZES = [(60, 90), (49, 70)]
BOXES = [[[5, 5, 40, 45], [50, 10, 85, 30]], [[10, 8, 60, 40]]]
LABELS = [[0, 2], [1]]
LOSSES = {"rpn_objectness", "rpn_box", "roi_class", "roi_box"}


@pytest.fixture
def batch(make_batch) -> Batch:
    return make_batch(SIZES, BOXES, LABELS)


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalize_by_hand(make_model, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """RGB constants per channel; (h, w) = (2, 3) of 4 x 5 is image, the rest becomes 0; the batch stays as it is."""
    images = torch.full((1, 3, 4, 5), 200, dtype=dtype)
    images[:, :, :2, :3] = torch.tensor([10, 20, 30], dtype=dtype).view(3, 1, 1)
    images = images.contiguous(memory_format=memory_format)
    before = images.clone()
    normalized = make_model().normalize(images, torch.tensor([[2, 3]]))
    assert torch.equal(images, before)
    assert normalized.dtype == torch.float32
    for channel, (value, mean, std) in enumerate([(10, 123.675, 58.395), (20, 116.28, 57.12), (30, 103.53, 57.375)]):
        expected = torch.zeros(4, 5)
        expected[:2, :3] = (value - mean) / std
        torch.testing.assert_close(normalized[0, channel], expected)


def test_colour_of_the_padding_does_not_matter(make_model, batch: Batch) -> None:
    model = make_model()
    white = batch.images.clone()
    for image, (h, w) in zip(white, SIZES, strict=True):
        image[:, h:] = 255
        image[:, :, w:] = 255
    assert not torch.equal(white, batch.images)
    for ours, other in zip(
        model.features(batch), model.features(dataclasses.replace(batch, images=white)), strict=True
    ):
        assert torch.equal(ours, other)


def test_losses_and_stats(make_model, batch: Batch) -> None:
    losses, stats = make_model()(batch)
    assert losses.keys() == LOSSES
    assert stats.keys() == {"rpn_positives", "roi_positives"}
    for value in [*losses.values(), *stats.values()]:
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.isfinite()
    assert all(loss > 0 for loss in losses.values())
    assert stats["rpn_positives"] >= 1
    assert stats["roi_positives"] >= 1.5  # at least the three ground-truth boxes of two images
    assert not any(value.requires_grad for value in stats.values())


def test_untrained_losses_are_those_of_ignorance(make_model, make_batch) -> None:
    """Small initial weights: log 2 per anchor and log (K + 1) per RoI."""
    batch = make_batch([(200, 300)], [[[20, 20, 120, 140]]], [[1]])
    losses, _ = make_model(num_classes=3)(batch)
    assert losses["rpn_objectness"].item() == pytest.approx(0.693, rel=0.05)
    assert losses["roi_class"].item() == pytest.approx(1.386, rel=0.05)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize(("boxes", "labels"), [([[], []], [[], []]), ([BOXES[0], []], [LABELS[0], []])])
def test_images_without_objects_train(make_model, make_batch, boxes, labels, agnostic: bool) -> None:
    """Every parameter gets a finite gradient (DistributedDataParallel waits for all of them)."""
    model = make_model(roi={"class_agnostic": agnostic})
    losses, _ = model(make_batch(SIZES, boxes, labels))
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if not any(labels):
        assert losses["rpn_box"] == losses["roi_box"] == 0


def with_cascade(model: FasterRCNN) -> FasterRCNN:
    """The same detector with three class-agnostic stages, as in arXiv 1712.00726."""
    plain = model.roi_head
    assert isinstance(plain, RoIHead)
    stages = [
        RoIHead(
            pooler=plain.pooler,
            box_head=copy.deepcopy(plain.box_head),
            num_classes=3,
            class_agnostic=True,
            positive_iou=iou,
            box_weights=(10 * scale, 10 * scale, 5 * scale, 5 * scale),
        )
        for iou, scale in [(0.5, 1), (0.6, 2), (0.7, 3)]
    ]
    model.roi_head = CascadeRoIHead(stages=stages, loss_weights=(1, 0.5, 0.25))
    return model


@pytest.mark.parametrize("change", [lambda model: model, with_cascade], ids=["plain", "cascade"])
def test_loss_falls_on_one_batch(make_model, batch: Batch, change) -> None:
    model = change(make_model()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    history = []
    for _ in range(15):
        losses, _ = model(batch)
        loss = total(losses)
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-3:]) < 0.6 * sum(history[:3])


def test_seeds_alone_choose_the_samples(make_model, batch: Batch) -> None:
    """Not the generator, of which no number is drawn."""
    model = make_model(roi={"num_samples": 16})
    torch.manual_seed(3)
    state = torch.get_rng_state()
    losses, _ = model(batch)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert model(batch)[0] == losses
    others = model(dataclasses.replace(batch, seeds=batch.seeds + 9))[0]
    assert all(others[name] != losses[name] for name in ("rpn_objectness", "roi_class"))


@pytest.mark.parametrize("change", [lambda model: model, with_cascade], ids=["plain", "cascade"])
def test_losses_are_the_mean_over_the_images(make_model, make_batch, change) -> None:
    """Of any images of one padded size, on their own; gradients too. The RoIs of the second are fewer than wanted."""
    model = change(make_model())
    boxes = [BOXES[0], [[2, 3, 20, 15]], []]
    batch = make_batch([(64, 96), (16, 24), (64, 96)], boxes, [*LABELS, []])
    whole, _ = model(batch)
    total(whole).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i in range(3):
        own = slice(i, i + 1)
        count = int(batch.targets.valid[i].sum())
        targets = Targets(**{f.name: getattr(batch.targets, f.name)[own, :count] for f in dataclasses.fields(Targets)})
        others = ("images", "sizes", "image_ids", "original_sizes", "seeds")
        alone, _ = model(Batch(targets=targets, **{name: getattr(batch, name)[own] for name in others}))
        whole = {name: loss - alone[name].detach() / 3 for name, loss in whole.items()}
        (total(alone) / 3).backward()
    assert all(abs(rest) < 1e-6 for rest in whole.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_each_stage_draws_for_itself(make_model, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    salts = []
    for module in (rpn_module, roi_head_module):
        monkeypatch.setattr(
            module, "noise", lambda seeds, num, salt: salts.append(salt) or noise(seeds, num, salt=salt)
        )
    make_model()(batch)
    assert len(salts) == len(set(salts)) == 3


def test_bfloat16_autocast_keeps_boxes_and_losses_in_float32(make_model, batch: Batch) -> None:
    model = make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.features(batch)
        assert features[0].dtype == torch.bfloat16
        logits, deltas, anchors = model.rpn(features)
        assert all(x.dtype == torch.float32 for x in [*logits, *deltas, *anchors])
        proposals = model.rpn.propose(logits, deltas, anchors, batch.sizes)
        assert proposals.boxes.dtype == proposals.scores.dtype == torch.float32
        losses, _ = model(batch)
        detections = model.eval().predict(batch)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(d.boxes.dtype == d.scores.dtype == torch.float32 for d in detections)
    total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    exact, _ = model(batch)
    for name in LOSSES:
        assert losses[name].item() == pytest.approx(exact[name].item(), rel=0.2)


def test_predict(make_model, batch: Batch) -> None:
    model = make_model(roi={"score_thresh": 0.0, "detections_per_image": 40}).eval()
    detections = model.predict(batch)
    assert len(detections) == 2
    for found, (h, w) in zip(detections, SIZES, strict=True):
        assert isinstance(found, Detections)
        assert found.boxes.shape == (40, 4)
        assert found.labels.dtype == torch.int64
        assert found.labels.min() >= 0
        assert found.labels.max() < 3
        assert (found.scores.diff() <= 0).all()
        assert (found.boxes[:, :2] >= 0).all()
        assert (found.boxes[:, 2] <= w).all()
        assert (found.boxes[:, 3] <= h).all()
        assert found.boxes[:, 2].max() > h  # x follows the width, not the height
        assert not found.scores.requires_grad


def test_predict_uses_the_limits_for_testing(make_model, batch: Batch) -> None:
    options = {"post_nms_top_k_train": 50, "post_nms_top_k_test": 3}
    model = make_model(rpn=options, roi={"score_thresh": 0.0}).eval()
    assert max(map(len, model.predict(batch))) <= 3 * 3


def test_nothing_found(make_model, batch: Batch) -> None:
    assert [len(d) for d in make_model(roi={"score_thresh": 0.9}).eval().predict(batch)] == [0, 0]


def test_state_dict_holds_what_is_learnt(make_model) -> None:
    model = make_model()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_resnet_end_to_end(make_model, batch: Batch) -> None:
    """A real body: frozen layers stay untouched, all others get gradients."""
    body = ResNet(name="resnet18", norm="bn", frozen_stages=2)
    model = make_model(body=body).train()
    losses, _ = model(batch)
    total(losses).backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("backbone.stem", "backbone.layer1"))
        assert (parameter.grad is None) == frozen, name


@pytest.fixture
def detector(make_model) -> FasterRCNN:
    """With proposals of different scores and detections of all classes."""
    model = make_model(roi={"score_thresh": 0.0}, rpn={"post_nms_top_k_test": 60}).eval()
    for layer in (
        model.rpn.head.convs[0],
        model.rpn.head.objectness,
        model.rpn.head.deltas,
        model.roi_head.class_logits,
    ):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return model


def parts(model: FasterRCNN, *names: str) -> dict:
    """The constants and these parts of a detector, for another one to share."""
    constants = {"pixel_mean": model.pixel_mean.flatten().tolist(), "pixel_std": model.pixel_std.flatten().tolist()}
    return constants | {name: getattr(model, name) for name in names}


def equal(ours: Proposals | Detections, other: Proposals | Detections) -> bool:
    return all(torch.equal(getattr(ours, f.name), getattr(other, f.name)) for f in dataclasses.fields(other))


def test_proposal_network_is_the_first_stage(detector: FasterRCNN, batch: Batch) -> None:
    rpn = ProposalNetwork(**parts(detector, "backbone", "neck", "rpn")).eval()
    assert set(rpn.state_dict()) == {k for k in detector.state_dict() if not k.startswith("roi_head.")}
    proposals = rpn.propose(batch)
    assert proposals.boxes.shape == (2, 60, 4)
    assert proposals.scores[0, 0] > proposals.scores[0, 59] + 0.05
    assert equal(proposals, detector.propose(batch))
    assert equal(proposals, detector.rpn.predict(detector.features(batch), batch.sizes))
    (losses, stats), (their_losses, their_stats) = (model.train()(batch) for model in (rpn, detector))
    assert losses == {k: v for k, v in their_losses.items() if k.startswith("rpn_")}
    assert stats == {k: v for k, v in their_stats.items() if k.startswith("rpn_")}
    assert losses.keys() | stats.keys() == {"rpn_objectness", "rpn_box", "rpn_positives"}


def test_proposals_as_detections(detector: FasterRCNN, batch: Batch) -> None:
    """All of one class, without padding, in the order of their scores."""
    detector.rpn.min_size = 40  # fewer in one image than in the other
    rpn = ProposalNetwork(**parts(detector, "backbone", "neck", "rpn")).eval()
    proposals, found = rpn.propose(batch), rpn.predict(batch)
    assert len({len(d) for d in found}) == 2
    for i, detections in enumerate(found):
        assert len(detections) == proposals.valid[i].sum()
        assert torch.equal(detections.boxes, proposals.boxes[i, : len(detections)])
        assert torch.equal(detections.scores, proposals.scores[i, : len(detections)])
        assert not detections.labels.any()
        assert detections.labels.dtype == torch.int64


def test_fast_rcnn_is_the_second_stage(detector: FasterRCNN, batch: Batch) -> None:
    fast = FastRCNN(**parts(detector, "backbone", "neck", "roi_head")).eval()
    assert set(fast.state_dict()) == {k for k in detector.state_dict() if not k.startswith("rpn.")}
    fed = dataclasses.replace(batch, proposals=detector.propose(batch))
    assert fast.propose(fed) is fed.proposals
    for ours, expected in zip(fast.predict(fed), detector.predict(batch), strict=True):
        assert expected.labels.unique().tolist() == [0, 1, 2]
        assert equal(ours, expected)
    losses, stats = fast.train()(fed)
    assert losses.keys() | stats.keys() == {"roi_class", "roi_box", "roi_positives"}
    assert losses["roi_box"] > 0  # the ground truth counts as a proposal
    assert stats["roi_positives"] >= 1.5
    with pytest.raises(AssertionError, match="proposals"):
        fast(batch)


def test_cascade_end_to_end(detector: FasterRCNN, batch: Batch) -> None:
    losses, stats = with_cascade(detector).train()(batch)
    of_stages = {f"roi_{name}_{i}" for name in ("class", "box") for i in (1, 2, 3)}
    assert losses.keys() == {"rpn_objectness", "rpn_box"} | of_stages
    assert stats.keys() == {"rpn_positives", "roi_positives_1", "roi_positives_2", "roi_positives_3"}
    assert all(loss.isfinite() for loss in losses.values())
    detector.roi_head.heads[2].score_thresh = 0.0
    for found, (h, w) in zip(detector.eval().predict(batch), SIZES, strict=True):
        assert len(found) == 100
        assert (found.scores.diff() <= 0).all()
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([w, h, w, h])).all()
