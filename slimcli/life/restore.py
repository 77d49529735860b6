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
from slimcli.life.lives import inverse, sort_patches, take_rows
from slimcli.life.tables import place_table

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


@dataclass(frozen=True)
class Cut:
    """Of patches (B, n, D) in the order in which they leave, the last first, `kept` go on after block `layer`.

    `heirs` (B, N), in the order of all N patches that were there at first: the place of what each becomes part of, one
    that stays when it leaves; None: of nothing.
    """

    layer: int
    patches: Tensor
    kept: int
    heirs: Tensor | None = None

    @property
    def stay(self) -> Tensor:
        """As `Drop` has it."""
        return self._places[:, : self.kept]

    @property
    def into(self) -> Tensor | None:
        """As `Drop` has it."""
        places = self._places
        if self.heirs is None:
            return None
        return torch.cat((places[:, : self.kept], self.heirs[:, self.kept : places.shape[1]]), dim=1)

    @property
    def _places(self) -> Tensor:
        batch, n = self.patches.shape[:2]
        return torch.arange(n, device=self.patches.device).expand(batch, -1)


Drops = Sequence[Drop | Cut]


def _afterwards(drop: Drop | Cut) -> Tensor:
    """The place afterwards (B, n) of each patch, or of what it is part of; what stays of none is at place 0."""
    into = drop.into
    return _placed(drop.stay, drop.patches.shape[1]) if into is None else into


def _leaves(drop: Drop | Cut) -> Tensor:
    """Which patches (B, n) leave, booleans."""
    stay = drop.stay
    here = torch.ones(drop.patches.shape[:2], dtype=torch.bool, device=stay.device)
    return here.scatter(1, stay, torch.zeros_like(stay, dtype=torch.bool))


class Whereabouts(NamedTuple):
    """Where each of N patches went, all (B, N) in raster order.

    `token`: the place, among the living, of the token that stands for it. `left_after`: the block after which it left;
    the number of blocks where it never did. `weight`: its share in that token, 0 where it is part of none.
    """

    token: Tensor
    left_after: Tensor
    weight: Tensor


def whereabouts(drops: Drops, batch: int, count: int, depth: int, device: torch.device) -> Whereabouts:
    """Where `count` patches of `batch` images are after `drops`."""
    token = torch.arange(count, device=device).expand(batch, -1)
    left_after, joined = torch.full_like(token, depth), torch.ones_like(token, dtype=torch.bool)
    for drop in drops:
        leaves = _leaves(drop).gather(1, token) & joined
        left_after = left_after.masked_fill(leaves & (left_after == depth), drop.layer)
        if drop.into is None:
            joined = joined & ~leaves
        token = _afterwards(drop).gather(1, token)
    size = torch.zeros_like(token, dtype=torch.float32).scatter_add(1, token, joined.float())
    return Whereabouts(token, left_after, joined / size.gather(1, token).clamp(min=1))


def living(drops: Drops, batch: int, count: int, device: torch.device) -> Tensor:
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


def stand_ins(drops: Drops, batch: int, count: int, device: torch.device) -> list[tuple[int, Tensor]]:
    """After each block that patches left after: the block, and for each of N patches the one that stands for it.

    Patches (B, N) are named by their place in raster order. A living one stands for itself; -1: none does.
    """
    token = torch.arange(count, device=device).expand(batch, -1)
    itself = joined = torch.ones_like(token, dtype=torch.bool)
    found: dict[int, Tensor] = {}
    for drop in drops:
        leaves = _leaves(drop).gather(1, token)
        itself = itself & ~leaves
        joined = joined if drop.into is not None else joined & ~leaves
        token = _afterwards(drop).gather(1, token)
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


def _places(drops: Drops, with_beside: bool) -> _Places:
    batch, count = drops[0].patches.shape[:2]
    place = torch.arange(count, device=drops[0].stay.device).expand(batch, -1)
    left, gone = place, torch.full_like(place, len(drops))
    alive, first = torch.ones_like(place, dtype=torch.bool), 0
    for number, drop in enumerate(drops):
        leaves = _leaves(drop).gather(1, place) & alive
        left = torch.where(leaves, first + place, left)
        gone = gone.masked_fill(leaves, number)
        alive, place, first = alive & ~leaves, _afterwards(drop).gather(1, place), first + drop.patches.shape[1]
    beside = there = place
    for number, drop in reversed(list(enumerate(drops)) if with_beside else []):
        first -= drop.patches.shape[1]
        there = drop.stay.gather(1, there)
        beside = torch.where(gone == number, first + there, beside)
    return _Places(place, left, beside, gone)


def restore(tokens: Tensor, drops: Drops, num_prefix_tokens: int, way: str, correct: Correct | None = None) -> Tensor:
    """Tokens (B, P + n, D) after `drops` to (B, P + N, D): the prefix tokens, and all patches in raster order.

    `way` is one of `WAYS`; "last" is as "own" here. "mix" needs `correct`.
    """
    if not drops:
        return tokens
    order, cuts = _in_order(drops)
    if cuts:
        there = _stands_for(cuts, tokens.shape[1] - num_prefix_tokens)
        back = None if order is None else inverse(order)
        if way == "heir":
            return sort_patches(tokens, there if back is None else there.gather(1, back), num_prefix_tokens)
        left = _left(tokens[:, num_prefix_tokens:], there, cuts, correct if way == "mix" else None)
        tokens = torch.cat((tokens, left), dim=1)
        return tokens if back is None else sort_patches(tokens, back, num_prefix_tokens)
    if way == "mix":
        assert correct is not None
        found = mixture(tokens, drops, num_prefix_tokens)
        assert found.gone is not None
        patches = found.now + correct(found) * found.gone.unsqueeze(-1)
        return torch.cat((tokens[:, :num_prefix_tokens], patches), dim=1)
    places = _places(drops, with_beside=False)
    now = sort_patches(tokens, places.now, num_prefix_tokens)
    if way == "heir":
        return now
    left = sort_patches(torch.cat([drop.patches for drop in drops], dim=1), places.left, 0)
    alive = places.drop == len(drops)
    patches = torch.where(alive.unsqueeze(-1), now[:, num_prefix_tokens:], left)
    return torch.cat((now[:, :num_prefix_tokens], patches), dim=1)


def _in_order(drops: Drops) -> tuple[Tensor | None, list[Cut]]:
    """The order (B, N) that all patches were put in, None for their own, and the cuts of those with heirs after that.

    No cuts where patches leave in another way.
    """
    order, later = None, drops
    if isinstance(drops[0], Drop) and drops[0].stay.shape[1] == drops[0].patches.shape[1]:
        order, later = drops[0].stay, drops[1:]
    cuts = [drop for drop in later if isinstance(drop, Cut) and drop.heirs is not None]
    # one plan for all of them
    alike = len(cuts) == len(later) and all(cut.heirs is cuts[0].heirs for cut in cuts)
    return order, cuts if alike else []


def _stands_for(cuts: Sequence[Cut], count: int) -> Tensor:
    """The place (B, N) among the `count` that stay of what stands for each patch, in the order in which they leave."""
    heirs = cuts[0].heirs
    assert heirs is not None
    places = place_table(heirs.shape[1], heirs.device)
    found = torch.where(places < count, places, heirs)
    for _ in range((len(cuts) - 1).bit_length()):
        found = found.gather(1, found)
    return found


def _left(living: Tensor, there: Tensor, cuts: Sequence[Cut], correct: Correct | None) -> Tensor:
    """Patches (B, N - m, D) that left by `cuts`, in order, given those (B, m, D) that did not: as they were, or mixed.

    `there` (B, N) is the place of what stands for each. How many leave when is the same for all images, so that only
    those that left are looked for, each once.
    """
    own = torch.cat([cut.patches[:, cut.kept :] for cut in reversed(cuts)], dim=1)
    if correct is None:
        return own
    then = [take_rows(cut.patches, there[:, cut.kept : cut.patches.shape[1]]) for cut in reversed(cuts)]
    now = take_rows(living, there[:, living.shape[1] :])
    return now + correct(Mixture(own, torch.cat(then, dim=1), now, None))


class Mixture(NamedTuple):
    """What a patch is mixed of, in raster order.

    `own` (B, N, D): its feature when it left. `then` (B, N, D): that of what stands for it now, at the same time. `now`
    (B, N, D): that of what stands for it, now; for a living patch its own. `gone` (B, N): whether it left; where it did
    not, the first two mean nothing. None: all left.
    """

    own: Tensor
    then: Tensor
    now: Tensor
    gone: Tensor | None


#: a mixture to what features (B, N, D) of what stands for patches lack to be theirs
Correct = Callable[[Mixture], Tensor]


def mixture(tokens: Tensor, drops: Drops, num_prefix_tokens: int) -> Mixture:
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
