"""slim show"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    from slimcli.pictures import Geometry, Outcome
    from slimcli.session.session import Session

#: parameters that only choose validation images
PICKING = ("data", "class_map", "split", "pick", "count", "seed", "limit")
#: images in a batch, and validation images to pick from, where nobody says
BATCH, LIMIT = 16, 1000


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
    from slimcli.files import check_writable
    from slimcli.session.session import Request, open_session

    display = Display(as_json)
    form = pictures.choose_format(output, form)
    check_writable(output or Path(f"images-lives.{form}"), "file")
    paths = pictures.find_images(images) if images else []
    if output is not None and any(path.is_file() and output.absolute() == path.absolute() for path in paths):
        raise SlimError(f"-o {output}: is one of the images: choose another name")
    session = open_session(Request("show IMAGE" if paths else "show", run, overrides, reads_data=not paths, **asked))
    if keep_rates is not None:
        session.model.keep_rate = keep_rates[0]
    geometry = pictures.find_geometry(session.model)
    pictures.drop_stages(geometry, layer)
    broken: list[Any] = []
    picking = None if paths else (pick, count, seed)
    stream, expected, class_names = _look(display, session, paths, broken, picking)
    columns = grid or (1 if expected <= 4 else 4)
    target = output or Path(f"{paths[0].stem if len(paths) == 1 else pick if not paths else 'images'}-lives.{form}")
    if not target.suffix:
        target = target.with_name(f"{target.name}.{form}")
    shown = (geometry, session.preprocessing, layer)
    written: list[str] = []
    entries: list[dict[str, Any]] = []
    for path, part in _parts(stream, expected, target, columns):
        figure = pictures.draw(part, *shown[:2], class_names, layer, min(columns, max(len(part), 2)))
        pictures.write_sheet(path, figure, form)
        written.append(str(path))
        if inline and not as_json:
            _print_picture(display, part, figure, *shown)
        entries += [{**pictures.describe(each, geometry, class_names), "output": str(path)} for each in part]
    _print_outcomes(display, entries, written, broken)
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


def _parts(
    stream: Iterator[Outcome], expected: int, target: Path, columns: int
) -> Iterator[tuple[Path, Sequence[Outcome]]]:
    """The outcomes of each file and its name: numbered where there are several."""
    from slimcli import pictures

    size = pictures.ROWS_A_FILE if columns == 1 else pictures.TILES_A_FILE
    for number, part in enumerate(pictures.sheets(stream, size), 1):
        yield target if expected <= size else target.with_name(f"{target.stem}-{number}{target.suffix}"), part


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


def _look(
    display: Any, session: Session, paths: Sequence[Path], broken: list[Any], picking: tuple[str, int, int] | None
) -> tuple[Iterator[Outcome], int, list[str] | None]:
    """What the model sees in the images, how many come, and the names of the classes.

    `picking` says which validation images, how many and by which seed, where no image was named; images that cannot
    be read are added to `broken`.
    """
    from slimcli import pictures

    for line in session.warnings:
        display.warn(line)
    model, device, dtype = session.model, session.device, session.dtype
    class_names = pictures.readable(session.target.class_names)
    asked = session.request.batch_size
    batch = asked or (session.data.batch_size if session.resolved.is_given("data.batch_size") else BATCH)
    prepare = session.preprocessing
    if picking is None:
        batches = pictures.image_batches(paths, prepare, batch, broken)
        return pictures.look(model, batches, device, dtype), len(paths), class_names
    pick, count, seed = picking
    limit = session.data.val_limit or LIMIT
    samples = session.images(val_limit=limit)
    for line in session.notes:
        display.warn(line)
    class_names = class_names or pictures.readable(getattr(samples, "class_names", None))
    if pick == "random":
        samples = pictures.draw_at_random(samples, count, seed)
    looked = pictures.look(model, pictures.data_batches(samples, prepare, batch, device), device, dtype)
    with display.progress() as progress:
        chosen = pictures.pick(pictures.counted(looked, progress, limit), pick, count)
    if not chosen:
        display.line(f"none of {len(samples)} images changed: wherever dense is right, slim is right too")
    return iter(chosen), len(chosen), class_names


def _print_outcomes(display: Any, entries: Sequence[dict[str, Any]], written: Sequence[str], broken: list[Any]) -> None:
    rows = [_cells(entry) for entry in entries]
    if rows:
        display.table(["Image", "Dense", "Slim", "Agree" if rows[0][3] in ("yes", "no") else "Cosine"], rows, left=True)
    for path in written:
        display.line(f"{path} written")
    for error in broken:
        display.warn(f"skipped {error}")


def _cells(entry: dict[str, Any]) -> list[str]:
    from slimcli.pictures import fit_words, short_name

    guesses = [entry["dense"], entry["slim"]]
    said = ["-" if g is None else f"{fit_words(g['class'], 14)} ({100 * g['probability']:.0f} %)" for g in guesses]
    agree = f"{entry['similarity']:.3f}" if entry["agree"] is None else "yes" if entry["agree"] else "no"
    return [fit_words(short_name(entry["image"]), 26), *said, agree]


def _print_picture(display: Any, part: Any, figure: Any, geometry: Any, prepare: Any, layer: int | None) -> None:
    """The picture in the terminal, as well as this one can."""
    import io
    import os

    from PIL import Image

    from slimcli import pictures
    from slimcli.cli import inline

    if not display.out.is_terminal:
        return
    protocol = inline.find_protocol(os.environ)
    columns = display.out.width
    if protocol == "blocks":
        # too coarse for words and numbers: the bare panels
        for outcome in part:
            display.out.print(inline.half_blocks(pictures.strip(outcome, geometry, prepare, layer), columns), end="")
        return
    png = pictures.encode(figure, "png", dpi=110)
    if protocol == "sixel":
        picture = Image.open(io.BytesIO(png))
        width = min(picture.width, columns * 9)
        text = inline.sixel(picture.resize((width, picture.height * width // picture.width), Image.Resampling.LANCZOS))
    else:
        text = inline.kitty(png, columns) if protocol == "kitty" else inline.iterm2(png, columns)
    display.out.file.write(text)
    display.out.file.flush()
