"""Batches whose loss or gradient is not finite: left out, named, and a reason to stop when they do not end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimcli.data import ImageSamples
from slimcli.errors import SlimError
from slimcli.training.checkpoint import set_epoch
from slimcli.training.learner import Step
from slimcli.training.run import Run
from slimcli.training.session import Session

#: updates in a row that may be left out; float16 also leaves out those that only need a smaller scale
MOST_LEFT_OUT, MOST_IN_FLOAT16 = 5, 25
#: files that a message names
NAMED = 4


class Faults:
    """Counts the updates in a row that were not made, and says which images they were of."""

    def __init__(self, session: Session, run: Run, title: str) -> None:
        self.session, self.run, self.title = session, run, title
        self.scales = session.accelerator.scaler is not None
        self.group: list[tuple[int, float]] = []
        self.in_a_row = 0
        self.last = ""

    def note(self, epoch: int, epochs_before: int, batch: int, step: Step) -> str | None:
        """Take note of a batch (counted from 0); a line for the log if its update was left out.

        `SlimError` after too many in a row.
        """
        self.group.append((batch, step.loss))
        if step.updated is None:
            return None
        group, self.group = self.group, []
        if step.updated:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        bad = [(number, loss) for number, loss in group if not math.isfinite(loss)]
        lost = self.in_a_row >= (MOST_IN_FLOAT16 if self.scales else MOST_LEFT_OUT)
        if self.scales and not bad and not lost:
            return None
        what = f"the loss became {bad[0][1]}" if bad else "the gradient became nan or inf"
        numbers = [number for number, _ in bad or group]
        images = self.last = self.images(epochs_before, numbers)
        place = f"{self.title} epoch {epoch + 1}: {what} at batch {', '.join(str(n + 1) for n in numbers)}"
        if not lost:
            return f"{place}, which is left out{images}"
        raise SlimError(f"{place}, after {self.in_a_row - 1} others in a row{images}: {self.advice(images)}")

    def check_epoch(self, epoch: int, learned: int) -> None:
        """`SlimError` if nothing was learned from in a whole epoch."""
        if not learned:
            raise SlimError(
                f"{self.title} epoch {epoch + 1}: loss or gradient became nan or inf in all batches{self.last}: "
                f"{self.advice(self.last)}"
            )

    def advice(self, images: str) -> str:
        """What to try, and where the last good weights are."""
        ways = (
            ["mend or take out the blank images" if "(blank)" in images else "look at these images"] if images else []
        )
        ways.append("try a smaller lr or optimizer.clip_grad")
        if self.session.recipe.precision != "float32":
            ways.append('try precision = "float32"')
        return f"{', or '.join(ways)}; {self.run.folder} keeps the last good checkpoint"

    def images(self, epochs_before: int, batches: Sequence[int]) -> str:
        """The images of these batches of this process, blank ones first; empty where a stream does not tell."""
        dataset = self.session.train_set
        if not isinstance(dataset, ImageSamples):
            return ""
        places = batch_places(self.session.learn_from, epochs_before, batches)
        named = [(kind(dataset[place][0]), dataset.name(dataset.indices[place])) for place in places]
        named.sort(key=lambda pair: not pair[0])
        words = ", ".join(f"{name} ({word})" if word else name for word, name in named[:NAMED])
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        return f" ({len(named)} images: {words}{more})"


def batch_places(loader: Any, epoch: int, batches: Sequence[int]) -> list[int]:
    """Which samples of the data set the batches (counted from 0) of an epoch hold, by drawing the order again."""
    set_epoch(loader, epoch)
    wanted = set(batches)
    places: list[int] = []
    for number, samples in enumerate(loader.batch_sampler):
        if number in wanted:
            places += samples
        if number >= max(wanted):
            break
    # the order is drawn anew from the seed and the epoch, so this leaves no trace
    set_epoch(loader, epoch)
    return places


def kind(image: Tensor) -> str:
    """What is odd about an image (3, H, W): `blank` if all pixels are alike, `not finite`; else empty."""
    if not bool(torch.isfinite(image).all()):
        return "not finite"
    flat = image.flatten(1)
    return "blank" if bool((flat.amax(1) - flat.amin(1) < 1e-6).all()) else ""
