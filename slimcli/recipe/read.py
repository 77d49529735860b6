"""Reads a recipe: finds its file, sets fields, validates. A wrong field is refused before any weight loads."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tomli
from pydantic import ValidationError

from slimcli.errors import SlimError, parameter
from slimcli.recipe.errors import explain, joined, where_of
from slimcli.recipe.schema import Recipe
from slimcli.recipe.text import Location, parse, plain


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with slim, by name."""
    here = Path(__file__).parent.parent
    folder = next((f for f in (here / "recipes", here.parent / "recipes") if f.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.toml"))} if folder else {}


def find_recipe(name: str | Path) -> Path:
    """A recipe's file from its path, or from the name of a built-in one (`quickstart`, `recipes/quickstart.toml`)."""
    path = Path(name)
    if path.is_file():
        return path
    known = builtin_recipes()
    if path.parent in (Path(), Path("recipes")) and path.suffix in ("", ".toml") and path.stem in known:
        return known[path.stem]
    near = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"built in are {', '.join(known)}"
    raise SlimError(f"{path}: no such recipe: expected a .toml or .yaml file or a built-in name; {hint}")


def read_recipe(path: str | Path) -> tuple[dict[str, Any], dict[Location, str]]:
    """A recipe's file as plain values, not yet validated, and where each of its fields stands (`file:line`)."""
    path = find_recipe(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SlimError(f"{path}: cannot be read: {error}") from error
    raw, lines = parse(path, text)
    return raw, {place: f"{path}:{line}" for place, line in lines.items()}


def load_recipe(path: str | Path, overrides: Iterable[str] = (), check_files: bool = True) -> Recipe:
    """Read, override (`stages.0.lr=1e-3`) and validate a recipe; every problem found is a line of the `SlimError`."""
    raw, sources = read_recipe(path)
    for override in overrides:
        place = apply_override(raw, override)
        sources = {known: source for known, source in sources.items() if known[: len(place)] != place}
        sources[place] = f"{parameter('overrides')} {override}"
    return validate(raw, str(find_recipe(path)), sources, check_files)


#: fields that name files
FILES = ("model.weights", "data.root")


def validate(raw: Any, source: str, sources: dict[Location, str] | None = None, check_files: bool = True) -> Recipe:
    """Validate a parsed recipe. `sources` says where each field stands, for the errors."""
    sources = sources or {}
    raw = plain(raw, lambda place: where_of(place, source, sources))
    try:
        recipe = Recipe.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        found = [explain(item, source, sources) for item in error.errors()]
        raise SlimError("\n".join(joined(found))) from None
    if check_files:
        require_files(recipe, source, sources)
    return recipe


def require_files(recipe: Recipe, source: str, sources: dict[Location, str], fields: Iterable[str] = FILES) -> None:
    """`SlimError` unless the files that these fields name exist."""
    for name in fields:
        section, key = name.split(".")
        file = getattr(getattr(recipe, section), key)
        if file is not None and not file.exists():
            where = where_of((section, key), source, sources)
            raise SlimError(
                f"{where}: {name}: {str(file)!r} does not exist in {Path.cwd()}: "
                f"give the right path with {parameter('overrides')} {name}=PATH"
            )


def apply_override(raw: Any, override: str, exclusive: Sequence[str] = ()) -> Location:
    """Set one field of a parsed recipe from `path.to.field=value`; return its place.

    Of fields that are `exclusive` within their section, the one that is set takes the place of the others.
    """
    name, equals, text = override.partition("=")
    place: Location = tuple(
        int(part) if re.fullmatch(r"[0-9]{1,9}", part) else part for part in name.strip().split(".")
    )
    if not equals or not all(str(part) for part in place):
        raise SlimError(
            f"{parameter('overrides')} {override}: expected field=value, such as data.root=photos or stages.0.lr=1e-3"
        )
    target = raw
    missing = f"{parameter('overrides')} {override}: the recipe has no"
    for depth, (part, following) in enumerate(itertools.pairwise(place), 1):
        try:
            target = target[part] if isinstance(part, int) else target.setdefault(part, [] if following == 0 else {})
        except (KeyError, IndexError, TypeError, AttributeError):
            raise SlimError(f"{missing} {'.'.join(map(str, place[:depth]))} to set this in") from None
    if place[-1] in exclusive and isinstance(target, dict):
        for other in (*exclusive, *(() if place[-1] == "drop_layers" else ("keep_rate",))):
            target.pop(other, None)
    try:
        if isinstance(place[-1], int) and place[-1] == len(target):
            target.append(_value(text))
        else:
            target[place[-1]] = _value(text)
    except (IndexError, TypeError, AttributeError):
        raise SlimError(f"{missing} {'.'.join(map(str, place))} to set this in") from None
    return place


def _value(text: str) -> Any:
    """A value as TOML writes it; what is not TOML is taken as a plain string."""
    try:
        return tomli.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):  # also of a number with thousands of digits
        return text


def summary_lines() -> Sequence[tuple[str, str]]:
    """Name and description of every built-in recipe."""
    return [(name, load_recipe(path, check_files=False).description) for name, path in builtin_recipes().items()]
