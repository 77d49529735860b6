"""Patches that left, put back: the partner of heirs. Pure functions on where each patch went.

Shapes: B images, P prefix tokens, N patches, n and m patches before and after some of them leave, D token width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slimcli.life.lives import sort_patches

#: how a patch that left gets a feature back. `heir`: that of the token that stands for it. `own`: the one that it had
#: when it left. `mix`: its own, moved as its heir has moved since by a map that calibration fits. `last`: its own goes
#: through the last block again, beside the living.
WAYS = ("heir", "own", "mix", "last")


@dataclass(frozen=True)
class Drop:
    """Some patches leave after block `layer`, or are reordered.

    `patches` (B, n, D) are all patches before; `stay` (B, m) the places among them of those that go on, in their new
    order, and `into` (B, n) the place afterwards of the token that each is part of, itself where it stays. `into` is
    None where patches that leave are part of nothing.
    """

    layer: int
    patches: Tensor
    stay: Tensor
    into: Tensor | None = None

    def afterwards(self) -> Tensor:
        """The place afterwards (B, n) of each patch, or of what it is part of; what stays of none is at place 0."""
        if self.into is not None:
            return self.into
        return _placed(self.stay, self.patches.shape[1])

    def leaves(self) -> Tensor:
        """Which patches (B, n) leave, booleans."""
        here = torch.ones(self.patches.shape[:2], dtype=torch.bool, device=self.stay.device)
        return here.scatter(1, self.stay, torch.zeros_like(self.stay, dtype=torch.bool))


class Whereabouts(NamedTuple):
    """Where each of N patches went, all (B, N) in raster order.

    `token`: the place, among the living, of the token that stands for it. `left_after`: the block after which it left;
    the number of blocks where it never did. `weight`: its share in that token, 0 where it is part of none.
    """

    token: Tensor
    left_after: Tensor
    weight: Tensor


def whereabouts(drops: Sequence[Drop], batch: int, count: int, depth: int, device: torch.device) -> Whereabouts:
    """Where `count` patches of `batch` images are after `drops`."""
    token = torch.arange(count, device=device).expand(batch, -1)
    left_after, joined = torch.full_like(token, depth), torch.ones_like(token, dtype=torch.bool)
    for drop in drops:
        leaves = drop.leaves().gather(1, token) & joined
        left_after = left_after.masked_fill(leaves & (left_after == depth), drop.layer)
        if drop.into is None:
            joined = joined & ~leaves
        token = drop.afterwards().gather(1, token)
    size = torch.zeros_like(token, dtype=torch.float32).scatter_add(1, token, joined.float())
    return Whereabouts(token, left_after, joined / size.gather(1, token).clamp(min=1))


def stand_ins(drops: Sequence[Drop], batch: int, count: int, device: torch.device) -> list[tuple[int, Tensor]]:
    """After each block that patches left after: the block, and for each of N patches the one that stands for it.

    Patches (B, N) are named by their place in raster order. A living one stands for itself; -1: none does.
    """
    token = torch.arange(count, device=device).expand(batch, -1)
    itself = joined = torch.ones_like(token, dtype=torch.bool)
    found: dict[int, Tensor] = {}
    for drop in drops:
        leaves = drop.leaves().gather(1, token)
        itself = itself & ~leaves
        joined = joined if drop.into is not None else joined & ~leaves
        token = drop.afterwards().gather(1, token)
        if not leaves.any():
            continue
        names = torch.arange(count, device=device).expand(batch, -1)
        # the living alone name their token; a fused token, which is no patch, has no name
        named = torch.full((batch, count + 1), -1, device=device)
        named = named.scatter(1, token.masked_fill(~itself, count), names)
        found[drop.layer] = named[:, :count].gather(1, token).masked_fill(~joined, -1)
    return list(found.items())


def restore(
    tokens: Tensor, drops: Sequence[Drop], num_prefix_tokens: int, way: str, mix: Tensor | None = None
) -> Tensor:
    """Tokens (B, P + n, D) after `drops` to (B, P + N, D): the prefix tokens, and all patches in raster order.

    `way` is one of `WAYS`; "last" is as "own" here. `mix` (3 D + 1, D) is the map of "mix", see `fit_mix`.
    """
    if not drops:
        return tokens
    batch, count = drops[0].patches.shape[:2]
    place = torch.arange(count, device=tokens.device).expand(batch, -1)
    rows = _rows(drops, place)
    now = sort_patches(tokens, rows.now, num_prefix_tokens)
    if way == "heir":
        return now
    patches = now[:, num_prefix_tokens:]
    own = _taken(drops, rows.own, rows.alive, patches)
    if way == "mix":
        if mix is None:
            raise ValueError("the map of `mix` is not fitted")
        then = _taken(drops, rows.heir, rows.alive, patches)
        moved = moved_with(own, then, patches) @ mix.to(patches.dtype)
        own = torch.where(rows.alive.unsqueeze(-1), patches, own + moved)
    return torch.cat((now[:, :num_prefix_tokens], own), dim=1)


def moved_with(own: Tensor, then: Tensor, now: Tensor) -> Tensor:
    """What the correction of "mix" reads of patches (..., D) that left: (..., 3 D + 1).

    Their own feature and their heir's when they left, and that of the token that stands for them now.
    """
    return torch.cat((own, then, now, torch.ones_like(own[..., :1])), dim=-1)


class _Rows(NamedTuple):
    """Rows (B, N) in raster order: of the living now; of all patches before each drop, one drop after the other."""

    now: Tensor
    own: Tensor
    heir: Tensor
    alive: Tensor


def _rows(drops: Sequence[Drop], place: Tensor) -> _Rows:
    own, heir, alive, first = place, place, torch.ones_like(place, dtype=torch.bool), 0
    for drop in drops:
        leaves = drop.leaves().gather(1, place) & alive
        after = drop.afterwards().gather(1, place)
        own = torch.where(leaves, first + place, own)
        # an heir's place before the drop is that of who stays at its place after it
        heir = torch.where(leaves, first + drop.stay.gather(1, after.clamp(max=drop.stay.shape[1] - 1)), heir)
        alive, place, first = alive & ~leaves, after, first + drop.patches.shape[1]
    return _Rows(place, own, heir, alive)


def _taken(drops: Sequence[Drop], rows: Tensor, alive: Tensor, patches: Tensor) -> Tensor:
    """Features (B, N, D) of patches that left, at `rows` of what was before each drop; of the living, `patches`."""
    before = torch.cat([drop.patches for drop in drops], dim=1)
    found = sort_patches(before, rows, 0)
    return torch.where(alive.unsqueeze(-1), patches, found)


def _placed(stay: Tensor, count: int) -> Tensor:
    """For places `stay` (B, m) of `count`: at which of them each is; 0 for those that are not among them."""
    places = torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
    return torch.zeros(stay.shape[0], count, dtype=stay.dtype, device=stay.device).scatter(1, stay, places)
