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
    limit_option,
    one_keep_rate_option,
    refuse_given,
    set_option,
    split_option,
    target_options,
)

#: parameters that only choose validation images
PICKING = ("data", "class_map", "split", "pick", "count", "seed", "limit")


@click.command("show")
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@click.option("--run", metavar="RUN", help="Run, model folder or recipe.  [default: the latest run, or slim's own]")
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
@limit_option("Pick from this many images, spread evenly over the split.  [default: the recipe's, or 1000]")
@split_option
@click.option("--html", type=click.Path(path_type=Path), help="Write a page to explore the images in instead.")
@click.option("--inline", is_flag=True, help="Show the picture in the terminal too.")
@one_keep_rate_option("Another than the model's own.")
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
    html: Path | None,
    inline: bool,
    overrides: tuple[str, ...],
    as_json: bool,
    **asked: Any,
) -> None:
    """Draw the life of every patch over the image, and the patches that are left after each drop layer.

    IMAGE is a file, a folder or a pattern; without one, a few validation images are picked.
    """
    if html:
        refuse_given("with --html: it is for pictures", "output", "form", "layer", "grid", "inline")
    if images:
        refuse_given("with IMAGE: it is for picking validation images", *PICKING)
    elif pick != "random":
        refuse_given(f"with --pick {pick}", "seed")
    from slimcli import pictures
    from slimcli.cli.display import Display
    from slimcli.cli.inline import print_picture
    from slimcli.cli.tables import print_pictures
    from slimcli.session.session import Request, open_session

    display = Display(as_json)
    paths, form = pictures.check_files(images, html or output, pictures.PAGE if html else form)
    session = open_session(Request("show IMAGE" if paths else "show", run, overrides, reads_data=not paths, **asked))
    display.warnings(session.warnings)
    with display.progress() as progress:
        album = pictures.open_album(session, paths, pictures.Picking(pick, count, seed), layer, grid, progress)
    display.warnings(session.notes)
    for sheet in album.draw(html or output, form):
        if inline and not as_json:
            print_picture(display, sheet, album.style)
    print_pictures(display, album)
    display.document(album.document())
    click.get_current_context().exit(1 if album.broken else 0)
