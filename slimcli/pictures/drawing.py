"""From a model and images to files with pictures: what `slim show` and `slimcli.draw_lives` do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from slimcli.errors import DataError
from slimcli.pictures.figure import draw
from slimcli.pictures.files import ROWS_A_FILE, TILES_A_FILE, sheets, write_sheet
from slimcli.pictures.geometry import Geometry
from slimcli.pictures.outcome import Outcome, counted, look, pick
from slimcli.pictures.sources import data_batches, draw_at_random, image_batches
from slimcli.pictures.words import readable
from slimcli.progress import Progress, no_progress
from slimcli.session.session import Session

#: images in a batch, and validation images to pick from, where nobody says
BATCH, LIMIT = 16, 1000


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
    figure: Figure


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


@dataclass(frozen=True)
class Looked:
    """Outcomes to draw, about how many they are, the names of their classes, and images that were chosen from."""

    outcomes: Iterable[Outcome]
    expected: int
    class_names: Sequence[str] | None
    total: int


def look_at_files(session: Session, paths: Sequence[Path], broken: list[DataError]) -> Looked:
    """Outcomes of image files; an error about each that cannot be read is added to `broken` as they are drawn."""
    batches = image_batches(paths, session.preprocessing, batch_size(session), broken)
    outcomes = look(session.model, batches, session.device, session.dtype)
    return Looked(outcomes, len(paths), readable(session.target.class_names), len(paths))


def look_at_data(
    session: Session,
    how: str = "random",
    count: int = 4,
    seed: int = 0,
    progress: Progress = no_progress,
    warn: Callable[[str], None] = lambda _line: None,
) -> Looked:
    """Outcomes of `count` validation images of the session's data, chosen as `pick` does; `warn` is told notes."""
    limit = session.data.val_limit or LIMIT
    samples = session.images(val_limit=limit)
    for line in session.notes:
        warn(line)
    names = readable(session.target.class_names) or readable(getattr(samples, "class_names", None))
    if how == "random":
        samples = draw_at_random(samples, count, seed)
    batches = data_batches(samples, session.preprocessing, batch_size(session), session.device)
    outcomes = look(session.model, batches, session.device, session.dtype)
    chosen = pick(counted(outcomes, progress, limit), how, count)
    # only a stream does not know how many it has
    total = len(samples) if hasattr(samples, "__len__") else limit
    return Looked(chosen, len(chosen), names, total)


def batch_size(session: Session) -> int:
    """What was asked for, or a size for pictures."""
    given = session.resolved.is_given("data.batch_size")
    return session.request.batch_size or (session.data.batch_size if given else BATCH)
