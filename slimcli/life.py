"""Life regression on tensors: the life head, soft weights and the order of the patches.

Equation numbers are the paper's. Shapes: B images, P prefix tokens, N patches, D embedding width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: the least that a patch can say which no other one says: 1 - cosine of patches that are alike but for rounding
LEAST_NEWS = 1e-3


def normalise_life(score: Tensor, life_mean: float, life_std: float, eps: float = 1e-6) -> Tensor:
    """Importance scores (B, N) to lives (B, N) with the given mean and standard deviation in each image (eq. 3).

    The population standard deviation is used, and the result is float32 whatever the input is.
    """
    score = score.float()
    centred = score - score.mean(dim=-1, keepdim=True)
    std = centred.square().mean(dim=-1, keepdim=True).sqrt()
    return life_std * centred / (std + eps) + life_mean


def log_soft_weight(life: Tensor, layer: int, temperature: float) -> Tensor:
    """log w_t(tau) = logsigmoid(U (tau - t)) of eqs. 4-8: the bias (B, N) that block `layer` adds to its keys.

    Added to the attention logits it equals multiplying the exponentials by w_t, and never underflows.
    """
    return F.logsigmoid(temperature * (life - layer))


def log_straight_weight(life: Tensor, used: Tensor, layer: int, temperature: float, eps: float = 1e-4) -> Tensor:
    """log of a weight that is 1 for patches in use, `eps` for dead ones, and has the gradient of the soft weight.

    A straight-through estimator: forward as inference does, backward as eqs. 4-8 do. `used` (B, N) are booleans. The
    weight of a dead patch is not 0, so that the logarithm lets its gradient through.
    """
    soft = (temperature * (life - layer)).sigmoid()
    return (used.to(soft.dtype) + soft - soft.detach() + eps).log()


def longest_lives_first(life: Tensor, count: int) -> Tensor:
    """Indices (B, count) of the `count` patches with the longest lives, longest first; ties in raster order."""
    return life.argsort(dim=-1, descending=True, stable=True)[:, :count]


def life_rank(life: Tensor) -> Tensor:
    """Position (B, N) of every patch in the order of lives: 0 for the longest."""
    return life.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def take_patches(patches: Tensor, order: Tensor) -> Tensor:
    """Gather `patches` (B or 1, N, ...) in `order` (B, n) to (B, n, ...)."""
    index = order.reshape(*order.shape, *(1,) * (patches.dim() - 2))
    return patches.expand(order.shape[0], *patches.shape[1:]).gather(1, index.expand(*order.shape, *patches.shape[2:]))


def sort_patches(tokens: Tensor, order: Tensor, num_prefix_tokens: int) -> Tensor:
    """Tokens (B, P + N, D) with the patches gathered in `order` (B, n), behind the prefix tokens: (B, P + n, D).

    Whole rows are copied, once: gathering element by element takes five times as long.
    """
    batch, count, width = tokens.shape
    starts = torch.arange(batch, device=tokens.device).unsqueeze(1) * count
    prefix = torch.arange(num_prefix_tokens, device=tokens.device).expand(batch, -1)
    rows = starts + torch.cat((prefix, order + num_prefix_tokens), dim=1)
    return tokens.reshape(batch * count, width).index_select(0, rows.flatten()).reshape(*rows.shape, width)


@torch.no_grad()
def choose_heirs(alike: Tensor, order: Tensor, counts: Sequence[int]) -> Tensor:
    """The heir (B, N) of every patch, in the order of lives: a place among those that stay when it leaves.

    `alike` (B, N, N) are the cosines of patches in raster order, `order` (B, N) their places there, longest life first,
    and `counts` are the falling patch counts N, N', N'', ...: the patches from N' on leave first. The heir is the patch
    with the highest cosine among those that live on; that of a patch that never leaves means nothing.
    """
    device = order.device
    rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=device).expand_as(order))
    leave_last_first = list(itertools.pairwise(counts))[::-1]
    groups = [(counts[-1], 1), *((n - stay, stay) for n, stay in leave_last_first)]
    stay = torch.cat([torch.full((size,), value, device=device) for size, value in groups])
    later = rank.unsqueeze(1) < stay[rank].unsqueeze(2)
    heir = alike.masked_fill(~later, float("-inf")).argmax(dim=-1)
    return rank.gather(1, heir).gather(1, order)


def cosines(features: Tensor) -> Tensor:
    """Cosine (B, n, n) of every pair of features (B, n, C)."""
    unit = F.normalize(features, dim=-1)
    return torch.bmm(unit, unit.transpose(1, 2))


def redundancy(alike: Tensor, score: Tensor) -> Tensor:
    """How much of each patch another one already says: (B, N), between -1 and 1.

    The highest cosine, in `alike` (B, N, N), with a patch of higher `score` (B, N); -1 for the patch with the highest.
    """
    less = score.unsqueeze(2) >= score.unsqueeze(1)
    return alike.masked_fill(less, -1.0).amax(dim=-1)


def inherit(patches: Tensor, mass: Tensor, heir: Tensor) -> tuple[Tensor, Tensor]:
    """Add each patch that leaves to its heir, as a mean weighted by its mass.

    `patches` (B, n, D) are sorted, `mass` (B, n, 2) holds the weight of each in a mean and how many original patches
    it stands for, and `heir` (B, n - m) names the heirs of the last n - m. Returns the m that stay (B, m, D) and their
    masses (B, m, 2): both add up.
    """
    stay = patches.shape[1] - heir.shape[1]
    weighted = patches * mass[..., :1].to(patches.dtype)
    index = heir.unsqueeze(-1)
    total = mass[:, :stay].scatter_add(1, index.expand(-1, -1, 2), mass[:, stay:])
    summed = weighted[:, :stay].scatter_add(1, index.expand(-1, -1, patches.shape[2]), weighted[:, stay:])
    return summed / total[..., :1].to(patches.dtype), total


def prefix_bias(patch_bias: Tensor, num_prefix_tokens: int) -> Tensor:
    """A bias for patches (B, N) to one for all keys (B, P + N): prefix tokens live for ever, so theirs is 0."""
    return F.pad(patch_bias, (num_prefix_tokens, 0))


class Similarity(nn.Module):
    """Projects patches to what they are compared with each other by; everything is computed in float32."""

    def __init__(self, embed_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.projection = nn.Linear(embed_dim, dim, bias=False)
        nn.init.orthogonal_(self.projection.weight)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (B, N, D) to features (B, N, dim)."""
        with torch.autocast(patches.device.type, enabled=False):
            return F.linear(normalised(patches, self.norm), self.projection.weight.float())


def normalised(tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm in float32, whatever the dtype of tokens and weights is."""
    return F.layer_norm(tokens.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


class LifeHead(nn.Module):
    """Predicts the life of every patch from the tokens after one block (eqs. 1-3).

    s_i = (W_q h_0) . (W_k h_i) with h = LayerNorm(x). h_0 is the class token, or with `global_token="mean"`
    the mean of the patches' h_i. Everything is computed in float32, also under autocast.

    Beyond the paper, and off by default: with `redundancy` above 0 the life of a patch also depends on what it says
    that no more important patch says already, 1 - the highest cosine to one. The logarithm of that, times
    `redundancy`, is added to the score in standard deviations, so that both are asked for: importance and news.
    Patches are compared by their tokens or, with `similarity_dim` above 0, by a projection of them, which may learn how
    alike they will be in later blocks.
    """

    def __init__(self, embed_dim: int, global_token: str = "cls") -> None:
        super().__init__()
        if global_token not in ("cls", "mean"):
            raise ValueError(f"global_token must be 'cls' or 'mean', not {global_token!r}")
        self.global_token = global_token
        self.norm = nn.LayerNorm(embed_dim)
        self.query = nn.Linear(embed_dim, embed_dim, bias=False)
        self.key = nn.Linear(embed_dim, embed_dim, bias=False)
        for projection in (self.query, self.key):
            nn.init.trunc_normal_(projection.weight, std=0.02)
        #: weight of what no other patch says already, in standard deviations of the score
        self.redundancy = 0.0
        self.similarity: Similarity | None = None

    @property
    def similarity_dim(self) -> int:
        """Width of the projection that patches are compared by; 0 if their tokens are compared as they are."""
        return self.similarity.projection.out_features if self.similarity is not None else 0

    @similarity_dim.setter
    def similarity_dim(self, dim: int) -> None:
        weight = self.query.weight
        if dim != self.similarity_dim:
            self.similarity = Similarity(weight.shape[0], dim).to(weight.device, weight.dtype) if dim > 0 else None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # weights say whether there is a projection, and how wide it is
        weight = state_dict.get(f"{prefix}similarity.projection.weight")
        self.similarity_dim = 0 if weight is None else weight.shape[0]
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def alike(self, patches: Tensor) -> Tensor:
        """Cosine (B, N, N) of every pair of patches (B, N, D), or of their projections."""
        return cosines(self.features(patches))

    def features(self, patches: Tensor) -> Tensor:
        """What patches (B, N, D) are compared with each other by: (B, N, C), float32."""
        return patches.float() if self.similarity is None else cast(Tensor, self.similarity(patches))

    def score(self, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
        """Importance s (B, N) of the patches in `tokens` (B, P + N, D).

        The product is folded, s_i = (W_k^T W_q h_0) . h_i, which costs 2 D^2 + N D multiply-adds an image.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            h = normalised(tokens, self.norm)
            patches = h[:, num_prefix_tokens:]
            whole = h[:, 0] if self.global_token == "cls" else patches.mean(dim=1)
            folded = F.linear(whole, self.query.weight.float()) @ self.key.weight.float()
            return torch.bmm(patches, folded.unsqueeze(-1)).squeeze(-1)

    def forward(self, tokens: Tensor, num_prefix_tokens: int, life_mean: float, life_std: float) -> Tensor:
        """Lives tau (B, N), float32, with mean `life_mean` and standard deviation `life_std` in every image."""
        alike = self.alike(tokens[:, num_prefix_tokens:]) if self.redundancy > 0 else None
        return self.lives(self.score(tokens, num_prefix_tokens), alike, life_mean, life_std)

    def lives(self, score: Tensor, alike: Tensor | None, life_mean: float, life_std: float) -> Tensor:
        """What `forward` returns for patches whose `score` (B, N), and cosines `alike` (B, N, N), are known already.

        Cosines are needed where `redundancy` is above 0.
        """
        if self.redundancy > 0 and alike is not None:
            news = (1.0 - redundancy(alike, score.detach())).clamp(min=LEAST_NEWS).log()
            score = normalise_life(score, 0.0, 1.0) + self.redundancy * news
        return normalise_life(score, life_mean, life_std)
