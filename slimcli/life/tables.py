"""Constant tensors, made once for each shape and device: in a pass over few tokens, making them would take its time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

#: how many are kept; those that were not used for longest are forgotten
MOST_TABLES = 256

_TABLES: OrderedDict[Hashable, Tensor] = OrderedDict()
# of each `tables_used` that is open
_NOTED: list[list[Tensor]] = []


def table(make: Callable[[], Tensor], *key: Hashable) -> Tensor:
    """What `make` makes, kept under `key`, which must say all that it depends on, the device included.

    Made anew, and not kept, where a graph is recorded: there it becomes part of the graph.
    """
    if records():
        return make()
    found = _TABLES.pop(key, None)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = make()
    _TABLES[key] = found
    for noted in _NOTED:
        noted.append(found)
    while len(_TABLES) > MOST_TABLES:
        _TABLES.popitem(last=False)
    return found


@contextmanager
def tables_used() -> Iterator[list[Tensor]]:
    """The tables that are used inside it, to be kept by what reads their memory later: a CUDA graph."""
    noted: list[Tensor] = []
    _NOTED.append(noted)
    try:
        yield noted
    finally:
        # by identity: equal lists of tensors cannot be told apart
        _NOTED[:] = [other for other in _NOTED if other is not noted]


def records() -> bool:
    """Whether operators are recorded into a graph, or run on tensors without memory."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return True
    return torch._C._get_tracing_state() is not None or any(
        isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack()
    )


def place_table(n: int, device: torch.device) -> Tensor:
    """The places 0..n-1: (n,)."""
    return table(lambda: torch.arange(n, device=device), "places", n, device)


def row_table(batch: int, n: int, device: torch.device) -> Tensor:
    """The row of each image's first token, where the `n` tokens of all images are the rows of one matrix: (B, 1)."""
    return patch_rows(batch, n, 0, device)


def patch_rows(batch: int, n: int, num_prefix_tokens: int, device: torch.device) -> Tensor:
    """The row of each image's first patch, as `row_table` counts them: (B, 1)."""

    def make() -> Tensor:
        return n * torch.arange(batch, device=device).unsqueeze(1) + num_prefix_tokens

    return table(make, "patches", batch, n, num_prefix_tokens, device)


def prefix_rows(batch: int, n: int, num_prefix_tokens: int, device: torch.device) -> Tensor:
    """The rows of each image's prefix tokens, as `row_table` counts them: (B, P)."""

    def make() -> Tensor:
        return n * torch.arange(batch, device=device).unsqueeze(1) + torch.arange(num_prefix_tokens, device=device)

    return table(make, "prefix", batch, n, num_prefix_tokens, device)
