"""Several methods on the same model, data, arithmetic and epochs: one table and one plot."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slimcli import train
from slimcli.calibration.goal import Cost
from slimcli.calibration.search import fit_and_search
from slimcli.calibration.workflow import images_to_fit
from slimcli.comparison.stages import backbone_stage as backbone_stage
from slimcli.comparison.stages import slimming_section, total_epochs
from slimcli.comparison.stages import stages_for as stages_for
from slimcli.comparison.table import Line, against_dense, draw, markdown
from slimcli.device import environment
from slimcli.errors import SlimError, parameter
from slimcli.files import write_file, write_json
from slimcli.measure.evaluation import evaluate
from slimcli.measure.rows import Row, read_rows
from slimcli.methods.base import Method
from slimcli.pictures import encode
from slimcli.plugins import find_method
from slimcli.progress import Progress, no_progress
from slimcli.recipe import Recipe
from slimcli.session.session import Session, session_of
from slimcli.slimming import SlimModel, rival
from slimcli.store.model_folder import slimming_config

SETTINGS, RESULT, TABLE, PLOT = "settings.json", "compare.json", "compare.md", "compare"
#: images that a life head is fitted on where the recipe's weights bring none, and those that check the fit
FIT_IMAGES, CHECK_IMAGES, FIT_BATCH = 512, 128, 32


@dataclass(frozen=True)
class Cell:
    """One line of the table: a method at a keep rate (None: the recipe's own schedule), or the dense model."""

    method: str
    keep_rate: float | None = None
    trained: bool = False

    @property
    def name(self) -> str:
        if self.method == "dense":
            return "dense-trained" if self.trained else "dense"
        return f"{self.method}-{'own' if self.keep_rate is None else format(self.keep_rate, 'g')}"

    @property
    def title(self) -> str:
        """How the table calls it."""
        return "dense, trained" if self.method == "dense" and self.trained else self.method


@dataclass
class Comparison:
    """What is compared, how, and where it is kept. `epochs` None trains nothing; 0 means the recipe's own stages."""

    recipe: Recipe
    methods: Sequence[str]
    keep_rates: Sequence[float | None]
    folder: Path
    device: torch.device
    epochs: int | None = None
    progress: Progress = no_progress
    log: Callable[[str], None] = field(default=lambda _line: None)

    @property
    def trains(self) -> bool:
        return self.epochs is not None

    def cells(self) -> list[Cell]:
        """Every line of the table, in order: dense first."""
        dense = [Cell("dense"), *([Cell("dense", trained=True)] if self.trains else [])]
        return dense + [Cell(name, rate, self.trains) for name in self.methods for rate in self.keep_rates]

    def settings(self) -> dict[str, Any]:
        """What decides the figures of a cell: it must be the same when a comparison goes on."""
        kept = self.recipe.model_dump(mode="json", exclude={"output", "checkpoint_minutes", "tracker", "description"})
        return {"recipe": kept, "epochs": self.epochs, "device": self.device.type}


def check(comparison: Comparison) -> None:
    """`SlimError` for what cannot be compared, before anything is measured."""
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
    session.images()
    for note in (*target.notes, *session.notes):
        comparison.log(note)
    if not target.has_classifier:
        comparison.log(f"{recipe.model.weights} has no classifier for these classes: it starts untrained")
    # a method that cannot run the model, or cannot cost so little, is refused before anything is measured
    plan = {cell: scheduled(cell, target.model) for cell in comparison.cells() if cell.method != "dense"}
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, comparison.settings())
    lines: list[Line] = []
    cells = comparison.cells()
    for number, cell in enumerate(cells, 1):
        path = folder / "cells" / f"{cell.name}.json"
        kept = _read(path)
        if kept is None:
            progress = _labelled(comparison.progress, f"{number}/{len(cells)} {cell.name}")
            start = time.perf_counter()
            found = _trained(cell, plan, comparison, progress) if cell.trained else None
            row, run = found or (_untrained(cell, plan, session, progress), None)
            seconds = round(time.perf_counter() - start, 1)
            line = Line(
                row.also(method=cell.method, keep_rate=cell.keep_rate),
                cell.title, cell.trained, _setting(cell, plan), run, seconds,
            )  # fmt: skip
            write_json(path, line)
            comparison.log(f"{cell.name}: {line.summary}")
        else:
            line = Line.from_json(kept)
            comparison.log(f"{cell.name}: {line.summary} (kept)")
        lines.append(line)
    document = {
        "recipe": recipe.name,
        "model": recipe.model.name,
        "precision": recipe.precision,
        "batch_size": recipe.data.batch_size,
        "epochs": total_epochs(recipe, comparison.epochs),
        **environment(comparison.device),
        "rows": against_dense(lines),
    }
    write_json(folder / RESULT, document)
    write_file(folder / TABLE, markdown(document).encode())
    figure = draw(document)
    for kind in ("png", "svg"):
        write_file(folder / f"{PLOT}.{kind}", encode(figure, kind, dpi=150))
    return document


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


def _untrained(cell: Cell, plan: dict[Cell, SlimModel], session: Session, progress: Progress) -> Row:
    """The figures of a cell without any training; a life head that was never taught is calibrated first."""
    target, device, dtype = session.target, session.device, session.dtype
    loader = session.loader(session.images())
    if cell.method == "dense":
        return evaluate(target.model, loader, [], device, dtype, progress)[0]
    if cell.method == target.model.method and not target.has_life_head:
        # as `slim calibrate` does, on training images without their labels
        cost = Cost(allowed(cell, target.model))
        fit_on, check_on, count = images_to_fit(session, FIT_IMAGES, CHECK_IMAGES, FIT_BATCH)
        fit_and_search(target.model, cost, fit_on, check_on, count, device, dtype, progress)
        plan[cell] = target.model.with_schedule(target.model.schedule)
    return evaluate(plan[cell], loader, None, device, dtype, progress)[1]


def _trained(cell: Cell, plan: dict[Cell, SlimModel], comparison: Comparison, progress: Progress) -> tuple[Row, str]:
    """The figures of a cell after training, and its run; a training that was interrupted goes on."""
    recipe = comparison.recipe
    section = recipe.slimming if cell.method == "dense" else slimming_section(recipe, plan[cell])
    own = recipe.model_copy(
        update={
            "name": cell.name,
            "output": comparison.folder / "runs",
            "slimming": section,
            "stages": stages_for(cell.method, recipe, comparison.epochs),
        }
    )
    log = comparison.log
    run, summary = train.train(
        own, comparison.device.type, _unfinished(own), progress, lambda line: log(f"{cell.name}: {line}")
    )
    return read_rows(summary["rows"])[-1], str(run)


def _unfinished(recipe: Recipe) -> Path | None:
    try:
        return train.unfinished_run(recipe)
    except SlimError:
        return None


def open_folder(comparison: Comparison, resume: bool) -> None:
    """Check that the folder is new, or that what stands in it was measured with the same settings."""
    path = comparison.folder / SETTINGS
    if not path.is_file():
        if comparison.folder.is_dir() and any(comparison.folder.iterdir()):
            raise SlimError(f"{comparison.folder}: is there already and is no comparison: choose another folder")
        return
    if not resume:
        raise SlimError(f"{comparison.folder}: is a comparison already: {parameter('resume')} goes on with it")
    before, now = _read(path) or {}, comparison.settings()
    changed = [key for key in now if key != "recipe" and before.get(key) != now[key]]
    recipe = before.get("recipe", {})
    changed += [f"recipe.{key}" for key in now["recipe"] if recipe.get(key) != now["recipe"][key]]
    if changed:
        raise SlimError(
            f"{comparison.folder}: was measured with other settings (differs in {', '.join(changed)}): "
            f"give the same ones, or start anew without {parameter('resume')}"
        )


def unfinished(recipe: Recipe) -> Path:
    """The newest comparison of this recipe that has not ended; `SlimError` if there is none."""
    found = sorted(
        recipe.output.glob(f"{recipe.name}-compare-*/{SETTINGS}"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    for path in found:
        if not (path.parent / RESULT).is_file():
            return path.parent
    raise SlimError(
        f"{recipe.output}: has no unfinished comparison of {recipe.name}: start one without {parameter('resume')}, "
        f"or name a finished one with {parameter('output')}"
    )


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SlimError(f"{path}: is damaged ({error}): remove it, and it is measured again") from error
    return content


def _labelled(progress: Progress, name: str) -> Progress:
    return lambda label, done, total: progress(f"{name} {label}", done, total)
