"""JSON that every program can read: what JSON has no word for becomes null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
