"""From images to what was asked for: lines, JSON, CSV, Parquet, or embeddings, as the images come."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from slimcli.deployment.embeddings import write_embeddings
from slimcli.deployment.inputs import Inputs
from slimcli.deployment.maps import MapFolder
from slimcli.deployment.parts import ROWS, Parts, check_parts
from slimcli.deployment.prediction import Prediction, Predictor
from slimcli.documents import json_text
from slimcli.errors import SlimError, parameter
from slimcli.files import check_writable, write_file
from slimcli.memory import freed_memory_kept
from slimcli.progress import Progress, no_progress
from slimcli.runtimes.base import MAPS

EMBEDDINGS = (".npz", ".safetensors", ".parquet")


@dataclass(frozen=True)
class Output:
    """What is written of predictions, and where; without any place, a line an image.

    `embeddings` ends in .npz or .safetensors, or in .parquet for a folder of parts. `part_rows` is for parts alone.
    `maps` is a folder for class maps, written beside whatever else is.
    """

    csv: Path | None = None
    parquet: Path | None = None
    embeddings: Path | None = None
    json: bool = False
    top: int = 5
    part_rows: int | None = None
    maps: Path | None = None

    @property
    def parts(self) -> Path | None:
        """The folder of parts, where that is what is written."""
        found = self.embeddings
        return found if found is not None and found.suffix == ".parquet" else self.parquet

    def check(self) -> None:
        """`SlimError` where two places are named, or one that cannot be written; nothing is written."""
        asked = {"csv": self.csv, "parquet": self.parquet, "embeddings": self.embeddings, "as_json": self.json}
        given = [parameter(name) for name, place in asked.items() if place]
        if len(given) > 1:
            raise SlimError(f"{given[0]} and {given[1]} are both given: choose one")
        if self.embeddings is not None and self.embeddings.suffix not in EMBEDDINGS:
            raise SlimError(
                f"{parameter('embeddings', self.embeddings)}: expected a name that ends in {' or '.join(EMBEDDINGS)}"
            )
        if self.part_rows is not None and self.parts is None:
            raise SlimError(f"{parameter('part_rows', self.part_rows)} has no effect without {parameter('parquet')}")
        if self.maps is not None:
            if self.parts is not None or self.embeddings is not None:
                other = parameter("parquet" if self.parquet is not None else "embeddings")
                raise SlimError(f"{parameter('maps')} and {other} are both given: choose one")
            MapFolder(self.maps).check()
        if self.parts is not None:
            check_parts(self.parts)
        elif place := self.csv or self.embeddings:
            check_writable(place, "file")


@dataclass
class Predicted:
    """How many images there were, how many of them could not be read, and what was written, in a line."""

    images: int = 0
    failed: int = 0
    written: str | None = None


@freed_memory_kept()
def predict_images(
    predictor: Predictor,
    inputs: Inputs,
    output: Output,
    batch_size: int | None = None,
    write: Callable[[str], None] = lambda _line: None,
    warn: Callable[[str], None] = lambda _line: None,
    started: Callable[[], None] = lambda: None,
    progress: Progress = no_progress,
) -> Predicted:
    """Predict for all images and write what `output` says; lines and JSON go to `write`, a line a call.

    An image that cannot be read is told to `warn` and counted. `started` is called once nothing that was asked for can
    be refused any more. Memory does not grow with the number of images.

    Raises:
        SlimError: where something cannot be read or written, or the model does not give what is asked for.
    """
    if not predictor.classifies and output.embeddings is None:
        raise SlimError(
            f"{predictor.label}: has no classifier: write its embeddings with {parameter('embeddings', 'FILE.npz')}"
        )
    if output.maps is not None and predictor.kind != MAPS:
        raise SlimError(
            f"{parameter('maps')}: {predictor.label} has no segmentation head: leave it out, or name another model"
        )
    found = Predicted()
    parts = None
    if output.parts is not None:
        parts = Parts(output.parts, predictor, inputs, output.top, output.part_rows or ROWS)
        parts.start()
    total = inputs.count()
    started()

    def watched(predictions: Iterator[Prediction]) -> Iterator[Prediction]:
        return _watched(predictions, found, total, warn, progress)

    if parts is not None:
        for _ in watched(parts.write(batch_size)):
            pass
        found.written = f"{parts.folder}: {found.images} images by {predictor.label}"
        return found
    predictions = watched(predictor.predict(inputs.items(), batch_size))
    if output.maps is not None:
        folder = MapFolder(output.maps, [word for word in inputs.words if word != "-"])
        predictions = folder.kept(predictions)
        found.written = f"{folder.folder}: class maps by {predictor.label}"
    if output.embeddings is not None:
        count = write_embeddings(output.embeddings, predictions)
        found.written = f"{output.embeddings}: embeddings of {count} images by {predictor.label}"
    elif output.csv is not None:
        write_file(output.csv, lambda file: _csv(file, predictor, predictions, output.top))
        found.written = f"{output.csv}: classes by {predictor.label}"
    else:
        for line in (_json if output.json else _lines)(predictor, predictions, output.top):
            write(line)
    return found


def _watched(
    predictions: Iterator[Prediction], found: Predicted, total: int, warn: Callable[[str], None], progress: Progress
) -> Iterator[Prediction]:
    """The same, counted and told."""
    for prediction in predictions:
        found.images += 1
        progress(f"image {found.images}", found.images, max(total, found.images) if total else 0)
        if prediction.error is not None:
            found.failed += 1
            warn(prediction.error)
        yield prediction


def _lines(predictor: Predictor, predictions: Iterator[Prediction], top: int) -> Iterator[str]:
    """A line an image."""
    for prediction in predictions:
        if prediction.error is None:
            said = (f"{predictor.name_of(number)} {100 * chance:.1f} %" for number, chance in prediction.top(top))
            yield f"{prediction.image}: {', '.join(said)}"


def _json(predictor: Predictor, predictions: Iterator[Prediction], top: int) -> Iterator[str]:
    """The lines of one document, a line an image."""
    line = f'{{"model": {json_text(predictor.label)}, "images": ['
    for index, prediction in enumerate(predictions):
        yield line + ("," if index else "")
        entry: dict[str, Any] = {"image": prediction.image}
        if prediction.error is not None:
            entry["error"] = prediction.error
        else:
            entry["classes"] = [
                {"class": predictor.name_of(number), "number": number, "probability": round(chance, 6)}
                for number, chance in prediction.top(top)
            ]
        line = json_text(entry, indent=None)
    yield line
    yield "]}"


def _csv(file: BinaryIO, predictor: Predictor, predictions: Iterator[Prediction], top: int) -> None:
    """A row an image: its name, what went wrong, then class and probability, the most likely first."""
    titles = ["image", "error"]
    for place in range(1, top + 1):
        titles += [f"class_{place}", f"probability_{place}"]

    def write(cells: list[str]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))

    write(titles)
    for prediction in predictions:
        cells = [prediction.image, prediction.error or ""]
        for number, chance in prediction.top(top) if prediction.error is None else ():
            cells += [predictor.name_of(number), f"{chance:.6f}"]
        write(cells)
