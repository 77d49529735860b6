"""The words beside a picture: class names, verdicts, and names cut to the room there is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from timm.data import ImageNetInfo

if TYPE_CHECKING:
    from slimcli.pictures.outcome import Outcome


def readable(class_names: Sequence[str] | None) -> list[str] | None:
    """Class names for people: ImageNet's numbers of its classes (n02123045) become words."""
    if not class_names or not all(re.fullmatch(r"n\d{8}", name) for name in class_names):
        return list(class_names) if class_names else None
    words = ImageNetInfo("imagenet-22k")
    try:
        return [words.label_name_to_description(name, detailed=False).split(",")[0] for name in class_names]
    except KeyError:
        return list(class_names)


def class_name(index: int, class_names: Sequence[str] | None) -> str:
    """The name of a class, or its number where names are not known."""
    return class_names[index] if class_names and index < len(class_names) else f"class {index}"


def verdict(outcome: Outcome, class_names: Sequence[str] | None) -> str:
    """One line: what dense and slim model chose, how surely, and whether they agree."""
    if outcome.maps is not None:
        maps = outcome.maps
        dense_right, slim_right = maps.right(maps.dense), maps.right(maps.slim)
        known = ""
        if dense_right is not None and slim_right is not None:
            known = f" · right pixels: dense {dense_right:.1%}, slim {slim_right:.1%}"
        return f"the same class at {maps.same:.1%} of the pixels; cosine of patches {outcome.similarity:.3f}{known}"
    if outcome.dense is None or outcome.slim is None:
        return f"no classifier; cosine of dense and slim features {outcome.similarity:.3f}"
    dense, slim = (
        f"{fit_words(class_name(guess.index, class_names), 24)} ({100 * guess.probability:.1f} %)"
        for guess in (outcome.dense, outcome.slim)
    )
    return f"dense: {dense} · slim: {slim} · {'agree' if outcome.agree else 'differ'}"


def fit_words(text: str, length: int) -> str:
    """`text` with its middle left out where it has more than `length` characters."""
    return text if len(text) <= length else f"{text[: length - length // 2 - 1]}…{text[-(length // 2) :]}"


def short_name(name: str) -> str:
    """A file's name with its folder, as data sets often repeat file names from class to class."""
    return "/".join(Path(name).parts[-2:])
