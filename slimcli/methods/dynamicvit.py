"""DynamicViT: a small network scores the patches at each drop layer; it learns with the backbone.

Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from slimcli.attention import NEVER, ReplacedAttention
from slimcli.errors import SlimError
from slimcli.life import prefix_bias
from slimcli.methods.base import Method, drop_layers
from slimcli.methods.slim_model import SlimModel
from slimcli.schedule import Schedule

#: weights of the losses, as published: the share of patches kept, the dense model's classes, its tokens
RATIO_WEIGHT, CLASS_WEIGHT, TOKEN_WEIGHT = 2.0, 0.5, 0.5


@dataclass
class Trace:
    """What the losses need of a forward pass: shares kept (B,) at each drop layer, tokens, who is left (B, N)."""

    shares: list[Tensor]
    targets: list[float]
    tokens: Tensor
    policy: Tensor


@final
class DynamicViT(Method):
    """After each drop layer, a score head reads all patches, and those with the highest scores go on.

    In training (mode `soft`) no patch is removed: a hard Gumbel sample of each score decides whether other tokens
    may attend to the patch, with a straight-through gradient. `own_loss` holds the share that is kept to the
    schedule's, and class probabilities and tokens near the dense model's.
    """

    method = "dynamicvit"
    follows = True
    modes = ("none", "soft", "hard")
    needs_teacher = True
    #: of the last forward pass in mode `soft`
    _trace: Trace | None = None

    def _make_selector(self, schedule: Schedule) -> nn.Module:
        layers = [layer for layer, _ in schedule.drops] or drop_layers(schedule.resolve(self.num_patches))
        return nn.ModuleDict({str(layer): ScoreHead(self.backbone.embed_dim) for layer in layers})

    def choose(self, layer: int, tokens: Tensor, count: int) -> Tensor:
        scores = self._head(layer)(tokens[:, self.backbone.num_prefix_tokens :])
        # the probability of staying grows with the difference of the two logits
        return (scores[..., 0] - scores[..., 1]).topk(count, dim=1).indices

    def overhead(self, counts: Sequence[int]) -> int:
        width = self.backbone.embed_dim
        return sum(ScoreHead.cost(counts[layer - 1], width) for layer in drop_layers(counts))

    def _head(self, layer: int) -> ScoreHead:
        heads: Any = self.selector
        if str(layer) not in heads:
            raise SlimError(f"dynamicvit has no score head after block {layer}: it has them after {', '.join(heads)}")
        head: ScoreHead = heads[str(layer)]
        return head

    def slimmed(
        self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        if self.mode != "soft":
            return super().slimmed(tokens, positions, counts)
        prefix = self.backbone.num_prefix_tokens
        policy: Tensor | None = None
        shares, targets = [], []
        for layer in range(1, self.schedule.depth + 1):
            tokens = self._sampled(layer, tokens, positions, policy)
            if layer in drop_layers(counts):
                scores = self._head(layer)(tokens[:, prefix:], policy).float()
                sample = F.gumbel_softmax(scores.log_softmax(dim=-1), hard=True)[..., 0]
                policy = sample if policy is None else sample * policy
                shares.append(policy.mean(dim=1))
                targets.append(counts[layer] / counts[0])
        assert policy is not None
        self._trace = Trace(shares, targets, tokens, policy.detach())
        # a classifier that pools patches pools those that are left
        return tokens, prefix_bias((1 - policy.detach()) * NEVER, prefix)

    def _sampled(self, layer: int, tokens: Tensor, positions: Tensor | None, policy: Tensor | None) -> Tensor:
        if policy is None:
            return self._block(layer, tokens, positions, None)
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            run: Tensor = checkpoint(self._sampled_block, layer, tokens, positions, policy, use_reentrant=False)
            return run
        return self._sampled_block(layer, tokens, positions, policy)

    def _sampled_block(self, layer: int, tokens: Tensor, positions: Tensor | None, policy: Tensor) -> Tensor:
        """A block in which a patch is a key for others only where the sampled `policy` (B, N) says 1."""
        with PolicyAttention(F.pad(policy, (self.backbone.num_prefix_tokens, 0), value=1.0)) as mode:
            tokens = self.backbone.observed_block(layer, tokens, positions)
        if not mode.calls:
            raise SlimError(f"dynamicvit cannot train {type(self.model).__name__}: its blocks attend in their own way")
        return tokens

    def own_loss(self, images: Tensor, teacher: SlimModel | None) -> Tensor | float:
        """Ratio and distillation losses of the pass just done in mode `soft`; 0 after any other."""
        trace, self._trace = self._trace, None
        if trace is None or teacher is None:
            return 0.0
        with torch.no_grad():
            expected, _ = teacher._tokens(images)
            classes = teacher.backbone.head(expected).float()
            expected = teacher.backbone.final_norm(expected).float()[:, self.backbone.num_prefix_tokens :]
        prefix = self.backbone.num_prefix_tokens
        found = self.backbone.head(trace.tokens, prefix_bias((1 - trace.policy) * NEVER, prefix)).float()
        tokens = self.backbone.final_norm(trace.tokens).float()[:, prefix:]
        loss = RATIO_WEIGHT * ratio_loss(trace.shares, trace.targets)
        loss = loss + TOKEN_WEIGHT * token_loss(tokens, expected, trace.policy)
        if self.architecture().num_outputs:
            loss = loss + CLASS_WEIGHT * class_loss(found, classes)
        return loss


def ratio_loss(shares: list[Tensor], targets: list[float]) -> Tensor:
    """The squared distance of the share (B,) that each drop layer kept from what it should keep, in the mean."""
    return torch.stack([(share - target).square().mean() for share, target in zip(shares, targets, strict=True)]).mean()


def token_loss(tokens: Tensor, expected: Tensor, policy: Tensor) -> Tensor:
    """The mean squared distance of the tokens (B, N, D) that are left (`policy` 1) from those of the dense model."""
    distance = (tokens - expected).square().mean(dim=-1)
    return (distance * policy).sum() / policy.sum().clamp(min=1)


def class_loss(logits: Tensor, expected: Tensor) -> Tensor:
    """KL divergence of the class probabilities (B, C) from the dense model's."""
    return F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="batchmean", log_target=True)


class ScoreHead(nn.Module):
    """Patches (B, n, D) to two logits each (B, n, 2): stay, leave.

    An MLP on every patch; half of its channels are replaced by their mean over the patches that are left.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        half, quarter = embed_dim // 2, embed_dim // 4
        self.norm = nn.LayerNorm(embed_dim)
        self.project = nn.Linear(embed_dim, embed_dim)
        self.own = nn.Linear(embed_dim - half, half)
        # a linear layer on [own, mean] in two parts, so that the mean's part is computed once an image
        self.whole = nn.Linear(half, half, bias=False)
        self.narrow = nn.Linear(half, quarter)
        self.score = nn.Linear(quarter, 2)
        for layer in (self.project, self.own, self.whole, self.narrow, self.score):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, patches: Tensor, policy: Tensor | None = None) -> Tensor:
        """Two logits (B, n, 2) for each patch; `policy` (B, n) says which are still there."""
        x = F.gelu(self.project(self.norm(patches)))
        own, whole = x[..., : self.own.in_features], x[..., self.own.in_features :]
        if policy is None:
            mean = whole.mean(dim=1, keepdim=True)
        else:
            weight = policy.unsqueeze(-1).to(whole.dtype)
            mean = (whole * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1e-6)
        x = F.gelu(self.own(own) + self.whole(mean))
        return self.score(F.gelu(self.narrow(x)))

    @staticmethod
    def cost(num_patches: int, embed_dim: int) -> int:
        """Multiply-adds on `num_patches` patches."""
        half, quarter = embed_dim // 2, embed_dim // 4
        each = embed_dim**2 + (embed_dim - half) * half + half * quarter + 2 * quarter
        return num_patches * each + half * half


class PolicyAttention(ReplacedAttention):
    """Multiplies the exponentials of every attention inside by the keys' `policy` (B, n); a token always sees itself.

    The product, and not a bias of log 0, is what hands the samples a gradient. The small constant is the paper's. With
    `size` (B, n), a key counts as so many.
    """

    def __init__(self, policy: Tensor, size: Tensor | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.policy, self.size, self.eps = policy, size, eps

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None
    ) -> Tensor:
        logits = (query @ key.transpose(-2, -1)).float() * (scale if scale is not None else query.shape[-1] ** -0.5)
        if mask is not None:
            logits = logits + mask
        n = key.shape[-2]
        policy = self.policy[:, None, None, :]
        seen = policy + (1 - policy) * torch.eye(n, dtype=policy.dtype, device=policy.device)
        if self.size is not None:
            logits = logits + self.size.log()[:, None, None, :]
        weights = (logits - logits.amax(dim=-1, keepdim=True)).exp() * seen
        weights = (weights + self.eps / n) / (weights.sum(dim=-1, keepdim=True) + self.eps)
        return F.dropout(weights, dropout).to(value.dtype) @ value
