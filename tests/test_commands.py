"""Every command that the documents show is run, in a folder where the files that it names exist.

Trainings are made small by overrides that are added to those of the command; before that, the config is read exactly as
the command has it. `torchrun` starts two processes whatever the number shown. What cannot be run is in `NOT_RUN`.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor
from torch.distributed.run import get_args_parser
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d

from fpn_det.config import load_config
from fpn_det.data.formats.records import read_records, split_records
from fpn_det.data.shapes import generate
from fpn_det.structures import InputError
from fpn_det.weights.coco_classes import COCO_CATEGORIES

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "NOTES.md", "data/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = ("python", "torchrun", "make", "tensorboard", "pip", "sbatch", "git")

NOT_RUN = {
    "git clone": "needs a network",
    "python -m venv": "each run of CI does it",
    "python -m pytest": "is what runs this",
    "python benchmarks/": "takes minutes to an hour; tests/test_benchmarks.py has their parts",
    "sbatch": "tests/soak/test_processes.py::test_the_slurm_script runs it",
    "python tools/download_coco.py": "needs a network; tests/test_tools_download_coco.py runs it with a server",
    "make test": "is what runs this",
    "make soak": "takes half an hour",
    "make test-cuda": "needs a GPU",
    "make lint": "each run of CI does it",
}

FC_DIM = "model.roi_head.box_head.fc_dim"
SMALL_MODEL = {
    "model.backbone.name": "resnet18",
    "model.backbone.weights": "none",
    "model.backbone.norm": "bn",
    "model.backbone.frozen_stages": 0,
    "model.neck.channels": 16,
    "model.rpn.pre_nms_top_k_train": 50,
    "model.rpn.post_nms_top_k_train": 50,
    "model.rpn.pre_nms_top_k_test": 50,
    "model.rpn.post_nms_top_k_test": 50,
    "model.roi_head.num_samples": 32,
    FC_DIM: 32,
}
SMALL_RUN = {
    "data.short_sides": "[64]",
    "data.test_short_side": 64,
    "data.long_side": 64,
    "data.num_workers": 0,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.accumulate": 1,
    "eval.batch_size": 8,
}


def commands() -> Iterator[tuple[str, str]]:
    """Where a command stands, and the command."""
    for path in DOCUMENTS:
        where = str(path.relative_to(ROOT))
        text = path.read_text(encoding="utf-8")
        fence = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
        for language, block in fence.findall(text):
            if language in ("", "bash", "sh"):
                yield from ((where, line) for line in lines_of(block))
        for span in re.findall(r"`([^`\n]+)`", fence.sub("", text)):
            if re.match(r"python tools/|make \w|tensorboard ", span):
                yield where, span


def lines_of(block: str) -> Iterator[str]:
    """The commands in a fenced block."""
    for line in block.replace("\\\n", " ").split("\n"):
        for command in re.split(r" && ", re.sub(r"(^|\s)#.*", "", line.strip())):
            if command.split(" ")[0] in PROGRAMS:
                yield command.strip()


COMMANDS = {command: where for where, command in reversed(list(commands()))}
"""Each command once, with the first place where it stands."""


def test_commands_are_found():
    assert len(COMMANDS) > 40
    assert {"README.md", "data/README.md", "docs/own_data.md"} <= set(COMMANDS.values())


@pytest.fixture(scope="module")
def checkout(tool, tmp_path_factory) -> Path:
    """A folder as that of a user who followed the documents so far."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("tools", "fpn_det", "Makefile", "requirements.txt", "pyproject.toml", "benchmarks", "docs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_data()
        make_weights(tool)
        config = re.search(
            r"```yaml\n(data:.*?)```", (ROOT / "docs/own_data.md").read_text(encoding="utf-8"), re.DOTALL
        )
        assert config
        Path("configs/mine.yaml").write_text(config[1])
        small = [f"{key}={value}" for key, value in (SMALL_MODEL | SMALL_RUN).items()]
        for name in ("mine", "quickstart"):
            assert tool("train", "--config", f"configs/{name}.yaml", *small, "eval.every=1").code == 0
        for source, name in (("mine", "other"), ("mine", "a"), ("mine", "b"), ("quickstart", "half")):
            shutil.copytree(f"runs/{source}", f"runs/{name}")
    return folder


def make_data() -> None:
    """Shapes as data sets of several layouts: the user's own, in five formats; COCO, with its classes."""
    generate(Path("generated"), num_train=60, num_val=12, size=64)
    content = json.loads(Path("generated/annotations/train.json").read_text())
    mine, coco = Path("data/mine"), Path("data/coco")
    shutil.copytree("generated/train", "photos")
    (mine / "annotations").mkdir(parents=True)
    (mine / "all.json").write_text(json.dumps(content))
    parts = split_records(read_records(mine / "all.json")[0], {"train": 0.8, "val": 0.2}, seed=0)
    for name, part in parts.items():
        part.write(mine / f"annotations/{name}.json")

    (coco / "annotations").mkdir(parents=True)
    index = {c["id"]: i for i, c in enumerate(content["categories"])}
    as_coco = content | {
        "categories": [{"id": i, "name": n} for i, n in zip(COCO_CATEGORIES.ids, COCO_CATEGORIES.names, strict=True)],
        "annotations": [
            a | {"category_id": COCO_CATEGORIES.ids[index[a["category_id"]]]} for a in content["annotations"]
        ],
    }
    for split in ("train2017", "val2017"):
        shutil.copytree("photos", coco / split)
        (coco / f"annotations/instances_{split}.json").write_text(json.dumps(as_coco))

    shutil.copytree("generated", "data/shapes")
    write_yolo_csv_labelme(content, mine)
    names = [c["name"] for c in content["categories"]]
    write_voc(content, mine / "voc", names)
    shutil.copytree("photos", mine / "voc/JPEGImages")
    write_voc(content, Path("data/BCCD_Dataset/BCCD"), ["RBC", "WBC", "Platelets", "RBC", "WBC"])
    shutil.copytree("photos", "data/bccd/images")


def boxes_of(content: dict, names: Sequence[str]) -> list[tuple[dict, list[tuple[str, float, float, float, float]]]]:
    """Each image with its boxes: the name of the class, and the corners."""
    index = {c["id"]: i for i, c in enumerate(content["categories"])}
    found: dict[int, list] = {image["id"]: [] for image in content["images"]}
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        found[a["image_id"]].append((names[index[a["category_id"]]], x, y, x + w, y + h))
    return [(image, found[image["id"]]) for image in content["images"]]


def write_voc(content: dict, folder: Path, names: Sequence[str]) -> None:
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    stems = []
    for image, boxes in boxes_of(content, names):
        objects = "".join(
            f"<object><name>{c}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax>"
            f"<ymax>{y2}</ymax></bndbox></object>"
            for c, x1, y1, x2, y2 in boxes
        )
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
        stems.append(Path(image["file_name"]).stem)
        (folder / f"Annotations/{stems[-1]}.xml").write_text(
            f"<annotation><filename>{image['file_name']}</filename>{size}{objects}</annotation>"
        )
    (folder / "ImageSets/Main/train.txt").write_text("\n".join(stems))


def write_yolo_csv_labelme(content: dict, mine: Path) -> None:
    names = [c["name"] for c in content["categories"]]
    yolo, labelme, rows = mine / "yolo", mine / "all", ["filename,xmin,ymin,xmax,ymax,class"]
    (yolo / "labels/train").mkdir(parents=True)
    labelme.mkdir()
    shutil.copytree("photos", yolo / "images/train")
    (yolo / "data.yaml").write_text(f"path: .\ntrain: images/train\nnames: {names}\n")
    for image, boxes in boxes_of(content, names):
        name, w, h = image["file_name"], image["width"], image["height"]
        lines = (
            f"{names.index(c)} {(x1 + x2) / 2 / w} {(y1 + y2) / 2 / h} {(x2 - x1) / w} {(y2 - y1) / h}\n"
            for c, x1, y1, x2, y2 in boxes
        )
        (yolo / f"labels/train/{Path(name).stem}.txt").write_text("".join(lines))
        rows += [f"{name},{x1},{y1},{x2},{y2},{c}" for c, x1, y1, x2, y2 in boxes] or [f"{name},,,,,"]
        shapes = [
            {"label": c, "shape_type": "rectangle", "points": [[x1, y1], [x2, y2]]} for c, x1, y1, x2, y2 in boxes
        ]
        shutil.copy(f"photos/{name}", labelme)
        (labelme / f"{Path(name).stem}.json").write_text(
            json.dumps({"imagePath": name, "imageWidth": w, "imageHeight": h, "shapes": shapes})
        )
    (mine / "all.csv").write_text("\n".join(rows))


def make_weights(tool: Callable) -> None:
    """A small detector under the names of three frameworks' files, and what import makes of each."""
    torch.manual_seed(0)
    body = torchvision.models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = BackboneWithFPN(body, layers, in_channels_list=[64, 128, 256, 512], out_channels=16)
    model = FasterRCNN(backbone, box_head=TwoMLPHead(16 * 49, 32), box_predictor=FastRCNNPredictor(32, 91))
    files = {
        "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth": ("tv", "coco"),
        "model_final_280758.pkl": ("d2",),
        "faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth": ("mm",),
    }
    theirs = model.state_dict()
    torchvision_file, detectron2_file, mmdetection_file = files
    torch.save(theirs, torchvision_file)
    with Path(detectron2_file).open("wb") as file:
        content = {name: value.numpy() for name, value in in_detectron2(theirs).items()}
        pickle.dump({"model": content, "__author__": "Detectron2"}, file, protocol=2)
    torch.save({"state_dict": in_mmdetection(theirs), "meta": {}}, mmdetection_file)
    for source, names in files.items():
        for name in names:
            # The real file is known by its SHA-256 to have been trained with an eps of 0.
            options = ["--norm-eps", 0] if name == "coco" else []
            outcome = tool("import_weights", source, f"weights/{name}.pth", *options)
            assert outcome.code == 0, outcome.err


def coco_heads(theirs: dict[str, Tensor], cls: str, box: str) -> dict[str, Tensor]:
    """Predictors of torchvision's 91 labels cut to COCO's 80 classes and a background."""
    predictor = "roi_heads.box_predictor"
    return {f"{cls}.{kind}": theirs[f"{predictor}.cls_score.{kind}"][:81] for kind in ("weight", "bias")} | {
        f"{box}.{kind}": theirs[f"{predictor}.bbox_pred.{kind}"][: 80 * 4] for kind in ("weight", "bias")
    }


def renamed(theirs: dict[str, Tensor], rules: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]) -> dict:
    names = {}
    for name in theirs:
        if "box_predictor" not in name:
            new = name
            for pattern, replacement in rules:
                new = re.sub(pattern, replacement, new)
            names[new] = theirs[name]
    return names


def in_detectron2(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    rules: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r"backbone\.body\.(conv1|bn1)\.", r"backbone.body.stem.\1."),
        (r"\.layer(\d)\.", lambda m: f".res{int(m[1]) + 1}."),
        (r"\.bn(\d)\.", r".conv\1.norm."),
        (r"downsample\.0", "shortcut"),
        (r"downsample\.1", "shortcut.norm"),
        (r"fpn\.inner_blocks\.(\d)\.0", lambda m: f"fpn_lateral{int(m[1]) + 2}"),
        (r"fpn\.layer_blocks\.(\d)\.0", lambda m: f"fpn_output{int(m[1]) + 2}"),
        (r"rpn\.head\.conv\.0\.0", "proposal_generator.rpn_head.conv"),
        (r"rpn\.head\.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
        (r"rpn\.head\.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
        (r"roi_heads\.box_head\.fc6", "roi_heads.box_head.fc1"),
        (r"roi_heads\.box_head\.fc7", "roi_heads.box_head.fc2"),
        (r"backbone\.body\.", "backbone.bottom_up."),
    ]
    predictor = "roi_heads.box_predictor"
    return renamed(theirs, rules) | coco_heads(theirs, f"{predictor}.cls_score", f"{predictor}.bbox_pred")


def in_mmdetection(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    rules: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r"backbone\.body\.", "backbone."),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.0", r"neck.lateral_convs.\1.conv"),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.0", r"neck.fpn_convs.\1.conv"),
        (r"rpn\.head\.conv\.0\.0", "rpn_head.rpn_conv"),
        (r"rpn\.head\.cls_logits", "rpn_head.rpn_cls"),
        (r"rpn\.head\.bbox_pred", "rpn_head.rpn_reg"),
        (r"roi_heads\.box_head\.fc6", "roi_head.bbox_head.shared_fcs.0"),
        (r"roi_heads\.box_head\.fc7", "roi_head.bbox_head.shared_fcs.1"),
    ]
    head = "roi_head.bbox_head"
    return renamed(theirs, rules) | coco_heads(theirs, f"{head}.fc_cls", f"{head}.fc_reg")


@pytest.fixture
def copy(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a command may write to; the current folder, too."""
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder, symlinks=True, copy_function=os.link)  # files are replaced, not written into
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("command", list(reversed(COMMANDS)), ids=lambda command: " ".join(command.split()))
def test_command(command: str, copy: Path, tool: Callable) -> None:
    assert not re.search(r"\.\.\. |\.\.\.$|\[|(^|[ =])[A-Z]+\b(?!=)", re.sub(r"=\[.*?\]|HOST:|RBC WBC", "", command)), (
        f"{COMMANDS[command]}: a placeholder cannot be run; use the names of tests/test_commands.py"
    )
    if any(command.startswith(start) for start in NOT_RUN):
        return
    program, *words = shlex.split(command)
    match program:
        case "python" if words[0] == "-c":
            subprocess.run([sys.executable, *words], check=True)
        case "python":
            run_tool(words, copy, tool)
        case "torchrun":
            run_torchrun(*torchrun_of_two(words))
        case "make":
            run_make(words, copy, tool)
        case "pip":
            check_pip(words)
        case "tensorboard":
            serve([sys.executable, "-m", "tensorboard.main", *words, "--port", "0"])
        case _:
            raise AssertionError(f"do not know how to run {program}")


def run_tool(words: list[str], folder: Path, tool: Callable) -> None:
    name, arguments = Path(words[0]).stem, words[1:]
    assert words[0] == f"tools/{name}.py"
    arguments = made_small(arguments)
    if name == "demo":
        serve([sys.executable, *words[:1], *arguments, "--port", "0"])
        return
    if name == "make_shapes":
        shutil.rmtree("data/shapes")
        arguments += ["--num-train", "20", "--num-val", "10", "--size", "64"]
    if name == "import_weights":
        Path(arguments[1]).unlink()  # which is there already
        Path(arguments[1]).with_suffix(".yaml").unlink()
    if name == "train" and "--resume" not in arguments:
        config = load_config(Path(arguments[arguments.index("--config") + 1]))
        own = arguments[arguments.index("--output-dir") + 1] if "--output-dir" in arguments else f"runs/{config.name}"
        shutil.rmtree(folder / own, ignore_errors=True)
    outcome = tool(name, *arguments)
    # 1: there are problems, with which training goes on; two steps have not learnt the images; two runs differ
    allowed = (0, 1) if name == "check_data" or "--overfit" in arguments or arguments[0] == "diff" else (0,)
    assert outcome.code in allowed, outcome.err or outcome.out


def made_small(arguments: list[str]) -> list[str]:
    """The arguments of a tool with overrides that make a run small, where the tool takes a config."""
    if "--config" not in arguments and "--checkpoint" not in arguments:
        return arguments
    overrides = [a for a in arguments if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", a)]
    rest = [a for a in arguments if a not in overrides]
    if "--config" not in arguments:
        return [*rest, *overrides]
    path = Path(arguments[arguments.index("--config") + 1])
    load_config(path, overrides)  # what the command says is right as it stands
    if path.parts[0] == "weights":
        small = SMALL_RUN
    elif load_config(path, overrides).model.weights is not None:  # of weights/coco.pth
        small = SMALL_RUN | {"model.backbone.name": "resnet18", "model.neck.channels": 16} | {FC_DIM: 32}
    else:
        small = SMALL_RUN | SMALL_MODEL
    kept = [o for o in overrides if o.partition("=")[0] not in {*small, "train.epochs"}]
    added = [f"{key}={value}" for key, value in small.items()]
    return [*rest, *kept, *(one for one in added if is_accepted(path, kept, one))]


def is_accepted(path: Path, overrides: list[str], one: str) -> bool:
    """Whether a config takes another override; models of other kinds have other keys."""
    try:
        load_config(path, [*overrides, one])
    except InputError as error:
        if "not a key of" in str(error):
            return False
    return True


def torchrun_of_two(words: list[str]) -> list[str]:
    """The command as one of two processes on this machine."""
    options = get_args_parser().parse_args(words)
    arguments = made_small(options.training_script_args)
    if options.training_script.endswith("train.py"):
        arguments += ["--output-dir", "runs/of_torchrun"]
    return ["--standalone", "--nproc-per-node", "2", options.training_script, *arguments]


@cache  # several documents show the same, for other numbers of processes
def run_torchrun(*words: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def run_make(words: list[str], folder: Path, tool: Callable) -> None:
    shown = subprocess.run(["make", "-n", *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    steps = [c for line in shown.replace("\\\n", " ").split("\n") if "tools/" in (c := line.strip()) and c[0] == "."]
    assert steps
    for step in steps:
        _, *arguments = shlex.split(step)
        run_tool(arguments, folder, tool)


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for word in words[1:]:
        named = re.search(r"\[(.*)\]", word)
        assert named is None or set(named[1].split(",")) <= extras.keys(), word
        assert not word.endswith(".txt") or (ROOT / word).exists(), word


def serve(command: list[str]) -> None:
    """Start a server, open its page, end it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as server:
        try:
            assert server.stdout is not None
            said = ""
            while not (address := re.search(r"http://[\w.]+:\d+", said)):
                line = server.stdout.readline()
                assert line, said
                said += line
            url = address[0].replace("localhost", "127.0.0.1")
            with urllib.request.urlopen(url, timeout=60) as page:
                assert page.status == 200
        finally:
            server.terminate()
