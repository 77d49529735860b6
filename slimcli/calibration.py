"""The calibration of a target: images, the search, the folder that is written, and the recipe beside it.

`slimcli.calibrate` holds what is done to a model; this is what `slim calibrate` and `slim compare` do with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from slimcli import calibrate
from slimcli import data as datasets
from slimcli.errors import SlimError
from slimcli.evaluate import agreement, evaluate, first_images
from slimcli.files import write_file, write_json
from slimcli.progress import Progress, Step, Steps, no_progress
from slimcli.recipe import Recipe, SlimmingSection, StageSection
from slimcli.rows import Row
from slimcli.runs import RECIPE, SUMMARY, WEIGHTS, new_run_folder
from slimcli.schedule import Schedule
from slimcli.session import Session
from slimcli.slimming import SlimModel
from slimcli.store import save_model, slimming_config

#: the most images in a batch where none was asked for: attention maps of a training batch would fill the memory
MOST_IN_A_BATCH = 64
#: validation images to report on where neither the recipe nor the user says
REPORTED = 1000
#: the fewest images that candidates are compared on
FEWEST_CHECKED = 8


@dataclass(frozen=True)
class Goal:
    """What a calibration is to reach: at most one of a cost, a speed-up and keep rates; none: the present cost.

    `flops` is in G multiply-adds an image; `speedup` is measured on the device; `keep_rates` stand for their cost at
    three layers. With `keep_schedule` patches leave where they do, and only the life head is taught.
    """

    flops: float | None = None
    speedup: float | None = None
    keep_rates: Sequence[float] = ()
    keep_schedule: bool = False

    def __post_init__(self) -> None:
        calibrate.check_target("--target-flops", self.flops)
        calibrate.check_target("--target-speedup", self.speedup)
        names = {"--target-flops": self.flops, "--target-speedup": self.speedup, "--keep-rate": self.keep_rates or None}
        given = [name for name, value in names.items() if value is not None]
        if len(given) > 1:
            raise SlimError(f"{' and '.join(given)} are two goals: choose one")
        if self.keep_schedule and (self.flops is not None or self.speedup is not None):
            raise SlimError("--keep-schedule keeps where patches leave: choose the cost with --keep-rate")
        if self.keep_schedule and len(self.keep_rates) > 1:
            raise SlimError("--keep-schedule takes one keep rate: the head that is fitted serves the others too")

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
    found: calibrate.Calibration
    recipe: Recipe
    #: images that the life head was fitted on, and how many were in a batch
    images: int
    batch_size: int
    #: agreement with the dense model before and after, as `calibrate.comparison` has it
    report: dict[str, Any]
    #: rows of `evaluate`: the dense model, then the calibrated one
    rows: list[Row]
    class_names: list[str] | None
    notes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """All of it as plain values."""
        model, found = self.session.model, self.found
        return {
            "model": self.session.target.model_name,
            **self.session.facts(self.batch_size),
            "images": self.images,
            "chosen": describe(found, model, found.tried[0]),
            "paper": describe(found, model, found.paper) if found.paper else None,
            "tried": [describe(found, model, candidate) for candidate in found.tried],
            "before": self.report["before"],
            "after": self.report["after"],
            "rows": self.rows,
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
    shown = session.images(val_limit=session.data.val_limit or REPORTED)
    batch = batch_size(session)
    fit_on, check_on, count = images_to_fit(session, images, images // 4, batch)
    # what is saved are the weights as they came, not rounded to what the arithmetic runs in
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    model.to(device, dtype)
    work = Steps(progress, _steps(session, goal, count), numbered=True)
    cost = None
    if goal.speedup is not None:
        with work.step() as part:
            cost = calibrate.cost_for_speedup(model, goal.speedup, batch, device, dtype, part)
    aim, others = _aim(session, goal, cost)

    def agreed() -> calibrate.Agreement:
        return agreement(model, first_images(session.loader(shown, batch), len(shown)), device, dtype)

    with work.step():
        untaught = agreed()
    with work.step() as part, torch.random.fork_rng(devices=[]):
        torch.manual_seed(session.recipe.seed)
        found = calibrate.calibrate(model, aim, fit_on, check_on, count, device, dtype, part, others)
    with work.step():
        taught = agreed()
    rates = goal.several if len(goal.several) > 1 else None
    with work.step() as part:
        rows = evaluate(model, session.loader(shown, batch), rates, device, dtype, part)
    model.float()
    model.model.load_state_dict(weights)
    session.target.has_life_head = True
    return Calibrated(
        session,
        found,
        next_recipe(session, goal.several),
        count,
        batch,
        calibrate.comparison(untaught, taught),
        rows,
        getattr(shown, "class_names", None),
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
    layers = calibrate.candidate_life_layers(session.model.backbone.depth)
    count = calibrate.images_that_fit(session.model.backbone, wanted, len(layers))
    total = count + max(FEWEST_CHECKED, min(checked, count))
    # a limit of the recipe's own is kept
    limit = min(session.data.train_limit or total, total)
    images = datasets.shuffled(session.images(train=True, train_limit=limit))
    fit_on, check_on = calibrate.split(list(first_images(session.loader(images, batch), total)), count)
    return fit_on, check_on, sum(len(targets) for _, targets in fit_on)


def _steps(session: Session, goal: Goal, count: int) -> list[Step]:
    """The steps of a calibration, and about how long each takes."""
    layers = (0,) if goal.keep_schedule else calibrate.candidate_life_layers(session.model.backbone.depth)
    fits = calibrate.plan(layers, goal.keep_schedule, count)
    weight = sum(step.weight for step in fits)
    return [
        *([Step("measuring speed", 0.3 * weight)] if goal.speedup is not None else []),
        Step("comparing an untaught life head", 0.1 * weight),
        Step("calibrating", weight, len(fits)),
        Step("comparing the fitted life head", 0.1 * weight),
        Step("evaluating", 0.3 * weight),
    ]


def _aim(
    session: Session, goal: Goal, cost_of_speedup: float | None
) -> tuple[calibrate.Cost | Schedule, list[calibrate.Cost]]:
    """What is searched for: a schedule or a cost, and the lower costs that the found fall is to serve too."""
    model, searched = session.model, goal.searched
    others = [calibrate.Cost(model.usual_cost(rate)) for rate in searched[1:]]
    if goal.keep_schedule:
        return (model.at_keep_rate(searched[0]) if searched else model.schedule), others
    if goal.flops is not None:
        return calibrate.Cost(goal.flops * 1e9), others
    if cost_of_speedup is not None:
        return calibrate.Cost(cost_of_speedup), others
    rate = searched[0] if searched else model.schedule.keep_rate
    return calibrate.Cost(model.multiply_adds() if rate is None else model.usual_cost(rate)), others


def describe(found: calibrate.Calibration, model: SlimModel, candidate: calibrate.Tried) -> dict[str, Any]:
    """A candidate as plain values: its schedule, its rule, its cost, and how far from dense it is."""
    fitted = found.fitted[candidate.schedule.life_layer]
    return {
        "life_layer": candidate.schedule.life_layer,
        "keep_rate": model.keep_rate_of(candidate.schedule, 1e9 * candidate.gmacs),
        "drops": [list(drop) for drop in candidate.schedule.drops],
        "patches_per_layer": list(candidate.schedule.counts or ()),
        **vars(candidate.rule),
        "gmacs": round(candidate.gmacs, 4),
        "fit_error": round(fitted.life_error, 4),
        "similarity_error": round(fitted.similarity_error, 4),
        "apart": round(candidate.apart, 5),
        "agreement": round(candidate.agreement, 2),
    }


# The recipe that trains on from a calibrated model.


def next_recipe(session: Session, keep_rates: Sequence[float] = ()) -> Recipe:
    """The recipe that trains on from a calibrated model: the target's own, with the paper's stages where it has none.

    With heirs, a calibrated head knows more than a stage in soft mode can teach it: the epochs of stages that teach the
    head alone then go to the first that teaches the backbone. Calibrated for several `keep_rates`, the backbone is
    trained for all of them.
    """
    target, model = session.target, session.model
    data, own = session.data, target.recipe.data
    if session.request.limit is not None:
        # how many images to report on is not for training
        data = data.model_copy(update={"val_limit": own.val_limit if session.request.data is None else None})
    if data.root is not None:
        data = data.model_copy(update={"root": data.root.resolve()})
    slimming = SlimmingSection.model_validate(
        {**slimming_config(model), "attention": target.recipe.slimming.attention}, strict=False
    )
    # what a stage would calibrate is calibrated
    stages = [stage for stage in target.recipe.stages if stage.mode != "calibrate"]
    if all(stage.mode == "none" for stage in stages):
        stages = default_stages(model)
    elif model.has_heirs:
        stages = backbone_stages(stages)
    return target.recipe.model_copy(
        update={
            "description": target.recipe.description or "Written by slim calibrate, to train on.",
            "model": target.recipe.model.model_copy(update={"pretrained": False}),
            "data": data,
            "slimming": slimming,
            "stages": for_keep_rates(stages, keep_rates),
        }
    )


def default_stages(model: SlimModel) -> list[StageSection]:
    """Stages for a target that comes without any."""
    loss: Literal["labels", "cosine"] = "labels" if model.architecture().num_outputs else "cosine"
    if model.has_heirs:
        return [StageSection(learns="backbone", mode="hard", loss=loss, lr=2e-5, epochs=2, ema=0.995)]
    return [
        StageSection(learns="life", mode="soft", loss=loss, lr=1e-3),
        StageSection(learns="backbone", mode="soft", loss=loss, lr=1e-5),
    ]


def backbone_stages(stages: list[StageSection]) -> list[StageSection]:
    """The stages that follow a calibration with heirs.

    Those that teach the life head alone are left out, and the first of the others gets their epochs; the backbone alone
    is taught in hard mode, as soft weights know nothing of heirs. As they are where none teaches the backbone.
    """
    kept = [stage for stage in stages if stage.learns != "life"]
    if not kept:
        return stages
    saved = sum(stage.epochs for stage in stages if stage.learns == "life")
    kept[0] = kept[0].model_copy(update={"epochs": kept[0].epochs + saved})
    hard = {"mode": "hard", "end_temperature": None}
    return [s.model_copy(update=hard) if s.learns == "backbone" and s.mode != "none" else s for s in kept]


def for_keep_rates(stages: list[StageSection], keep_rates: Sequence[float]) -> list[StageSection]:
    """The stages, those that teach the backbone to drop patches for all of `keep_rates`, if they are several."""
    if len(keep_rates) < 2:
        return stages
    rates = {"keep_rates": list(keep_rates)}
    return [s if s.learns == "life" or s.mode == "none" else s.model_copy(update=rates) for s in stages]
