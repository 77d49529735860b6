"""Writes the reference pages from the code: an mkdocs hook.

A page asks for it with a line `<!-- generated: commands -->`. What stands there is made when the site is built,
so it cannot go stale.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click

ROOT = Path(__file__).parent.parent
MARKER = re.compile(r"^<!-- generated: (\w+)(?: (\w+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for every page before it is rendered."""
    return MARKER.sub(lambda match: GENERATORS[match[1]](*filter(None, [match[2]])), markdown)


def walk_commands(
    command: click.Command | None = None, name: str = "slim", parent: click.Context | None = None
) -> Iterator[tuple[str, click.Command, click.Context]]:
    """`slim` and all that is below it, without what plugins add: (words, command, context)."""
    from slimcli.cli import COMMANDS, main

    command = command or main
    context = click.Context(command, info_name=name.split()[-1], parent=parent)
    yield name, command, context
    if isinstance(command, click.Group):
        for word in COMMANDS if command is main else command.list_commands(context):
            below = command.get_command(context, word)
            if below is not None:
                yield from walk_commands(below, f"{name} {word}", context)


def commands() -> str:
    """Every command: usage, help and options, from click."""
    parts = []
    for name, command, context in walk_commands():
        usage = " ".join(command.collect_usage_pieces(context))
        parts.append(f"## {name}\n\n```text\n{name} {usage}\n```\n\n{_paragraphs(command.help or '')}\n")
        rows = [record for parameter in command.get_params(context) if (record := parameter.get_help_record(context))]
        if rows and name != "slim":
            parts.append("| option | |\n|---|---|")
            parts.extend(f"| `{_cell(names)}` | {_prose(text)} |" for names, text in rows)
            parts.append("")
    return "\n".join(parts)


def fields() -> str:
    """Every field of a recipe: type, default and meaning, from the schema."""
    from slimcli.recipe import Recipe

    meanings = documented_meanings()

    def table(section: Any, heading: str) -> Iterator[str]:
        below = []
        yield f"## {heading}\n\n{_prose(section.__doc__ or '')}\n"
        yield "| field | takes | default | meaning |\n|---|---|---|---|"
        for name, field in section.model_fields.items():
            inner = next((part for part in (field.annotation, *get_args(field.annotation)) if is_section(part)), None)
            if inner is not None:
                repeated = get_origin(field.annotation) is list
                below.append((inner, f"[[{name}]]" if repeated else f"[{name}]"))
                continue
            if field.is_required():
                default = "**required**"
            else:
                value = field.get_default(call_default_factory=True)
                default = "" if value in (None, "", {}, []) else f"`{_value(value)}`"
            takes = describe(Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation)
            meaning = _prose(field.description) if field.description else meanings.get((heading, name), "")
            yield f"| `{name}` | {_cell(takes)} | {default} | {meaning} |"
        yield ""
        for inner, title in below:
            yield from table(inner, title)

    return "\n".join(table(Recipe, "Top level"))


def documented_meanings() -> dict[tuple[str, str], str]:
    """What docs/recipes.md says of each field, by heading and name: for fields that the schema says nothing about."""
    meanings, heading = {}, ""
    for line in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif row := re.match(r"\| ((?:`\w+`(?:, )?)+) \|.*?\| (.*) \|$", line):
            for name in re.findall(r"\w+", row[1]):
                meanings[heading, name] = row[2]
    return {key: re.sub(r"\]\((?!http)", "](../", meaning) for key, meaning in meanings.items()}


def is_section(annotation: Any) -> bool:
    from pydantic import BaseModel

    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def describe(annotation: Any) -> str:
    """What a field takes, in words: `number, above 0, at most 1`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = [limit for item in args[1:] for limit in _limits(item)]
        return ", ".join([describe(args[0]), *limits])
    if origin is Literal:
        return ", ".join(f"`{value!r}`".replace("'", '"') for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        return f"[{'; '.join(describe(arg) for arg in args)}]"
    if origin is list:
        return f"list of: {describe(args[0])}"
    names = {str: "text", Path: "path", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, "table" if origin is dict else getattr(annotation, "__name__", str(annotation)))


def _limits(item: Any) -> Iterator[str]:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most", "min_length": "length at least"}
    for name, word in words.items():
        if getattr(item, name, None) is not None:
            yield f"{word} {getattr(item, name):g}"
    if getattr(item, "pattern", None):
        yield f"`{item.pattern}`"
    for inner in getattr(item, "metadata", ()):
        yield from _limits(inner)


def public() -> str:
    """Everything in `slimcli.__all__`, for mkdocstrings; lazily imported names by the module that they are of."""
    import slimcli

    parts = []
    for name in sorted(slimcli.__all__, key=str.lower):
        value = getattr(slimcli, name)
        module = getattr(value, "__module__", None)
        home = module if module and hasattr(importlib.import_module(module), name) else "slimcli"
        if name != "hookimpl" and callable(value):  # the hooks have a page of their own
            parts.append(f"::: {home}.{name}\n")
    return "\n".join(parts)


def hook(name: str) -> str:
    """The signature of a hook and what its docstring says."""
    from slimcli import hookspecs

    function = getattr(hookspecs, name)
    signature = str(inspect.signature(function)).replace("'", "")
    return f"```python\n{name}{signature}\n```\n\n{_paragraphs(inspect.getdoc(function) or '')}\n"


def changes() -> str:
    """CHANGELOG.md without its title, its links made those of the site."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](../", text.split("\n", 1)[1])


def _paragraphs(text: str) -> str:
    parts = []
    for part in re.sub(r"\n[ \t]+", "\n", text.strip()).split("\n\n"):
        # click's mark for lines that are to stay as they are
        parts.append(f"```text\n{part[1:].strip()}\n```" if part.startswith("\b") else _prose(part))
    return "\n\n".join(parts)


def _prose(text: str) -> str:
    """Text for a table or a paragraph: one line, with nothing that Markdown would swallow."""
    return _cell(" ".join(text.split())).replace("<", "&lt;").replace("[", "\\[")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_value(part) for part in value)}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


GENERATORS: dict[str, Callable[..., str]] = {
    "commands": commands,
    "fields": fields,
    "public": public,
    "hook": hook,
    "changes": changes,
}
