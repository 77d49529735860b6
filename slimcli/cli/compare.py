"""slim compare"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from slimcli.cli.options import (
    batch_size_option,
    command_line,
    common_options,
    keep_rate_option,
    limit_option,
    repeat_options,
    set_option,
    words,
)
from slimcli.errors import Interrupted, SlimError


@click.command("compare")
@click.argument("recipe")
@click.option(
    "--methods",
    default="life,evit,tome,random",
    show_default=True,
    metavar="METHOD[,METHOD...]",
    help="life, evit, tome, pitome, atc, evo-vit, ia-red2, dynamicvit, resize ...; `slim plugins` lists them.",
)
@keep_rate_option("One or several.  [default: the recipe's own schedule]")
@click.option(
    "--untrained/--train",
    "untrained",
    default=None,
    help="Train nothing, only calibrate (the default), or train every method for the epochs of the recipe's stages.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Train every method for this many epochs.")
@repeat_options
@limit_option("Validate on this many images, spread over the split.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write.  [default: runs/NAME-compare-TIME]"
)
@click.option("--resume", is_flag=True, help="Go on with --output, or with the recipe's newest unfinished comparison.")
@batch_size_option
@set_option
@common_options
def command(
    recipe: str,
    methods: str,
    keep_rates: list[float] | None,
    untrained: bool | None,
    epochs: int | None,
    seeds: Sequence[int],
    test: str | None,
    limit: int | None,
    output: Path | None,
    resume: bool,
    batch_size: int | None,
    overrides: tuple[str, ...],
    device: str,
    precision: str | None,
    as_json: bool,
) -> None:
    """Life regression beside other methods: the same model, data, epochs and arithmetic, one table and one plot.

    Every method is set to cost what life regression costs at the keep rate. Finished lines of the table are kept on
    disk at once, so that --resume measures only what is missing.
    """
    if untrained and epochs is not None:
        raise SlimError("--untrained and --epochs are both given: choose one")
    from slimcli.cli.display import Display
    from slimcli.cli.tables import print_comparison
    from slimcli.comparison import folder
    from slimcli.comparison.workflow import open_comparison, run_comparison
    from slimcli.device import find_device
    from slimcli.files import write_json
    from slimcli.session.recipes import read_recipe

    trains = untrained is False or epochs is not None
    loaded = read_recipe(recipe, "compare --train" if trains else "compare", overrides, precision, limit, batch_size)
    display = Display(as_json)
    own = 0 if untrained is False else None
    comparison = open_comparison(
        loaded, words(methods), keep_rates or (), find_device(device), own if epochs is None else epochs, output,
        resume, display.line, seeds, test,
    )  # fmt: skip
    try:
        with display.progress() as progress:
            found = run_comparison(comparison, progress)
    except (Interrupted, KeyboardInterrupt):
        go_on = f"Go on with the same command and --resume -o {comparison.folder}"
        display.err.print(f"Stopped; what was finished is kept. {go_on}", markup=False, soft_wrap=True)
        click.get_current_context().exit(1)
    document = {**found.document, "command": command_line(), "output": str(found.folder)}
    write_json(found.folder / folder.RESULT, document)
    print_comparison(display, found)
    display.line(f"{found.folder} holds {folder.TABLE}, {folder.RESULT} and {folder.PLOT}.png and .svg")
    display.document(document)
