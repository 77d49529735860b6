"""slim compare"""

from __future__ import annotations

from pathlib import Path

import click

from slimcli.cli.options import batch_size_option, command_line, common_options, keep_rate_option, set_option, words
from slimcli.errors import Interrupted, SlimError

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
    from slimcli import compare, train
    from slimcli.cli.display import Display, number
    from slimcli.device import find_device
    from slimcli.files import write_json
    from slimcli.recipe import FILES, find_recipe
    from slimcli.resolve import resolve
    from slimcli.session import choose_data

    trains = untrained is False or epochs is not None
    path = str(find_recipe(recipe))
    resolved = resolve(path, "compare --train" if trains else "compare", overrides, precision=precision, check=FILES)
    section = choose_data(resolved, None, None, limit, batch_size)
    loaded = resolved.recipe.model_copy(update={"data": section})

    display = Display(as_json)
    where = find_device(device)
    if output is None:
        output = compare.unfinished(loaded) if resume else None
    elif resume and not (output / compare.SETTINGS).is_file():
        raise SlimError(f"{output}: is no comparison to go on with: start it without --resume")
    rates: list[float | None] = [*dict.fromkeys(keep_rates)] if keep_rates else [None]
    comparison = compare.Comparison(
        loaded,
        chosen,
        rates,
        output or Path(),
        where,
        epochs if epochs is not None else 0 if untrained is False else None,
        log=display.line,
    )
    compare.check(comparison)
    if output is None:
        comparison.folder = train.new_run_folder(loaded, "-compare")
    compare.open_folder(comparison, resume)
    try:
        with display.progress() as progress:
            comparison.progress = progress
            document = compare.compare(comparison)
    except (Interrupted, KeyboardInterrupt):
        display.err.print(
            f"Stopped; what was finished is kept. Go on with the same command and --resume -o {comparison.folder}",
            markup=False,
            soft_wrap=True,
        )
        click.get_current_context().exit(1)
    document = {**document, "command": command_line(), "output": str(comparison.folder)}
    write_json(comparison.folder / compare.RESULT, document)

    display.line()
    has_classes = "top1" in document["rows"][0]
    titles = ["Method", "Keep", "G MACs", "Top-1" if has_classes else "Cosine", "Lost", "img/s", "Speed-up", "of ideal"]
    body = [
        [
            row["title"],
            "-" if row["method"] == "dense" else "own" if row["keep_rate"] is None else f"{row['keep_rate']:g}",
            number(row["gmacs"], 3),
            number(compare.score_of(row), 2),
            number(row["lost"], 2),
            number(row["images_per_second"], 1),
            number(row["speedup"], 2),
            f"{100 * row['realised']:.0f} %",
        ]
        for row in document["rows"]
    ]
    images, epochs_done = document["rows"][0]["images"], document["epochs"]
    how = f"each trained for {epochs_done} epochs" if epochs_done else "nothing trained"
    display.table(titles, body, f"{images} images, {how}; every method costs what life costs at the keep rate")
    display.line(f"{comparison.folder} holds {compare.TABLE}, {compare.RESULT} and {compare.PLOT}.png and .svg")
    display.document(document)
