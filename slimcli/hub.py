"""Whether the Hugging Face hub may be asked, and whether it answers: its library alone would try for half a minute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_unreached: ContextVar[bool] = ContextVar("unreached", default=False)


def is_offline() -> bool:
    """Whether the hub is not to be asked: `HF_HUB_OFFLINE`, or inside `offline`."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def offline() -> Iterator[None]:
    """Inside it, the hub's library fetches nothing."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def cached_where_unreached() -> Iterator[None]:
    """Inside it, the hub's library takes what is in its cache alone where the hub does not answer one request."""
    if is_offline() or _answers():
        yield
        return
    before = _unreached.set(True)
    try:
        with offline():
            yield
    finally:
        _unreached.reset(before)


def why_not_fetched() -> str:
    """Why nothing was fetched, and what to do, as the end of a sentence."""
    if is_offline() and not _unreached.get():
        return "HF_HUB_OFFLINE forbids to fetch it"
    return "the hub cannot be reached: connect to the network"


def _answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of whichever HTTP library the hub's uses
        return False
    return True
