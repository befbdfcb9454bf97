"""Inference of Detectron2 and MMDetection, written from their sources, on tensors in their own names; one image.

It shares nothing with the package. Where the two differ there is a field of `Source`.

Dimensions: R boxes, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, roi_align

Tensors = dict[str, Tensor]


@dataclass
class Source:
    """A model of the source framework.

    Attributes:
        tensors: its state dict.
        conv: name of a convolution of the body by stage 1..4, block, conv1..conv3 or shortcut; (0, 0, "") is the stem.
        norm: name of its norm.
        lateral, output: names of the FPN's convolutions of level 2..5.
        rpn, head: names of the RPN's (3x3, logits, deltas) and of the head's (layers.., logits, deltas).
        mean, std, bgr, stride_in_1x1, groups: how the body takes an image.
        two_sided: whether dw, dh are clamped on both sides (MMDetection).
    """

    tensors: Tensors
    conv: Callable[[int, int, str], str]
    norm: Callable[[int, int, str], str]
    lateral: Callable[[int], str]
    output: Callable[[int], str]
    rpn: tuple[str, str, str]
    head: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool
    stride_in_1x1: bool
    groups: int = 1
    two_sided: bool = False
    blocks: tuple[int, ...] = (3, 4, 6, 3)

    # --- layers ---

    def apply(self, name: str, x: Tensor, **options: int) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        return F.linear(x, weight, bias) if weight.ndim == 2 else F.conv2d(x, weight, bias, **options)

    def conv_norm(self, stage: int, block: int, part: str, x: Tensor, **options: int) -> Tensor:
        """d2 FrozenBatchNorm2d, mm BatchNorm2d in evaluation mode: eps 1e-5."""
        x = F.conv2d(x, self.tensors[f"{self.conv(stage, block, part)}.weight"], **options)
        name = self.norm(stage, block, part)
        w, b, mean, var = (self.tensors[f"{name}.{k}"] for k in ("weight", "bias", "running_mean", "running_var"))
        scale = w * (var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (b - mean * scale)[:, None, None]

    def body(self, x: Tensor) -> list[Tensor]:
        x = self.conv_norm(0, 0, "", x, stride=2, padding=3).relu()
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for stage, blocks in enumerate(self.blocks, start=1):
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                first, second = (stride, 1) if self.stride_in_1x1 else (1, stride)
                y = self.conv_norm(stage, block, "conv1", x, stride=first).relu()
                y = self.conv_norm(stage, block, "conv2", y, stride=second, padding=1, groups=self.groups).relu()
                y = self.conv_norm(stage, block, "conv3", y)
                x = (y + (self.conv_norm(stage, block, "shortcut", x, stride=stride) if block == 0 else x)).relu()
            features.append(x)
        return features

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """(3, h, w) RGB as it comes out of the resize -> P2..P6."""
        image = image.float().flip(0) if self.bgr else image.float()
        image = (image - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]
        h, w = image.shape[1:]
        features = self.body(F.pad(image, (0, -w % 32, 0, -h % 32))[None])
        levels: list[Tensor] = []
        previous = None
        for i in (5, 4, 3, 2):
            lateral = self.apply(self.lateral(i), features[i - 2])
            previous = (
                lateral if previous is None else lateral + F.interpolate(previous, scale_factor=2, mode="nearest")
            )
            levels.insert(0, self.apply(self.output(i), previous, padding=1))
        return [*levels, F.max_pool2d(levels[-1], 1, 2, 0)]

    # --- boxes ---

    def decode(self, boxes: Tensor, deltas: Tensor, weights: tuple[float, ...]) -> Tensor:
        """(R, 4), (R, K * 4) -> (R, K, 4)."""
        limit = math.log(1000 / 16)
        dx, dy, dw, dh = (deltas.reshape(len(boxes), -1, 4) / torch.tensor(weights)).unbind(-1)
        dw, dh = (d.clamp(min=-limit if self.two_sided else None, max=limit) for d in (dw, dh))
        w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        x, y = boxes[:, 0] + 0.5 * w, boxes[:, 1] + 0.5 * h
        x, y = dx * w[:, None] + x[:, None], dy * h[:, None] + y[:, None]
        w, h = dw.exp() * w[:, None], dh.exp() * h[:, None]
        return torch.stack([x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h], dim=-1)

    def rpn_outputs(self, levels: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per level: anchors (A, 4), logits (A,), deltas (A, 4), in the order (row, column, anchor)."""
        found = []
        for i, x in enumerate(levels):
            hidden = self.apply(self.rpn[0], x, padding=1).relu()
            logits = self.apply(self.rpn[1], hidden)[0].permute(1, 2, 0).flatten()
            deltas = self.apply(self.rpn[2], hidden)[0].permute(1, 2, 0).reshape(-1, 4)
            stride, size = 4 * 2**i, 32 * 2**i
            cell = []
            for ratio in (0.5, 1.0, 2.0):
                w = math.sqrt(size * size / ratio)
                cell.append([-w / 2, -ratio * w / 2, w / 2, ratio * w / 2])
            rows, columns = (torch.arange(n) * float(stride) for n in x.shape[-2:])
            ys, xs = torch.meshgrid(rows, columns, indexing="ij")
            shifts = torch.stack([xs, ys, xs, ys], dim=-1)
            found.append(((shifts[:, :, None] + torch.tensor(cell)).reshape(-1, 4), logits, deltas))
        return found

    def proposals(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """d2 find_top_rpn_proposals with 1000 and 1000."""
        boxes, scores, ids = [], [], []
        for i, (anchors, logits, deltas) in enumerate(self.rpn_outputs(levels)):
            top, index = logits.topk(min(1000, len(logits)))
            boxes.append(self.decode(anchors, deltas, (1, 1, 1, 1))[index, 0])
            scores.append(top)
            ids.append(torch.full_like(index, i))
        all_boxes, all_scores, all_ids = clip(torch.cat(boxes), size), torch.cat(scores), torch.cat(ids)
        keep = nonempty(all_boxes)
        all_boxes, all_scores, all_ids = all_boxes[keep], all_scores[keep], all_ids[keep]
        return all_boxes[batched_nms(all_boxes, all_scores, all_ids, 0.7)[:1000]]

    def pooled(self, levels: list[Tensor], boxes: Tensor) -> Tensor:
        size = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        if self.two_sided:  # mm SingleRoIExtractor.map_roi_levels
            index = torch.floor(torch.log2(size / 56 + 1e-6)).clamp(0, 3)
        else:  # d2 assign_boxes_to_levels
            index = torch.floor(4 + torch.log2(size / 224 + 1e-8)).clamp(2, 5) - 2
        pooled = torch.zeros(len(boxes), levels[0].shape[1], 7, 7)
        for i in range(4):
            on = (index == i).nonzero()[:, 0]
            pooled[on] = roi_align(levels[i], [boxes[on]], 7, 1 / (4 * 2**i), 0, aligned=True)
        return pooled

    def head_outputs(self, levels: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1) and deltas (R, K * 4)."""
        x = self.pooled(levels, boxes).flatten(1)
        for name in self.head[:-2]:
            x = self.apply(name, x).relu()
        return self.apply(self.head[-2], x), self.apply(self.head[-1], x)

    def detect(self, image: Tensor, original: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (D, 4) in the frame of the original image of size (h, w), scores and labels; d2 fast_rcnn_inference."""
        levels = self.pyramid(image)
        size = (image.shape[1], image.shape[2])
        boxes = self.proposals(levels, size)
        logits, deltas = self.head_outputs(levels, boxes)
        scores = logits.softmax(dim=1)[:, :-1]
        decoded = clip(self.decode(boxes, deltas, (10, 10, 5, 5)), size).expand(-1, scores.shape[1], 4)
        scale = torch.tensor([original[1] / size[1], original[0] / size[0]] * 2)
        if self.two_sided:
            decoded = decoded * scale  # mm rescales before NMS
        r, k = (scores > 0.05).nonzero(as_tuple=True)
        decoded, scores = decoded[r, k], scores[r, k]
        keep = batched_nms(decoded, scores, k, 0.5)[:100]
        decoded, scores, k = decoded[keep], scores[keep], k[keep]
        if not self.two_sided:
            decoded = clip(decoded * scale, original)  # d2 detector_postprocess
            keep = nonempty(decoded)
            decoded, scores, k = decoded[keep], scores[keep], k[keep]
        return decoded, scores, k


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.stack([boxes[..., i].clamp(0, size[1 - i % 2]) for i in range(4)], dim=-1)


def nonempty(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


# --- Random weights of which every layer says something ---


def random_body(source: Source, *, width: int = 64, per_group: int | None = None, statistics: bool = True) -> None:
    """Fill in the body's tensors; residual branches are as small as in trained networks, which keeps rounding small."""

    def add(stage: int, block: int, part: str, out: int, fan: tuple[int, int, int], gain: float = 1.0) -> None:
        weight = torch.randn(out, *fan) * math.sqrt(2 / math.prod(fan))
        source.tensors[f"{source.conv(stage, block, part)}.weight"] = weight
        name = source.norm(stage, block, part)
        source.tensors[f"{name}.weight"] = torch.empty(out).uniform_(0.7, 1.0) * gain
        source.tensors[f"{name}.bias"] = torch.randn(out) * 0.1
        if statistics:
            source.tensors[f"{name}.running_mean"] = torch.randn(out) * 0.1
            source.tensors[f"{name}.running_var"] = torch.empty(out).uniform_(0.7, 1.4)

    add(0, 0, "", 64, (3, 7, 7), gain=1 if source.std[0] > 2 else 1 / 60)
    channels = 64
    for stage, blocks in enumerate(source.blocks, start=1):
        inner, out = width * 2 ** (stage - 1), 256 * 2 ** (stage - 1)
        for block in range(blocks):
            add(stage, block, "conv1", inner, (channels, 1, 1))
            add(stage, block, "conv2", inner, (inner // source.groups, 3, 3))
            add(stage, block, "conv3", out, (inner, 1, 1), gain=0.3)
            if block == 0:
                add(stage, block, "shortcut", out, (channels, 1, 1), gain=0.7)
            channels = out


def random_rest(source: Source, image: Tensor, *, channels: int, fc_dim: int, num_classes: int) -> None:
    """Fill in FPN, RPN and head, scaled on an image so that hundreds of boxes compete."""
    for i in range(2, 6):
        add_layer(source, source.lateral(i), channels, (256 * 2 ** (i - 2), 1, 1))
        add_layer(source, source.output(i), channels, (channels, 3, 3))
    levels = source.pyramid(image)
    for i in range(2, 6):
        source.tensors[f"{source.output(i)}.weight"] /= levels[i - 2].std()
    add_layer(source, source.rpn[0], channels, (channels, 3, 3))
    add_layer(source, source.rpn[1], 3, (channels, 1, 1))
    add_layer(source, source.rpn[2], 12, (channels, 1, 1))
    levels = source.pyramid(image)
    found = source.rpn_outputs(levels)
    rescale(source, source.rpn[1], torch.cat([logits for _, logits, _ in found]).reshape(-1, 3), std=2.0)
    rescale(source, source.rpn[2], torch.cat([deltas for *_, deltas in found]).reshape(-1, 12), std=0.15)
    inputs = channels * 49
    for name in source.head[:-2]:
        add_layer(source, name, fc_dim, (inputs,))
        inputs = fc_dim
    add_layer(source, source.head[-2], num_classes + 1, (inputs,))
    add_layer(source, source.head[-1], num_classes * 4, (inputs,))
    boxes = source.proposals(levels, (image.shape[1], image.shape[2]))
    rescale(source, source.head[-2], source.head_outputs(levels, boxes)[0], std=2.0)
    rescale(source, source.head[-1], source.head_outputs(levels, boxes)[1], std=0.5)


def add_layer(source: Source, name: str, out: int, fan: tuple[int, ...]) -> None:
    source.tensors[f"{name}.weight"] = torch.randn(out, *fan) * math.sqrt(2 / math.prod(fan))
    source.tensors[f"{name}.bias"] = torch.randn(out) * 0.05


def rescale(source: Source, name: str, outputs: Tensor, *, std: float) -> None:
    """Let a layer that gives `outputs` (many, out) give such of mean 0 and deviation `std`."""
    scale = std / outputs.std(dim=0)
    weight = source.tensors[f"{name}.weight"]
    weight *= scale.reshape(-1, *[1] * (weight.ndim - 1))
    source.tensors[f"{name}.bias"] = (source.tensors[f"{name}.bias"] - outputs.mean(dim=0)) * scale
