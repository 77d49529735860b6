"""Class maps as files: for every image a PNG whose pixels are the numbers of their classes, seen in colours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy
from PIL import Image

from slimcli.deployment.prediction import Prediction
from slimcli.errors import SlimError, parameter
from slimcli.files import check_writable, write_file


@dataclass
class MapFolder:
    """A folder of label maps, as `data.name = "segmentation"` reads them: each below its image's own folders."""

    folder: Path
    written: set[Path] = field(default_factory=set)

    def check(self) -> None:
        """`SlimError` where it cannot be written, or holds something."""
        folder = self.folder
        if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
            raise SlimError(f"{parameter('maps', folder)}: is there already: choose another folder, or remove it")
        check_writable(folder, "folder")

    def kept(self, predictions: Iterator[Prediction]) -> Iterator[Prediction]:
        """The same predictions, each one's map written first."""
        for prediction in predictions:
            if prediction.error is None:
                self._write(prediction)
            yield prediction

    def _write(self, prediction: Prediction) -> None:
        # no name leads out of the folder
        parts = [part for part in PurePath(prediction.image).parts if part not in ("/", "..", PurePath(part).anchor)]
        place = self.folder.joinpath(*parts)
        path = place.with_suffix(".png")
        if path in self.written:
            path = place.with_name(f"{place.name}.png")
        self.written.add(path)
        labels = prediction.label_map().numpy()
        if labels.max(initial=0) < 256:
            image = Image.fromarray(labels.astype(numpy.uint8), mode="P")
            image.putpalette(_palette())
        else:
            image = Image.fromarray(labels.astype(numpy.uint16))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: image.save(file, format="PNG"))


def _palette() -> bytes:
    """Red, green and blue of 256 classes, as PASCAL VOC colours them: bits of the number, dealt out in turn."""
    numbers = numpy.arange(256)
    colours = numpy.zeros((256, 3), dtype=numpy.int64)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= (numbers >> (3 * place + channel) & 1) << (7 - place)
    return colours.astype(numpy.uint8).tobytes()
