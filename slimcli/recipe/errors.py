"""A recipe's errors: the file, the line, the field, what was found and what was expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from slimcli.recipe.schema import Recipe, Section
from slimcli.recipe.text import Location


def explain(item: Any, source: str, sources: dict[Location, str]) -> str:
    """One of pydantic's errors as `file:line: field: what was found, what is allowed, the nearest name`."""
    # a union's members appear in the location as words of pydantic's own, which no user wrote
    place = tuple(part for part in item["loc"] if isinstance(part, int) or re.fullmatch(r"[a-z_0-9]+", part))
    if item["type"] == "extra_forbidden" and place[-1:] != tuple(item["loc"][-1:]):
        place = (*place, item["loc"][-1])
    fields = ".".join(str(part) for part in place)
    kind, found, context = item["type"], item.get("input"), item.get("ctx", {})
    where = where_of(place, source, sources)
    if kind == "extra_forbidden":
        allowed = fields_at(place[:-1])
        near = difflib.get_close_matches(str(place[-1]), allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{where}: {fields}: unknown field; {hint}allowed here: {', '.join(allowed)}"
    if kind == "missing":
        return f"{where}: {fields}: is missing"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        near = difflib.get_close_matches(str(found), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{where}: {fields}: found {found!r}, expected {context['expected']}{hint}"
    if kind == "string_pattern_mismatch":
        return f"{where}: {fields}: found {found!r}, expected letters, digits, '.', '_', '-', not '.' first"
    if kind == "value_error":
        return f"{where}: {fields or 'recipe'}: {context['error']}"
    message = item["msg"].replace("Input should be", "expected").replace("Field required", "is missing")
    return f"{where}: {fields or 'recipe'}: found {found!r}, {message[0].lower()}{message[1:]}"


def joined(lines: Iterable[str]) -> list[str]:
    """The lines, each once; what the members of a union say of one value is one line."""
    told: dict[str, list[str]] = {}
    for line in lines:
        found, _, expected = line.partition(", expected ")
        told.setdefault(found, []).append(expected)
    return [
        ", expected ".join(filter(None, (found, " or ".join(dict.fromkeys(types))))) for found, types in told.items()
    ]


def where_of(place: Location, source: str, sources: dict[Location, str]) -> str:
    for length in range(len(place), 0, -1):
        if place[:length] in sources:
            return sources[place[:length]]
    return source


def fields_at(place: Location) -> list[str]:
    """Names of the fields that a section at `place` may have."""
    section: Any = Recipe
    for part in place:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            section = next((a for a in (annotation, *getattr(annotation, "__args__", ())) if _is_section(a)), section)
    return list(section.model_fields)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
