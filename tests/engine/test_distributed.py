"""Two processes over gloo: the same training and the same detections as one."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fpn_det.data.coco import load_coco
from fpn_det.data.loader import DetectionDataset, TestSampler, TrainSampler, make_loader
from fpn_det.data.shapes import CATEGORIES, generate
from fpn_det.data.transforms import TrainTransform
from fpn_det.engine.coco_eval import read_ground_truth
from fpn_det.engine.diagnosis import SkippedSteps
from fpn_det.engine.distributed import STALLED_EXIT_CODE, Process, launched_process
from fpn_det.engine.evaluate import View, evaluate
from fpn_det.engine.precision import loss_scaler
from fpn_det.engine.runlog import RunLog
from fpn_det.engine.train import train
from fpn_det.models.anchors import Anchors
from fpn_det.models.faster_rcnn import FasterRCNN
from fpn_det.models.fpn import FPN
from fpn_det.models.norms import Norm, SyncBatchNorm, conv_norm
from fpn_det.models.roi_head import ConvFCHead, RoIHead
from fpn_det.models.roi_pool import MultiLevelRoIAlign
from fpn_det.models.rpn import RPN, RPNHead
from fpn_det.structures import Batch, Categories, Detections, InputError, Targets

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def job(rank: int, port: int, world_size: int = 2) -> dict[str, str]:
    """The environment that torchrun gives a process."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    return {k: str(v) for k, v in values.items()} | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


def _child(work: Callable[[], Any], rank: int, port: int, queue: Any) -> None:
    os.environ.update(job(rank, port))
    torch.set_num_threads(1)
    queue.put((rank, work()))


def in_two_ranks(work: Callable[[], Any]) -> list[Any]:
    """What `work` returns in rank 0 and in rank 1 of a job; plain values only."""
    context = multiprocessing.get_context("fork")  # two more imports of torch would cost seconds
    port, queue = free_port(), context.SimpleQueue()
    children = [context.Process(target=_child, args=(work, rank, port, queue), daemon=True) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=60)
    assert [child.exitcode for child in children] == [0, 0]
    return [value for _, value in sorted(queue.get() for _ in children)]


def in_two_processes(work: Callable[[Process], Any]) -> list[Any]:
    """The same for work on a `Process`."""

    def joined() -> Any:
        with launched_process("cpu") as process:
            return work(process)

    return in_two_ranks(joined)


def test_one_process_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with launched_process("cpu") as process:
        assert process == Process(rank=0, world_size=1, device=torch.device("cpu"))
        assert process.is_main
        assert process.gather({"a": 1}) == [{"a": 1}]
        assert process.mean(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        assert (process.any(True), process.any(False)) == (True, False)
        process.share_buffers(nn.BatchNorm2d(2))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InputError, match="RANK, but not LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        launched_process("cpu").__enter__()
    for name, value in job(1, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"no GPU.*--nproc-per-node 1"), launched_process("cuda"):
        pass


def test_collectives():
    def work(process: Process) -> tuple:
        norm = nn.BatchNorm2d(2)
        norm.running_mean.fill_(process.rank + 3)
        norm.num_batches_tracked.fill_(process.rank + 5)
        process.share_buffers(norm)
        return (
            process.rank,
            process.world_size,
            process.is_main,
            process.gather([process.rank] * process.rank),
            process.mean(torch.tensor([1.0, 4.0]) * (process.rank + 1)).tolist(),
            (process.any(process.rank == 1), process.any(False)),
            (norm.running_mean.tolist(), norm.num_batches_tracked.item()),
        )

    shared = ([1.5, 6.0], (True, False), ([3.0, 3.0], 5))
    main, other = in_two_processes(work)
    assert main == (0, 2, True, [[], [1]], *shared)
    assert other == (1, 2, False, [], *shared)


def numbers(values: list[float]) -> Batch:
    """Images of one pixel."""
    n = len(values)
    empty = Targets(boxes=torch.zeros(n, 0, 4), labels=torch.zeros(n, 0).long(), valid=torch.zeros(n, 0).bool())
    sizes = torch.ones(n, 2, dtype=torch.int64)
    images = torch.tensor(values).view(n, 1, 1, 1)
    ids = torch.tensor(values).mul(10).round().long()
    return Batch(images=images, sizes=sizes, targets=empty, image_ids=ids, original_sizes=sizes, seeds=ids)


def test_the_main_process_works_for_all_and_its_error_ends_all():
    def work(process: Process) -> tuple:
        def refuse() -> None:
            raise InputError("no")

        found = process.from_main(lambda: {"rank": process.rank, "weights": torch.arange(3)})
        try:
            process.from_main(refuse)
        except (InputError, SystemExit) as error:
            return found["rank"], found["weights"].tolist(), repr(error)
        return ()

    main, other = in_two_processes(work)
    assert main == (0, [0, 1, 2], "InputError('no')")
    assert other == (0, [0, 1, 2], "SystemExit(2)")


def test_a_process_that_does_not_come_is_missed(monkeypatch):
    for name, value in job(0, free_port()).items():
        monkeypatch.setenv(name, value)
    message = r"2 processes of the job did not find each other at 127.0.0.1:\d+ \(.* 1/2 clients joined"
    with pytest.raises(InputError, match=message), launched_process("cpu", timeout=timedelta(seconds=1)):
        pass


def test_a_start_finds_no_traces_of_an_earlier_one():
    """torchrun keeps its store when it starts processes again, with the addresses of those that are gone."""
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        queue = context.SimpleQueue()

        def child(rank: int, attempt: int = attempt, queue: Any = queue) -> None:
            os.environ.update(job(rank, port) | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
            torch.set_num_threads(1)
            if rank == 1:
                time.sleep(0.3)  # the main process looks first, and finds what was
            with launched_process("cpu", timeout=timedelta(seconds=20)) as process:
                queue.put((rank, process.mean(torch.tensor(float(rank + attempt))).item()))
                os._exit(0)  # as if killed: nothing is tidied up

        children = [context.Process(target=child, args=(rank,), daemon=True) for rank in (0, 1)]
        for process in children:
            process.start()
        for process in children:
            process.join(timeout=30)
        assert [process.exitcode for process in children] == [0, 0]
        assert sorted(queue.get() for _ in children) == [(0, attempt + 0.5), (1, attempt + 0.5)]
    assert store.num_keys() > 0


class Lingering:
    """A standard error whose writes are far apart, so that another process's come in between."""

    def write(self, text: str) -> None:
        os.write(2, text.encode())
        time.sleep(0.5)

    def flush(self) -> None:
        pass


def test_who_holds_up_the_job_is_named(capfd):
    """One process waits for data, the other for it. Both say so at once, each in a line of its own."""

    def work(process: Process) -> None:
        sys.stderr = Lingering()  # type: ignore[assignment]
        process.doing("training", 5)
        if process.rank == 1:
            process.doing("waiting for data", 6)
            time.sleep(60)
        process.doing("training", 7)
        process.mean(torch.zeros(()))

    codes = ends_of_two(lambda: work_within(work, timedelta(seconds=1.5)))
    assert codes == [STALLED_EXIT_CODE] * 2
    # Whoever ends first takes the store along, of which the other may hear only that: torch says so at length.
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error (rank ")]
    assert len(lines) == 2
    assert all(re.match(r"error \(rank \d\): no progress for [23] s while \w.* in step \d\. ", line) for line in lines)
    named = r"Held up by rank 1 on \S+, waiting for data in step 6\. If a step .* runtime.timeout_minutes"
    assert any(re.search(named, line) for line in lines), lines


def test_a_main_process_that_stands_still_is_named(capfd):
    """Without torchrun it holds the store, which then answers nobody."""
    pids = multiprocessing.get_context("fork").SimpleQueue()

    def work(process: Process) -> None:
        process.doing("training", 5)
        process.mean(torch.zeros(()))
        if process.rank == 0:
            pids.put(os.getpid())
            os.kill(os.getpid(), signal.SIGSTOP)
        process.mean(torch.zeros(()))

    def release() -> None:
        time.sleep(12)
        os.kill(pids.get(), signal.SIGKILL)

    releasing = threading.Thread(target=release)
    releasing.start()
    codes = ends_of_two(lambda: work_within(work, timedelta(seconds=1)))
    releasing.join()
    assert codes == [-signal.SIGKILL, STALLED_EXIT_CODE]
    message = r"error \(rank 1\): no progress for 1 s while training in step 5\. The main process .* stands still"
    assert re.search(message, capfd.readouterr().err)  # before that process was killed


def work_within(work: Callable[[Process], Any], timeout: timedelta) -> None:
    with launched_process("cpu", timeout=timeout) as process:
        work(process)


def ends_of_two(work: Callable[[], Any]) -> list[int | None]:
    """Exit codes of two ranks that do `work`."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    children = [
        context.Process(target=_child, args=(work, rank, port, context.SimpleQueue()), daemon=True) for rank in (0, 1)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=30)
    return [child.exitcode for child in children]


def test_a_lost_process_is_one_clear_error():
    def work() -> str:
        def lose(process: Process) -> None:
            process.doing("training", 7)
            process.mean(torch.zeros(()))
            if process.rank == 1:
                os._exit(9)
            process.mean(torch.zeros(()))

        try:
            work_within(lose, timedelta(seconds=20))
        except InputError as error:
            (tmp / "error").write_text(str(error))
        return ""

    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        assert ends_of_two(work) == [0, 9]
        error = (tmp / "error").read_text()
    assert re.match(r"the connection to the other processes broke while training in step 7 \(.*--max-restarts", error)
    assert "\n" not in error


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))
        self.idle = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"fit": ((self.slope * batch.images - 3) ** 2).mean()}, {}


def fit(process: Process, *, accumulate: int = 1, noise: bool = False) -> float:
    """Train on steps of four numbers, shared out as the sampler does; returns the slope."""
    size = 4 // (process.world_size * accumulate)
    parts = [
        numbers([float(4 * step + i) / 10 for i in range(start, start + size)])
        for step in range(5)
        for micro in range(accumulate)
        for start in [(process.rank * accumulate + micro) * size]
    ]
    model = Line()
    with RunLog(None, start_step=0, num_steps=5) as log:
        train(
            model,
            parts,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5),
            scaler=loss_scaler(torch.device("cpu"), "fp32"),
            lr_at=lambda step: 0.1,
            start_step=0,
            num_steps=5,
            seed=0,
            process=process,
            log=log,
            skipped=SkippedSteps(limit=1),
            note_unreadable=lambda image_ids: None,
            save=lambda step: None,
            evaluate=lambda step: False,
            accumulate=accumulate,
            log_every=2,
        )
    return model.slope.item()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_like_one(accumulate):
    alone = fit(Process())
    slopes = in_two_processes(lambda process: fit(process, accumulate=accumulate))
    assert slopes[0] == slopes[1] == pytest.approx(alone, rel=1e-6)
    assert abs(alone - 0.5) > 0.1


def test_a_loss_that_is_not_finite_in_one_process_ends_all():
    def work(process: Process) -> str:
        class Broken(Line):
            def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
                losses, stats = super().forward(batch)
                return {"fit": losses["fit"] * (float("nan") if process.rank == 1 else 1)}, stats

        try:
            globals()["Line"] = Broken
            fit(process)
        except InputError as error:
            return str(error)
        except SystemExit:
            return "ended"
        return "went on"

    main, other = in_two_processes(work)
    assert "training diverged" in main
    assert "fit is nan" in main
    assert "images 2, 3" in main  # of the process whose loss it is
    assert other == "ended"


@pytest.mark.parametrize(("num_images", "world_size"), [(5, 2), (4, 3), (1, 2), (7, 4)])
def test_every_image_goes_to_one_process(num_images, world_size):
    sizes = torch.randint(50, 100, (num_images, 2), generator=torch.Generator().manual_seed(0))
    shares = [
        [index for batch in TestSampler(sizes, batch_size=2, rank=r, world_size=world_size) for index, _ in batch]
        for r in range(world_size)
    ]
    assert sorted(i for share in shares for i in share) == list(range(num_images))


# The whole detector

STEPS = 20


class Body(nn.Module):
    """Four strided convolutions with norms: quicker than any ResNet."""

    strides, channels = (4, 8, 16, 32), (32, 32, 32, 32)

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        widths = (3, *self.channels)
        self.stages = nn.ModuleList(
            conv_norm(widths[i], widths[i + 1], 3, stride=4 if i == 0 else 2, norm=norm) for i in range(4)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            images = stage(images).relu()
            features.append(images)
        return features


def small_detector(norm: Norm) -> FasterRCNN:
    """With `norm` in body, neck and box head. In double precision: else rounding decides near ties of proposals."""
    torch.manual_seed(0)
    body = Body(norm)
    neck = FPN(in_channels=body.channels, channels=32, strides=body.strides, norm=norm)
    anchors = Anchors(sizes=[(8,), (16,), (32,), (64,), (128,)], ratios=(0.5, 1, 2), strides=neck.strides)
    box_head = ConvFCHead(in_channels=32, pool_size=7, num_convs=1, conv_channels=32, num_fcs=1, fc_dim=32, norm=norm)
    return FasterRCNN(
        backbone=body,
        neck=neck,
        rpn=RPN(
            head=RPNHead(in_channels=32, num_anchors=3),
            anchors=anchors,
            num_samples=32,
            post_nms_top_k_train=32,
            nms_thresh=0.3,
            min_size=12,  # leaves fewer proposals than there are to be samples, in some images
        ),
        roi_head=RoIHead(
            pooler=MultiLevelRoIAlign(strides=neck.roi_strides, canonical_size=56),
            box_head=box_head,
            num_classes=len(CATEGORIES),
            num_samples=32,
        ),
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
    ).double()


class Curve(RunLog):
    """Keeps the scalars of each step."""

    def __init__(self) -> None:
        super().__init__(None, start_step=0, num_steps=STEPS)
        self.steps: list[dict[str, float]] = []

    def training(self, step: int, scalars: Mapping[str, float], *, eta: str) -> None:
        # The norm of the gradient is that of the main process' average, the same for all.
        self.steps.append({k: v for k, v in scalars.items() if k.startswith(("loss/", "train/")) and k != "train/lr"})


@pytest.fixture(scope="module")
def many_shapes(tmp_path_factory) -> Path:
    """128 images that all are padded to 64 x 64: so many that none comes twice in `STEPS` steps of 4."""
    folder = tmp_path_factory.mktemp("many_shapes")
    generate(folder, num_train=128, num_val=1, size=64)
    return folder


@pytest.fixture
def one_sided(many_shapes, tmp_path) -> Path:
    """Annotations by which all images of the second process, the later half of each step, are without objects."""
    data = load_coco(many_shapes / "annotations/train.json", many_shapes / "train")
    steps = islice(TrainSampler(data.sizes, batch_size=4, seed=0), STEPS)
    bare = {int(data.image_ids[index]) for keys in steps for index, _ in keys[2:]}
    truth = json.loads((many_shapes / "annotations/train.json").read_text())
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] not in bare]
    (tmp_path / "train.json").write_text(json.dumps(truth))
    return tmp_path / "train.json"


def training_of(
    annotations: Path, norm: Norm, process: Process, *, images: Path, accumulate: int = 1
) -> tuple[list[dict[str, float]], dict[str, list[float]]]:
    """The scalars of each step; mean and norm of all weights and statistics in the end."""
    data = load_coco(annotations, images)
    share = {"rank": process.rank, "world_size": process.world_size, "accumulate": accumulate}
    sampler = TrainSampler(data.sizes, batch_size=4, seed=0, **share)
    transform = TrainTransform(short_sides=[64], long_side=64)
    model = small_detector(norm)
    curve = Curve()
    train(
        model,
        make_loader(DetectionDataset(data, transform), sampler, num_workers=0, pin_memory=False),  # type: ignore[arg-type]
        optimizer=torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        scaler=loss_scaler(process.device, "fp32"),
        lr_at=lambda step: 0.02,
        start_step=0,
        num_steps=STEPS,
        seed=0,
        process=process,
        log=curve,
        skipped=SkippedSteps(limit=0),
        note_unreadable=lambda image_ids: None,
        save=lambda step: None,
        evaluate=lambda step: False,
        accumulate=accumulate,
        log_every=1,
    )
    state = {name: value.double() for name, value in model.state_dict().items()}
    return curve.steps, {name: [float(value.mean()), float(value.norm())] for name, value in state.items()}


def check_same_training(annotations: Path, norm: Norm, shares: list[tuple[int, int]], *, images: Path) -> None:
    """Shared out among (processes, micro-batches) in each of these ways, losses and weights are those of one."""

    def work(process: Process, accumulate: int = 1) -> tuple[list[dict[str, float]], dict[str, list[float]]]:
        return training_of(annotations, norm, process, images=images, accumulate=accumulate)

    steps, weights = work(Process())
    assert steps[-1]["loss/total"] < 0.8 * steps[0]["loss/total"]
    for world_size, accumulate in shares:
        share = partial(work, accumulate=accumulate)
        for other_steps, other_weights in in_two_processes(share) if world_size == 2 else [share(Process())]:
            for ours, others in zip(steps, other_steps, strict=True):
                assert others == pytest.approx(ours, rel=1e-5), (world_size, accumulate)
            for name, values in weights.items():
                assert other_weights[name] == pytest.approx(values, rel=1e-5, abs=1e-7), (world_size, accumulate, name)


def test_a_detector_trains_alike_however_its_steps_are_shared_out(many_shapes):
    images, annotations = many_shapes / "train", many_shapes / "annotations/train.json"
    check_same_training(annotations, "gn", [(1, 2), (2, 1), (2, 2)], images=images)


def test_images_without_objects_in_one_process_only(many_shapes, one_sided):
    """No process waits for a gradient that another does not have."""
    data = load_coco(one_sided, many_shapes / "train")
    for rank in (0, 1):
        keys = islice(TrainSampler(data.sizes, batch_size=4, seed=0, rank=rank, world_size=2), STEPS)
        counts = [len(data.targets(index)[0]) for step in keys for index, _ in step]
        assert len(counts) == 2 * STEPS
        assert (sum(counts) > STEPS) == (rank == 0)
        assert any(counts) == (rank == 0)
    check_same_training(one_sided, "gn", [(2, 1), (2, 2)], images=many_shapes / "train")


def test_sync_bn_trains_in_two_processes_as_in_one(many_shapes, one_sided):
    """Running statistics included, and with images without objects in one process only."""
    check_same_training(one_sided, "sync_bn", [(2, 1)], images=many_shapes / "train")


def test_batch_norm_does_not(many_shapes, one_sided):
    """What the tests above would see."""
    with pytest.raises(AssertionError, match="comparison failed"):
        check_same_training(one_sided, "bn", [(2, 1)], images=many_shapes / "train")


@pytest.mark.parametrize("split", [2, 3, 4], ids=["even", "uneven", "one without input"])
def test_sync_bn_is_batch_norm_of_the_inputs_of_all_processes(split: int):
    """Outputs, gradients of inputs and weights, statistics; also far from 0."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 5, 6) + torch.tensor([0.0, 10, -3]).view(3, 1, 1)
    factor = torch.randn(2, 4, 3, 5, 6)

    def passes(norm: nn.Module, share: slice) -> list[list[float]]:
        found = []
        for step in (0, 1):
            own = x[step, share].clone().requires_grad_()
            norm.zero_grad()
            out = norm(own)
            (out * factor[step, share]).sum().backward()
            found += [out, own.grad, *(p.grad for p in norm.parameters())]
        found += list(norm.buffers())
        return [value.double().flatten().tolist() for value in found]

    def prepared(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
            norm.bias.copy_(torch.tensor([1.0, 0.0, 3.0]))
        return norm

    def work(process: Process) -> list[list[float]]:
        norm = DistributedDataParallel(prepared(SyncBatchNorm(3)), broadcast_buffers=False)
        return passes(norm, slice(0, split) if process.rank == 0 else slice(split, 4))

    first, second = in_two_processes(work)
    expected = passes(prepared(nn.BatchNorm2d(3)), slice(0, 4))
    for i, (a, b, whole) in enumerate(zip(first, second, expected, strict=True)):
        if i in (0, 1, 4, 5):  # of the inputs: a share each
            assert a + b == pytest.approx(whole, rel=1e-4, abs=1e-5)
        else:  # gradients of the weights are the mean over the processes, so half of the sum
            scale = 2 if i < 8 else 1
            assert a == b
            assert [scale * v for v in a] == pytest.approx(whole, rel=1e-5, abs=1e-5)


class Finder:
    """A detector that finds one box in every image, scored by the image's id."""

    training = True

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def predict(self, batch: Batch) -> list[Detections]:
        return [
            Detections(
                boxes=torch.tensor([[0.0, 0.0, 9.0, 9.0]]), scores=torch.tensor([i / 100]), labels=torch.tensor([0])
            )
            for i in batch.image_ids.tolist()
        ]


def find(process: Process, annotations: Path, batches: list[list[int]]) -> tuple | None:
    """Evaluate a `Finder` on this process' share of the batches of image ids."""
    sizes = {"sizes": torch.full((1, 2), 32), "original_sizes": torch.full((1, 2), 32)}
    empty = Targets(boxes=torch.zeros(1, 0, 4), labels=torch.zeros(1, 0).long(), valid=torch.zeros(1, 0).bool())
    own = [
        Batch(
            images=torch.zeros(1, 3, 32, 32),
            image_ids=torch.tensor([i]),
            targets=empty,
            seeds=torch.tensor([0]),
            **sizes,
        )
        for share in batches[process.rank :: process.world_size]
        for i in share
    ]
    return evaluate(
        Finder(),
        [View(batches=own)],
        truth=read_ground_truth(annotations),
        categories=Categories((5,), ("cat",)),
        backend="pycocotools",  # hotcoco's threads do not survive a fork
        nms_thresh=0.5,
        max_detections=100,
        precision="fp32",
        process=process,
    )


@pytest.mark.parametrize("batches", [[[4, 1], [3], [2]], [[4, 1, 3, 2]]])
def test_shares_of_any_size_make_one_result(tmp_path, batches):
    """The second time, one process has nothing to do."""
    box = {"category_id": 5, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
    truth = {
        "images": [{"id": i} for i in (1, 2, 3, 4)],
        "categories": [{"id": 5, "name": "cat"}],
        "annotations": [{"id": i, "image_id": i, **box} for i in (1, 2, 3, 4)],
    }
    annotations = tmp_path / "truth.json"
    annotations.write_text(json.dumps(truth))
    main, other = in_two_processes(lambda process: find(process, annotations, batches))
    assert other is None
    metrics, results = main
    expected_metrics, expected = find(Process(), annotations, batches)
    assert metrics == expected_metrics
    assert results.records() == expected.records()
    assert results.image_ids.tolist() == [1, 2, 3, 4]
    assert metrics["AP"] == pytest.approx(1)


def test_torchrun(tool, tiny, tmp_path):
    """Trains, and detects in two processes what one process with the same weights detects, every image once.

    The 8 validation images are 2 batches for one process and 1 for the other. The body has batch norm, whose
    statistics differ between the processes after a step.
    """
    options = [*tiny, "train.steps=2", "eval.batch_size=3", "model.roi_head.score_thresh=0"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*launcher, str(ROOT / "tools/train.py"), *options, "--output-dir", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert done.stdout.count("training 2 steps of 4 images") == 1  # one process talks
    records = [json.loads(line) for line in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 2]

    outcome = tool("eval", *options, "--checkpoint", tmp_path / "two/final.pth", "--output-dir", tmp_path / "one")
    assert outcome.code == 0, outcome.err
    for name in ("predictions.json", "metrics.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    found = json.loads((tmp_path / "one/predictions.json").read_text())
    assert len({r["image_id"] for r in found}) == 8


def test_processes_that_read_other_data_are_refused(tool, tiny, shapes, tmp_path):
    """As when the files were copied to another machine and then corrected on one."""
    content = json.loads((shapes / "annotations/train.json").read_text())
    box = next(a for a in content["annotations"] if not a["iscrowd"])["bbox"]
    box[2] -= 1
    (tmp_path / "train.json").write_text(json.dumps(content))

    def work() -> tuple[int, str]:
        other = [f"data.train.annotations={tmp_path / 'train.json'}"] if os.environ["RANK"] == "1" else []
        outcome = tool("train", *tiny, *other, "--output-dir", tmp_path / "run")
        return outcome.code, outcome.err

    (code, error), other = in_two_ranks(work)
    assert code == 2
    assert "the processes 1 read other training data than the main process" in error
    assert error.count("\n") == 1
    assert other == (2, "")
    assert not list((tmp_path / "run").glob("*.pth"))


def test_a_batch_that_does_not_divide_ends_all_processes(tool, tiny, tmp_path):
    def work() -> tuple[int, str]:
        outcome = tool("train", *tiny, "train.batch_size=3", "--output-dir", tmp_path / "run")
        return outcome.code, outcome.err

    for (code, error), start in zip(in_two_ranks(work), ("error: ", "error (rank 1): "), strict=True):
        assert code == 2
        assert error.startswith(f"{start}train.batch_size 3 does not divide into 2 processes")
        assert error.endswith("use a multiple of 2\n")
        assert error.count("\n") == 1
