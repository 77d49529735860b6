"""ToMe: the most similar tokens are merged, a few in every block.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.attention import AttentionRecorder, biased_attention
from slimcli.errors import SlimError
from slimcli.life import add_rows, highest_first, prefix_bias, sort_patches, take_rows
from slimcli.methods.base import backbone_cost
from slimcli.methods.by_cost import ByCost
from slimcli.schedule import Schedule


@final
class ToMe(ByCost):
    """In every block, between attention and MLP, the r most similar pairs of a bipartite matching are merged.

    Similarity is the cosine of the keys, averaged over heads. A merged token is the mean of the patches it stands
    for, and counts as that many keys: attention adds log(size). Its schedule is N_1..N_L, so that the r of every
    block can differ by one and any cost can be met; the last block merges as many as the one before.
    """

    method = "tome"
    merges = True

    def _fitted(self, schedule: Schedule) -> Schedule:
        schedule = super()._fitted(schedule)
        if schedule.counts is None:
            return schedule
        for layer, (n, r) in enumerate(zip(schedule.counts, merges(schedule.counts), strict=True), 1):
            if r > n // 2:
                raise SlimError(f"tome merges at most {n // 2} of {n} patches in block {layer}: {r} is not possible")
        return schedule

    def refusal(self) -> str | None:
        if self._facts.positions:
            return "a merged token has no place for its rotary or relative positions"
        if self._facts.key_channels is None:
            return "its blocks do not use torch's scaled_dot_product_attention, where keys are read"
        return None

    def schedule_for_cost(self, target: float) -> Schedule:
        """The schedule nearest below `target` in which the merges of any two blocks differ by one at most."""
        depth, n = self.backbone.depth, self.num_patches
        low, high = 0, depth * (n // 2)
        if self.cost(even_schedule(depth, n, high)) > target:
            raise SlimError(f"the method {self.method} cannot cost as little as {target / 1e9:.3g} G multiply-adds")
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.cost(even_schedule(depth, n, middle)) <= target else (middle + 1, high)
        if low == 0:
            return even_schedule(depth, n, 0)
        near = [even_schedule(depth, n, total, shift) for total in (low - 1, low) for shift in range(depth) if total]
        return max((s for s in near if self.cost(s) <= target), key=self.cost)

    def cost(self, schedule: Schedule | None) -> int:
        architecture, facts = self.architecture(), self._facts
        if schedule is None or not schedule.drops_patches():
            return architecture.multiply_adds()
        counts = schedule.resolve(architecture.num_patches)
        total = backbone_cost(architecture, counts)
        total -= architecture.head_per_patch * merges(counts)[-1]
        for layer, (n, r) in enumerate(zip(counts, merges(counts), strict=True), 1):
            if r > 0:
                even, odd = sides(n, architecture.num_prefix_tokens)
                total += even * odd * (facts.key_channels or 0)
                if facts.mlp_weights is not None:
                    total -= facts.mlp_weights[layer - 1] * r
        return total

    def slimmed(
        self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        prefix = self.backbone.num_prefix_tokens
        size = torch.ones(tokens.shape[0], counts[0], device=tokens.device)
        bias: Tensor | None = None
        for layer, r in enumerate(merges(counts), 1):
            if r == 0:
                tokens = self._block(layer, tokens, None, bias)
                continue
            attention, mlp = self.backbone.halves(layer) or (partial(self.backbone.block, layer), _nothing)
            seen = AttentionRecorder()
            with biased_attention(bias, kernel=self.backbone.attention), seen:
                tokens = attention(tokens)
            if seen.key is None:
                raise SlimError("a block that used scaled_dot_product_attention before does not any more")
            match = matching(seen.key.detach().mean(dim=1)[:, prefix:], r, prefix)
            if self._trail is not None:
                self._follow(layer, tokens, *merged_places(match))
            tokens, size = merge(tokens, size, match, prefix)
            tokens = mlp(tokens)
            if self._trail is not None:
                self._trail.after(layer, tokens)
            bias = prefix_bias(size.log(), prefix)
        return tokens, bias


def _nothing(tokens: Tensor) -> Tensor:
    return tokens


class Matching(NamedTuple):
    """Which patches of a sequence become one: places among the n patches.

    `source` (B, r) are merged into the `target`-th (B, r) of the `others` (m,); `rest` (B, n - m - r) are left alone.
    """

    source: Tensor
    target: Tensor
    others: Tensor
    rest: Tensor


def sides(num_patches: int, prefix: int) -> tuple[int, int]:
    """Patches on the two sides of the matching: those at even places of the whole sequence, and those at odd ones."""
    even = (num_patches + 1 - prefix % 2) // 2
    return even, num_patches - even


def merges(counts: Sequence[int]) -> tuple[int, ...]:
    """r_1..r_L of N_1..N_L; the last block merges as many as the one before, at most half."""
    falls = [before - after for before, after in itertools.pairwise(counts)]
    return (*falls, min(falls[-1], counts[-1] // 2) if falls else 0)


def even_schedule(depth: int, num_patches: int, total: int, shift: int = 0) -> Schedule:
    """N_1..N_L with `total` merges spread evenly over all blocks, none of which merges more than half.

    Where they do not come out even, a larger `shift` (under `depth`) puts what is over into earlier blocks.
    """
    counts = [num_patches]
    for layer in range(1, depth):
        r = (total * layer + shift) // depth - (total * (layer - 1) + shift) // depth
        counts.append(counts[-1] - min(r, counts[-1] // 2))
    return Schedule(depth, 1, counts=tuple(counts))


def matching(metric: Tensor, r: int, prefix: int) -> Matching:
    """Bipartite soft matching of patches by `metric` (B, n, C): the r best pairs.

    Tokens of the whole sequence are dealt to two sides in turn, so with an odd number of prefix tokens the first
    patch stands at an odd place. Every even one is paired with the odd one of highest cosine.
    """
    first = prefix % 2
    unit = F.normalize(metric, dim=-1)
    best, partner = (unit[:, first::2] @ unit[:, 1 - first :: 2].transpose(1, 2)).max(dim=-1)
    order = highest_first(best)
    source, rest = order[:, :r], order[:, r:]
    if prefix:
        # as published: with a class token, those left alone stay in their order
        rest = rest.sort(dim=-1).values
    others = torch.arange(1 - first, metric.shape[1], 2, device=metric.device)
    return Matching(2 * source + first, partner.gather(1, source), others, 2 * rest + first)


def merged_places(match: Matching) -> tuple[Tensor, Tensor]:
    """Places of patches that stay (B, n - r) in a merge, in their new order, and where all (B, n) are after it."""
    stay = torch.cat((match.rest, match.others.expand(match.rest.shape[0], -1)), dim=1)
    places = torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
    into = stay.new_zeros(stay.shape[0], stay.shape[1] + match.source.shape[1]).scatter(1, stay, places)
    return stay, into.scatter(1, match.source, match.target + match.rest.shape[1])


def merge(tokens: Tensor, size: Tensor, match: Matching, prefix: int) -> tuple[Tensor, Tensor]:
    """Merge tokens (B, P + n, D) and the sizes (B, n) of their patches: (B, P + n - r, D) and (B, n - r).

    The new order is prefix tokens, patches left alone, patches of the other side.
    """
    others = match.others.expand(tokens.shape[0], -1)
    stay = torch.cat((match.rest, others), dim=1)
    weight = size.gather(1, stay)
    place = match.target + match.rest.shape[1]
    added = size.gather(1, match.source)
    total = weight.scatter_add(1, place, added)
    kept = sort_patches(tokens, stay, prefix)
    merged = take_rows(tokens, match.source + prefix)
    # a mean weighted by size: rows that take nothing in keep the weight 1
    kept = kept * F.pad(weight / total, (prefix, 0), value=1.0).unsqueeze(-1).to(tokens.dtype)
    merged = merged * (added / total.gather(1, place)).unsqueeze(-1).to(tokens.dtype)
    return add_rows(kept, place + prefix, merged), total
