"""Launches of `slimcli.life.triton_kernels`: a plan, its shares and a drop on a CUDA device.

Each takes tensors of one device and does what its namesake in `slimcli.life.heirs` does; see `slimcli.life.fused`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from slimcli.life import triton_kernels as kernels
from slimcli.life.launches import launched
from slimcli.life.tables import table
from slimcli.schedule.counts import planned_rounds

#: patches that one program plans alone, in one launch; with more, each phase of a round is a launch of its own
ONE_LAUNCH = 256


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    launched(args)
    device = next(x.device for x in args if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def plan(
    features: Tensor, score: Tensor, counts: tuple[int, ...], redundancy: float, merge_importance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Order, heirs and weights: in one launch, or with many patches in one for each phase of a round."""
    device = features.device
    features, score = features.float(), score.float().contiguous()
    features = features if features.stride(-1) == 1 else features.contiguous()
    batch, n, channels = features.shape
    rounds = [(step[0], step[-1]) for step in planned_rounds(counts)]
    whole = table(lambda: torch.tensor(counts, dtype=torch.int32, device=device), "counts", counts, device)
    ends = table(lambda: torch.tensor(rounds, dtype=torch.int32, device=device), "rounds", counts, device)
    floats = torch.empty(batch, 3 * n * channels + 4 * n, device=device)
    ints = torch.empty(batch, 7 * n, dtype=torch.int32, device=device)
    order, heirs = (torch.empty(batch, n, dtype=torch.int64, device=device) for _ in range(2))
    weight = torch.empty(batch, n if merge_importance else 0, device=device)
    padded = max(16, _power_of_two(channels))
    alone = n <= ONE_LAUNCH
    sizes = {"N": n, "C": channels, "CPAD": padded, "CHUNK": 32, "TILE": 64 if alone else 32, "WIDE": _power_of_two(n)}
    sizes |= {"ROWS": max(16, min(64, 4096 // padded)), "ROUNDS": len(rounds)}
    sizes |= {"num_warps": 16 if alone else 8, "num_stages": 1}
    inverse = 1 / redundancy if redundancy > 0 else 0.0

    def run(phase: Any, programs: int, first: int = 0, end: int = 0) -> None:
        _launch(
            kernels.plan, (batch, programs), score, features, features.stride(0), features.stride(1), whole,
            len(counts) - 1, ends, floats, ints, order, heirs, weight, inverse, merge_importance, first, end,
            RANKED=redundancy > 0, WEIGHTED=bool(merge_importance), PHASE=phase.value, **sizes,
        )  # fmt: skip

    if alone:
        run(kernels.ALL, 1, 0, len(rounds))
        return order, heirs, weight
    tiles = -(-n // sizes["TILE"])
    run(kernels.BEGIN, tiles)
    for at in range(len(rounds)):
        for phase in (kernels.COST, kernels.RANK, kernels.HEIRS, kernels.MERGE):
            run(phase, tiles, at, at + 1)
    run(kernels.END, 1)
    return order, heirs, weight


def shares(
    heirs: Tensor, weight: Tensor, counts: tuple[int, ...], num_prefix_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`share`, in the dtype of the tokens, and `log_size`."""
    batch, device = heirs.shape[0], heirs.device
    tokens, times = num_prefix_tokens + counts[0], len(counts) - 1
    whole = table(lambda: torch.tensor(counts, dtype=torch.int32, device=device), "counts", counts, device)
    share = torch.empty(batch, times, tokens, dtype=dtype, device=device)
    log_size = torch.empty(batch, times + 1, tokens, device=device)
    scratch = torch.empty(batch, 4 * tokens, device=device)
    _launch(
        kernels.shares, (batch,), heirs.contiguous(), weight.contiguous(), whole, times, num_prefix_tokens, tokens,
        scratch, share, log_size, TILE=64, WEIGHTED=weight.numel() > 0, num_warps=8, num_stages=1,
    )  # fmt: skip
    return share, log_size


def take_over(tokens: Tensor, heirs: Tensor, share: Tensor, stay: int) -> Tensor:
    """Tokens that stay, with what they are given; sums are made in float32."""
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    batch, n, width = tokens.shape
    out = torch.empty(batch, stay, width, dtype=tokens.dtype, device=tokens.device)
    part = min(256, _power_of_two(width))
    _launch(
        kernels.take_over, (batch, stay, -(-width // part)), tokens, tokens.stride(0), tokens.stride(1),
        heirs.contiguous(), share, share.stride(0), out, n, stay, share.shape[1] - heirs.shape[1], heirs.shape[1],
        width, WIDTH=part, LEAVING=32, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out
