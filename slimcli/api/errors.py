"""Errors of functions name their parameters as Python does."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TypeVar

from slimcli.errors import SlimError

F = TypeVar("F", bound=Callable[..., object])


def names_parameters(function: F) -> F:
    """The function, with `--keep-rate` in its errors, as the command line has it, called `keep_rate`."""

    @functools.wraps(function)
    def called(*args: object, **kwargs: object) -> object:
        try:
            return function(*args, **kwargs)
        except SlimError as error:
            text = re.sub(r"(?<![\w-])--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), str(error))
            text = re.sub(r"(?<!\S)-o (?=\S)", "output ", text)
            if text == str(error):
                raise
            raise SlimError(text) from error

    return called  # type: ignore[return-value]
