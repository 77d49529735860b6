"""How long work tells whoever waits for it how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

#: called with what is being done, how much of it is done, and how much there is
Progress = Callable[[str, float, float], None]


def no_progress(_label: str, _done: float, _total: float) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Step:
    """A piece of work that is known ahead: its name, about how long it takes in any unit, and how many steps it is."""

    name: str
    weight: float
    #: more than one where the work makes `Steps` of its own, which are then counted here
    steps: int = 1


@dataclass(frozen=True)
class Part:
    """The progress of one step, told as the progress of the whole."""

    progress: Progress
    step: Step
    #: the number of the first step in it, and of all steps of the whole; 0: labels have no numbers
    first: int
    count: int
    before: float
    whole: float

    def __call__(self, label: str, done: float, total: float) -> None:
        share = min(max(done / total, 0.0), 1.0) if total > 0 else 0.0
        if self.count and self.step.steps == 1:
            label = f"step {self.first} of {self.count}: {self.step.name}"
        self.progress(label or self.step.name, self.before + self.step.weight * share, self.whole)


class Steps:
    """Work in steps that are known ahead: each reports the share of the whole that is done.

    With `numbered`, labels are "step 3 of 9: name"; else the work of a step names itself. Steps within a numbered
    step go on with its numbers where it said how many they are.
    """

    def __init__(self, progress: Progress, steps: Sequence[Step], numbered: bool = False) -> None:
        self._progress, self._left = progress, list(steps)
        self._whole = sum(step.weight for step in steps) or 1.0
        self._before, self._number = 0.0, 1
        self._count = sum(step.steps for step in steps) if numbered else 0
        if isinstance(progress, Part):
            goes_on = progress.count > 0 and progress.step.steps == sum(step.steps for step in steps) > 1
            self._count = progress.count if goes_on else self._count if progress.count == 0 else 0
            self._number = progress.first if goes_on else 1

    @contextmanager
    def step(self) -> Iterator[Progress]:
        """The next step: what it is given reports the progress of the whole."""
        step = self._left.pop(0)
        part = Part(self._progress, step, self._number, self._count, self._before, self._whole)
        if step.steps == 1:
            part(step.name, 0.0, 1.0)
        yield part
        if step.steps == 1:
            part(step.name, 1.0, 1.0)
        self._before += step.weight
        self._number += step.steps
