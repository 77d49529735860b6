"""slim prune"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimcli.cli.options import (
    batch_size_option,
    class_map_option,
    common_options,
    data_option,
    dead_option,
    keep_rate_option,
    set_option,
    target_options,
)
from slimcli.errors import SlimError

if TYPE_CHECKING:
    from slimcli.measure.rows import Row
    from slimcli.session.session import Session


@click.command("prune")
@click.argument("target", required=False)
@target_options
@keep_rate_option("The keep rate to bake in.  [default: the model's own schedule]")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace the model folder at --output.")
@click.option(
    "--dtype", "weights_dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
    show_default=True, help="How weights are stored.",
)  # fmt: skip
@data_option
@class_map_option
@click.option("--limit", type=click.IntRange(min=1), help="Measure accuracy on this many validation images.")
@batch_size_option
@dead_option
@click.option(
    "--exact-savings", is_flag=True, help="Leave out the work for tokens that nothing reads; the same logits."
)
@set_option
@common_options
def command(
    target: str | None,
    keep_rates: list[float] | None,
    output: Path,
    force: bool,
    weights_dtype: str,
    weights: Path | None,
    exact_savings: bool,
    overrides: tuple[str, ...],
    as_json: bool,
    **asked: Any,
) -> None:
    """Bake a schedule into a folder ready to deploy: weights, config, preprocessing, classes, a model card.

    The card's figures are measured now: accuracy where there is data, cost and speed always.
    `slimcli.load(FOLDER)` gives the model back.
    """
    if keep_rates is not None and len(keep_rates) > 1:
        raise SlimError("--keep-rate takes one keep rate here: it is baked in")
    if str(weights) in ("float32", "bfloat16", "float16"):
        raise SlimError(f"--weights {weights}: expected a file; how weights are stored is --dtype {weights}")
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]) and not force:
        raise SlimError(
            f"{output}: is there already: choose another folder, or --force to replace what slim wrote in it"
        )
    from slimcli.files import check_writable

    check_writable(output, "folder")

    from slimcli.cli.display import Display, across
    from slimcli.device import DTYPES, environment
    from slimcli.session.session import Request, open_session
    from slimcli.store.card import bake

    display = Display(as_json)
    session = open_session(Request("prune", target, overrides, weights, **asked))
    found, model, where = session.target, session.model, session.device
    model.exact_savings = model.exact_savings or exact_savings
    if not found.has_life_head:
        raise SlimError(session.warnings[-1])
    if keep_rates is not None:
        model.keep_rate = keep_rates[0]
    config = {**found.config, "preprocessing": session.preprocessing}
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    rows, note, batch = _measure(display, session, config)
    # measuring may have cast the weights
    model.to("cpu", DTYPES["float32"]).load_state_dict(stored)
    facts = environment(where)
    measured = {key: facts[key] for key in ("device", "device_name", "threads", "versions")}
    measured |= {"precision": session.precision, "batch_size": batch, "note": note, "rows": rows}
    bake(output, model, config, measured, DTYPES[weights_dtype])
    across(display, rows, note)
    if any(row.timing_reliable is False for row in rows):
        display.warn(f"speed was not measured reliably: {output / 'README.md'} leaves it out")
    display.line(f"{output} is ready: slimcli.load({str(output)!r})")
    display.document({"output": str(output), "model": found.model_name, **measured})


def _measure(display: Any, session: Session, config: dict[str, Any]) -> tuple[list[Row], str, int]:
    """What the card quotes: its rows, what they were measured on, and the batch. Adds class names to `config`."""
    from slimcli.measure.evaluate import evaluate
    from slimcli.measure.profile import DEFAULT_BATCH, profile

    model, device, dtype = session.model, session.device, session.dtype
    images = session.images() if session.section is not None else None
    for line in (*session.target.notes, *session.notes):
        display.warn(line)
    with display.progress() as progress:
        if images is None:
            batch = session.request.batch_size or DEFAULT_BATCH[device.type]
            rows = profile(model, None, batch, device, dtype, progress=progress)
            return rows, "No data was at hand: accuracy was not measured.", batch
        config.setdefault("class_names", getattr(images, "class_names", None))
        rows = evaluate(model, session.loader(images), None, device, dtype, progress)
    return rows, f"Accuracy on {len(images)} images ({session.data.val_split}).", session.data.batch_size
