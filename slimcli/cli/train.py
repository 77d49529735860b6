"""slim train"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimcli.cli.options import common_options, set_option
from slimcli.errors import SlimError

if TYPE_CHECKING:
    from slimcli.cli.display import Display
    from slimcli.recipe import Recipe


@click.command("train")
@click.argument("recipe", required=False)
@click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    metavar="[RUN]",
    help="Go on with RUN, or with RECIPE's newest unfinished run, to the same weights as without the break.",
)
@click.option("--dry-run", is_flag=True, help="Show the model, what learns, the schedule and the cost; train nothing.")
@set_option
@common_options
def command(
    recipe: str | None,
    resume: str | None,
    dry_run: bool,
    overrides: tuple[str, ...],
    device: str,
    precision: str | None,
    as_json: bool,
) -> None:
    """Train a model by RECIPE: a file, or the name of a built-in recipe such as quickstart.

    Writes runs/NAME-TIME/: the best model (and the last, in last/), the resolved recipe, metrics.jsonl, the
    environment, a summary and report.html. Under `torchrun -m slimcli` or `accelerate launch -m slimcli` it uses
    every process.
    """
    from slimcli.session.recipes import read_recipe
    from slimcli.store.run_folder import SUMMARY

    recipe, resume, run = _what_to_resume(recipe, resume, with_changes=bool(overrides) or precision is not None)
    if recipe is None:
        raise SlimError("which RECIPE? `slim recipes` lists the built-in ones; `slim train quickstart` is a good start")
    loaded = read_recipe(recipe, "train", overrides, precision)
    if dry_run and (run is not None or resume is not None):
        raise SlimError("--dry-run trains nothing: leave --resume out")

    from slimcli import train
    from slimcli.cli.display import Display
    from slimcli.cli.tables import print_plan
    from slimcli.device import find_device

    if dry_run:
        display = Display(as_json)
        with display.progress() as progress:
            plan = train.dry_run(loaded, device, progress)
        print_plan(display, plan)
        display.document(plan)
        return
    if resume == "":
        run = train.unfinished_run(loaded)
    if run is not None and (run / SUMMARY).is_file():
        raise SlimError(f"{run}: this run has ended: `slim eval {run}` shows its figures")

    import os

    display = Display(as_json, quiet=int(os.environ.get("RANK", "0")) != 0)
    with display.progress() as progress:
        folder, summary = train.train(loaded, device, run, progress, display.line)
    if not summary:
        return
    _print_end(display, loaded, folder, summary)
    from slimcli.report import report_of_training

    with display.progress() as progress:
        line = report_of_training(folder, find_device(device), loaded.precision, progress)
    display.line(line)
    if all(stage.mode == "none" for stage in loaded.stages):
        display.line(f"{folder} holds the dense model, its life head untaught; next: slim calibrate {folder}")
    else:
        display.line(f"{folder} holds the model; next: slim eval --keep-rate 0.9,0.8,0.7,0.5")
    display.document(summary)


def _what_to_resume(
    recipe: str | None, resume: str | None, with_changes: bool
) -> tuple[str | None, str | None, Path | None]:
    """The recipe, what is left of --resume ("": the recipe's newest unfinished run), and the run that was named."""
    from slimcli.store.run_folder import RECIPE, find_run

    run: Path | None = None
    if resume and not find_run(Path(resume)).is_dir():
        if recipe is not None:
            raise SlimError(f"--resume {resume}: no such run folder")
        recipe, resume = resume, ""
    if resume:
        if recipe is not None or with_changes:
            raise SlimError(
                f"--resume {resume} goes on with the run's own recipe: leave RECIPE, --set and --precision out"
            )
        run = find_run(Path(resume))
        run = run.resolve() if run.is_symlink() else run
        recipe = str(run / RECIPE)
        if not Path(recipe).is_file():
            raise SlimError(f"{run}: is not a run: expected {RECIPE} in it")
    return recipe, resume, run


def _print_end(display: Display, recipe: Recipe, folder: Path, summary: dict[str, Any]) -> None:
    from slimcli.cli.display import across

    display.line()
    data = recipe.data
    across(display, summary["rows"], f"{data.name or data.root} ({data.val_split}), best epoch")
    start = summary["before"]
    if "top1" in start:
        display.line(f"before training, dense: top-1 {start['top1']:.2f} %")
