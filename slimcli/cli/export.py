"""slim export"""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimcli.cli import debug_option
from slimcli.cli.options import (
    class_map_option,
    data_option,
    dead_option,
    json_option,
    keep_rate_option,
    set_option,
    split_option,
    target_options,
)
from slimcli.errors import SlimError

if TYPE_CHECKING:
    from slimcli.runtimes import Runtime


@click.command("export")
@click.argument("target", required=False)
@target_options
@click.option("--to", "runtime", required=True, help="Where it will run: onnx, openvino, aoti or torch.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write, new or empty.")
@keep_rate_option("One keep rate, 1 for the dense model.  [default: the target's own]")
@click.option(
    "--precision",
    "to_precision",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    default="float32",
    show_default=True,
    help="What the arithmetic runs in there.",
)
@click.option("--batch-size", "fixed", type=click.IntRange(min=1), help="Images in every batch.  [default: any number]")
@click.option("--exact-savings", is_flag=True, help="Without the work for tokens that nothing reads.")
@click.option(
    "--images", "count", type=click.IntRange(min=1), default=64, show_default=True, help="Images to check on."
)
@click.option(
    "--calibration-images",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Images to find the ranges of int8 on.",
)
@data_option
@class_map_option
@split_option
@dead_option
@set_option
@json_option
@debug_option
def command(
    target: str | None,
    runtime: str,
    output: Path,
    keep_rates: list[float] | None,
    to_precision: str,
    fixed: int | None,
    exact_savings: bool,
    count: int,
    calibration_images: int,
    overrides: tuple[str, ...],
    as_json: bool,
    **asked: Any,
) -> None:
    """A model for another runtime: the artefact, config.json, and a card with a program that runs it.

    It is checked on real images, the target's own or those of --data: slim's model and the artefact must give the same,
    or nothing is written and the exit code is 1.
    """
    where = _ready(runtime, to_precision, output, keep_rates)
    from slimcli.cli.display import Display
    from slimcli.data.samples import ImageSamples
    from slimcli.deployment.export import Inexact, export_model
    from slimcli.deployment.latest import point_latest_export
    from slimcli.session.session import Request, open_session

    display = Display(as_json)
    session = open_session(Request("export", target, overrides, device="cpu", **asked))
    found, model = session.target, session.model
    model.exact_savings = model.exact_savings or exact_savings
    if keep_rates is not None:
        model.keep_rate = keep_rates[0]
    if not found.has_life_head and model.schedule.drops_patches():
        raise SlimError(session.warnings[-1] if found.has_classifier else session.warnings[-2])
    images = session.images()
    if isinstance(images, ImageSamples):
        images.limit(count)
    config = {"class_names": getattr(images, "class_names", None), **found.config}
    config = {"model": config["model"], "preprocessing": session.preprocessing, "class_names": config["class_names"]}
    batch = fixed or 16
    batches = (pixels for pixels, _ in islice(session.loader(images, batch), -(-count // batch)))
    calibration = session.first_batches(calibration_images, batch) if to_precision == "int8" else []
    for line in (*found.notes, *session.notes):
        display.warn(line)
    try:
        with display.progress() as progress:
            checked = export_model(model, where, output, config, batches, to_precision, fixed, calibration, progress)
    except Inexact as error:
        click.echo(f"Error: {error}", err=True)
        raise click.exceptions.Exit(1) from None
    if warning := point_latest_export(output):
        display.warn(warning)
    size = " x ".join(map(str, session.preprocessing["input_size"]))
    display.line(f"checked on {checked}")
    display.line(f"{output} is ready for {runtime}: {f'always {fixed}' if fixed else 'any number of'} images of {size}")
    facts = {"runtime": runtime, "precision": to_precision, "batch_size": fixed, **asdict(checked)}
    display.document({"output": str(output), "model": found.model_name, **facts})


def _ready(runtime: str, precision: str, output: Path, keep_rates: list[float] | None) -> Runtime:
    """The runtime; `SlimError` where it, its precision or the folder cannot be had."""
    if keep_rates is not None and len(keep_rates) > 1:
        raise SlimError("--keep-rate takes one keep rate here: it is baked in")
    from slimcli.deployment.export import check_free
    from slimcli.runtimes import find_runtime

    check_free(output)
    found = find_runtime(runtime)
    if not found.files:
        raise SlimError(f"--to {runtime}: keeps no file: expected another runtime")
    found.require(precision)
    return found
