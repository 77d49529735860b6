"""Class maps as files: for every image a PNG whose pixels are the numbers of their classes, seen in colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy
from PIL import Image

from slimcli.deployment.prediction import Prediction
from slimcli.errors import SlimError, parameter
from slimcli.files import check_writable, write_file


@dataclass
class MapFolder:
    """A folder of label maps, as `data.name = "segmentation"` reads them.

    `roots` are the folders and .tar files that images come from: a map lies where its image does below its root, in a
    folder of the root's name where there are several. Any other has its image's name alone.
    """

    folder: Path
    roots: Sequence[str] = ()
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
        path = self._place(PurePath(prediction.image))
        labels = prediction.label_map().numpy()
        if labels.max(initial=0) < 256:
            image = Image.fromarray(labels.astype(numpy.uint8), mode="P")
            image.putpalette(_palette())
        else:
            image = Image.fromarray(labels.astype(numpy.uint16))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: image.save(file, format="PNG"))

    def _place(self, image: PurePath) -> Path:
        """Where the map of an image goes, a name that no other has."""
        inside = PurePath(image.name)
        for root in map(PurePath, self.roots):
            if image.is_relative_to(root) and image != root:
                inside = image.relative_to(root)
                inside = PurePath(root.name, inside) if len(self.roots) > 1 else inside
        # a name inside a .tar leads nowhere else
        place = self.folder.joinpath(*(part for part in inside.parts if part not in ("..", inside.anchor)))
        path, number = place.with_suffix(".png"), 1
        while path in self.written:
            number += 1
            path = place.with_name(f"{place.stem}-{number}.png")
        self.written.add(path)
        return path


def _palette() -> bytes:
    """Red, green and blue of 256 classes, as PASCAL VOC colours them: bits of the number, dealt out in turn."""
    numbers = numpy.arange(256)
    colours = numpy.zeros((256, 3), dtype=numpy.int64)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= (numbers >> (3 * place + channel) & 1) << (7 - place)
    return colours.astype(numpy.uint8).tobytes()
