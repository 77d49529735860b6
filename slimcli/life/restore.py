"""Patches that left, put back: the partner of heirs. Pure functions on where each patch went.

Shapes: B images, P prefix tokens, N patches, n and m patches before and after some of them leave, D token width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slimcli.errors import SlimError
from slimcli.life.lives import sort_patches, take_rows

#: how a patch that left gets a feature back. `heir`: that of the token that stands for it. `own`: the one that it had
#: when it left. `mix`: its heir's, plus a correction that was learnt from both. `last`: its own, or the mix where
#: that was learnt, goes through the last block again, beside the living.
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


class _Places(NamedTuple):
    """Where to find what each of N patches is made of again, all (B, N) in raster order.

    `now`: the place among the living of what stands for it. `left`: where it was when it left, and `beside`: where what
    stands for it was then, in the rows of all patches before each drop, one drop after the other. `drop`: the number of
    the drop that it left with; that of all drops where it never did.
    """

    now: Tensor
    left: Tensor
    beside: Tensor
    drop: Tensor


def _places(drops: Sequence[Drop], with_beside: bool) -> _Places:
    batch, count = drops[0].patches.shape[:2]
    place = torch.arange(count, device=drops[0].stay.device).expand(batch, -1)
    left, gone = place, torch.full_like(place, len(drops))
    alive, first = torch.ones_like(place, dtype=torch.bool), 0
    for number, drop in enumerate(drops):
        leaves = drop.leaves().gather(1, place) & alive
        left = torch.where(leaves, first + place, left)
        gone = gone.masked_fill(leaves, number)
        alive, place, first = alive & ~leaves, drop.afterwards().gather(1, place), first + drop.patches.shape[1]
    beside = there = place
    for number, drop in reversed(list(enumerate(drops)) if with_beside else []):
        first -= drop.patches.shape[1]
        there = drop.stay.gather(1, there)
        beside = torch.where(gone == number, first + there, beside)
    return _Places(place, left, beside, gone)


def restore(
    tokens: Tensor, drops: Sequence[Drop], num_prefix_tokens: int, way: str, correct: Correct | None = None
) -> Tensor:
    """Tokens (B, P + n, D) after `drops` to (B, P + N, D): the prefix tokens, and all patches in raster order.

    `way` is one of `WAYS`; "last" is as "own" here. "mix" needs `correct`.
    """
    if not drops:
        return tokens
    if way == "mix":
        assert correct is not None
        found = mixture(tokens, drops, num_prefix_tokens)
        return torch.cat((tokens[:, :num_prefix_tokens], correct(found)), dim=1)
    places = _places(drops, with_beside=False)
    now = sort_patches(tokens, places.now, num_prefix_tokens)
    if way == "heir":
        return now
    left = sort_patches(torch.cat([drop.patches for drop in drops], dim=1), places.left, 0)
    alive = places.drop == len(drops)
    patches = torch.where(alive.unsqueeze(-1), now[:, num_prefix_tokens:], left)
    return torch.cat((now[:, :num_prefix_tokens], patches), dim=1)


class Mixture(NamedTuple):
    """What a patch is mixed of, in raster order.

    `own` (B, N, D): its feature when it left. `then` (B, N, D): that of what stands for it now, at the same time. `now`
    (B, N, D): that of what stands for it, now; for a living patch its own. `gone` (B, N): whether it left; where it did
    not, the first two mean nothing.
    """

    own: Tensor
    then: Tensor
    now: Tensor
    gone: Tensor


#: a mixture to features (B, N, D) of all patches
Correct = Callable[[Mixture], Tensor]


def mixture(tokens: Tensor, drops: Sequence[Drop], num_prefix_tokens: int) -> Mixture:
    """Of tokens (B, P + n, D) after `drops`, one at least: what each patch is mixed of, in one gather."""
    places = _places(drops, with_beside=True)
    rows = torch.cat([*(drop.patches for drop in drops), tokens[:, num_prefix_tokens:]], dim=1)
    last = sum(drop.patches.shape[1] for drop in drops)
    taken = take_rows(rows, torch.cat((places.left, places.beside, last + places.now), dim=1))
    own, then, now = taken.chunk(3, dim=1)
    return Mixture(own, then, now, places.drop < len(drops))


def _placed(stay: Tensor, count: int) -> Tensor:
    """For places `stay` (B, m) of `count`: at which of them each is; 0 for those that are not among them."""
    places = torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
    return torch.zeros(stay.shape[0], count, dtype=stay.dtype, device=stay.device).scatter(1, stay, places)
