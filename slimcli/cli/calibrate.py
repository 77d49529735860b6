"""slim calibrate"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slimcli.cli.options import (
    KeepRates,
    class_map_option,
    command_line,
    common_options,
    data_option,
    dead_option,
    goal_options,
    limit_option,
    purpose_option,
    set_option,
    split_option,
    target_options,
)


@click.command("calibrate")
@click.argument("target", required=False)
@target_options
@goal_options
@click.option(
    "--keep-rate",
    "keep_rates",
    type=KeepRates(),
    help="Cost to reach: that of this keep rate at three layers; several: what serves all of them.",
)
@click.option("--keep-schedule", is_flag=True, help="Keep the layers where patches leave; only teach the life head.")
@purpose_option
@click.option("--images", type=click.IntRange(min=8), default=1024, show_default=True, help="Images to fit on.")
@limit_option("Validation images to report on.  [default: the recipe's, or 1000]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write.  [default: runs/NAME-calibrated-TIME]"
)
@data_option
@class_map_option
@split_option
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images in a batch.  [default: the recipe's, at most 64]"
)
@dead_option
@set_option
@common_options
def command(
    target: str | None,
    target_flops: float | None,
    target_speedup: float | None,
    runtime: str | None,
    keep_rates: list[float] | None,
    keep_schedule: bool,
    purpose: str,
    images: int,
    output: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
    **asked: Any,
) -> None:
    """A working slimmed model before any training.

    Teaches the life head which patches later blocks attend to and how alike patches will be, and searches how many
    should leave after each block; no labels are needed. Without a goal, the cost is that of the present schedule.
    TARGET is a recipe, a run, a model folder, a model's name or, with --model, a weights file; without one, the model
    that comes with slim. Writes a folder that `slim eval` runs at once and a recipe that `slim train` starts from.
    """
    from slimcli.calibration.workflow import Goal, calibrate_session, new_folder
    from slimcli.cli.display import Display
    from slimcli.cli.tables import print_calibration
    from slimcli.files import check_writable
    from slimcli.session.session import Request, open_session
    from slimcli.store.run_folder import RECIPE, point_latest

    display = Display(as_json)
    goal = Goal(target_flops, target_speedup, keep_rates or (), keep_schedule, purpose, runtime)
    embedded = target is None and asked["model"] is None
    request = Request("calibrate", target, overrides, embedded=embedded, default_dead="heir", **asked)
    if output is not None:
        check_writable(output, "folder")
    session = open_session(request)
    check_writable(output or session.recipe.output, "folder")
    display.warnings(session.target.notes)
    with display.progress() as progress:
        done = calibrate_session(session, goal, images, progress)
    display.warnings(session.notes)
    folder = output or new_folder(done.recipe)
    document = {"command": command_line(), "output": str(folder), **done.document()}
    done.write(folder, document)
    warning = point_latest(folder) if output is None else None
    display.warnings([warning] if warning else [])
    print_calibration(display, done)
    display.warnings(done.notes)
    display.line(f"{folder} holds the model; next: slim eval {folder}, or train it: slim train {folder / RECIPE}")
    display.document(document)
