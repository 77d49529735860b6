"""Images and classes by index, as loaders take them."""

from __future__ import annotations

import copy
import random
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from PIL import Image
from timm.data.dataset import IterableImageDataset
from torch.utils.data import Dataset

from slimcli.data.read import read_image
from slimcli.errors import DataError
from slimcli.progress import Progress, no_progress

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

    Args:
        read: the image, of any mode and not turned yet, and the class of an index. Loader processes that do not
            inherit memory receive it by pickle, so it is no closure.
        name: what errors and pictures call the sample of an index; pickled too.
        size: how many samples there are.
        class_names: names of the classes in the order of their numbers; None where they are not known.
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
        self.epoch = torch.zeros(1, dtype=torch.int64)
        self.indices: Sequence[int] = range(size)

    def share(self) -> None:
        """Let loader processes see `epoch` change; needs shared memory, which loading in this process does not."""
        self.epoch.share_memory_()  # type: ignore[no-untyped-call]

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
        except (OSError, SyntaxError, ValueError, struct.error, tarfile.TarError) as error:
            raise DataError(f"{self.name(index)}: not a readable image ({error}): mend it or take it out") from error
        return read_image(image, self.name(index)), target

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
        # the CPU's alone: `torch.manual_seed` would remember the call stack for a CUDA that nobody has used yet
        torch.default_generator.manual_seed(seed)
        try:
            return self.transform(image), target
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            torch.set_rng_state(states[2])


class StreamedImages(IterableImageDataset):  # type: ignore[misc]
    """A stream of images and classes that timm opened, read as all others: upright and RGB."""

    def __init__(self, stream: IterableImageDataset, title: str) -> None:
        super().__init__("", reader=stream.reader)
        self.title = title
        self.class_names = class_names(stream.reader)
        self.notes: list[str] = []

    def unsplit(self) -> StreamedImages:
        """The same stream as one process alone reads it, whole; timm's readers share it out among the processes."""
        found = copy.copy(self)
        found.reader = copy.copy(self.reader)
        for name, alone in (("dist_rank", 0), ("dist_num_replicas", 1), ("global_worker_id", 0), ("ds", None)):
            if hasattr(found.reader, name):
                setattr(found.reader, name, alone)
        if hasattr(found.reader, "global_num_workers"):
            found.reader.global_num_workers = 1
        return found

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for number, (image, target) in enumerate(self.reader):
            image = read_image(image, f"{self.title} sample {number}")
            yield (
                image if self.transform is None else self.transform(image),
                target if self.target_transform is None else self.target_transform(target),
            )


def class_names(reader: Any) -> list[str] | None:
    """The class names of a reader of timm's in the order of their numbers, where it knows them."""
    classes = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return sorted(classes, key=lambda name: classes[name]) if classes else None
