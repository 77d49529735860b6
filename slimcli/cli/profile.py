"""slim profile"""

from __future__ import annotations

from typing import Any

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
    from slimcli import profile
    from slimcli.cli.display import Display, number, rate_title
    from slimcli.session import Request, open_session

    display = Display(as_json)
    session = open_session(Request("profile", target, overrides, pretrained=False, reads_data=False, **asked))
    found, where, dtype = session.target, session.device, session.dtype
    for line in found.notes:
        display.warn(line)
    batch = batch_size or profile.DEFAULT_BATCH[where.type]
    layers: list[dict[str, Any]] | None = None
    with display.progress() as progress:
        others = words(against)
        rows = profile.profile(
            found.model, keep_rates, batch, where, dtype, seconds, progress, exact_savings, against=others
        )
        if per_layer:
            layers = profile.per_layer(
                found.model, keep_rates, batch, where, dtype, progress=progress, exact_savings=exact_savings
            )

    kernels = profile.attention(found.model, batch, where, dtype)
    display.line(f"{found.model_name}: {session.said(batch)}")
    # with the names of methods, parameters would be a column too many for 80
    size = [] if others else [("M params", "params_millions", 1)]
    shown = [("G MACs", "gmacs", 2), *size, ("img/s", "images_per_second", 1), ("Speed-up", "speedup", 2)]
    titles = ["Keep", *(title for title, _, _ in shown), "of ideal", "p50 ms", "p95 ms", "MiB"]
    body = [
        [
            row_title(row, rate_title(row, row["dense"]), bool(others)),
            *(number(row[key], digits) for _, key, digits in shown),
            f"{100 * row['realised']:.0f} %",
            number(row["latency_ms_p50"], 1),
            number(row["latency_ms_p95"], 1),
            number(row["peak_memory_mib"], 0),
        ]
        for row in rows
    ]
    caption = "of ideal: speed-up over the ratio of multiply-adds; p50, p95: latency at batch 1"
    if exact_savings:
        caption += "\nexact: tokens that nothing reads after a block are only keys and values in it"
    display.table(titles, body, caption)
    display.line(f"attention: {kernels['inference']} in inference, {kernels['training']} while lives learn")
    for row in rows[1:]:
        # what another method loses is a finding, not a fault
        if row["realised"] < REALISED_ENOUGH and row["method"] in (None, found.model.method):
            name = "the dense model, exact," if row["dense"] else f"keep rate {rate_title(row, False)}"
            display.warn(
                f"{name} gives {100 * row['realised']:.0f} % of the arithmetic's saving: "
                f"{likely_reason(batch, found.model.num_patches, kernels['inference'], where.type)}"
            )
    for table in layers or []:
        _print_layers(display, table)
    document = {
        "model": found.model_name,
        **session.facts(batch),
        "attention": kernels,
        "rows": rows,
    }
    if layers is not None:
        document["per_layer"] = layers
    display.document(document)


def row_title(row: dict[str, Any], rate: str, methods: bool) -> str:
    """A row's first cell: its keep rate, and where several methods are compared the method before it."""
    return f"{row['method']} {rate}" if methods and row["method"] else rate


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
    from slimcli.cli.display import number, rate_title

    display.line()
    title = rate_title(table, table["dense"])
    display.line(title if table["dense"] else f"keep rate {title}")
    body = [
        [str(row["layer"]), str(row["patches"]), number(row["gmacs"], 4), number(row["ms"], 2)]
        for row in table["layers"]
    ]
    body.append(["other", "", "", number(table["other_ms"], 2)])
    display.table(["Block", "Patches", "G MACs an image", "ms a batch"], body)
