"""The pixels of each picture: the input, the lives as colours over it, and what is left after a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import matplotlib
import numpy
import torch
from matplotlib.colors import Normalize
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from slimcli.life import life_rank
from slimcli.pictures.geometry import Geometry, drop_stages
from slimcli.pictures.outcome import ClassMaps, Outcome

Pixels = NDArray[numpy.uint8]

COLOURS = matplotlib.colormaps["viridis"]
#: how much of the colour covers the grey image; the stripes of a patch that has left, which no image is like
OPACITY = 0.62
GONE = ((236, 236, 236), (212, 212, 212))

CLASS_COLOURS = matplotlib.colormaps["tab20"]
#: how much of a class's colour covers the grey image
CLASS_OPACITY = 0.75


def picture(outcome: Outcome, prepare: dict[str, Any]) -> Pixels:
    """The input as the model sees it, (H, W, 3): normalisation undone, nothing else."""
    mean, std = (torch.tensor(prepare[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    pixels = (outcome.image * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return cast(Pixels, pixels.permute(1, 2, 0).expand(-1, -1, 3).numpy())


def life_map(outcome: Outcome, geometry: Geometry) -> NDArray[numpy.float32]:
    """The life of every patch on its grid (rows, columns), clamped to l..L as in the paper's figure 4."""
    life = outcome.life.clamp(geometry.life_layer, geometry.depth).reshape(geometry.grid)
    return cast("NDArray[numpy.float32]", life.numpy())


def kept(outcome: Outcome, geometry: Geometry, layer: int) -> NDArray[numpy.bool_]:
    """Which patches (rows, columns) go on after block `layer`: those that block `layer` + 1 uses."""
    after = geometry.counts[min(layer, geometry.depth - 1)]
    return cast("NDArray[numpy.bool_]", (life_rank(outcome.life) < after).reshape(geometry.grid).numpy())


def panels(
    outcome: Outcome, geometry: Geometry, prepare: dict[str, Any], layers: Sequence[int], side: int = 448
) -> list[Pixels]:
    """The pictures of a row: the input, the lives as colours over it, and the patches left after each of `layers`.

    Small images are enlarged by a whole factor to at most `side` pixels, so that the edges of patches stay sharp.
    """
    seen = picture(outcome, prepare)
    height, width = seen.shape[:2]
    scale = max(1, side // max(height, width))
    # pixels of small images stay visible; a photograph is smoothed
    how = Image.Resampling.NEAREST if scale > 4 else Image.Resampling.BICUBIC
    large = numpy.asarray(Image.fromarray(seen).resize((width * scale, height * scale), how))
    cells = geometry.cells(height, width, scale)
    covered = (cells >= 0)[..., None]
    grey = numpy.asarray(Image.fromarray(large).convert("L"))[..., None]
    colours = 255 * COLOURS(_place_of_life(geometry)(life_map(outcome, geometry)))[..., :3].reshape(-1, 3)
    heat = numpy.where(covered, OPACITY * colours[cells] + (1 - OPACITY) * grey, large)
    found = [large, heat.round().astype(numpy.uint8)]
    stripe = max(1, max(height, width) * scale // 64)
    diagonal = numpy.add.outer(numpy.arange(height * scale), numpy.arange(width * scale)) // stripe % 4 == 0
    gone = numpy.array(GONE, dtype=numpy.uint8)[diagonal.astype(int)]
    for layer in layers:
        left = kept(outcome, geometry, layer).reshape(-1)[cells][..., None] | ~covered
        found.append(numpy.where(left, large, gone))
    if outcome.maps is not None:
        found += [class_colours(pixels, large) for _, pixels in class_maps(outcome.maps)]
    return found


def class_maps(maps: ClassMaps) -> list[tuple[str, Tensor]]:
    """The class maps that a row shows, each with its title."""
    labels = [] if maps.truth is None else [("labels", maps.truth)]
    return [*labels, ("dense", maps.dense), ("slim", maps.slim)]


def class_colour(index: int) -> tuple[float, float, float]:
    """Red, green and blue, 0 to 1, of a class; every twentieth has the same."""
    red, green, blue, _ = CLASS_COLOURS(index % CLASS_COLOURS.N)
    return red, green, blue


def class_colours(classes: Tensor, under: Pixels) -> Pixels:
    """A class map (H, W) as colours over the grey picture (h, w, 3) that is `under` it; white where there is none."""
    height, width = under.shape[:2]
    large = Image.fromarray(classes.numpy().astype(numpy.int32)).resize((width, height), Image.Resampling.NEAREST)
    found = numpy.array(large)
    colours = numpy.array([class_colour(index) for index in range(CLASS_COLOURS.N)])
    grey = numpy.asarray(Image.fromarray(under).convert("L"))[..., None]
    covered = CLASS_OPACITY * 255 * colours[found % CLASS_COLOURS.N] + (1 - CLASS_OPACITY) * grey
    return cast(Pixels, numpy.where(found[..., None] >= 0, covered, 255).round().astype(numpy.uint8))


def class_map_image(classes: Tensor) -> Image.Image:
    """A class map (H, W) as an image of its colours alone, indexed; white where there is no class."""
    index = numpy.where(classes.numpy() >= 0, classes.numpy() % CLASS_COLOURS.N, CLASS_COLOURS.N).astype(numpy.uint8)
    found = Image.fromarray(index, "P")
    colours = [*(class_colour(index) for index in range(CLASS_COLOURS.N)), (1.0, 1.0, 1.0)]
    found.putpalette([round(255 * part) for colour in colours for part in colour])
    return found


def strip(outcome: Outcome, geometry: Geometry, prepare: dict[str, Any], layer: int | None = None) -> Image.Image:
    """The pictures of a row side by side, without words."""
    drawn = panels(outcome, geometry, prepare, drop_stages(geometry, layer))
    edge = numpy.full((drawn[0].shape[0], max(1, drawn[0].shape[1] // 32), 3), 255, dtype=numpy.uint8)
    return Image.fromarray(numpy.concatenate([part for pixels in drawn for part in (pixels, edge)][:-1], axis=1))


def _place_of_life(geometry: Geometry) -> Normalize:
    return Normalize(geometry.life_layer, geometry.depth)
