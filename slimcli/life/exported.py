"""Heirs in ONNX: rows are taken and added whole, by GatherND and ScatterND, which slim's own exporter writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_KNOWN: ContextVar[bool] = ContextVar("known", default=False)


@contextmanager
def known() -> Iterator[None]:
    """Inside it the exporter knows `OPERATOR`, which torch's own exporter to ONNX does not."""
    token = _KNOWN.set(True)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def knows_join() -> bool:
    """Whether what exports the model knows `join`."""
    return _KNOWN.get()


def rows_of(heirs: Tensor) -> Tensor:
    """Where each token's heir is, `heirs` (B, n) being its place: its image and its place, (B, n, 2).

    Images are counted by their own number, so that any number of them may come.
    """
    nothing = heirs * 0
    image = (nothing[:, :1] + 1).cumsum(0) - 1 + nothing
    return torch.stack((image, heirs), dim=-1)


def join(tokens: Tensor, rows: Tensor, share: Tensor, stay: int) -> Tensor:
    """The first `stay` of tokens (B, n, D), each with the tokens that it takes over; (B, stay, D).

    Of the others, `rows` (B, n - stay, 2) say where their heirs are, and `share` (B, n - stay, 1) what part of them
    they become. Shares of one token and of all that it takes over add up to 1.
    """
    found: Tensor = OPERATOR(tokens, rows, share, stay)
    return found


def _join(tokens: Tensor, rows: Tensor, share: Tensor, stay: int) -> Tensor:
    image, place = rows.unbind(-1)
    more = (tokens[:, stay:] - tokens[image, place]) * share
    return tokens[:, :stay].index_put((image, place), more, accumulate=True)


_operator = torch.library.custom_op(
    "slim::join", _join, mutates_args=(), schema="(Tensor tokens, Tensor rows, Tensor share, int stay) -> Tensor"
)


def _shape(tokens: Tensor, rows: Tensor, share: Tensor, stay: int) -> Tensor:
    return tokens.new_empty((tokens.shape[0], stay, tokens.shape[2]))


_operator.register_fake(_shape)
#: `join` as it stands in a graph that is exported
OPERATOR: Any = torch.ops.slim.join.default
