"""Prediction: images through a model or an artefact, in the order given, a batch in memory at a time."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from slimcli.data.read import read_image
from slimcli.data.transform import ImageTransform
from slimcli.deployment.export import open_export
from slimcli.deployment.inputs import Item
from slimcli.device import DTYPES
from slimcli.documents import json_text
from slimcli.errors import DataError, SlimError, parameter
from slimcli.layout import optimize
from slimcli.runtimes import Conversion, Program, find_runtime
from slimcli.runtimes.base import EMBEDDINGS, LOGITS, MAPS, Forward
from slimcli.slimming import SlimModel
from slimcli.store.model_folder import slimming_config

#: images in a batch
BATCH = 16

#: an image: the name of its file, its bytes, an open file, or an image of Pillow's
Source = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | Item


@dataclass(frozen=True)
class Prediction:
    """What an image gave: its output, float32 in main memory, or why it could not be read.

    That is logits (C,), an embedding (D,), or the logits (C, H, W) of a class map: `kind` says which.
    """

    image: str
    output: Tensor | None = None
    error: str | None = None
    #: `logits`, `maps` or `embeddings`
    kind: str = LOGITS
    #: height and width of the image as it was read
    size: tuple[int, int] | None = None

    def top(self, count: int) -> list[tuple[int, float]]:
        """The most likely classes, as numbers, with their probabilities; of a class map the shares of the pixels.

        Raises:
            SlimError: where the image could not be read, or the output is an embedding.
        """
        output = self._given()
        if self.kind == EMBEDDINGS:
            raise SlimError(f"{self.image}: this model gives embeddings, which have no classes: take its output")
        if self.kind == MAPS:
            chances = output.argmax(dim=0).flatten().bincount(minlength=len(output)) / output[0].numel()
        else:
            chances = output.softmax(dim=0)
        # equal ones in the order of their numbers
        order = chances.argsort(descending=True, stable=True)[:count]
        return [(int(number), float(chances[number])) for number in order]

    def label_map(self) -> Tensor:
        """The class of every pixel of the image as it was read, (H, W), int64.

        Raises:
            SlimError: where the image could not be read, or the model has no segmentation head.
        """
        output = self._given()
        if self.kind != MAPS:
            raise SlimError(
                f"{self.image}: this model gives {self.kind}, and no class map: it has no segmentation head"
            )
        if self.size is not None and self.size != output.shape[1:]:
            output = functional.interpolate(output[None], self.size, mode="bilinear", align_corners=False)[0]
        return output.argmax(dim=0)

    def _given(self) -> Tensor:
        if self.output is None:
            raise SlimError(f"{self.image}: gave no output: {self.error}")
        return self.output


@dataclass
class Predictor:
    """What turns images into logits, class maps or embeddings: a model in torch, or an exported one in its runtime.

    `slimcli.open_predictor` makes one. It is run from one thread at a time.
    """

    label: str
    program: Program
    #: how images are prepared, as config.json says it
    preprocessing: dict[str, Any]
    class_names: list[str] | None
    #: what it gives: `logits`, `maps` or `embeddings`
    kind: str
    #: the number of images that it always takes; None: any
    batch_size: int | None = None
    #: tells this model, with all that was set, from every other one
    identity: Callable[[], str] = lambda: ""
    #: what a user must know, such as parts of the model that were never taught
    notes: tuple[str, ...] = ()

    @property
    def classifies(self) -> bool:
        """Whether outputs are of classes, and not embeddings."""
        return self.kind != EMBEDDINGS

    def name_of(self, number: int) -> str:
        """The name of a class, or its number where names are not known."""
        names = self.class_names
        return names[number] if names is not None and number < len(names) else str(number)

    def transform(self) -> ImageTransform:
        """From an image, or a file that holds one, to the tensor (3, H, W) that the model takes."""
        return ImageTransform(self.preprocessing)

    def run(self, images: Tensor) -> Tensor:
        """Prepared images (B, 3, H, W), float32 in main memory, to their outputs (B, ...), the same.

        Where the number of images is fixed, a smaller batch is filled up and a larger one is a `SlimError`.
        """
        count = len(images)
        if self.batch_size is not None:
            if count > self.batch_size:
                raise SlimError(f"{self.label}: always takes {self.batch_size} images, and these are {count}")
            images = torch.cat((images, images[-1:].expand(self.batch_size - count, -1, -1, -1)))
        return self.program.run(images)[:count]

    def predict(self, images: Iterable[Source], batch_size: int | None = None) -> Iterator[Prediction]:
        """What each image gives, in order, a batch in memory at a time; one that cannot be read has an `error`.

        Args:
            images: names of files, bytes, open files or images of Pillow's; without a name it is called by its number.
            batch_size: images in a batch, 16 where the model takes any number.
        """
        if self.batch_size not in (None, batch_size) and batch_size is not None:
            raise SlimError(
                f"{parameter('batch_size', batch_size)}: {self.label} always takes {self.batch_size} images: "
                "leave it out"
            )
        size = self.batch_size or batch_size or BATCH
        transform = self.transform()
        waiting: list[_Read] = []
        for number, image in enumerate(images, 1):
            waiting.append(_read(_item(image, number), transform))
            if sum(read.error is None for read in waiting) == size or len(waiting) >= 4 * size:
                yield from self._run(waiting)
                waiting = []
        yield from self._run(waiting)

    def _run(self, waiting: Sequence[_Read]) -> Iterator[Prediction]:
        images = [read.image for read in waiting if read.image is not None]
        outputs = iter(self.run(torch.stack(images)) if images else ())
        for read in waiting:
            output = None if read.image is None else next(outputs)
            yield Prediction(read.name, output, read.error, self.kind, read.size)

    def close(self) -> None:
        """Give back what it holds."""
        self.program.close()


def _item(image: Source, number: int) -> Item:
    if isinstance(image, Item):
        return image
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        return Item(os.fspath(image), lambda: read_image(path))
    name = f"image {number}"
    source = io.BytesIO(image) if isinstance(image, bytes) else image
    return Item(name, lambda: read_image(source, name))


class _Read(NamedTuple):
    """An image that was prepared, with its own height and width, or why it could not be."""

    name: str
    image: Tensor | None = None
    size: tuple[int, int] | None = None
    error: str | None = None


def _read(item: Item, transform: ImageTransform) -> _Read:
    try:
        found = item.read()
        return _Read(item.name, transform(found), (found.height, found.width))
    except DataError as error:
        return _Read(item.name, error=str(error))


def predictor_of_model(
    model: SlimModel,
    preprocessing: dict[str, Any],
    class_names: list[str] | None,
    label: str,
    embeddings: bool = False,
    runtime: str | None = None,
) -> Predictor:
    """A slimmed model in a runtime, on the device and in the dtype that it has; `embeddings` also where it has classes.

    By default the runtime is `cuda-graph` on CUDA, and `torch` elsewhere.

    Raises:
        SlimError: where the runtime is unknown, not installed, or has not this device or this dtype.
    """
    parameter = next(model.parameters())
    precision = next(name for name, dtype in DTYPES.items() if dtype == parameter.dtype)
    found = find_runtime(runtime or ("cuda-graph" if parameter.device.type == "cuda" else "torch"))
    if runtime is not None:
        found.require(precision)
        found.require_device(parameter.device)
    forward = Forward(optimize(model))
    if embeddings:
        forward.output = EMBEDDINGS
    program = found.prepare(forward, Conversion(precision, device=parameter.device))
    classes = class_names if forward.output != EMBEDDINGS else None

    def identity() -> str:
        found = hashlib.sha256(json_text([slimming_config(model), preprocessing, classes]).encode())
        for name, value in model.state_dict().items():
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    return Predictor(label, program, preprocessing, classes, forward.output, identity=identity)


def predictor_of_export(folder: Path, trust_code: bool = False) -> Predictor:
    """The artefact that `slim export` wrote to a folder; `SlimError` where it is damaged, or holds code not trusted."""
    config, program = open_export(folder, trust_code)
    prepare = config.preprocessing.model_dump()
    kept = json_text([config.files, prepare, config.class_names])
    return Predictor(
        str(folder),
        program,
        prepare,
        config.class_names,
        config.output,
        config.batch_size,
        identity=lambda: hashlib.sha256(kept.encode()).hexdigest(),
    )
