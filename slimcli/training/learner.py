"""One step of a stage that learns by gradients: forward, backward, update; never with a value that is not finite."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from slimcli.recipe import StageSection
from slimcli.slimming import SlimModel
from slimcli.training.optimizer import choose_parameters, make_optimizer, make_scheduler, set_training
from slimcli.training.run import EpochSums
from slimcli.training.session import Session
from slimcli.training.tasks import keep_rates_of_step, make_task


class Step(NamedTuple):
    """What came of a batch: mean loss, sum of hits, and whether its update was made; None where none was due."""

    loss: float
    hits: float
    updated: bool | None


class Learner:
    """The model of a stage with its task, optimizer, schedule and average."""

    def __init__(self, session: Session, stage: StageSection, updates_per_epoch: int) -> None:
        recipe = session.recipe
        self.session, self.stage = session, stage
        self.accelerator, self.model = session.accelerator, session.model
        self.accumulation, self.clip_grad = recipe.optimizer.accumulation, recipe.optimizer.clip_grad
        self.updates = stage.epochs * updates_per_epoch
        choose_parameters(self.model, stage)
        self.model.grad_checkpointing = recipe.optimizer.grad_checkpointing
        optimizer = make_optimizer(self.model, stage, recipe)
        self.scheduler = make_scheduler(optimizer, stage, updates_per_epoch)
        # averages from the start of the stage on: the decay grows from 0 to what is asked for
        self.ema = ModelEmaV3(self.model, decay=stage.ema, use_warmup=True) if stage.ema is not None else None
        self.task = make_task(self.model, stage, session.teacher, recipe.augmentation)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.task, optimizer)

    @property
    def result(self) -> SlimModel:
        """The model that is validated and saved: the average, where the stage has one."""
        return self.model if self.ema is None else cast(SlimModel, self.ema.module)

    @property
    def lr(self) -> float:
        """The highest learning rate at present."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def load(self, state: dict[str, Any]) -> EpochSums:
        """Go on from a checkpoint that was taken in this stage; return the sums of its epoch."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return EpochSums(**state["sums"])

    def start_epoch(self) -> None:
        """Training mode for what learns."""
        set_training(self.model, self.stage)
        self.optimizer.zero_grad()

    def step(self, images: Tensor, targets: Tensor, update: int, last: bool) -> Step:
        """Learn from a batch (B, 3, H, W) with classes (B,); `last` of its group makes the update number `update`."""
        self.task.start(update / max(1, self.updates - 1))
        with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            loss, hits = self._gradients(images, targets)
        # a step's own schedule and temperature are in no checkpoint: a run that goes on would take them for the model's
        self.task.finish()
        return Step(loss, hits, self._update(update + 1) if last else None)

    def _gradients(self, images: Tensor, targets: Tensor) -> tuple[float, float]:
        passes = keep_rates_of_step(self.stage)
        total = hits = 0.0
        # several processes wait for the gradients of all weights after each pass
        share_blocks = len(passes) > 1 and self.accelerator.num_processes == 1
        with self.accelerator.autocast():
            batch = self.task.batch(images, targets)
        with self.model.untouched_blocks_once() if share_blocks else nullcontext():
            for keep_rate in passes:
                with self.accelerator.autocast():
                    found = self.wrapped(batch, keep_rate)
                value = found["loss"].item()
                # a gradient that is surely not finite tells the update, and all processes, to leave this group out
                loss = found["loss"] if math.isfinite(value) else found["loss"] * float("nan")
                self.accelerator.backward(loss / len(passes) / self.accumulation)
                total += value / len(passes)
                hits = float(found["hits"])
        return total, hits

    def _update(self, number: int) -> bool:
        """Make an update, unless its gradient is not finite; whether it was made."""
        parameters = [parameter for parameter in self.task.parameters() if parameter.grad is not None]
        if self.clip_grad is not None:
            norm = self.accelerator.clip_grad_norm_(parameters, self.clip_grad)
        else:
            norm = torch.nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
        finite = bool(torch.isfinite(torch.as_tensor(norm)))
        # the scaler of float16 leaves such an update out itself, and must see it to lower its scale
        if finite or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None and finite:
            self.ema.update(self.model, number)
        return finite

    def finish(self) -> None:
        """The model continues as the stage leaves it: with the average's weights, where there is one."""
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())

    def close(self) -> None:
        """Give the model its schedule and temperature back, and the memory of the optimizer to the others."""
        self.task.finish()
        self.accelerator.free_memory(self.wrapped, self.optimizer)
