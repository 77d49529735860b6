"""How long work tells whoever waits for it how far it is."""

from __future__ import annotations

from collections.abc import Callable

#: called with what is being done, how much of it is done, and how much there is
Progress = Callable[[str, float, float], None]


def no_progress(_label: str, _done: float, _total: float) -> None:
    """Report nothing."""
