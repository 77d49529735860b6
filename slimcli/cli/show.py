"""slim show"""

from __future__ import annotations

from collections.abc import Sequence
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
    refuse_given,
    set_option,
    split_option,
    target_options,
)
from slimcli.errors import SlimError

if TYPE_CHECKING:
    from slimcli.cli.display import Display
    from slimcli.pictures import Geometry
    from slimcli.pictures.drawing import Looked
    from slimcli.session.session import Session

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
    _refuse(images, pick, keep_rates)

    from slimcli import pictures
    from slimcli.cli.display import Display
    from slimcli.cli.inline import print_picture
    from slimcli.cli.tables import print_pictures
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
    broken: list[Any] = []
    looked = _look(display, session, paths, broken, (pick, count, seed))
    style = pictures.Style(geometry, session.preprocessing, looked.class_names, layer, grid)
    target = output or Path(f"{paths[0].stem if len(paths) == 1 else pick if not paths else 'images'}-lives.{form}")
    entries: list[dict[str, Any]] = []
    written: list[str] = []
    for sheet in pictures.draw_sheets(looked.outcomes, looked.expected, style, target, form):
        written.append(str(sheet.path))
        if inline and not as_json:
            print_picture(display, sheet, style)
        found = (pictures.describe(outcome, geometry, looked.class_names) for outcome in sheet.outcomes)
        entries += [{**entry, "output": str(sheet.path)} for entry in found]
    print_pictures(display, entries, written, broken)
    skipped = [str(error) for error in broken]
    display.document({**_facts(session, geometry), "written": written, "images": entries, "skipped": skipped})
    if broken:
        click.get_current_context().exit(1)


def _refuse(images: Sequence[str], pick: str, keep_rates: Sequence[float] | None) -> None:
    if keep_rates is not None and len(keep_rates) > 1:
        raise SlimError("--keep-rate takes one keep rate here: a picture shows one schedule")
    if images:
        refuse_given("with IMAGE: it is for picking validation images", *PICKING)
    elif pick != "random":
        refuse_given(f"with --pick {pick}", "seed")


def _look(
    display: Display, session: Session, paths: Sequence[Path], broken: list[Any], picking: tuple[str, int, int]
) -> Looked:
    """What the models make of the images that are named, or of validation images picked."""
    from slimcli import pictures

    for line in session.warnings:
        display.warn(line)
    if paths:
        return pictures.look_at_files(session, paths, broken)
    with display.progress() as progress:
        looked = pictures.look_at_data(session, *picking, progress, display.warn)
    if not looked.expected:
        display.line(f"none of {looked.total} images changed: wherever dense is right, slim is right too")
    return looked


def _facts(session: Session, geometry: Geometry) -> dict[str, Any]:
    """What a document says of the model."""
    return {
        "model": session.target.model_name,
        "target": session.target.label,
        "keep_rate": session.model.keep_rate,
        "schedule": list(geometry.counts),
        "life_layer": geometry.life_layer,
        "grid": list(geometry.grid),
    }
