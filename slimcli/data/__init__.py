"""Data sets, transforms and loaders, all through timm."""

from __future__ import annotations

import logging
import os
import random
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageOps
from timm.data import create_dataset, create_loader, create_transform
from timm.data.dataset import ImageDataset, IterableImageDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset

from slimcli.data.classes import match_classes as match_classes
from slimcli.data.classes import read_class_map as read_class_map
from slimcli.errors import DataError, SlimError
from slimcli.plugins import open_plugin_dataset
from slimcli.progress import Progress, no_progress
from slimcli.recipe import AugmentationSection, DataSection

SYNONYMS = (("train", "training"), ("val", "validation", "valid", "eval", "evaluation", "test"))
#: classes of the data set called `digits`, scikit-learn's 1,797 handwritten digits of 8 x 8 pixels
DIGITS = [str(digit) for digit in range(10)]
DIGITS_EVERY = 5

Sample = tuple[Image.Image, int]


class DecodedImages:
    """RGB images decoded once and kept as bytes, in few large tensors that loader processes share."""

    CHUNK = 64 * 2**20

    def __init__(self) -> None:
        self.chunks: list[torch.Tensor] = []
        #: for each image: its chunk, where in it the image starts, its height and width, its class
        self.places: dict[int, tuple[int, int, int, int, int]] = {}
        self.bytes = 0
        self._open: list[torch.Tensor] = []
        self._filled = 0

    def add(self, index: int, image: Image.Image, target: int) -> None:
        pixels = torch.from_numpy(numpy.array(image)).flatten()
        self.places[index] = (len(self.chunks), self._filled, image.height, image.width, target)
        self._open.append(pixels)
        self._filled += len(pixels)
        self.bytes += len(pixels)
        if self._filled >= self.CHUNK:
            self.close()

    def close(self) -> None:
        """Join the images that are not yet in a chunk."""
        if self._open:
            self.chunks.append(torch.cat(self._open))
        self._open, self._filled = [], 0

    def read(self, index: int) -> Sample:
        chunk, start, height, width, target = self.places[index]
        pixels = self.chunks[chunk][start : start + 3 * height * width].view(height, width, 3)
        return Image.fromarray(pixels.numpy()), target


class ImageSamples(Dataset[tuple[Any, int]]):
    """Images and classes by index, with a timm transform.

    Random transforms of a sample depend on (seed, epoch, index) alone, not on workers or on what ran before, so
    that an interrupted training can go on exactly. A sample that cannot be decoded is a `DataError` that names it.
    """

    def __init__(
        self, read: Callable[[int], Sample], name: Callable[[int], str], size: int, class_names: list[str] | None
    ):
        self.read, self.name, self.size = read, name, size
        self.class_names = class_names
        self.transform: Callable[[Any], Any] | None = None
        #: from the data's class numbers to those of a model; see `match_classes`
        self.target_transform: Callable[[int], int] | None = None
        #: what whoever asked for these images should know, such as files that were skipped
        self.notes: list[str] = []
        self.seed: int | None = None
        # shared, so that worker processes which outlive an epoch see it change
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self.indices: Sequence[int] = range(size)

    def limit(self, count: int | None) -> None:
        """Keep `count` samples, evenly spaced, so that a set sorted by class keeps all its classes."""
        if count is not None and count < self.size:
            self.indices = [i * self.size // count for i in range(count)]

    def keep_decoded(self, limit_gib: float, progress: Progress = no_progress) -> None:
        """Decode all samples now and read them from memory from now on.

        Raises `DataError` if they need more than `limit_gib` GiB, which a look at a few of them tells beforehand.
        """
        count, limit = len(self.indices), limit_gib * 2**30
        few = [self.indices[i * count // min(count, 64)] for i in range(min(count, 64))]
        expected = sum(3 * image.width * image.height for image, _ in map(self._decode, few)) / max(len(few), 1) * count
        decoded = DecodedImages()
        for done, index in enumerate(self.indices):
            if max(expected, decoded.bytes) > limit:
                raise DataError(
                    f"data.cache: {count} decoded images need about {max(expected, decoded.bytes) / 2**30:.3g} GiB, "
                    f"data.cache_gib allows {limit_gib:g}: raise it, set data.cache = false, or make the images smaller"
                )
            progress("decoding images", done, count)
            decoded.add(index, *self._decode(index))
        decoded.close()
        progress("decoding images", count, count)
        self.read = decoded.read

    def __len__(self) -> int:
        return len(self.indices)

    def _decode(self, index: int) -> Sample:
        try:
            image, target = self.read(index)
            return as_rgb(image), target
        except (
            OSError,
            SyntaxError,
            ValueError,
            struct.error,
            tarfile.TarError,
            Image.DecompressionBombError,
        ) as error:
            raise DataError(f"{self.name(index)}: not a readable image ({error}): mend it or take it out") from error

    def __getitem__(self, place: int) -> tuple[Any, int]:
        index = self.indices[place]
        image, target = self._decode(index)
        if self.target_transform is not None:
            target = self.target_transform(target)
        if self.transform is None:
            return image, target
        if self.seed is None:
            return self.transform(image), target
        states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        seed = hash((self.seed, int(self.epoch), index)) % 2**32
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        try:
            return self.transform(image), target
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            torch.set_rng_state(states[2])


def open_dataset(data: DataSection, train: bool, seed: int | None = None) -> ImageSamples | IterableImageDataset:
    """The training or validation images of a recipe; `DataError` if there are none or a class has none.

    `seed` makes the random transforms reproducible; without it there should be none.
    """
    split = data.train_split if train else data.val_split
    if data.name == "digits":
        samples: ImageSamples | IterableImageDataset = _digits(train)
    else:
        samples = _plugin_dataset(data, split, train) or _timm_dataset(data, split, train)
    if isinstance(samples, ImageSamples):
        samples.seed = seed
        samples.limit(data.train_limit if train else data.val_limit)
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


def _digits(train: bool) -> ImageSamples:
    """scikit-learn's digits; every fifth is for validation: 1,437 to train on and 360 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = [i for i in range(len(digits.images)) if (i % DIGITS_EVERY != 0) == train]

    def read(index: int) -> Sample:
        pixels = numpy.round(digits.images[chosen[index]] * (255 / 16)).astype(numpy.uint8)
        return Image.fromarray(pixels), int(digits.target[chosen[index]])

    return ImageSamples(read, lambda index: f"digit {chosen[index]}", len(chosen), DIGITS)


def _plugin_dataset(data: DataSection, split: str, train: bool) -> ImageSamples | None:
    """A data set that a plugin opens by name; None for every other name."""
    if data.name in ("", "folder", "tar") or "/" in data.name:
        return None
    dataset = open_plugin_dataset(data.name, data.root, split, train)
    if dataset is None:
        return None
    names = [str(name) for name in getattr(dataset, "classes", [])] or None
    return ImageSamples(dataset.__getitem__, lambda index: f"{data.name} sample {index}", len(dataset), names)


def _timm_dataset(data: DataSection, split: str, train: bool) -> ImageSamples | IterableImageDataset:
    local = data.name in ("", "folder", "tar")
    if local and data.root is None:
        raise DataError("data.root is missing: give the folder or .tar of your images with --set data.root=PATH")
    root = _split_root(data.root, split) if local and data.root is not None else data.root
    if local and root is not None and root.is_dir():
        _check_class_folders(root)
    logging.getLogger("timm.data").setLevel(logging.ERROR)
    try:
        dataset = create_dataset(
            "" if local else data.name,
            root=str(root) if root is not None else None,
            split=split,
            search_split=not local,
            is_training=train,
            batch_size=data.batch_size,
        )
    except (RuntimeError, AssertionError, ValueError, OSError, ImportError, tarfile.TarError) as error:
        raise DataError(
            f"{root or data.name}: cannot be opened as a set of images in class folders: {error}"
        ) from error
    if isinstance(dataset, IterableImageDataset):
        return dataset
    if isinstance(dataset, ImageDataset):
        return _from_reader(dataset)
    names = [str(name) for name in getattr(dataset, "classes", [])] or None
    return ImageSamples(dataset.__getitem__, lambda index: f"{data.name} sample {index}", len(dataset), names)


def _from_reader(dataset: ImageDataset) -> ImageSamples:
    reader = dataset.reader

    def read(index: int) -> Sample:
        source, target = reader[index][:2]
        return (source if isinstance(source, Image.Image) else Image.open(source)), int(target)

    classes = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    names = sorted(classes, key=lambda name: classes[name]) if classes else None
    return ImageSamples(read, lambda index: reader.filename(index, absolute=True), len(reader), names)


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


def has_split(root: Path, split: str) -> bool:
    """Whether `root` holds the split as a folder or .tar of its own."""
    try:
        return root.is_dir() and _split_root(root, split) != root
    except DataError:
        return False


def _check_class_folders(root: Path) -> None:
    """An empty class folder would silently shift the number of every class after it."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if not any(files for _, _, files in os.walk(folder)):
            raise DataError(f"{folder}: this class folder holds no image: add some or remove the folder")


def read_image(path: Path) -> Image.Image:
    """An image file as people see it: upright, RGB, its first frame; `DataError` if it cannot be read."""
    try:
        with Image.open(path) as image:
            # a decoder may replace an image while it loads, so the tag that says which way is up comes after
            image.load()
            return as_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:  # what a decoder makes of a damaged file is any exception
        reason = str(error).replace(f" {str(path)!r}", "") or type(error).__name__
        raise DataError(f"{path}: not a readable image ({reason}): mend it or leave it out") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB: deep greys are scaled, not clipped, and transparency is laid on white."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = numpy.nan_to_num(numpy.asarray(image, dtype=numpy.float64))
        deepest = values.max(initial=0)
        # floats have no agreed range: 0 to 1 where they fit
        full = 65535 if image.mode != "F" else 1 if deepest <= 1 else 255 if deepest <= 255 else 65535
        full = max(full, deepest)
        image = Image.fromarray((values.clip(0) * (255 / full)).round().astype(numpy.uint8))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def preprocessing(model_default: dict[str, Any], data: DataSection) -> dict[str, Any]:
    """How images are prepared: what the model asks for, and what the recipe says instead. Plain JSON types."""
    chosen = {
        key: model_default[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    }
    for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode"):
        if getattr(data, key) is not None:
            chosen[key] = getattr(data, key)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}


def eval_transform(prepare: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """From an RGB image to the tensor (3, H, W) that the model takes: what `eval_loader` does to every image."""
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return create_transform(tuple(prepare["input_size"]), is_training=False, **{key: prepare[key] for key in keys})


def num_workers(data: DataSection, dataset: Dataset[Any], device: torch.device) -> int:
    """Loader processes: none for images in memory, else by the number of cores."""
    if data.workers != "auto":
        return data.workers
    if data.name == "digits":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # on a CPU the model itself uses every core: one process is enough to decode ahead of it
    return min(8, cores) if device.type != "cpu" else min(1, cores - 1)


def eval_loader(
    dataset: Dataset[Any], prepare: dict[str, Any], batch_size: int, workers: int, device: torch.device
) -> DataLoader[Any]:
    """Batches (images, classes) in order, prepared as for inference."""
    return create_loader(
        dataset,
        input_size=tuple(prepare["input_size"]),
        batch_size=batch_size,
        num_workers=workers,
        use_prefetcher=False,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
        **{key: prepare[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
    )


def train_loader(
    dataset: Dataset[Any],
    prepare: dict[str, Any],
    augmentation: AugmentationSection,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> DataLoader[Any]:
    """Shuffled batches (images, classes) with the recipe's augmentation; an incomplete last batch is left out."""
    loader = create_loader(
        dataset,
        input_size=tuple(prepare["input_size"]),
        batch_size=batch_size,
        is_training=True,
        no_aug=not augmentation.enabled,
        re_prob=augmentation.random_erasing,
        train_crop_mode=augmentation.crop_mode,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.hflip,
        vflip=augmentation.vflip,
        color_jitter=augmentation.color_jitter or None,
        auto_augment=augmentation.auto_augment,
        interpolation=prepare["interpolation"],
        mean=prepare["mean"],
        std=prepare["std"],
        crop_pct=prepare["crop_pct"],
        crop_mode=prepare["crop_mode"],
        num_workers=workers,
        use_prefetcher=False,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    if not isinstance(dataset, IterableDataset) and len(loader) == 0:
        raise SlimError(f"{len(dataset)} training images do not fill one batch: make data.batch_size smaller")  # type: ignore[arg-type]
    return loader
