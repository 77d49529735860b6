"""The cells of the paper's tables: what is trained and measured, each once, also where it stands in several tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slimcli.comparison.cells import train_or_go_on
from slimcli.comparison.line import Line
from slimcli.comparison.stages import slimming_section, stages_for
from slimcli.errors import SlimError
from slimcli.measure.evaluation import evaluate
from slimcli.paper.models import Entrant, one_stage
from slimcli.paper.published import KEEP_RATE, METHODS, TEMPERATURE, Entry, entries, share
from slimcli.progress import Progress
from slimcli.recipe import Recipe
from slimcli.session.session import Session
from slimcli.slimming import SlimModel, rival
from slimcli.store.model_folder import load, slimming_config


@dataclass(frozen=True)
class Cell:
    """A model and how it is run. `share` of the dense model's arithmetic for a method that has it from the paper."""

    key: str
    method: str
    keep_rate: float | None = None
    one_stage: bool = False
    temperature: float = TEMPERATURE
    share: float | None = None

    @property
    def name(self) -> str:
        """How its file and its run are called."""
        if self.method == "dense":
            return f"{self.key}-dense"
        rate = f"{100 * self.share:.0f}percent" if self.share is not None else f"{self.keep_rate:g}"
        more = "-one-stage" if self.one_stage else ""
        more += "" if self.temperature == TEMPERATURE else f"-temperature{self.temperature:g}"
        return f"{self.key}-{self.method}-{rate}{more}"


def cell_of(entry: Entry, entrant: Entrant) -> Cell:
    """What has to be measured for a line of a table."""
    if entry.dense:
        return Cell(entrant.key, "dense")
    if entry.method == "life":
        return Cell(entrant.key, "life", entry.keep_rate, entry.one_stage, entry.temperature)
    known = share(entry)
    return Cell(entrant.key, entry.method, None if known else KEEP_RATE, share=known)


def wanted(
    entrants: Sequence[Entrant], tables: Sequence[str], methods: Sequence[str]
) -> list[tuple[Entry, Entrant, Cell]]:
    """Every line of the tables with its model and its cell; methods that the paper does not have come last."""
    found = []
    for table in tables:
        own = entries(table)
        for place in dict.fromkeys(entry.place for entry in own):
            entrant = next((one for one in entrants if place in one.places), None)
            if entrant is None:
                continue
            lines = [e for e in own if e.place == place and (e.dense or e.method in methods)]
            if table in ("I", "II"):
                lines += [Entry(table, place, name) for name in methods if name not in METHODS]
            found += [(entry, entrant, cell_of(entry, entrant)) for entry in lines]
    return found


def set_up(cell: Cell, model: SlimModel) -> SlimModel:
    """The cell's method on the dense model of `model`, at its cost; `SlimError` where the model cannot run it."""
    if cell.method == "life":
        assert cell.keep_rate is not None
        return model.with_schedule(model.at_keep_rate(cell.keep_rate))
    if cell.share is None:
        assert cell.keep_rate is not None
        cost: float = model.usual_cost(cell.keep_rate)
    else:
        cost = cell.share * model.cost(None)
    found = rival(cell.method, model)
    found.schedule = found.schedule_for_cost(cost)
    return found


def recipe_of(cell: Cell, entrant: Entrant, model: SlimModel, epochs: int) -> Recipe:
    """The recipe by which the cell is trained, dense models by none; `epochs` are those of other methods than life."""
    base = entrant.recipe
    if cell.method == "dense":
        return base.model_copy(update={"name": cell.name, "stages": []})
    section = slimming_section(base, set_up(cell, model))
    if cell.method == "life":
        section = section.model_copy(update={"dead": "discard", "temperature": cell.temperature})
        stages = [one_stage(base)] if cell.one_stage else list(base.stages)
    else:
        stages = stages_for(cell.method, base, epochs)
    return base.model_copy(update={"name": cell.name, "slimming": section, "stages": stages})


def identity(recipe: Recipe, session: Session) -> dict[str, Any]:
    """What decides the figures of a cell: it must be the same when its file is used again."""
    kept = recipe.model_dump(mode="json", exclude={"name", "output", "checkpoint_minutes", "tracker", "description"})
    return {**kept, "device": session.device.type}


def measured(
    cell: Cell, recipe: Recipe, session: Session, images: Any, progress: Progress, log: Callable[[str], None]
) -> Line:
    """The cell's figures, after its training; dense models are measured as they come."""
    start, run, device, dtype = time.perf_counter(), None, session.device, session.dtype
    dense = cell.method == "dense"
    model = session.target.model
    if not dense:
        run = train_or_go_on(recipe, device, progress, lambda line: log(f"{cell.name}: {line}"))
        model = load(run)
    rows = evaluate(model, session.loader(images), [] if dense else None, device, dtype, progress)
    title = "dense" if dense else cell.method
    row = rows[-1].also(method=title, keep_rate=cell.keep_rate)
    setting = {} if dense else _setting(model)
    seconds = round(time.perf_counter() - start, 1)
    return Line(row, title, not dense, setting, None if run is None else str(run), seconds)


def _setting(model: SlimModel) -> dict[str, Any]:
    config = slimming_config(model)
    return {key: config[key] for key in ("keep_rate", "drop_layers", "drops", "patches_per_layer") if key in config}


def runnable(cell: Cell, model: SlimModel) -> str | None:
    """Why the model cannot run the cell's method at its cost; None where it can."""
    try:
        if cell.method != "dense":
            set_up(cell, model)
    except SlimError as error:
        return str(error)
    return None
