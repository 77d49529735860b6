"""Schedules by the time that they take in the runtime that will be used: fewer drops, and a speed-up reached."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from slimcli.calibration.goal import Cost
from slimcli.calibration.judge import Candidate, Ranking
from slimcli.calibration.stopwatch import Stopwatch
from slimcli.progress import Progress, no_progress
from slimcli.schedule import Schedule
from slimcli.slimming import LifeModel

#: tokens that fast kernels work on together, and how often patches leave at most
MULTIPLE, MOST_DROPS = 8, 3
#: what is faster by less than this is not worth what it gives up
WORTH = 1.03
#: how often a schedule is measured on the way to a speed-up; how far above it is near enough; and how much less time
#: than it stands for is aimed at, since measurements differ
MEASURED, CLOSE, SAFE = 5, 1.02, 0.995

#: judges a schedule: what it is worth, and None where it was dismissed early. The model is left with it
Judge = Callable[[Schedule, Ranking], "Candidate | None"]


def coarser(model: LifeModel, schedule: Schedule, goal: Cost) -> Schedule | None:
    """A schedule like this one and no dearer than `goal`, with fewer drops and tokens in eights; None if there is none.

    Patches leave together that left in neighbouring blocks.
    """
    counts = schedule.resolve(model.num_patches)
    falls = [layer for layer, (n, stay) in enumerate(itertools.pairwise(counts), 1) if stay < n]
    if not falls:
        return None
    kept = falls[:: -(-len(falls) // MOST_DROPS)]
    ends = [*kept[1:], len(counts)]
    merged = list(counts[: kept[0]])
    for first, last in itertools.pairwise([*kept, ends[-1]]):
        part = counts[first:last]
        merged += [round(sum(part) / len(part))] * len(part)
    fitting = model.at_cost(Schedule(schedule.depth, schedule.life_layer, counts=tuple(merged)), goal.multiply_adds)
    if fitting is None:
        return None
    prefix, most = model.backbone.num_prefix_tokens, model.num_patches
    rounded = [n if n == most else max(1, (n + prefix) // MULTIPLE * MULTIPLE - prefix) for n in fitting.resolve(most)]
    found = Schedule(schedule.depth, schedule.life_layer, counts=tuple(rounded))
    return found if found.drops_patches() and found != schedule else None


def _forms(model: LifeModel, attempt: Judge, best: Candidate, goal: Cost) -> list[Candidate]:
    """The best candidate, and a coarser one if there is one."""
    schedule = coarser(model, best.schedule, goal)
    other = None if schedule is None else attempt(schedule, best.ranking)
    return [best] if other is None else [best, other]


def _drops(model: LifeModel, schedule: Schedule) -> int:
    """How often patches leave."""
    return len(set(schedule.resolve(model.num_patches))) - 1


def choose_by_time(
    model: LifeModel,
    attempt: Judge,
    best: Candidate,
    goal: Cost,
    stopwatch: Stopwatch,
) -> tuple[Candidate, list[str]]:
    """The best candidate, or a coarser one where that is faster; and what to tell a user."""
    forms, faster = _forms(model, attempt, best, goal), []
    for form in forms:
        attempt(form.schedule, form.ranking)
        faster.append(stopwatch.speedup(model))
    notes = []
    chosen = len(forms) - 1 if faster[-1] > WORTH * faster[0] else 0
    other = forms[chosen]
    if other is not best:
        notes.append(
            f"{stopwatch.where} {_drops(model, other.schedule)} drops to tokens in {MULTIPLE}s are {faster[1]:.2f} "
            f"times as fast as dense, and {_drops(model, best.schedule)} drops {faster[0]:.2f} times: taken, giving up "
            f"{best.agreement - other.agreement:.2f} points of agreement with the dense model"
        )
    if faster[chosen] < 1:
        notes.append(
            f"{stopwatch.where} the slimmed model takes {1 / faster[chosen]:.2f} times as long as the dense one: what "
            "it saves does not pay here: run the dense model, larger batches, or ask for a lower cost"
        )
    return other, notes


class Reached(NamedTuple):
    """How many times as fast as the dense model a schedule is, where that was measured, and whether it is enough."""

    speedup: float
    where: str
    enough: bool

    def __str__(self) -> str:
        missed = "" if self.enough else ": what was asked for was not reached"
        return f"{self.speedup:.2f} times as fast as the dense model {self.where}{missed}"


def reach_best(
    model: LifeModel,
    attempt: Judge,
    best: Candidate,
    goal: Cost,
    stopwatch: Stopwatch,
    progress: Progress = no_progress,
) -> tuple[Candidate, Reached]:
    """Of the best candidate and a coarser one, both as fast as the stopwatch's target asks, the nearer to dense.

    The model is left with it.
    """
    forms, found = _forms(model, attempt, best, goal), []
    for number, form in enumerate(forms):

        def part(label: str, done: float, total: float, number: int = number) -> None:
            progress(label, number * total + done, len(forms) * total)

        found.append(reach(model, attempt, form, stopwatch, part))
    chosen = min(found, key=lambda one: (not one[1].enough, one[0].apart))
    attempt(chosen[0].schedule, chosen[0].ranking)
    return chosen


def reach(
    model: LifeModel,
    attempt: Judge,
    best: Candidate,
    stopwatch: Stopwatch,
    progress: Progress = no_progress,
) -> tuple[Candidate, Reached]:
    """The candidate with as many patches as the stopwatch's target allows, the form of its fall kept; how fast it is.

    Between a schedule that is too slow and one that is fast enough, time is taken for linear in multiply-adds. The
    model is left with what is found.
    """
    assert stopwatch.target is not None
    target, dense = stopwatch.target, model.cost(None)
    # multiply-adds, and seconds beside those of the dense model: the dearest that is fast enough, and what is too slow
    slow, fast = (float(dense), 1.0), None
    found, cost = best, float(model.multiply_adds(best.schedule))
    for done in range(MEASURED):
        progress("measuring speed", done, MEASURED)
        schedule = best.schedule if done == 0 else model.at_cost(best.schedule, cost)
        if schedule is None:
            break
        model.schedule = schedule
        cost, faster = float(model.multiply_adds(schedule)), stopwatch.speedup(model)
        if faster >= target:
            if fast is None or cost > fast[0]:
                fast, found, reached = (cost, 1 / faster), replace(best, schedule=schedule), faster
            if faster <= CLOSE * target:
                break
        else:
            slow = cost, 1 / faster
        cost = _between(slow, fast, 1 / target, dense)
    progress("measuring speed", 1, 1)
    if fast is None:
        found, reached = replace(best, schedule=model.schedule), 1 / slow[1]
    measured = attempt(found.schedule, found.ranking) or found
    return measured, Reached(round(reached, 3), stopwatch.where, fast is not None)


def _between(slow: tuple[float, float], fast: tuple[float, float] | None, seconds: float, dense: float) -> float:
    """Multiply-adds that take so many seconds, by the line through two measurements, or through the dense model."""
    one, other = (slow, fast) if fast is not None else ((dense, 1.0), slow)
    slope = (one[1] - other[1]) / (one[0] - other[0]) if one[0] != other[0] else 0.0
    if slope <= 0:  # noise: fewer multiply-adds were not faster
        return 0.9 * other[0]
    return max(0.0, other[0] + (SAFE * seconds - other[1]) / slope)
