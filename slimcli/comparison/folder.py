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
    path = folder / SETTINGS
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise SlimError(f"{folder}: is there already and is no comparison: choose another folder")
        return
    if not resume:
        raise SlimError(f"{folder}: is a comparison already: {parameter('resume')} goes on with it")
    before = read_cell(path) or {}
    changed = [key for key in now if key != "recipe" and before.get(key) != now[key]]
    recipe = before.get("recipe", {})
    changed += [f"recipe.{key}" for key in now["recipe"] if recipe.get(key) != now["recipe"][key]]
    if changed:
        raise SlimError(
            f"{folder}: was measured with other settings (differs in {', '.join(changed)}): "
            f"give the same ones, or start anew without {parameter('resume')}"
        )


def unfinished(recipe: Recipe) -> Path:
    """The newest comparison of this recipe that has not ended; `SlimError` if there is none."""
    found = sorted(
        recipe.output.glob(f"{recipe.name}-compare-*/{SETTINGS}"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    for path in found:
        if not (path.parent / RESULT).is_file():
            return path.parent
    raise SlimError(
        f"{recipe.output}: has no unfinished comparison of {recipe.name}: start one without {parameter('resume')}, "
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
