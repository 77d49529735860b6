"""One reader of images, for every command: upright, RGB, the first frame."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import IO

import numpy
from PIL import ExifTags, Image, ImageCms

from slimcli.errors import DataError

#: formats that Pillow knows by name and cannot decode by itself
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
#: what the EXIF tag Orientation asks for
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of the formats that Pillow reads here."""
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, name in formats.items() if name in Image.OPEN and name not in STUBS)


def is_image_name(name: str) -> bool:
    """Whether a file's name ends as that of an image does."""
    return os.path.splitext(name)[1].lower() in image_suffixes()  # noqa: PTH122


def read_image(source: Path | IO[bytes] | Image.Image, name: str | None = None) -> Image.Image:
    """An image as people see it: upright, RGB, its first frame.

    `source` is a path, an open file or an image that is not yet decoded, `name` what an error calls it. Raises
    `DataError` if it cannot be read.
    """
    name = name or str(source)
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        with Image.open(source) as image:
            return _upright_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # what a decoder makes of a damaged file is any exception
        reason = str(error).replace(f" {str(source)!r}", "") or type(error).__name__
        raise DataError(f"{name}: not a readable image ({reason}): mend it or take it out") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    # a decoder may replace an image while it loads, so the tag that says which way is up comes after
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged tag says nothing, and the image is still one
        turn = None
    return as_rgb(image if turn is None else image.transpose(turn))


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB: deep greys are scaled, not clipped, and transparency is laid on white."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = numpy.nan_to_num(numpy.asarray(image, dtype=numpy.float64))
        deepest = values.max(initial=0)
        # floats have no agreed range: 0 to 1 where they fit
        full = 65535 if image.mode != "F" else 1 if deepest <= 1 else 255 if deepest <= 255 else 65535
        full = max(full, deepest)
        image = Image.fromarray((values.clip(0) * (255 / full)).round().astype(numpy.uint8))
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode != "RGB" or type(image) is not Image.Image:
        image = image.convert("RGB")
    # what is upright now must not be turned again by whoever reads the tag next
    if image.info:
        image = image.copy()
        image.info = {}
    return image
