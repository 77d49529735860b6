"""slim prune"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slimcli.cli.options import (
    batch_size_option,
    class_map_option,
    common_options,
    data_option,
    dead_option,
    limit_option,
    one_keep_rate_option,
    set_option,
    target_options,
)
from slimcli.errors import SlimError


@click.command("prune")
@click.argument("target", required=False)
@target_options
@one_keep_rate_option("The keep rate to bake in.  [default: the model's own schedule]")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace the model folder at --output.")
@click.option(
    "--dtype", "weights_dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
    show_default=True, help="How weights are stored.",
)  # fmt: skip
@data_option
@class_map_option
@limit_option("Measure accuracy on this many validation images.")
@batch_size_option
@dead_option
@click.option(
    "--exact-savings", is_flag=True, help="Leave out the work for tokens that nothing reads; the same logits."
)
@set_option
@common_options
def command(
    target: str | None,
    output: Path,
    force: bool,
    weights_dtype: str,
    weights: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
    **asked: Any,
) -> None:
    """Bake a schedule into a folder ready to deploy: weights, config, preprocessing, classes, a model card.

    The card's figures are measured now: accuracy where there is data, cost and speed always.
    `slimcli.load(FOLDER)` gives the model back.
    """
    if str(weights) in ("float32", "bfloat16", "float16"):
        raise SlimError(f"--weights {weights}: expected a file; how weights are stored is --dtype {weights}")
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]) and not force:
        raise SlimError(
            f"{output}: is there already: choose another folder, or --force to replace what slim wrote in it"
        )
    from slimcli.files import check_writable

    check_writable(output, "folder")

    from slimcli.cli.display import Display, across
    from slimcli.device import DTYPES
    from slimcli.session.deploy import prepare_to_deploy
    from slimcli.session.session import Request, open_session

    display = Display(as_json)
    session = open_session(Request("prune", target, overrides, weights, **asked))
    with display.progress() as progress:
        found = prepare_to_deploy(session, progress, display.warn)
    found.write(output, DTYPES[weights_dtype])
    across(display, found.rows, found.note)
    if any(row.timing_reliable is False for row in found.rows):
        display.warn(f"speed was not measured reliably: {output / 'README.md'} leaves it out")
    display.line(f"{output} is ready: slimcli.load({str(output)!r})")
    display.document({"output": str(output), "model": session.target.model_name, **found.measured})
