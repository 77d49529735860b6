"""Files that are written whole or not at all, and the question beforehand whether they can be."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from slimcli.documents import json_text
from slimcli.errors import SlimError

#: what file systems without rights or without a flush (exFAT, SMB, FUSE) answer to asking for them
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)


class _Guarded:
    """A binary file that keeps the first error of writing to it, for writers that make another error of it.

    torch's zip writer does: whatever the disk says becomes a RuntimeError without a reason.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        if self.error is None:
            try:
                self.file.flush()
            except OSError as error:
                self.error = error


def write_file(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file so that readers see the old content or the new, never a part: a temporary file, then a rename.

    `content` are the bytes, or a function that writes them to the open file that it is given. A link is followed, and
    what is no regular file (`/dev/stdout`) is written to directly.

    Raises:
        SlimError: if the file cannot be written; the old one is then as it was.
    """
    temporary: Path | None = None
    try:
        place = Path(os.path.realpath(path))
        if place.exists() and not place.is_file() and not place.is_dir():
            with place.open("wb") as file:
                _fill(file, content)
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        # a part of the name only: with all of it, the temporary name may be longer than names can be
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name[:40]}.", suffix=".part")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            _fill(file, content)
            file.flush()
            _as_far_as_supported(lambda: os.fsync(file.fileno()))
        # mkstemp makes files private: give the usual permissions back
        mask = os.umask(0)
        os.umask(mask)
        _as_far_as_supported(lambda: Path(name).chmod(0o666 & ~mask))
        temporary.replace(place)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, ValueError)):
            raise write_error(path, error) from error
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_file(path, (json_text(content) + "\n").encode())


def write_error(path: Path, error: Exception) -> SlimError:
    """What to tell somebody whose file or folder cannot be written."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SlimError(
            f"{path}: no space left on the disk: free some and run again; what was written before is intact"
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return SlimError(f"{path}: cannot be written: {reason[0].lower()}{reason[1:]}: choose another place")


def check_writable(path: str | os.PathLike[str], kind: Literal["file", "folder"]) -> None:
    """Refuse a file or folder that could not be written, before the work whose result it is to hold. Makes nothing.

    A folder may be there already, with files in it; whether they may be replaced is for the caller to say.

    Raises:
        SlimError: if something of another kind is in the way, a parent is no folder, a name is too long, or the file
            system or its permissions forbid writing.
    """
    path = Path(path)
    try:
        place = Path(os.path.realpath(path))
        mode = _mode(place)
        if kind == "file" and mode is not None and stat.S_ISDIR(mode):
            raise SlimError(f"{path}: is a folder: expected the name of a file to write")
        if kind == "folder" and mode is not None and not stat.S_ISDIR(mode):
            raise SlimError(f"{path}: is a file: expected the name of a folder to write to")
        # a device is written to itself, a file is replaced by a new one in its folder
        written = place if mode is not None and (kind == "folder" or not stat.S_ISREG(mode)) else place.parent
        above = next(folder for folder in (written, *written.parents) if _mode(folder) is not None)
        if above != place and not above.is_dir():
            raise SlimError(f"{path}: cannot be written: {_short(above)} is a file, not a folder: choose another place")
        if not os.access(above, os.W_OK | (os.X_OK if above.is_dir() else 0)):
            reason = "is on a read-only file system" if _read_only(above) else "does not allow you to write in it"
            raise SlimError(f"{path}: cannot be written: {_short(above)} {reason}: choose another place")
        longest = _longest_name(above)
        for name in place.relative_to(above).parts if above != place else ():
            if len(os.fsencode(name)) > longest:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except (OSError, ValueError) as error:
        raise write_error(path, error) from error


def _fill(file: BinaryIO, content: bytes | Callable[[BinaryIO], None]) -> None:
    if isinstance(content, bytes):
        file.write(content)
        return
    guarded = _Guarded(file)
    content(cast(BinaryIO, guarded))
    guarded.flush()
    if guarded.error is not None:
        raise guarded.error


def _as_far_as_supported(action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _mode(path: Path) -> int | None:
    """What kind of file `path` is; None if there is none."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_only(path: Path) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(path).f_flag & getattr(os, "ST_RDONLY", 1))


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return 255


def _short(path: Path) -> str:
    """A path as somebody who stands in the present folder would write it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (OSError, ValueError):
        return str(path)
