"""The run folder: the names of what is in it, how a new one is made, and which one is the latest."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from slimcli.errors import SlimError
from slimcli.files import check_writable, write_error, write_file, write_json

#: where runs are kept unless a recipe says otherwise
RUNS = Path("runs")

RECIPE = "recipe.toml"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
#: what the method learns beside the dense model, where that has a file of its own
SLIM_WEIGHTS = "slim.safetensors"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
#: the measurements of a run that `slim eval` made after it ended
EVALUATIONS = "evaluations.json"
CHECKPOINT = "checkpoint.pt"
ENVIRONMENT = "environment.json"
REPORT = "report.html"
#: the folder of the last epoch's model, inside a run
LAST = "last"

#: a link to the latest run, beside the runs; its name alone in a text file where links cannot be made
LATEST = "latest"
LATEST_TEXT = "latest.txt"
NAME_LENGTH = 255

_TIME = re.compile(r"-(\d{8}-\d{6})(?:-(\d+))?$")


def new_run_folder(output: Path, name: str) -> Path:
    """Make the folder `NAME-TIME`, which does not exist yet, below `output`."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_writable(output / stem, "folder")
    for number in range(1000):
        folder = output / (f"{stem}-{number}" if number else stem)
        try:
            Path(os.path.realpath(output)).mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise write_error(folder, error) from error
    raise SlimError(f"{output}: has a thousand runs of this second")


def point_latest(run: Path) -> str | None:
    """Make `latest` beside the run point at it; return a warning where that cannot be done.

    A file system without links gets the run's name in `latest.txt`. A folder called `latest` is never touched.
    """
    link, text = run.parent / LATEST, run.parent / LATEST_TEXT
    temporary = run.parent / f".{LATEST}.{os.getpid()}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run.name, target_is_directory=True)
        temporary.replace(link)
        text.unlink(missing_ok=True)
        return None
    except (OSError, NotImplementedError) as error:
        reason = "there is a folder of that name" if link.is_dir() and not link.is_symlink() else error
        reason = getattr(reason, "strerror", None) or reason
    try:
        temporary.unlink(missing_ok=True)
        if link.is_symlink():
            link.unlink()
        write_file(text, f"{run.name}\n".encode())
    except (OSError, SlimError):
        return f"{link}: cannot be made to point at {run.name} ({reason}): name the run where a command takes one"
    return f"{link}: cannot be a link ({reason}): {text} names the latest run instead"


def latest_run(output: Path = RUNS) -> Path | None:
    """The latest run below `output`: what `latest` points at, else what `latest.txt` names, else the newest folder."""
    link = output / LATEST
    if link.is_symlink() and link.is_dir():
        return link.resolve()
    # a checkout or a copy may leave the link's text in a file of its name
    for pointer in (output / LATEST_TEXT, link):
        named = _named_by(pointer)
        if named is not None:
            return named
    runs = [folder for folder in _folders(output) if is_run(folder)]
    return max(runs, key=_age, default=None)


def find_run(path: Path) -> Path:
    """The folder that `path` means: itself, or where it is `.../latest`, the latest run, link or no link."""
    if path.name != LATEST or path.is_symlink():
        return path
    return latest_run(path.parent) or path


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a run, ended or not, or a model."""
    return (folder / RECIPE).is_file() or (folder / CONFIG).is_file()


def add_evaluation(folder: Path, evaluation: dict[str, Any]) -> None:
    """Add a measurement to those in a run's folder, for its report; the file is replaced whole."""
    path = folder / EVALUATIONS
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError as error:
        raise SlimError(f"{path}: is damaged ({error}): remove it to start anew") from error
    write_json(path, [*before, evaluation])


def _named_by(pointer: Path) -> Path | None:
    try:
        if not pointer.is_file() or pointer.stat().st_size > NAME_LENGTH + 1:
            return None
        folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
        return folder if folder != pointer.parent and is_run(folder) else None
    except (OSError, ValueError):
        return None


def _folders(output: Path) -> list[Path]:
    try:
        return [path for path in output.iterdir() if path.is_dir()]
    except OSError:
        return []


def _age(folder: Path) -> tuple[str, int, float]:
    """Orders runs by the time in their names, which copying keeps; a folder without one is older than all that have."""
    found = _TIME.search(folder.name)
    changed = max((path.stat().st_mtime for path in (folder / CONFIG, folder / RECIPE) if path.is_file()), default=0.0)
    return (found[1], int(found[2] or 0), changed) if found else ("", 0, changed)
