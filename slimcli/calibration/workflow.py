"""The calibration of a target: images, the search, the folder that is written, and the recipe beside it.

`slimcli.calibration.search` holds what is done to a model; this is what `slim calibrate` and `slim compare` do with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimcli import data as datasets
from slimcli.calibration.effort import plan
from slimcli.calibration.goal import Cost, check_target, cost_for_speedup
from slimcli.calibration.judge import PURPOSES, Agreement, Candidate, comparison
from slimcli.calibration.next_recipe import next_recipe
from slimcli.calibration.observe import (
    MOST_IN_A_BATCH,
    candidate_life_layers,
    fewest_checked,
    images_that_fit,
    share_out,
    split,
)
from slimcli.calibration.search import Calibration, fit_and_search
from slimcli.calibration.smaller import SmallerImage, smaller_images
from slimcli.calibration.stopwatch import Stopwatch, usual_place
from slimcli.errors import SlimError, parameter
from slimcli.files import write_file, write_json
from slimcli.measure.evaluation import agreement, evaluate, first_images
from slimcli.measure.rows import Row
from slimcli.progress import Progress, Step, Steps, no_progress
from slimcli.recipe import Recipe
from slimcli.runtimes import find_runtime
from slimcli.runtimes.base import CPU
from slimcli.runtimes.measuring import Place
from slimcli.schedule import Schedule
from slimcli.session.session import Session
from slimcli.slimming import SlimModel
from slimcli.store.model_folder import save_model
from slimcli.store.run_folder import RECIPE, SUMMARY, WEIGHTS, new_run_folder

#: validation images to report on where neither the recipe nor the user says
REPORTED = 1000


@dataclass(frozen=True)
class Goal:
    """What a calibration is to reach: at most one of a cost, a speed-up and keep rates; none: the present cost.

    `flops` is in G multiply-adds an image; `speedup` is measured on the device; `keep_rates` stand for their cost at
    three layers. With `keep_schedule` patches leave where they do, and only the life head is taught. `purpose`, one of
    `PURPOSES`, is what is to stay as the dense model has it. `runtime`, NAME[:PRECISION], is where the speed-up is
    measured; None: torch, and on CUDA a CUDA graph.
    """

    flops: float | None = None
    speedup: float | None = None
    keep_rates: Sequence[float] = ()
    keep_schedule: bool = False
    purpose: str = "class"
    runtime: str | None = None

    def __post_init__(self) -> None:
        if self.purpose not in PURPOSES:
            raise SlimError(f"{parameter('purpose', self.purpose)}: expected one of {', '.join(PURPOSES)}")
        check_target("target_flops", self.flops)
        check_target("target_speedup", self.speedup, 1)
        goals = {"target_flops": self.flops, "target_speedup": self.speedup, "keep_rate": self.keep_rates or None}
        given = [parameter(name) for name, value in goals.items() if value is not None]
        if self.runtime is not None:
            if self.speedup is None:
                raise SlimError(
                    f"{parameter('runtime', self.runtime)}: is where a speed-up is measured: give "
                    f"{parameter('target_speedup')} too"
                )
            self.place(CPU, torch.float32, here=False)
        if len(given) > 1:
            raise SlimError(f"{' and '.join(given)} are two goals: choose one")
        if self.keep_schedule and (self.flops is not None or self.speedup is not None):
            raise SlimError(
                f"{parameter('keep_schedule')} keeps where patches leave: choose the cost with {parameter('keep_rate')}"
            )
        if self.keep_schedule and len(self.keep_rates) > 1:
            raise SlimError(
                f"{parameter('keep_schedule')} takes one keep rate: the head that is fitted serves the others too"
            )

    def place(self, device: torch.device, dtype: torch.dtype, here: bool = True) -> Place:
        """Where a speed-up is measured; `SlimError` where it cannot be, `here`: on this device."""
        if self.runtime is None:
            return usual_place(device, dtype)
        name, _, precision = self.runtime.partition(":")
        runtime = find_runtime(name)
        runtime.require(precision or "float32")
        if here:
            runtime.require_device(device)
        return Place(runtime, precision or "float32", device)

    @property
    def several(self) -> list[float]:
        """The keep rates, highest first, each once."""
        return sorted(set(self.keep_rates), reverse=True)

    @property
    def searched(self) -> list[float]:
        """Those for which there is something to search: at 1 the model is dense, but there is something to train."""
        return [rate for rate in self.several if rate < 1] or self.several


@dataclass
class Calibrated:
    """What came of a calibration, not yet written."""

    session: Session
    found: Calibration
    recipe: Recipe
    #: images that the life head was fitted on, and how many were in a batch
    images: int
    batch_size: int
    #: agreement with the dense model before and after, as `comparison` has it
    report: dict[str, Any]
    #: rows of `evaluate`: the dense model, then the calibrated one
    rows: list[Row]
    class_names: list[str] | None
    #: the dense model on smaller images of the same costs
    smaller: list[SmallerImage] = field(default_factory=list)
    #: what it was for: one of `PURPOSES`
    purpose: str = "class"

    @property
    def notes(self) -> list[str]:
        """What a user should know: what was given up for speed, and where a smaller image would do as well."""
        reached = self.found.reached
        missed = [str(reached)] if reached is not None and not reached.enough else []
        return [*missed, *self.found.notes, *(image.note for image in self.smaller if image.note is not None)]

    def document(self) -> dict[str, Any]:
        """All of it as plain values."""
        model, found = self.session.model, self.found
        return {
            "model": self.session.target.model_name,
            **self.session.facts(self.batch_size),
            "images": self.images,
            "chosen": describe(found, model, found.tried[0]),
            "paper": describe(found, model, found.paper) if found.paper else None,
            "purpose": self.purpose,
            "restoring": [vars(way) for way in self.found.ways],
            "tried": [describe(found, model, candidate) for candidate in found.tried],
            "before": self.report["before"],
            "after": self.report["after"],
            "rows": self.rows,
            "notes": self.notes,
            "reached": None if self.found.reached is None else self.found.reached._asdict(),
            "smaller_images": self.smaller,
        }

    def write(self, folder: Path, document: dict[str, Any]) -> None:
        """Write the model folder, the recipe that trains on from it, and `document` as its summary."""
        config = {
            **self.session.target.config,
            "preprocessing": self.session.preprocessing,
            "class_names": self.class_names,
            "data": self.recipe.data.model_dump(mode="json", exclude_none=True),
            "has_life_head": True,
        }
        save_model(folder, self.session.model, config)
        model = self.recipe.model.model_copy(update={"weights": (folder / WEIGHTS).resolve(), "weights_grid": None})
        text = self.recipe.model_copy(update={"model": model}).to_toml()
        write_file(folder / RECIPE, text.encode())
        write_json(folder / SUMMARY, document)


def calibrate_session(session: Session, goal: Goal, images: int = 1024, progress: Progress = no_progress) -> Calibrated:
    """Calibrate the session's model for `goal` on up to `images` training images, without labels; see `Calibrated`.

    The model is left with the schedule and the life head that were found, and its dense weights as they came.

    Raises:
        SlimError: where the goal cannot be reached, or the target comes without data.
    """
    model, device, dtype = session.model, session.device, session.dtype
    goal.place(device, dtype)
    shown = session.images(val_limit=session.data.val_limit or REPORTED)
    batch = batch_size(session)
    fit_on, check_on, count = images_to_fit(session, images, images // 4, batch)
    # what is saved are the weights as they came, not rounded to what the arithmetic runs in
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    model.to(device, dtype)
    fits = goal_steps(model, goal, count)
    weight = sum(step.weight for step in fits)
    compares = [Step(f"comparing {what} life head", 0.1 * weight) for what in ("an untaught", "the fitted")]
    work = Steps(progress, [compares[0], *fits, compares[1], Step("evaluating", 0.3 * weight)], numbered=True)

    def agreed() -> Agreement:
        return agreement(model, first_images(session.loader(shown, batch), len(shown)), device, dtype)

    with work.step():
        untaught = agreed()
    found = fit_to_goal(model, goal, fit_on, check_on, batch, device, dtype, session.recipe.seed, work)
    with work.step():
        taught = agreed()
    rates = goal.several if len(goal.several) > 1 else None
    with work.step() as part:
        rows = evaluate(model, session.loader(shown, batch), rates, device, dtype, part)
    # a smaller image has other patches
    classifies = model.method == "life" and goal.purpose != "patches"
    smaller = smaller_images(model, check_on, rates, device, dtype) if classifies else []
    model.float()
    model.model.load_state_dict(weights)
    session.target.has_life_head = True
    return Calibrated(
        session,
        found,
        next_recipe(session, goal.several),
        count,
        batch,
        comparison(untaught, taught),
        rows,
        # the classes of label maps are the head's, whatever the images are of
        session.target.class_names if model.segments else getattr(shown, "class_names", None),
        smaller,
        goal.purpose,
    )


def new_folder(recipe: Recipe) -> Path:
    """A folder for a calibration by a recipe, `NAME-calibrated-TIME` under its output."""
    return new_run_folder(recipe.output, f"{recipe.name}-calibrated")


def batch_size(session: Session) -> int:
    """What was asked for, or the recipe's, which is for training, as far as it is not too large."""
    asked = session.request.batch_size is not None or session.resolved.is_given("data.batch_size")
    return session.data.batch_size if asked else min(session.data.batch_size, MOST_IN_A_BATCH)


def images_to_fit(session: Session, wanted: int, checked: int, batch: int) -> tuple[list[Any], list[Any], int]:
    """Batches of training images to fit on, as many as memory holds; others to check on; how many the first are."""
    layers = candidate_life_layers(session.model.backbone.depth)
    count = images_that_fit(session.model.backbone, wanted, len(layers))
    fewest = fewest_checked(session.model)
    total = sum(share_out(count, None, checked, fewest))
    # a limit of the recipe's own is kept
    total = min(session.data.train_limit or total, total)
    images = datasets.shuffled(session.images(train=True, train_limit=total))
    taken = list(first_images(session.loader(images, batch), total))
    count, _ = share_out(count, sum(len(targets) for _, targets in taken), checked, fewest)
    fit_on, check_on = split(taken, count)
    return fit_on, check_on, sum(len(targets) for _, targets in fit_on)


def goal_steps(model: SlimModel, goal: Goal, count: int) -> list[Step]:
    """The steps of `fit_to_goal` on `count` images, and about how long each takes."""
    layers = (0,) if goal.keep_schedule else candidate_life_layers(model.backbone.depth)
    fits = plan(model, layers, goal.keep_schedule, count, goal.purpose, goal.speedup)
    weight = sum(step.weight for step in fits)
    speed = [Step("measuring speed", 0.3 * weight)] if goal.speedup is not None else []
    return [*speed, Step("calibrating", weight, len(fits))]


def fit_to_goal(
    model: SlimModel,
    goal: Goal,
    fit_on: Sequence[tuple[Tensor, Tensor]],
    check_on: Sequence[tuple[Tensor, Tensor]],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    work: Steps,
) -> Calibration:
    """Calibrate a model for `goal` on batches to fit on and others to check on; `work` is at the first of `goal_steps`.

    A speed-up is measured with `batch_size` images. The model is left on `device` in `dtype`.
    """
    cost = None
    stopwatch = Stopwatch(goal.place(device, dtype), batch_size, goal.speedup)
    try:
        if goal.speedup is not None:
            with work.step() as part:
                cost = cost_for_speedup(model, stopwatch, part)
        sought, others = aim(model, goal, cost)
        # where launches take the time, and not the arithmetic, it has to be measured
        measured = goal.speedup is not None or device.type == "cuda" or batch_size == 1
        timed = stopwatch if measured else None
        count = sum(len(images) for images, _ in fit_on)
        with work.step() as part, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return fit_and_search(
                model, sought, fit_on, check_on, count, device, dtype, part, others, timed, goal.purpose
            )
    finally:
        stopwatch.close()


def aim(model: SlimModel, goal: Goal, cost_of_speedup: float | None = None) -> tuple[Cost | Schedule, list[Cost]]:
    """What is searched for: a schedule or a cost, and the lower costs that the found fall is to serve too."""
    searched = goal.searched
    others = [Cost(model.usual_cost(rate)) for rate in searched[1:]]
    if goal.keep_schedule:
        return (model.at_keep_rate(searched[0]) if searched else model.schedule), others
    if goal.flops is not None:
        return Cost(goal.flops * 1e9), others
    if cost_of_speedup is not None:
        return Cost(cost_of_speedup), others
    rate = searched[0] if searched else model.schedule.keep_rate
    return Cost(model.multiply_adds() if rate is None else model.usual_cost(rate)), others


def describe(found: Calibration, model: SlimModel, candidate: Candidate) -> dict[str, Any]:
    """A candidate as plain values: its schedule, its ranking, its cost, and how far from dense it is."""
    fitted = found.fitted[candidate.schedule.life_layer]
    return {
        "life_layer": candidate.schedule.life_layer,
        "keep_rate": model.keep_rate_of(candidate.schedule, 1e9 * candidate.gmacs),
        "drops": [list(drop) for drop in candidate.schedule.drops],
        "patches_per_layer": list(candidate.schedule.counts or ()),
        **vars(candidate.ranking),
        "gmacs": round(candidate.gmacs, 4),
        "fit_error": round(fitted.life_error, 4),
        "similarity_error": round(fitted.similarity_error, 4),
        "apart": round(candidate.apart, 5),
        **({} if candidate.patches is None else {"patches": vars(candidate.patches)}),
        "agreement": round(candidate.agreement, 2),
    }
