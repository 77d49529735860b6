"""Several methods on the same model, data, arithmetic and epochs: one table and one plot."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slimcli import calibrate, train
from slimcli.calibration import images_to_fit
from slimcli.device import environment
from slimcli.errors import SlimError
from slimcli.evaluate import evaluate
from slimcli.files import write_file, write_json
from slimcli.methods.base import Method, rival
from slimcli.plugins import find_method
from slimcli.progress import Progress, no_progress
from slimcli.recipe import Recipe, SlimmingSection, StageSection
from slimcli.schedule import Schedule
from slimcli.session import Session, session_of
from slimcli.show import encode
from slimcli.slimming import SlimModel
from slimcli.store import configure, slimming_config

SETTINGS, RESULT, TABLE, PLOT = "settings.json", "compare.json", "compare.md", "compare"
#: images that a life head is fitted on where the recipe's weights bring none, and those that check the fit
FIT_IMAGES, CHECK_IMAGES, FIT_BATCH = 512, 128, 32
MARKERS = "os^DvPX<>"
#: what of a schedule stands in [slimming]; a cell replaces all of it
SCHEDULE_FIELDS = {"life_layer", "drop_layers", "keep_rate", "drops", "patches_per_layer", "method", "dead"}


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
                f"the method {name} cannot be compared untrained: its score heads must be trained (--train or --epochs)"
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
    for line in (*target.notes, *session.notes):
        comparison.log(line)
    if not target.has_classifier:
        comparison.log(f"{recipe.model.weights} has no classifier for these classes: it starts untrained")
    # a method that cannot run the model, or cannot cost so little, is refused before anything is measured
    plan = {cell: scheduled(cell, target.model) for cell in comparison.cells() if cell.method != "dense"}
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, comparison.settings())
    rows = []
    cells = comparison.cells()
    for number, cell in enumerate(cells, 1):
        path = folder / "cells" / f"{cell.name}.json"
        row = _read(path)
        if row is None:
            progress = _labelled(comparison.progress, f"{number}/{len(cells)} {cell.name}")
            start = time.perf_counter()
            found = _trained(cell, plan, comparison, progress) if cell.trained else None
            found = found or _untrained(cell, plan, session, comparison, progress)
            asked = {"method": cell.method, "title": cell.title, "keep_rate": cell.keep_rate, "trained": cell.trained}
            row = {**found, "setting": _setting(cell, plan), **asked, "seconds": round(time.perf_counter() - start, 1)}
            write_json(path, row)
            comparison.log(f"{cell.name}: {_said(row)}")
        else:
            comparison.log(f"{cell.name}: {_said(row)} (kept)")
        rows.append(row)
    for row in rows:
        row.update(_against_dense(row, rows))
    document = {
        "recipe": recipe.name,
        "model": recipe.model.name,
        "precision": recipe.precision,
        "batch_size": recipe.data.batch_size,
        "epochs": total_epochs(recipe, comparison.epochs),
        **environment(comparison.device),
        "rows": rows,
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
        return _copy_with(model, model.schedule if cell.keep_rate is None else model.at_keep_rate(cell.keep_rate))
    found = rival(cell.method, model)
    found.schedule = found.schedule_for_cost(allowed(cell, model))
    return found


def allowed(cell: Cell, model: SlimModel) -> int:
    """Multiply-adds that a method may cost: what the keep rate stands for, or what the recipe's own schedule costs."""
    return model.cost(model.schedule) if cell.keep_rate is None else model.usual_cost(cell.keep_rate)


def _copy_with(model: SlimModel, schedule: Schedule) -> SlimModel:
    """`model` under another schedule: the same modules, none of them copied."""
    other = type(model)(model.model, schedule, model.temperature, model.backbone, model.dead)
    setattr(other, model.selector_name, model.selector)
    configure(other, slimming_config(model))
    return other


def _setting(cell: Cell, plan: dict[Cell, SlimModel]) -> dict[str, Any]:
    """How a method came to its cost: its keep rate at which layers, or its patches in every block."""
    config = slimming_config(plan[cell]) if cell in plan else {}
    return {key: config[key] for key in ("keep_rate", "drop_layers", "drops", "patches_per_layer") if key in config}


def _untrained(
    cell: Cell, plan: dict[Cell, SlimModel], session: Session, comparison: Comparison, progress: Progress
) -> dict[str, Any]:
    """The figures of a cell without any training; a life head that was never taught is calibrated first."""
    target, device, dtype = session.target, session.device, session.dtype
    loader = session.loader(session.images())
    if cell.method == "dense":
        return evaluate(target.model, loader, [], device, dtype, progress)[0]
    if cell.method == target.model.method and not target.has_life_head:
        # as `slim calibrate` does, on training images without their labels
        cost = calibrate.Cost(allowed(cell, target.model))
        fit_on, check_on, count = images_to_fit(session, FIT_IMAGES, CHECK_IMAGES, FIT_BATCH)
        calibrate.calibrate(target.model, cost, fit_on, check_on, count, device, dtype, progress)
        plan[cell] = _copy_with(target.model, target.model.schedule)
    return evaluate(plan[cell], loader, None, device, dtype, progress)[1]


def _trained(cell: Cell, plan: dict[Cell, SlimModel], comparison: Comparison, progress: Progress) -> dict[str, Any]:
    """The figures of a cell after training; a training that was interrupted goes on."""
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
    return {**summary["rows"][-1], "run": str(run)}


def _unfinished(recipe: Recipe) -> Path | None:
    try:
        return train.unfinished_run(recipe)
    except SlimError:
        return None


def slimming_section(recipe: Recipe, model: SlimModel) -> SlimmingSection:
    """The recipe's [slimming] with the method and the schedule of `model`."""
    given = recipe.slimming.model_dump(exclude_none=True, exclude=SCHEDULE_FIELDS)
    return SlimmingSection.model_validate({**given, **slimming_config(model)}, strict=False)


def backbone_stage(recipe: Recipe) -> StageSection:
    """The last stage that teaches the backbone: its learning rate and losses are every method's."""
    stages = [stage for stage in recipe.stages if stage.learns != "life"]
    if not stages:
        raise SlimError(f"{recipe.name} has no stage that teaches the backbone: there is nothing to compare trained")
    return stages[-1]


def total_epochs(recipe: Recipe, epochs: int | None) -> int:
    """Epochs that every method is trained for."""
    return 0 if epochs is None else epochs or sum(stage.epochs for stage in recipe.stages)


def stages_for(method: str, recipe: Recipe, epochs: int | None) -> list[StageSection]:
    """How a method spends the epochs: life regression by the recipe's stages, every other in one stage.

    Rules that learn nothing train the backbone with patches gone, as in inference; one with a mode `soft` of its own
    trains that and the backbone together; the dense model trains as it is.
    """
    stage, total = backbone_stage(recipe), total_epochs(recipe, epochs)
    lr = stage.backbone_lr or stage.lr
    one = {"name": None, "epochs": total, "lr": lr, "backbone_lr": None}
    if method == "dense":
        return [stage.model_copy(update={**one, "learns": "backbone", "mode": "none", "keep_rates": None})]
    kind = find_method(method)
    if issubclass(kind, Method):
        if "soft" not in kind.modes:
            return [stage.model_copy(update={**one, "learns": "backbone", "mode": "hard"})]
        head_lr = next((s.lr for s in recipe.stages if s.learns != "backbone"), lr)
        return [
            stage.model_copy(update={**one, "lr": head_lr, "backbone_lr": lr, "learns": "both", "mode": "soft"}),
        ]
    if not epochs:
        return list(recipe.stages)
    count = len(recipe.stages)
    if epochs < count:
        raise SlimError(f"--epochs {epochs}: {recipe.name} has {count} stages, and each needs an epoch at least")
    # what is over goes to the last stages
    shares = [epochs // count + (index >= count - epochs % count) for index in range(count)]
    return [s.model_copy(update={"epochs": n}) for s, n in zip(recipe.stages, shares, strict=True)]


def open_folder(comparison: Comparison, resume: bool) -> None:
    """Check that the folder is new, or that what stands in it was measured with the same settings."""
    path = comparison.folder / SETTINGS
    if not path.is_file():
        if comparison.folder.is_dir() and any(comparison.folder.iterdir()):
            raise SlimError(f"{comparison.folder}: is there already and is no comparison: choose another folder")
        return
    if not resume:
        raise SlimError(f"{comparison.folder}: is a comparison already: --resume goes on with it")
    before, now = _read(path) or {}, comparison.settings()
    changed = [key for key in now if key != "recipe" and before.get(key) != now[key]]
    recipe = before.get("recipe", {})
    changed += [f"recipe.{key}" for key in now["recipe"] if recipe.get(key) != now["recipe"][key]]
    if changed:
        raise SlimError(
            f"{comparison.folder}: was measured with other settings (differs in {', '.join(changed)}): "
            "give the same ones, or start anew without --resume"
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
        f"{recipe.output}: has no unfinished comparison of {recipe.name}: start one without --resume, "
        "or name a finished one with --output"
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


def score_of(row: dict[str, Any]) -> float:
    """Top-1 in percent, or 100 times the cosine of the features where there is no classifier."""
    return float(row["top1"]) if "top1" in row else 100 * float(row["similarity"])


def _said(row: dict[str, Any]) -> str:
    name = "top-1" if "top1" in row else "cosine x 100"
    return f"{name} {score_of(row):.2f}, {row['gmacs']:.4g} G, speed-up {row['speedup']:.2f}"


def _against_dense(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Points lost against the dense model given the same epochs, and the share of the arithmetic's gain in time."""
    dense = [other for other in rows if other["method"] == "dense"][-1]
    arithmetic = dense["gmacs"] / row["gmacs"]
    lost = score_of(dense) - score_of(row)
    return {"lost": round(lost, 3), "realised": round(row["speedup"] / arithmetic, 4)}


def setting_text(row: dict[str, Any]) -> str:
    """How a method came to its cost, in a few words."""
    setting = row.get("setting") or {}
    if "keep_rate" in setting:
        return f"keep {setting['keep_rate']:.4g} after {', '.join(map(str, setting['drop_layers']))}"
    if "drops" in setting:
        return "keep " + ", ".join(f"{rate:.4g} after {layer}" for layer, rate in setting["drops"])
    if "patches_per_layer" in setting:
        counts = setting["patches_per_layer"]
        falls = sorted({a - b for a, b in itertools.pairwise(counts)})
        return f"{falls[0]} to {falls[-1]} fewer after each block"
    return "-"


def markdown(document: dict[str, Any]) -> str:
    """The table, with what it was measured on."""
    rows = document["rows"]
    score = "Top-1 (%)" if "top1" in rows[0] else "Cosine x 100"
    epochs = document["epochs"]
    how = f"each trained for {epochs} epochs" if epochs else "nothing trained"
    lines = [
        f"# {document['recipe']}: {document['model']}, {how}",
        "",
        f"| Method | Keep rate | Setting | G multiply-adds | {score} | Lost | img/s | Speed-up | Of ideal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = "-" if row["method"] == "dense" else "own" if row["keep_rate"] is None else f"{row['keep_rate']:g}"
        lines.append(
            f"| {row['title']} | {rate} | {setting_text(row)} | {row['gmacs']:.4f} | {score_of(row):.2f} | "
            f"{row['lost']:.2f} | {row['images_per_second']:.1f} | {row['speedup']:.2f} | {row['realised']:.2f} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines += [
        "",
        f"{rows[0]['images']} images, {document['precision']}, batch {document['batch_size']}, "
        f"{document['device_name']}, {document['threads']} threads; {versions}; commit {document['git_commit']}.",
        "Every method costs at most what three drops with discarding cost at the keep rate. Speed-up is over the dense "
        "model, measured in turn on the same batches; of ideal: speed-up over the ratio of multiply-adds.",
        "",
    ]
    return "\n".join(lines)


def draw(document: dict[str, Any]) -> Figure:
    """Accuracy against multiply-adds, and against throughput with the dense model's as 1."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = document["rows"]
    _points(left, rows, lambda row: row["gmacs"])
    _points(right, rows, lambda row: row["speedup"])
    left.set_xlabel("G multiply-adds an image")
    right.set_xlabel("throughput, dense = 1")
    left.set_ylabel("top-1 (%)" if "top1" in rows[0] else "cosine with dense x 100")
    right.legend(frameon=False, fontsize=9)
    epochs = document["epochs"]
    figure.suptitle(f"{document['model']}: {f'{epochs} epochs each' if epochs else 'nothing trained'}", fontsize=11)
    return figure


def _points(axes: Axes, rows: Sequence[dict[str, Any]], place: Callable[[dict[str, Any]], float]) -> None:
    """One line a method, its keep rates joined; the dense models as stars."""
    titles = list(dict.fromkeys(row["title"] for row in rows))
    colours = itertools.cycle(["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555"])
    markers = itertools.cycle(MARKERS)
    for title in titles:
        own = sorted((row for row in rows if row["title"] == title), key=place)
        dense = own[0]["method"] == "dense"
        style: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 12} if dense else {}
        if dense and own[0]["trained"]:
            style["markerfacecolor"] = "white"
        if not dense:
            style = {"color": next(colours), "marker": next(markers), "markersize": 6}
        axes.plot([place(row) for row in own], [score_of(row) for row in own], label=title, linewidth=1.2, **style)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
