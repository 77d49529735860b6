"""The paper's tables from what a user asks for: its folder, the cells that are missing, the tables and the figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slimcli import pictures
from slimcli.comparison.cells import labelled
from slimcli.comparison.folder import read_cell, start_folder, unfinished_folder
from slimcli.comparison.line import Line
from slimcli.data import open_splits
from slimcli.data.loaders import check_fills_a_batch
from slimcli.device import environment
from slimcli.errors import SlimError, parameter
from slimcli.files import check_writable, write_file, write_json
from slimcli.paper.cells import Cell, identity, measured, recipe_of, runnable, wanted
from slimcli.paper.layout import Place, Table, document_of, markdown, tables_of
from slimcli.paper.models import Entrant
from slimcli.paper.published import FIGURE, KEEP_RATE, METHODS, OTHERS_EPOCHS, PARTS, PLACES, TITLES, Entry
from slimcli.plugins import find_method
from slimcli.progress import Progress, no_progress
from slimcli.recipe import Recipe
from slimcli.session.session import Request, Session, open_session, session_of
from slimcli.store.run_folder import RUNS, new_run_folder

STEM, SETTINGS, RESULT, TEXT = "paper-tables", "settings.json", "paper.json", "paper.md"
WHAT = "measurement of the paper"
#: epochs of other methods in a quick run
QUICK_EPOCHS = 2
#: images in figure 4, and the seed that they are drawn by
FIGURE_IMAGES, FIGURE_SEED = 4, 0


@dataclass(frozen=True)
class Reproduced:
    """What was measured for the paper's tables.

    `tables` have the lines of each; a line its `entry`, with the paper's figures, and what was measured, a `Line`.
    `figure` is the picture of figure 4, where it was asked for. `folder` holds `paper.json`, which says what `document`
    does, the tables as Markdown, and the figure.
    """

    folder: Path
    tables: tuple[Table, ...]
    figure: Path | None
    document: dict[str, Any] = field(repr=False)


@dataclass
class Work:
    """All that is to be done, checked."""

    folder: Path
    device: torch.device
    parts: Sequence[str]
    log: Callable[[str], None]
    #: the models by their keys, and the recipe of every cell, in the order in which they are measured
    sessions: dict[str, Session] = field(default_factory=dict)
    recipes: dict[Cell, Recipe] = field(default_factory=dict)
    #: what stands for each model of the paper
    models: dict[str, str] = field(default_factory=dict)
    #: the lines of the tables
    places: list[tuple[Entry, Entrant, Cell]] = field(default_factory=list)
    #: the cell whose model figure 4 shows
    figure: Cell | None = None
    notes: list[str] = field(default_factory=list)

    def path(self, cell: Cell) -> Path:
        """The file of a cell."""
        return self.folder / "cells" / f"{cell.name}.json"

    def kept(self, cell: Cell) -> Line | None:
        """What was measured of a cell before; None where it was not.

        Raises:
            SlimError: where its file was measured with other settings.
        """
        content = read_cell(self.path(cell))
        if content is None:
            return None
        now = identity(self.recipes[cell], self.sessions[cell.key])
        before = content.get("settings", {})
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise SlimError(
                f"{self.path(cell)}: was measured with other settings (differs in {', '.join(changed)}): give the same "
                "ones, or another folder; or remove the file, and it is measured again"
            )
        return Line.from_json(content["line"])


def open_paper(
    entrants: Sequence[Entrant],
    device: torch.device,
    parts: Sequence[str] = (),
    methods: Sequence[str] = (),
    epochs: int | None = None,
    output: Path | None = None,
    resume: bool = False,
    quick: bool = False,
    log: Callable[[str], None] = lambda _line: None,
) -> Work:
    """The work, all of it checked, with its folder: a new one, or the one that it goes on in.

    `parts` are tables and the figure, by default all; `methods` those that stand beside the paper's own, by default
    the paper's; `epochs` what they are trained for.

    Raises:
        SlimError: for what cannot be measured, and a folder that holds something else.
    """
    names = {part.lower(): part for part in PARTS}
    unknown = [part for part in parts if part.lower() not in names]
    if unknown:
        raise SlimError(f"{parameter('parts', unknown[0])}: expected some of {', '.join(PARTS)}")
    chosen = [part for part in PARTS if part.lower() in {one.lower() for one in parts or PARTS}]
    for name in methods:
        find_method(name)
    check_writable(output or RUNS, "folder")
    if output is None and resume:
        output = unfinished_folder(RUNS, STEM, SETTINGS, RESULT, WHAT)
    elif output is not None and not start_folder(output, SETTINGS, WHAT, resume) and resume:
        raise SlimError(f"{output}: is no {WHAT} to go on with: start it without {parameter('resume')}")
    work = Work(output or Path(), device, chosen, log)
    _plan(work, entrants, methods, epochs or (QUICK_EPOCHS if quick else OTHERS_EPOCHS))
    if output is None:
        work.folder = new_run_folder(RUNS, STEM)
    else:
        for cell in work.recipes:
            work.kept(cell)
    runs = {"output": work.folder / "runs"}
    work.recipes = {cell: recipe.model_copy(update=runs) for cell, recipe in work.recipes.items()}
    return work


def _plan(work: Work, entrants: Sequence[Entrant], methods: Sequence[str], epochs: int) -> None:
    """Fill in sessions, places and recipes; what a model cannot run is left out with a note, or refused if named."""
    tables = [part for part in work.parts if part in TITLES]
    places = wanted(entrants, tables, [*dict.fromkeys([*methods, "life"])] if methods else [*METHODS])
    needed = [(cell, entrant) for _, entrant, cell in places]
    if FIGURE in work.parts:
        shown = next((one for one in entrants if "deit-s" in one.places), entrants[0])
        work.figure = Cell(shown.key, "life", KEEP_RATE)
        needed.append((work.figure, shown))
    if not needed:
        raise SlimError(
            f"{parameter('backbones')}: stand in no part that was asked for: tables III to V are of {PLACES['deit-s']}"
        )
    refused: dict[Cell, str] = {}
    for cell, entrant in dict(needed).items():
        if cell.key not in work.sessions:
            work.sessions[cell.key] = _session(entrant, work)
        model = work.sessions[cell.key].target.model
        reason = runnable(cell, model)
        if reason is None:
            work.recipes[cell] = recipe_of(cell, entrant, model, epochs)
        elif cell.method in methods or cell.method == "life":
            raise SlimError(f"{cell.method} on {entrant.recipe.model.name}: {reason}")
        else:
            refused[cell] = reason
            work.notes.append(f"{cell.method} is left out on {entrant.recipe.model.name}: {reason}")
    work.places = [place for place in places if place[2] not in refused]


def _session(entrant: Entrant, work: Work) -> Session:
    """The model of an entrant and its data, both looked at."""
    torch.manual_seed(entrant.recipe.seed)
    data = entrant.recipe.data
    if all(session.data != data for session in work.sessions.values()):
        train, _ = open_splits(data)
        check_fills_a_batch(train, data.batch_size)
    session = session_of(entrant.recipe, work.device, "compare --train")
    session.images()
    work.models |= {PLACES[place]: entrant.recipe.model.name for place in entrant.places}
    work.notes += [f"{entrant.recipe.model.name}: {note}" for note in (*session.target.notes, *session.notes)]
    if not session.target.has_classifier:
        work.notes.append(f"{entrant.recipe.model.name}: its weights have no classifier for these classes: untrained")
    return session


def run_paper(work: Work, progress: Progress = no_progress) -> Reproduced:
    """Measure what is missing, cell by cell; `paper.md` has what is there after each.

    Raises `Interrupted` when training is asked to stop; what was finished is kept.
    """
    (work.folder / "cells").mkdir(parents=True, exist_ok=True)
    write_json(work.folder / SETTINGS, {"parts": work.parts, "models": [r.name for r in work.recipes.values()]})
    for note in work.notes:
        work.log(note)
    lines: dict[Cell, Line] = {}
    for number, (cell, recipe) in enumerate(work.recipes.items(), 1):
        line = work.kept(cell)
        if line is None:
            session = work.sessions[cell.key]
            part = labelled(progress, f"{number}/{len(work.recipes)} {cell.name}")
            line = measured(cell, recipe, session, session.images(), part, work.log)
            write_json(work.path(cell), {"settings": identity(recipe, session), "line": line})
            work.log(f"{cell.name}: {line.summary}")
        else:
            work.log(f"{cell.name}: {line.summary} (kept)")
        lines[cell] = line
        write_file(work.folder / TEXT, markdown(_document(work, lines, None), _tables(work, lines)).encode())
    figure = _figure(work, lines, progress)
    document, tables = _document(work, lines, figure), _tables(work, lines)
    write_json(work.folder / RESULT, document)
    write_file(work.folder / TEXT, markdown(document, tables).encode())
    return Reproduced(work.folder, tables, figure, document)


def _tables(work: Work, lines: dict[Cell, Line]) -> tuple[Table, ...]:
    found = []
    for entry, entrant, cell in work.places:
        dense = lines.get(Cell(cell.key, "dense"))
        epochs = None if cell.method == "dense" else sum(stage.epochs for stage in work.recipes[cell].stages)
        found.append(Place(entry, entrant.recipe.model.name, lines.get(cell), dense, epochs))
    return tables_of(found)


def _document(work: Work, lines: dict[Cell, Line], figure: Path | None) -> dict[str, Any]:
    """What paper.json says."""
    first = next(iter(work.sessions.values()))
    images = next((line.row.images for line in lines.values()), None)
    facts = {
        "models": work.models,
        "data": first.data_label,
        "measured_on": first.data.val_split,
        "images": images,
        "precision": first.precision,
        "batch_size": first.data.batch_size,
        **environment(work.device),
        "notes": work.notes,
        "figure": None if figure is None else figure.name,
    }
    return document_of(facts, _tables(work, lines))


def _figure(work: Work, lines: dict[Cell, Line], progress: Progress) -> Path | None:
    """Figure 4: the lives of four validation images, and what is left after each drop layer."""
    if work.figure is None:
        return None
    session = open_session(Request("show", lines[work.figure].run, device=work.device.type))
    picking = pictures.Picking("random", FIGURE_IMAGES, FIGURE_SEED)
    album = pictures.open_album(session, (), picking, progress=labelled(progress, FIGURE))
    for form in ("svg", "png"):
        for sheet in album.draw(work.folder / f"{FIGURE}.{form}", form):
            drawn = sheet.path
    return drawn
