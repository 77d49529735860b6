"""A comparison from what a user asks for: where it is kept, whether it goes on, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slimcli.comparison import cells
from slimcli.comparison.folder import SETTINGS, open_folder, unfinished
from slimcli.comparison.line import Line
from slimcli.errors import SlimError, parameter
from slimcli.files import check_writable
from slimcli.progress import Progress, no_progress
from slimcli.recipe import Recipe
from slimcli.store.run_folder import new_run_folder

METHODS = ("life", "evit", "tome", "random")


@dataclass(frozen=True)
class Compared:
    """What a comparison found: a line for the dense model and one for each method at each keep rate.

    A line has a `row`, the `title` of its method, and `lost`, the points of top-1 less than the dense model's. `folder`
    holds `compare.json`, which says what `document` does, the table as Markdown, and the plot.
    """

    folder: Path
    lines: tuple[Line, ...]
    document: dict[str, Any] = field(repr=False)


def open_comparison(
    recipe: Recipe,
    methods: Sequence[str] = METHODS,
    keep_rates: Sequence[float] = (),
    device: torch.device = torch.device("cpu"),  # noqa: B008
    epochs: int | None = None,
    output: Path | None = None,
    resume: bool = False,
    log: Callable[[str], None] = lambda _line: None,
    seeds: Sequence[int] = (),
    test: str | None = None,
) -> cells.Comparison:
    """A comparison that can run, all of it checked, with its folder: a new one, or the one that it goes on in.

    `epochs` None trains nothing, 0 the recipe's own stages. Every method is trained once with each of `seeds`; `test`
    is a split that no training chooses by.

    Raises:
        SlimError: for what cannot be compared, and a folder that holds something else.
    """
    if not methods:
        raise SlimError(f"{parameter('methods')} names no method: expected some of {', '.join(METHODS)}")
    check_writable(output or recipe.output, "folder")
    if output is None:
        output = unfinished(recipe) if resume else None
    elif resume and not (output / SETTINGS).is_file():
        raise SlimError(f"{output}: is no comparison to go on with: start it without {parameter('resume')}")
    rates: list[float | None] = [*dict.fromkeys(keep_rates)] if keep_rates else [None]
    found = cells.Comparison(recipe, methods, rates, output or Path(), device, epochs, log=log, seeds=seeds, test=test)
    cells.check(found)
    if output is None:
        found.folder = new_run_folder(recipe.output, f"{recipe.name}-compare")
    open_folder(found.folder, found.settings(), resume)
    return found


def run_comparison(comparison: cells.Comparison, progress: Progress = no_progress) -> Compared:
    """Fill the table; `Interrupted` when training is asked to stop, with what was finished kept."""
    comparison.progress = progress
    document = cells.compare(comparison)
    return Compared(comparison.folder, tuple(document["rows"]), document)
