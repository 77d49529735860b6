"""Figures: rows with every stage, contact sheets, and the life map alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from PIL import Image

from slimcli.pictures.geometry import Geometry, drop_stages
from slimcli.pictures.outcome import Outcome
from slimcli.pictures.pixels import COLOURS, Pixels, life_map, panels
from slimcli.pictures.words import class_name, short_name, verdict

INK, QUIET, ALARM = "#1a1a1a", "#666666", "#b34700"
#: inches
PANEL, TILE, GAP, MARGIN = 2.7, 1.75, 0.1, 0.15


def draw(
    outcomes: Sequence[Outcome],
    geometry: Geometry,
    prepare: dict[str, Any],
    class_names: Sequence[str] | None = None,
    layer: int | None = None,
    columns: int = 1,
) -> Figure:
    """The figure of some outcomes. In one column, rows with every stage; in more, a contact sheet.

    A tile of the contact sheet shows the lives and what is left in the end, or after block `layer`.
    """
    layers = drop_stages(geometry, layer)
    if columns > 1:
        layers = layers[-1:]
    titles = panel_titles(outcomes[0], geometry, layers)
    first = 0 if columns == 1 else 1
    titles = titles[first:]
    side = PANEL if columns == 1 else TILE
    height, width = outcomes[0].image.shape[1:]
    panel_width, panel_height = side * width / max(height, width), side * height / max(height, width)
    size, small = (10.0, 8.0) if columns == 1 else (7.5, 6.5)
    # narrow panels stand as far apart as their titles need
    pitch = max(panel_width, *(_width(title, small, bold=True) for title in titles))
    row_width = len(titles) * pitch + (len(titles) - 1) * GAP
    two_lines = row_width < 9.0
    head = (3.3 if two_lines else 2.2) * size / 72 + 1.8 * small / 72
    row_height = panel_height + head + GAP
    lines = -(-len(outcomes) // columns)
    with_numbers = _numbers_fit(panel_width, panel_height, geometry)
    with_bar = not with_numbers
    foot = 0.55 if with_bar else 0.0
    note = _stage_note(geometry, layers) if layer is None and columns == 1 else ""
    note_height = 1.6 * small / 72 if note else 0.0
    total_width = columns * row_width + (columns - 1) * 3 * GAP + 2 * MARGIN
    total_height = lines * row_height + foot + note_height + 2 * MARGIN
    figure = Figure((total_width, total_height), facecolor="white")

    def place(left: float, top: float, wide: float, high: float) -> Axes:
        return figure.add_axes(
            (left / total_width, 1 - (top + high) / total_height, wide / total_width, high / total_height)
        )

    def write(text: str, left: float, baseline: float, points: float, **style: Any) -> None:
        figure.text(left / total_width, 1 - baseline / total_height, text, size=points, parse_math=False, **style)

    for number, outcome in enumerate(outcomes):
        line, column = divmod(number, columns)
        left = MARGIN + column * (row_width + 3 * GAP)
        top = MARGIN + line * row_height
        said, colour = verdict(outcome, class_names), INK if outcome.agree is not False else ALARM
        name = short_name(outcome.name)
        if outcome.target is not None:
            name += f" (is {class_name(outcome.target, class_names)})"
        name = fit(name, row_width if two_lines else row_width - _width(f"   {said}", size), size)
        ahead = 0.0 if two_lines else _width(f"{name}   ", size, bold=True)
        below = (2.6 if two_lines else 1.2) * size / 72
        write(name, left, top + 1.2 * size / 72, size, color=INK, weight="bold")
        write(fit(said, row_width - ahead, size), left + ahead, top + below, size, color=colour)
        drawn = panels(outcome, geometry, prepare, layers)[first:]
        for index, (title, pixels) in enumerate(zip(titles, drawn, strict=True)):
            x = left + index * (pitch + GAP)
            write(title, x, top + head - 0.6 * small / 72, small, color=QUIET)
            axes = place(x, top + head, panel_width, panel_height)
            axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto")
            axes.set(xlim=(0, width), ylim=(height, 0))
            axes.set_axis_off()
            if with_numbers and index + first == 1:
                _write_lives(axes, outcome, geometry, pixels, panel_width, panel_height)
    end = MARGIN + lines * row_height
    if with_bar:
        _draw_bar(place(MARGIN, end + 0.12, min(4.0, total_width - 2 * MARGIN), 0.13), geometry, small)
    if note:
        write(fit(note, total_width - 2 * MARGIN, small), MARGIN, end + foot + 1.1 * small / 72, small, color=QUIET)
    return figure


def panel_titles(outcome: Outcome, geometry: Geometry, layers: Sequence[int]) -> list[str]:
    """What each picture of a row is."""
    height, width = outcome.image.shape[1:]
    total = geometry.counts[0]
    after = [f"after block {t}: {geometry.counts[min(t, geometry.depth - 1)]} of {total} left" for t in layers]
    return [f"input {width} × {height}", f"life, {geometry.life_layer} to {geometry.depth}", *after]


def draw_lives(outcome: Outcome, geometry: Geometry, prepare: dict[str, Any]) -> Figure:
    """The life map alone, to the edge of the figure: the lives as colours, and as numbers where they fit."""
    height, width = outcome.image.shape[1:]
    inches = PANEL * width / max(height, width), PANEL * height / max(height, width)
    figure = Figure(inches)
    axes = figure.add_axes((0, 0, 1, 1))
    pixels = panels(outcome, geometry, prepare, ())[1]
    axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto")
    axes.set_axis_off()
    if _numbers_fit(*inches, geometry):
        _write_lives(axes, outcome, geometry, pixels, *inches)
    return figure


def _stage_note(geometry: Geometry, layers: Sequence[int]) -> str:
    every = drop_stages(geometry, most=geometry.depth)
    if not every:
        return "This schedule drops no patch: every patch lives to the last block."
    if len(every) == len(layers):
        return ""
    return f"Patches leave after blocks {', '.join(map(str, every))}; shown are {len(layers)} of these stages."


def _numbers_fit(width: float, height: float, geometry: Geometry) -> bool:
    """Whether a number stays legible in the cell of a panel of that many inches."""
    return 72 * min(width / geometry.grid[1], height / geometry.grid[0]) >= 8.5


def _write_lives(axes: Axes, outcome: Outcome, geometry: Geometry, pixels: Pixels, width: float, height: float) -> None:
    """The life in every cell: with a decimal where there is room, rounded where there is little."""
    room = 72 * min(width / geometry.grid[1], height / geometry.grid[0])
    size = min(8.0, room * (0.36 if room >= 18 else 0.5))
    digits = 1 if room >= 18 else 0
    lives = life_map(outcome, geometry)
    scale = pixels.shape[0] // outcome.image.shape[1]
    cells = geometry.cells(outcome.image.shape[1], outcome.image.shape[2], scale).reshape(-1)
    grey = numpy.asarray(Image.fromarray(pixels).convert("L")).reshape(-1)
    bright = (
        numpy.bincount(cells + 1, grey, lives.size + 1)[1:] / numpy.bincount(cells + 1, minlength=lives.size + 1)[1:]
    )
    for (row, column), value in numpy.ndenumerate(lives):
        axes.text(
            geometry.top_left[1] + (column + 0.5) * geometry.cell[1],
            geometry.top_left[0] + (row + 0.5) * geometry.cell[0],
            f"{value:.{digits}f}",
            size=size,
            color="black" if bright[row * geometry.grid[1] + column] > 118 else "white",
            ha="center",
            va="center_baseline",
        )


def _draw_bar(axes: Axes, geometry: Geometry, size: float) -> None:
    low, high = geometry.life_layer, geometry.depth
    axes.imshow(COLOURS(numpy.linspace(0, 1, 256))[None], extent=(low, high, 0, 1), aspect="auto")
    axes.set_yticks([])
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axes.tick_params(labelsize=size, colors=QUIET, length=2, pad=2)
    axes.set_xlabel("life: the last block that uses a patch", size=size, color=QUIET, labelpad=2, loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _width(text: str, points: float, bold: bool = False) -> float:
    """The width of a text in inches."""
    font = FontProperties(size=points, weight="bold" if bold else "normal")
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72


def fit(text: str, inches: float, points: float) -> str:
    """`text` with its middle left out where it would be wider than `inches`, as it might be in bold."""
    if _width(text, points, bold=True) <= inches:
        return text

    def shortened(length: int) -> str:
        end = length // 2
        return f"{text[: length - end].rstrip()}…{text[len(text) - end :].lstrip()}"

    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if _width(shortened(middle), points, bold=True) <= inches:
            fits = middle
        else:
            too_long = middle
    return shortened(fits)
