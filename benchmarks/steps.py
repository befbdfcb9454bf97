"""One training or inference step of each framework on the same images: what bench.py times.

Every step is the whole one: images and boxes leave (pinned) host memory, losses and gradients are computed, and the
same optimiser moves the weights; its learning rate is so small that they stay where they are. The weights are drawn at
random, made to behave like trained ones (`randomise`), and shared by torchvision and fpn_det. Batch norms are frozen,
the stem and the first stage are not trained, and counts (anchors, proposals, RoIs, detections) are equal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from fpn_det import build
from fpn_det.config import Config, parse_config
from fpn_det.data.loader import collate
from fpn_det.engine.checkpoint import save_checkpoint
from fpn_det.engine.distributed import Process
from fpn_det.engine.optim import RunningStatistics, step_if
from fpn_det.engine.train import Window, gradient_norms, grouped, step_seed, trained_parts
from fpn_det.models.faster_rcnn import DetectionModel
from fpn_det.structures import Batch, Sample
from fpn_det.weights.read import WeightFile
from fpn_det.weights.torchvision import convert

NUM_CLASSES = 80


@dataclass(frozen=True)
class Case:
    """Work that every framework is given.

    Attributes:
        mode: `train`, `predict`, or `loop`: training with images from files (benchmarks/loop.py).
        body: resnet50 or resnet18.
        height, width: of the images, in pixels.
        batch: images per step.
        precision: `fp32`, `tf32` (GPUs only), or `bf16` by autocast, with TF32 for what stays float32.
        num_gt: ground-truth boxes per image.
        num_proposals: per image after NMS, in training and inference.
    """

    mode: str
    body: str
    height: int
    width: int
    batch: int
    precision: str
    num_gt: int = 8
    num_proposals: int = 1000

    @property
    def name(self) -> str:
        """For tables and `--cases`."""
        return f"{self.mode} {self.body} {self.height}x{self.width} batch {self.batch} {self.precision}"


@dataclass
class Runner:
    """A framework at work on a case.

    Attributes:
        model: in training or evaluation mode, on the device.
        optimizer: of a training case.
        run: does so many steps.
        data_wait: share of the time of the last `run` that it waited for data, where it reads files.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    run: Callable[[int], None]
    data_wait: float | None = None

    def static_bytes(self) -> int:
        """Parameters, buffers and the optimiser's state."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if self.optimizer is not None:
            tensors += [v for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        return sum(t.numel() * t.element_size() for t in tensors)


def config_of(case: Case, overrides: Sequence[str] = ()) -> Config:
    """Our config of a case: the defaults but for what the case states."""
    values = {
        "model.backbone.name": case.body,
        "model.rpn.post_nms_top_k_train": case.num_proposals,
        "model.rpn.post_nms_top_k_test": case.num_proposals,
        "train.precision": "bf16" if case.precision == "bf16" else "fp32",
        "runtime.tf32": str(allows_tf32(case)).lower(),
        "optim.lr": "1e-12",
    }
    stated = [f"{key}={value}" for key, value in values.items()]
    return parse_config("name: bench", source="bench", overrides=[*stated, *overrides])


def allows_tf32(case: Case) -> bool:
    """Whether GPUs may compute in TF32 what is float32: the same for all contenders of a case."""
    return case.precision != "fp32"


def make_batch(case: Case) -> Batch:
    """Smooth random images with boxes of 16 pixels to the whole image, evenly over the octaves."""
    dice = torch.Generator().manual_seed(0)
    samples = []
    for i in range(case.batch):
        coarse = torch.rand(1, 3, case.height // 16 + 1, case.width // 16 + 1, generator=dice)
        image = nn.functional.interpolate(255 * coarse, size=(case.height, case.width), mode="bilinear")[0]
        frame = torch.tensor([case.width, case.height])
        sides = 16 * (frame / 16) ** torch.rand(case.num_gt, 2, generator=dice)
        corner = torch.rand(case.num_gt, 2, generator=dice) * (frame - sides)
        labels = torch.randint(NUM_CLASSES, (case.num_gt,), generator=dice)
        samples.append(
            Sample(
                image=image.to(torch.uint8),
                boxes=torch.cat([corner, corner + sides], dim=1),
                labels=labels,
                image_id=i,
                original_size=(case.height, case.width),
            )
        )
    return collate(samples)


def autocast(case: Case, device: torch.device) -> torch.autocast:
    """For one forward pass: on leaving it, autocast forgets the copies of the weights that it made."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=case.precision == "bf16")


# --- fpn_det ---


def ours(case: Case, device: torch.device, *, overrides: Sequence[str] = (), triton: bool = False) -> Runner:
    """Ours, with the step of `fpn_det.engine.train.train`; `triton` switches `fpn_det.kernels` on."""
    config = config_of(case, overrides)
    model = our_model(config, case, device)
    batch = pinned(make_batch(case), device)
    if case.mode == "predict":
        runner = predicting(model, lambda: model.predict(batch.to(device, non_blocking=True)), case, device)
        return replace(runner, run=with_kernels(runner.run)) if triton else runner
    optimizer = build.build_optimizer(config, model)
    parts, statistics = trained_parts(model), RunningStatistics(model)
    window = Window(["total", *parts])
    scale = torch.ones((), device=device)

    def step() -> None:
        torch.manual_seed(step_seed(0, 0, 0))
        optimizer.zero_grad()
        statistics.keep()
        with autocast(case, device):
            losses, stats = model(batch.to(device, non_blocking=True))
            loss = torch.stack(list(losses.values())).sum()
        (loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)).backward()
        window.add(batch, grouped(loss, losses, stats))
        part_norms = gradient_norms(parts, device)
        grad_norm = part_norms.norm()
        finite = grad_norm.isfinite()
        step_if(finite, optimizer)
        statistics.restore_unless(finite)
        window.end_step(0, lr=0.0, norms=torch.cat([grad_norm[None], part_norms]), finite=finite, loss_scale=scale)
        if len(window) == 20:  # as often as a run makes a log record
            window.close(Process(device=device))

    return Runner(model, optimizer, with_kernels(repeated(step)) if triton else repeated(step))


def with_kernels(run: Callable[[int], None]) -> Callable[[int], None]:
    """`run` with the kernels of Triton."""

    def kernels_on(steps: int) -> None:
        with patch.dict(os.environ, FPN_DET_TRITON="1"):
            run(steps)

    return kernels_on


def our_model(config: Config, case: Case, device: torch.device) -> DetectionModel:
    """Our detector with the shared weights: as training builds it, or as inference reads it from a checkpoint."""
    state_dict = convert(WeightFile(weights(case.body), {}, Path("torchvision"))).state_dict
    if case.mode == "predict":
        categories = [{"index": i, "id": i, "name": str(i)} for i in range(NUM_CLASSES)]
        with TemporaryDirectory() as folder:
            path = Path(folder, "model.pth")
            save_checkpoint(path, {"model": state_dict, "categories": categories, "config": "", "step": 0})
            return build.load_detector(config, path, device)[0]
    model = build.build_model(config, NUM_CLASSES, pretrained=False)
    model.load_state_dict(state_dict)
    return build.place(config, model, device).train()


# --- torchvision ---


def torchvision(case: Case, device: torch.device, *, channels_last: bool = False, compiled: bool = False) -> Runner:
    """torchvision's detector, with the step of its reference scripts.

    Args:
        case: the work.
        device: where.
        channels_last: memory format of the weights, which the features then follow.
        compiled: whether `torch.compile` is applied to body and FPN.
    """
    model = torchvision_model(case)
    model.transform.resize = lambda image, target=None: (image, target)  # they have their size
    to_device(model, device, channels_last=channels_last, compiled=compiled)
    batch = make_batch(case)
    images = [pinned(image / 255, device) for image in batch.images[:, :, : case.height, : case.width]]
    targets = [
        {"boxes": pinned(boxes, device), "labels": pinned(labels + 1, device)}
        for boxes, labels in zip(batch.targets.boxes, batch.targets.labels, strict=True)
    ]
    if case.mode == "predict":
        return predicting(model, lambda: model(moved(images, device)), case, device)
    return training(model, lambda: model(moved(images, device), moved(targets, device)), case, device)


def torchvision_model(case: Case, **sizes: int) -> FasterRCNN:
    """Their Faster R-CNN at our counts, with the shared weights; `sizes` are those it resizes to."""
    model = FasterRCNN(
        resnet_fpn_backbone(backbone_name=case.body, weights=None, trainable_layers=3),
        num_classes=NUM_CLASSES + 1,
        rpn_post_nms_top_n_train=case.num_proposals,
        rpn_post_nms_top_n_test=case.num_proposals,
        **sizes,
    )
    model.load_state_dict(weights(case.body))
    return model


def to_device(model: FasterRCNN, device: torch.device, *, channels_last: bool, compiled: bool) -> None:
    """Move the model, and set its layout and compilation."""
    model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if compiled:
        model.backbone = torch.compile(model.backbone)


# --- Detectron2 ---


def detectron2(case: Case, device: torch.device) -> Runner:
    """Detectron2's detector by its model zoo's config, with the step of its `SimpleTrainer`."""
    from detectron2 import model_zoo
    from detectron2.config import get_cfg
    from detectron2.layers import FrozenBatchNorm2d
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = str(device), ""
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = int(case.body.removeprefix("resnet")), False
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if cfg.MODEL.RESNETS.DEPTH < 50 else 256
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = case.num_proposals
    torch.manual_seed(0)
    model = build_model(cfg)
    batch = make_batch(case)
    size = (case.height, case.width)
    records = [
        {
            "image": pinned(image[:, : size[0], : size[1]].contiguous(), device),
            "instances": Instances(size, gt_boxes=Boxes(boxes), gt_classes=labels),
            "height": size[0],
            "width": size[1],
        }
        for image, boxes, labels in zip(batch.images, batch.targets.boxes, batch.targets.labels, strict=True)
    ]
    randomise(model, FrozenBatchNorm2d, background=NUM_CLASSES, look=lambda: model(records[:1]))

    def losses() -> dict[str, Tensor]:
        with EventStorage():  # which it insists on
            return dict(model(records))

    if case.mode == "predict":
        return predicting(model, lambda: model(records), case, device)
    return training(model, losses, case, device)


# --- what they share ---


def training(model: nn.Module, losses: Callable[[], dict[str, Tensor]], case: Case, device: torch.device) -> Runner:
    """The training step of the reference scripts of torchvision and Detectron2, without their logging."""
    optimizer = build.build_optimizer(config_of(case), model.train())

    def step() -> None:
        with autocast(case, device):
            loss = torch.stack(list(losses().values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Runner(model, optimizer, repeated(step))


def predicting(model: nn.Module, predict: Callable[[], object], case: Case, device: torch.device) -> Runner:
    """Inference, up to detections on the device."""
    model.eval()

    @torch.no_grad()
    def step() -> None:
        with autocast(case, device):
            predict()

    return Runner(model, None, repeated(step))


def repeated(step: Callable[[], object]) -> Callable[[int], None]:
    """`step` so many times."""

    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return run


def pinned(value: Any, device: torch.device) -> Any:
    """A tensor or batch in page-locked memory if it will go to a GPU."""
    return value.pin_memory() if device.type == "cuda" else value


def moved(value: Any, device: torch.device) -> Any:
    """Tensors in lists and dicts, on `device`."""
    return tree_map(lambda tensor: tensor.to(device, non_blocking=True), value)


@cache
def weights(body: str) -> dict[str, Tensor]:
    """torchvision's detector with random weights that behave like trained ones."""
    torch.manual_seed(0)
    case = Case("predict", body, 256, 320, 1, "fp32")
    model = FasterRCNN(resnet_fpn_backbone(backbone_name=body, weights=None), num_classes=NUM_CLASSES + 1)
    image = make_batch(case).images[0] / 255
    norm = type(model.backbone.body.bn1)
    randomise(model, norm, background=0, look=lambda: model([image]))
    return model.state_dict()


@torch.no_grad()
def randomise(model: nn.Module, norm: type[nn.Module], *, background: int, look: Callable[[], object]) -> None:
    """Weights under which features keep their scale, proposals differ from anchors and some hundred boxes compete.

    The statistics of the frozen norms, and the scale of the last layers, are set from one image.

    Args:
        model: a detector of torchvision or Detectron2.
        norm: class of its frozen batch norms.
        background: row of the classifier.
        look: runs the model on an image.
    """
    model.eval()
    spread = {"cls_logits": 2.0, "objectness_logits": 2.0, "bbox_pred": 0.15, "anchor_deltas": 0.15, "cls_score": 1.0}
    handles: dict[nn.Module, RemovableHandle] = {}

    def set_statistics(module: Any, args: tuple[Tensor]) -> None:
        module.running_mean.copy_(args[0].mean(dim=(0, 2, 3)))
        module.running_var.copy_(args[0].var(dim=(0, 2, 3)) + 1e-3)

    def set_scale(module: Any, args: tuple[Tensor], output: Tensor, *, name: str) -> Tensor:
        handles[module].remove()  # the RPN's head sees all levels, of which the first is the largest
        channels = output.movedim(1, 0).flatten(1)
        scale = spread[name] / channels.std(dim=1).mean()
        module.weight *= scale
        module.bias.copy_((module.bias - channels.mean(dim=1)) * scale)
        if name == "cls_score":
            module.bias[background] += 5.0  # exp(5) against 80 classes: about 0.4% of the scores exceed 0.05
        return torch.as_tensor(module.forward(*args))

    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, norm):
            handles[module] = module.register_forward_pre_hook(set_statistics)
        elif name in spread:
            handles[module] = module.register_forward_hook(partial(set_scale, name=name))
    look()
    for handle in handles.values():
        handle.remove()
