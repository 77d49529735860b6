"""EViT: patches that the class token attends to go on, the others become one token.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022.
"""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor

from slimcli.attention import AttentionRecorder
from slimcli.backbones.base import Backbone
from slimcli.errors import SlimError
from slimcli.methods.base import Facts, Method, backbone_cost, drop_layers
from slimcli.schedule import Schedule


def no_class_attention(backbone: Backbone, facts: Facts) -> str | None:
    """Why the class token's attention to patches cannot be read off a backbone; None if it can."""
    if backbone.global_token != "cls":
        return "it ranks patches by the class token's attention, and this model has no class token in its blocks"
    if facts.key_channels is None:
        return "its blocks do not use torch's scaled_dot_product_attention, where class attention is read"
    if facts.biased:
        return "its attention adds relative positions to queries and keys, and class attention is read from those"
    return None


class ClassAttention(Method):
    """In a drop layer, between attention and MLP, the patches with the highest class attention go on.

    Class attention is the class token's attention to each patch, averaged over heads. Where the rule `fuses`, the
    others are replaced by their sum, weighted by class attention. That token is a patch like any other at the next
    drop layer: of n patches, it included, ceil(keep rate * n) go on.

    Attention itself runs on the fused kernel: the class token's row alone is computed a second time.
    """

    follows = True
    #: whether the others become one token, or are gone
    fuses: ClassVar[bool]

    def refusal(self) -> str | None:
        reason = no_class_attention(self.backbone, self._facts)
        if reason is not None:
            return reason
        if self.fuses and self._facts.positions:
            return "a fused token has no place for its rotary or relative positions; evit-nofuse can run it"
        return None

    def kept(self, schedule: Schedule, num_patches: int) -> tuple[int, ...]:
        """For each block, how many of the patches that enter it go on, the fused token not counted."""
        counts = schedule.resolve(num_patches)
        rates = dict(schedule.drops)
        kept, n = [], num_patches
        for layer in range(1, schedule.depth + 1):
            stay = n
            if layer in drop_layers(counts):
                stay = min(n, max(1, math.ceil(rates[layer] * n - 1e-9)) if rates else counts[layer])
            kept.append(stay)
            n = stay + (self.fuses and stay < n)
        return tuple(kept)

    def patches_used(self, schedule: Schedule) -> tuple[int, ...]:
        used, n = [], self.num_patches
        for stay in self.kept(schedule, n):
            used.append(n)
            n = stay + (self.fuses and stay < n)
        return tuple(used)

    def cost(self, schedule: Schedule | None) -> int:
        architecture, facts = self.architecture(), self._facts
        if schedule is None or not schedule.drops_patches():
            return architecture.multiply_adds()
        used, kept = self.patches_used(schedule), self.kept(schedule, self.num_patches)
        total = backbone_cost(architecture, used)
        for layer, (n, stay) in enumerate(zip(used, kept, strict=True), 1):
            if stay < n:
                after = stay + self.fuses
                if facts.mlp_weights is not None:
                    total -= facts.mlp_weights[layer - 1] * (n - after)
                tokens = n + architecture.num_prefix_tokens
                # the class token's row of attention, and the weighted sum of the patches
                width = architecture.attention_dim or architecture.embed_dim
                total += tokens * width + self.fuses * n * architecture.embed_dim
        return total

    def slimmed(
        self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        for layer, stay in enumerate(self.kept(self.schedule, counts[0]), 1):
            if stay == tokens.shape[1] - self.backbone.num_prefix_tokens:
                tokens = self._block(layer, tokens, positions, None)
                continue
            halves = self.backbone.halves(layer) if positions is None else None
            if halves is None:
                tokens, paid = self.backbone.global_attention(layer, tokens, positions)
                tokens, positions = self._reorganise(layer, tokens, positions, paid, stay)
            else:
                attention, mlp = halves
                seen = AttentionRecorder()
                with seen:
                    tokens = attention(tokens)
                paid = class_attention(seen, self.backbone.num_prefix_tokens)
                tokens, positions = self._reorganise(layer, tokens, positions, paid, stay)
                tokens = mlp(tokens)
            if self._trail is not None:
                self._trail.after(layer, tokens)
        return tokens, None

    def _reorganise(
        self, layer: int, tokens: Tensor, positions: Tensor | None, paid: Tensor, stay: int
    ) -> tuple[Tensor, Tensor | None]:
        """Keep the `stay` patches with the highest class attention `paid` (B, n); fuse the others."""
        chosen = paid.topk(stay, dim=1).indices
        self._follow(layer, tokens, chosen)
        kept, positions = self._take(tokens, positions, chosen)
        if self.fuses:
            weights = paid.scatter(1, chosen, 0.0).to(tokens.dtype)
            patches = tokens[:, self.backbone.num_prefix_tokens :]
            kept = torch.cat((kept, weights.unsqueeze(1) @ patches), dim=1)
        return kept, positions


@final
class EViT(ClassAttention):
    """EViT as published: patches with a low class attention become one token."""

    method = "evit"
    fuses = True


@final
class EViTNoFuse(ClassAttention):
    """EViT without the fused token: patches with a low class attention are gone."""

    method = "evit-nofuse"
    fuses = False


def class_attention(seen: AttentionRecorder, prefix: int, bias: Tensor | None = None) -> Tensor:
    """The first token's attention to each patch (B, n), averaged over heads, from recorded queries and keys.

    `bias` (B, P + n) is what was added to the keys.
    """
    if seen.query is None or seen.key is None:
        raise SlimError("a block that used scaled_dot_product_attention before does not any more")
    scale = seen.scale if seen.scale is not None else seen.query.shape[-1] ** -0.5
    row = seen.query[:, :, :1].float() * scale @ seen.key.float().transpose(-2, -1)
    if bias is not None:
        row = row + bias[:, None, None, :]
    return row.softmax(dim=-1)[:, :, 0, prefix:].mean(dim=1)
