"""`slimcli.life.heirs` by kernels of slim's own: a launch or a few for what takes 70 operators of torch.

Triton compiles them for a CUDA device and Numba for a CPU. Where neither is installed, on other devices and in an
exported program the operators of `slimcli.life.heirs` run as they are. So they do where the kernels were found not to
say the same, which is looked at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from threading import Timer
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from slimcli.life import heirs as plain
from slimcli.life.heirs import Plan, Shares
from slimcli.life.launches import are_noted, not_noted
from slimcli.life.lives import inverse
from slimcli.life.tables import records

logger = logging.getLogger(__name__)


class Kernels(NamedTuple):
    """Kernels for a kind of device."""

    #: what launches them: `plan`, `shares` and `take_over`, as `slimcli.life.on_processor` has them
    module: str
    #: the package that compiles them
    compiler: str
    #: tokens that they can join
    dtypes: tuple[torch.dtype, ...]
    #: channels of features that fit
    most_channels: int
    #: whether they are compiled for each shape, so that each must be looked at
    by_shape: bool
    #: whether a graph that is recorded runs them, as operators of its own
    in_graphs: bool


#: the kernels of each type of device
KERNELS = {
    "cuda": Kernels("slimcli.life.on_cuda", "triton", (torch.float32, torch.bfloat16, torch.float16), 1024, True, True),
    "cpu": Kernels("slimcli.life.on_processor", "numba", (torch.float32, torch.bfloat16), 2**31, False, False),
}
#: the compilers that are installed
COMPILERS = {kernels.compiler for kernels in KERNELS.values() if importlib.util.find_spec(kernels.compiler)}
#: whether kernels may run at all
ALLOWED = os.environ.get("SLIM_KERNELS") != "0"
#: the share of patches about which the kernels and the operators must agree on what is random: sums are rounded
#: otherwise, so that two that are as good as equal may change places
AGREE = 0.98
#: seconds of compiling after which somebody who waits is told
PATIENCE = 2.0
#: falling patch counts, and channels of features, of random images that tell of kernels that are the same for all
SAMPLE, SAMPLE_CHANNELS = (48, 41, 33, 24, 18, 12, 9), 16

# whether the kernels do what the operators do, by what is asked of them
_CHECKED: dict[Hashable, bool] = {}


@torch.no_grad()
def plan(
    features: Tensor, score: Tensor, counts: Sequence[int], redundancy: float = 0.0, merge_importance: float = 0.0
) -> Plan:
    """`slimcli.life.heirs.plan`, by kernels where they can run."""
    way = _way(features, channels=features.shape[-1])
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
    way = "operators" if learns else _way(found.heirs, dtype)
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


def _way(
    x: Tensor, dtype: torch.dtype | None = None, channels: int = 0
) -> Literal["operators", "kernels", "one operator"]:
    """How to run on the device of x: with kernels, as one operator of a graph that is recorded, or as torch's own.

    `dtype` is that of the tokens that will be joined, and `channels` how many a patch's features have.
    """
    kernels = KERNELS.get(x.device.type)
    if kernels is None or not ALLOWED or type(x) is not Tensor or kernels.compiler not in COMPILERS:
        return "operators"
    if channels > kernels.most_channels or (dtype is not None and dtype not in kernels.dtypes):
        return "operators"
    # what runs elsewhere knows no operators of slim
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch._C._get_tracing_state() is not None:
        return "operators"
    if records():
        return "one operator" if kernels.in_graphs else "operators"
    # what counts operators knows torch's own, unless it is told of launches
    if _get_current_dispatch_mode() is not None and not are_noted():
        return "operators"
    return "kernels"


def _launcher(x: Tensor) -> Any:
    """The module that launches kernels on the device of x."""
    return importlib.import_module(KERNELS[x.device.type].module)


def _trusted(device: torch.device, key: Hashable, agree: Callable[[], bool]) -> bool:
    """Whether kernels may run: `agree` says, once, whether they compile and say what torch's operators say.

    While a CUDA graph is captured nothing is compiled or compared; the passes before it do that.
    """
    found = _CHECKED.get((device, key))
    if found is not None:
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    try:
        with not_noted(), _told_of_waiting(device):
            found, why = agree(), "they do not agree with torch's own operators"
    except Exception as error:  # no compiler, an old device, or whatever Triton or Numba says
        found, why = False, (str(error).splitlines() or [""])[0] or type(error).__name__
    if not found and all(_CHECKED.values()):
        logger.warning("slim: no fused kernels for heirs on %s, torch's own operators run: %s", device, why)
    _CHECKED[device, key] = found
    return found


@contextmanager
def _told_of_waiting(device: torch.device) -> Iterator[None]:
    """One line, where this takes long: what compiles keeps what it made, so that the next process does not wait."""
    line = "slim: compiling kernels for heirs on %s: some seconds, the first time only"
    timer = Timer(PATIENCE, logger.warning, (line, device))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _plan(
    features: Tensor, score: Tensor, counts: list[int], redundancy: float, merge_importance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Order, heirs and weights (B, N) of a `Plan`; no weights without `merge_importance`."""
    device, settings = features.device, (tuple(counts), redundancy, merge_importance)
    (n, channels), sampled = features.shape[1:], settings
    if not KERNELS[device.type].by_shape:
        n, channels = SAMPLE[0], SAMPLE_CHANNELS
        sampled = SAMPLE, 2.0 if redundancy > 0 else 0.0, 0.7 if merge_importance else 0.0

    def agree() -> bool:
        features, score = _random(device, 2, n, channels), _random(device, 2, n)
        order, heirs, weight = _launcher(features).plan(features, score, *sampled)
        # on a CPU no setting of torch rounds products off
        known = plain.plan(features.cpu(), score.cpu(), *sampled)
        same = _told(order.cpu(), heirs.cpu(), sampled[0]) == _told(known.order, known.heirs, sampled[0])
        if known.weight is not None:
            same = same & torch.isclose(weight.cpu().sort()[0], known.weight.sort()[0], rtol=1e-3)
        return bool(same.float().mean() >= AGREE)

    if _trusted(device, ("plan", n, channels, *sampled), agree):
        return _launcher(features).plan(features, score, *settings)
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


def _shares(
    heirs: Tensor, weight: Tensor, counts: list[int], num_prefix_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`share` (B, K, P + N), times first, and `log_size` (B, K + 1, P + N) of `Shares`; `weight` may be empty."""
    weighted, settings = weight.numel() > 0, (tuple(counts), num_prefix_tokens, dtype)
    sampled = settings if KERNELS[heirs.device.type].by_shape else (SAMPLE, 1, dtype)

    def agree() -> bool:
        (counts, prefix, _), device, processor = sampled, heirs.device, torch.device("cpu")
        features, score = _random(processor, 2, counts[0], 16), _random(processor, 2, counts[0])
        given = plain.plan(features, score, counts, 2.0, float(weighted))
        known = plain.shares(given, *sampled)
        mass = weight if given.weight is None else given.weight.to(device)
        share, log_size = (found.cpu() for found in _launcher(heirs).shares(given.heirs.to(device), mass, *sampled))
        there = torch.arange(share.shape[2]) < (torch.tensor(counts) + prefix).unsqueeze(1)
        close = torch.isclose(share.to(dtype), known.share.transpose(1, 2), rtol=1e-2) | ~there[:-1]
        return bool(close.all() & (torch.isclose(log_size, known.log_size, atol=1e-4) | ~there).all())

    if _trusted(heirs.device, ("shares", weighted, *sampled), agree):
        return _launcher(heirs).shares(heirs, weight, *settings)
    found = plain.shares(Plan(heirs, heirs, weight if weighted else None), *settings)
    return found.share.transpose(1, 2).contiguous(), found.log_size


def _take_over(tokens: Tensor, heirs: Tensor, share: Tensor, stay: int) -> Tensor:
    """The first `stay` of tokens (B, n, D), with what `heirs` (B, N) and `share` (B, P + N) give them."""
    width, dtype, prefix = tokens.shape[-1], tokens.dtype, share.shape[1] - heirs.shape[1]

    def by_operators(tokens: Tensor, heirs: Tensor, share: Tensor, stay: int) -> Tensor:
        adds = plain.added(F.pad(heirs + prefix, (prefix, 0)), dtype)
        return plain.take_over(tokens, Shares(share.to(dtype).unsqueeze(2), adds, share, heirs), 0, stay)

    def agree() -> bool:
        device, patches = tokens.device, 48
        heirs = (torch.arange(patches, device=device) % 7).expand(2, -1)
        share = _random(device, 2, prefix + patches).sigmoid().to(dtype)
        some = _random(device, 2, prefix + patches, width).to(dtype)
        found = _launcher(some).take_over(some, heirs, share, prefix + 20).cpu()
        least = 1e-4 if dtype == torch.float32 else 5e-2
        known = by_operators(some.cpu(), heirs.cpu(), share.cpu(), prefix + 20)
        return torch.allclose(found, known, rtol=least, atol=least)

    sizes = (width, prefix) if KERNELS[tokens.device.type].by_shape else ()
    if _trusted(tokens.device, ("take over", dtype, *sizes), agree):
        return _launcher(tokens).take_over(tokens, heirs, share, stay)
    return by_operators(tokens, heirs, share, stay)


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
