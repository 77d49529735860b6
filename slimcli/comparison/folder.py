"""A comparison's folder: what it was measured with, and the lines of its table that are finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimcli.errors import SlimError, parameter
from slimcli.recipe import Recipe

SETTINGS, RESULT, TABLE, PLOT = "settings.json", "compare.json", "compare.md", "compare"


def open_folder(folder: Path, now: dict[str, Any], resume: bool) -> None:
    """Check that the folder is new, or that what stands in it was measured with the settings `now`."""
    if not start_folder(folder, SETTINGS, "comparison", resume):
        return
    before = read_cell(folder / SETTINGS) or {}
    changed = [key for key in now if key != "recipe" and before.get(key) != now[key]]
    recipe = before.get("recipe", {})
    changed += [f"recipe.{key}" for key in now["recipe"] if recipe.get(key) != now["recipe"][key]]
    if changed:
        raise SlimError(
            f"{folder}: was measured with other settings (differs in {', '.join(changed)}): "
            f"give the same ones, or start anew without {parameter('resume')}"
        )


def start_folder(folder: Path, marker: str, what: str, resume: bool) -> bool:
    """Whether `what`, which leaves the file `marker`, goes on in the folder; `SlimError` if it cannot start there."""
    if not (folder / marker).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise SlimError(f"{folder}: is there already and is no {what}: choose another folder")
        return False
    if not resume:
        raise SlimError(f"{folder}: is a {what} already: {parameter('resume')} goes on with it")
    return True


def unfinished(recipe: Recipe) -> Path:
    """The newest comparison of this recipe that has not ended; `SlimError` if there is none."""
    return unfinished_folder(recipe.output, f"{recipe.name}-compare", SETTINGS, RESULT, f"comparison of {recipe.name}")


def unfinished_folder(output: Path, stem: str, marker: str, result: str, what: str) -> Path:
    """The newest folder `STEM-TIME` below `output` with the file `marker` and no `result`; `SlimError` if none is."""
    found = sorted(output.glob(f"{stem}-*/{marker}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        if not (path.parent / result).is_file():
            return path.parent
    raise SlimError(
        f"{output}: has no unfinished {what}: start one without {parameter('resume')}, "
        f"or name a finished one with {parameter('output')}"
    )


def read_cell(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SlimError(f"{path}: is damaged ({error}): remove it, and it is measured again") from error
    return content
