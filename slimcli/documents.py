"""JSON that every program can read, and text that every terminal and page can show."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: what moves a cursor, changes colours, ends a line or turns the direction of writing: never part of a name
UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
_LINES = re.compile(UNPRINTABLE.pattern.replace(r"\x00-\x1f", r"\x00-\x08\x0b-\x1f"))


def plain(content: Any) -> Any:
    """`content` as what JSON has: NaN and infinity are None, paths text, numbers of numpy and torch Python's own.

    An object with a method `to_json` stands for what that returns.
    """
    if content is None or isinstance(content, (str, bool, int)):
        return content
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if hasattr(content, "to_json"):
        return plain(content.to_json())
    if isinstance(content, Mapping):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple, set, frozenset)):
        return [plain(value) for value in content]
    if isinstance(content, Path):
        return str(content)
    if hasattr(content, "tolist"):
        return plain(content.tolist())
    raise TypeError(f"{type(content).__name__} has no place in JSON")


def json_text(content: Any, indent: int | None = 2) -> str:
    """`content` as JSON, without an end of line; `indent` None puts it on one line."""
    return json.dumps(plain(content), indent=indent, allow_nan=False)


def visible(text: str, lines: bool = False) -> str:
    """`text` with escapes (`\\x1b`, `\\u202e`) for what could not be seen; `lines` keeps tabs and line ends."""
    return (_LINES if lines else UNPRINTABLE).sub(lambda found: ascii(found[0])[1:-1], text)


def in_markdown(text: str) -> str:
    """`text` as a word of Markdown that is no HTML, link, table cell or heading of its own."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", visible(text).replace("&", "&amp;").replace("<", "&lt;"))
