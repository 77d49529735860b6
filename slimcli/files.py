"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimcli.errors import SlimError


def write_file(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write a file so that readers see the old content or the new, never a part: a temporary file, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(temporary)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private: give the usual permissions back
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or (isinstance(error, RuntimeError) and "No space left" in str(error)):
            raise SlimError(
                f"{path}: no space left on the disk: free some and run again; what was written before is intact"
            ) from error
        if isinstance(error, OSError):
            raise SlimError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def point_latest(run: Path) -> None:
    """Make `latest` beside the run folder point at it, in one step."""
    link = run.parent / "latest"
    temporary = run.parent / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(run.name, target_is_directory=True)
        temporary.replace(link)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SlimError(f"{link}: cannot be made to point at {run.name}: {error.strerror or error}") from error
