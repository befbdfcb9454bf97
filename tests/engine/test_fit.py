"""What keeps a detector from fitting a few images, on cases small enough to see the answer."""

import pytest
import torch
from torch import Tensor

from fpn_det.engine.fit import FittedImage, diagnose, limits, summary
from fpn_det.structures import Detections

NAMES = ["cat", "dog", "cow"]
CAT, DOG, COW = [10.0, 10, 50, 50], [100.0, 100, 160, 140], [200.0, 20, 260, 80]
ANCHORS = torch.tensor([[32.0, 32], [64, 64]])
FALLEN = [4.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
TRAINED = {"backbone": (8, 10), "rpn": (5, 5)}


def found(boxes: list[list[float]], labels: list[int], scores: list[float] | None = None) -> Detections:
    return Detections(
        boxes=torch.tensor(boxes).view(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        scores=torch.tensor(scores or [0.9] * len(labels)),
    )


def image(
    boxes: list[list[float]],
    labels: list[int],
    *,
    detections: Detections | None = None,
    proposals: Tensor | None = None,
    scale: float = 1.0,
) -> FittedImage:
    return FittedImage(
        image_id=7,
        boxes=torch.tensor(boxes).view(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        scale=scale,
        proposals=proposals,
        detections=detections,
    )


def of_data(*images: FittedImage, nms_thresh: float = 0.5, most: int = 100) -> list[str]:
    return [str(f) for f in limits(images, NAMES, nms_thresh=nms_thresh, detections_per_image=most)]


def of_training(*images: FittedImage, losses: list[float] = FALLEN, skipped: int = 0, trained=TRAINED) -> list[str]:
    findings = diagnose(
        images, NAMES, anchor_shapes=ANCHORS, losses=losses, num_skipped=skipped, trained=trained, score_thresh=0.05
    )
    return [str(finding) for finding in findings]


def test_sound_labels_have_no_limits():
    assert of_data(image([CAT, DOG], [0, 1]), image([], [])) == []


def test_limits_of_the_data():
    shifted = [12.0, 10, 52, 50]  # IoU 38 / 42 = 0.905 with CAT
    (repeated,) = of_data(image([CAT, shifted, DOG], [0, 0, 1]))
    assert repeated.startswith("1 box repeated: another of the same class")
    assert "image 7" in repeated
    (torn,) = of_data(image([CAT, CAT], [1, 0]))
    assert torn.startswith("1 object labelled twice, with two classes (cat and dog in image 7)")
    half = [20.0, 10, 60, 50]  # IoU 30 / 50 = 0.6
    (crowded,) = of_data(image([CAT, half], [0, 0]))
    assert "nms_thresh 0.5" in crowded
    assert of_data(image([CAT, half], [0, 0]), nms_thresh=0.7) == []
    assert of_data(image([CAT, half], [0, 1])) == []  # NMS is within a class
    (many,) = of_data(image([CAT, DOG, COW], [0, 1, 2]), most=2)
    assert many == "image 7 has 3 boxes, of which 2 can be found. Raise model.roi_head.detections_per_image from 2"


def test_nothing_is_found_where_nothing_is_wrong():
    right = found([CAT, DOG], [0, 1])
    assert of_training(image([CAT, DOG], [0, 1], detections=right, proposals=torch.tensor([CAT, DOG]))) == []


def test_the_first_stage_misses():
    right = found([CAT, DOG], [0, 1])
    (missed,) = of_training(image([CAT, DOG], [0, 1], detections=right, proposals=torch.tensor([CAT])))
    assert missed.startswith("the first stage misses 1 of 2 boxes")
    assert "though anchors have their shapes (they are 49 to 49 px" in missed  # sqrt(60 * 40)
    tiny = [10.0, 10, 20, 20]
    one = image([tiny], [0], detections=found([tiny], [0]), proposals=torch.zeros(0, 4), scale=0.5)
    (missed,) = of_training(one)
    assert "1 of these have the shape of no anchor (they are 5 to 5 px" in missed
    assert "anchors are 32 to 64" in missed
    assert "model.anchors.sizes" in missed


def test_the_second_stage_misses_confuses_or_is_imprecise():
    (missed,) = of_training(image([CAT, DOG], [0, 1], detections=found([CAT], [0])))
    assert missed.startswith("1 of 2 boxes have no detection of any class")
    (missed,) = of_training(image([CAT], [0], detections=found([], [])))
    assert missed.startswith("1 of 1 boxes have no detection")
    both = found([CAT, CAT, DOG], [0, 2, 1], [0.3, 0.6, 0.9])
    (confused,) = of_training(image([CAT, DOG], [0, 1], detections=both))
    assert confused.startswith("1 of 2 boxes are found as another class (cat as cow: 1)")
    loose = found([[10.0, 10, 42, 50]], [0])  # IoU 0.8
    (imprecise,) = of_training(image([CAT], [0], detections=loose))
    assert imprecise.startswith("the boxes are imprecise: of 1 that are found, 0 overlap the true ones by 0.9")
    assert "on average by 0.80" in imprecise


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([2.0, 2.1, 1.9, 2.0, 2.0, 2.1, 2.0, 1.9], "does not fall: 2.05 in the first quarter"),
        (
            [9.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.5],
            "still falls: 3.5 in the third quarter of the run, 1.75 in the last",
        ),
        ([9.0, 8.0, 6.0, 5.0, 1.0, 3.0, 0.5, 2.5], "jumps up and down"),
        ([9.0, 1.0], None),  # too few to tell
    ],
)
def test_the_loss(losses: list[float], message: str | None):
    findings = of_training(image([CAT], [0], detections=found([CAT], [0])), losses=losses)
    assert [message in finding for finding in findings if message] == ([True] if message else [])
    assert bool(findings) == bool(message)


def test_skipped_steps_and_frozen_parts():
    fits = image([CAT], [0], detections=found([CAT], [0]))
    first, second = of_training(fits, skipped=3, trained={"backbone": (0, 10), "rpn": (5, 5)})
    assert first.startswith("3 steps had a loss or gradient that was not finite")
    assert second.startswith("nothing in backbone is trained")


def test_summary():
    loose = [10.0, 10, 42, 50]
    text = summary([image([CAT, DOG], [0, 1], detections=found([loose], [0]), proposals=torch.tensor([CAT, DOG]))])
    assert text.splitlines() == [
        "of 2 boxes in 1 images, found at IoU 0.5, 0.75, 0.9:",
        "proposals   100.0%  100.0%  100.0%",
        "detections   50.0%   50.0%    0.0%",
    ]
