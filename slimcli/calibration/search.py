"""A working slimmed model before any training: choose the layers and the keep rate, fit the life head to attention."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from slimcli.calibration.by_time import Reached, choose_by_time, reach_best
from slimcli.calibration.effort import brief_steps, fit_steps, plan, tokens_of
from slimcli.calibration.fit import Fitted, fit, head_widths
from slimcli.calibration.goal import Cost, check_cost, falling_schedule, paper_schedule
from slimcli.calibration.judge import (
    PLAIN,
    Candidate,
    CheckSet,
    PatchError,
    Ranking,
    distance,
    observe_checks,
    patch_error,
)
from slimcli.calibration.observe import candidate_life_layers, observe
from slimcli.calibration.patches import choose_way
from slimcli.calibration.stopwatch import Stopwatch
from slimcli.errors import SlimError
from slimcli.layout import packed
from slimcli.memory import freed_memory_kept
from slimcli.progress import Progress, Steps, no_progress
from slimcli.schedule import Schedule
from slimcli.slimming import LifeModel, SlimModel


@dataclass(frozen=True)
class Space:
    """What is searched, and where it starts."""

    #: how the number of patches may fall: exponents of `falling_counts`; the first is tried with every life layer
    powers: tuple[float, ...]
    #: weights of what no other patch says already, beside a patch's importance
    redundancies: tuple[float, ...]
    #: how patches may be added to their heirs: `merge_importance` and `size_bias` of the slimmed model
    merges: tuple[tuple[float, float], ...]
    start: Ranking


#: of each purpose. For its feature, a patch counts as much as any other: it is seldom attended to, but looked at; those
#: that are most like others leave first, whichever those are, and all of them at once: late in the model as many
#: features have to be left as early
SPACES = {
    "class": Space((0.7, 0.5, 1.0), (2.0, 3.5, 6.0), ((0.0, 1.0), (0.7, 1.0), (0.7, 0.7), (1.2, 0.7)), Ranking()),
    "patches": Space((0.0, 0.2, 0.5), (6.0, 20.0, 100.0), ((0.0, 1.0), (0.0, 0.7)), Ranking(100.0, 0.0, 1.0, "pairs")),
    "both": Space(
        (0.35, 0.0, 0.7), (3.5, 6.0, 100.0), ((0.0, 1.0), (0.7, 1.0), (0.7, 0.7)), Ranking(6.0, 0.0, 1.0, "pairs")
    ),
}


@dataclass
class Calibration:
    """What `fit_and_search` did: the heads it fitted, by life layer, and every candidate, the chosen one first.

    `paper` is the paper's way at the same cost, for comparison: three drops, and dead patches discarded.
    """

    fitted: dict[int, Fitted]
    tried: list[Candidate]
    paper: Candidate | None = None
    #: what a user should know of the time that was measured
    notes: list[str] = field(default_factory=list)
    #: how fast it was measured to be, where a speed-up was asked for
    reached: Reached | None = None
    #: every way of putting patches back that was looked at, the chosen one first
    ways: list[PatchError] = field(default_factory=list)

    def restore(
        self,
        model: LifeModel,
        goal: Cost | Schedule,
        attempt: Attempt,
        fit_on: Sequence[tuple[Tensor, Tensor]],
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress,
    ) -> None:
        """Have patches come back in the way nearest to dense, paid for with a few patches where there is a cost.

        What it learnt stands beside the head as it was fitted, in float32.
        """
        self.ways = choose_way(model, attempt.check_set, attempt.served(), fit_on, device, dtype, progress)
        learnt = {} if model.correction is None else model.correction.state_dict()
        self.fitted[model.schedule.life_layer].state |= {
            f"correction.{name}": value.detach().clone() for name, value in learnt.items()
        }
        if isinstance(goal, Cost):
            self.cut(model, goal)

    def cut(self, model: LifeModel, goal: Cost) -> None:
        """Have `model`, and the candidate that was chosen, keep as many patches as the goal allows."""
        model.schedule = model.at_cost(model.schedule, goal.multiply_adds) or model.schedule
        gmacs = model.multiply_adds(model.schedule) / 1e9
        self.tried[0] = replace(self.tried[0], schedule=model.schedule, gmacs=gmacs)


def fit_and_search(
    model: SlimModel,
    goal: Cost | Schedule,
    fit_on: Sequence[tuple[Tensor, Tensor]],
    check_on: Sequence[tuple[Tensor, Tensor]],
    num_images: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
    others: Sequence[Cost] = (),
    stopwatch: Stopwatch | None = None,
    purpose: str = "class",
) -> Calibration:
    """Teach the life head, find how patches should leave, and leave the model with the best of it.

    For a cost, life layer and N_t are searched, and the model's `exact_savings` set; a schedule is kept. A form of the
    fall that is to serve `others`, lower costs, too is judged at all of them.
    With a `stopwatch`, fewer drops are taken for one cost where they are faster there, and as many patches as its
    target allows.
    `purpose`, one of `PURPOSES`, is what candidates are judged by; for patches, how they come back is chosen too.
    `fit_on` are the images to fit on, `check_on` others to compare the candidates on; labels are not used.
    """
    if not isinstance(model, LifeModel):
        raise SlimError(f"the method {model.method} has no life head to calibrate")
    model = model.to(device, dtype).eval()
    with packed(model.model):
        return _calibrated(
            model, goal, fit_on, check_on, num_images, device, dtype, progress, others, stopwatch, purpose
        )


def _calibrated(
    model: LifeModel,
    goal: Schedule | Cost,
    fit_on: Sequence[tuple[Tensor, Tensor]],
    check_on: Iterable[tuple[Tensor, Tensor]],
    num_images: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    others: Sequence[Cost],
    stopwatch: Stopwatch | None,
    purpose: str,
) -> Calibration:
    model.mode = "hard"
    model.life_head.correct(None)
    model.life_head.extend(*head_widths(model))
    goal, layers = _layers(model, goal, others, purpose)
    steps = fit_steps(num_images)
    brief = brief_steps(steps, tokens_of(model), len(layers))
    target = stopwatch.target if stopwatch else None
    work, fitted = (
        Steps(progress, plan(model, layers, isinstance(goal, Schedule), num_images, purpose, target), True),
        {},
    )
    with work.step() as part:
        observed = observe(model, fit_on, layers, device, dtype, part, num_images)
    for layer in layers:
        with work.step() as part:
            fitted[layer] = fit(model, observed, layer, brief, device, part)
    attempt = Attempt(model, fitted, observe_checks(model, check_on, layers, device, dtype, purpose), others, purpose)
    compared: list[Candidate] = []
    if isinstance(goal, Schedule):
        chosen = goal
    else:
        with work.step() as part:
            compared = search(model, goal, layers, attempt, part, purpose)
        chosen = compared[0].schedule
        with work.step() as part:
            fitted[chosen.life_layer] = fit(model, observed, chosen.life_layer, steps, device, part)
    del observed
    with work.step() as part:
        tried = choose_ranking(chosen, model.dead, attempt, part, purpose)
    given = [(goal, PLAIN)] if isinstance(goal, Schedule) else []
    tried = [*sorted([*tried, *_attempt_all(attempt, given)], key=_apart), *compared]
    notes: list[str] = []
    timed = target is None and not others and tried[0].schedule.drops_patches()
    if timed and stopwatch is not None and isinstance(goal, Cost):
        best, notes = choose_by_time(model, attempt, tried[0], goal, stopwatch)
        tried = tried if best is tried[0] else [best, *tried]
    paper = None if isinstance(goal, Schedule) else _paper(attempt, goal)
    attempt(tried[0].schedule, tried[0].ranking)
    found = Calibration(fitted, tried, paper, notes)
    if purpose != "class":
        with work.step() as part:
            found.restore(model, goal, attempt, fit_on, device, dtype, part)
    if isinstance(goal, Cost) and stopwatch is not None and target is not None:
        with work.step() as part:
            found.tried[0], found.reached = reach_best(model, attempt, found.tried[0], goal, stopwatch, part)
    return found


def _layers(
    model: LifeModel, goal: Schedule | Cost, others: Sequence[Cost], purpose: str
) -> tuple[Schedule | Cost, Sequence[int]]:
    """The goal, a schedule where a cost is that of the dense model, and the life layers to fit heads for."""
    if not isinstance(goal, Schedule):
        # costs are those of patches compared with each other
        SPACES[purpose].start.set(model)
        # at a given cost, what it saves keeps more patches; nothing of it is saved where all patches are asked for
        model.exact_savings = purpose == "class"
        layers = candidate_life_layers(model.backbone.depth)
        check_cost(model, min(cost.multiply_adds for cost in (goal, *others)), layers)
        if goal.multiply_adds < model.cost(None):
            return goal, layers
        goal = Schedule.uniform(model.backbone.depth, 1.0, model.schedule.life_layer, ())
    return goal, (goal.life_layer,)


@dataclass
class Attempt:
    """Tries a candidate on the model, which is left with it: the head that was fitted, a schedule and a ranking."""

    model: LifeModel
    fitted: dict[int, Fitted]
    check_set: CheckSet
    #: lower costs that the form of the schedule is to serve too
    others: Sequence[Cost] = ()
    purpose: str = "class"

    def served(self) -> list[Schedule]:
        """The model's own schedule, and those that its form comes to at `others`."""
        scaled = (self.model.at_cost(self.model.schedule, cost.multiply_adds) for cost in self.others)
        return [self.model.schedule, *(schedule for schedule in scaled if schedule is not None)]

    def __call__(self, schedule: Schedule, ranking: Ranking) -> Candidate | None:
        """How far the candidate is from dense; None where the form comes to none of `others`."""
        model = self.model
        model.life_head.load_state_dict(self.fitted[schedule.life_layer].state)
        ranking.set(model)
        found: list[tuple[float, float]] = []
        errors: list[PatchError] = []
        for scaled in (schedule, *(model.at_cost(schedule, cost.multiply_adds) for cost in self.others)):
            if scaled is None:
                return None
            model.schedule = scaled
            if not scaled.drops_patches():
                found.append((0.0, 100.0))
                continue
            if self.purpose != "patches":
                found.append(distance(model, self.check_set))
            if self.purpose != "class":
                errors.append(patch_error(model, self.check_set, "heir" if model.has_heirs else "own"))
                found.append((errors[-1].error, 100 * errors[-1].cosine))
        model.schedule = schedule
        # in shares, so that the lowest cost, which is the farthest apart, does not decide alone
        apart = math.prod(value for value, _ in found) ** (1 / len(found))
        agreement = sum(value for _, value in found) / len(found)
        patches = errors[0] if errors else None
        return Candidate(schedule, ranking, model.multiply_adds(schedule) / 1e9, apart, agreement, patches)


def _paper(attempt: Attempt, goal: Cost) -> Candidate | None:
    """The paper's way at the same cost: three drops, dead patches discarded; None where it cannot be had."""
    model = attempt.model
    dead, model.dead = model.dead, "discard"
    try:
        PLAIN.set(model)
        three_drops = paper_schedule(model, goal)
        known = three_drops is not None and three_drops.life_layer in attempt.fitted
        return attempt(three_drops, PLAIN) if three_drops is not None and known else None
    finally:
        model.dead = dead


def _apart(candidate: Candidate) -> float:
    return candidate.apart


@freed_memory_kept()
def search(
    model: SlimModel,
    goal: Cost,
    layers: Sequence[int],
    attempt: Attempt,
    progress: Progress = no_progress,
    purpose: str = "class",
) -> list[Candidate]:
    """Try life layers first, then forms of the fall for the two best of them; all of them, the best first.

    What `attempt` gives None for cannot be had.
    """
    space = SPACES[purpose]
    powers, power, start = space.powers, space.powers[0], space.start
    first = [falling_schedule(model, goal, layer, power) for layer in layers]
    total = len(layers) + 2 * (len(powers) - 1)
    label = "searching how patches should leave"
    tried = _attempt_all(attempt, [(found, start) for found in first], progress, label, 0, total)
    if not tried:
        raise SlimError(f"{goal}: no schedule of this model comes to that: try a higher one")
    chosen = [candidate.schedule.life_layer for candidate in sorted(tried, key=_apart)[:2]]
    second = [falling_schedule(model, goal, layer, p) for layer in chosen for p in powers if p != power]
    tried += _attempt_all(attempt, [(found, start) for found in second], progress, label, len(layers), total)
    return sorted(tried, key=_apart)


@freed_memory_kept()
def choose_ranking(
    schedule: Schedule, dead: str, attempt: Attempt, progress: Progress = no_progress, purpose: str = "class"
) -> list[Candidate]:
    """Try who leaves first, then how patches are added to their heirs, where they have any."""
    space = SPACES[purpose]
    total = len(space.redundancies) + len(space.merges) - 1
    label = "searching who should leave first"
    rankings = [replace(space.start, redundancy=redundancy) for redundancy in space.redundancies]
    tried = _attempt_all(attempt, [(schedule, ranking) for ranking in rankings], progress, label, 0, total)
    if tried and dead == "heir":
        ranking = min(tried, key=_apart).ranking
        others = [replace(ranking, merge_importance=weight, size_bias=bias) for weight, bias in space.merges]
        candidates = [(schedule, other) for other in others if other != ranking]
        tried += _attempt_all(attempt, candidates, progress, label, len(rankings), total)
    progress(label, total, total)
    return tried


def _attempt_all(
    attempt: Attempt,
    candidates: Sequence[tuple[Schedule | None, Ranking]],
    progress: Progress = no_progress,
    label: str = "",
    done: int = 0,
    total: int = 1,
) -> list[Candidate]:
    found = []
    for number, (schedule, ranking) in enumerate(candidates):
        progress(label, done + number, total)
        found.append(None if schedule is None else attempt(schedule, ranking))
    return [candidate for candidate in found if candidate is not None]
