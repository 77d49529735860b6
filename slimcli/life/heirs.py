"""Who leaves when, who takes over from whom, and with what share: decided once, at the life layer.

Shapes: B images, P prefix tokens, N patches, C channels of the features, K times that patches leave, D token width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.life.lives import highest_first, normalise_life, take_rows
from slimcli.life.tables import place_table, table

#: the highest exponent of a patch's mass: what a few outliers weigh is finite then
MOST = 40.0
#: added to the variance of a patch's features: what says nothing is like nothing
LEAST_VARIANCE = 1e-12
#: passes in which it is found what each patch costs to do without
PASSES = 3


class Plan(NamedTuple):
    """Who leaves when, and who takes over from whom.

    `order` (B, N) are the patches' places in raster order, longest life first. `heirs` (B, N) are places in `order`: a
    patch's heir is among those that stay when it leaves; that of a patch that never leaves means nothing. `weight`
    (B, N), in the same order, is how much each weighs in the mean of a token that it becomes part of; None: all alike.
    """

    order: Tensor
    heirs: Tensor
    weight: Tensor | None


@torch.no_grad()
def plan(
    features: Tensor, score: Tensor, counts: Sequence[int], redundancy: float = 0.0, merge_importance: float = 0.0
) -> Plan:
    """Decide ahead, for falling patch counts N, N', N'', ..., who leaves, and to which patch that stays it is added.

    Joining patch i to a more important patch j costs sqrt(m_i m_j) (1 - r(f_i, f_j)): the mass m of a patch is
    exp(s / `redundancy`), with s its standardised `score` (B, N), and r the correlation of their `features`
    (B, N, C). A patch is cheap where joining it to one that is still there costs little (`_heights`), and the cheapest
    leave first: agglomerative clustering, from one product of all pairs. With `redundancy` 0 the least important
    leave, whether they are like others or not. Each is added to the patch most like it among those that leave at a
    later time or never, and weighs exp(`merge_importance` s) in the mean.
    """
    standard = normalise_life(score.detach(), 0.0, 1.0)
    weight = _power(standard, merge_importance) if merge_importance else None
    unit = _unit(features)
    order = highest_first(_heights(unit, standard, redundancy) if redundancy > 0 else standard)
    unit = take_rows(unit, order)
    heirs = torch.baddbmm(_not_later(tuple(counts), unit.device), unit, unit.transpose(1, 2)).argmax(dim=-1)
    return Plan(order, heirs, None if weight is None else weight.gather(1, order))


def _unit(features: Tensor) -> Tensor:
    """Features (B, N, C), their means taken out, in float32 and of length 1: their products are correlations."""
    features = features.float()
    channels, device = features.shape[-1], features.device
    scale = table(lambda: torch.full((channels,), channels**-0.5, device=device), "unit", channels, device)
    return F.layer_norm(features, (channels,), scale, None, LEAST_VARIANCE)


def _heights(unit: Tensor, standard: Tensor, redundancy: float) -> Tensor:
    """What it costs to do without each patch (B, N); without end for the most important.

    The least cost of joining it to a more important one that is still there then, which is one that it costs more to
    do without. Who that is depends on the answer: found in `PASSES` passes, the first as if all were there.
    """
    root = _power(standard, 0.5 / redundancy).unsqueeze(-1)
    scaled = root * unit
    # sqrt(m_i m_j), less the same times the correlation
    cost = torch.baddbmm(root * root.transpose(1, 2), scaled, scaled.transpose(1, 2), alpha=-1)
    cost = cost.masked_fill(standard.unsqueeze(1) <= standard.unsqueeze(2), float("inf"))
    height = cost.amin(dim=-1)
    for _ in range(PASSES - 1):
        height = cost.masked_fill(cost >= height.unsqueeze(1), float("inf")).amin(dim=-1)
    return height


def _not_later(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(1, N, N), to be added to how like patches are, in the order in which they leave: -inf where the patch of the
    column leaves when that of the row does, or before; 0 where it leaves later, and between those that never leave.
    """

    def make() -> Tensor:
        # how many stay when each patch leaves
        stay = torch.tensor(
            [max((n for n in counts[1:] if n <= place), default=counts[0]) for place in range(counts[0])]
        )
        no = torch.arange(counts[0]) >= stay.unsqueeze(1)
        return torch.zeros(no.shape).masked_fill(no, float("-inf")).unsqueeze(0).to(device)

    return table(make, "not later", counts, device)


def _power(standard: Tensor, times: float) -> Tensor:
    """exp of standardised scores (B, n) `times` a number, finite whatever it is."""
    exponent = standard if times == 1 else times * standard
    # none of n standardised scores lies further than sqrt(n - 1) from 0
    if abs(times) * math.sqrt(standard.shape[1]) > MOST:
        exponent = exponent.clamp(-MOST, MOST)
    return exponent.exp()


class Shares(NamedTuple):
    """What tokens become when heirs take over, for all K times at once; see `take_over`.

    `share` (B, K, P + N, 1): the share of each token, when the k-th leave, in the token that it is part of then. `adds`
    (B, P + N, P + N) is 1 where the token of the column is added to that of the row. `log_size` (B, K + 1, P + N): the
    logarithm of how many patches a token stands for, before any leave and after each time.
    """

    share: Tensor
    adds: Tensor
    log_size: Tensor


@torch.no_grad()
def shares(found: Plan, counts: Sequence[int], num_prefix_tokens: int, dtype: torch.dtype) -> Shares:
    """The shares that follow from a plan for falling patch counts N, N', ...: operators do not grow with their number.

    `dtype` is that of the tokens. Prefix tokens stand for themselves and inherit nothing.
    """
    prefix, device = num_prefix_tokens, found.heirs.device
    batch, tokens, times = found.heirs.shape[0], prefix + counts[0], len(counts) - 1
    heirs = F.pad(found.heirs + prefix, (prefix, 0))
    # [k, j]: whether j has left when the k-th are to leave; who is there is its own heir
    places = place_table(tokens, device)
    key = (tuple(counts), prefix, device)
    gone = table(lambda: places >= prefix + torch.tensor(counts, device=device).unsqueeze(1), "gone", *key)
    heir = torch.where(gone, heirs.unsqueeze(1), places)
    part_of = heir
    # one that took over leaves to an heir of its own, at a later time
    for _ in range((times - 1).bit_length()):
        part_of = part_of.gather(2, part_of)
    ones = table(lambda: torch.ones(tokens, device=device), "ones", tokens, device)
    nothing = table(lambda: torch.zeros(tokens, tokens, device=device, dtype=dtype), "zeros", tokens, dtype, device)
    # how many patches each stands for and, where they weigh otherwise, what they weigh: summed in one
    kinds = 1 if found.weight is None else 2
    sums = table(lambda: torch.zeros(kinds, times + 1, tokens, device=device), "sums", kinds, times + 1, tokens, device)
    values = ones.expand(batch, 1, tokens)
    if found.weight is not None:
        values = F.pad(found.weight.unsqueeze(1), (prefix, 0, 1, 0), value=1.0)
    shape = (batch, kinds, times + 1, tokens)
    index = part_of.unsqueeze(1).expand(shape)
    summed = sums.expand(shape).scatter_add(3, index, values.unsqueeze(2).expand(shape))
    size, weight = summed[:, 0], summed[:, -1]
    share = weight[:, :-1] / weight[:, 1:].gather(2, heir[:, 1:])
    one = ones.to(dtype).expand(batch, 1, tokens)
    adds = nothing.expand(batch, -1, -1).scatter(1, heirs.unsqueeze(1), one)
    return Shares(share.to(dtype).unsqueeze(-1), adds, size.log())


def take_over(tokens: Tensor, found: Shares, time: int, stay: int) -> Tensor:
    """Tokens (B, n, D) when the `time`-th of them leave, from 0: the first `stay`, each with those that it takes over.

    A token becomes the mean of what it stands for, weighted as the plan says; (B, stay, D).
    """
    n = tokens.shape[1]
    with torch.autocast(tokens.device.type, enabled=False):
        weighted = tokens * found.share[:, time, :n]
        return torch.baddbmm(weighted[:, :stay], found.adds[:, :stay, stay:n], weighted[:, stay:])
