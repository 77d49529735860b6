"""DiffRate: how many patches each block prunes and merges is learned, with the weights frozen.

Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimcli.attention import NEVER, AttentionRecorder
from slimcli.errors import SlimError
from slimcli.life import prefix_bias, sort_patches, take_rows
from slimcli.methods.base import backbone_cost
from slimcli.methods.dynamicvit import PolicyAttention
from slimcli.methods.evit import class_attention
from slimcli.methods.merging import Merge, Merging, likest, mean_into
from slimcli.methods.rates import Rates, least
from slimcli.methods.slim_model import SlimModel
from slimcli.schedule import Schedule

#: weight of the squared distance of the cost from its target, both in shares of the dense model's cost. As published it
#: is 5 for costs in G multiply-adds: this is the same for DeiT-S with its 4.6 G.
COST_WEIGHT = 5 * 4.6**2

#: for each block, how many patches are left after pruning, and then after merging
Kept = tuple[tuple[int, int], ...]


class Known(NamedTuple):
    """What `Kept` was found for, and what it is."""

    key: tuple[Any, ...]
    kept: Kept


@final
class DiffRate(Merging):
    """In every block but the first, between attention and MLP, patches are sorted by class attention; the last are
    pruned, and the last of those that are left each merge with the patch of highest cosine before them.

    How many is learned in mode `soft`, where nothing leaves: the patches that are to go are masked, and the mask hands
    its gradient to the probability of every number of patches. `own_loss` holds the cost to that of the schedule. In
    mode `hard` the schedule is a cost alone: the learned falls, all longer or shorter by one factor, meet it.
    """

    method = "diffrate"
    modes = ("none", "soft", "hard")
    selector_name = "rates"
    by_cost = True
    rates: Rates
    _known: Known | None = None
    #: of the last forward pass in mode `soft`: its cost, with a gradient, and the target
    _costs: tuple[Tensor, float] | None = None

    def _make_selector(self, schedule: Schedule) -> nn.Module:
        return Rates(self.backbone.depth, self.num_patches)

    @classmethod
    def taught_in(cls) -> tuple[tuple[str, str], ...]:
        return (("life", "soft"), ("backbone", "hard"))

    def refusal(self) -> str | None:
        if self.backbone.global_token != "cls":
            return "it ranks patches by the class token's attention, and this model has no class token in its blocks"
        if self._facts.biased:
            return "its attention adds relative positions to queries and keys, and class attention is read from those"
        return super().refusal()

    def kept(self, counts: Sequence[int]) -> Kept:
        """How many patches each block keeps, at the cost of life regression under N_1..N_L."""
        # a graph is recorded after its numbers are known
        recorded = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        if recorded and self._known is not None and self._known.key[0] == tuple(counts):
            return self._known.kept
        logits = self.rates.logits
        key = (tuple(counts), self.architecture(), id(logits), 0 if logits.is_inference() else logits._version)
        if self._known is None or self._known.key != key:
            self._known = Known(key, self._within(self.architecture().multiply_adds(counts), counts[0]))
        return self._known.kept

    def train(self, mode: bool = True) -> DiffRate:
        super().train(mode)
        if not mode:
            self.kept(self.patches_per_layer)
        return self

    def _fitted(self, schedule: Schedule) -> Schedule:
        schedule = super()._fitted(schedule)
        self.kept(schedule.resolve(self.num_patches))
        return schedule

    def _within(self, target: float, num_patches: int) -> Kept:
        """The learned falls from `num_patches`, by the factor at which they cost most, and at most `target`."""
        shares = self.rates.shares().tolist()

        def scaled(factor: float) -> Kept:
            found, n = [], num_patches
            for pruned, merged in shares:
                p = min(n, max(1, math.ceil(num_patches * (1 - factor * (1 - pruned)) - 1e-6)))
                n = min(p, max(1, math.ceil(num_patches * (1 - factor * (1 - merged)) - 1e-6)))
                found.append((p, n))
            return tuple(found)

        low, high = 0.0, 1.0
        while self._cost(scaled(high), num_patches) > target and high < num_patches:
            low, high = high, 2 * high
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if self._cost(scaled(middle), num_patches) > target else (low, middle)
        return scaled(high)

    def patches_used(self, schedule: Schedule) -> tuple[int, ...]:
        counts = schedule.resolve(self.num_patches)
        return (counts[0], *(n for _, n in self.kept(counts)[:-1])) if schedule.drops_patches() else counts

    def cost(self, schedule: Schedule | None) -> int:
        if schedule is None or not schedule.drops_patches():
            return self.architecture().multiply_adds()
        counts = schedule.resolve(self.num_patches)
        return self._cost(self.kept(counts), counts[0])

    def _cost(self, kept: Kept, num_patches: int) -> int:
        architecture, facts = self.architecture(), self._facts
        used = (num_patches, *(n for _, n in kept))
        total = backbone_cost(architecture, used[:-1]) - architecture.head_per_patch * (used[-2] - used[-1])
        for layer, (n, (pruned, merged)) in enumerate(zip(used, kept, strict=False), 1):
            if merged < n:
                # the class token's row of attention, and the cosines of those that merge with those that stay
                tokens = n + architecture.num_prefix_tokens
                total += tokens * (architecture.attention_dim or architecture.embed_dim)
                total += (pruned - merged) * merged * architecture.embed_dim
                if facts.mlp_weights is not None:
                    total -= facts.mlp_weights[layer - 1] * (n - merged)
        return total

    def leaving(self, counts: Sequence[int]) -> tuple[int, ...]:
        kept = self.kept(counts)
        before = (counts[0], *(n for _, n in kept))
        return tuple(n - after for n, (_, after) in zip(before, kept, strict=False))

    def match_cost(self, num_patches: int, r: int) -> int:
        raise NotImplementedError("the cost of a match depends on how many are pruned: `cost` adds it")

    def match(self, layer: int, tokens: Tensor, seen: AttentionRecorder, bias: Tensor | None, r: int) -> Merge:
        prefix = self.backbone.num_prefix_tokens
        order = class_attention(seen, prefix, bias).argsort(dim=1, descending=True)
        assert self._known is not None
        pruned = self._known.kept[layer - 1][0]
        stay, source = order[:, : order.shape[1] - r], order[:, order.shape[1] - r : pruned]
        alike, place = likest(tokens, stay + prefix, source + prefix)
        return Merge(stay, source, place, alike)

    def merged(self, layer: int, tokens: Tensor, size: Tensor, found: Merge) -> tuple[Tensor, Tensor]:
        prefix = self.backbone.num_prefix_tokens
        kept, kept_size = sort_patches(tokens, found.stay, prefix), size.gather(1, found.stay)
        if found.alike is None or not found.source.shape[1]:
            return kept, kept_size
        more, more_size = take_rows(tokens, found.source + prefix), size.gather(1, found.source) * found.alike
        return mean_into(kept, kept_size, more, more_size, found.place, prefix)

    def slimmed(
        self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        if self.mode == "soft":
            return self._masked(tokens, counts)
        return super().slimmed(tokens, positions, counts)

    def _masked(self, tokens: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """All patches through all blocks; those that are to leave are masked as keys."""
        prefix, n = self.backbone.num_prefix_tokens, counts[0]
        if n != self.num_patches or n != self.rates.num_patches:
            raise SlimError(
                f"diffrate learns for images of {self.rates.num_patches} patches, and these have {n}: train it at the "
                "image size that it was made for"
            )
        mask = size = torch.ones(tokens.shape[0], n, device=tokens.device)
        used: list[Tensor] = []
        for layer in range(1, self.schedule.depth + 1):
            attention, mlp = self.backbone.halves(layer) or (partial(self.backbone.block, layer), _same)
            seen = AttentionRecorder()
            one = F.pad(mask, (prefix, 0), value=1.0), F.pad(size, (prefix, 0), value=1.0)
            with PolicyAttention(*one) as mode, seen:
                tokens = attention(tokens)
            if not mode.calls:
                raise SlimError(f"diffrate cannot train {type(self.model).__name__}: it attends in its own way")
            if layer > 1:
                with torch.no_grad():
                    bias = prefix_bias(size.log() + (1 - mask) * NEVER, prefix)
                    order = class_attention(seen, prefix, bias).argsort(dim=1, descending=True)
                tokens = sort_patches(tokens, order, prefix)
                mask, size = mask.gather(1, order), size.gather(1, order)
                expected = self.rates.numbers(layer)
                pruned, merged = (min(n, round(float(number.detach()))) for number in expected)
                mask = mask * self.rates.mask(layer, 0, pruned, n)
                if merged < pruned:
                    tokens, size = self._join(tokens, size, merged, pruned)
                    mask = mask * self.rates.mask(layer, 1, merged, pruned)
                used.append(least(used[-1] if used else n, *expected))
                n = min(pruned, merged)
            tokens = mlp(tokens)
        self._costs = self._expected_cost(counts[0], used), float(self.architecture().multiply_adds(counts))
        return tokens, prefix_bias(size.log() + (1 - mask.detach()) * NEVER, prefix)

    def _join(self, tokens: Tensor, size: Tensor, stay: int, before: int) -> tuple[Tensor, Tensor]:
        """The patches from `stay` to `before` merged into those before them; they remain, to be masked."""
        prefix = self.backbone.num_prefix_tokens
        places = torch.arange(before, device=tokens.device).expand(tokens.shape[0], -1) + prefix
        best, place = likest(tokens.detach(), places[:, :stay], places[:, stay:])
        more, more_size = tokens[:, prefix + stay : prefix + before], size[:, stay:before]
        kept, kept_size = mean_into(tokens[:, : prefix + stay], size[:, :stay], more, more_size * best, place, prefix)
        return torch.cat((kept, tokens[:, prefix + stay :]), dim=1), torch.cat((kept_size, size[:, stay:]), dim=1)

    def _expected_cost(self, num_patches: int, used: Sequence[Tensor]) -> Tensor:
        """Multiply-adds of the blocks, with a gradient, where `used` patches are left after blocks 2 to L."""
        architecture, facts = self.architecture(), self._facts
        total, n = (
            used[0].new_tensor(float(backbone_cost(architecture, [num_patches]))),
            used[0].new_tensor(num_patches),
        )
        total = total - architecture.head_per_patch * num_patches
        for layer, after in enumerate(used, 2):
            fixed = architecture.block(layer, 0)
            slope = architecture.block(layer, 1) - fixed
            square = (architecture.block(layer, 2) - 2 * architecture.block(layer, 1) + fixed) / 2
            total = total + fixed + (slope - square) * n + square * n * n
            if facts.mlp_weights is not None:
                total = total - facts.mlp_weights[layer - 1] * (n - after)
            n = after
        return total + architecture.head_per_patch * n

    def own_loss(self, images: Tensor, teacher: SlimModel | None) -> Tensor | float:
        """The squared distance of the cost from its target after a pass in mode `soft`; 0 after any other."""
        costs, self._costs = self._costs, None
        if costs is None:
            return 0.0
        return COST_WEIGHT * ((costs[0] - costs[1]) / self.architecture().multiply_adds()) ** 2


def _same(tokens: Tensor) -> Tensor:
    return tokens
