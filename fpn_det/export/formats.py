"""The three kinds of file, ONNX, TorchScript and torch.export's: the NMS of each, how it is written and run.

Nothing of this package is in the files, so none needs it.

Dimensions: N images of H x W, D detections per image, M problems of NMS with B boxes each.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, assert_never

import numpy as np
import torch
from torch import Tensor

from fpn_det.export.graph import DetectorGraph
from fpn_det.export.resize import Resize
from fpn_det.extras import require
from fpn_det.models.faster_rcnn import FasterRCNN, ProposalNetwork
from fpn_det.models.nms import largest_float32_up_to
from fpn_det.structures import InputError

Format = Literal["onnx", "torchscript", "torch_export"]

OPSET = 18
"""Version of ONNX's operators: of 2022, so that runtimes of that age read the files."""

OLDEST_TORCH = "2.11"
"""Exporters of before cannot trace what depends on the size of a resized image."""

OUTPUTS = ("boxes", "scores", "labels")

METADATA_FILE = "fpn_det.json"
"""Where the metadata lie in the two kinds of file that are archives."""

GROUP_OFFSET = 2.0**20
"""Pixels between the boxes of two problems of NMS that is solved as one, more than any image has."""

Outputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A detector in a format.

    Attributes:
        run: (N, 3, H, W) uint8 -> boxes (N, D, 4) float32, scores (N, D) float32, labels (N, D) int64, all on the CPU;
            by the format's own runtime, from what will be written.
        runtime: its name and version.
        device: where it runs.
        write: writes the file; metadata are text by name.
    """

    run: Callable[[Tensor], Outputs]
    runtime: str
    device: torch.device
    write: Callable[[BinaryIO, dict[str, str]], None]


def export(format: Format, model: FasterRCNN | ProposalNetwork, resize: Resize) -> Exported:
    """Convert a detector.

    Args:
        format: of the file.
        model: in evaluation mode, in float32; files of torch run on its device, ONNX is exported from the CPU.
        resize: what happens to images before.

    Raises:
        InputError: the packages of the format are not installed, or PyTorch is too old for it.
    """
    if format != "torchscript" and torch.__version__ < OLDEST_TORCH:
        raise InputError(
            f"--format {format} needs PyTorch {OLDEST_TORCH} or later, whose exporter follows images of any size; this "
            f"is {torch.__version__}. Upgrade with pip install -e '.[export]', or use --format torchscript"
        )
    match format:
        case "onnx":
            return to_onnx(model, resize)
        case "torchscript":
            return to_torchscript(model, resize)
        case "torch_export":
            return to_torch_export(model, resize)
        case _:
            assert_never(format)


def to_onnx(model: FasterRCNN | ProposalNetwork, resize: Resize) -> Exported:
    """For ONNX Runtime and what else reads ONNX. NMS is one `NonMaxSuppression` for all levels, one for all classes."""
    onnx, runtime = (require(name, extra="export", purpose="Exporting to ONNX") for name in ("onnx", "onnxruntime"))
    require("onnxscript", extra="export", purpose="Exporting to ONNX")
    with quiet():
        program = torch.onnx.export(
            DetectorGraph(model, resize=resize, suppress=torch.ops.fpn_det.suppress).eval(),
            (example(),),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes={"images": dynamic_shape()},
            input_names=["images"],
            output_names=list(OUTPUTS),
            custom_translation_table={
                torch.ops.fpn_det.suppress.default: onnx_suppress,
                torch.ops.aten.sort.stable: onnx_sort,
            },
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    tidy(proto)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Outputs:
        boxes, scores, labels = session.run(list(OUTPUTS), {"images": images.contiguous().numpy()})
        return torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(labels)

    def write(file: BinaryIO, metadata: dict[str, str]) -> None:
        onnx.helper.set_model_props(proto, metadata)
        onnx.checker.check_model(proto)
        file.write(proto.SerializeToString())

    device = torch.device("cpu")
    return Exported(run=run, runtime=f"ONNX Runtime {runtime.__version__}", device=device, write=write)


def to_torchscript(model: FasterRCNN | ProposalNetwork, resize: Resize) -> Exported:
    """For LibTorch and `torch.jit.load`, with the operators of torchvision."""
    device = model.pixel_mean.device
    with quiet():
        # On a GPU each problem would wait for the device. A loop has to be scripted: tracing would unroll it.
        suppress = torch.jit.script(suppress_each) if device.type == "cpu" else suppress_together
        graph = DetectorGraph(model, resize=resize, suppress=suppress).eval()
        traced = torch.jit.freeze(torch.jit.trace(graph, example().to(device), check_trace=False))
        loaded = reloaded(lambda file: torch.jit.save(traced, file), torch.jit.load)

    def write(file: BinaryIO, metadata: dict[str, str]) -> None:
        with quiet():
            torch.jit.save(traced, file, _extra_files={METADATA_FILE: json.dumps(metadata)})

    runtime = f"TorchScript of torch {torch.__version__}"
    return Exported(run=runner(loaded, device), runtime=runtime, device=device, write=write)


def to_torch_export(model: FasterRCNN | ProposalNetwork, resize: Resize) -> Exported:
    """For `torch.export.load`, with the operators of torchvision, and for torch's compilers."""
    device = model.pixel_mean.device
    with quiet(), torch.no_grad():
        program = torch.export.export(
            DetectorGraph(model, resize=resize, suppress=suppress_together).eval(),
            (example().to(device),),
            dynamic_shapes={"images": dynamic_shape()},
        )
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # with the paths of this package
        loaded = reloaded(lambda file: torch.export.save(program, file), torch.export.load).module()

    def write(file: BinaryIO, metadata: dict[str, str]) -> None:
        with quiet():
            torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})

    runtime = f"torch.export of torch {torch.__version__}"
    return Exported(run=runner(loaded, device), runtime=runtime, device=device, write=write)


def example() -> Tensor:
    """The images that exporters record a run on. No dimension is of a size that could mean something else."""
    return torch.randint(0, 256, (2, 3, 96, 130), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def dynamic_shape() -> dict[int, Any]:
    """Any number of images, of any height and width."""
    return {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}


def reloaded(save: Callable[[BinaryIO], None], load: Callable[[BinaryIO], Any]) -> Any:
    """What comes back of a file, so that the file is what is checked.

    Loaders of torch run what a file holds: they get nothing here but what was made a moment before, in memory.
    """
    file = io.BytesIO()
    save(file)
    file.seek(0)
    return load(file)


def runner(module: Callable[[Tensor], Any], device: torch.device) -> Callable[[Tensor], Outputs]:
    """`Exported.run` of a module of torch."""

    @torch.no_grad()
    def run(images: Tensor) -> Outputs:
        boxes, scores, labels = module(images.to(device))
        return boxes.cpu(), scores.cpu(), labels.cpu()

    return run


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the exporters: about TorchScript's future, and about what tracing might miss, which the
    check of the file sees."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def suppress_each(boxes: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
    """`graph.Suppress`, one problem after the other."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for i in range(scores.shape[0]):
        index = torch.isfinite(scores[i]).nonzero().squeeze(1)
        kept = torch.ops.torchvision.nms(boxes[i, index], scores[i, index], iou_thresh)
        keep[i, index[kept]] = True
    return keep


def suppress_together(boxes: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
    """`graph.Suppress` without a loop: as one problem, whose parts lie far from each other.

    In float64, which keeps the coordinates to 1e-6 pixels there (float32 would to 1/8). The time grows with the square
    of the boxes of all problems.
    """
    problem, place = torch.isfinite(scores).nonzero().unbind(1)
    apart = boxes[problem, place].double() + GROUP_OFFSET * problem[:, None]
    # torch.export asserts that two boxes stay (torchvision's `nms` declares no size, and 2 is the default): two do.
    far = apart.new_tensor([[-3.0, 0, -2, 1], [-6, 0, -5, 1]])
    best_scores = apart.new_full((2,), torch.inf)
    kept = torch.ops.torchvision.nms(
        torch.cat([far, apart]), torch.cat([best_scores, scores[problem, place].double()]), iou_thresh
    )
    kept = kept[2:] - 2
    index = (problem[kept], place[kept])
    return torch.zeros_like(scores, dtype=torch.bool).index_put(index, torch.ones_like(kept, dtype=torch.bool))


@torch.library.custom_op("fpn_det::suppress", mutates_args=())
def _suppress(boxes: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
    """`graph.Suppress` as one operator, which the export to ONNX replaces by `onnx_suppress`."""
    return suppress_each(boxes, scores, iou_thresh)


@_suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def operators() -> Any:
    """ONNX's operators of version `OPSET`, to be called while exporting."""
    return getattr(require("onnxscript", extra="export", purpose="Exporting to ONNX"), f"opset{OPSET}")


def onnx_suppress(boxes: Any, scores: Any, iou_thresh: float) -> Any:
    """`graph.Suppress` in ONNX: one `NonMaxSuppression`, whose batches are the problems."""
    op = operators()
    kept = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, op.Constant(value_ints=[1])),  # of one class
        op.Constant(value_ints=[np.iinfo(np.int64).max]),
        op.Constant(value_floats=[largest_float32_up_to(iou_thresh)]),
        op.Constant(value_floats=[float(np.finfo(np.float32).min)]),  # which -inf does not exceed
    )
    place = op.Gather(kept, op.Constant(value_ints=[0, 2]), axis=1)  # (kept, 2): problem, box
    none = op.Expand(op.Constant(value_int=0), op.Shape(scores))
    ones = op.Expand(op.Constant(value_int=1), op.Shape(place, start=0, end=1))
    return op.Cast(op.ScatterND(none, place, ones), to=9)  # bool


def onnx_sort(values: Any, *, stable: bool, dim: int, descending: bool) -> Any:
    """`values.sort(stable=True, ..)`, which the exporter lacks: ONNX has the first of equals first."""
    op = operators()
    return op.TopK(values, op.Shape(values, start=dim, end=dim + 1), axis=dim, largest=int(descending), sorted=1)


def tidy(proto: Any) -> None:
    """For people who look at the file: names of the dynamic axes, and no traces of where it was made."""
    axes = {
        "images": ("num_images", None, "height", "width"),
        "boxes": ("num_images", None, None),
        "scores": ("num_images", None),
        "labels": ("num_images", None),
    }
    for value in (*proto.graph.input, *proto.graph.output):
        for dim, name in zip(value.type.tensor_type.shape.dim, axes[value.name], strict=True):
            if name is not None:
                dim.dim_param = name
    for part in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.node):
        del part.metadata_props[:]
