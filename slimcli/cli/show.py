"""slim show"""

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
    keep_rate_option,
    refuse_given,
    set_option,
    split_option,
    target_options,
)
from slimcli.errors import SlimError

#: parameters that only choose validation images
PICKING = ("data", "class_map", "split", "pick", "count", "seed", "limit")


@click.command("show")
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@click.option(
    "--run", metavar="RUN", help="Run, model folder or recipe.  [default: the latest run, or slim's own model]"
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: IMAGE-lives.png]")
@click.option("--format", "form", type=click.Choice(["png", "svg", "pdf"]), help="[default: by --output, or png]")
@click.option("--layer", type=click.IntRange(min=1), help="One stage only: what is left after this block.")
@click.option(
    "--grid", type=click.IntRange(1, 12), metavar="COLUMNS",
    help="1: a row an image with every stage; more: a contact sheet.  [default: 1 up to 4 images, else 4]",
)  # fmt: skip
@click.option(
    "--pick", type=click.Choice(["random", "changed", "hardest"]), default="random", show_default=True,
    help="Without IMAGE, which validation images; changed: dense right, slim wrong.",
)  # fmt: skip
@click.option("--count", type=click.IntRange(min=1), default=4, show_default=True, help="How many to pick.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of --pick random.")
@click.option(
    "--limit", type=click.IntRange(min=1),
    help="Pick from this many images, spread evenly over the split.  [default: the recipe's, or 1000]",
)  # fmt: skip
@split_option
@click.option("--inline", is_flag=True, help="Show the picture in the terminal too.")
@keep_rate_option("Another keep rate than the model's own.")
@data_option
@class_map_option
@batch_size_option
@target_options
@dead_option
@set_option
@common_options
def command(
    images: tuple[str, ...],
    run: str | None,
    output: Path | None,
    form: str | None,
    layer: int | None,
    grid: int | None,
    pick: str,
    count: int,
    seed: int,
    inline: bool,
    keep_rates: list[float] | None,
    overrides: tuple[str, ...],
    as_json: bool,
    **asked: Any,
) -> None:
    """Draw the life of every patch over the image, and the patches that are left after each drop layer.

    IMAGE is a file, a folder or a pattern; without one, a few images of the validation data are picked.
    """
    if keep_rates is not None and len(keep_rates) > 1:
        raise SlimError("--keep-rate takes one keep rate here: a picture shows one schedule")
    if images:
        refuse_given("with IMAGE: it is for picking validation images", *PICKING)
    elif pick != "random":
        refuse_given(f"with --pick {pick}", "seed")

    from slimcli import pictures
    from slimcli.cli.display import Display
    from slimcli.cli.inline import print_picture
    from slimcli.cli.tables import picture_cells
    from slimcli.files import check_writable
    from slimcli.session.session import Request, open_session

    display = Display(as_json)
    form = pictures.choose_format(output, form)
    check_writable(output or Path(f"images-lives.{form}"), "file")
    paths = pictures.find_images(images) if images else []
    if output is not None and any(path.is_file() and output.absolute() == path.absolute() for path in paths):
        raise SlimError(f"-o {output}: is one of the images: choose another name")
    request = Request("show IMAGE" if paths else "show", run, overrides, reads_data=not paths, **asked)
    session = open_session(request)
    if keep_rates is not None:
        session.model.keep_rate = keep_rates[0]
    geometry = pictures.find_geometry(session.model)
    pictures.drop_stages(geometry, layer)
    for line in session.warnings:
        display.warn(line)
    broken: list[Any] = []
    if paths:
        looked = pictures.look_at_files(session, paths, broken)
    else:
        with display.progress() as progress:
            looked = pictures.look_at_data(session, pick, count, seed, progress, display.warn)
        if not looked.expected:
            display.line(f"none of {looked.total} images changed: wherever dense is right, slim is right too")
    style = pictures.Style(geometry, session.preprocessing, looked.class_names, layer, grid)
    target = output or Path(f"{paths[0].stem if len(paths) == 1 else pick if not paths else 'images'}-lives.{form}")
    rows: list[list[str]] = []
    entries: list[dict[str, Any]] = []
    written: list[str] = []
    for sheet in pictures.draw_sheets(looked.outcomes, looked.expected, style, target, form):
        written.append(str(sheet.path))
        if inline and not as_json:
            print_picture(display, sheet, style)
        for outcome in sheet.outcomes:
            entry = pictures.describe(outcome, geometry, looked.class_names)
            entries.append({**entry, "output": str(sheet.path)})
            rows.append(picture_cells(entry))
    if rows:
        display.table(["Image", "Dense", "Slim", "Agree" if rows[0][3] in ("yes", "no") else "Cosine"], rows, left=True)
    for path_written in written:
        display.line(f"{path_written} written")
    for error in broken:
        display.warn(f"skipped {error}")
    display.document(
        {
            "model": session.target.model_name,
            "target": session.target.label,
            "keep_rate": session.model.keep_rate,
            "schedule": list(geometry.counts),
            "life_layer": geometry.life_layer,
            "grid": list(geometry.grid),
            "written": written,
            "images": entries,
            "skipped": [str(error) for error in broken],
        }
    )
    if broken:
        click.get_current_context().exit(1)
