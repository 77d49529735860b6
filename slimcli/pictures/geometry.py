"""Which pixels of the input each patch covers, and after which blocks patches leave."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray

from slimcli.errors import SlimError, parameter
from slimcli.slimming import LifeModel, SlimModel

#: stages drawn in a row where patches leave after more blocks than this
MOST_STAGES = 4


@dataclass(frozen=True)
class Geometry:
    """Where the patches of a model sit, in pixels of its input, and how many of them each block uses."""

    grid: tuple[int, int]
    top_left: tuple[float, float]
    cell: tuple[float, float]
    counts: tuple[int, ...]
    life_layer: int

    @property
    def depth(self) -> int:
        return len(self.counts)

    def cells(self, height: int, width: int, scale: int = 1) -> NDArray[numpy.int64]:
        """The patch (H * scale, W * scale) that covers each pixel; -1 where none does."""
        rows, columns = (
            numpy.floor(((numpy.arange(size * scale) + 0.5) / scale - start) / step).astype(numpy.int64)
            for size, start, step in zip((height, width), self.top_left, self.cell, strict=True)
        )
        inside = ((rows >= 0) & (rows < self.grid[0]))[:, None] & ((columns >= 0) & (columns < self.grid[1]))
        return numpy.where(inside, rows[:, None] * self.grid[1] + columns, -1)


def find_geometry(model: SlimModel) -> Geometry:
    """Read off the model which pixels each patch covers: those that its embedding depends on."""
    backbone = predicts_lives(model).backbone
    rows, columns = backbone.grid_size
    height, width = backbone.image_size
    cell = height / rows, width / columns
    top_left = 0.0, 0.0
    first = last = None
    # an embedding that gives no gradient: the patches share the image evenly
    with contextlib.suppress(RuntimeError):
        first, last = (_seen_pixels(model, patch) for patch in (0, rows * columns - 1))
    if first is not None and last is not None:
        # between centres, so that overlapping patches get cells that do not overlap
        step = [
            (last[axis][0] - first[axis][0]) / (n - 1) if n > 1 else first[axis][1] - first[axis][0]
            for axis, n in enumerate((rows, columns))
        ]
        start = [sum(first[axis]) / 2 - step[axis] / 2 for axis in (0, 1)]
        if min(step) >= 1 and step[0] * rows <= height and step[1] * columns <= width:
            cell, top_left = (step[0], step[1]), (start[0], start[1])
    counts = model.schedule.resolve(rows * columns)
    return Geometry((rows, columns), top_left, cell, counts, model.schedule.life_layer)


def predicts_lives(model: SlimModel) -> LifeModel:
    """The model, if it predicts lives; `SlimError` for one of another method."""
    if not isinstance(model, LifeModel):
        raise SlimError(f"the method {model.method} predicts no lives: there is nothing to draw")
    return model


@torch.enable_grad()
def _seen_pixels(model: SlimModel, patch: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The rows and columns of pixels, first and one past the last, that a patch's embedding depends on."""
    weight = next(model.parameters())
    channels = model.backbone.preprocessing()["input_size"][0]
    image = torch.rand(1, channels, *model.backbone.image_size, device=weight.device, dtype=weight.dtype)
    image.requires_grad_()
    tokens, _ = model.backbone.embed(image)
    # a norm after the embedding makes the plain sum constant
    found = tokens[0, model.backbone.num_prefix_tokens + patch].float().square()
    weights = torch.arange(1, found.numel() + 1, device=found.device)
    (gradient,) = torch.autograd.grad((found * weights).sum(), image)
    touched = gradient[0].abs().amax(dim=0) > 0
    if not touched.any():
        return None
    sides = [torch.nonzero(touched.any(dim=axis)).flatten() for axis in (1, 0)]
    top, left = ((int(side[0]), int(side[-1]) + 1) for side in sides)
    return top, left


def drop_stages(geometry: Geometry, layer: int | None = None, most: int = MOST_STAGES) -> tuple[int, ...]:
    """The blocks to draw a picture after: those after which patches leave, at most `most`, spread evenly."""
    if layer is not None:
        if not 1 <= layer <= geometry.depth:
            raise SlimError(f"{parameter('layer', layer)}: the model has blocks 1 to {geometry.depth}")
        return (layer,)
    layers = [t for t in range(1, geometry.depth) if geometry.counts[t] < geometry.counts[t - 1]]
    if len(layers) > most:
        layers = [layers[round(i * (len(layers) - 1) / (most - 1))] for i in range(most)]
    return tuple(layers)
