"""Pictures of a session's model, from what a user asks for to the files: what `slim show` does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimcli.errors import DataError, SlimError, parameter
from slimcli.files import check_writable
from slimcli.pictures.drawing import Sheet, Style, draw_sheets
from slimcli.pictures.explore import look_closely, write_page
from slimcli.pictures.files import PAGE, choose_format
from slimcli.pictures.geometry import drop_stages, find_geometry
from slimcli.pictures.outcome import Outcome, counted, describe, look, pick
from slimcli.pictures.sources import data_batches, draw_at_random, find_images, image_batches
from slimcli.pictures.words import readable
from slimcli.progress import Progress, no_progress
from slimcli.session.session import Session

#: images in a batch, and validation images to pick from, where nobody says
BATCH, LIMIT = 16, 1000


@dataclass(frozen=True)
class Picking:
    """Which validation images: `count` chosen as `pick` does, at random from `seed`."""

    how: str = "random"
    count: int = 4
    seed: int = 0


@dataclass
class Album:
    """Outcomes to draw, about `expected`, in a style; drawing fills `sheets`, and `broken` with unreadable images."""

    session: Session
    style: Style
    outcomes: Iterable[Outcome]
    expected: int
    #: what the files are called where nobody says
    name: str
    broken: list[DataError]
    #: what a user should know of the images that were chosen
    notes: tuple[str, ...] = ()
    sheets: list[Sheet] = field(default_factory=list)

    def draw(self, output: Path | None, form: str) -> Iterator[Sheet]:
        """Draw and write each sheet, to `output` or to `NAME-lives.FORM`."""
        path = output or Path(f"{self.name}.{form}")
        sheets = draw_sheets(self.outcomes, self.expected, self.style, path, form)
        for sheet in iter([self._explore(path)]) if form == PAGE else sheets:
            self.sheets.append(sheet)
            yield sheet

    def _explore(self, path: Path) -> Sheet:
        """Write one page in which the images can be explored at every keep rate."""
        session, style = self.session, self.style
        scenes = [look_closely(session.model, found, style, session.device, session.dtype) for found in self.outcomes]
        write_page(path, scenes, style.geometry, session.target.model_name, style.class_names)
        return Sheet(path, tuple(scene.outcome for scene in scenes))

    @property
    def written(self) -> list[str]:
        """The files, in order."""
        return [str(sheet.path) for sheet in self.sheets]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What both models made of each image that was drawn, and the file that it is in."""
        style = self.style
        return [
            {**describe(outcome, style.geometry, style.class_names), "output": str(sheet.path)}
            for sheet in self.sheets
            for outcome in sheet.outcomes
        ]

    def document(self) -> dict[str, Any]:
        """All of it as plain values."""
        session, geometry = self.session, self.style.geometry
        return {
            "model": session.target.model_name,
            "target": session.target.label,
            "keep_rate": session.model.keep_rate,
            "schedule": list(geometry.counts),
            "life_layer": geometry.life_layer,
            "grid": list(geometry.grid),
            "written": self.written,
            "images": self.entries,
            "skipped": [str(error) for error in self.broken],
        }


def check_files(images: Sequence[str], output: Path | None, form: str | None = None) -> tuple[list[Path], str]:
    """The image files that are named, and the format to write; `SlimError` where `output` cannot be written."""
    form = choose_format(output, form)
    check_writable(output or Path(f"images-lives.{form}"), "file")
    paths = find_images(images) if images else []
    if output is not None and any(path.is_file() and output.absolute() == path.absolute() for path in paths):
        raise SlimError(f"{parameter('output', output)}: is one of the images: choose another name")
    return paths, form


def open_album(
    session: Session,
    paths: Sequence[Path] = (),
    picking: Picking = Picking(),
    layer: int | None = None,
    columns: int | None = None,
    progress: Progress = no_progress,
) -> Album:
    """The album of image files, or where none are named of validation images; `layer` and `columns` are of `Style`.

    Raises:
        SlimError: where the model has no lives, or no patch leaves after `layer`.
    """
    geometry = find_geometry(session.model)
    drop_stages(geometry, layer)
    broken: list[DataError] = []
    if paths:
        names = readable(session.target.class_names)
        batches = image_batches(paths, session.preprocessing, batch_size(session), broken)
        outcomes: Iterable[Outcome] = look(session.model, batches, session.device, session.dtype)
        name, notes, expected = (paths[0].stem if len(paths) == 1 else "images"), [], len(paths)
    else:
        limit = session.data.val_limit or LIMIT
        samples = session.images(val_limit=limit)
        names = readable(session.target.class_names) or readable(getattr(samples, "class_names", None))
        outcomes = chosen = _picked(session, samples, picking, limit, progress)
        # only a stream does not know how many it has
        total = len(samples) if hasattr(samples, "__len__") else limit
        none = f"none of {total} images changed: wherever dense is right, slim is right too"
        name, notes, expected = picking.how, [] if chosen else [none], len(chosen)
    style = Style(geometry, session.preprocessing, names, layer, columns)
    return Album(session, style, outcomes, expected, f"{name}-lives", broken, tuple(notes))


def _picked(session: Session, samples: Any, picking: Picking, limit: int, progress: Progress) -> list[Outcome]:
    """Outcomes of the validation images that are chosen."""
    if session.model.segments and picking.how == "changed":
        raise SlimError(
            f"{parameter('pick', 'changed')}: is of classes of images; of class maps 'hardest' takes those that "
            "slimming changed most"
        )
    if picking.how == "random":
        samples = draw_at_random(samples, picking.count, picking.seed)
    batches = data_batches(samples, session.preprocessing, batch_size(session), session.device)
    outcomes = look(session.model, batches, session.device, session.dtype)
    return pick(counted(outcomes, progress, limit), picking.how, picking.count)


def batch_size(session: Session) -> int:
    """What was asked for, or a size for pictures."""
    given = session.resolved.is_given("data.batch_size")
    return session.request.batch_size or (session.data.batch_size if given else BATCH)
