"""From outcomes to files with pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from slimcli.pictures.figure import draw
from slimcli.pictures.files import ROWS_A_FILE, TILES_A_FILE, sheets, write_sheet
from slimcli.pictures.geometry import Geometry
from slimcli.pictures.outcome import Outcome


@dataclass(frozen=True)
class Style:
    """How pictures look: one row an image with every stage (`columns` 1) or a contact sheet, of one `layer` or of all.

    `columns` None chooses by the number of images.
    """

    geometry: Geometry
    prepare: dict[str, Any]
    class_names: Sequence[str] | None
    layer: int | None = None
    columns: int | None = None


@dataclass(frozen=True)
class Sheet:
    """A file that was written, and what is drawn in it."""

    path: Path
    outcomes: tuple[Outcome, ...]
    figure: Figure | None = None


def draw_sheets(outcomes: Iterable[Outcome], expected: int, style: Style, target: Path, form: str) -> Iterator[Sheet]:
    """Draw outcomes, about `expected`, and write them to `target`, or to several files, `target-1` and so on."""
    columns = style.columns or (1 if expected <= 4 else 4)
    if not target.suffix:
        target = target.with_name(f"{target.name}.{form}")
    size = ROWS_A_FILE if columns == 1 else TILES_A_FILE
    for number, part in enumerate(sheets(outcomes, size), 1):
        path = target if expected <= size else target.with_name(f"{target.stem}-{number}{target.suffix}")
        wide = min(columns, max(len(part), 2))
        figure = draw(part, style.geometry, style.prepare, style.class_names, style.layer, wide)
        write_sheet(path, figure, form)
        yield Sheet(path, tuple(part), figure)
