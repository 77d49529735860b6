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
from slimcli.pictures.pixels import COLOURS, Pixels, class_colour, class_maps, life_map, panels
from slimcli.pictures.words import class_name, short_name, verdict

INK, QUIET, ALARM = "#1a1a1a", "#666666", "#b34700"
#: inches
PANEL, TILE, GAP, MARGIN = 2.7, 1.75, 0.1, 0.15
#: the height of a line of the legend, and the width of its squares, in sizes of the letters
LINE, SQUARE = 1.6, 1.2


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
    note = _stage_note(geometry, layers) if layer is None and columns == 1 else ""
    first = 0 if columns == 1 else 1
    titles = panel_titles(outcomes[0], geometry, layers)[first:]
    classes = () if outcomes[0].maps is None else class_names or ()
    sheet = _Sheet(len(outcomes), columns, outcomes[0].image.shape[1:], titles, geometry, note, classes)
    for number, outcome in enumerate(outcomes):
        left, top = sheet.corner(number)
        sheet.caption(outcome, class_names, left, top)
        drawn = panels(outcome, geometry, prepare, layers)[first:]
        for index, pixels in enumerate(drawn):
            axes = sheet.panel(index, pixels, left, top)
            if sheet.with_numbers and index + first == 1:
                _write_lives(axes, outcome, geometry, pixels, *sheet.panel_size)
    sheet.foot()
    return sheet.figure


class _Sheet:
    """A figure with room for so many outcomes, and where everything stands in it. Lengths are inches."""

    def __init__(
        self,
        count: int,
        columns: int,
        image_size: Sequence[int],
        titles: Sequence[str],
        geometry: Geometry,
        note: str,
        classes: Sequence[str] = (),
    ) -> None:
        self.columns, self.titles, self.geometry, self.note = columns, titles, geometry, note
        self.image_size = height, width = image_size
        side = PANEL if columns == 1 else TILE
        self.panel_size = side * width / max(height, width), side * height / max(height, width)
        self.size, self.small = (10.0, 8.0) if columns == 1 else (7.5, 6.5)
        # narrow panels stand as far apart as their titles need
        self.pitch = max(self.panel_size[0], *(_width(title, self.small, bold=True) for title in titles))
        self.row_width = len(titles) * self.pitch + (len(titles) - 1) * GAP
        self.two_lines = self.row_width < 9.0
        self.head = (3.3 if self.two_lines else 2.2) * self.size / 72 + 1.8 * self.small / 72
        self.row_height = self.panel_size[1] + self.head + GAP
        self.with_numbers = _numbers_fit(*self.panel_size, geometry)
        self.end = MARGIN + -(-count // columns) * self.row_height
        self.foot_height = 0.0 if self.with_numbers else 0.55
        note_height = 1.6 * self.small / 72 if note else 0.0
        self.width = columns * self.row_width + (columns - 1) * 3 * GAP + 2 * MARGIN
        self.legend = _legend(classes, self.width - 2 * MARGIN, self.small)
        self.height = self.end + self.foot_height + note_height + MARGIN
        self.height += (len(self.legend) + 0.5) * LINE * self.small / 72 if self.legend else 0.0
        self.figure = Figure((self.width, self.height), facecolor="white")

    def corner(self, number: int) -> tuple[float, float]:
        """Left and top of an outcome."""
        line, column = divmod(number, self.columns)
        return MARGIN + column * (self.row_width + 3 * GAP), MARGIN + line * self.row_height

    def place(self, left: float, top: float, wide: float, high: float) -> Axes:
        return self.figure.add_axes(
            (left / self.width, 1 - (top + high) / self.height, wide / self.width, high / self.height)
        )

    def write(self, text: str, left: float, baseline: float, points: float, **style: Any) -> None:
        self.figure.text(left / self.width, 1 - baseline / self.height, text, size=points, parse_math=False, **style)

    def caption(self, outcome: Outcome, class_names: Sequence[str] | None, left: float, top: float) -> None:
        """The image's name and what the models say of it."""
        size, width, two_lines = self.size, self.row_width, self.two_lines
        guess, colour = verdict(outcome, class_names), INK if outcome.agree is not False else ALARM
        name = short_name(outcome.name)
        if outcome.target is not None:
            name += f" (is {class_name(outcome.target, class_names)})"
        name = fit(name, width if two_lines else width - _width(f"   {guess}", size), size)
        ahead = 0.0 if two_lines else _width(f"{name}   ", size, bold=True)
        below = (2.6 if two_lines else 1.2) * size / 72
        self.write(name, left, top + 1.2 * size / 72, size, color=INK, weight="bold")
        self.write(fit(guess, width - ahead, size), left + ahead, top + below, size, color=colour)

    def panel(self, index: int, pixels: Pixels, left: float, top: float) -> Axes:
        """A picture under its title."""
        height, width = self.image_size
        x, y = left + index * (self.pitch + GAP), top + self.head
        self.write(self.titles[index], x, y - 0.6 * self.small / 72, self.small, color=QUIET)
        axes = self.place(x, y, *self.panel_size)
        axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto")
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        return axes

    def foot(self) -> None:
        """What the colours mean, where no numbers say it, and the note."""
        room, small = self.width - 2 * MARGIN, self.small
        if not self.with_numbers:
            _draw_bar(self.place(MARGIN, self.end + 0.12, min(4.0, room), 0.13), self.geometry, small)
        if self.note:
            baseline = self.end + self.foot_height + 1.1 * small / 72
            self.write(fit(self.note, room, small), MARGIN, baseline, small, color=QUIET)
        step = LINE * small / 72
        for number, line in enumerate(reversed(self.legend), 1):
            for left, index, name in line:
                self.write(
                    "■", MARGIN + left, self.height - MARGIN - (number - 1) * step, small, color=class_colour(index)
                )
                beside = MARGIN + left + SQUARE * small / 72
                self.write(name, beside, self.height - MARGIN - (number - 1) * step, small, color=INK)


def panel_titles(outcome: Outcome, geometry: Geometry, layers: Sequence[int]) -> list[str]:
    """What each picture of a row is."""
    height, width = outcome.image.shape[1:]
    total = geometry.counts[0]
    after = [f"after block {t}: {geometry.counts[min(t, geometry.depth - 1)]} of {total} left" for t in layers]
    maps = [] if outcome.maps is None else [title for title, _ in class_maps(outcome.maps)]
    return [f"input {width} × {height}", f"life, {geometry.life_layer} to {geometry.depth}", *after, *maps]


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


def _legend(names: Sequence[str], room: float, points: float) -> list[list[tuple[float, int, str]]]:
    """The names of classes in lines that are `room` wide: of each its left, its number and its name."""
    lines: list[list[tuple[float, int, str]]] = []
    left = room
    for index, name in enumerate(names):
        wide = _width(name, points) + 2.5 * SQUARE * points / 72
        if left + wide > room:
            lines.append([])
            left = 0.0
        lines[-1].append((left, index, name))
        left += wide
    return lines


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
