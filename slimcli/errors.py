"""The one exception that a user is meant to read."""

from __future__ import annotations


class SlimError(Exception):
    """Something the user can put right: shown as one line, exit code 2, no traceback.

    The message says what was found, where, what was expected and what to do.
    """


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
