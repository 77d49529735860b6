"""slim export"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from slimcli.cli import debug_option
from slimcli.cli.options import (
    class_map_option,
    data_option,
    dead_option,
    json_option,
    one_keep_rate_option,
    set_option,
    split_option,
    target_options,
)


@click.command("export")
@click.argument("target", required=False)
@target_options
@click.option("--to", "runtime", required=True, help="Where it will run: onnx, openvino, aoti or torch.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write, new or empty.")
@one_keep_rate_option("One keep rate, 1 for the dense model.  [default: the target's own]")
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
    to_precision: str,
    fixed: int | None,
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
    from slimcli.cli.display import Display
    from slimcli.deployment.export import Inexact
    from slimcli.deployment.latest import point_latest_export
    from slimcli.session.export import export_session, keeping_runtime
    from slimcli.session.session import Request, open_session

    where = keeping_runtime(runtime, to_precision, output)
    display = Display(as_json)
    session = open_session(Request("export", target, overrides, device="cpu", **asked))
    try:
        with display.progress() as progress:
            checked = export_session(
                session, where, output, to_precision, fixed, count, calibration_images, progress, display.warn
            )
    except Inexact as error:
        click.echo(f"Error: {error}", err=True)
        raise click.exceptions.Exit(1) from None
    if warning := point_latest_export(output):
        display.warn(warning)
    size = " x ".join(map(str, session.preprocessing["input_size"]))
    display.line(f"checked on {checked}")
    display.line(f"{output} is ready for {runtime}: {f'always {fixed}' if fixed else 'any number of'} images of {size}")
    facts = {"runtime": runtime, "precision": to_precision, "batch_size": fixed, **asdict(checked)}
    display.document({"output": str(output), "model": session.target.model_name, **facts})
