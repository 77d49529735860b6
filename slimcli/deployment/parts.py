"""Predictions in Parquet, a folder of parts: each whole or not there, so that what stopped goes on."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimcli.deployment.inputs import Inputs, Item
from slimcli.deployment.prediction import Prediction, Predictor
from slimcli.errors import SlimError
from slimcli.files import check_writable, write_error, write_file, write_json

#: what the parts are of; readers of Parquet pass over names that begin so
MANIFEST = "_slim.json"
FORMAT, VERSION = "slim-predictions", 1
#: images in a part
ROWS = 4096


def require_parquet() -> None:
    """`SlimError` where pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise SlimError('Parquet needs pyarrow, not installed here: pip install "slimcli[parquet]"')


def check_parts(folder: Path) -> None:
    """`SlimError` where a folder cannot be written, or holds something else than parts."""
    require_parquet()
    check_writable(folder, "folder")
    # a name with a dot may be another shard's file that is being written
    others = folder.is_dir() and not (folder / MANIFEST).is_file() and [p for p in folder.iterdir() if p.name[0] != "."]
    if others:
        raise SlimError(f"{folder}: holds files that are no parts of predictions: choose another folder, or remove it")


@dataclass
class Parts:
    """The parts of one shard in a folder, which the other shards may share.

    Columns are `image`, `error` (null where there is none), and `classes`, `numbers`, `probabilities` (lists, the most
    likely first) or `embedding` (a list).
    """

    folder: Path
    predictor: Predictor
    inputs: Inputs
    top: int
    rows: int = ROWS

    def start(self) -> None:
        """Say in the folder what its parts are of; `SlimError` where they are of something else already."""
        told = {
            "format": FORMAT,
            "format_version": VERSION,
            "model": self.predictor.identity(),
            "input": list(self.inputs.words),
            "shards": self.inputs.shard.count,
            "images in a part": self.rows,
            "columns": f"the {self.top} most likely classes" if self.predictor.classifies else "embeddings",
        }
        check_parts(self.folder)
        path = self.folder / MANIFEST
        if path.is_file():
            found = _manifest(path)
            for name, value in told.items():
                if found.get(name) != value:
                    there, here = (
                        f" ({found.get(name)} there, {value} here)" if name not in ("model", "input") else "",
                        "format" if name.startswith("format") else name,
                    )
                    raise SlimError(
                        f"{self.folder}: its parts were written with another {here}{there}: go on with what they were "
                        "begun with, or choose another folder"
                    )
        else:
            write_json(path, told)
        for left in self.folder.glob(f".{self._stem}*"):
            left.unlink(missing_ok=True)

    def write(self, batch_size: int | None) -> Iterator[Prediction]:
        """Predict and write part after part, and give every row, those of parts that are there already too.

        The latter have no output. A row is given before its part is written.
        """
        items = self.inputs.items()
        number = 0
        while True:
            path = self._path(number)
            chunk = itertools.islice(items, self.rows)
            found = self._there(path, chunk) if path.is_file() else self._new(path, chunk, batch_size)
            count = 0
            for prediction in found:
                count += 1
                yield prediction
            if count < self.rows:
                break
            number += 1
        if later := [p for p in self._existing() if p.name > path.name]:
            raise _other_input(later[0], "the input ends before it")

    @property
    def _stem(self) -> str:
        shard = self.inputs.shard
        width = len(str(shard.count))
        return f"part-{shard.index:0{width}d}-of-{shard.count}-" if shard.count > 1 else "part-"

    def _path(self, number: int) -> Path:
        return self.folder / f"{self._stem}{number:06d}.parquet"

    def _existing(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self._stem}{'[0-9]' * 6}.parquet"))

    def _new(self, path: Path, chunk: Iterator[Item], batch_size: int | None) -> Iterator[Prediction]:
        import pyarrow
        import pyarrow.parquet

        columns: dict[str, list[Any]] = {name: [] for name in self._schema().names}
        for prediction in self.predictor.predict(chunk, batch_size):
            columns["image"].append(_text(prediction.image))
            columns["error"].append(None if prediction.error is None else _text(prediction.error))
            for name, value in self._values(prediction).items():
                columns[name].append(value)
            yield prediction
        if columns["image"]:
            table = pyarrow.table(columns, schema=self._schema())
            sink = pyarrow.BufferOutputStream()
            pyarrow.parquet.write_table(table, sink, compression="zstd")
            write_file(path, sink.getvalue().to_pybytes())

    def _values(self, prediction: Prediction) -> dict[str, Any]:
        if not self.predictor.classifies:
            return {"embedding": None if prediction.output is None else prediction.output.float().numpy()}
        if prediction.output is None:
            return dict.fromkeys(("classes", "numbers", "probabilities"))
        numbers, chances = zip(*prediction.top(self.top), strict=True)
        names = [self.predictor.name_of(number) for number in numbers]
        return {"classes": names, "numbers": list(numbers), "probabilities": list(chances)}

    def _schema(self) -> Any:
        import pyarrow

        text, number = pyarrow.string(), pyarrow.float32()
        columns = [("image", text), ("error", text)]
        if self.predictor.classifies:
            kinds = {"classes": text, "numbers": pyarrow.int32(), "probabilities": number}
        else:
            kinds = {"embedding": number}
        return pyarrow.schema([*columns, *((name, pyarrow.list_(kind)) for name, kind in kinds.items())])

    def _there(self, path: Path, chunk: Iterator[Item]) -> Iterator[Prediction]:
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path, columns=["image", "error"], partitioning=None)
        except (pyarrow.ArrowException, OSError) as error:
            raise SlimError(f"{path}: is damaged ({str(error).splitlines()[0]}): remove it and run again") from error
        names, errors = table["image"].to_pylist(), table["error"].to_pylist()
        for place, item in enumerate(chunk):
            if place >= len(names) or names[place] != _text(item.name):
                there = names[place] if place < len(names) else "its end"
                raise _other_input(path, f"where it has {there}, the input has {item.name}")
            yield Prediction(item.name, error=errors[place])
            names[place] = None
        if any(name is not None for name in names):
            raise _other_input(path, "the input ends within it")


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise write_error(path, error) from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise SlimError(f"{path}: is damaged, or of something else than predictions: choose another folder")
    return found


def _other_input(path: Path, reason: str) -> SlimError:
    return SlimError(f"{path}: was written from another input ({reason}): choose another folder, or remove this one")


def _text(name: str) -> str:
    """A name as UTF-8 can have it: bytes that are none are written out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
