"""slim profile"""

from __future__ import annotations

from typing import Any

import click

from slimcli.cli.options import (
    batch_size_option,
    common_options,
    dead_option,
    find_runtimes,
    keep_rate_option,
    runtime_option,
    set_option,
    target_options,
    threads_option,
    words,
)


@click.command("profile")
@click.argument("target", required=False)
@target_options
@keep_rate_option("One or several.  [default: the model's own schedule, 0.7 for a model's name]")
@batch_size_option
@click.option("--img-size", type=click.IntRange(min=1), help="Height and width in pixels, for a model's name.")
@click.option(
    "--against",
    metavar="METHOD[,METHOD...]",
    help="Also measure other methods in the same run: evit, dynamicvit, tome, resize, random.",
)
@click.option("--per-layer", is_flag=True, help="Also show where patches, multiply-adds and milliseconds go.")
@click.option("--operators", is_flag=True, help="Also count the operators of a forward pass, part by part.")
@click.option(
    "--streams",
    is_flag=True,
    help="Also measure single images, on a CPU, in one process and in a process a core.",
)
@click.option(
    "--exact-savings", is_flag=True, help="Also without the work for tokens that nothing reads; the same logits."
)
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Shortest time to measure."
)
@runtime_option
@dead_option
@threads_option
@set_option
@common_options
def command(
    target: str | None,
    keep_rates: list[float] | None,
    batch_size: int | None,
    against: str | None,
    per_layer: bool,
    operators: bool,
    streams: bool,
    exact_savings: bool,
    seconds: float,
    runtimes: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    **asked: Any,
) -> None:
    """Cost, throughput, latency and memory of a model, dense and slimmed, without any data.

    TARGET is a model's name (random weights will do), a run, a model folder, a recipe or, with --model, a weights file;
    without one, the latest run, and where there is none the model that comes with slim.
    """
    from slimcli.cli.display import Display
    from slimcli.cli.tables import print_profiled
    from slimcli.session.profile import Looks, profile_in_runtimes, profile_session
    from slimcli.session.session import Request, open_session

    display = Display(as_json)
    places = find_runtimes(runtimes, asked)
    session = open_session(Request("profile", target, overrides, pretrained=False, reads_data=False, **asked))
    display.warnings([] if places else session.target.notes)
    with display.progress() as progress:
        if places:
            found = profile_in_runtimes(
                session, places, keep_rates, batch_size, exact_savings, seconds, progress, display.warn
            )
        else:
            looks = Looks(words(against), per_layer, operators, streams)
            found = profile_session(session, keep_rates, batch_size, exact_savings, seconds, looks, progress)
    print_profiled(display, found, methods=against is not None)
    display.document(found.document())
