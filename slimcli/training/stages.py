"""The kinds of stages. The training runs them one after another and knows no more of them than `Stage` says."""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from slimcli.errors import Interrupted
from slimcli.recipe import StageSection
from slimcli.training.checkpoint import restore_random, seed_epoch, set_epoch
from slimcli.training.control import Control, Stopped
from slimcli.training.faults import Faults
from slimcli.training.learner import Learner
from slimcli.training.run import EpochSums, Position, Run
from slimcli.training.session import Session
from slimcli.training.validation import scores_text, validate

STEP_ROWS_PER_EPOCH = 20
#: an estimate of the time takes so many steps, or as many as fit in so many seconds
TIMED_STEPS, TIMED_SECONDS = 4, 5.0


class Stage(ABC):
    """One stage of a recipe: number (from 0), what it does, and what that costs."""

    def __init__(self, session: Session, number: int) -> None:
        self.session, self.number = session, number
        self.section: StageSection = session.recipe.stages[number]
        count = len(session.recipe.stages)
        self.title = f"stage {number + 1}/{count} ({self.section.title})"
        #: batches of training that come before it in the run, for dashboards
        self.epochs_before = sum(stage.epochs for stage in session.recipe.stages[:number])

    @property
    @abstractmethod
    def updates(self) -> int:
        """How many updates the optimizer makes."""

    @property
    @abstractmethod
    def work(self) -> float:
        """What it takes, about, in forward passes of a batch."""

    @abstractmethod
    def run(self, run: Run, state: dict[str, Any] | None, control: Control) -> None:
        """Do it, from `run.position` on; `state` is a checkpoint taken in it, or None at its start.

        Raises `Interrupted` after a checkpoint when asked to stop.
        """

    @abstractmethod
    def seconds(self) -> float:
        """How long it takes on this machine, from a few timed steps, without the validations. Spoils the model."""

    def row(self, epoch: int) -> dict[str, Any]:
        """What every row of metrics says of its place; `epoch` counts from 0."""
        section = self.section
        return {"stage": self.number + 1, "learns": section.learns, "mode": section.mode, "epoch": epoch + 1}


class LearningStage(Stage):
    """A stage that learns by gradients: the flat loop over epochs and batches."""

    @property
    def batches(self) -> int:
        """Batches of an epoch, in this process."""
        return len(self.session.learn_from)

    @property
    def updates_per_epoch(self) -> int:
        """An incomplete group at the end of an epoch makes an update as well."""
        return -(-self.batches // self.session.recipe.optimizer.accumulation)

    @property
    def updates(self) -> int:
        return self.section.epochs * self.updates_per_epoch

    @property
    def work(self) -> float:
        return self.section.epochs * (self._train_work + len(self.session.check_on))

    @property
    def _train_work(self) -> float:
        # forward, and twice that backward unless the backbone is frozen
        passes = min(3, len(self.section.keep_rates or (1,)))
        return self.batches * passes * (2.0 if self.section.learns == "life" else 3.0)

    def run(self, run: Run, state: dict[str, Any] | None, control: Control) -> None:
        learner = Learner(self.session, self.section, self.updates_per_epoch)
        self.faults = Faults(self.session, run, self.title)
        sums = EpochSums()
        if state is not None and state["optimizer"] is not None:
            sums = learner.load(state)
        else:
            state = None
        control.work.part(run.position.epoch * (self.work / self.section.epochs))
        try:
            for epoch in range(run.position.epoch, self.section.epochs):
                self._train(epoch, learner, sums, run, state, control)
                self._end_epoch(epoch, learner, sums, run, control)
                sums, state = EpochSums(), None
        finally:
            learner.close()

    def _train(
        self, epoch: int, learner: Learner, sums: EpochSums, run: Run, state: dict[str, Any] | None, control: Control
    ) -> None:
        """The batches of an epoch, from `run.position` on."""
        session, at = self.session, run.position
        accelerator, accumulation = session.accelerator, session.recipe.optimizer.accumulation
        epochs_before = self.epochs_before + epoch
        progress = control.work.part(
            self._train_work, f"stage {self.number + 1} epoch {epoch + 1}/{self.section.epochs}  "
        )
        interval = max(1, self.batches // STEP_ROWS_PER_EPOCH)
        written = time.monotonic()
        seed_epoch(session.recipe.seed, epochs_before, accelerator.process_index)
        set_epoch(session.learn_from, epochs_before)
        learner.start_epoch()
        for batch, images, targets in self._batches(at.batch, state, sums):
            clock = time.perf_counter()
            lr = control.step_schedule(learner.scheduler, learner.optimizer, at.update)
            last = (batch + 1) % accumulation == 0 or batch + 1 == self.batches
            step = learner.step(images, targets, at.update, last)
            at.batch, at.update = batch + 1, at.update + last
            note = self.faults.note(epoch, epochs_before, batch, step)
            if note is not None:
                control.log(note)
            if math.isfinite(step.loss) and step.updated is not False:
                sums.loss += step.loss * len(images)
                sums.hits += step.hits
                sums.images += len(images)
            sums.seconds += time.perf_counter() - clock
            progress(self._said(learner, sums, lr), batch + 1, self.batches)
            if at.batch % interval == 0:
                row = self._row(epoch, at.batch, sums.gathered(accelerator), lr)
                run.add({"event": "step", **row}, epochs_before * self.batches + at.batch)
            # no checkpoint holds gradients that are still adding up, or follows an update that was left out
            if last:
                stopping = control.stopping(accelerator)
                due = (time.monotonic() - written) / 60 >= session.recipe.checkpoint_minutes
                if stopping or (due and not self.faults.in_a_row):
                    run.checkpoint(session.model, learner.optimizer, accelerator.scaler, sums, learner.ema)
                    written = time.monotonic()
                if stopping:
                    raise Interrupted(str(run.folder))
        self.faults.check_epoch(epoch, sums.gathered(accelerator).images)

    def _batches(
        self, done: int, state: dict[str, Any] | None, sums: EpochSums
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The batches of an epoch after the first `done`, numbered, on the device."""
        device = self.session.device
        clock = time.perf_counter()
        for batch, (images, targets) in enumerate(self.session.learn_from):
            if batch < done:
                continue
            if batch == done > 0 and state is not None:
                restore_random(state["random"])
                clock = time.perf_counter()
            waited = time.perf_counter() - clock
            sums.waited += waited
            sums.seconds += waited
            yield batch, images.to(device), targets.to(device)
            clock = time.perf_counter()

    def _end_epoch(self, epoch: int, learner: Learner, sums: EpochSums, run: Run, control: Control) -> None:
        """Validate, save, and go to the next epoch or stage."""
        session, section, at = self.session, self.section, run.position
        accelerator, model = session.accelerator, session.model
        learner.task.finish()
        progress = control.watched(control.work.part(len(session.check_on), self._label(epoch)), accelerator)
        try:
            found = validate(session, learner.result, "none" if section.mode == "none" else "hard", progress)
        except Stopped:
            run.checkpoint(model, learner.optimizer, accelerator.scaler, sums, learner.ema)
            raise Interrupted(str(run.folder)) from None
        row = self._row(epoch, at.batch, sums.gathered(accelerator), learner.lr)
        values = {f"val_{key}": value for key, value in found.row().items()}
        run.add({"event": "epoch", **row, **values}, (self.epochs_before + epoch + 1) * self.batches)
        run.save(learner.result, found.score, (self.number + 1, epoch + 1))
        control.log(
            f"{self.title} epoch {epoch + 1}/{section.epochs}: loss {row['loss']:.4f}, train {scores_text(row)}, "
            f"{'dense' if section.mode == 'none' else 'slim'} val {scores_text(found.row())}, "
            f"{row['images_per_second']:.0f} img/s, {sums.seconds:.0f} s"
        )
        if sums.waited > 0.25 * sums.seconds and sums.seconds > 5:
            control.log(
                f"the loader held training up for {100 * sums.waited / sums.seconds:.0f} % of the time: "
                "raise data.workers, set data.cache = true if the images fit in memory, or shrink them on disk"
            )
        at.epoch, at.batch = epoch + 1, 0
        if at.epoch == section.epochs:
            run.position = Position(stage=self.number + 1)
            learner.finish()
            run.checkpoint(model, scaler=accelerator.scaler)
        else:
            run.checkpoint(model, learner.optimizer, accelerator.scaler, ema=learner.ema)
        if control.stopping(accelerator):
            raise Interrupted(str(run.folder))

    def _label(self, epoch: int) -> str:
        return f"stage {self.number + 1} epoch {epoch + 1}/{self.section.epochs}  "

    def _row(self, epoch: int, batch: int, sums: EpochSums, lr: float) -> dict[str, Any]:
        loss, share = sums.mean_loss, sums.share
        cosine = self.section.loss == "cosine"
        hits = "pixel_accuracy" if self.session.model.segments else "top1"
        return {
            **self.row(epoch),
            "batch": batch,
            **({} if loss is None else {"loss": round(loss, 5)}),
            **({"similarity": round(share, 5)} if cosine else {hits: round(100 * share, 3)}),
            "lr": lr,
            "images_per_second": round(sums.speed(1), 2),
            "seconds": round(sums.seconds, 2),
        }

    def _said(self, learner: Learner, sums: EpochSums, lr: float) -> str:
        loss = f"{sums.mean_loss:.3f}" if sums.mean_loss is not None else "-"
        speed = sums.speed(self.session.accelerator.num_processes)
        measured = f"{learner.task.measure} {100 * sums.share:.1f}"
        return f"loss {loss}  {measured}  lr {lr:.0e}  {speed:.0f} img/s"

    def seconds(self) -> float:
        learner = Learner(self.session, self.section, self.updates_per_epoch)
        learner.start_epoch()
        times: list[float] = []
        clock = begin = time.perf_counter()
        for batch, images, targets in self._batches(0, None, EpochSums()):
            learner.step(images, targets, batch, True)
            times.append(time.perf_counter() - clock)
            clock = time.perf_counter()
            if len(times) > TIMED_STEPS or clock - begin > TIMED_SECONDS:
                break
        learner.close()
        # the first step also starts the loader's processes and warms up
        return statistics.median(times[1:] or times) * self.batches * self.section.epochs
