"""Launches of slim's own kernels, told to who counts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# of each `launches_noted` that is open
_NOTED: list[Callable[[Sequence[Any]], None]] = []


@contextmanager
def launches_noted(note: Callable[[Sequence[Any]], None]) -> Iterator[None]:
    """Calls `note` with the arguments of every kernel that is launched inside it."""
    _NOTED.append(note)
    try:
        yield
    finally:
        _NOTED.remove(note)


def are_noted() -> bool:
    """Whether anybody is told of launches."""
    return bool(_NOTED)


@contextmanager
def not_noted() -> Iterator[None]:
    """What is launched inside it is a trial: nobody is told."""
    noted, _NOTED[:] = list(_NOTED), []
    try:
        yield
    finally:
        _NOTED[:] = noted


def launched(args: Sequence[Any]) -> None:
    """Tell of a launch with these arguments."""
    for note in _NOTED:
        note(args)
