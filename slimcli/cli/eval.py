"""slim eval"""

from __future__ import annotations

import time
from typing import Any

import click

from slimcli.cli.options import (
    batch_size_option,
    class_map_option,
    command_line,
    common_options,
    data_option,
    dead_option,
    find_runtimes,
    keep_rate_option,
    limit_option,
    runtime_option,
    set_option,
    split_option,
    target_options,
    threads_option,
)
from slimcli.errors import SlimError


@click.command("eval")
@click.argument("target", required=False)
@target_options
@keep_rate_option("One or several.  [default: the model's own schedule]")
@data_option
@class_map_option
@split_option
@limit_option("Use this many images, spread evenly over the split.")
@batch_size_option
@click.option(
    "--task", type=click.Choice(["classification", "retrieval"]), default="classification", show_default=True,
    help="retrieval: whether the images most like each are of its class.",
)  # fmt: skip
@runtime_option
@dead_option
@threads_option
@set_option
@common_options
def command(
    target: str | None,
    keep_rates: list[float] | None,
    runtimes: str | None,
    task: str,
    overrides: tuple[str, ...],
    as_json: bool,
    **asked: Any,
) -> None:
    """Accuracy, cost and speed of a model, dense and slimmed, on the same images in one run.

    TARGET is a run, a model folder, a recipe, a model's name or, with --model, a weights file; without one, the latest
    run, and where there is none the model that comes with slim.
    """
    from slimcli.cli.display import Display, across
    from slimcli.cli.tables import print_runtimes
    from slimcli.session.evaluate import evaluate_session, open_images
    from slimcli.session.session import Request, open_session
    from slimcli.store.run_folder import add_evaluation

    display = Display(as_json)
    places = find_runtimes(runtimes, asked)
    session = open_session(Request("eval", target, overrides, **asked))
    images = open_images(session, task, places)
    batch_size = session.data.batch_size
    display.warnings((*session.warnings, *session.notes))
    with display.progress() as progress:
        rows = evaluate_session(session, images, task, keep_rates, places, progress, display.warn)
    found = session.target
    where = f"{len(images)} images of {session.data_label}; {session.conditions(batch_size)}"
    display.line(f"{found.label}: {found.model_name} on {where}")
    (print_runtimes if places else across)(display, rows)
    document = {
        "model": found.model_name,
        "target": found.label,
        "task": task,
        "data": session.data_label,
        "images": len(images),
        **session.facts(batch_size),
        "dead": "heir" if found.model.has_heirs else "discard",
        "has_life_head": found.has_life_head,
        "rows": rows,
    }
    if found.run is not None and not places and task == "classification":
        kept = {**document, "command": command_line(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        try:
            add_evaluation(found.run, kept)
            display.line("kept in the run's evaluations.json; `slim report` draws all its points")
        except SlimError as error:
            # the figures are on the screen: a run that cannot be written to is no reason to fail
            display.warn(f"not kept for the run's report: {error}")
    display.document(document)
