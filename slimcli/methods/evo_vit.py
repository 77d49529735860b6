"""Evo-ViT: in the later blocks few patches are updated, the others move along with one token that stands for them.

Xu et al., "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", AAAI 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from slimcli.life import highest_first, sort_patches
from slimcli.methods.base import backbone_cost
from slimcli.methods.by_cost import ByStrength
from slimcli.methods.evit import no_class_attention
from slimcli.schedule import Schedule, default_life_layer

#: how much of the global class attention a block renews
TRADE_OFF = 0.5


@final
class EvoViT(ByStrength):
    """At the start of a stage, the patches with the highest global class attention go on through its blocks, with one
    token that stands for the others: their mean, weighted by it. At the end of the stage what the blocks added to that
    token is added to each of the others, and all are there again.

    Global class attention is the class token's attention, averaged over heads, of the last block in which all patches
    were updated; each later block that updates a patch renews half of it. Stages begin after a third and after two
    thirds of the blocks, and wherever N_1..N_L fall.
    """

    method = "evo-vit"

    @property
    def strongest(self) -> int:
        return self.num_patches - 1

    def forms(self, strength: int) -> Sequence[Schedule]:
        depth, n = self.backbone.depth, self.num_patches
        first = default_life_layer(depth)
        counts = [n] * first + [n - strength] * (depth - first)
        return [Schedule(depth, first, counts=tuple(counts))]

    def refusal(self) -> str | None:
        reason = no_class_attention(self.backbone, self._facts)
        if reason is not None:
            return reason
        if self._facts.positions:
            return "a token that stands for others has no place for its rotary or relative positions"
        return None

    def patches_used(self, schedule: Schedule) -> tuple[int, ...]:
        counts = schedule.resolve(self.num_patches)
        return tuple(n + (n < counts[0]) for n in counts)

    def cost(self, schedule: Schedule | None) -> int:
        architecture = self.architecture()
        if schedule is None or not schedule.drops_patches():
            return architecture.multiply_adds()
        counts, used = schedule.resolve(architecture.num_patches), self.patches_used(schedule)
        total = backbone_cost(architecture, used) + architecture.head_per_patch * (counts[0] - used[-1])
        starts = stages(counts)
        width = architecture.attention_dim or architecture.embed_dim
        for layer in range(starts[0], starts[-1] + 1):
            total += (used[layer - 1] + architecture.num_prefix_tokens) * width
        return total + sum((counts[0] - counts[start]) * architecture.embed_dim for start in starts)

    def slimmed(
        self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        prefix, depth, starts = self.backbone.num_prefix_tokens, self.schedule.depth, stages(counts)
        for layer in range(1, starts[0]):
            tokens = self._block(layer, tokens, positions, None)
        tokens, attention = self.backbone.global_attention(starts[0], tokens)
        for start, end in zip(starts, (*starts[1:], depth), strict=True):
            order, stay = highest_first(attention), counts[start]
            tokens, attention = sort_patches(tokens, order, prefix), attention.gather(1, order)
            weight = attention[:, stay:] / attention[:, stay:].sum(dim=1, keepdim=True)
            others = tokens[:, prefix + stay :]
            before = weight.unsqueeze(1).to(others.dtype) @ others
            tokens = torch.cat((tokens[:, : prefix + stay], before), dim=1)
            for layer in range(start + 1, end + 1):
                if end == depth:
                    tokens = self._block(layer, tokens, None, None)
                    continue
                tokens, paid = self.backbone.global_attention(layer, tokens)
                renewed = (1 - TRADE_OFF) * attention[:, :stay] + TRADE_OFF * paid[:, :stay]
                attention = torch.cat((renewed, attention[:, stay:]), dim=1)
            others = others + (tokens[:, -1:] - before)
            tokens = torch.cat((tokens[:, :-1], others), dim=1)
        return tokens, None


def stages(counts: Sequence[int]) -> tuple[int, ...]:
    """The blocks after which stages begin under N_1..N_L: wherever they fall, and in the middle of what is left."""
    found = [layer for layer in range(1, len(counts)) if counts[layer] < counts[layer - 1]]
    middle = found[0] + (len(counts) - found[0]) // 2
    return tuple(sorted({*found, middle} if middle < len(counts) else found))
