"""slim profile"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

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
    words,
)

if TYPE_CHECKING:
    from slimcli.cli.display import Display
    from slimcli.runtimes.measuring import Place


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
    "--exact-savings", is_flag=True, help="Also without the work for tokens that nothing reads; the same logits."
)
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Shortest time to measure."
)
@runtime_option
@dead_option
@set_option
@common_options
def command(
    target: str | None,
    keep_rates: list[float] | None,
    batch_size: int | None,
    against: str | None,
    per_layer: bool,
    operators: bool,
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

    display = Display(as_json)
    request = {"target": target, "overrides": overrides, **asked}
    places = find_runtimes(runtimes, asked)
    if places:
        _in_runtimes(display, places, request, keep_rates, batch_size, exact_savings, seconds)
    else:
        looks = Looks(words(against), per_layer, operators)
        _in_torch(display, request, keep_rates, batch_size, exact_savings, seconds, looks)


class Looks(NamedTuple):
    """What is measured beside the rows of the model: other methods, each block, the operators of a pass."""

    others: list[str]
    per_layer: bool
    operators: bool


def _in_torch(
    display: Display,
    request: dict[str, Any],
    keep_rates: list[float] | None,
    batch_size: int | None,
    exact_savings: bool,
    seconds: float,
    looks: Looks,
) -> None:
    """Measure where the model is, in eager PyTorch."""
    from slimcli.cli.tables import print_layers, print_operators, print_profile
    from slimcli.measure import operators as operator_counts
    from slimcli.measure import profiling
    from slimcli.measure.per_layer import per_layer as per_layer_tables
    from slimcli.session.session import Request, open_session

    session = open_session(Request("profile", pretrained=False, reads_data=False, **request))
    found, where, dtype = session.target, session.device, session.dtype
    for line in found.notes:
        display.warn(line)
    batch = batch_size or profiling.DEFAULT_BATCH[where.type]
    details: dict[str, list[dict[str, Any]]] = {}
    with display.progress() as progress:
        rows = profiling.profile(
            found.model, keep_rates, batch, where, dtype, seconds, progress, exact_savings, against=looks.others
        )
        if looks.per_layer:
            details["per_layer"] = per_layer_tables(
                found.model, keep_rates, batch, where, dtype, progress=progress, exact_savings=exact_savings
            )
        if looks.operators:
            details["operators"] = operator_counts.operators(
                found.model, keep_rates, batch, where, dtype, exact_savings, looks.others
            )
    kernels = profiling.attention(found.model, batch, where, dtype)
    display.line(f"{found.model_name}: {session.conditions(batch)}")
    print_profile(display, rows, bool(looks.others))
    display.line(f"attention: {kernels['inference']} in inference, {kernels['training']} while lives learn")
    for line in profiling.kept_back(rows, found.model, batch, where, kernels["inference"]):
        display.warn(line)
    for table in details.get("per_layer", ()):
        print_layers(display, table)
    if looks.operators:
        print_operators(display, details["operators"])
    document = {"model": found.model_name, **session.facts(batch), "attention": kernels, "rows": rows, **details}
    display.document(document)


def _in_runtimes(
    display: Display,
    places: list[Place],
    request: dict[str, Any],
    keep_rates: list[float] | None,
    batch_size: int | None,
    exact_savings: bool,
    seconds: float,
) -> None:
    """Measure dense and slimmed in runtimes by name."""
    from slimcli.cli.tables import print_runtimes
    from slimcli.measure import profiling
    from slimcli.runtimes.measuring import fastest, profile_places
    from slimcli.session.session import Request, open_session

    session = open_session(Request("profile", pretrained=False, reads_data=False, **request))
    batch = batch_size or profiling.DEFAULT_BATCH[session.device.type]
    with display.progress() as progress:
        rows = profile_places(session.model, keep_rates, places, batch, seconds, progress, exact_savings, display.warn)
    facts = {key: value for key, value in session.facts(batch).items() if key != "precision"}
    display.line(f"{session.target.model_name}: {facts['device']}, {facts['threads']} threads, batch {batch}")
    print_runtimes(display, rows)
    display.document({"model": session.target.model_name, **facts, "rows": rows, "fastest": fastest(rows)})
