"""Bipartite soft matching of patches, and a number of merges that is the same in every block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.attention import AttentionRecorder
from slimcli.life import highest_first
from slimcli.methods.by_cost import ByStrength
from slimcli.methods.merging import Merge, Merging, check_half, merges
from slimcli.schedule import Schedule


def sides(num_patches: int, prefix: int) -> tuple[int, int]:
    """Patches on the two sides of the matching: those at even places of the whole sequence, and those at odd ones."""
    even = (num_patches + 1 - prefix % 2) // 2
    return even, num_patches - even


def even_schedule(depth: int, num_patches: int, total: int, shift: int = 0) -> Schedule:
    """N_1..N_L with `total` merges spread evenly over all blocks, none of which merges more than half.

    Where they do not come out even, a larger `shift` (under `depth`) puts what is over into earlier blocks.
    """
    counts = [num_patches]
    for layer in range(1, depth):
        r = (total * layer + shift) // depth - (total * (layer - 1) + shift) // depth
        counts.append(counts[-1] - min(r, counts[-1] // 2))
    return Schedule(depth, 1, counts=tuple(counts))


def matching(metric: Tensor, r: int, prefix: int) -> Merge:
    """Bipartite soft matching of patches by `metric` (B, n, C): the r best pairs.

    Tokens of the whole sequence are dealt to two sides in turn, so with an odd number of prefix tokens the first
    patch stands at an odd place. Every even one is paired with the odd one of highest cosine. The new order is patches
    left alone, then those of the other side.
    """
    first = prefix % 2
    unit = F.normalize(metric, dim=-1)
    best, partner = (unit[:, first::2] @ unit[:, 1 - first :: 2].transpose(1, 2)).max(dim=-1)
    order = highest_first(best)
    source, rest = order[:, :r], order[:, r:]
    if prefix:
        # as published: with a class token, those left alone stay in their order
        rest = rest.sort(dim=-1).values
    others = torch.arange(1 - first, metric.shape[1], 2, device=metric.device).expand(metric.shape[0], -1)
    stay = torch.cat((2 * rest + first, others), dim=1)
    return Merge(stay, 2 * source + first, partner.gather(1, source) + rest.shape[1])


class PairMerging(ByStrength, Merging):
    """In every block the r most similar pairs of the matching become one patch each; r is spread evenly over blocks.

    Similarity is the cosine of the keys, averaged over heads.
    """

    @property
    def strongest(self) -> int:
        return self.backbone.depth * (self.num_patches // 2)

    def forms(self, strength: int) -> Sequence[Schedule]:
        depth = self.backbone.depth
        return [even_schedule(depth, self.num_patches, strength, shift) for shift in range(depth if strength else 1)]

    def check_counts(self, counts: Sequence[int]) -> None:
        check_half(self.method, counts)

    def leaving(self, counts: Sequence[int]) -> tuple[int, ...]:
        return merges(counts)

    def match(self, layer: int, tokens: Tensor, seen: AttentionRecorder, bias: Tensor | None, r: int) -> Merge:
        return matching(self.keys(seen), r, self.backbone.num_prefix_tokens)

    def match_cost(self, num_patches: int, r: int) -> int:
        even, odd = sides(num_patches, self.backbone.num_prefix_tokens)
        return even * odd * (self._facts.key_channels or 0)
