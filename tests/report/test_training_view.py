"""What the pictures show is what the losses are computed from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fpn_det import build
from fpn_det.config import Config, load_config
from fpn_det.models.roi_head import RoIHead, RoISamples
from fpn_det.models.rpn import RPN, AnchorSamples
from fpn_det.report.training_view import (
    ALARM,
    LEVEL_COLORS,
    anchor_views,
    draw_anchors,
    draw_rois,
    draw_targets,
    first_head,
    padded_image,
    roi_views,
)
from fpn_det.structures import Batch

LEVELS = ("P2", "P3", "P4", "P5", "P6")
C4 = (
    *("model.neck={kind: single, stage: 4}", "model.anchors.sizes=[[16,32,64]]"),
    "model.roi_head.box_head={kind: conv_fc, num_fcs: 1, fc_dim: 32}",
)


def read(tiny: list[str], *overrides: str) -> Config:
    given = [o for o in tiny[2:] if o.partition(".")[2].partition(".")[0] != "neck" or overrides != C4]
    return load_config(Path(tiny[1]), [*given, "data.short_sides=[50,64]", *overrides])


def training_step(config: Config) -> tuple[build.DetectionModel, Batch]:
    """A model in training mode, and the batch of step 1."""
    data = build.load_train_data(config)
    torch.manual_seed(0)
    model = build.build_model(config, len(data.categories), pretrained=False).train()
    return model, next(iter(build.build_train_loader(config, data, start_step=1)))


@pytest.mark.parametrize("overrides", [(), ("model.rpn.min_match_iou=0.5", "model.roi_head={kind: cascade}"), C4])
def test_the_samples_are_those_of_the_losses(tiny, monkeypatch, overrides) -> None:
    model, batch = training_step(read(tiny, *overrides))
    used: list[AnchorSamples] = []
    pooled: list[RoISamples] = []
    rpn_loss, roi_loss = RPN.loss, RoIHead.loss

    def spy_on_rpn(self, logits: Tensor, deltas: Tensor, samples: AnchorSamples):
        used.append(samples)
        return rpn_loss(self, logits, deltas, samples)

    def spy_on_head(self, logits: Tensor, deltas: Tensor, samples: RoISamples):
        pooled.append(samples)
        return roi_loss(self, logits, deltas, samples)

    monkeypatch.setattr(RPN, "loss", spy_on_rpn)
    monkeypatch.setattr(RoIHead, "loss", spy_on_head)
    with torch.no_grad():
        model(batch)
        views = anchor_views(model.rpn, batch)
        rois = roi_views(model.roi_head, model.propose(batch), batch)

    for i, view in enumerate(views):
        is_positive, valid = used[0].is_positive[i], used[0].valid[i]
        for mask, chosen in ((view.positive, is_positive & valid), (view.negative, ~is_positive & valid)):
            assert mask.nonzero().flatten().tolist() == used[0].index[i][chosen].sort().values.tolist()
        for index, box in zip(used[0].index[i], used[0].anchors[i], strict=True):
            assert torch.equal(view.anchors[index], box)  # so the levels have the shapes of the features
        assert not (view.ignored & (view.positive | view.negative)).any()
    shown = {
        kind: sum(int(getattr(view, kind).sum()) for view in views) for kind in ("positive", "negative", "ignored")
    }
    assert min(shown.values()) > 10
    head = first_head(model.roi_head)
    for i, view in enumerate(rois):
        valid = pooled[0].valid[i]
        assert torch.equal(view.boxes, pooled[0].boxes[i][valid])
        assert torch.equal(view.is_positive, pooled[0].labels[i][valid] < head.num_classes)
        assert torch.equal(view.level, head.pooler.assign_levels(view.boxes))
    assert 0 < sum(int(view.is_positive.sum()) for view in rois) < sum(len(view.boxes) for view in rois)


def with_targets(batch: Batch, boxes: list[list[float]]) -> Batch:
    """The batch with these boxes, of class 0, in its first image, and none in the others."""
    changed = batch.clone()
    changed.targets.valid.zero_()
    for i, box in enumerate(boxes):
        changed.targets.boxes[0, i] = torch.tensor(box)
        changed.targets.labels[0, i] = 0
        changed.targets.valid[0, i] = True
    return changed


def count(picture: Tensor, color: tuple[int, int, int]) -> int:
    return int((picture == torch.tensor(color)[:, None, None]).all(0).sum())


def test_a_box_without_anchors_is_marked(tiny) -> None:
    """The second of two equal boxes loses all anchors to the first; with a floor, so does a box that is very small."""
    model, batch = training_step(read(tiny, "model.rpn.min_match_iou=0.3"))
    batch = with_targets(batch, [[8, 8, 40, 40], [8, 8, 40, 40], [50, 50, 53, 53]])
    view, empty = anchor_views(model.rpn, batch)[:2]
    anchors = model.rpn.label(view.anchors, batch.targets)
    assert view.positives_of_gt.tolist() == [int(anchors.is_positive[0].sum()), 0, 0]
    assert view.positives_of_gt[0] > 0
    assert len(empty.positives_of_gt) == empty.positive.sum() == 0
    image = padded_image(batch, 0, (0, 0, 0))
    picture = draw_anchors(image, batch, 0, view, ["thing"], LEVELS)
    assert count(picture, ALARM) > 800  # the outlines, not only the legend
    fine = with_targets(batch, [[8, 8, 40, 40]])
    [view, *_] = anchor_views(model.rpn, fine)
    assert count(draw_anchors(image, fine, 0, view, ["thing"], LEVELS), ALARM) == 0


def test_pictures_show_padding_and_levels(tiny) -> None:
    config = read(tiny, "data.short_sides=[50]", "data.long_side=50", "data.test_short_side=50")
    model, batch = training_step(config)
    image = padded_image(batch, 0, config.model.pixel_mean)
    h, w = batch.sizes[0].tolist()
    assert (h, w, *image.shape[1:]) == (50, 50, 64, 64)
    assert torch.equal(image[:, :h, :w], batch.images[0, :, :h, :w])
    assert image[:, h:].flatten(1).unique(dim=1).T.tolist() == [[124, 116, 104]]
    assert image[:, :, w:].flatten(1).unique(dim=1).T.tolist() == [[124, 116, 104]]
    [view, *_], names = anchor_views(model.rpn, batch), ["a", "b", "<c>\x1b", "d", "e"]
    with torch.no_grad():
        [rois, *_] = roi_views(model.roi_head, model.propose(batch), batch)
    for picture, levels in (
        (draw_targets(image, batch, 0, names), []),
        (draw_anchors(image, batch, 0, view, names, LEVELS), view.level[view.positive].unique().tolist()),
        (draw_rois(image, batch, 0, rois, names, LEVELS), rois.level[rois.is_positive].unique().tolist()),
    ):
        assert picture.shape[2] == 320
        assert picture.shape[1] > 320
        for level in levels:
            assert count(picture, LEVEL_COLORS[level]) > 150  # the legend has some too
