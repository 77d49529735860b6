"""Figures as files: formats, bytes that depend on the figure alone, and how many images a file holds."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from slimcli.errors import SlimError, parameter
from slimcli.files import write_file
from slimcli.pictures.outcome import Outcome

FORMATS = ("png", "svg", "pdf")
#: no picture, but a page in which images are explored
PAGE = "html"
#: images in one file: rows with every stage, and tiles of a contact sheet
ROWS_A_FILE, TILES_A_FILE = 12, 60


def encode(figure: Figure, form: str = "png", dpi: int = 160) -> bytes:
    """The figure as the content of a PNG, SVG or PDF file, the same bytes for the same figure."""
    buffer = io.BytesIO()
    dates = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "slim", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=form, dpi=dpi, metadata=dates[form])
    return buffer.getvalue()


def choose_format(output: Path | None, form: str | None) -> str:
    """The format that the output's suffix or `form` asks for; `SlimError` where they differ or it is another."""
    if form == PAGE:
        return form
    suffix = output.suffix.lower().lstrip(".") if output is not None else ""
    if suffix and suffix not in FORMATS:
        raise SlimError(
            f"{parameter('output', output)}: a picture is written as one of {', '.join(FORMATS)}, not .{suffix}"
        )
    if suffix and form and suffix != form:
        raise SlimError(f"{parameter('output', output)} and {parameter('form', form)} differ: leave one of them out")
    return suffix or form or "png"


def sheets(outcomes: Iterable[Outcome], size: int) -> Iterator[list[Outcome]]:
    """Outcomes in parts of `size`, one part a file."""
    stream = iter(outcomes)
    while part := list(itertools.islice(stream, size)):
        yield part


def write_sheet(path: Path, figure: Figure, form: str) -> None:
    """Write a figure, whole or not at all."""
    write_file(path, encode(figure, form))
