"""The latest model here: a pointer to the last export beside the runs, and which of the two is newer."""

from __future__ import annotations

from pathlib import Path

from slimcli.deployment.export import is_export
from slimcli.errors import SlimError
from slimcli.files import write_file
from slimcli.store.run_folder import CONFIG, LATEST, RUNS, latest_run

#: where `slim export` wrote last, as a path in a text file
POINTER = "latest-export.txt"
LONGEST = 4096


def point_latest_export(folder: Path, runs: Path = RUNS) -> str | None:
    """Note that an export was written to `folder`; return a warning where that cannot be done."""
    try:
        write_file(runs / POINTER, f"{folder.resolve()}\n".encode("utf-8", "surrogateescape"))
    except SlimError as error:
        return f"not noted as the latest export: {error}"
    return None


def latest_export(runs: Path = RUNS) -> Path | None:
    """The last export, if it is still where it was written."""
    pointer = runs / POINTER
    try:
        if not pointer.is_file() or pointer.stat().st_size > LONGEST:
            return None
        folder = Path(pointer.read_text(encoding="utf-8", errors="surrogateescape").strip())
        return folder if (folder / CONFIG).is_file() else None
    except (OSError, ValueError):
        return None


def latest_model(runs: Path = RUNS) -> tuple[Path | None, str]:
    """The latest run or export, whichever was written later, and what it is in words; None: slim's own model."""
    run, export = latest_run(runs), latest_export(runs)
    if run is not None and not (run / CONFIG).is_file():
        run = None
    if export is not None and (run is None or _written(runs / POINTER) >= _written(run / CONFIG)):
        kind = "" if is_export(export) else " for torch"
        return export, f"the latest export{kind}, {_short(export)}"
    if run is not None:
        return runs / LATEST, f"the latest run, {_short(run)}"
    return None, "the embedded model: there is no run and no export here"


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns


def _short(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
