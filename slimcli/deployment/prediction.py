"""Prediction: images by name, in the order given, through a model or an artefact, a batch in memory at a time."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy
import torch
from torch import Tensor

from slimcli.data import eval_transform
from slimcli.data.read import is_image_name, read_image
from slimcli.deployment.export import open_export
from slimcli.errors import DataError, SlimError
from slimcli.files import write_file
from slimcli.layout import optimize
from slimcli.runtimes import Program
from slimcli.runtimes.base import EMBEDDINGS, Forward
from slimcli.runtimes.eager import TorchProgram
from slimcli.slimming import SlimModel

#: images in a batch
BATCH = 16
PART = 2**20


@dataclass
class Predictor:
    """What turns images into outputs: a program, and how images are prepared for it."""

    label: str
    program: Program
    preprocessing: dict[str, Any]
    class_names: list[str] | None
    #: whether outputs are logits, not embeddings
    classifies: bool
    #: the number of images that it always takes; None: any
    batch_size: int | None = None

    def name_of(self, number: int) -> str:
        """The name of a class, or its number where names are not known."""
        names = self.class_names
        return names[number] if names is not None and number < len(names) else str(number)


@dataclass(frozen=True)
class Prediction:
    """What an image gave: its output (C,), or why it could not be read."""

    image: str
    output: Tensor | None = None
    error: str | None = None

    def top(self, count: int) -> list[tuple[int, float]]:
        """The most likely classes of logits with their probabilities."""
        assert self.output is not None
        chances = self.output.softmax(dim=0)
        # equal ones in the order of their numbers
        order = chances.argsort(descending=True, stable=True)[:count]
        return [(int(number), float(chances[number])) for number in order]


def predictor_of_model(
    model: SlimModel, preprocessing: dict[str, Any], class_names: list[str] | None, label: str, embeddings: bool = False
) -> Predictor:
    """A slimmed model in torch, on the device and in the dtype that it has; `embeddings` also where it has classes."""
    dtype = next(model.parameters()).dtype
    forward = _OnDevice(optimize(model), embeddings)
    return Predictor(label, TorchProgram(forward, dtype), preprocessing, class_names, forward.classifies)


class _OnDevice(torch.nn.Module):
    """A model that takes images from main memory and gives its output back there."""

    def __init__(self, model: SlimModel, embeddings: bool) -> None:
        super().__init__()
        self.forward_of = Forward(model)
        self.classifies = self.forward_of.classifies and not embeddings
        self.forward_of.classifies = self.classifies
        self.device = next(model.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.forward_of(images.to(self.device))
        return found.cpu()


def predictor_of_export(folder: Path) -> Predictor:
    """The artefact that `slim export` wrote to a folder; `SlimError` where it is damaged."""
    config, program = open_export(folder)
    classifies = config.output != EMBEDDINGS
    prepare = config.preprocessing.model_dump()
    return Predictor(str(folder), program, prepare, config.class_names, classifies, config.batch_size)


def image_names(given: Iterable[str], stdin: IO[str] | None = None) -> Iterator[str]:
    """The images that words name, in order: files, images in folders and below, sorted, and for `-` a name a line.

    Raises:
        SlimError: for a folder without images.
    """
    for word in given:
        if word == "-" and stdin is not None:
            yield from (name for line in stdin if (name := line.rstrip("\r\n")))
        elif Path(word).is_dir():
            empty = True
            for folder, below, names in os.walk(word):
                below.sort()
                for name in sorted(names):
                    if is_image_name(name):
                        empty = False
                        yield os.path.join(folder, name)  # noqa: PTH118
            if empty:
                raise SlimError(f"{word}: has no images in it")
        else:
            yield word


def predict(predictor: Predictor, names: Iterable[str], batch_size: int = BATCH) -> Iterator[Prediction]:
    """What each image gives, in order. One that cannot be read has an `error`; a batch at a time is in memory."""
    transform = eval_transform(predictor.preprocessing)
    waiting: list[tuple[str, Tensor | str]] = []
    fixed = predictor.batch_size or batch_size
    for name in names:
        waiting.append((name, _read(name, transform)))
        if sum(isinstance(found, Tensor) for _, found in waiting) == fixed or len(waiting) >= 4 * fixed:
            yield from _run(predictor, waiting)
            waiting = []
    yield from _run(predictor, waiting)


def _read(name: str, transform: Callable[[Any], Tensor]) -> Tensor | str:
    try:
        return transform(read_image(Path(name)))
    except DataError as error:
        return str(error)


def _run(predictor: Predictor, waiting: Sequence[tuple[str, Tensor | str]]) -> Iterator[Prediction]:
    images = [found for _, found in waiting if isinstance(found, Tensor)]
    outputs: Iterator[Tensor] = iter(())
    if images:
        batch = torch.stack(images)
        if predictor.batch_size is not None and len(images) < predictor.batch_size:
            batch = torch.cat((batch, batch[-1:].expand(predictor.batch_size - len(images), -1, -1, -1)))
        outputs = iter(predictor.program.run(batch)[: len(images)])
    for name, found in waiting:
        if isinstance(found, str):
            yield Prediction(name, error=found)
        else:
            yield Prediction(name, next(outputs))


def write_embeddings(path: Path, predictions: Iterable[Prediction]) -> int:
    """Write embeddings (n, E), float32, and the names of their images to a .npz or .safetensors file; return n.

    They are kept on disk meanwhile. In .npz the arrays are `embeddings` and `images`; in .safetensors the names stand
    in the metadata, as a list in JSON under `images`.
    """
    names: list[str] = []
    width = 0
    with tempfile.TemporaryFile() as rows:
        for prediction in predictions:
            if prediction.output is not None:
                row = numpy.ascontiguousarray(prediction.output.float().numpy(), dtype="<f4")
                width = row.size
                rows.write(row.tobytes())
                names.append(prediction.image)
        rows.seek(0)
        shape = (len(names), width)
        writer = _safetensors if path.suffix == ".safetensors" else _npz
        write_file(path, lambda file: writer(file, rows, shape, names))
    return len(names)


def _parts(rows: IO[bytes]) -> Iterator[bytes]:
    while part := rows.read(PART):
        yield part


def _safetensors(file: BinaryIO, rows: IO[bytes], shape: tuple[int, int], names: list[str]) -> None:
    header = {
        "__metadata__": {"images": json.dumps(names)},
        "embeddings": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * shape[0] * shape[1]]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for part in _parts(rows):
        file.write(part)


class _Sink:
    """What zipfile needs of a file that can only be written to."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, content: Any) -> int:
        content = bytes(content)
        self.file.write(content)
        return len(content)

    def flush(self) -> None:
        return


def _npz(file: BinaryIO, rows: IO[bytes], shape: tuple[int, int], names: list[str]) -> None:
    with zipfile.ZipFile(_Sink(file), "w", allowZip64=True) as archive:  # type: ignore[call-overload]
        with archive.open("embeddings.npy", "w", force_zip64=True) as entry:
            described = {"descr": "<f4", "fortran_order": False, "shape": shape}
            numpy.lib.format.write_array_header_1_0(entry, described)
            for part in _parts(rows):
                entry.write(part)
        with archive.open("images.npy", "w", force_zip64=True) as entry:
            numpy.lib.format.write_array(entry, numpy.array(names, dtype=str), allow_pickle=False)
