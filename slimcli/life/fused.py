"""`slimcli.life.heirs` on a CUDA device: a launch or a few for what takes 70 operators of torch.

On a CPU, in an exported program and without Triton, the operators of `slimcli.life.heirs` run as they are. So they do
where the kernels were found not to say the same, which is looked at once for each shape and device.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.life import heirs as plain
from slimcli.life.heirs import Plan, Shares
from slimcli.life.lives import inverse
from slimcli.life.tables import records, table
from slimcli.schedule.counts import planned_rounds

logger = logging.getLogger(__name__)

#: types of device that the kernels run on
DEVICES = {"cuda"}
#: whether there are kernels; SLIM_KERNELS=0 leaves them out
TRITON = importlib.util.find_spec("triton") is not None and os.environ.get("SLIM_KERNELS") != "0"
#: patches that one program plans alone, in one launch; with more, each phase of a round is a launch of its own
ONE_LAUNCH = 256
#: channels of features that fit into a program
MOST_CHANNELS = 1024
#: the share of patches about which the kernels and the operators must agree on what is random: sums are rounded
#: otherwise, so that two that are as good as equal may change places
AGREE = 0.98

# whether the kernels do what the operators do, by what is asked of them
_CHECKED: dict[Hashable, bool] = {}
# of each `launches_noted` that is open
_NOTED: list[Callable[[Sequence[Any]], None]] = []


@torch.no_grad()
def plan(
    features: Tensor, score: Tensor, counts: Sequence[int], redundancy: float = 0.0, merge_importance: float = 0.0
) -> Plan:
    """`slimcli.life.heirs.plan`, by kernels where they can run."""
    way = _way(features) if features.shape[-1] <= MOST_CHANNELS else "operators"
    if way == "operators":
        return plain.plan(features, score, counts, redundancy, merge_importance)
    run = _plan_op if way == "one operator" else _plan
    order, heirs, weight = run(features, score.detach(), list(counts), float(redundancy), float(merge_importance))
    return Plan(order, heirs, weight if merge_importance else None)


@torch.no_grad()
def shares(
    found: Plan, counts: Sequence[int], num_prefix_tokens: int, dtype: torch.dtype, learns: bool = False
) -> Shares:
    """`slimcli.life.heirs.shares`, by a kernel where it can run. `learns`: gradients are to go through `take_over`."""
    way = "operators" if learns else _way(found.heirs)
    if way == "operators":
        return plain.shares(found, counts, num_prefix_tokens, dtype)
    run = _shares_op if way == "one operator" else _shares
    weight = found.weight if found.weight is not None else found.heirs.new_empty(0, dtype=torch.float32)
    share, log_size = run(found.heirs, weight, list(counts), num_prefix_tokens, dtype)
    return Shares(share.transpose(1, 2), None, log_size, found.heirs)


def take_over(tokens: Tensor, found: Shares, time: int, stay: int) -> Tensor:
    """`slimcli.life.heirs.take_over`, by a kernel where the shares are a kernel's."""
    if found.adds is not None:
        return plain.take_over(tokens, found, time, stay)
    run = _take_over_op if records() else _take_over
    return run(tokens, found.heirs, found.share[:, :, time], stay)


def _way(x: Tensor) -> Literal["operators", "kernels", "one operator"]:
    """How to run on the device of x: with kernels, as one operator of a graph that is recorded, or as torch's own."""
    if x.device.type not in DEVICES or not TRITON:
        return "operators"
    # what runs elsewhere knows no operators of slim
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch._C._get_tracing_state() is not None:
        return "operators"
    return "one operator" if records() else "kernels"


@contextmanager
def launches_noted(note: Callable[[Sequence[Any]], None]) -> Iterator[None]:
    """Calls `note` with the arguments of every kernel that is launched inside it."""
    _NOTED.append(note)
    try:
        yield
    finally:
        _NOTED.remove(note)


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    for note in _NOTED:
        note(args)
    device = next(x.device for x in args if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)


def _kernels() -> ModuleType:
    from slimcli.life import triton_kernels

    return triton_kernels


def _trusted(device: torch.device, key: Hashable, agree: Callable[[], bool]) -> bool:
    """Whether kernels may run: `agree` says, once, whether they compile and say what torch's operators say.

    While a CUDA graph is captured nothing is compiled or compared; the passes before it do that.
    """
    found = _CHECKED.get((device, key))
    if found is not None:
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    noted, _NOTED[:] = list(_NOTED), []
    try:
        found, why = agree(), "they do not agree with torch's own operators"
    except Exception as error:  # no compiler, an old device, or whatever Triton says
        found, why = False, (str(error).splitlines() or [""])[0] or type(error).__name__
    finally:
        _NOTED[:] = noted
    if not found and all(_CHECKED.values()):
        logger.warning("slim: no fused kernels for heirs on %s, torch's own operators run: %s", device, why)
    _CHECKED[device, key] = found
    return found


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _plan(
    features: Tensor, score: Tensor, counts: list[int], redundancy: float, merge_importance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Order, heirs and weights (B, N) of a `Plan`; no weights without `merge_importance`."""
    device, (n, channels) = features.device, features.shape[1:]
    settings: tuple[tuple[int, ...], float, float] = (tuple(counts), redundancy, merge_importance)

    def agree() -> bool:
        features, score = _random(device, 2, n, channels), _random(device, 2, n)
        order, heirs, weight = _launch_plan(features, score, *settings)
        # on a CPU no setting of torch rounds products off
        known = plain.plan(features.cpu(), score.cpu(), *settings)
        same = _told(order.cpu(), heirs.cpu(), counts) == _told(known.order, known.heirs, counts)
        if known.weight is not None:
            same = same & torch.isclose(weight.cpu().sort()[0], known.weight.sort()[0], rtol=1e-3)
        return bool(same.float().mean() >= AGREE)

    if _trusted(device, ("plan", n, channels, *settings), agree):
        return _launch_plan(features, score, *settings)
    order, heirs, weight = plain.plan(features, score, *settings)
    return order, heirs, order.new_empty(0, dtype=torch.float32) if weight is None else weight


def _told(order: Tensor, heirs: Tensor, counts: Sequence[int]) -> Tensor:
    """When each patch leaves and which is its heir, told by one number, in raster order (B, N)."""
    n = order.shape[1]
    # a kernel that fails may have named what is not there
    order, heirs = order.clamp(0, n - 1), heirs.clamp(0, n - 1)
    place = inverse(order)
    step = torch.bucketize(place, torch.tensor(counts[::-1], device=order.device), right=True)
    stays = step == 0
    return torch.where(stays, -1, step * n + order.gather(1, heirs.gather(1, place)))


def _launch_plan(
    features: Tensor, score: Tensor, counts: tuple[int, ...], redundancy: float, merge_importance: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernels, device = _kernels(), features.device
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


def _shares(
    heirs: Tensor, weight: Tensor, counts: list[int], num_prefix_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`share` (B, K, P + N), times first, and `log_size` (B, K + 1, P + N) of `Shares`; `weight` may be empty."""
    weighted = weight.numel() > 0
    settings = (tuple(counts), num_prefix_tokens, dtype)

    def agree() -> bool:
        device, processor = heirs.device, torch.device("cpu")
        features, score = _random(processor, 2, counts[0], 16), _random(processor, 2, counts[0])
        given = plain.plan(features, score, counts, 2.0, float(weighted))
        known = plain.shares(given, *settings)
        mass = weight if given.weight is None else given.weight.to(device)
        share, log_size = (found.cpu() for found in _launch_shares(given.heirs.to(device), mass, *settings))
        there = torch.arange(share.shape[2]) < (torch.tensor(counts) + num_prefix_tokens).unsqueeze(1)
        close = torch.isclose(share, known.share.transpose(1, 2), rtol=1e-2) | ~there[:-1]
        return bool(close.all() & (torch.isclose(log_size, known.log_size, atol=1e-4) | ~there).all())

    if _trusted(heirs.device, ("shares", weighted, *settings), agree):
        return _launch_shares(heirs, weight, *settings)
    found = plain.shares(Plan(heirs, heirs, weight if weighted else None), *settings)
    return found.share.transpose(1, 2).contiguous(), found.log_size


def _launch_shares(
    heirs: Tensor, weight: Tensor, counts: tuple[int, ...], num_prefix_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, device = heirs.shape[0], heirs.device
    tokens, times = num_prefix_tokens + counts[0], len(counts) - 1
    whole = table(lambda: torch.tensor(counts, dtype=torch.int32, device=device), "counts", counts, device)
    share = torch.empty(batch, times, tokens, dtype=dtype, device=device)
    log_size = torch.empty(batch, times + 1, tokens, device=device)
    scratch = torch.empty(batch, 4 * tokens, device=device)
    _launch(
        _kernels().shares, (batch,), heirs.contiguous(), weight.contiguous(), whole, times, num_prefix_tokens, tokens,
        scratch, share, log_size, TILE=64, WEIGHTED=weight.numel() > 0, num_warps=8, num_stages=1,
    )  # fmt: skip
    return share, log_size


def _take_over(tokens: Tensor, heirs: Tensor, share: Tensor, stay: int) -> Tensor:
    """The first `stay` of tokens (B, n, D), with what `heirs` (B, N) and `share` (B, P + N) give them."""
    width, dtype, prefix = tokens.shape[-1], tokens.dtype, share.shape[1] - heirs.shape[1]

    def by_operators(tokens: Tensor, heirs: Tensor, share: Tensor, stay: int) -> Tensor:
        adds = plain.added(F.pad(heirs + prefix, (prefix, 0)), dtype)
        return plain.take_over(tokens, Shares(share.unsqueeze(2), adds, share, heirs), 0, stay)

    def agree() -> bool:
        device, patches = tokens.device, 48
        heirs = (torch.arange(patches, device=device) % 7).expand(2, -1)
        share = _random(device, 2, prefix + patches).sigmoid().to(dtype)
        some = _random(device, 2, prefix + patches, width).to(dtype)
        found = _launch_take_over(some, heirs, share, prefix + 20).cpu()
        least = 1e-4 if dtype == torch.float32 else 5e-2
        known = by_operators(some.cpu(), heirs.cpu(), share.cpu(), prefix + 20)
        return torch.allclose(found, known, rtol=least, atol=least)

    if _trusted(tokens.device, ("take over", width, prefix, dtype), agree):
        return _launch_take_over(tokens, heirs, share, stay)
    return by_operators(tokens, heirs, share, stay)


def _launch_take_over(tokens: Tensor, heirs: Tensor, share: Tensor, stay: int) -> Tensor:
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    batch, n, width = tokens.shape
    out = torch.empty(batch, stay, width, dtype=tokens.dtype, device=tokens.device)
    part = min(256, _power_of_two(width))
    _launch(
        _kernels().take_over, (batch, stay, -(-width // part)), tokens, tokens.stride(0), tokens.stride(1),
        heirs.contiguous(), share, share.stride(0), out, n, stay, share.shape[1] - heirs.shape[1], heirs.shape[1],
        width, WIDTH=part, LEAVING=32, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


_plan_op = torch.library.custom_op(
    "slim::plan", _plan, mutates_args=(),
    schema="(Tensor features, Tensor score, int[] counts, float redundancy, float merge_importance) "
    "-> (Tensor, Tensor, Tensor)",
)  # fmt: skip
_shares_op = torch.library.custom_op(
    "slim::shares", _shares, mutates_args=(),
    schema="(Tensor heirs, Tensor weight, int[] counts, int num_prefix_tokens, ScalarType dtype) -> (Tensor, Tensor)",
)  # fmt: skip
_take_over_op = torch.library.custom_op(
    "slim::take_over", _take_over, mutates_args=(),
    schema="(Tensor tokens, Tensor heirs, Tensor share, int stay) -> Tensor",
)  # fmt: skip


@_plan_op.register_fake
def _(features: Tensor, score: Tensor, counts: list[int], redundancy: float, merge_importance: float) -> Any:
    order, heirs = (score.new_empty(score.shape, dtype=torch.int64) for _ in range(2))
    shape = score.shape if merge_importance else (0,)
    return order, heirs, score.new_empty(shape, dtype=torch.float32)


@_shares_op.register_fake
def _(heirs: Tensor, weight: Tensor, counts: list[int], num_prefix_tokens: int, dtype: torch.dtype) -> Any:
    batch, tokens, times = heirs.shape[0], num_prefix_tokens + counts[0], len(counts) - 1
    share = heirs.new_empty((batch, times, tokens), dtype=dtype)
    return share, heirs.new_empty((batch, times + 1, tokens), dtype=torch.float32)


@_take_over_op.register_fake
def _(tokens: Tensor, heirs: Tensor, share: Tensor, stay: int) -> Tensor:
    return tokens.new_empty((tokens.shape[0], stay, tokens.shape[2]))
