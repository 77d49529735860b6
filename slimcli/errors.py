"""The one exception that a user is meant to read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_MARKED = re.compile("\x02(\\w+)(=?)\x03")


def parameter(name: str, value: Any = None) -> str:
    """A parameter by its name in Python, for the message of a `SlimError`: `device`, or with a value `device=cuda`.

    A command shows it as its own option: `--device cuda`. Both marks around the name are invisible to `str(error)`.
    """
    return f"\x02{name}\x03" if value is None else f"\x02{name}=\x03{value}"


class SlimError(Exception):
    """Something the user can put right: shown as one line, exit code 2, no traceback.

    The message says what was found, where, what was expected and what to do. It names a parameter by `parameter`.
    """

    def __str__(self) -> str:
        return self.spelled({})

    def spelled(self, options: Mapping[str, str]) -> str:
        """The message, with each parameter that `options` has spelled as it says: `{"keep_rates": "--keep-rate"}`."""

        def spell(found: re.Match[str]) -> str:
            name, equals = found.groups()
            return f"{options[name]}{' ' if equals else ''}" if name in options else f"{name}{equals}"

        return _MARKED.sub(spell, super().__str__())


def check_word(name: str, value: object, words: Iterable[str], whose: str = "") -> None:
    """Raise `SlimError` where the value of the setting `name` is none of the words that there are for it, or for whose.

    `whose` is put behind the refusal: "for the method tome".
    """
    known = tuple(words)
    if value not in known:
        whose = f" {whose}" if whose else ""
        raise SlimError(f"{name} = {value!r} is not possible{whose}: expected one of {', '.join(known)}")


class DataError(SlimError):
    """A data set, or one sample of it, that cannot be read.

    A loader's worker process hands its errors over as text with a traceback; only the message itself is kept.
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught ") and "Original Traceback" in message:
            message = message.rpartition("DataError: ")[2].strip()
        super().__init__(message)


class Interrupted(Exception):
    """A run stopped on request (Ctrl-C, SIGTERM) after everything needed to go on was written."""
