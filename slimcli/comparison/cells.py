"""Several methods on the same model, data, arithmetic and epochs: one table and one plot."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from slimcli import train
from slimcli.calibration.goal import Cost
from slimcli.calibration.search import fit_and_search
from slimcli.calibration.workflow import images_to_fit
from slimcli.comparison.folder import PLOT, RESULT, SETTINGS, TABLE, read_cell
from slimcli.comparison.line import Line, against_dense
from slimcli.comparison.seeds import over_seeds, pairs
from slimcli.comparison.stages import backbone_stage as backbone_stage
from slimcli.comparison.stages import slimming_section, total_epochs
from slimcli.comparison.stages import stages_for as stages_for
from slimcli.comparison.table import draw, markdown
from slimcli.data import has_split
from slimcli.device import environment
from slimcli.errors import SlimError, parameter
from slimcli.files import write_file, write_json
from slimcli.measure.evaluation import evaluate
from slimcli.measure.operators import operators_of_a_pass
from slimcli.measure.profiling import random_images
from slimcli.methods.base import Method
from slimcli.pictures import encode
from slimcli.plugins import find_method
from slimcli.progress import Progress, no_progress
from slimcli.recipe import Recipe
from slimcli.session.session import Session, session_of
from slimcli.slimming import SlimModel, rival
from slimcli.store.model_folder import load, slimming_config

#: images that a life head is fitted on where the recipe's weights bring none, and those that check the fit
FIT_IMAGES, CHECK_IMAGES, FIT_BATCH = 512, 128, 32


@dataclass(frozen=True)
class Cell:
    """One measurement: a method at a keep rate (None: the recipe's own schedule), or the dense model, with a seed."""

    method: str
    keep_rate: float | None = None
    trained: bool = False
    seed: int | None = None

    @property
    def name(self) -> str:
        if self.method == "dense":
            name = "dense-trained" if self.trained else "dense"
        else:
            name = f"{self.method}-{'own' if self.keep_rate is None else format(self.keep_rate, 'g')}"
        return name if self.seed is None else f"{name}-seed{self.seed}"

    @property
    def title(self) -> str:
        """How the table calls it."""
        return "dense, trained" if self.method == "dense" and self.trained else self.method


@dataclass
class Comparison:
    """What is compared, how, and where it is kept. `epochs` None trains nothing; 0 means the recipe's own stages.

    `seeds` stand in the place of the recipe's; `test` is the split that is measured on, by default the validation
    split, which trainings choose their best epoch on too.
    """

    recipe: Recipe
    methods: Sequence[str]
    keep_rates: Sequence[float | None]
    folder: Path
    device: torch.device
    epochs: int | None = None
    progress: Progress = no_progress
    log: Callable[[str], None] = field(default=lambda _line: None)
    seeds: Sequence[int] = ()
    test: str | None = None

    @property
    def trains(self) -> bool:
        return self.epochs is not None

    def taught_once(self, method: str) -> bool:
        """Whether one training of a method serves all its keep rates: every stage teaches all of them, none softly.

        A selector that learns softly learns what leaves at its own keep rate.
        """
        given = set(self.keep_rates)
        stages = stages_for(method, self.recipe, self.epochs) if len(given) > 1 and method != "dense" else []
        return bool(stages) and all(s.mode == "hard" and given <= set(s.keep_rates or ()) for s in stages)

    def cells(self) -> list[Cell]:
        """Every measurement, dense first, seed after seed: what is finished early has all methods."""
        found = [Cell("dense")]
        for seed in self.seeds or (None,):
            if self.trains:
                found.append(Cell("dense", trained=True, seed=seed))
            for name in self.methods:
                # where nothing is trained, only the calibration of a life head is drawn at random
                drawn = self.trains or name == self.recipe.slimming.method
                own = seed if drawn else None
                found += [Cell(name, rate, self.trains, own) for rate in self.keep_rates]
        return list(dict.fromkeys(found))

    def settings(self) -> dict[str, Any]:
        """What decides the figures of a cell: it must be the same when a comparison goes on."""
        kept = self.recipe.model_dump(mode="json", exclude={"output", "checkpoint_minutes", "tracker", "description"})
        return {"recipe": kept, "epochs": self.epochs, "device": self.device.type, "test": self.test}


def check(comparison: Comparison) -> None:
    """`SlimError` for what cannot be compared, before anything is measured."""
    data = comparison.recipe.data
    if comparison.test is not None and (data.root is None or not has_split(data.root, comparison.test)):
        raise SlimError(
            f"{parameter('test', comparison.test)}: {data.root or data.name} has no folder or .tar of that name to "
            "measure on"
        )
    if issubclass(find_method(comparison.recipe.slimming.method), Method):
        raise SlimError(
            f'slimming.method = "{comparison.recipe.slimming.method}": a comparison starts from a recipe of life '
            "regression, whose arithmetic the others are given: leave the field out"
        )
    for name in comparison.methods:
        kind = find_method(name)
        if not comparison.trains and "soft" in kind.modes and issubclass(kind, Method):
            raise SlimError(
                f"the method {name} cannot be compared untrained: it learns what leaves, and must be trained "
                f"(`slim compare --train`, or {parameter('epochs')})"
            )
    if comparison.trains:
        backbone_stage(comparison.recipe)
        for name in comparison.methods:
            stages_for(name, comparison.recipe, comparison.epochs)


def compare(comparison: Comparison) -> dict[str, Any]:
    """Fill every cell that is not on disk yet; write table and plot; return what was written.

    Raises `Interrupted` when training is asked to stop; cells that were finished are kept.
    """
    recipe, folder = comparison.recipe, comparison.folder
    check(comparison)
    torch.manual_seed(recipe.seed)
    session = session_of(recipe, comparison.device)
    target = session.target
    images = _images(comparison, session)
    for note in (*target.notes, *session.notes):
        comparison.log(note)
    if not target.has_classifier:
        comparison.log(f"{recipe.model.weights} has no classifier for these classes: it starts untrained")
    # a method that cannot run the model, or cannot cost so little, is refused before anything is measured
    cells = comparison.cells()
    plan = {cell: scheduled(cell, target.model) for cell in cells if cell.method != "dense"}
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, comparison.settings())
    lines: list[Line] = []
    runs: dict[Cell, str] = {}
    for number, cell in enumerate(cells, 1):
        path = folder / "cells" / f"{cell.name}.json"
        kept = read_cell(path)
        if kept is None:
            progress = labelled(comparison.progress, f"{number}/{len(cells)} {cell.name}")
            line = _measured(cell, plan, comparison, session, images, progress, runs.get(_training(cell, comparison)))
            write_json(path, line)
            comparison.log(f"{cell.name}: {line.summary}")
        else:
            line = Line.from_json(kept)
            comparison.log(f"{cell.name}: {line.summary} (kept)")
        lines.append(line)
        if line.run is not None:
            runs.setdefault(_training(cell, comparison), line.run)
    lines = against_dense(lines)
    document = {
        "recipe": recipe.name,
        "model": recipe.model.name,
        "precision": recipe.precision,
        "batch_size": recipe.data.batch_size,
        "epochs": total_epochs(recipe, comparison.epochs),
        "seeds": list(comparison.seeds),
        "measured_on": comparison.test or recipe.data.val_split,
        "chosen_on": recipe.data.val_split if comparison.trains else None,
        **environment(comparison.device),
        "pairs": pairs(lines),
        "rows": over_seeds(lines),
    }
    write_json(folder / RESULT, document)
    write_file(folder / TABLE, markdown(document).encode())
    figure = draw(document)
    for kind in ("png", "svg"):
        write_file(folder / f"{PLOT}.{kind}", encode(figure, kind, dpi=150))
    return document


def _images(comparison: Comparison, session: Session) -> Any:
    """The images that every cell is measured on."""
    return session.images() if comparison.test is None else session.images(val_split=comparison.test)


def scheduled(cell: Cell, model: SlimModel) -> SlimModel:
    """The cell's method on the dense model of `model`, set to cost what the keep rate stands for."""
    if cell.method == model.method:
        return model.with_schedule(model.schedule if cell.keep_rate is None else model.at_keep_rate(cell.keep_rate))
    found = rival(cell.method, model)
    found.schedule = found.schedule_for_cost(allowed(cell, model))
    return found


def allowed(cell: Cell, model: SlimModel) -> int:
    """Multiply-adds that a method may cost: what the keep rate stands for, or what the recipe's own schedule costs."""
    return model.cost(model.schedule) if cell.keep_rate is None else model.usual_cost(cell.keep_rate)


def _setting(cell: Cell, plan: dict[Cell, SlimModel]) -> dict[str, Any]:
    """How a method came to its cost: its keep rate at which layers, or its patches in every block."""
    config = slimming_config(plan[cell]) if cell in plan else {}
    return {key: config[key] for key in ("keep_rate", "drop_layers", "drops", "patches_per_layer") if key in config}


def _training(cell: Cell, comparison: Comparison) -> Cell:
    """The cell whose training a cell is measured after: the first of its keep rates where one training serves all."""
    return replace(cell, keep_rate=comparison.keep_rates[0]) if comparison.taught_once(cell.method) else cell


def _measured(
    cell: Cell,
    plan: dict[Cell, SlimModel],
    comparison: Comparison,
    session: Session,
    images: Any,
    progress: Progress,
    trained: str | None,
) -> Line:
    """A cell measured, after its training or, where nothing is trained, its calibration.

    `trained` is the run of a training that serves this keep rate as well. Likeness is to the dense model as the recipe
    brings it, also that of what was trained.
    """
    target, device, dtype = session.target, session.device, session.dtype
    start = time.perf_counter()
    dense, run = cell.method == "dense", None
    if cell.trained:
        first = _training(cell, comparison)
        run = _train(first, plan, comparison, progress) if trained is None else Path(trained)
        model = load(run)
        if first != cell:
            model = model.with_schedule(plan[cell].schedule)
    else:
        _calibrate(cell, plan, session, progress)
        model = target.model if dense else plan[cell]
    reference = target.model.to(device, dtype).eval()
    rows = evaluate(model, session.loader(images), [] if dense else None, device, dtype, progress, reference)
    return Line(
        rows[-1].also(method=cell.method, keep_rate=cell.keep_rate),
        cell.title,
        cell.trained,
        _setting(cell, plan),
        None if run is None else str(run),
        round(time.perf_counter() - start, 1),
        seed=cell.seed,
        asks=_asks(model, dense, device, dtype),
    )


def _asks(model: SlimModel, dense: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a method asks for beside its arithmetic: parameters that it learns, operators of a pass, a way to export."""
    with model.running(mode="none" if dense else "hard"):
        counted = operators_of_a_pass(model, random_images(model, 1, device, dtype))
    extra = 0 if dense else sum(parameter.numel() for parameter in model.selector.parameters())
    return {"extra_parameters": extra, "operators": counted, "exports": model.no_graph is None or dense}


def _calibrate(cell: Cell, plan: dict[Cell, SlimModel], session: Session, progress: Progress) -> None:
    """Teach a life head that was never taught, as `slim calibrate` does, on training images without their labels."""
    target = session.target
    # a head that came with the recipe's weights stays as it is
    if cell.method != target.model.method or target.has_life_head:
        return
    torch.manual_seed(session.recipe.seed if cell.seed is None else cell.seed)
    cost = Cost(allowed(cell, target.model))
    fit_on, check_on, count = images_to_fit(session, FIT_IMAGES, CHECK_IMAGES, FIT_BATCH)
    purpose = "patches" if target.model.segments else "class"
    fit_and_search(
        target.model, cost, fit_on, check_on, count, session.device, session.dtype, progress, purpose=purpose
    )
    plan[cell] = target.model.with_schedule(target.model.schedule)


def _train(cell: Cell, plan: dict[Cell, SlimModel], comparison: Comparison, progress: Progress) -> Path:
    """The run of a cell; a training that was interrupted goes on."""
    recipe = comparison.recipe
    section = recipe.slimming if cell.method == "dense" else slimming_section(recipe, plan[cell])
    own = recipe.model_copy(
        update={
            "name": cell.name,
            "output": comparison.folder / "runs",
            "seed": recipe.seed if cell.seed is None else cell.seed,
            "slimming": section,
            "stages": stages_for(cell.method, recipe, comparison.epochs),
        }
    )
    log = comparison.log
    return train_or_go_on(own, comparison.device, progress, lambda line: log(f"{cell.name}: {line}"))


def train_or_go_on(recipe: Recipe, device: torch.device, progress: Progress, log: Callable[[str], None]) -> Path:
    """Train by a recipe; a training of it that was interrupted goes on. Returns the run's folder."""
    try:
        begun = train.unfinished_run(recipe)
    except SlimError:
        begun = None
    run, _ = train.train(recipe, device.type, begun, progress, log)
    return run


def labelled(progress: Progress, name: str) -> Progress:
    """The progress of a part called `name`."""
    return lambda label, done, total: progress(f"{name} {label}", done, total)
