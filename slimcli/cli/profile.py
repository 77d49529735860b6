"""slim profile"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from slimcli.cli.options import (
    batch_size_option,
    common_options,
    dead_option,
    keep_rate_option,
    places_on_cpu,
    runtime_option,
    set_option,
    target_options,
    words,
)

if TYPE_CHECKING:
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
    help="Also measure other methods in the same run: evit, dynamicvit, tome, random.",
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
    from slimcli.cli.tables import print_layers, print_operators, print_profile
    from slimcli.measure import operators as operator_counts
    from slimcli.measure import profile
    from slimcli.measure.per_layer import per_layer as per_layer_tables
    from slimcli.session.session import Request, open_session

    display = Display(as_json)
    if places := places_on_cpu(runtimes, asked):
        _in_runtimes(display, places, target, overrides, keep_rates, batch_size, exact_savings, seconds, asked)
        return
    session = open_session(Request("profile", target, overrides, pretrained=False, reads_data=False, **asked))
    found, where, dtype = session.target, session.device, session.dtype
    for line in found.notes:
        display.warn(line)
    batch, others = batch_size or profile.DEFAULT_BATCH[where.type], words(against)
    details: dict[str, list[dict[str, Any]]] = {}
    with display.progress() as progress:
        rows = profile.profile(
            found.model, keep_rates, batch, where, dtype, seconds, progress, exact_savings, against=others
        )
        if per_layer:
            details["per_layer"] = per_layer_tables(
                found.model, keep_rates, batch, where, dtype, progress=progress, exact_savings=exact_savings
            )
        if operators:
            details["operators"] = operator_counts.operators(
                found.model, keep_rates, batch, where, dtype, exact_savings, others
            )
    kernels = profile.attention(found.model, batch, where, dtype)
    display.line(f"{found.model_name}: {session.said(batch)}")
    print_profile(display, rows, bool(others))
    display.line(f"attention: {kernels['inference']} in inference, {kernels['training']} while lives learn")
    for line in profile.kept_back(rows, found.model, batch, where, kernels["inference"]):
        display.warn(line)
    for table in details.get("per_layer", ()):
        print_layers(display, table)
    if operators:
        print_operators(display, details["operators"])
    facts = {**session.facts(batch), "attention": kernels}
    display.document({"model": found.model_name, **facts, "rows": rows, **details})


def _in_runtimes(
    display: Any,
    places: list[Place],
    target: str | None,
    overrides: tuple[str, ...],
    keep_rates: list[float] | None,
    batch_size: int | None,
    exact_savings: bool,
    seconds: float,
    asked: dict[str, Any],
) -> None:
    """The same, in runtimes by name."""
    from slimcli.cli.tables import print_profile
    from slimcli.measure import profile
    from slimcli.runtimes.measuring import profile_places
    from slimcli.session.session import Request, open_session

    session = open_session(Request("profile", target, overrides, pretrained=False, reads_data=False, **asked))
    batch = batch_size or profile.DEFAULT_BATCH["cpu"]
    with display.progress() as progress:
        rows = profile_places(session.model, keep_rates, places, batch, seconds, progress, exact_savings)
    facts = {key: value for key, value in session.facts(batch).items() if key != "precision"}
    display.line(f"{session.target.model_name}: cpu, {facts['threads']} threads, batch {batch}")
    print_profile(display, rows, False)
    display.document({"model": session.target.model_name, **facts, "rows": rows})
