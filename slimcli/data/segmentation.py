"""Images beside label maps: a pair of folders, or of folders in a .tar, with files of the same names."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import ExifTags, Image

from slimcli.data.folders import SYNONYMS, Parts, members_of, natural, some, walk
from slimcli.data.read import is_image_name, read_image
from slimcli.data.samples import ImageSamples
from slimcli.errors import DataError
from slimcli.recipe import DataSection

#: what pixels that do not count are in a target, as torch's cross-entropy has it
IGNORED = -100
#: modes of images whose pixels are numbers of classes
LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")
#: label maps that are read whole before any work; all are checked when they are used
CHECKED = 32


@dataclass(frozen=True)
class Place:
    """A file, or the bytes of a .tar that hold one."""

    name: str
    path: str
    start: int = 0
    size: int | None = None

    def open(self) -> Any:
        """An open file of its bytes."""
        if self.size is None:
            return open(self.path, "rb")  # noqa: PTH123
        with open(self.path, "rb") as file:  # noqa: PTH123
            file.seek(self.start)
            return io.BytesIO(file.read(self.size))


@dataclass
class ScenePairs:
    """Images and their label maps, in order; `read` is what `ImageSamples` takes."""

    images: list[Place]
    labels: list[Place]

    def read(self, index: int) -> tuple[Image.Image, int]:
        with self.images[index].open() as file:
            return read_image(file, self.name(index)), 0

    def name(self, index: int) -> str:
        return self.images[index].name


class Scenes(ImageSamples):
    """Images (3, H, W) with targets (H, W): the number of each pixel's class, or `IGNORED`.

    A label map takes the size of its prepared image, each pixel that of the nearest one. With `flip`, that share of the
    images is turned left to right together with its labels, where there is a `seed`.
    """

    def __init__(self, pairs: ScenePairs, class_names: list[str], ignore: int) -> None:
        super().__init__(pairs.read, pairs.name, len(pairs.images), class_names)
        self.pairs, self.ignore = pairs, ignore
        self.flip = 0.0

    def label_map(self, index: int) -> Any:
        """The label map (H, W) of an index, int64, of the size of its file.

        Raises:
            DataError: where it cannot be read, or a pixel is of no class.
        """
        place = self.pairs.labels[index]
        try:
            with place.open() as file, Image.open(file) as image:
                if image.mode not in LABEL_MODES:
                    raise DataError(
                        f"{place.name}: is a picture of mode {image.mode}: expected a label map of one channel, each "
                        "pixel the number of its class"
                    )
                found = numpy.array(image).astype(numpy.int64)
        except DataError:
            raise
        except Exception as error:  # what a decoder makes of a damaged file is any exception
            raise DataError(f"{place.name}: not a readable label map ({error}): mend it or take it out") from error
        count = len(self.class_names or ())
        unknown = sorted({int(value) for value in numpy.unique(found)} - {*range(count), self.ignore})
        if unknown:
            raise DataError(
                f"{place.name}: has pixels of {', '.join(map(str, unknown[:5]))}: expected 0 to {count - 1}, a class "
                f"each (data.class_names), or {self.ignore}, not counted (data.ignore)"
            )
        return numpy.where(found == self.ignore, IGNORED, found)

    def check(self) -> None:
        """Look at the files before any work.

        Raises:
            DataError: for a label map of another size than its image, and for unknown values in the first few of them.
        """
        for index in self.indices:
            image, labels = _upright_size(self.pairs.images[index]), _upright_size(self.pairs.labels[index])
            if image is not None and labels is not None and labels != image:
                raise DataError(
                    f"{self.pairs.labels[index].name}: is of {labels[0]} x {labels[1]} px and its image of "
                    f"{image[0]} x {image[1]}: expected a label for every pixel"
                )
        count = len(self.indices)
        few = min(count, CHECKED)
        for place in range(few):
            self.label_map(self.indices[place * count // few])

    def __getitem__(self, place: int) -> tuple[Any, Any]:
        image, _ = super().__getitem__(place)
        index = self.indices[place]
        labels = self.label_map(index)
        if not isinstance(image, torch.Tensor):
            return image, torch.from_numpy(labels)
        size = image.shape[-2:]
        picture = Image.fromarray(labels.astype(numpy.int32)).resize((size[1], size[0]), Image.Resampling.NEAREST)
        target = torch.from_numpy(numpy.array(picture)).long()
        if self.flip and self.seed is not None:
            drawn = numpy.random.default_rng((self.seed, int(self.epoch), index)).random()
            if drawn < self.flip:
                image, target = image.flip(-1), target.flip(-1)
        return image, target


def open_scenes(root: Path, split: str, data: DataSection) -> Scenes:
    """The scenes of a split: of `root` itself where that is the split's, else of its folders for the split.

    Files in other folders are skipped, with a note.

    Raises:
        DataError: where a folder of the pair is missing, or an image has no label map.
    """
    assert data.class_names is not None
    files, notes = _files(root)
    pairs = _paired(str(root), files, split, data.images, data.labels)
    found = Scenes(pairs, list(data.class_names), data.ignore)
    found.notes = notes
    return found


def has_pair(root: Path, data: DataSection) -> bool:
    """Whether `root`, or a folder or .tar in it, holds the pair of folders that `data` names."""
    if root.is_file():
        roots = [root]
    else:
        roots = [root, *sorted(path for path in root.iterdir() if path.is_dir() or path.suffix == ".tar")]
    return any({data.images, data.labels} <= _folders(path) for path in roots)


def _folders(root: Path) -> set[str]:
    """Names of the folders of a folder or .tar, of any depth."""
    if root.is_dir():
        return {entry.name for entry in root.iterdir() if entry.is_dir()}
    return {part for parts in _files(root)[0] for part in parts[:-1]}


def _files(root: Path) -> tuple[dict[Parts, Place], list[str]]:
    """The files of a folder or .tar by their parts, and notes."""
    if root.is_dir():
        _, found, notes = walk(root)
        return {parts: Place(os.path.join(root, *parts), os.path.join(root, *parts)) for parts in found}, notes  # noqa: PTH118
    members, _, notes = members_of(root)
    return {
        parts: Place(f"{root}/{'/'.join(parts)}", str(root), start, size) for parts, (start, size) in members.items()
    }, notes


def _paired(where: str, files: dict[Parts, Place], split: str, images: str, labels: str) -> ScenePairs:
    """The images of the folder `images` in order, each with its label map of the folder `labels`."""
    pictures = {parts: place for parts, place in files.items() if is_image_name(parts[-1])}
    sides = {}
    for folder in (images, labels):
        sides[folder] = _of_split(f"{where}/{folder}", _below(pictures, folder), split)
        if not sides[folder]:
            kind = "images" if folder == images else "label maps"
            raise DataError(
                f"{where}: has no folder {folder!r} with {kind} in it: expected {images}/NAME.jpg beside "
                f"{labels}/NAME.png (data.images and data.labels name the folders)"
            )
    of = {_stem(parts): place for parts, place in sides[labels].items()}
    order = sorted(sides[images], key=lambda parts: (natural("/".join(parts)), parts))
    if missing := ["/".join(parts) for parts in order if _stem(parts) not in of]:
        raise DataError(
            f"{where}: {len(missing)} of {len(order)} images in {images!r} have no label map in {labels!r} "
            f"({some(missing)}): expected one of the same name"
        )
    return ScenePairs([sides[images][parts] for parts in order], [of[_stem(parts)] for parts in order])


def _of_split(where: str, files: dict[Parts, Place], split: str) -> dict[Parts, Place]:
    """Those of the files that are of a split: images/train/1.jpg beside labels/train/1.png.

    All of them where their folders are no splits, as in train/images/1.jpg beside train/labels/1.png.
    """
    known = {word for group in SYNONYMS for word in group}
    found = {parts[0] for parts in files if len(parts) > 1}
    names = [split, *(name for group in SYNONYMS if split in group for name in group)]
    name = next((name for name in names if name in found), None)
    if name is not None:
        return {parts[1:]: place for parts, place in files.items() if len(parts) > 1 and parts[0] == name}
    if split != "." and found & known:
        raise DataError(f"{where}: has no folder {split!r}: found {some(sorted(found))}")
    return files


def _below(files: dict[Parts, Place], folder: str) -> dict[Parts, Place]:
    """The files below the folder called `folder`, of any depth, by what follows it."""
    return {parts[parts.index(folder) + 1 :]: place for parts, place in files.items() if folder in parts[:-1]}


def _stem(parts: Parts) -> Parts:
    return (*parts[:-1], os.path.splitext(parts[-1])[0])  # noqa: PTH122


def _upright_size(place: Place) -> tuple[int, int] | None:
    """Width and height as people see an image, from its header; None where that cannot be read."""
    try:
        with place.open() as file, Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception:  # whoever reads the image says what is wrong with it
        return None
    return (height, width) if turned else (width, height)
