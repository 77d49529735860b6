"""A working slimmed model before any training: choose the layers and the keep rate, fit the life head to attention."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from slimcli.calibration.by_time import choose_by_time
from slimcli.calibration.fit import Fitted, fit, head_widths
from slimcli.calibration.goal import Cost, check_cost, falling_schedule, paper_schedule
from slimcli.calibration.judge import PLAIN, Candidate, CheckSet, Ranking, distance, observe_checks
from slimcli.calibration.observe import candidate_life_layers, observe
from slimcli.errors import SlimError
from slimcli.layout import packed
from slimcli.progress import Progress, Step, Steps, no_progress
from slimcli.schedule import Schedule
from slimcli.slimming import LifeModel, SlimModel

#: how the number of patches may fall: exponents of `falling_counts`
POWERS = (0.5, 0.7, 1.0)
#: weights of what no other patch says already, beside a patch's importance
REDUNDANCIES = (2.0, 3.5, 6.0)
#: how patches may be added to their heirs: `merge_importance` and `size_bias` of the slimmed model
MERGES = ((0.0, 1.0), (0.7, 1.0), (0.7, 0.7), (1.2, 0.7))
#: batches of 32 images that the life head is taught with: as many as there are images, within these bounds
STEPS = (200, 1000)
#: what an image that is observed, and one that a search is made with, takes beside one of these batches
OBSERVING, SEARCHING = 0.2, 0.3
#: the share of them that it is taught with to compare life layers
BRIEF = 0.2


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


def fit_and_search(
    model: SlimModel,
    goal: Cost | Schedule,
    fit_on: Iterable[tuple[Tensor, Tensor]],
    check_on: Sequence[tuple[Tensor, Tensor]],
    num_images: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
    others: Sequence[Cost] = (),
    timed_with: int = 0,
) -> Calibration:
    """Teach the life head, find how patches should leave, and leave the model with the best of it.

    For a cost, life layer and N_t are searched, and the model's `exact_savings` set; a schedule is kept. A form of the
    fall that is to serve `others`, lower costs, too is judged at all of them.
    With `timed_with` images a batch, fewer drops are taken for one cost where they are faster here.
    `fit_on` are the images to fit on, `check_on` others to compare the candidates on; labels are not used.
    """
    if not isinstance(model, LifeModel):
        raise SlimError(f"the method {model.method} has no life head to calibrate")
    model = model.to(device, dtype).eval()
    with packed(model.model):
        return _calibrated(model, goal, fit_on, check_on, num_images, device, dtype, progress, others, timed_with)


def _calibrated(
    model: LifeModel,
    goal: Schedule | Cost,
    fit_on: Iterable[tuple[Tensor, Tensor]],
    check_on: Iterable[tuple[Tensor, Tensor]],
    num_images: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    others: Sequence[Cost],
    timed_with: int,
) -> Calibration:
    model.mode = "hard"
    model.life_head.extend(*head_widths(model))
    if not isinstance(goal, Schedule):
        # costs are those of patches compared with each other
        Ranking().set(model)
        # at a given cost, what it saves keeps more patches
        model.exact_savings = True
        layers = candidate_life_layers(model.backbone.depth)
        check_cost(model, min(cost.multiply_adds for cost in (goal, *others)), layers)
        if goal.multiply_adds >= model.cost(None):
            goal = Schedule.uniform(model.backbone.depth, 1.0, model.schedule.life_layer, ())
    layers = (goal.life_layer,) if isinstance(goal, Schedule) else layers
    work = Steps(progress, plan(layers, isinstance(goal, Schedule), num_images), numbered=True)
    with work.step() as part:
        observed = observe(model, fit_on, layers, device, dtype, part, num_images)
    steps = fit_steps(num_images)
    brief = round(BRIEF * steps) if len(layers) > 1 else steps
    fitted = {}
    for layer in layers:
        with work.step() as part:
            fitted[layer] = fit(model, observed, layer, brief, device, part)
    attempt = Attempt(model, fitted, observe_checks(model, check_on, layers, device, dtype), others)
    compared: list[Candidate] = []
    if isinstance(goal, Schedule):
        chosen = goal
    else:
        with work.step() as part:
            compared = search(model, goal, layers, attempt, part)
        chosen = compared[0].schedule
        with work.step() as part:
            fitted[chosen.life_layer] = fit(model, observed, chosen.life_layer, steps, device, part)
    del observed
    with work.step() as part:
        tried = choose_ranking(chosen, model.dead, attempt, part)
    plain = attempt(goal, PLAIN) if isinstance(goal, Schedule) else None
    if plain is not None:
        tried.append(plain)
    tried = [*sorted(tried, key=_apart), *compared]
    notes: list[str] = []
    if timed_with and not isinstance(goal, Schedule) and not others and tried[0].schedule.drops_patches():
        best, notes = choose_by_time(model, attempt, tried[0], goal, timed_with, device, dtype)
        tried = tried if best is tried[0] else [best, *tried]
    paper = None if isinstance(goal, Schedule) else _paper(attempt, goal)
    attempt(tried[0].schedule, tried[0].ranking)
    return Calibration(fitted, tried, paper, notes)


@dataclass
class Attempt:
    """Tries a candidate on the model, which is left with it: the head that was fitted, a schedule and a ranking."""

    model: LifeModel
    fitted: dict[int, Fitted]
    check_set: CheckSet
    #: lower costs that the form of the schedule is to serve too
    others: Sequence[Cost] = ()

    def __call__(self, schedule: Schedule, ranking: Ranking) -> Candidate | None:
        """How far the candidate is from dense; None where the form comes to none of `others`."""
        model = self.model
        model.life_head.load_state_dict(self.fitted[schedule.life_layer].state)
        ranking.set(model)
        found: list[tuple[float, float]] = []
        for scaled in (schedule, *(model.at_cost(schedule, cost.multiply_adds) for cost in self.others)):
            if scaled is None:
                return None
            model.schedule = scaled
            found.append(distance(model, self.check_set) if scaled.drops_patches() else (0.0, 100.0))
        model.schedule = schedule
        # in shares, so that the lowest cost, which is the farthest apart, does not decide alone
        apart = math.prod(value for value, _ in found) ** (1 / len(found))
        agreement = sum(value for _, value in found) / len(found)
        return Candidate(schedule, ranking, model.multiply_adds(schedule) / 1e9, apart, agreement)


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


def fit_steps(num_images: int) -> int:
    """Batches that the life head is taught with."""
    return min(max(num_images, STEPS[0]), STEPS[1])


def plan(layers: Sequence[int], keeps_schedule: bool, num_images: int) -> list[Step]:
    """The steps of a calibration, and about how long each takes beside a batch that the life head is taught with."""
    steps = fit_steps(num_images)
    searched = not keeps_schedule
    brief = round(BRIEF * steps) if searched and len(layers) > 1 else steps
    return [
        Step("observing the dense model", OBSERVING * num_images),
        *(Step(f"fitting the life head of block {layer}", brief) for layer in layers),
        *([Step("searching how patches should leave", SEARCHING * num_images)] if searched else []),
        *([Step("fitting the life head that was chosen", steps)] if searched else []),
        Step("searching who should leave first", SEARCHING * num_images),
    ]


def _apart(candidate: Candidate) -> float:
    return candidate.apart


def search(
    model: SlimModel, goal: Cost, layers: Sequence[int], attempt: Attempt, progress: Progress = no_progress
) -> list[Candidate]:
    """Try life layers first, then forms of the fall for the two best of them; all of them, the best first.

    What `attempt` gives None for cannot be had.
    """
    power = POWERS[1]
    first = [falling_schedule(model, goal, layer, power) for layer in layers]
    total = len(layers) + 2 * (len(POWERS) - 1)
    label = "searching how patches should leave"
    tried = _attempt_all(attempt, [(found, Ranking()) for found in first], progress, label, 0, total)
    if not tried:
        raise SlimError(f"{goal}: no schedule of this model comes to that: try a higher one")
    chosen = [candidate.schedule.life_layer for candidate in sorted(tried, key=_apart)[:2]]
    second = [falling_schedule(model, goal, layer, p) for layer in chosen for p in POWERS if p != power]
    tried += _attempt_all(attempt, [(found, Ranking()) for found in second], progress, label, len(layers), total)
    return sorted(tried, key=_apart)


def choose_ranking(
    schedule: Schedule, dead: str, attempt: Attempt, progress: Progress = no_progress
) -> list[Candidate]:
    """Try who leaves first, then how patches are added to their heirs, where they have any."""
    total = len(REDUNDANCIES) + len(MERGES) - 1
    label = "searching who should leave first"
    rankings = [Ranking(redundancy) for redundancy in REDUNDANCIES]
    tried = _attempt_all(attempt, [(schedule, ranking) for ranking in rankings], progress, label, 0, total)
    if tried and dead == "heir":
        ranking = min(tried, key=_apart).ranking
        others = [replace(ranking, merge_importance=weight, size_bias=bias) for weight, bias in MERGES]
        candidates = [(schedule, other) for other in others if other != ranking]
        tried += _attempt_all(attempt, candidates, progress, label, len(rankings), total)
    progress(label, total, total)
    return tried


def _attempt_all(
    attempt: Attempt,
    candidates: Sequence[tuple[Schedule | None, Ranking]],
    progress: Progress,
    label: str,
    done: int,
    total: int,
) -> list[Candidate]:
    found = []
    for number, (schedule, ranking) in enumerate(candidates):
        progress(label, done + number, total)
        found.append(None if schedule is None else attempt(schedule, ranking))
    return [candidate for candidate in found if candidate is not None]
