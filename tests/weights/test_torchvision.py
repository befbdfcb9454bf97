"""Torchvision's models, saved by torchvision and imported by the tool, against torchvision itself."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torchvision.io import ImageReadMode, decode_image
from torchvision.models import detection, get_model
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FasterRCNN as TorchvisionFasterRCNN
from torchvision.transforms._presets import ObjectDetection

from fpn_det.build import build_model, build_test_transform
from fpn_det.config import load_config
from fpn_det.data.loader import collate
from fpn_det.data.transforms import load_image
from fpn_det.engine.checkpoint import checkpoint_categories, load_checkpoint, load_weights
from fpn_det.engine.evaluate import detect
from fpn_det.structures import Categories, Detections, InputError, Sample
from fpn_det.weights import torchvision as importer
from fpn_det.weights.coco_classes import COCO_CATEGORIES
from fpn_det.weights.read import WeightFile
from fpn_det.weights.rename import Converted

# (width, height): landscape, portrait, square, tiny, thin, large, odd; some are enlarged, some limited by the long side
SIZES = [
    (640, 480),
    (480, 640),
    (500, 333),
    (333, 500),
    (427, 640),
    (224, 224),
    (801, 799),
    (97, 61),
    (61, 97),
    (16, 12),
    (5, 7),
    (2, 2),
    (600, 150),
    (150, 600),
    (700, 70),
    (40, 333),
    (1600, 1200),
    (1201, 1999),
    (2049, 513),
    (160, 160),
    (161, 213),
    (320, 267),
]
HOLES = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]


def draw_image(path: Path, width: int, height: int, seed: int) -> None:
    """Clouds with rectangles in front."""
    rng = random.Random(seed)
    coarse = Image.new("RGB", (6, 5))
    coarse.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(30)])
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    for _ in range(12):
        w, h = (rng.randrange(1, max(2, side // 2)) for side in (width, height))
        colour = tuple(rng.randrange(256) for _ in range(3))
        image.paste(colour, (x := rng.randrange(width), y := rng.randrange(height), x + w, y + h))
    image.save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{w}x{h}.{'jpg' if i % 3 == 0 else 'png'}" for i, (w, h) in enumerate(SIZES)]
    for i, (path, (width, height)) in enumerate(zip(paths, SIZES, strict=True)):
        draw_image(path, width, height, seed=i)
    return paths


def perturb(model: TorchvisionFasterRCNN, paths: list[Path]) -> None:
    """Weights for which every layer says something and hundreds of boxes compete.

    The norms are calibrated on images, the last layers so that logits spread over several units and no class or anchor
    wins everywhere.
    """
    inputs = [ObjectDetection()(decode_image(str(path), ImageReadMode.RGB)) for path in paths]
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    last = "bn3" if any(name.endswith("bn3") for name in norms) else "bn2"  # of a residual branch
    for name, norm in norms.items():
        # Residual branches as small as in trained networks: else 50 random layers amplify rounding errors 500 times.
        nn.init.uniform_(norm.weight, *((0.1, 0.3) if name.endswith(last) else (0.5, 1.0)))
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = None  # average over all batches
    model.eval()
    with torch.no_grad():
        for norm in norms.values():
            norm.train()
        for _ in range(2):  # the boxes that the second stage sees depend on the statistics of the first
            model(inputs)
        model.eval()
        predictor = model.roi_heads.box_predictor
        for layer, std in [
            (model.rpn.head.cls_logits, 2.0),
            (model.rpn.head.bbox_pred, 0.15),
            (predictor.cls_score, 1.5),
            (predictor.bbox_pred, 0.5),
        ]:
            outputs: list[Tensor] = []
            hook = layer.register_forward_hook(lambda _module, _input, y, seen=outputs: seen.append(y))
            nn.init.normal_(layer.weight, std=0.1)
            nn.init.zeros_(layer.bias)
            model(inputs)
            hook.remove()
            channels = torch.cat([y.movedim(1, 0).flatten(1) for y in outputs], dim=1)
            scale = std / channels.std(dim=1).mean()
            layer.weight *= scale
            layer.bias.copy_(-channels.mean(dim=1) * scale)


def predict_theirs(model: TorchvisionFasterRCNN, path: Path) -> Detections:
    """Torchvision's usage: decode, scale to 0..1, and all else inside of the model."""
    image = ObjectDetection()(decode_image(str(path), ImageReadMode.RGB))
    with torch.no_grad():
        [found] = model.eval()([image])
    return Detections(boxes=found["boxes"], scores=found["scores"], labels=found["labels"])


class Imported:
    """The pair of files that the tool wrote, loaded as tools/predict.py does."""

    def __init__(self, checkpoint: Path, overrides: list[str]) -> None:
        self.config = load_config(checkpoint.with_suffix(".yaml"), overrides)
        state = load_checkpoint(checkpoint)
        self.categories = checkpoint_categories(state)
        self.model = build_model(self.config, len(self.categories), pretrained=False)
        load_weights(self.model, state["model"], checkpoint)

    def predict(self, path: Path) -> Detections:
        sample = Sample.to_detect_in(load_image(path))
        batch = collate([build_test_transform(self.config)(sample, random.Random(0))])
        [(_, [found])] = detect(self.model, [batch], device=torch.device("cpu"), precision="fp32", show_progress=False)
        return found


def mismatches(ours: Detections, theirs: Detections, categories: Categories) -> list[str]:
    """How our detections differ from torchvision's, whose labels without a category are passed over.

    Those take places among torchvision's 100, so its list may end earlier than ours.
    """
    ids = torch.tensor(categories.ids)
    known = torch.isin(theirs.labels, ids)
    n = int(known.sum())
    if len(ours) < n or (known.all() and len(ours) != n):
        return [f"{len(ours)} detections, torchvision has {n}"]
    labels, boxes, scores = ids[ours.labels[:n]], ours.boxes[:n], ours.scores[:n]
    their_labels, their_boxes, their_scores = theirs.labels[known], theirs.boxes[known], theirs.scores[known]
    # Scores that differ by one rounding may be in another order: find each detection among theirs.
    same = (labels[:, None] == their_labels) & ((scores[:, None] - their_scores).abs() <= 1e-4)
    same &= (boxes[:, None] - their_boxes).abs().amax(dim=-1) <= 0.05
    lines = [f"ours {i}: {labels[i]} {scores[i]:.6f} {boxes[i]}" for i in range(n) if not same[i].any()]
    return lines + [
        f"torchvision's {i}: {their_labels[i]} {their_scores[i]:.6f} {their_boxes[i]}"
        for i in range(n)
        if not same[:, i].any()
    ]


OVERRIDES = [
    "data.test_short_side=160",
    "data.long_side=267",
    "data.short_sides=[160]",
    "model.rpn.pre_nms_top_k_test=200",
    "model.rpn.post_nms_top_k_test=120",
]
OPTIONS = {"min_size": 160, "max_size": 267, "rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 120}


@pytest.fixture(scope="module", params=["v1", "v2"])
def pair(
    request: pytest.FixtureRequest, images: list[Path], tool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TorchvisionFasterRCNN, Path]:
    """A perturbed model of torchvision on small images, and what the tool made of the file that torchvision saved."""
    torch.manual_seed(0)
    build = detection.fasterrcnn_resnet50_fpn if request.param == "v1" else detection.fasterrcnn_resnet50_fpn_v2
    theirs = build(weights=None, weights_backbone=None, **OPTIONS)
    perturb(theirs, images[:2])
    folder = tmp_path_factory.mktemp(request.param)
    return theirs, import_saved(theirs, folder, tool)


def import_saved(theirs: TorchvisionFasterRCNN, folder: Path, tool, *options: object) -> Path:
    torch.save(theirs.state_dict(), folder / "theirs.pth")
    outcome = tool("import_weights", folder / "theirs.pth", folder / "ours.pth", *options)
    assert outcome.code == 0, outcome.err
    return folder / "ours.pth"


def test_detections_equal_those_of_torchvision(pair: tuple[TorchvisionFasterRCNN, Path], images: list[Path]) -> None:
    theirs, checkpoint = pair
    ours = Imported(checkpoint, OVERRIDES)
    found = {path.name: (ours.predict(path), predict_theirs(theirs, path)) for path in images}
    # The comparison is worth something: many classes, labels without a category, the limit of 100 at work.
    all_labels = torch.cat([b.labels for _, b in found.values()])
    assert len(found) == 22
    assert len(all_labels.unique()) > 80
    assert torch.isin(all_labels, torch.tensor(HOLES)).sum() > 50
    assert all(len(a) == len(b) == 100 and a.scores.max() > a.scores.min() + 0.2 for a, b in found.values())
    assert {k: m for k, (a, b) in found.items() if (m := mismatches(a, b, ours.categories))} == {}


@pytest.mark.soak
def test_detections_at_full_size_on_real_images(
    pair: tuple[TorchvisionFasterRCNN, Path],
    images: list[Path],
    test_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The config as the tool wrote it: 800 to 1333 pixels, 1000 proposals."""
    theirs, checkpoint = pair
    monkeypatch.setattr(theirs.transform, "min_size", (800,))
    monkeypatch.setattr(theirs.transform, "max_size", 1333)
    for name in ("_pre_nms_top_n", "_post_nms_top_n"):
        monkeypatch.setattr(theirs.rpn, name, {"training": 2000, "testing": 1000})
    ours = Imported(checkpoint, [])
    for path in [test_data / "bccd/images/BloodImage_00000.jpg", images[SIZES.index((700, 70))]]:
        assert mismatches(ours.predict(path), predict_theirs(theirs, path), ours.categories) == []


def test_frozen_norms_without_eps_and_few_classes(images: list[Path], tool, tmp_path: Path) -> None:
    """A fine-tuned model: three classes, norms with eps 0 as in torchvision's COCO_V1, the names of before 2022."""
    torch.manual_seed(0)
    trainable = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d)
    trained = TorchvisionFasterRCNN(trainable, 4, **OPTIONS)
    nn.init.normal_(trainable.body.conv1.weight, std=1e-4)  # so small a variance that eps matters
    trainable.body.bn1.eps = 1e-30
    perturb(trained, images[:2])
    trained.roi_heads.box_predictor.cls_score.bias.data[0] += 3  # most of an image is background
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    theirs = TorchvisionFasterRCNN(backbone, 4, **OPTIONS)
    theirs.load_state_dict(trained.state_dict())
    overwrite_eps(theirs, 0.0)
    torch.save(old_layout(theirs.state_dict()), tmp_path / "theirs.pth")
    outcome = tool("import_weights", tmp_path / "theirs.pth", tmp_path / "ours.pth", "--norm-eps", "0")
    assert outcome.code == 0, outcome.err

    ours = Imported(tmp_path / "ours.pth", OVERRIDES)
    assert (ours.config.model.backbone.norm, ours.config.model.backbone.norm_eps) == ("frozen_bn", 0)
    assert ours.categories == Categories((1, 2, 3), ("class_1", "class_2", "class_3"))
    found = {path.name: (ours.predict(path), predict_theirs(theirs, path)) for path in images}
    assert sum(0 < len(b) < 100 for _, b in found.values()) > 10  # so the threshold of the score decides
    assert {k: m for k, (a, b) in found.items() if (m := mismatches(a, b, ours.categories))} == {}


def old_layout(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of before torchvision 0.13: convolutions of the FPN and the RPN were not in blocks."""
    renamed = {k.replace("rpn.head.conv.0.0.", "rpn.head.conv."): v for k, v in state_dict.items()}
    return {
        k.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if ".fpn." in k else k: v
        for k, v in renamed.items()
    }


@pytest.fixture(scope="module")
def meta_state() -> dict[str, Tensor]:
    """Names and shapes of the first generation, without memory; only the predictor has values: each its label."""
    with torch.device("meta"):
        state_dict = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    for name, rows in (("cls_score", 91), ("bbox_pred", 364)):
        values = torch.arange(rows).float() // (rows // 91)
        state_dict[f"roi_heads.box_predictor.{name}.bias"] = values
        state_dict[f"roi_heads.box_predictor.{name}.weight"] = values[:, None].repeat(1, 1024)
    return state_dict


def convert(state_dict: dict[str, Tensor], **options: Any) -> Converted:
    return importer.convert(WeightFile(state_dict, {}, Path("x.pth")), **options)


def test_old_and_new_layout_are_the_same(meta_state: dict[str, Tensor]) -> None:
    old = old_layout(meta_state)
    assert {"backbone.fpn.inner_blocks.0.weight", "rpn.head.conv.bias"} <= old.keys()
    assert {k: v.shape for k, v in convert(old).state_dict.items()} == {
        k: v.shape for k, v in convert(meta_state).state_dict.items()
    }


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_background_first_and_holes_become_background_last(meta_state: dict[str, Tensor], part: str) -> None:
    converted = convert(meta_state)
    assert converted.categories == COCO_CATEGORIES
    first_column = slice(None) if part == "bias" else (slice(None), 0)
    logits = converted.state_dict[f"roi_head.class_logits.{part}"][first_column].tolist()
    assert logits == [*COCO_CATEGORIES.ids, 0, *HOLES]
    deltas = converted.state_dict[f"roi_head.box_deltas.{part}"][first_column].tolist()
    assert deltas == [label for label in COCO_CATEGORIES.ids for _ in range(4)]
    assert converted.config["model"]["roi_head"]["background_rows"] == 11
    actions = {row.source: row for row in converted.rows}
    assert actions[f"roi_heads.box_predictor.cls_score.{part}"].action == "permuted"
    assert "12, 26, 29" in actions[f"roi_heads.box_predictor.bbox_pred.{part}"].note


def test_conventions(meta_state: dict[str, Tensor]) -> None:
    """Torchvision's, of which some decide about too few boxes to show in a comparison of detections."""
    config = convert(meta_state).config
    assert (config["data"], config["eval"]) == ({"resize": "float"}, {"batch_size": 1})
    model = config["model"]
    assert (model["kind"], model["delta_clamp"]) == ("faster_rcnn", "upper")
    assert model["anchors"] == {"rounded": True, "inferred_strides": True}
    expected = {
        "num_convs": 1,
        "channels": 256,
        "smooth_l1_beta": 1 / 9,
        "post_nms_top_k_train": 2000,
        "min_size": 1e-3,
    }
    assert model["rpn"] == expected
    head = model["roi_head"]
    assert (head["pool_size"], head["sampling_ratio"], head["aligned"]) == (7, 2, False)
    assert (head["level_bias"], head["smooth_l1_beta"], head["min_size"]) == (1e-6, 1 / 9, 1e-2)
    assert head["class_agnostic"] is False


def test_second_generation_has_norms_and_deeper_heads() -> None:
    with torch.device("meta"):
        state_dict = detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
    for name in ("cls_score", "bbox_pred"):
        for part in ("weight", "bias"):
            key = f"roi_heads.box_predictor.{name}.{part}"
            state_dict[key] = torch.zeros(state_dict[key].shape)
    model = convert(state_dict).config["model"]
    assert (model["backbone"]["norm"], model["backbone"]["norm_eps"], model["neck"]["norm"]) == ("bn", 1e-5, "bn")
    assert model["rpn"]["num_convs"] == 2
    box_head = {"kind": "conv_fc", "num_convs": 4, "conv_channels": 256, "norm": "bn", "num_fcs": 1, "fc_dim": 1024}
    assert model["roi_head"]["box_head"] == box_head


def test_coco_categories() -> None:
    names = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    expected = [(i, name) for i, name in enumerate(names) if name not in ("__background__", "N/A")]
    assert list(zip(COCO_CATEGORIES.ids, COCO_CATEGORIES.names, strict=True)) == expected


@pytest.mark.parametrize(
    ("ids", "logits"),
    [
        pytest.param((2, 5, 90), [2, 5, 90, 0, *(i for i in range(1, 90) if i not in (2, 5))], id="labels are ids"),
        pytest.param(tuple(range(1, 91)), [*range(1, 91), 0], id="ids without holes"),
        pytest.param(tuple(range(0, 900, 10)), [*range(1, 91), 0], id="labels are positions"),
    ],
)
def test_given_categories(meta_state: dict[str, Tensor], ids: tuple[int, ...], logits: list[int]) -> None:
    categories = Categories(ids, tuple(f"name {i}" for i in ids))
    converted = convert(meta_state, categories=categories)
    assert converted.categories == categories
    assert converted.state_dict["roi_head.class_logits.bias"].tolist() == logits
    assert converted.config["model"]["roi_head"]["background_rows"] == len(logits) - len(ids)


def test_categories_that_do_not_fit(meta_state: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match=r"x\.pth: 90 labels besides background, but 2 categories with ids 3\.\.7"):
        convert(meta_state, categories=Categories((3, 7), ("a", "b")))


def test_norm_eps(meta_state: dict[str, Tensor]) -> None:
    frozen = {k: v for k, v in meta_state.items() if not k.endswith("num_batches_tracked")}
    published = "258fb6c6" + 56 * "0"

    def eps(state_dict: dict[str, Tensor], **options: Any) -> float:
        converted = convert(state_dict, **options)
        value = converted.config["model"]["backbone"]["norm_eps"]
        assert f"norm_eps {value:g}".replace("e-0", "e-") in converted.remarks[1]
        return value

    assert eps(frozen, sha256=published) == 0
    assert eps(frozen, sha256=64 * "0") == 1e-5
    assert eps(frozen, sha256=64 * "0", norm_eps=0) == 0
    assert eps(frozen, sha256=published, norm_eps=1e-3) == 1e-3
    assert eps(meta_state, sha256=published) == 0  # torchvision gives that file frozen norms, whatever it holds
    assert eps(meta_state) == 1e-5
    # torchvision names its files by the start of their hash
    assert importer.SHA256_OF_EPS_0 in detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet152", "resnext50_32x4d", "wide_resnet101_2"])
def test_bodies_of_other_detectors(name: str) -> None:
    with torch.device("meta"):
        model = TorchvisionFasterRCNN(resnet_fpn_backbone(backbone_name=name, weights=None), 3)
    converted = convert(model.state_dict())
    assert converted.config["model"]["backbone"] == {"name": name, "norm": "frozen_bn", "norm_eps": 1e-5}
    assert converted.categories is None
    assert "2 classes of unknown names" in converted.remarks[0]


@pytest.mark.parametrize("name", ["resnet34", "resnext101_64x4d"])
def test_classifier(name: str) -> None:
    with torch.device("meta"):
        state_dict = get_model(name, weights=None).state_dict()
    assert importer.recognises(state_dict)
    converted = convert(state_dict)
    assert converted.kind == "body"
    backbone = {"name": name, "norm": "frozen_bn", "stride_in_1x1": False}
    assert converted.config["model"]["backbone"] == backbone
    assert converted.config["model"]["pixel_std"] == [58.395, 57.12, 57.375]
    assert state_dict.keys() - converted.state_dict.keys() == {"fc.weight", "fc.bias"}
    assert [r.source for r in converted.rows if r.action == "left out"] == ["fc.weight", "fc.bias"]


def test_body_of_msra_in_the_names_of_torchvision() -> None:
    with torch.device("meta"):
        state_dict = get_model("resnet50", weights=None).state_dict()
    stem = torch.randn(64, 3, 7, 7)
    file = WeightFile(state_dict | {"conv1.weight": stem}, {}, Path("resnet50_caffe-788b5fa3.pth"))
    with pytest.raises(InputError, match=r"resnet50_caffe-788b5fa3\.pth: .*give --style"):
        importer.convert(file)
    pytorch, caffe = importer.convert(file, style="pytorch"), importer.convert(file, style="caffe")
    assert torch.equal(pytorch.state_dict["conv1.weight"], stem)
    assert not pytorch.config["model"]["backbone"]["stride_in_1x1"]
    bgr = torch.randn(1, 3, 9, 9)
    ours = conv2d(bgr.flip(1), caffe.state_dict["conv1.weight"])
    torch.testing.assert_close(ours, conv2d(bgr, stem))
    assert caffe.config["model"]["backbone"]["stride_in_1x1"]
    assert caffe.config["model"]["pixel_std"] == [1, 1, 1]
    assert caffe.config["model"]["pixel_mean"] == [123.675, 116.28, 103.53]  # RGB


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("maskrcnn_resnet50_fpn", "a Mask R-CNN"),
        ("maskrcnn_resnet50_fpn_v2", "a Mask R-CNN"),
        ("keypointrcnn_resnet50_fpn", "a Keypoint R-CNN"),
        ("retinanet_resnet50_fpn", "a one-stage detector"),
        ("fcos_resnet50_fpn", "a one-stage detector"),
        ("ssdlite320_mobilenet_v3_large", "a one-stage detector"),
        ("fasterrcnn_mobilenet_v3_large_fpn", "a detector with a MobileNet body"),
        ("mobilenet_v3_small", "a classifier that is not a ResNet"),
        ("vgg11", "a classifier that is not a ResNet"),
    ],
)
def test_other_models_are_refused_by_name(name: str, what: str) -> None:
    options = {} if name in ("mobilenet_v3_small", "vgg11") else {"weights_backbone": None}
    with torch.device("meta"):
        state_dict = get_model(name, weights=None, **options).state_dict()
    assert importer.recognises(state_dict)
    with pytest.raises(InputError, match=rf"x\.pth: this is {what}.*can be imported"):
        convert(state_dict)


def test_other_anchors_are_refused() -> None:
    generator = AnchorGenerator(((32, 64),) * 5, ((0.5, 1.0),) * 5)
    with torch.device("meta"):
        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
        state_dict = TorchvisionFasterRCNN(backbone, 3, rpn_anchor_generator=generator).state_dict()
    with pytest.raises(InputError, match=r"x\.pth: 4 anchors per cell"):
        convert(state_dict)


def test_class_agnostic_boxes_are_refused(meta_state: dict[str, Tensor]) -> None:
    agnostic = {k: v[:4] if "bbox_pred" in k and "roi" in k else v for k, v in meta_state.items()}
    with pytest.raises(InputError, match=r"x\.pth: .*bbox_pred\.bias has 4 rows for 91 labels; expected 4 for each"):
        convert(agnostic)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("roi_heads.box_predictor.cls_score.bias", (), r"cls_score\.bias has the shape \(\); expected a 1-dimensional"),
        ("roi_heads.box_predictor.cls_score.weight", (90, 1024), r"cls_score\.weight has 90 rows for 91 labels"),
        ("roi_heads.box_predictor.bbox_pred.weight", (365, 1024), r"bbox_pred\.weight has 365 rows for 91 labels"),
        ("roi_heads.box_head.fc6.weight", (1024,), r"fcs\.0\.weight has the shape \(1024,\); expected a 2-dimensional"),
        ("backbone.fpn.inner_blocks.0.0.weight", (), r"neck\.lateral\.0\.weight has the shape \(\); expected a 4-dim"),
        ("backbone.body.layer1.0.conv2.weight", (64, 0, 3, 3), r"conv2\.weight has the shape \(64, 0, 3, 3\)"),
    ],
)
def test_misshapen_tensors_are_named(
    meta_state: dict[str, Tensor], name: str, shape: tuple[int, ...], message: str
) -> None:
    assert name in meta_state
    with pytest.raises(InputError, match=rf"x\.pth: .*{message}"):
        convert(meta_state | {name: torch.zeros(shape)})


def test_a_detector_without_a_class_is_refused(meta_state: dict[str, Tensor]) -> None:
    rows = {"cls_score": 1, "bbox_pred": 4}
    one = {k: v[: rows[k.split(".")[2]]] if "roi_heads.box_predictor" in k else v for k, v in meta_state.items()}
    with pytest.raises(InputError, match=r"x\.pth: its one label is the background"):
        convert(one)


def test_remark_that_the_settings_of_detection_are_not_in_the_file(meta_state: dict[str, Tensor]) -> None:
    assert any("no config" in remark for remark in convert(meta_state).remarks)


def test_group_norm_is_refused() -> None:
    with torch.device("meta"):
        backbone = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=lambda channels: nn.GroupNorm(16, channels)
        )
        state_dict = TorchvisionFasterRCNN(backbone, 3).state_dict()
    with pytest.raises(InputError, match="group norm"):
        convert(state_dict)
