"""Where the images of pictures come from: files that a user names, or validation data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from glob import has_magic
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimcli import data as datasets
from slimcli.errors import DataError, SlimError, parameter
from slimcli.store.run_folder import CONFIG


def find_images(sources: Sequence[str]) -> list[Path]:
    """The files that arguments name: files as they are, folders with all they hold, globs that no shell expanded.

    `SlimError` for a folder or glob without images, and where not one of the files is there.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = datasets.find_images(path)
            if not inside:
                hint = f"; to use the model in it: {parameter('run', source)}" if (path / CONFIG).is_file() else ""
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
    return datasets.is_image_name(path.name) and path.is_file() and not path.name.startswith(".")


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
    images: datasets.ImageSamples | datasets.StreamedImages,
    prepare: dict[str, Any],
    batch_size: int,
    device: torch.device,
    workers: int = 0,
) -> Iterator[tuple[list[str], Tensor, list[int] | Tensor]]:
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
        yield names, batch, targets if targets.dim() > 1 else targets.tolist()


def draw_at_random(images: Any, count: int, seed: int = 0) -> Any:
    """The same set with `count` of its samples, chosen at random; the first ones of a set that only streams."""
    if isinstance(images, datasets.ImageSamples):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator).tolist()
        images.indices = [images.indices[i] for i in order[:count]]
    return images
