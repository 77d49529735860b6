"""slim train"""

from __future__ import annotations

import os

import click

from slimcli.cli.options import class_map_option, common_options, set_option
from slimcli.errors import SlimError


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
@class_map_option
@set_option
@common_options
def command(
    recipe: str | None,
    resume: str | None,
    dry_run: bool,
    class_map: str | None,
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
    from slimcli.training.resume import choose_run

    if dry_run and resume is not None:
        raise SlimError("--dry-run trains nothing: leave --resume out")
    recipe, run, newest = choose_run(recipe, resume, changed=bool(overrides or precision or class_map))
    if recipe is None:
        raise SlimError("which RECIPE? `slim recipes` lists the built-in ones; `slim train quickstart` is a good start")
    loaded = read_recipe(recipe, "train", overrides, precision, class_map=class_map)

    from slimcli import train
    from slimcli.cli.display import Display
    from slimcli.cli.tables import print_plan, print_training
    from slimcli.device import find_device

    if dry_run:
        display = Display(as_json)
        with display.progress() as progress:
            plan = train.dry_run(loaded, device, progress)
        print_plan(display, plan)
        display.document(plan)
        return
    run = train.unfinished_run(loaded) if newest else run
    display = Display(as_json, quiet=int(os.environ.get("RANK", "0")) != 0)
    with display.progress() as progress:
        folder, summary = train.train(loaded, device, run, progress, display.line)
    if not summary:
        return
    print_training(display, loaded, summary)
    from slimcli.report import report_of_training

    with display.progress() as progress:
        line = report_of_training(folder, find_device(device), loaded.precision, progress)
    display.line(line)
    if all(stage.mode == "none" for stage in loaded.stages):
        display.line(f"{folder} holds the dense model, its life head untaught; next: slim calibrate {folder}")
    else:
        display.line(f"{folder} holds the model; next: slim eval --keep-rate 0.9,0.8,0.7,0.5")
    display.document(summary)
