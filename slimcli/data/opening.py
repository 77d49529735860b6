"""Data sets by their name: class folders, .tar files, digits, those of plugins and those that timm opens."""

from __future__ import annotations

import functools
import importlib.util
import logging
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.dataset import ImageDataset, IterableImageDataset

from slimcli.data.folders import SYNONYMS, open_folder, open_tar
from slimcli.data.read import read_image
from slimcli.data.samples import ImageSamples, Sample, StreamedImages, class_names
from slimcli.data.segmentation import Scenes, open_scenes
from slimcli.errors import DataError, parameter
from slimcli.plugins import open_plugin_dataset
from slimcli.progress import Progress, no_progress
from slimcli.recipe import DataSection

#: classes of the data set called `digits`, scikit-learn's 1,797 handwritten digits of 8 x 8 pixels
DIGITS = [str(digit) for digit in range(10)]
DIGITS_EVERY = 5


def open_dataset(data: DataSection, train: bool, seed: int | None = None) -> ImageSamples | StreamedImages:
    """The training or validation images of a recipe; `DataError` if there are none or a class has none.

    What was skipped is in the `notes` of what is returned. `seed` makes the random transforms reproducible; without
    it there should be none.
    """
    split = data.train_split if train else data.val_split
    if data.name == "digits":
        samples: ImageSamples | StreamedImages = _digits(train)
    elif data.name == "segmentation":
        samples = _scenes(data, split)
    elif data.name in ("", "folder", "tar"):
        samples = _local(data.root, split)
    else:
        samples = _plugin_dataset(data, split, train) or _timm_dataset(data, split, train)
    if isinstance(samples, ImageSamples):
        samples.seed = seed
        samples.limit(data.train_limit if train else data.val_limit)
    if isinstance(samples, Scenes):
        samples.check()
    return samples


def keep_decoded(dataset: Any, data: DataSection, progress: Progress = no_progress) -> None:
    """Keep the decoded images of a data set in memory; `DataError` if they do not fit or it is a stream."""
    if not isinstance(dataset, ImageSamples):
        raise DataError(f"data.cache: {data.name} is read as a stream and cannot be kept: set data.cache = false")
    dataset.keep_decoded(data.cache_gib, progress)


def shuffled(dataset: Any) -> Any:
    """The same samples in a fixed random order, so that the first of them hold all classes."""
    if isinstance(dataset, ImageSamples):
        generator = torch.Generator().manual_seed(0)
        dataset.indices = [dataset.indices[i] for i in torch.randperm(len(dataset), generator=generator).tolist()]
    return dataset


def has_split(root: Path, split: str) -> bool:
    """Whether `root` holds the split as a folder or .tar of its own."""
    try:
        return root.is_dir() and _split_root(root, split) != root
    except DataError:
        return False


@dataclass
class _Digits:
    """Handwritten digits: pixels (n, 8, 8) from 0 to 255, classes (n,), and their numbers in scikit-learn's set."""

    pixels: Any
    targets: Any
    numbers: Sequence[int]

    def read(self, index: int) -> Sample:
        return Image.fromarray(self.pixels[index]), int(self.targets[index])

    def name(self, index: int) -> str:
        return f"digit {self.numbers[index]}"


@functools.cache
def _all_digits() -> tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]:
    """All pixels (1797, 8, 8) and classes of scikit-learn's digits."""
    spec = importlib.util.find_spec("sklearn")
    places = (spec.submodule_search_locations if spec is not None else None) or ()
    files = [Path(place) / "datasets" / "data" / "digits.csv.gz" for place in places]
    if files and files[0].is_file():
        # scikit-learn's function reads this file too, but takes seconds to import
        table = numpy.loadtxt(files[0], delimiter=",")
        images, targets = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
    else:
        from sklearn.datasets import load_digits

        images, targets = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8)
    return numpy.round(images * (255 / 16)).astype(numpy.uint8), targets


def _digits(train: bool) -> ImageSamples:
    """scikit-learn's digits; every fifth is for validation: 1,437 to train on and 360 to test."""
    pixels, targets = _all_digits()
    chosen = [i for i in range(len(pixels)) if (i % DIGITS_EVERY != 0) == train]
    source = _Digits(pixels[chosen], targets[chosen], chosen)
    return ImageSamples(source.read, source.name, len(chosen), DIGITS)


def _local(root: Path | None, split: str) -> ImageSamples:
    """Images in class folders, in a folder or a .tar."""
    if root is None:
        raise DataError(
            f"data.root is missing: give the folder or .tar of your images with {parameter('overrides')} data.root=PATH"
        )
    root = _split_root(root, split)
    source, names, notes = open_folder(root) if root.is_dir() else open_tar(root)
    samples = ImageSamples(source.read, source.name, len(source.targets), names)
    samples.notes = notes
    return samples


def _scenes(data: DataSection, split: str) -> Scenes:
    """Images beside label maps: ROOT/SPLIT/images and ROOT/SPLIT/labels, or ROOT/images/SPLIT and ROOT/labels/SPLIT."""
    root = data.root
    if root is None:
        raise DataError(
            f"data.root is missing: give the folder of your scenes with {parameter('overrides')} data.root=PATH"
        )
    holds = root.is_dir() and (root / data.images).is_dir()
    return open_scenes(root if holds else _split_root(root, split), split, data)


def _split_root(root: Path, split: str) -> Path:
    """A split's folder or .tar: `root` itself if it is a .tar or `split` is '.', else `root/split` or a synonym."""
    if not root.exists():
        raise DataError(f"{root}: no such folder or .tar of images")
    if root.is_file() or split == ".":
        return root
    names = [split, *(name for group in SYNONYMS if split in group for name in group)]
    for name in names:
        for candidate in (root / name, root / f"{name}.tar"):
            if candidate.exists():
                return candidate
    found = ", ".join(sorted(path.name for path in root.iterdir())[:6]) or "nothing"
    raise DataError(f"{root}: has no {split!r} folder or .tar: expected {' or '.join(names)}; found {found}")


@dataclass
class _Numbered:
    """A data set of (image, class) pairs whose samples have numbers alone."""

    dataset: Any
    title: str

    def read(self, index: int) -> Sample:
        image, target = self.dataset[index]
        return image, int(target)

    def name(self, index: int) -> str:
        return f"{self.title} sample {index}"


@dataclass
class _FromReader:
    """A reader of timm's: open files, or images, with classes."""

    reader: Any

    def read(self, index: int) -> Sample:
        source, target = self.reader[index][:2]
        if isinstance(source, Image.Image):
            return source, int(target)
        with source:
            return read_image(source, self.name(index)), int(target)

    def name(self, index: int) -> str:
        return str(self.reader.filename(index, absolute=True))


def _from_dataset(dataset: Any, title: str) -> ImageSamples:
    source = _Numbered(dataset, title)
    names = [str(name) for name in getattr(dataset, "classes", [])] or None
    return ImageSamples(source.read, source.name, len(dataset), names)


def _plugin_dataset(data: DataSection, split: str, train: bool) -> ImageSamples | None:
    """A data set that a plugin opens by name; None for every other name."""
    if "/" in data.name:
        return None
    dataset = open_plugin_dataset(data.name, data.root, split, train)
    return None if dataset is None else _from_dataset(dataset, data.name)


def _timm_dataset(data: DataSection, split: str, train: bool) -> ImageSamples | StreamedImages:
    logging.getLogger("timm.data").setLevel(logging.ERROR)
    try:
        dataset = create_dataset(
            data.name,
            root=str(data.root) if data.root is not None else None,
            split=split,
            search_split=True,
            is_training=train,
            batch_size=data.batch_size,
        )
    except (RuntimeError, AssertionError, ValueError, OSError, ImportError, tarfile.TarError) as error:
        where = data.root or data.name
        raise DataError(f"{where}: cannot be opened as a set of images in class folders: {error}") from error
    if isinstance(dataset, IterableImageDataset):
        return StreamedImages(dataset, data.name)
    if isinstance(dataset, ImageDataset):
        source = _FromReader(dataset.reader)
        return ImageSamples(source.read, source.name, len(dataset), class_names(dataset.reader))
    if hasattr(dataset, "loader"):
        # torchvision's own reader of files clips deep greys and blackens what is transparent
        dataset.loader = _read_file
    return _from_dataset(dataset, data.name)


def _read_file(path: str) -> Image.Image:
    return read_image(Path(path))
