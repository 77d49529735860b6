"""A recipe's text as plain values, with the line of each; TOML or YAML."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli
import yaml

from slimcli.errors import SlimError

Location = tuple[str | int, ...]
#: more than any recipe has; a file of aliases upon aliases would fill the memory
MOST_VALUES, DEEPEST = 100_000, 32


def parse(path: Path, text: str) -> tuple[Any, dict[Location, int]]:
    """The values of a recipe's text and the line of each, as far as it is found. `SlimError` if it is not valid."""
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    try:
        return _parse_yaml(path, text) if is_yaml else _parse_toml(path, text)
    except RecursionError:
        raise SlimError(f"{path}: is nested too deeply for a recipe") from None


def plain(raw: Any, where: Callable[[Location], str]) -> Any:
    """The same values, if they are what a recipe is made of; dates, sets and bytes are refused where they stand."""
    counted = 0

    def refuse(place: Location, what: str) -> SlimError:
        return SlimError(f"{where(place)}: {'.'.join(map(str, place)) or 'recipe'}: {what}")

    def walk(value: Any, place: Location) -> Any:
        nonlocal counted
        counted += 1
        if counted > MOST_VALUES or len(place) > DEEPEST:
            raise refuse(place[:1], "is too large or nested too deeply for a recipe")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise refuse(place, f"found the name {key!r}, expected text: put it in quotes")
            return {walk(key, place): walk(below, (*place, key)) for key, below in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(below, (*place, index)) for index, below in enumerate(value)]
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise refuse(place, "holds half a character (a surrogate), which is no text") from None
            return value
        if value is None or isinstance(value, (bool, int, float)):
            return value
        dated = isinstance(value, (datetime.date, datetime.time))
        what = "a date or time" if dated else type(value).__name__
        raise refuse(place, f"found {what}, expected text, a number, true or false: put it in quotes")

    return walk(raw, ())


def _parse_toml(path: Path, text: str) -> tuple[dict[str, Any], dict[Location, int]]:
    try:
        raw = tomli.loads(text)
    except ValueError as error:  # also of a number with thousands of digits
        line = re.search(r"at line (\d+)", str(error))
        where = f"{path}:{line[1]}" if line else str(path)
        raise SlimError(f"{where}: not valid TOML: {error}") from None
    return raw, _toml_lines(text)


def _toml_lines(text: str) -> dict[Location, int]:
    """Line numbers of tables and keys, as far as a line-by-line reading finds them."""
    lines: dict[Location, int] = {}
    table: Location = ()
    seen: dict[Location, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]", line):
            table = tuple(part.strip().strip("\"'") for part in header[2].split("."))
            if header[1] == "[[":
                index = seen.get(table, -1) + 1
                seen[table] = index
                table = (*table, index)
            lines.setdefault(table, number)
        elif key := re.match(r"\s*([A-Za-z0-9_.\"'-]+)\s*=", line):
            names = tuple(part.strip("\"'") for part in key[1].split("."))
            lines.setdefault((*table, *names), number)
    return lines


class _YamlLoader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in TOML (YAML 1.1 asks for a dot)."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse_yaml(path: Path, text: str) -> tuple[Any, dict[Location, int]]:
    lines: dict[Location, int] = {}
    seen: set[int] = set()

    def walk(node: yaml.Node | None, place: Location) -> None:
        if node is None or id(node) in seen:  # an alias: its lines are known
            return
        if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)):
            seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if not isinstance(key.value, str):
                    raise _wrong(key, "a name is expected to be plain text")
                below = (*place, key.value)
                if below in lines:
                    raise _wrong(key, f"{key.value!r} is there already, in line {lines[below]}")
                lines[below] = key.start_mark.line + 1
                walk(value, below)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                below = (*place, index)
                lines[below] = value.start_mark.line + 1
                walk(value, below)
        elif node.tag.endswith((":int", ":float")) and re.match(r"[-+]?0[0-9_]|.*:", node.value):
            # YAML 1.1 reads 010 as eight and 1:30 as ninety
            raise _wrong(node, f"{node.value} may mean two numbers: write it without the leading 0 or the colon")

    def _wrong(node: yaml.Node, what: str) -> SlimError:
        return SlimError(f"{path}:{node.start_mark.line + 1}: not valid here: {what}")

    try:
        walk(yaml.compose(text, Loader=_YamlLoader), ())
        raw = yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or next(iter(str(error).splitlines()), "")
        raise SlimError(f"{where}: not valid YAML: {reason}") from None
    except (ValueError, TypeError, OverflowError, AttributeError, LookupError) as error:
        # PyYAML's constructors of dates and of numbers let Python's own errors through
        raise SlimError(f"{path}: not valid YAML: {error}") from None
    return raw, lines
