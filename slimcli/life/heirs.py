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

from slimcli.life.exported import join, knows_join, rows_of, together
from slimcli.life.lives import (
    exports_to_onnx,
    highest_first,
    in_order,
    inverse,
    normalise_life,
    take_rows,
    take_rows_of_all,
)
from slimcli.life.tables import place_table, table
from slimcli.schedule.counts import planned_rounds

#: the highest exponent of a patch's mass: what a few outliers weigh is finite then
MOST = 40.0
#: added to the variance of a patch's features: what says nothing is like nothing
LEAST_VARIANCE = 1e-12


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

    A patch stands for a group: at first itself, later also those that it took over. Whenever patches leave, those go
    first whose group is cheapest to join to the group of a more important patch, at the cost sqrt(m_i m_j) (1 - r(f_i,
    f_j)), with r the correlation: the mass m of a group is the sum of exp(s / `redundancy`) over its patches, with s
    their standardised `score` (B, N), and f the mean of their `features` (B, N, C), weighted by exp(`merge_importance`
    s). Each is added to the group most like its own among those that stay. It is agglomerative clustering, close to
    Ward's, in three rounds at most, `planned_rounds`: those that leave in a round are decided on together, and the
    cheapest leave first. With `redundancy` 0 the least important leave, whether they are like others or not.
    """
    standard = normalise_life(score.detach(), 0.0, 1.0)
    ranked, names = in_order(standard, descending=True)
    weight = power(standard, merge_importance) if merge_importance else None
    features = features.float()
    groups = take_rows(features if weight is None else features * weight.unsqueeze(-1), names)
    if redundancy > 0:
        groups = torch.cat((groups, power(ranked, 1 / redundancy).unsqueeze(-1)), dim=-1)
    left: list[tuple[Tensor, Tensor]] = []
    for step in planned_rounds(counts):
        stay = step[-1]
        unit = _unit(groups[..., : features.shape[-1]])
        if redundancy > 0:
            order = _cheapest_last(unit, groups[..., -1:].sqrt(), stay)
            names = names.gather(1, order)
            unit, *rest = take_rows_of_all((unit, groups) if stay > counts[-1] else (unit,), order)
            groups = rest[0] if rest else groups
        heirs = _most_like(unit, step)
        left.append((names[:, stay:], names.gather(1, heirs)))
        names = names[:, :stay]
        if stay > counts[-1]:
            where = heirs.unsqueeze(-1).expand(-1, -1, groups.shape[-1])
            groups = groups[:, :stay].scatter_add(1, where, groups[:, stay:])
    order, heirs = (torch.cat((names, *parts[::-1]), dim=1) for parts in zip(*left, strict=True))
    heirs = inverse(order).gather(1, heirs)
    return Plan(order, heirs, None if weight is None else weight.gather(1, order))


def _unit(features: Tensor) -> Tensor:
    """Features (B, n, C), their means taken out, and of length 1: their products are correlations."""
    channels, device = features.shape[-1], features.device
    scale = table(lambda: torch.full((channels,), channels**-0.5, device=device), "unit", channels, device)
    return F.layer_norm(features, (channels,), scale, None, LEAST_VARIANCE)


def power(standard: Tensor, times: float) -> Tensor:
    """exp of standardised scores (B, n) `times` a number, finite whatever it is."""
    exponent = standard if times == 1 else times * standard
    # none of n standardised scores lies further than sqrt(n - 1) from 0
    if abs(times) * math.sqrt(standard.shape[1]) > MOST:
        exponent = exponent.clamp(-MOST, MOST)
    return exponent.exp()


def _cheapest_last(unit: Tensor, root: Tensor, stay: int) -> Tensor:
    """Places (B, n): the `stay` groups dearest to join, in the order they have, then the others, dearest first.

    `unit` (B, n, C) are the groups' features, of length 1, and `root` (B, n, 1) the roots of their masses.
    """
    n, device = unit.shape[1], unit.device
    # the most important come first: nobody joins one that comes later
    not_before = table(lambda: torch.full((n, n), float("inf"), device=device).triu(), "not before", n, device)
    # sqrt(m_i m_j), less the same times the correlation
    apart = torch.baddbmm(not_before, root, root.transpose(1, 2))
    scaled = root * unit
    cost = torch.baddbmm(apart, scaled, scaled.transpose(1, 2), alpha=-1).amin(dim=-1)
    dearest = highest_first(cost)
    return torch.cat((in_order(dearest[:, :stay])[0], dearest[:, stay:]), dim=1)


def _most_like(unit: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The heirs (B, n - n'') of those that leave when n groups become n' and at last n'': the group most like each.

    `unit` (B, n, C) are the groups' features, of length 1, in the order in which they leave, the last to leave first.
    An heir is among those that stay when its patch leaves.
    """
    first, last, device = counts[1], counts[-1], unit.device
    leave, there = unit[:, last:], unit[:, :first].transpose(1, 2)
    if first == last:
        return torch.bmm(leave, there).argmax(dim=-1)

    def make() -> Tensor:
        stay = torch.tensor([next(n for n in counts if n <= place) for place in range(last, counts[0])])
        gone = torch.arange(first) >= stay.unsqueeze(1)
        return torch.zeros(gone.shape).masked_fill(gone, float("-inf")).to(device)

    return torch.baddbmm(table(make, "not later", counts, device), leave, there).argmax(dim=-1)


class Shares(NamedTuple):
    """What tokens become when heirs take over, for all K times at once; see `take_over`.

    `share` (B, P + N, K): the share of each token, when the k-th leave, in the token that it is part of then, of the
    tokens' dtype, or in float32 where a kernel adds them. `adds`
    (B, P + N, P + N) is 1 where the token of the column is added to that of the row; None where a kernel adds them, by
    the plan's `heirs` (B, N). `log_size` (B, K + 1, P + N): the logarithm of how many patches a token stands for,
    before any leave and after each time. `rows`, in slim's own ONNX alone: see `slimcli.life.exported`, where `adds` is
    what is `together`.
    """

    share: Tensor
    adds: Tensor | None
    log_size: Tensor
    heirs: Tensor
    rows: Tensor | None = None


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
    # one that took over leaves to an heir of its own: once a round, in the last one at each time
    *rounds, last = planned_rounds(counts)
    for _ in range((len(rounds) + len(last) - 2).bit_length()):
        part_of = part_of.gather(2, part_of)
    ones = table(lambda: torch.ones(tokens, device=device), "ones", tokens, torch.float32, device)
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
    share = share.to(dtype).transpose(1, 2)
    if knows_join():
        return Shares(share, together(heirs, dtype), size.log(), found.heirs, rows_of(heirs))
    return Shares(share, added(heirs, dtype), size.log(), found.heirs)


def added(heirs: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, n, n): 1 where the heir of the token of the column, in `heirs` (B, n), is that of the row."""
    (batch, n), device = heirs.shape, heirs.device
    if exports_to_onnx():
        return (heirs.unsqueeze(1) == place_table(n, device).unsqueeze(1)).to(dtype)
    nothing = table(lambda: torch.zeros(n, n, device=device, dtype=dtype), "zeros", n, dtype, device)
    one = table(lambda: torch.ones(n, device=device, dtype=dtype), "ones", n, dtype, device).expand(batch, 1, n)
    return nothing.expand(batch, -1, -1).scatter(1, heirs.unsqueeze(1), one)


def take_over(tokens: Tensor, found: Shares, time: int, stay: int) -> Tensor:
    """Tokens (B, n, D) when the `time`-th of them leave, from 0: the first `stay`, each with those that it takes over.

    A token becomes the mean of what it stands for, weighted as the plan says; (B, stay, D).
    """
    n = tokens.shape[1]
    assert found.adds is not None
    if found.rows is not None:
        share = found.share[:, stay:n, time : time + 1]
        return join(tokens, found.rows[:, stay:n], found.adds[:, stay:n, stay:n], share, stay)
    with torch.autocast(tokens.device.type, enabled=False):
        weighted = tokens * found.share[:, :n, time : time + 1]
        return torch.baddbmm(weighted[:, :stay], found.adds[:, :stay, stay:n], weighted[:, stay:])
