"""Import weights of torchvision, Detectron2 or MMDetection.

    python tools/import_weights.py SRC DST [--from auto|torchvision|detectron2|mmdetection] [--categories COCO.json]
        [--style auto|caffe|pytorch] [--norm-eps E] [--overwrite]

A detector becomes a checkpoint of ours, DST (the suffix .pth is added if it lacks), and DST.yaml (its suffix replaced),
the config under which it gives the boxes of the framework that it came from: use them with tools/eval.py and
tools/predict.py. An ImageNet classifier becomes weights for `model.backbone.weights`, and DST.yaml trains on them.

Prints what became of every tensor of SRC; a tensor that is unknown, missing or of another shape is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fpn_det.build import build_backbone, build_model
from fpn_det.cli import say, user_errors
from fpn_det.config import Config, dump_config, dump_yaml, parse_config
from fpn_det.data.coco import read_categories
from fpn_det.engine.checkpoint import save_checkpoint
from fpn_det.structures import Categories, InputError, printable
from fpn_det.weights import detectron2, mmdetection, torchvision
from fpn_det.weights.architecture import ARCHITECTURES
from fpn_det.weights.coco_classes import COCO_CATEGORIES
from fpn_det.weights.read import WeightFile, read_weights
from fpn_det.weights.rename import Converted, format_rows

FRAMEWORKS: dict[str, ModuleType] = {"torchvision": torchvision, "detectron2": detectron2, "mmdetection": mmdetection}


def main() -> None:
    """Read the command line and import."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", type=Path, help="file of weights (.pth, .pkl, .pt, .tar)")
    parser.add_argument("destination", metavar="DST", type=Path, help="checkpoint to write; DST.yaml lies beside it")
    parser.add_argument("--from", dest="framework", choices=["auto", *FRAMEWORKS], default="auto")
    parser.add_argument(
        "--categories", type=Path, help="COCO-format file of the data set that the model was trained on"
    )
    parser.add_argument(
        "--style",
        choices=["auto", "caffe", "pytorch"],
        default="auto",
        help="of Detectron2's and MMDetection's bodies: caffe (BGR, std 1, stride in the 1x1) or pytorch (RGB, 3x3)",
    )
    parser.add_argument(
        "--norm-eps",
        type=float,
        help="of torchvision's detectors: 0 if the model is fine-tuned from torchvision's COCO_V1 weights; by default "
        "0 for those weights themselves and 1e-5 for all others",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST and DST.yaml")
    args = parser.parse_args()
    with user_errors():
        import_weights(**vars(args))


def import_weights(
    source: Path,
    destination: Path,
    *,
    framework: str,
    categories: Path | None,
    style: str,
    norm_eps: float | None,
    overwrite: bool,
) -> None:
    """Read, convert, check against the model, write the pair of files, and report."""
    if destination.is_dir():
        raise InputError(f"{destination}: is a folder; give the path of the checkpoint to write")
    checkpoint = destination if destination.suffix == ".pth" else destination.with_name(f"{destination.name}.pth")
    config_path = checkpoint.with_suffix(".yaml")
    for path in (checkpoint, config_path):
        if path.exists() and (not overwrite or path.samefile(source)):
            raise InputError(f"{path} exists; give another DST" + ("" if overwrite else ", or --overwrite"))

    if norm_eps is not None and not norm_eps >= 0:
        raise InputError(f"--norm-eps {norm_eps:g}: must not be negative")

    file = read_weights(source)
    if {"categories", "config", "step"} <= file.meta.keys():
        raise InputError(f"{source}: is already a checkpoint of fpn_det; use it as it is, with --checkpoint")
    with source.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if framework == "auto":
        framework = recognise(file)
    given = read_categories(categories) if categories else None
    converted = convert(file, framework, sha256=sha256, categories=given, style=style, norm_eps=norm_eps)
    if converted.kind == "body" and (given is not None or norm_eps is not None):
        raise InputError(f"{source}: an ImageNet classifier, to which --categories and --norm-eps do not apply")

    body = converted.config["model"]["backbone"]["name"]
    if style == "caffe" and not ARCHITECTURES[body][0]:
        raise InputError(
            f"{source}: --style caffe has the stride in the first 1x1 convolution of a block, and {body} has none; "
            "give --style pytorch"
        )

    header = [f"Imported from {framework}: {source.name}", f"sha256 {sha256}", shlex.join(["python", *sys.argv])]
    comments = [printable(line) for line in (*header, *converted.remarks)]  # a line break would end a comment
    values = with_body_weights(converted.config, checkpoint)
    text = "".join(f"# {line}\n" for line in comments) + dump_yaml(values)
    config = parse_config(text, source=f"the config derived from {source}", name=config_path.stem)
    check_values(converted.state_dict, source)
    state: dict[str, Any]
    if converted.kind == "body":
        check_body(config, converted.state_dict, source)
        state = converted.state_dict
    else:
        state = detector_checkpoint(config, converted, given, source)

    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoint, state)
    config_path.write_text(text, encoding="utf-8")
    say(format_rows(converted.rows))
    say("\n".join([f"\n{comments[0]}, {len(converted.rows)} tensors", *comments[len(header) :]]))
    say(f"written: {checkpoint}, {config_path}. Next:")
    pair = f"--config {shlex.quote(str(config_path))}"
    if converted.kind == "body":
        say(f"  python tools/train.py {pair}")
    else:
        pair += f" --checkpoint {shlex.quote(str(checkpoint))}"
        say(f"  python tools/eval.py {pair}\n  python tools/predict.py {pair} --input IMAGE|FOLDER --output FOLDER")


def recognise(file: WeightFile) -> str:
    """The framework whose names the tensors have.

    Raises:
        InputError: none, or more than one.
    """
    found = [name for name, framework in FRAMEWORKS.items() if framework.recognises(file.tensors)]
    if len(found) == 1:
        return found[0]
    examples = ", ".join(list(file.tensors)[:6])
    what = f"may be of {' or '.join(found)}" if found else f"are of none of {', '.join(FRAMEWORKS)}"
    raise InputError(f"{file.path}: by their names the tensors {what} ({examples}, ...); give --from")


def convert(
    file: WeightFile,
    framework: str,
    *,
    sha256: str,
    categories: Categories | None,
    style: Any,
    norm_eps: float | None,
) -> Converted:
    """Call the converter of the framework; options that it does not have are refused."""
    if framework == "torchvision":
        return torchvision.convert(file, style=style, sha256=sha256, norm_eps=norm_eps, categories=categories)
    if norm_eps is not None:
        raise InputError(f"--norm-eps {norm_eps:g}: only torchvision's detectors leave it open; leave it out")
    if framework == "detectron2":
        return detectron2.convert(file, style=style)
    return mmdetection.convert(file, style=style)


def with_body_weights(values: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The config with `model.backbone.weights` naming what was imported: training on it starts from that body.

    Torchvision's ImageNet weights, the default, would not fit the conventions of every imported model.
    """
    model = values["model"]
    return values | {"model": model | {"backbone": model["backbone"] | {"weights": str(checkpoint)}}}


def check_values(state_dict: Mapping[str, Tensor], source: Path) -> None:
    """Refuse weights that are not finite floating-point numbers, or not in single precision."""
    problems = []
    for key, value in state_dict.items():
        if key.endswith("num_batches_tracked"):
            continue
        if not value.is_floating_point():
            problems.append(f"{key} is of {value.dtype}")
        elif not torch.isfinite(value.float()).all():
            problems.append(f"{key} has values that are not finite")
    if problems:
        raise InputError(
            f"{source}: {len(problems)} tensors are not of finite floating-point numbers (our names): "
            f"{'; '.join(problems[:20])}. Import weights as they were trained"
        )


def check_body(config: Config, state_dict: dict[str, Tensor], source: Path) -> None:
    """Refuse tensors that do not fit the body of the config exactly."""
    try:
        build_backbone(config).load_classifier(state_dict)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error


def detector_checkpoint(
    config: Config, converted: Converted, categories: Categories | None, source: Path
) -> dict[str, Any]:
    """The state to save, from a model that took over every tensor."""
    class_bias = converted.state_dict.get("roi_head.class_logits.bias")
    if class_bias is not None:
        num_classes = len(class_bias) - config.model.roi_head.background_rows
        generic = Categories(tuple(range(1, num_classes + 1)), tuple(f"class_{i + 1}" for i in range(num_classes)))
    else:  # proposals have no class, but evaluation compares the categories with those of the data
        generic = COCO_CATEGORIES
        num_classes = len(categories or converted.categories or generic)
    categories = categories or converted.categories or generic
    if len(categories) != num_classes:
        raise InputError(
            f"{source}: the model has {num_classes} classes, the given categories are {len(categories)} "
            f"({', '.join(map(printable, categories.names[:8]))}). Give --categories with the file that it was trained "
            "on"
        )
    model = build_model(config, num_classes, pretrained=False)
    load_exactly(model, converted.state_dict, source)
    # The model's own tensors: in its number format, and without the rest of what the file's were cut from.
    return {
        "model": model.state_dict(),
        "categories": categories.state_dict(),
        "config": dump_config(config),
        "step": 0,
    }


def load_exactly(model: nn.Module, state_dict: Mapping[str, Tensor], source: Path) -> None:
    """Load tensors of the same names and shapes.

    Raises:
        InputError: naming all that do not fit.
    """
    own = model.state_dict()
    problems = [f"{k} {tuple(v.shape)} is missing" for k, v in own.items() if k not in state_dict]
    for key, value in state_dict.items():
        if key not in own:
            problems.append(f"{key} {tuple(value.shape)} has no place in the model")
        elif own[key].shape != value.shape:
            problems.append(f"{key} is {tuple(value.shape)}, the model has {tuple(own[key].shape)}")
    if problems:
        raise InputError(
            f"{source}: {len(problems)} tensors do not make up the model that their names and shapes announce "
            f"(our names): {'; '.join(problems)}. Is the file complete?"
        )
    model.load_state_dict(dict(state_dict))


if __name__ == "__main__":
    main()
