"""What merging methods share: in a block, between attention and MLP, some patches become part of others."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.attention import AttentionRecorder, biased_attention
from slimcli.errors import SlimError
from slimcli.life import add_rows, prefix_bias, sort_patches, take_rows
from slimcli.methods.base import Method, backbone_cost
from slimcli.schedule import Schedule


class Merge(NamedTuple):
    """Which patches of a sequence become one: places among the n patches.

    Those at `stay` (B, m) go on, in that order. Those at `source` (B, r) each become part of the patch that stands at
    `place` (B, r) in `stay`, to which it is `alike` (B, r) where a rule needs that. A patch that is in neither is gone.
    """

    stay: Tensor
    source: Tensor
    place: Tensor
    alike: Tensor | None = None


class Merging(Method):
    """A rule by which patches are merged with others.

    A merged token is the mean of the patches it stands for, and counts as that many keys: attention adds log(size).
    """

    merges = True
    follows = True
    #: whether attention adds log(size)
    proportional: ClassVar[bool] = True

    @abstractmethod
    def leaving(self, counts: Sequence[int]) -> tuple[int, ...]:
        """How many patches are taken out in each block under N_1..N_L; those of the last block enter no other."""

    @abstractmethod
    def match(self, layer: int, tokens: Tensor, seen: AttentionRecorder, bias: Tensor | None, r: int) -> Merge:
        """Which r patches of `tokens` (B, P + n, D), after the attention of block `layer`, become part of which.

        `seen` are the queries and keys (B, H, P + n, d) of that attention, `bias` (B, P + n) what was added to its
        keys.
        """

    @abstractmethod
    def match_cost(self, num_patches: int, r: int) -> int:
        """Multiply-adds of `match` on n patches, of an image."""

    def refusal(self) -> str | None:
        if self._facts.positions:
            return "a merged token has no place for its rotary or relative positions"
        if self._facts.key_channels is None:
            return "its blocks do not use torch's scaled_dot_product_attention, where keys are read"
        return None

    def cost(self, schedule: Schedule | None) -> int:
        architecture, facts = self.architecture(), self._facts
        if schedule is None or not schedule.drops_patches():
            return architecture.multiply_adds()
        counts = schedule.resolve(architecture.num_patches)
        leaving = self.leaving(counts)
        total = backbone_cost(architecture, counts) - architecture.head_per_patch * leaving[-1]
        for layer, (n, r) in enumerate(zip(counts, leaving, strict=True), 1):
            if r > 0:
                total += self.match_cost(n, r)
                if facts.mlp_weights is not None:
                    total -= facts.mlp_weights[layer - 1] * r
        return total

    def slimmed(
        self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        size = torch.ones(tokens.shape[0], counts[0], device=tokens.device)
        bias: Tensor | None = None
        for layer, r in enumerate(self.leaving(counts), 1):
            if r == 0:
                tokens = self._block(layer, tokens, None, bias)
                continue
            attention, mlp = self.backbone.halves(layer) or (partial(self.backbone.block, layer), _nothing)
            seen = AttentionRecorder()
            with biased_attention(bias, kernel=self.backbone.attention), seen:
                tokens = attention(tokens)
            if seen.key is None:
                raise SlimError("a block that used scaled_dot_product_attention before does not any more")
            with torch.no_grad():
                found = self.match(layer, tokens.detach(), seen, bias, r)
            if self._trail is not None:
                self._follow_merge(layer, tokens, found)
            tokens, size = self.merged(layer, tokens, size, found)
            tokens = mlp(tokens)
            if self._trail is not None:
                self._trail.after(layer, tokens)
            bias = prefix_bias(size.log(), self.backbone.num_prefix_tokens) if self.proportional else None
        return tokens, bias

    def _follow_merge(self, layer: int, tokens: Tensor, found: Merge) -> None:
        assert self._trail is not None
        there = torch.cat((found.stay, found.source), dim=1)
        self._trail.drop(layer, tokens, there)
        sorted_tokens = sort_patches(tokens, there, self.backbone.num_prefix_tokens)
        heirs = torch.cat((found.stay, found.place), dim=1)
        self._trail.cut(layer, sorted_tokens, found.stay.shape[1], heirs)

    def merged(self, layer: int, tokens: Tensor, size: Tensor, found: Merge) -> tuple[Tensor, Tensor]:
        """Tokens (B, P + n, D) and the sizes (B, n) of their patches after the merge; means are weighted by size."""
        return merge(tokens, size, found, self.backbone.num_prefix_tokens)

    def keys(self, seen: AttentionRecorder) -> Tensor:
        """Keys of the patches, averaged over heads: (B, n, d)."""
        assert seen.key is not None
        return seen.key.detach().mean(dim=1)[:, self.backbone.num_prefix_tokens :]


def _nothing(tokens: Tensor) -> Tensor:
    return tokens


def merge(tokens: Tensor, size: Tensor, found: Merge, prefix: int) -> tuple[Tensor, Tensor]:
    """Merge tokens (B, P + n, D) and the sizes (B, n) of their patches: (B, P + m, D) and (B, m)."""
    weight = size.gather(1, found.stay)
    added = size.gather(1, found.source)
    total = weight.scatter_add(1, found.place, added)
    kept = sort_patches(tokens, found.stay, prefix)
    merged = take_rows(tokens, found.source + prefix)
    # a mean weighted by size: rows that take nothing in keep the weight 1
    kept = kept * F.pad(weight / total, (prefix, 0), value=1.0).unsqueeze(-1).to(tokens.dtype)
    merged = merged * (added / total.gather(1, found.place)).unsqueeze(-1).to(tokens.dtype)
    return add_rows(kept, found.place + prefix, merged), total


def falls(counts: Sequence[int]) -> tuple[int, ...]:
    """How many patches leave after each of the blocks but the last under N_1..N_L."""
    return tuple(before - after for before, after in itertools.pairwise(counts))


def merges(counts: Sequence[int]) -> tuple[int, ...]:
    """r_1..r_L of N_1..N_L; the last block merges as many as the one before, at most half."""
    each = falls(counts)
    return (*each, min(each[-1], counts[-1] // 2) if each else 0)


def check_half(method: str, counts: Sequence[int]) -> None:
    """`SlimError` for N_1..N_L in which a block would merge more than half of its patches."""
    for layer, (n, r) in enumerate(zip(counts, merges(counts), strict=True), 1):
        if r > n // 2:
            raise SlimError(f"{method} merges at most {n // 2} of {n} patches in block {layer}: {r} is not possible")


def likest(tokens: Tensor, stay: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine (B, r), at least 0, and place in `stay` (B, m) of the token most like each of `source` (B, r)."""
    unit = F.normalize(tokens.float(), dim=-1)
    best, place = (take_rows(unit, source) @ take_rows(unit, stay).transpose(1, 2)).max(dim=-1)
    return best.clamp(min=0), place


def mean_into(
    kept: Tensor, kept_size: Tensor, more: Tensor, more_size: Tensor, place: Tensor, prefix: int
) -> tuple[Tensor, Tensor]:
    """Tokens (B, P + m, D) as plain means of themselves and `more` (B, r, D) at `place` (B, r); sizes add up."""
    ones = torch.ones(kept.shape[:2], device=kept.device)
    count = ones.scatter_add(1, place + prefix, ones.new_ones(place.shape))
    mean = add_rows(kept, place + prefix, more) / count.unsqueeze(-1).to(kept.dtype)
    return mean, kept_size.scatter_add(1, place, more_size.to(kept_size.dtype))
