"""Train and compare by a recipe, and write the report of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimcli import report, train
from slimcli.api.models import KeepRates, keep_rates_of
from slimcli.comparison.workflow import METHODS, Compared, open_comparison, run_comparison
from slimcli.device import find_device
from slimcli.errors import SlimError
from slimcli.files import check_writable
from slimcli.measure.rows import Row, read_rows
from slimcli.progress import Progress, no_progress
from slimcli.recipe import Recipe
from slimcli.session.recipes import read_recipe
from slimcli.store.run_folder import LATEST, REPORT, RUNS, find_run

RecipeLike = Recipe | str | os.PathLike[str]


def no_log(_line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Trained:
    """What `train_model` did: `folder` holds the best model, which `load` reads, and the record of the run.

    `rows` are the dense model, then the slimmed one, of the best epoch; empty in processes other than the main one.
    `summary` is what `summary.json` says.
    """

    folder: Path
    rows: tuple[Row, ...]
    summary: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class StagePlan:
    """What a stage of a training would do: its parameters that learn, optimizer updates, and about how long it takes.

    `settings` are the fields of the recipe's stage.
    """

    settings: dict[str, Any]
    learning_parameters: int
    updates: int
    seconds: float


@dataclass(frozen=True)
class TrainingPlan:
    """What `train_model` would do. `rows` are the dense and the slimmed model: cost and patches in each block.

    `seconds` is about how long all of it takes on this machine, validation included.
    """

    model: str
    train_images: int
    val_images: int
    rows: tuple[Row, ...]
    stages: tuple[StagePlan, ...]
    seconds: float


@dataclass(frozen=True)
class Report:
    """The HTML page that `write_report` wrote, and what it had to leave out and why."""

    path: Path
    left_out: tuple[str, ...]


def train_model(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    device: str = "auto",
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
    log: Callable[[str], None] = no_log,
) -> Trained:
    """Train a model by a recipe, as `slim train` does; its folder is `NAME-TIME` below the recipe's `output`.

    Args:
        recipe: a recipe's file, the name of a built-in one such as "quickstart", or a `Recipe`.
        overrides: fields to set, such as `"data.batch_size=64"`.
        device: "auto", "cpu", "cuda" or "mps".
        resume: the folder of an unfinished run of this recipe, to go on with.
        progress: called with (label, done, total).
        log: called with lines about each epoch.

    Raises:
        SlimError: where the recipe is wrong, or what it names is not there.
        Interrupted: when training is asked to stop (Ctrl-C, SIGTERM); what going on needs is kept.
    """
    loaded = _recipe(recipe, overrides, "train")
    run = None
    if resume is not None:
        run = find_run(Path(resume))
        if run.resolve() != train.unfinished_run(loaded).resolve():
            raise SlimError(f"resume: {run}: is not the newest unfinished run of {loaded.name}")
    folder, summary = train.train(loaded, device, run, progress, log)
    return Trained(folder, tuple(read_rows(summary.get("rows", ()))), summary)


def plan_training(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    device: str = "auto",
    progress: Progress = no_progress,
) -> TrainingPlan:
    """What `train_model` would do, all of it built and checked, a few steps timed, and nothing kept.

    Args:
        recipe: a recipe's file, the name of a built-in one, or a `Recipe`.
        overrides: fields to set, such as `"data.batch_size=64"`.
        device: "auto", "cpu", "cuda" or "mps".
        progress: called with (label, done, total).

    Raises:
        SlimError: where the recipe is wrong, or what it names is not there.
    """
    plan = train.dry_run(_recipe(recipe, overrides, "train"), device, progress)
    own = ("learning_parameters", "updates", "seconds")
    stages = tuple(
        StagePlan({key: value for key, value in stage.items() if key not in own}, *(stage[key] for key in own))
        for stage in plan["stages"]
    )
    return TrainingPlan(
        plan["model"], plan["train_images"], plan["val_images"], tuple(plan["rows"]), stages, plan["seconds"]
    )


def compare_methods(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] = METHODS,
    keep_rates: KeepRates = None,
    epochs: int | None = None,
    seeds: Sequence[int] = (),
    test: str | None = None,
    limit: int | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    device: str = "auto",
    progress: Progress = no_progress,
    log: Callable[[str], None] = no_log,
) -> Compared:
    """Life regression beside other methods: the same model, data and arithmetic; a table and a plot in a folder.

    Args:
        recipe: a recipe's file, the name of a built-in one, or a `Recipe`.
        overrides: fields to set, such as `"data.batch_size=64"`.
        methods: "life", "evit", "tome", "random", or another that `slim plugins` lists.
        keep_rates: one or several; by default the recipe's own schedule.
        epochs: train every method for so many epochs, 0: those of the recipe's stages; None only calibrates.
        seeds: train every method once with each; figures are then means with their standard errors.
        test: a split that no training chooses by, to measure on; by default the validation split.
        limit: validate on so many images, spread over the split.
        output: folder to write; by default `runs/NAME-compare-TIME`.
        resume: go on with `output`, or with the recipe's newest unfinished comparison.
        device: "auto", "cpu", "cuda" or "mps".
        progress: called with (label, done, total).
        log: called with a line about each that is finished.

    Raises:
        SlimError: for what cannot be compared.
        Interrupted: when training is asked to stop; what was finished is kept.
    """
    if isinstance(methods, str):
        raise SlimError(f"methods = {methods!r}: expected a list, such as [{methods!r}]")
    for name, value, least in (("epochs", epochs, 0), ("limit", limit, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise SlimError(f"{name} = {value!r}: expected a whole number of at least {least}")
    loaded = _recipe(recipe, overrides, "compare" if epochs is None else "compare --train", limit)
    folder = None if output is None else Path(output)
    rates = keep_rates_of(keep_rates, "keep_rates") or ()
    where = find_device(device)
    found = open_comparison(loaded, methods, rates, where, epochs, folder, resume, log, seeds, test)
    return run_comparison(found, progress)


def write_report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = RUNS / LATEST,
    output: str | os.PathLike[str] | None = None,
    *,
    data: str | None = None,
    limit: int = 500,
    count: int = 3,
    device: str = "auto",
    precision: str | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Write one HTML page about a run, or about several side by side. It opens from disk and needs no network.

    Args:
        runs: a run's folder, or several; by default the latest run.
        output: file to write; by default `report.html` in the run, or here for several.
        data: a folder of images in class folders instead of the runs' own.
        limit: validation images to look at.
        count: pictures of each kind.
        device: "auto", "cpu", "cuda" or "mps".
        precision: "float32", "bfloat16" or "float16"; by default the run's.
        progress: called with (label, done, total).
    """
    given = [runs] if isinstance(runs, (str, os.PathLike)) else list(runs)
    if not given:
        raise SlimError("runs: names no run: expected the folder of one")
    folders = [find_run(Path(run)) for run in given]
    default = folders[0] / REPORT if len(folders) == 1 else Path(REPORT)
    path = default if output is None else Path(output)
    check_writable(path, "file")
    where = find_device(device)
    left_out = report.write_report(folders, path, where, precision, data, limit, count, progress=progress)
    return Report(path, tuple(left_out))


def _recipe(recipe: RecipeLike, overrides: Sequence[str], command: str, limit: int | None = None) -> Recipe:
    """The recipe that is meant, with what was set."""
    if isinstance(overrides, str):
        raise SlimError(f"overrides = {overrides!r}: expected a list, such as [{overrides!r}]")
    if not isinstance(recipe, Recipe):
        return read_recipe(os.fspath(recipe), command, tuple(overrides), limit=limit)
    if overrides:
        raise SlimError("overrides: are for a recipe that is named: change the fields of yours instead")
    if limit is None:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"val_limit": limit})})
