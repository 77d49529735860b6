"""slim compare"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimcli.cli.options import batch_size_option, command_line, common_options, keep_rate_option, set_option, words
from slimcli.errors import Interrupted, SlimError

if TYPE_CHECKING:
    from slimcli.comparison.compare import Comparison
    from slimcli.recipe import Recipe

METHODS = "life,evit,tome,random"


@click.command("compare")
@click.argument("recipe")
@click.option(
    "--methods",
    default=METHODS,
    show_default=True,
    metavar="METHOD[,METHOD...]",
    help="life, evit, evit-nofuse, dynamicvit, tome, random, or a plugin's; `slim plugins` lists them.",
)
@keep_rate_option("One or several.  [default: the recipe's own schedule]")
@click.option(
    "--untrained/--train",
    "untrained",
    default=None,
    help="Train nothing, only calibrate (the default), or train every method for the epochs of the recipe's stages.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Train every method for this many epochs.")
@click.option("--limit", type=click.IntRange(min=1), help="Validate on this many images, spread over the split.")
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
    chosen = words(methods)
    if not chosen:
        raise SlimError(f"--methods {methods!r} names no method: expected some of {METHODS}")
    from slimcli.cli.display import Display
    from slimcli.comparison import compare
    from slimcli.device import find_device
    from slimcli.files import check_writable, write_json
    from slimcli.store.run_folder import new_run_folder

    trains = untrained is False or epochs is not None
    loaded = _read(recipe, "compare --train" if trains else "compare", overrides, precision, limit, batch_size)
    check_writable(output or loaded.output, "folder")
    display = Display(as_json)
    where = find_device(device)
    if output is None:
        output = compare.unfinished(loaded) if resume else None
    elif resume and not (output / compare.SETTINGS).is_file():
        raise SlimError(f"{output}: is no comparison to go on with: start it without --resume")
    comparison = compare.Comparison(
        loaded,
        chosen,
        [*dict.fromkeys(keep_rates)] if keep_rates else [None],
        output or Path(),
        where,
        epochs if epochs is not None else 0 if untrained is False else None,
        log=display.line,
    )
    compare.check(comparison)
    if output is None:
        comparison.folder = new_run_folder(loaded.output, f"{loaded.name}-compare")
    compare.open_folder(comparison, resume)
    document = _run(display, comparison)
    document = {**document, "command": command_line(), "output": str(comparison.folder)}
    write_json(comparison.folder / compare.RESULT, document)

    _print_table(display, document)
    display.line(f"{comparison.folder} holds {compare.TABLE}, {compare.RESULT} and {compare.PLOT}.png and .svg")
    display.document(document)


def _read(
    recipe: str, command: str, overrides: tuple[str, ...], precision: str | None, limit: int | None, batch: int | None
) -> Recipe:
    from slimcli.recipe import FILES, find_recipe
    from slimcli.session.resolve import resolve
    from slimcli.session.session import choose_data

    resolved = resolve(str(find_recipe(recipe)), command, overrides, precision=precision, check=FILES)
    return resolved.recipe.model_copy(update={"data": choose_data(resolved, None, None, limit, batch)})


def _run(display: Any, comparison: Comparison) -> dict[str, Any]:
    from slimcli.comparison.compare import compare

    try:
        with display.progress() as progress:
            comparison.progress = progress
            return compare(comparison)
    except (Interrupted, KeyboardInterrupt):
        display.err.print(
            f"Stopped; what was finished is kept. Go on with the same command and --resume -o {comparison.folder}",
            markup=False,
            soft_wrap=True,
        )
        raise click.exceptions.Exit(1) from None


def _print_table(display: Any, document: dict[str, Any]) -> None:
    from slimcli.comparison.table import doubts, how_trained
    from slimcli.measure.rows import MEASURES

    display.line()
    lines = document["rows"]
    titles = ["Method", "Keep", "G MACs", lines[0].score_title, "Lost", "img/s", "Speed-up", "of ideal"]
    body = [[line.title, line.rate, MEASURES["gmacs"].text(line.row), *line.cells] for line in lines]
    images = lines[0].row.images
    note = f"{images} images, {how_trained(document)}; every method costs what life costs at the keep rate"
    errors = [line.row.top1_se for line in lines if line.row.top1_se is not None]
    if errors:
        note += f"\nstandard error of top-1: {min(errors):.2f} to {max(errors):.2f} points"
    display.table(titles, body, "\n".join([note, *doubts(lines)]))
