"""Images one after another, from folders and .tar files of any size: nothing grows with how many there are."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from slimcli.data.folders import is_hidden, is_noise, parts_of
from slimcli.data.read import is_image_name
from slimcli.errors import DataError

#: how the names of files end that hold images themselves, as WebDataset's shards do
TARS = (".tar", ".tar.gz", ".tgz")


def is_tar_name(name: str) -> bool:
    """Whether a file's name ends as that of a .tar does."""
    return name.lower().endswith(TARS)


def images_below(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The images in a folder and in all below it, sorted by name in each, without hidden folders.

    Links are followed, but for those that lead back. Raises `DataError` where a folder cannot be read.
    """
    real = (*above, os.path.realpath(folder))
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry.name, entry.is_dir()) for entry in found)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from error
    for name, is_folder in entries:
        path = os.path.join(folder, name)  # noqa: PTH118
        if is_folder and not is_hidden(name) and os.path.realpath(path) not in real:
            yield from images_below(path, real)
        elif not is_folder and is_image_name(name) and not is_noise(name):
            yield path


def images_in_tar(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The images of a .tar, as it holds them: the name of each and a function that reads its bytes.

    Each has to be read before the next is asked for. Raises `DataError` where the .tar is damaged, after the images
    that stand before the damage.
    """
    try:
        with tarfile.open(path, "r:*") as tar:
            while (member := tar.next()) is not None:
                # tarfile keeps every member otherwise
                tar.members = []  # type: ignore[attr-defined]
                parts = parts_of(member.name)
                hidden = any(is_hidden(part) for part in parts[:-1])
                if member.isfile() and parts and not hidden and is_image_name(parts[-1]) and not is_noise(parts[-1]):
                    yield "/".join(parts), lambda tar=tar, member=member: _content(path, tar, member)  # type: ignore[misc]
            _check_end(tar)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read to its end ({error}): make or fetch the .tar again") from error


def _content(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    try:
        return file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}/{member.name}: cannot be read ({error})") from error


def _check_end(tar: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end: there stand zeros, or nothing."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"what stands at byte {tar.offset} is no file's header")
