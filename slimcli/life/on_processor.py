"""Launches of `slimcli.life.numba_kernels`: a plan, its shares and a drop on a CPU, images split among its threads.

Each takes tensors and does what its namesake in `slimcli.life.heirs` does; see `slimcli.life.fused`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimcli.life import numba_kernels as kernels
from slimcli.life.launches import launched
from slimcli.schedule.counts import planned_rounds

#: nanoseconds of work, about, that a thread of its own is worth
WORTH = 100_000


def plan(
    features: Tensor, score: Tensor, counts: tuple[int, ...], redundancy: float, merge_importance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Order, heirs and weights; products of all patches are made by torch, those of groups follow from them."""
    batch, n, channels = features.shape
    with torch.autocast("cpu", enabled=False):
        features = features.float()
        features = features - features.mean(dim=-1, keepdim=True)
        products = torch.bmm(features, features.transpose(1, 2))
    score = score.float().contiguous()
    order, heirs = (torch.empty(batch, n, dtype=torch.int64) for _ in range(2))
    weight = torch.empty(batch, n if merge_importance else 0)
    steps, rounds = _steps(counts)
    inverse = 1 / redundancy if redundancy > 0 else 0.0
    arrays = _arrays(products, score), (steps, rounds, channels, inverse, merge_importance)
    _run(kernels.plan, batch, 5 * n * n, *arrays[0], *arrays[1], *_arrays(order, heirs, weight))
    return order, heirs, weight


def shares(
    heirs: Tensor, weight: Tensor, counts: tuple[int, ...], num_prefix_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`share`, always in float32, and `log_size`."""
    batch, tokens, times = heirs.shape[0], num_prefix_tokens + counts[0], len(counts) - 1
    share, log_size = torch.empty(batch, times, tokens), torch.empty(batch, times + 1, tokens)
    weight = weight if weight.numel() else weight.new_empty(batch, 0)
    given = _arrays(heirs.contiguous(), weight.contiguous())
    work = 3 * times * tokens
    _run(kernels.shares, batch, work, *given, _steps(counts)[0], num_prefix_tokens, *_arrays(share, log_size))
    return share, log_size


def take_over(tokens: Tensor, heirs: Tensor, share: Tensor, stay: int) -> Tensor:
    """Tokens that stay, with what they are given; sums are made in float32."""
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    batch, n, width = tokens.shape
    out = torch.empty(batch, stay, width, dtype=tokens.dtype)
    image, row, _ = tokens.stride()
    # one line of numbers, however rows and images are apart
    line = tokens.as_strided(((batch - 1) * image + (n - 1) * row + width,), (1,))
    kernel, into = kernels.take_over, out
    if tokens.dtype == torch.bfloat16:
        kernel, line, into = kernels.take_over_in_bfloat16, line.view(torch.uint16), out.view(torch.uint16)
    (flat,), given = _arrays(line), _arrays(heirs.contiguous(), share.float())
    prefix = share.shape[1] - heirs.shape[1]
    _run(kernel, batch, n * width // 3, flat, image, row, *given, prefix, n, *_arrays(into))
    return out


@lru_cache(256)
def _steps(counts: tuple[int, ...]) -> tuple[Any, Any]:
    """The counts (K + 1,), and those that each round starts from and comes to (R, 2)."""
    return np.array(counts, np.int64), np.array([(step[0], step[-1]) for step in planned_rounds(counts)], np.int64)


def _arrays(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(x.numpy() for x in tensors)


@lru_cache(1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process: those of the one that it was forked from are not there."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="slim")


def _run(kernel: Callable[..., None], batch: int, work: int, *args: Any) -> None:
    """Run a kernel on all images, which take about `work` nanoseconds each."""
    launched(args)
    threads = min(torch.get_num_threads(), batch, batch * work // WORTH)
    if threads <= 1:
        kernel(*args, 0, batch)
        return
    ends = [batch * k // threads for k in range(threads + 1)]
    pool = _pool(os.getpid())
    others = [pool.submit(kernel, *args, *part) for part in itertools.pairwise(ends[1:])]
    kernel(*args, 0, ends[1])
    for other in others:
        other.result()
