"""What is predicted for: files, folders, .tar shards and names on stdin, one after another, or a share of them."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image

from slimcli.data.read import read_image
from slimcli.data.walk import images_below, images_in_tar, is_tar_name
from slimcli.errors import DataError, SlimError, parameter

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
#: a pattern that stands for more files is a slip
MOST_FILES = 10**6


@dataclass(frozen=True)
class Item:
    """An image to predict for: its name, and what reads it, upright and RGB, or raises `DataError`."""

    name: str
    read: Callable[[], Image.Image]


@dataclass(frozen=True)
class Shard:
    """One of several shares of the same input, counted from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`3/16` is the third of sixteen."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        shard = cls(int(found[1]), int(found[2])) if found else None
        if shard is None or not 1 <= shard.index <= shard.count:
            raise SlimError(f"{parameter('shard', text)}: expected one of so many, such as 3/16, from 1/16 to 16/16")
        return shard


class Inputs:
    """Images by the words that name them: files, folders with all below, .tar files, and `-` for names on `stdin`.

    `shards/{000..015}.tar` stands for sixteen files. Where there are at least as many .tar files as shards, each is
    read by one shard alone; otherwise images are dealt out one by one. Nothing is kept of images that have passed.

    Raises:
        SlimError: for a word that names nothing.
    """

    def __init__(self, words: Sequence[str], shard: Shard | None = None, stdin: IO[str] | None = None) -> None:
        self.words = tuple(name for word in words for name in _expanded(word))
        self.shard, self.stdin = shard or Shard(), stdin
        for word in self.words:
            if word != "-" and not Path(word).exists():
                raise SlimError(
                    f"{word}: no such file or folder: expected images, folders or .tar files of them, or - for names "
                    "on stdin"
                )
        self._whole_tars = sum(map(_is_tar, self.words)) >= self.shard.count

    def count(self) -> int:
        """How many images there are; 0 where that is only known once they are read."""
        if "-" in self.words or any(map(_is_tar, self.words)):
            return 0
        return sum(1 for _ in self.items())

    def items(self) -> Iterator[Item]:
        """The images of this shard, in the order of the words.

        Raises:
            SlimError: for a folder that has no images or cannot be read.
        """
        turn = itertools.cycle(range(1, self.shard.count + 1))
        for name in self._names():
            dealt_whole = not _is_tar(name) or self._whole_tars
            if dealt_whole and next(turn) != self.shard.index:
                continue
            if not _is_tar(name):
                yield Item(name, lambda path=Path(name): read_image(path))  # type: ignore[misc]
                continue
            for item in _in_tar(name):
                if dealt_whole or next(turn) == self.shard.index:
                    yield item

    def _names(self) -> Iterator[str]:
        for word in self.words:
            if word == "-":
                yield from (name for line in self.stdin or () if (name := line.rstrip("\r\n")))
            elif Path(word).is_dir():
                found = images_below(word)
                first = next(found, None)
                if first is None:
                    tars = any(is_tar_name(path.name) for path in Path(word).iterdir())
                    said = f": name the .tar files themselves, as in {word}/*.tar" if tars else ""
                    raise SlimError(f"{word}: has no images in it{said}")
                yield first
                yield from found
            else:
                yield word


def _is_tar(name: str) -> bool:
    return is_tar_name(name) and not Path(name).is_dir()


def _in_tar(name: str) -> Iterator[Item]:
    """The images of a .tar; one that is damaged ends with an item that says so."""

    def read(inside: str, content: Callable[[], bytes]) -> Image.Image:
        return read_image(io.BytesIO(content()), f"{name}/{inside}")

    try:
        for inside, content in images_in_tar(Path(name)):
            yield Item(f"{name}/{inside}", lambda inside=inside, content=content: read(inside, content))  # type: ignore[misc]
    except DataError as error:

        def fail(error: DataError = error) -> Image.Image:
            raise error

        yield Item(name, fail)


def _expanded(word: str) -> list[str]:
    """The names that a word with ranges such as {000..015} stands for; any other stands for itself."""
    found = _RANGE.search(word)
    if found is None or Path(word).exists():
        return [word]
    first, last = (int(text) for text in found.groups())
    if not 0 <= last - first < MOST_FILES:
        raise SlimError(f"{word}: {found[0]} is no range: expected one such as {{000..015}}, the smaller number first")
    width = len(found[1]) if found[1].startswith("0") else 1
    before, after = word[: found.start()], word[found.end() :]
    return [name for number in range(first, last + 1) for name in _expanded(f"{before}{number:0{width}d}{after}")]
