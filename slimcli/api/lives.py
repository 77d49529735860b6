"""Draw what a model makes of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from slimcli import pictures
from slimcli.api.batches import BATCH, check_batch_size, place_of, twin
from slimcli.device import DTYPES
from slimcli.errors import DataError, SlimError
from slimcli.pictures import Outcome
from slimcli.progress import Progress, no_progress
from slimcli.slimming import SlimModel


@dataclass(frozen=True)
class Drawing:
    """What `draw_lives` drew: the files it wrote, what both models made of each image, and images it could not read.

    An outcome has the `name` of the image, the `image` (3, H, W) as the model takes it, the `life` (N,) of its
    patches in raster order, in blocks, and the classes that the `dense` and the `slim` model chose.
    """

    files: tuple[Path, ...]
    outcomes: tuple[Outcome, ...]
    skipped: tuple[str, ...]


def draw_lives(
    model: SlimModel,
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str] = "lives.png",
    layer: int | None = None,
    columns: int | None = None,
    batch_size: int = BATCH,
    device: torch.device | str | None = None,
    precision: str | None = None,
    progress: Progress = no_progress,
) -> Drawing:
    """Draw the life of every patch over images, and the patches that are left after each drop layer.

    The model stays as it is. Images are prepared by `model.transform()`, classes called as `model.class_names` says.

    Args:
        model: a model of life regression.
        images: a file, a folder or a pattern, or several of them.
        output: the file to write, .png, .svg or .pdf; many images need several, `NAME-1.png` and so on.
        layer: only what is left after this block.
        columns: 1: a row an image with every stage; more: a contact sheet; by default 1 up to 4 images, else 4.
        batch_size: images in a batch.
        device: where to run; by default where the model is.
        precision: "float32", "bfloat16" or "float16"; by default the model's own.
        progress: called with (label, done, total).
    """
    target = Path(output)
    given = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    if not given:
        raise SlimError("images: names none: expected a file, a folder or a pattern")
    paths, form = pictures.check_files([os.fspath(image) for image in given], target)
    if columns is not None and (not isinstance(columns, int) or columns < 1):
        raise SlimError(f"columns = {columns!r}: expected a whole number above 0")
    where, precision = place_of(model, device, precision)
    prepare = getattr(model.transform(), "prepare", None)
    assert prepare is not None
    found = twin(model, where, DTYPES[precision])
    geometry = pictures.find_geometry(found)
    pictures.drop_stages(geometry, layer)
    broken: list[DataError] = []
    batches = pictures.image_batches(paths, prepare, check_batch_size(batch_size), broken)
    outcomes = pictures.counted(pictures.look(found, batches, where, DTYPES[precision]), progress, len(paths))
    style = pictures.Style(geometry, prepare, pictures.readable(model.class_names), layer, columns)
    sheets = list(pictures.draw_sheets(outcomes, len(paths), style, target, form))
    return Drawing(
        tuple(sheet.path for sheet in sheets),
        tuple(outcome for sheet in sheets for outcome in sheet.outcomes),
        tuple(str(error) for error in broken),
    )
