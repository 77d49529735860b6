"""Patches that left, put back: the partner of heirs. Pure functions on where each patch went.

Shapes: B images, P prefix tokens, N patches, n and m patches before and after some of them leave, D token width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slimcli.errors import SlimError
from slimcli.life.lives import sort_patches

#: how a patch that left gets a feature back. `heir`: that of the token that stands for it. `own`: the one that it had
#: when it left. `last`: its own goes through the last block again, beside the living.
WAYS = ("heir", "own", "last")


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


def living(drops: Sequence[Drop], batch: int, count: int, device: torch.device) -> Tensor:
    """Places (B, n), ascending, of those of `count` patches that are there after `drops`.

    Raises:
        SlimError: where patches were fused into tokens that may live longer: how many patches live then differs.
    """
    places = torch.arange(count, device=device).expand(batch, -1)
    for drop in drops:
        if drop.patches.shape[1] != places.shape[1]:
            raise SlimError("patches were fused into a token that is none: how many live differs from image to image")
        places = places.gather(1, drop.stay)
    return places.sort(dim=1).values


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


def restore(tokens: Tensor, drops: Sequence[Drop], num_prefix_tokens: int, way: str) -> Tensor:
    """Tokens (B, P + n, D) after `drops` to (B, P + N, D): the prefix tokens, and all patches in raster order.

    `way` is one of `WAYS`; "last" is as "own" here.
    """
    if not drops:
        return tokens
    batch, count = drops[0].patches.shape[:2]
    place = torch.arange(count, device=tokens.device).expand(batch, -1)
    own, alive, first = place, torch.ones_like(place, dtype=torch.bool), 0
    for drop in drops:
        leaves = drop.leaves().gather(1, place) & alive
        # a row of all patches before each drop, one drop after the other
        own = torch.where(leaves, first + place, own)
        alive, place, first = alive & ~leaves, drop.afterwards().gather(1, place), first + drop.patches.shape[1]
    now = sort_patches(tokens, place, num_prefix_tokens)
    if way == "heir":
        return now
    left = sort_patches(torch.cat([drop.patches for drop in drops], dim=1), own, 0)
    patches = torch.where(alive.unsqueeze(-1), now[:, num_prefix_tokens:], left)
    return torch.cat((now[:, :num_prefix_tokens], patches), dim=1)


def _placed(stay: Tensor, count: int) -> Tensor:
    """For places `stay` (B, m) of `count`: at which of them each is; 0 for those that are not among them."""
    places = torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
    return torch.zeros(stay.shape[0], count, dtype=stay.dtype, device=stay.device).scatter(1, stay, places)
