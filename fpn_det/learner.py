"""What learns: a detector and what changes its weights, as a config describes them."""

from __future__ import annotations

from pathlib import Path

import torch

from fpn_det import build
from fpn_det.config import Config
from fpn_det.engine.checkpoint import State, best_weights, load_optimizer, load_weights
from fpn_det.engine.optim import MovingAverage
from fpn_det.engine.precision import loss_scaler
from fpn_det.finetune import load_start_weights
from fpn_det.models.faster_rcnn import DetectionModel
from fpn_det.structures import Categories


class Learner:
    """A detector with its optimiser, before the first step.

    Args:
        config: of the run.
        categories: of the data set.
        device: where it computes.
        pretrained: whether it starts from the weights that the config names; needless if a checkpoint is loaded next.

    Attributes:
        model: what is trained.
        optimizer: of its parameters.
        scaler: of its loss; enabled for `fp16` only.
        ema: the moving average of its weights, if the config asks for one.
        detector: what is evaluated and used: the average, or else the model.
        origin: what was taken from `model.weights`, for the log; empty if the config has none.

    Raises:
        InputError: the weights cannot be had or do not fit.
    """

    def __init__(self, config: Config, categories: Categories, *, device: torch.device, pretrained: bool) -> None:
        torch.manual_seed(config.seed)
        self.model: DetectionModel = build.build_model(config, len(categories), pretrained=pretrained)
        self.origin = ""
        if pretrained and config.model.weights is not None:
            self.origin = load_start_weights(config, self.model, categories)
        self.detector = build.place(config, self.model, device)
        self.optimizer = build.build_optimizer(config, self.model)
        self.scaler = loss_scaler(device, config.train.precision)
        self.ema: MovingAverage | None = None
        if config.train.ema_decay:
            self.ema = MovingAverage(self.model, decay=config.train.ema_decay)
            self.detector = build.place(config, self.ema.module, device)  # type: ignore[arg-type]

    def state_dict(self) -> State:
        """What a resumed run must know."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.ema is not None:
            state["ema"] = self.ema.module.state_dict()
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: State, source: Path) -> None:
        """Go on from the checkpoint that was read from `source`.

        Raises:
            InputError: it is of another architecture or optimiser.
        """
        load_weights(self.model, state["model"], source)
        load_optimizer(self.optimizer, state["optimizer"], source)
        if self.ema is not None:
            load_weights(self.ema.module, best_weights(state), source)
            self.ema.num_updates = state["step"]
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
