"""Embeddings in one file, .npz or .safetensors: rows and names wait on disk, so memory does not grow with them."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy

from slimcli.deployment.prediction import Prediction
from slimcli.files import write_file

PART = 2**20


@dataclass
class _Spool:
    """Rows (n, width), float32, and a name for each, in temporary files; names as bytes, behind their lengths."""

    rows: IO[bytes]
    names: IO[bytes]
    count: int = 0
    width: int = 0
    #: the longest name, in characters and in bytes
    characters: int = 1
    longest: int = 1

    def add(self, prediction: Prediction) -> None:
        assert prediction.output is not None
        row = numpy.ascontiguousarray(prediction.output.float().numpy(), dtype="<f4")
        name = os.fsencode(prediction.image)
        self.rows.write(row.tobytes())
        self.names.write(len(name).to_bytes(4, "little") + name)
        self.count, self.width = self.count + 1, row.size
        self.characters = max(self.characters, len(prediction.image))
        self.longest = max(self.longest, len(name))

    def parts(self) -> Iterator[bytes]:
        self.rows.seek(0)
        while part := self.rows.read(PART):
            yield part

    def each_name(self) -> Iterator[bytes]:
        self.names.seek(0)
        for _ in range(self.count):
            yield self.names.read(int.from_bytes(self.names.read(4), "little"))


def write_embeddings(path: Path, predictions: Iterable[Prediction]) -> int:
    """Write embeddings (n, E), float32, and the names of their images to a .npz or .safetensors file; return n.

    The arrays are `embeddings` and `images`. The latter is text in .npz; safetensors knows none, so there it is the
    names in UTF-8, (n, L), filled up with zeros.
    """
    with tempfile.TemporaryFile() as rows, tempfile.TemporaryFile() as names:
        spool = _Spool(rows, names)
        for prediction in predictions:
            if prediction.output is not None:
                spool.add(prediction)
        write: Callable[[BinaryIO, _Spool], None] = _safetensors if path.suffix == ".safetensors" else _npz
        write_file(path, lambda file: write(file, spool))
        return spool.count


def _safetensors(file: BinaryIO, spool: _Spool) -> None:
    size, end = 4 * spool.count * spool.width, 4 * spool.count * spool.width + spool.count * spool.longest
    header = {
        "embeddings": {"dtype": "F32", "shape": [spool.count, spool.width], "data_offsets": [0, size]},
        "images": {"dtype": "U8", "shape": [spool.count, spool.longest], "data_offsets": [size, end]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for part in spool.parts():
        file.write(part)
    for name in spool.each_name():
        file.write(name.ljust(spool.longest, b"\0"))


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


def _npz(file: BinaryIO, spool: _Spool) -> None:
    def header(entry: IO[bytes], kind: str, shape: tuple[int, ...]) -> None:
        described = {"descr": kind, "fortran_order": False, "shape": shape}
        numpy.lib.format.write_array_header_1_0(entry, described)

    with zipfile.ZipFile(_Sink(file), "w", allowZip64=True) as archive:  # type: ignore[call-overload]
        with archive.open("embeddings.npy", "w", force_zip64=True) as entry:
            header(entry, "<f4", (spool.count, spool.width))
            for part in spool.parts():
                entry.write(part)
        with archive.open("images.npy", "w", force_zip64=True) as entry:
            header(entry, f"<U{spool.characters}", (spool.count,))
            for name in spool.each_name():
                text = os.fsdecode(name).ljust(spool.characters, "\0")
                entry.write(text.encode("utf-32-le", "surrogatepass"))
