"""slim profile"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from slimcli.cli.options import (
    batch_size_option,
    common_options,
    dead_option,
    keep_rate_option,
    set_option,
    target_options,
    words,
)

if TYPE_CHECKING:
    from slimcli.measure.rows import Row
    from slimcli.slimming import SlimModel

#: under this share of the arithmetic's saving, a user should hear why
REALISED_ENOUGH = 0.9


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
    overrides: tuple[str, ...],
    as_json: bool,
    **asked: Any,
) -> None:
    """Cost, throughput, latency and memory of a model, dense and slimmed, without any data.

    TARGET is a model's name (random weights will do), a run, a model folder, a recipe or, with --model, a weights file;
    without one, the latest run, and where there is none the model that comes with slim.
    """
    from slimcli.cli.display import Display
    from slimcli.measure import operators as operator_counts
    from slimcli.measure import profile
    from slimcli.measure.per_layer import per_layer as per_layer_tables
    from slimcli.session.session import Request, open_session

    display = Display(as_json)
    session = open_session(Request("profile", target, overrides, pretrained=False, reads_data=False, **asked))
    found, where, dtype = session.target, session.device, session.dtype
    for line in found.notes:
        display.warn(line)
    batch = batch_size or profile.DEFAULT_BATCH[where.type]
    details: dict[str, list[dict[str, Any]]] = {}
    with display.progress() as progress:
        others = words(against)
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
    _print_rows(display, rows, bool(others))
    display.line(f"attention: {kernels['inference']} in inference, {kernels['training']} while lives learn")
    _warn_of_lost_speed(display, found.model, rows, batch, kernels["inference"], where.type)
    for table in details.get("per_layer", ()):
        _print_layers(display, table)
    if operators:
        _print_operators(display, details["operators"])
    document = {"model": found.model_name, **session.facts(batch), "attention": kernels, "rows": rows, **details}
    display.document(document)


def _warn_of_lost_speed(
    display: Any, model: SlimModel, rows: Sequence[Row], batch: int, kernel: str, device: str
) -> None:
    """Where time does not follow arithmetic, say so, and why it may be."""
    for row in rows[1:]:
        # what another method loses is a finding, not a fault; and what is not to be trusted needs no other reason
        lost = row.timing_reliable is not False and (row.realised or 1.0) < REALISED_ENOUGH
        if lost and row.method in (None, model.method):
            name = "the dense model, exact," if row.dense else f"keep rate {row.name}"
            display.warn(
                f"{name} gives {100 * (row.realised or 0.0):.0f} % of the arithmetic's saving: "
                f"{likely_reason(batch, model.num_patches, kernel, device)}"
            )


def _print_rows(display: Any, rows: Sequence[Row], methods: bool) -> None:
    """A line a row, with `methods` each named by its method too. Parameters are left out where there is no room."""
    from slimcli.measure.rows import MEASURES, interval_text, notes

    keys = ["gmacs", "params_millions", "images_per_second", "speedup", "realised"]
    keys += ["latency_ms_p50", "latency_ms_p95", "peak_memory_mib"]

    def table() -> tuple[list[str], list[list[str]]]:
        shown = [MEASURES[key] for key in keys]
        titles = ["Keep", *(measure.short for measure in shown)]
        body = []
        for row in rows:
            name = f"{row.method} {row.name}" if methods and row.method else row.name
            # a mark after each figure would not fit 80 columns: the ratios have it, and the caption speaks of all
            cells = [m.text(row, unit=m.key == "realised", doubt=m.key in ("speedup", "realised")) for m in shown]
            body.append([name, *cells])
        return titles, body

    titles, body = table()
    if display.too_wide(titles, body):
        keys.remove("params_millions")
        titles, body = table()
    caption = ["of ideal: speed-up over the ratio of multiply-adds", "p50, p95: latency at batch 1"]
    ratios = [row for row in rows if row.speedup_interval and row is not rows[0]]
    intervals = [f"{row.name} {interval_text(row)}" for row in ratios]
    if intervals and not methods:
        caption.append(f"95 % interval of the speed-up: {', '.join(intervals)}")
    display.table(titles, body, "\n".join([*caption, *notes(rows)]))


def likely_reason(batch: int, num_patches: int, kernel: str, device: str) -> str:
    """Why time may not follow arithmetic. `kernel` is what runs the attention."""
    if kernel.endswith("(math)"):
        return "attention runs unfused here: see --precision, and timm's TIMM_FUSED_ATTN"
    if batch * num_patches < 2048:
        return f"{batch} images of {num_patches} patches are too little work for this device; try a larger --batch-size"
    if device == "cuda":
        return "launching kernels may take longer than running them; try a larger --batch-size, or torch.compile"
    return "other programs may be using the device; run again with --seconds 10, and see --per-layer"


def _print_layers(display: Any, table: dict[str, Any]) -> None:
    from slimcli.cli.display import number
    from slimcli.measure.rows import Row, timing_notes

    display.line()
    row = Row.from_json(table)
    display.line(row.name if row.dense else f"keep rate {row.name}")
    body = [
        [str(layer["layer"]), str(layer["patches"]), number(layer["gmacs"], 4), number(layer["ms"], 2)]
        for layer in table["layers"]
    ]
    body.append(["other", "", "", number(table["other_ms"], 2)])
    said = "\n".join(f"do not trust the times: {note}" for note in timing_notes([row]))
    display.table(["Block", "Patches", "G MACs an image", "ms a batch"], body, said or None)


def _print_operators(display: Any, counted: Sequence[dict[str, Any]]) -> None:
    """A line a model: operators of each part, the sum, its ratio to the dense model's, and the bytes moved."""
    from slimcli.cli.display import number
    from slimcli.measure.operators import PARTS
    from slimcli.measure.rows import Row

    body = []
    for found in counted:
        row = Row.from_json(found)
        name = row.name if row.dense or row.method in (None, "life") else f"{row.method} {row.name}"
        cells = [str(found["parts"][part]["operators"]) for part in PARTS]
        ratio = found["operators"] / counted[0]["operators"]
        body.append([name, *cells, str(found["operators"]), number(ratio, 2), number(found["bytes"] / 2**20, 0)])
    caption = "operators of torch in a forward pass, views left out; MiB: read and written by them, for the whole batch"
    display.line()
    display.table(["Keep", *(part.capitalize() for part in PARTS), "All", "To dense", "MiB"], body, caption)
