"""Who leaves when and who takes over where patches count alike: those most like each other are joined, pair by pair.

Shapes: B images, N patches, n groups of them, a and b the groups of two halves, C channels of the features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.life.heirs import Plan, power
from slimcli.life.lives import highest_first, inverse, normalise_life, take_rows
from slimcli.life.tables import place_table, table
from slimcli.schedule.counts import planned_counts, rounds_of_pairs

#: what the squared distance of two patches adds to that of their features, in halves of the image's shorter side:
#: between patches that are alike, it lets neighbours join
NEARNESS = 0.02


@torch.no_grad()
def plan_pairs(
    features: Tensor,
    score: Tensor,
    counts: Sequence[int],
    redundancy: float = 0.0,
    merge_importance: float = 0.0,
    grid: tuple[int, int] | None = None,
) -> Plan:
    """As `slimcli.life.plan`, but a patch may be joined to any other, not only to a more important one.

    It is Ward's clustering, in rounds: every other group is a candidate, and those that are cheapest to join to one of
    the others are. Joining two costs m_i m_j / (m_i + m_j) |f_i - f_j|^2, with m the mass of a group and f the mean
    of the `features` (B, N, C) of its patches, each at first without its mean and of length 1. The mass of a patch is
    exp(s / `redundancy`), with s its standardised `score` (B, N); with `redundancy` 0 all have the same. Where patches
    lie in a `grid` of rows and columns, how near they are counts a little too.
    """
    standard = normalise_life(score.detach(), 0.0, 1.0)
    weight = power(standard, merge_importance) if merge_importance else None
    mass = (power(standard, 1 / redundancy) if redundancy > 0 else torch.ones_like(standard)).unsqueeze(-1)
    # not by layer_norm: patches that are alike shall tie exactly, so that where they lie decides
    unit = F.normalize(features.float() - features.float().mean(dim=-1, keepdim=True), dim=-1)
    if grid is not None:
        unit = torch.cat((unit, _positions(grid, unit.device).expand(unit.shape[0], -1, -1)), dim=-1)
    # a group is the sum of its patches' features, and its mass
    groups = torch.cat((unit * mass, mass), dim=-1)
    names = place_table(score.shape[1], score.device).expand(score.shape)
    left: list[tuple[Tensor, Tensor]] = []
    for n, stay in itertools.pairwise(planned_counts(counts)):
        gone, heirs = [], place_table(score.shape[1], score.device).expand(score.shape)
        sizes = rounds_of_pairs(n, stay)
        for after in sizes[1:]:
            order, to = _cheapest(groups, groups.shape[1] - after)
            rest, leaving = order[:, :after], order[:, after:]
            to = inverse(order).gather(1, to)
            moved = take_rows(groups, order)
            index = to.unsqueeze(-1).expand(-1, -1, groups.shape[-1])
            groups = moved[:, :after].scatter_add(1, index, moved[:, after:])
            going = names.gather(1, leaving)
            names = names.gather(1, rest)
            heirs = heirs.scatter(1, going, names.gather(1, to))
            gone.append(going)
        # one that left in an earlier round went to one that left in a later one
        for _ in range((len(gone) - 1).bit_length()):
            heirs = heirs.gather(1, heirs)
        leaving = torch.cat(gone[::-1], dim=1)
        left.append((leaving, heirs.gather(1, leaving)))
    order, heirs = (torch.cat((names, *parts[::-1]), dim=1) for parts in zip(*left, strict=True))
    heirs = inverse(order).gather(1, heirs)
    return Plan(order, heirs, None if weight is None else weight.gather(1, order))


def _positions(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Where patches lie, in raster order (N, 2): their squared distances are `NEARNESS` of those in half sides."""

    def make() -> Tensor:
        sides = [torch.arange(n, device=device) - (n - 1) / 2 for n in grid]
        return torch.cartesian_prod(*sides) * (2 * NEARNESS**0.5 / max(1, min(grid) - 1))

    return table(make, "positions", grid, device)


def _cheapest(groups: Tensor, leave: int) -> tuple[Tensor, Tensor]:
    """Places (B, n) of groups (B, n, C + 1), in their order, the `leave` that are cheapest to join last, the dearest of
    them first; and the places (B, leave) of those that these are joined to.
    """
    n = groups.shape[1]
    mass = groups[..., -1:]
    means = groups[..., :-1] / mass
    first, other, one, two = means[:, ::2], means[:, 1::2], mass[:, ::2], mass[:, 1::2].transpose(1, 2)
    square = means.square().sum(dim=-1, keepdim=True)
    apart = torch.baddbmm(square[:, ::2] + square[:, 1::2].transpose(1, 2), first, other.transpose(1, 2), alpha=-2)
    cost, to = (apart * (one * two / (one + two))).min(dim=-1)
    dearest = highest_first(cost)
    leaving = dearest[:, dearest.shape[1] - leave :]
    stays = torch.ones(groups.shape[:2], device=groups.device).scatter(1, 2 * leaving, 0.0)
    rest = highest_first(stays)[:, : n - leave]
    return torch.cat((rest, 2 * leaving), dim=1), 2 * to.gather(1, leaving) + 1
