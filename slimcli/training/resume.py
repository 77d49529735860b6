"""The recipe and the run that a training goes on with."""

from __future__ import annotations

from pathlib import Path

from slimcli.errors import SlimError, parameter
from slimcli.store.run_folder import RECIPE, SUMMARY, find_run


def choose_run(recipe: str | None, resume: str | None, changed: bool = False) -> tuple[str | None, Path | None, bool]:
    """The recipe, the run to go on with, and whether it is the recipe's newest unfinished one, yet to be looked for.

    `resume` is None for a new run, "" for the newest one, or a run's folder, which has a recipe of its own; a recipe
    may stand in its place. `changed` says that fields of the recipe are set.

    Raises:
        SlimError: where the folder holds no unfinished run, or two recipes are named.
    """
    if resume and not find_run(Path(resume)).is_dir():
        if recipe is not None:
            raise SlimError(f"{parameter('resume', resume)}: no such run folder")
        recipe, resume = resume, ""
    if not resume:
        return recipe, None, resume is not None
    if recipe is not None or changed:
        own = ", ".join(["RECIPE", parameter("overrides")])
        raise SlimError(
            f"{parameter('resume', resume)} goes on with the run's own recipe: "
            f"leave {own} and {parameter('precision')} out"
        )
    run = find_run(Path(resume))
    run = run.resolve() if run.is_symlink() else run
    if not (run / RECIPE).is_file():
        raise SlimError(f"{run}: is not a run: expected {RECIPE} in it")
    if (run / SUMMARY).is_file():
        raise SlimError(f"{run}: this run has ended: `slim eval {run}` shows its figures")
    return str(run / RECIPE), run, False
