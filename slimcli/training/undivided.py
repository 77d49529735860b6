"""Stages that are done whole or not at all: no checkpoint lies inside them."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any

from torch import nn

from slimcli.errors import Interrupted
from slimcli.progress import Progress
from slimcli.store.model_folder import slimming_config
from slimcli.training.checkpoint import adopt_slimming
from slimcli.training.control import Control, Stopped
from slimcli.training.run import Position, Run
from slimcli.training.stages import Stage
from slimcli.training.validation import scores_text, validate


class UndividedStage(Stage):
    """One that is stopped begins again, with the model as it was."""

    #: how the model runs when it is validated at the end
    validated_mode = "hard"

    @property
    @abstractmethod
    def taught(self) -> nn.Module:
        """The part of the model whose weights it changes."""

    @property
    @abstractmethod
    def teaching(self) -> float:
        """What it takes, about, without the validation, in forward passes of a batch."""

    @abstractmethod
    def teach(self, control: Control, progress: Progress) -> tuple[dict[str, Any], str]:
        """Do it; return what its row of metrics says beside its place, the number of batches among it, and a summary.

        Raises `Stopped` when asked to stop.
        """

    @property
    def work(self) -> float:
        return self.teaching + len(self.session.check_on)

    def run(self, run: Run, state: dict[str, Any] | None, control: Control) -> None:
        session, model, section = self.session, self.session.model, self.section
        accelerator, label = session.accelerator, f"stage {self.number + 1}  "
        begin = time.perf_counter()
        weights = {name: value.clone() for name, value in self.taught.state_dict().items()}
        slimming = slimming_config(model)
        try:
            found, summary = self.teach(control, control.watched(control.work.part(self.teaching, label), accelerator))
            progress = control.watched(control.work.part(len(session.check_on), label), accelerator)
            scores = validate(session, model, self.validated_mode, progress)
        except Stopped:
            adopt_slimming(model, slimming)
            self.taught.load_state_dict(weights)
            run.checkpoint(model)
            raise Interrupted(str(run.folder)) from None
        seconds = time.perf_counter() - begin
        row = {**self.row(section.epochs - 1), **found, "seconds": round(seconds, 2)}
        values = {f"val_{key}": value for key, value in scores.row().items()}
        run.add({"event": "epoch", **row, **values}, (self.epochs_before + section.epochs) * row["batch"])
        run.save(model, scores.score, (self.number + 1, section.epochs))
        kind = "dense" if self.validated_mode == "none" else "slim"
        control.log(f"{self.title}: {summary}; {kind} val {scores_text(scores.row())}, {seconds:.0f} s")
        run.position = Position(stage=self.number + 1)
        run.checkpoint(model)
        if control.stopping(accelerator):
            raise Interrupted(str(run.folder))
