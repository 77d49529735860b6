"""Heirs in ONNX: rows are taken and put back whole, by GatherND and ScatterND, which slim's own exporter writes."""

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


def together(heirs: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, n, n): 1 where two tokens have the same heir, `heirs` (B, n) being its place."""
    return (heirs.unsqueeze(2) == heirs.unsqueeze(1)).to(dtype)


def join(tokens: Tensor, rows: Tensor, together: Tensor, share: Tensor, stay: int) -> Tensor:
    """The first `stay` of tokens (B, n, D), each with the tokens that it takes over; (B, stay, D).

    Of the m others, `rows` (B, m, 2) say where their heirs are, `together` (B, m, m) is 1 where two have the same, and
    `share` (B, m, 1) is what part of them they become. Shares of one token and of all that it takes over add up to 1.

    An heir of several is written once by each, and the same each time: runtimes write rows at once, and lose some of
    those that they are to add to the same row (ONNX Runtime's ScatterND).
    """
    found: Tensor = OPERATOR(tokens, rows, together, share, stay)
    return found


def _join(tokens: Tensor, rows: Tensor, together: Tensor, share: Tensor, stay: int) -> Tensor:
    image, place = rows.unbind(-1)
    there = tokens[image, place]
    found = there + together @ ((tokens[:, stay:] - there) * share)
    return tokens[:, :stay].index_put((image, place), found)


_operator = torch.library.custom_op(
    "slim::join", _join, mutates_args=(),
    schema="(Tensor tokens, Tensor rows, Tensor together, Tensor share, int stay) -> Tensor",
)  # fmt: skip


def _shape(tokens: Tensor, rows: Tensor, together: Tensor, share: Tensor, stay: int) -> Tensor:
    return tokens.new_empty((tokens.shape[0], stay, tokens.shape[2]))


_operator.register_fake(_shape)
#: `join` as it stands in a graph that is exported
OPERATOR: Any = torch.ops.slim.join.default
