"""Pictures of slimming: the life of every patch over the image, and what is left after each drop layer.

Everything is drawn on the tensor that the model takes, so whatever crops, squashes or pads an image on its way in,
the overlay sits on the pixels that each patch covers.
"""

from __future__ import annotations

import contextlib
import heapq
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from numpy.typing import NDArray
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.dataset import IterableImageDataset
from torch import Tensor
from torch.nn import functional as F

from slimcli import data as datasets
from slimcli.errors import DataError, SlimError
from slimcli.evaluate import pooled
from slimcli.files import write_file
from slimcli.layout import lay_out_for_inference
from slimcli.life import life_rank
from slimcli.progress import Progress
from slimcli.slimming import LifeModel, SlimModel

Pixels = NDArray[numpy.uint8]

FORMATS = ("png", "svg", "pdf")
PICKS = ("random", "changed", "hardest")
#: stages drawn in a row where patches leave after more blocks than this
MOST_STAGES = 4
#: images in one file: rows with every stage, and tiles of a contact sheet
ROWS_A_FILE, TILES_A_FILE = 12, 60
COLOURS = matplotlib.colormaps["viridis"]
#: how much of the colour covers the grey image; the stripes of a patch that has left, which no image is like
OPACITY = 0.62
GONE = ((236, 236, 236), (212, 212, 212))
INK, QUIET, ALARM = "#1a1a1a", "#666666", "#b34700"
#: inches
PANEL, TILE, GAP, MARGIN = 2.7, 1.75, 0.1, 0.15


@dataclass(frozen=True)
class Guess:
    """A class and how sure the model is of it."""

    index: int
    probability: float


@dataclass
class Outcome:
    """What the dense and the slimmed model made of one image.

    `image` (3, H, W) is what the model took, `life` (N,) in raster order. Without a classifier `dense` and `slim`
    are None; `similarity` is the cosine of the two models' outputs. `loss` is the slimmed model's cross-entropy,
    where the class `target` is known.
    """

    name: str
    image: Tensor
    life: Tensor
    dense: Guess | None
    slim: Guess | None
    similarity: float
    target: int | None = None
    loss: float | None = None

    @property
    def agree(self) -> bool | None:
        """Whether both choose the same class; None without a classifier."""
        return None if self.dense is None or self.slim is None else self.dense.index == self.slim.index

    @property
    def changed(self) -> bool:
        """Whether slimming broke it: dense right, slim wrong."""
        return self.dense is not None and self.dense.index == self.target and not self.agree


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
    backbone = _predicts_lives(model).backbone
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


def _predicts_lives(model: SlimModel) -> LifeModel:
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


@torch.inference_mode()
def look(
    model: SlimModel,
    batches: Iterable[tuple[Sequence[str], Tensor, Sequence[int] | None]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Outcome]:
    """Run dense and slimmed model on batches (names, images (B, 3, H, W), classes or None), image by image."""
    model = _predicts_lives(model).to(device, dtype).eval()
    lay_out_for_inference(model)
    has_classes = model.architecture().num_outputs > 0
    for names, images, targets in batches:
        batch = images.to(device, dtype)
        with model.running(mode="none"):
            dense = pooled(model.logits(batch))
        with model.running(mode="hard"):
            slim = pooled(model.logits(batch))
        life = model.life
        if life is None:  # nothing leaves: every patch lives to the end
            life = torch.full((len(names), model.num_patches), float(model.backbone.depth))
        similarity = F.cosine_similarity(dense, slim).tolist()
        guesses = [_guesses(dense), _guesses(slim)] if has_classes else [[None] * len(names)] * 2
        losses: list[float] | None = None
        if has_classes and targets is not None:
            losses = F.cross_entropy(slim, torch.as_tensor(targets, device=device), reduction="none").tolist()
        for i, name in enumerate(names):
            yield Outcome(
                name,
                images[i].float().cpu(),
                life[i].float().cpu(),
                guesses[0][i],
                guesses[1][i],
                similarity[i],
                None if targets is None else int(targets[i]),
                None if losses is None else losses[i],
            )


def _guesses(logits: Tensor) -> list[Guess]:
    best = logits.softmax(dim=-1).max(dim=-1)
    return [Guess(int(i), float(p)) for i, p in zip(best.indices, best.values, strict=True)]


# Where images come from.


def find_images(sources: Sequence[str]) -> list[Path]:
    """The files that arguments name: files as they are, folders with all they hold, globs that no shell expanded.

    `SlimError` for a folder or glob without images, and where not one of the files is there.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if _is_image(file)]
            if not inside:
                hint = f"; to use the model in it: --run {source}" if (path / "config.json").is_file() else ""
                raise SlimError(f"{source}: this folder holds no image{hint}")
            found += inside
        elif has_magic(source) and not path.exists():
            matched = [
                file for file in sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) if _is_image(file)
            ]
            if not matched:
                raise SlimError(f"{source}: no image matches this pattern in {Path.cwd()}")
            found += matched
        else:
            found.append(path)
    if not any(path.is_file() for path in found):
        raise SlimError(f"{found[0]}: no such image: expected a file, a folder or a pattern such as 'photos/*.jpg'")
    return list(dict.fromkeys(found))


def _is_image(path: Path) -> bool:
    known = Image.registered_extensions().get(path.suffix.lower())
    return known in Image.OPEN and path.is_file() and not path.name.startswith(".")


def image_batches(
    paths: Sequence[Path], prepare: dict[str, Any], batch_size: int, broken: list[DataError]
) -> Iterator[tuple[list[str], Tensor, None]]:
    """Batches for `look` from image files; an error about each unreadable one is added to `broken`."""
    transform = datasets.eval_transform(prepare)

    def readable() -> Iterator[tuple[str, Tensor]]:
        for path in paths:
            try:
                yield str(path), transform(datasets.read_image(path))
            except DataError as error:
                broken.append(error)

    images = readable()
    while batch := list(itertools.islice(images, batch_size)):
        yield [name for name, _ in batch], torch.stack([image for _, image in batch]), None


def data_batches(
    images: datasets.ImageSamples | IterableImageDataset,
    prepare: dict[str, Any],
    batch_size: int,
    device: torch.device,
    workers: int = 0,
) -> Iterator[tuple[list[str], Tensor, list[int]]]:
    """Batches for `look` from a validation set, in order."""
    loader = datasets.eval_loader(images, prepare, batch_size, workers, device)
    place = 0
    for batch, targets in loader:
        places = range(place, place + len(batch))
        place += len(batch)
        if isinstance(images, datasets.ImageSamples):
            names = [images.name(images.indices[i]) for i in places]
        else:
            names = [f"sample {i}" for i in places]
        yield names, batch, targets.tolist()


def draw_at_random(images: Any, count: int, seed: int = 0) -> Any:
    """The same set with `count` of its samples, chosen at random; the first ones of a set that only streams."""
    if isinstance(images, datasets.ImageSamples):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator).tolist()
        images.indices = [images.indices[i] for i in order[:count]]
    return images


def pick(outcomes: Iterable[Outcome], how: str, count: int) -> list[Outcome]:
    """The `count` outcomes most worth a look: `changed`, dense right and slim wrong, or `hardest`, the slimmed
    model's highest loss; without a classifier, the features that slimming moved most. `random` takes the first.
    """
    if how == "random":
        return list(itertools.islice(outcomes, count))
    chosen = (outcome for outcome in outcomes if how != "changed" or outcome.changed)
    return heapq.nlargest(count, chosen, key=lambda found: -found.similarity if found.loss is None else found.loss)


def counted(outcomes: Iterable[Outcome], progress: Progress, total: int) -> Iterator[Outcome]:
    """The same outcomes, with progress reported."""
    for done, outcome in enumerate(outcomes, 1):
        progress("looking at images", min(done, total), total)
        yield outcome


# Pixels.


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


def drop_stages(geometry: Geometry, layer: int | None = None, most: int = MOST_STAGES) -> tuple[int, ...]:
    """The blocks to draw a picture after: those after which patches leave, at most `most`, spread evenly."""
    if layer is not None:
        if not 1 <= layer <= geometry.depth:
            raise SlimError(f"--layer {layer}: the model has blocks 1 to {geometry.depth}")
        return (layer,)
    layers = [t for t in range(1, geometry.depth) if geometry.counts[t] < geometry.counts[t - 1]]
    if len(layers) > most:
        layers = [layers[round(i * (len(layers) - 1) / (most - 1))] for i in range(most)]
    return tuple(layers)


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
    return found


def strip(outcome: Outcome, geometry: Geometry, prepare: dict[str, Any], layer: int | None = None) -> Image.Image:
    """The pictures of a row side by side, without words."""
    drawn = panels(outcome, geometry, prepare, drop_stages(geometry, layer))
    edge = numpy.full((drawn[0].shape[0], max(1, drawn[0].shape[1] // 32), 3), 255, dtype=numpy.uint8)
    return Image.fromarray(numpy.concatenate([part for pixels in drawn for part in (pixels, edge)][:-1], axis=1))


def _place_of_life(geometry: Geometry) -> Normalize:
    return Normalize(geometry.life_layer, geometry.depth)


# Words.


def readable(class_names: Sequence[str] | None) -> list[str] | None:
    """Class names for people: ImageNet's numbers of its classes (n02123045) become words."""
    if not class_names or not all(re.fullmatch(r"n\d{8}", name) for name in class_names):
        return list(class_names) if class_names else None
    words = ImageNetInfo("imagenet-22k")
    try:
        return [words.label_name_to_description(name, detailed=False).split(",")[0] for name in class_names]
    except KeyError:
        return list(class_names)


def class_name(index: int, class_names: Sequence[str] | None) -> str:
    """The name of a class, or its number where names are not known."""
    return class_names[index] if class_names and index < len(class_names) else f"class {index}"


def verdict(outcome: Outcome, class_names: Sequence[str] | None) -> str:
    """One line: what dense and slim model chose, how surely, and whether they agree."""
    if outcome.dense is None or outcome.slim is None:
        return f"no classifier; cosine of dense and slim features {outcome.similarity:.3f}"
    dense, slim = (
        f"{fit_words(class_name(guess.index, class_names), 24)} ({100 * guess.probability:.1f} %)"
        for guess in (outcome.dense, outcome.slim)
    )
    return f"dense: {dense} · slim: {slim} · {'agree' if outcome.agree else 'differ'}"


def fit_words(text: str, length: int) -> str:
    """`text` with its middle left out where it has more than `length` characters."""
    return text if len(text) <= length else f"{text[: length - length // 2 - 1]}…{text[-(length // 2) :]}"


def short_name(name: str) -> str:
    """A file's name with its folder, as data sets often repeat file names from class to class."""
    return "/".join(Path(name).parts[-2:])


def describe(outcome: Outcome, geometry: Geometry, class_names: Sequence[str] | None) -> dict[str, Any]:
    """An outcome as plain JSON types: classes, probabilities, and the lives (rows, columns), not clamped."""

    def words(guess: Guess | None) -> dict[str, Any] | None:
        if guess is None:
            return None
        return {
            "class": class_name(guess.index, class_names),
            "index": guess.index,
            "probability": round(guess.probability, 5),
        }

    return {
        "image": outcome.name,
        "dense": words(outcome.dense),
        "slim": words(outcome.slim),
        "agree": outcome.agree,
        "similarity": round(outcome.similarity, 5),
        "true_class": None if outcome.target is None else class_name(outcome.target, class_names),
        "loss": None if outcome.loss is None else round(outcome.loss, 5),
        "life": [[round(value, 3) for value in row] for row in outcome.life.reshape(geometry.grid).tolist()],
    }


# Figures.


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


def encode(figure: Figure, form: str = "png", dpi: int = 160) -> bytes:
    """The figure as the content of a PNG, SVG or PDF file, the same bytes for the same figure."""
    buffer = io.BytesIO()
    dates = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "slim", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=form, dpi=dpi, metadata=dates[form])
    return buffer.getvalue()


def choose_format(output: Path | None, form: str | None) -> str:
    """The format that the output's suffix or --format asks for; `SlimError` where they differ or it is another."""
    suffix = output.suffix.lower().lstrip(".") if output is not None else ""
    if suffix and suffix not in FORMATS:
        raise SlimError(f"-o {output}: a picture is written as one of {', '.join(FORMATS)}, not .{suffix}")
    if suffix and form and suffix != form:
        raise SlimError(f"-o {output} and --format {form} differ: leave one of them out")
    return suffix or form or "png"


def sheets(outcomes: Iterable[Outcome], size: int) -> Iterator[list[Outcome]]:
    """Outcomes in parts of `size`, one part a file."""
    stream = iter(outcomes)
    while part := list(itertools.islice(stream, size)):
        yield part


def write_sheet(path: Path, figure: Figure, form: str) -> None:
    """Write a figure, whole or not at all."""
    write_file(path, encode(figure, form))
