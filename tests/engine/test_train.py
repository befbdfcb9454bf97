"""The training loop, on toys whose gradients are known, and once on the detector itself."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fpn_det import build
from fpn_det.config import load_config
from fpn_det.engine.diagnosis import Diverged, SkippedSteps
from fpn_det.engine.distributed import Process
from fpn_det.engine.evaluate import View, evaluate
from fpn_det.engine.memory import explained_memory_errors
from fpn_det.engine.optim import MovingAverage, make_optimizer
from fpn_det.engine.precision import loss_scaler
from fpn_det.engine.runlog import RunLog
from fpn_det.engine.train import Window, format_seconds, step_seed, train
from fpn_det.structures import Batch, InputError, Targets


class Toy(nn.Module):
    """One weight per pixel; the loss is the mean over the images, plus noise if asked."""

    def __init__(self, *, noise: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 2, 2), 0.5))
        self.noise = noise

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        out = (batch.images.float() / 255 * self.weight).sum((1, 2, 3))
        fit = ((out - batch.image_ids.float()) ** 2).mean()
        return {"fit": fit, "noise": self.noise * torch.rand(()) * self.weight.sum()}, {"seen": batch.image_ids[0]}


def batch_of(ids: list[int]) -> Batch:
    images = torch.stack([torch.arange(12, dtype=torch.uint8).view(3, 2, 2) * (i % 7 + 1) for i in ids])
    empty = Targets(
        boxes=torch.zeros(len(ids), 0, 4),
        labels=torch.zeros(len(ids), 0, dtype=torch.int64),
        valid=torch.zeros(len(ids), 0, dtype=torch.bool),
    )
    sizes = torch.full((len(ids), 2), 2)
    numbers = torch.tensor(ids)
    return Batch(images=images, sizes=sizes, targets=empty, image_ids=numbers, original_sizes=sizes, seeds=numbers)


def stream(size: int, start: int = 0) -> Iterator[Batch]:
    return (batch_of(list(range(i * size, (i + 1) * size))) for i in itertools.count(start))


class Run:
    """Trains a toy and notes what the loop called."""

    def __init__(self, model: nn.Module | None = None, *, momentum: float = 0.9, max_skipped: int = 0) -> None:
        self.skipped = SkippedSteps(limit=max_skipped)
        self.scaler = loss_scaler(torch.device("cpu"), "fp32")
        self.model = model or Toy()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=momentum)
        self.calls: list[tuple[str, int]] = []

    def evaluate(self, step: int) -> bool:
        self.calls.append(("evaluate", step))
        return False

    def __call__(self, batches: Iterator[Batch], *, log_folder: Path | None = None, **options) -> int:
        num_steps, start = options.pop("num_steps", 6), options.pop("start_step", 0)
        options = {"lr_at": lambda step: 1e-4, "log_every": 1, "save_every": 1000, "seed": 0} | options
        options.setdefault("save", lambda step: self.calls.append(("save", step)))
        with RunLog(log_folder, start_step=start, num_steps=num_steps) as log:
            return train(
                self.model,
                batches,
                optimizer=self.optimizer,
                start_step=start,
                num_steps=num_steps,
                process=Process(),
                log=log,
                scaler=self.scaler,
                skipped=self.skipped,
                note_unreadable=lambda image_ids: None,
                **{"evaluate": self.evaluate} | options,
            )


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_one_step_is_plain_sgd(tmp_path):
    run = Run(momentum=0)
    twin = Toy()
    losses, _ = twin(batch_of([0, 1]))
    losses["fit"].backward()
    assert run(stream(2), num_steps=1, lr_at=lambda step: 0.25, log_folder=tmp_path) == 1
    assert torch.equal(run.model.weight, (twin.weight - 0.25 * twin.weight.grad).detach())
    [record] = records(tmp_path)
    assert record["loss/total"] == pytest.approx(losses["fit"].item())
    assert record["loss/fit"] == pytest.approx(losses["fit"].item())
    assert record["train/grad_norm"] == pytest.approx(twin.weight.grad.norm().item())
    assert record["train/lr"] == 0.25


def test_accumulating_equals_one_batch():
    whole, halves = Run(), Run()
    whole(stream(4), num_steps=5)
    halves(stream(2), num_steps=5, accumulate=2)
    assert torch.allclose(whole.model.weight, halves.model.weight, atol=1e-6)
    assert not torch.allclose(whole.model.weight, Toy().weight, atol=1e-3)


def test_learning_rate_and_clipping():
    run = Run(momentum=0)
    before = run.model.weight.detach().clone()
    steps = []
    run(stream(2), num_steps=3, lr_at=lambda step: steps.append(step) or 0.5, clip_norm=1e-3)
    assert steps == [0, 1, 2]
    assert (run.model.weight - before).norm().item() <= 3 * 0.5 * 1e-3 * 1.001
    assert run.optimizer.param_groups[0]["lr"] == 0.5


def test_resuming_equals_the_straight_run():
    """The noise shows that the randomness of a step depends on its number alone."""
    options = {"accumulate": 2, "num_steps": 6}
    straight = Run(Toy(noise=1.0))
    straight(stream(2), **options)
    first = Run(Toy(noise=1.0))
    first(stream(2), **options | {"num_steps": 3})
    second = Run(Toy(noise=1.0))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    torch.rand(7)  # whatever happened meanwhile
    second(stream(2, start=6), **options, start_step=3)
    assert torch.equal(straight.model.weight, second.model.weight)
    other_seed = Run(Toy(noise=1.0))
    other_seed(stream(2), **options, seed=1)
    assert not torch.equal(straight.model.weight, other_seed.model.weight)


def test_step_seeds_differ():
    seeds = {step_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(4)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**63 for s in seeds)


def test_moving_average():
    run = Run()
    average = MovingAverage(run.model, decay=0.75)
    expected, weights = None, []
    run(stream(2), num_steps=3, ema=average, save_every=1, save=lambda s: weights.append(run.model.weight.clone()))
    for weight in weights:
        expected = weight if expected is None else 0.75 * expected + 0.25 * weight
    assert torch.allclose(average.module.weight, expected, atol=1e-7)
    assert not torch.equal(average.module.weight, run.model.weight)


def test_saving_and_evaluating(tmp_path):
    run = Run()
    assert run(stream(2), num_steps=7, save_every=3, evaluate_every=3, log_every=5, log_folder=tmp_path) == 7
    # Saving comes first; the end saves but leaves the evaluation to the caller.
    assert run.calls == [("save", 3), ("evaluate", 3), ("save", 6), ("evaluate", 6), ("save", 7)]
    assert [r["step"] for r in records(tmp_path)] == [3, 5, 6, 7]
    run = Run()
    run(stream(2), num_steps=4, save_every=2, evaluate_every=4)
    assert run.calls == [("save", 2), ("save", 4)]


def test_the_model_trains_after_an_evaluation():
    run = Run()
    modes = []
    run.model.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    run.model.eval()
    run(stream(2), num_steps=2)
    assert modes == [True, True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(number):
    run = Run()
    before = signal.getsignal(number)

    def batches() -> Iterator[Batch]:
        for i, batch in enumerate(stream(2)):
            if i == 2:
                os.kill(os.getpid(), number)
            yield batch

    assert run(batches(), num_steps=6, log_every=100) == 3
    assert run.calls == [("save", 3)]
    assert signal.getsignal(number) is before


def test_a_signal_during_an_evaluation_stops_after_it(capfd):
    run = Run()

    def evaluate(step: int) -> bool:
        run.calls.append(("evaluate", step))
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    run.evaluate = evaluate  # type: ignore[method-assign]
    assert run(stream(2), num_steps=6, evaluate_every=2) == 2
    assert run.calls == [("save", 2), ("evaluate", 2)]
    assert capfd.readouterr().err.splitlines()[1:] == ["stopping after this step and saving; once more to stop at once"]


def test_a_signal_saves_when_the_console_is_gone():
    """As after Ctrl-C on `train.py 2>&1 | tee log`, which ends both."""
    reading, writing = os.pipe()
    os.close(reading)
    console = os.dup(2)
    os.dup2(writing, 2)
    try:
        test_a_signal_stops_after_the_step(signal.SIGINT)
    finally:
        os.dup2(console, 2)
        os.close(console)
        os.close(writing)


def test_a_signal_during_an_evaluation_after_a_skipped_step_stops_after_the_next():
    """Nothing was saved before that evaluation: stopping there would lose the steps."""
    run = Run(Failing({2}), max_skipped=1)

    def evaluate(step: int) -> bool:
        run.calls.append(("evaluate", step))
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    assert run(stream(2), num_steps=6, evaluate_every=2, evaluate=evaluate) == 3
    assert run.calls == [("evaluate", 2), ("save", 3)]


def test_a_second_signal_acts_as_usual():
    def batches() -> Iterator[Batch]:
        noting = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is noting:  # two at once would be one
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        yield from stream(2)

    with pytest.raises(KeyboardInterrupt):
        Run()(batches())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Failing(Toy):
    """A loss that is `value` in batches with an image of `ids`; a norm with running statistics."""

    def __init__(self, ids: set[int], value: float = math.nan) -> None:
        super().__init__()
        self.ids = ids
        self.value = value
        self.norm = nn.BatchNorm2d(3)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        factor = self.value if self.ids & set(batch.image_ids.tolist()) else 1.0
        losses, stats = super().forward(batch)
        normed = self.norm(batch.images.float() * factor).square().mean()
        return losses | {"fit": losses["fit"] * factor, "normed": normed}, stats


def everything(run: Run) -> list[Tensor]:
    """Weights, statistics and moments."""
    moments = [
        value
        for p in run.model.parameters()
        for name, value in sorted(run.optimizer.state[p].items())
        if isinstance(value, Tensor)
    ]
    return [t.clone() for t in [*run.model.state_dict().values(), *moments] if t.is_floating_point()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, value, accumulate, kind, fused):
    """Neither the first step, where a fused SGD has no moments yet, nor a later one."""

    def trained(batches: Iterator[Batch], num_steps: int, start_step: int = 0) -> Run:
        torch.manual_seed(0)
        run = Run(Failing({0, 9}, value), max_skipped=2)
        options = {"momentum": 0.9, "weight_decay": 0.1, "norm_weight_decay": 0.0, "fused": fused}
        run.optimizer = make_optimizer(run.model, kind=kind, lr=1.0, **options)
        folder = tmp_path / str(num_steps)
        folder.mkdir()
        run(batches, num_steps=num_steps, accumulate=accumulate, lr_at=lambda step: 0.01, log_folder=folder)
        return run

    size = 4 // accumulate
    micro = [batch_of(list(range(i, i + size))) for i in range(0, 16, size)]
    run = trained(iter(micro), 4)  # images 0 and 9: steps 0 and 2
    without = trained(iter(micro[4 // size : 8 // size] + micro[12 // size :]), 2)
    for one, other in zip(everything(run), everything(without), strict=True):
        assert torch.equal(one, other)
    assert run.skipped.count == 2
    assert not torch.equal(run.model.weight, Toy().weight)
    [first, second, third, fourth] = records(tmp_path / "4")
    assert "loss/total" not in first
    assert [r["train/skipped_steps"] for r in (first, second, third, fourth)] == [1, 1, 2, 2]
    assert math.isfinite(fourth["loss/total"])
    text = (tmp_path / "4" / "log.txt").read_text()
    assert f"step 1 skipped: fit is {value}" in text
    assert "images 0, 1, 2, 3)" in text


def test_too_many_steps_that_are_not_finite_end_the_run(tmp_path):
    run = Run(Failing({6, 8}), max_skipped=1)
    with pytest.raises(Diverged, match=r"2 of the last 1,000 steps .* step 4 skipped: fit is nan"):
        run(stream(2), save_every=3, log_every=2, log_folder=tmp_path)
    assert run.calls == [("save", 3)]
    diagnosis = json.loads((tmp_path / "diagnosis.json").read_text())
    assert [f["step"] for f in diagnosis["failed_steps"]] == [4, 5]
    failed = diagnosis["failed_steps"][0]
    assert failed["losses"]["fit"] == failed["losses"]["loss"] == "nan"
    assert failed["lr"] == 1e-4
    assert [i["id"] for i in failed["images"]] == [6, 7]
    assert failed["gradient_norms"].keys() == {"total", "weight", "norm"}
    assert failed["gradient_norms"]["total"] == failed["gradient_norms"]["weight"] == "nan"
    assert [m["step"] for m in diagnosis["means_before"]] == [2, 3]
    assert {"cause", "evidence", "remedy"} == diagnosis["likely_causes"][0].keys()


def test_a_gradient_that_is_not_finite_is_named_by_its_part():
    class Steep(Toy):
        def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            return {"fit": (self.weight - 0.5).sqrt().sum()}, {}  # 0, with an infinite slope

    run = Run(Steep())
    with pytest.raises(Diverged, match=r"step 1 skipped: the gradient of weight is (nan|inf)"):
        run(stream(2))
    assert run.calls == []
    assert torch.equal(run.model.weight, Toy().weight)


def test_nothing_is_saved_from_a_step_that_was_skipped():
    """But at the end, and when stopped: then nothing comes after."""
    run = Run(Failing({4, 10}), max_skipped=2)
    run(stream(2), num_steps=6, save_every=3)  # images 4 and 10: steps 2 and 5
    assert run.calls == [("save", 4), ("save", 6)]  # after step 2 it is made up for


def test_what_was_skipped_before_counts_in_all_but_the_limit():
    run = Run(Failing({0}))
    run.skipped = SkippedSteps(limit=1, state={"count": 7, "recent": []})
    run(stream(2), num_steps=2)
    assert run.skipped.count == 8


def test_float16_lowers_the_loss_scale_until_the_gradient_fits(tmp_path):
    """Overflow at a large scale is no fault of the run, at a scale of 1 it is."""
    run = Run(max_skipped=0)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    run(stream(2), num_steps=40, precision="fp16", log_folder=tmp_path)
    assert 1 < run.skipped.count < 35
    assert run.scaler.get_scale() == 2.0 ** (127 - run.skipped.count)
    assert "loss scale" in (tmp_path / "log.txt").read_text()

    run = Run(Failing(set(range(100))), max_skipped=3)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    with pytest.raises(Diverged, match=r"4 of the last .* float16"):
        run(stream(2), num_steps=20, precision="fp16")
    assert run.skipped.count == 4 + 4  # 16, 8, 4, 2 do not count against the limit


def test_out_of_memory_says_what_to_lower():
    class Large(Toy):
        def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    explained = explained_memory_errors(batch_of([0, 1]), torch.device("cuda", 3), remedy="Buy more.")
    with pytest.raises(InputError, match="out of memory on cuda:3: 2 images"), explained:
        raise RuntimeError("CUDNN_STATUS_ALLOC_FAILED")
    message = (
        r"out of memory on cpu: 2 images padded to 2x2 .* with 0, 0 boxes, ids 0, 1\. Lower train.batch_size.*"
        r"train.accumulate.*data.short_sides.*2\.00 GiB"
    )
    with pytest.raises(InputError, match=message):
        Run(Large())(stream(2))

    class Huge(Toy):
        def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            return {"fit": torch.empty(2**60)[0]}, {}

    with pytest.raises(InputError, match="out of memory on cpu"):
        Run(Huge())(stream(2))


def test_an_evaluation_may_end_the_training():
    run = Run()
    assert run(stream(2), num_steps=6, evaluate_every=2, evaluate=lambda step: step == 4) == 4
    assert run.calls == [("save", 2), ("save", 4)]


def test_window_means():
    window = Window(["total"])

    def step(value: float, finite: bool = True) -> None:
        for part in (value - 1, value + 1):
            window.add(batch_of([0, 1]), {"loss/total": torch.tensor(part)})
        rest = {"norms": torch.tensor([value + 2]), "finite": torch.tensor(finite), "loss_scale": torch.tensor(1.0)}
        window.end_step(7, lr=0.1, **rest)

    for value in (1.0, 2.0, 6.0):
        step(value)
        window.waited(0.0)
    step(math.nan, finite=False)
    scalars, [failed], unreadable = window.close(Process())
    assert unreadable is None
    assert (scalars["loss/total"], scalars["train/grad_norm"]) == (3.0, 5.0)
    assert scalars["speed/images_per_s"] * scalars["speed/s_per_step"] == pytest.approx(4)
    assert (failed.step, failed.lr, failed.image_ids()) == (7, 0.1, [0, 1, 0, 1])
    assert all(len(batch.images.untyped_storage()) == 0 for batch in failed.batches)  # pixels are not kept
    step(7.0)
    window.add(replace(batch_of([3]), unreadable=torch.tensor([9, 4, 9])), {"loss/total": torch.tensor(7.0)})
    step(7.0)
    scalars, failures, unreadable = window.close(Process())
    assert (scalars["loss/total"], failures) == (7.0, [])  # nothing left over
    assert unreadable == [4, 9]


def test_format_seconds():
    assert [format_seconds(s) for s in (0.4, 59.6, 3599, 360_000)] == ["0:00:00", "0:01:00", "0:59:59", "100:00:00"]


def test_four_images_are_learned_by_heart(shapes, tiny, tmp_path):
    """Everything between an image file and AP must be right for this."""
    content = json.loads((shapes / "annotations/train.json").read_text())
    crowds = {a["image_id"] for a in content["annotations"] if a["iscrowd"]}
    num_objects = Counter(a["image_id"] for a in content["annotations"])
    filled = {i for i, n in num_objects.items() if n <= 4} - crowds
    content["images"] = [i for i in content["images"] if i["id"] in filled][:4]
    kept = {i["id"] for i in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    annotations = tmp_path / "four.json"
    annotations.write_text(json.dumps(content))
    overrides = [
        f"data.{s}.{key}"
        for s in ("train", "val")
        for key in (f"annotations={annotations}", f"images={shapes / 'train'}")
    ]
    overrides += ["data.horizontal_flip=0", "train.steps=180", "optim.lr=1e-3", "optim.scale_lr=false"]
    overrides += ["optim.warmup_steps=5", "model.neck.channels=64", "model.roi_head.box_head.fc_dim=128"]
    overrides += ["model.rpn.pre_nms_top_k_train=100", "model.rpn.pre_nms_top_k_test=100"]
    overrides += ["model.roi_head.num_samples=64", "data.group_by_aspect=false", "eval.batch_size=4"]
    config = load_config(Path(tiny[1]), [*tiny[2:], *overrides])

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = build.load_train_data(config)
    model = build.build_model(config, len(data.categories), pretrained=False)
    with RunLog(None, start_step=0, num_steps=180) as log:
        train(
            model,
            build.build_train_loader(config, data),
            optimizer=build.build_optimizer(config, model),
            lr_at=build.build_schedule(config, 180),
            start_step=0,
            num_steps=180,
            seed=0,
            process=Process(),
            log=log,
            scaler=loss_scaler(torch.device("cpu"), "fp32"),
            skipped=SkippedSteps(limit=0),
            note_unreadable=lambda image_ids: None,
            save=lambda step: None,
            evaluate=lambda step: False,
            clip_norm=10,
            log_every=50,
        )
    evaluated = evaluate(
        model,
        [View(batches=build.build_val_loader(config, build.load_val_data(config)))],
        truth=build.load_ground_truth(config),
        categories=data.categories,
        backend="pycocotools",
        nms_thresh=0.5,
        max_detections=100,
        precision="fp32",
        process=Process(),
    )
    assert evaluated is not None
    assert evaluated[0]["AP"] > 0.9, evaluated
    assert model.training
