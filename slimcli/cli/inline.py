"""Pictures inside a terminal: kitty's, iTerm2's and sixel graphics, and coloured half blocks everywhere else."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy
from numpy.typing import NDArray
from PIL import Image
from rich.color import Color
from rich.segment import Segment, Segments
from rich.style import Style

from slimcli import pictures

if TYPE_CHECKING:
    from slimcli.cli.display import Display
    from slimcli.pictures.drawing import Sheet
    from slimcli.pictures.drawing import Style as PictureStyle

#: what TERM_PROGRAM says of terminals that draw pictures
PROGRAMS = {
    "iterm.app": "iterm2",
    "wezterm": "iterm2",
    "mintty": "iterm2",
    "hyper": "iterm2",
    "ghostty": "kitty",
    "kitty": "kitty",
    "contour": "sixel",
}
SIXEL_TERMS = ("foot", "mlterm", "contour", "yaft", "sixel")


def find_protocol(environment: Mapping[str, str]) -> str:
    """How the terminal that `environment` describes shows pictures: kitty, iterm2, sixel or blocks."""
    term = environment.get("TERM", "").lower()
    if environment.get("TMUX") or environment.get("STY") or term.startswith(("screen", "tmux")):
        # a multiplexer keeps graphics from the terminal behind it
        return "blocks"
    if environment.get("KITTY_WINDOW_ID") or "kitty" in term or "ghostty" in term:
        return "kitty"
    program = PROGRAMS.get(environment.get("TERM_PROGRAM", "").lower())
    if program is not None:
        return program
    if environment.get("LC_TERMINAL", "").lower() == "iterm2":
        return "iterm2"
    return "sixel" if term.startswith(SIXEL_TERMS) or term.endswith("-sixel") else "blocks"


def kitty(png: bytes, columns: int) -> str:
    """A PNG file as kitty's graphics escapes, `columns` cells wide."""
    data = base64.standard_b64encode(png).decode()
    parts = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    escapes = []
    for number, part in enumerate(parts, 1):
        first = f"a=T,f=100,c={columns}," if number == 1 else ""
        escapes.append(f"\x1b_G{first}m={int(number < len(parts))};{part}\x1b\\")
    return "".join(escapes) + "\n"


def iterm2(png: bytes, columns: int) -> str:
    """A PNG file as iTerm2's escape, `columns` cells wide."""
    data = base64.standard_b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)};width={columns};preserveAspectRatio=1:{data}\x07\n"


def sixel(image: Image.Image) -> str:
    """An image as sixels, in at most 255 colours."""
    reduced = image.convert("RGB").quantize(255)
    palette = reduced.getpalette() or []
    indices = numpy.asarray(reduced)
    out = [f'\x1bPq"1;1;{image.width};{image.height}']
    for number in range(len(palette) // 3):
        red, green, blue = (round(value * 100 / 255) for value in palette[3 * number : 3 * number + 3])
        out.append(f"#{number};2;{red};{green};{blue}")
    for top in range(0, image.height, 6):
        # six rows at a time: for each colour, a bit a row in every column
        rows = indices[top : top + 6]
        bits = 1 << numpy.arange(len(rows))[:, None]
        colours = [f"#{number}{_run_lengths(((rows == number) * bits).sum(axis=0))}" for number in numpy.unique(rows)]
        out.append("$".join(colours) + "-")
    return "".join(out) + "\x1b\\\n"


def _run_lengths(mask: NDArray[numpy.int64]) -> str:
    """Six-bit columns as sixel characters, repeated ones counted."""
    ends = [*(numpy.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
    parts, start = [], 0
    for end in ends:
        sign = chr(63 + int(mask[start]))
        parts.append(f"!{end - start}{sign}" if end - start > 3 else sign * (end - start))
        start = end
    return "".join(parts)


def half_blocks(image: Image.Image, columns: int) -> Segments:
    """An image as two pixels a character cell, for any terminal with colours."""
    columns = min(columns, image.width)
    height = max(2, 2 * round(image.height * columns / image.width / 2))
    small = image.convert("RGB").resize((columns, height), Image.Resampling.BOX)
    segments = []
    for y in range(0, height, 2):
        for x in range(columns):
            upper, lower = (Color.from_rgb(*small.getpixel((x, row))) for row in (y, y + 1))  # type: ignore[misc]
            segments.append(Segment("▀", Style(color=upper, bgcolor=lower)))
        segments.append(Segment.line())
    return Segments(segments)


def print_picture(display: Display, sheet: Sheet, style: PictureStyle) -> None:
    """A sheet in the terminal, as well as this one can."""
    if not display.out.is_terminal:
        return
    protocol = find_protocol(os.environ)
    columns = display.out.width
    if protocol == "blocks":
        # too coarse for words and numbers: the bare panels
        for outcome in sheet.outcomes:
            bare = pictures.strip(outcome, style.geometry, style.prepare, style.layer)
            display.out.print(half_blocks(bare, columns), end="")
        return
    assert sheet.figure is not None
    png = pictures.encode(sheet.figure, "png", dpi=110)
    if protocol == "sixel":
        picture = Image.open(io.BytesIO(png))
        width = min(picture.width, columns * 9)
        text = sixel(picture.resize((width, picture.height * width // picture.width), Image.Resampling.LANCZOS))
    else:
        text = kitty(png, columns) if protocol == "kitty" else iterm2(png, columns)
    display.out.file.write(text)
    display.out.file.flush()
