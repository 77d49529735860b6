"""Life regression on tensors: the life head, soft weights and the order of the patches.

Equation numbers are the paper's. Shapes: B images, P prefix tokens, N patches, D embedding width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimcli.layout import is_plain_linear

#: the highest exponent of a patch's mass: what a few outliers weigh is finite then
MOST = 40.0
#: channels of an attention head in the life head's own transformer block
HEAD_CHANNELS = 32


def normalise_life(score: Tensor, life_mean: float, life_std: float, eps: float = 1e-6) -> Tensor:
    """Importance scores (B, N) to lives (B, N) with the given mean and standard deviation in each image (eq. 3).

    The population standard deviation is used, and the result is float32 whatever the input is.
    """
    score = score.float()
    centred = score - score.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    if score.requires_grad:
        # patches that are all alike (a blank image) say nothing about who is more important: the root of 0 has no slope
        alike = variance <= eps**2
        centred = torch.where(alike, centred.detach(), centred)
        variance = torch.where(alike, variance.detach(), variance)
    std = variance.sqrt()
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


def exports_to_onnx() -> bool:
    """Whether the model is being exported to ONNX, which has no stable sort."""
    return torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()


def highest_first(values: Tensor) -> Tensor:
    """Indices (B, n) of values (B, n), the highest first; ties in their order, wherever it runs."""
    if not exports_to_onnx():
        return values.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(values.shape[1], device=values.device).expand(values.shape)
    return torch.zeros_like(places).scatter(1, place_by_value(values), places)


def place_by_value(values: Tensor) -> Tensor:
    """How many of an image's values (B, n) come before each: higher ones, and equal ones that stand earlier; (B, n)."""
    one, other = values.unsqueeze(2), values.unsqueeze(1)
    # [i, j]: j stands before i
    earlier = torch.ones(values.shape[1], values.shape[1], device=values.device).tril(-1) > 0
    return ((other > one) | ((other == one) & earlier)).sum(dim=2)


def longest_lives_first(life: Tensor, count: int) -> Tensor:
    """Indices (B, count) of the `count` patches with the longest lives, longest first; ties in raster order."""
    return highest_first(life)[:, :count]


def life_rank(life: Tensor) -> Tensor:
    """Position (B, N) of every patch in the order of lives: 0 for the longest."""
    return place_by_value(life) if exports_to_onnx() else highest_first(life).argsort(dim=-1)


def take_patches(patches: Tensor, order: Tensor) -> Tensor:
    """Gather `patches` (B or 1, N, ...) in `order` (B, n) to (B, n, ...)."""
    index = order.reshape(*order.shape, *(1,) * (patches.dim() - 2))
    return patches.expand(order.shape[0], *patches.shape[1:]).gather(1, index.expand(*order.shape, *patches.shape[2:]))


def row_numbers(places: Tensor, n: int) -> Tensor:
    """Places (B, m) in images of `n` tokens to row numbers (B m,) in the tokens of all images."""
    return (places + n * torch.arange(places.shape[0], device=places.device).unsqueeze(1)).flatten()


def take_rows(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, n, D) at `places` (B, m): (B, m, D).

    Whole rows are copied: gathering element by element takes five times as long.
    """
    batch, n, width = tokens.shape
    return tokens.reshape(batch * n, width).index_select(0, row_numbers(places, n)).reshape(batch, -1, width)


def add_rows(tokens: Tensor, places: Tensor, more: Tensor) -> Tensor:
    """Tokens (B, n, D) with `more` (B, m, D) added to those at `places` (B, m).

    Rows of all images at once: along the second dimension, element by element, it takes up to six times as long.
    """
    batch, n, width = tokens.shape
    where = row_numbers(places, n).unsqueeze(1).expand(-1, width)
    return tokens.flatten(0, 1).scatter_add(0, where, more.flatten(0, 1)).reshape(batch, n, width)


def sort_patches(tokens: Tensor, order: Tensor, num_prefix_tokens: int) -> Tensor:
    """Tokens (B, P + N, D) with the patches gathered in `order` (B, n), behind the prefix tokens: (B, P + n, D)."""
    prefix = torch.arange(num_prefix_tokens, device=tokens.device).expand(tokens.shape[0], -1)
    return take_rows(tokens, torch.cat((prefix, order + num_prefix_tokens), dim=1))


class Plan(NamedTuple):
    """Who leaves when, and who takes over from whom: decided once, at the life layer.

    `order` (B, N) are the patches' places in raster order, longest life first. `heirs` (B, N) are places in `order`: a
    patch's heir is among those that stay when it leaves; that of a patch that never leaves means nothing. `weight`
    (B, N), in the same order, is how much each weighs in the mean of a token that it becomes part of.
    """

    order: Tensor
    heirs: Tensor
    weight: Tensor


@torch.no_grad()
def plan(
    features: Tensor, score: Tensor, counts: Sequence[int], redundancy: float = 0.0, merge_importance: float = 0.0
) -> Plan:
    """Decide ahead, for falling patch counts N, N', N'', ..., who leaves, and to which patch that stays it is added.

    A patch stands for a group: at first itself, later also those that it took over. Whenever patches leave, those go
    first whose group is cheapest to join to the group of a more important patch, at the cost
    sqrt(m_i m_j) (1 - cos(f_i, f_j)): the mass m of a group is the sum of exp(s / `redundancy`) over its patches, with
    s their standardised `score` (B, N), and f the mean of their `features` (B, N, C), weighted by
    exp(`merge_importance` s). Each is added to the group most like its own among those that stay. It is agglomerative
    clustering, close to Ward's, with as many joined at a time as leave at a time. With `redundancy` 0 the least
    important leave, whether they are like others or not.
    """
    standard = normalise_life(score, 0.0, 1.0)
    names = highest_first(standard)
    weight = (merge_importance * standard).clamp(-MOST, MOST).exp()
    standard = standard.gather(1, names)
    mass = (standard / redundancy if redundancy > 0 else standard).clamp(max=MOST).exp().unsqueeze(-1)
    groups = torch.cat((take_rows(features.float() * weight.unsqueeze(-1), names), mass), dim=-1)
    # the most important come first: nobody joins one that comes later
    not_before = torch.full((names.shape[1],) * 2, float("inf"), device=names.device).triu()
    # so that one product of [sqrt(m), sqrt(m) f / |f|] with itself is the cost of every pair
    signs = 1.0 - 2.0 * torch.arange(groups.shape[-1], device=names.device).clamp(max=1)
    left: list[tuple[Tensor, Tensor]] = []
    for n, stay in itertools.pairwise(counts):
        unit = F.normalize(groups[..., :-1], dim=-1)
        if redundancy > 0:
            root = groups[..., -1:].sqrt()
            scaled = torch.cat((root, root * unit), dim=-1)
            cost = torch.baddbmm(not_before[:n, :n], scaled, (scaled * signs).transpose(1, 2)).amin(dim=-1)
            dearest = highest_first(cost)
            # those that stay, in the order that they have, then those that leave
            next_order = torch.cat((dearest[:, :stay].sort(dim=-1).values, dearest[:, stay:]), dim=1)
            names = names.gather(1, next_order)
            groups, unit = take_rows(groups, next_order), take_rows(unit, next_order)
        heirs = torch.bmm(unit[:, stay:], unit[:, :stay].transpose(1, 2)).argmax(dim=-1)
        groups = add_rows(groups[:, :stay], heirs, groups[:, stay:])
        left.append((names[:, stay:], names.gather(1, heirs)))
        names = names[:, :stay]
    order, heirs = (torch.cat((names, *parts[::-1]), dim=1) for parts in zip(*left, strict=True))
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return Plan(order, torch.empty_like(order).scatter(1, order, places).gather(1, heirs), weight.gather(1, order))


def lives_by_place(counts: tuple[int, ...]) -> tuple[float, ...]:
    """Lives of N patches, longest first, that leave as N_1..N_L say: each between the last block that uses the patch
    and the next, the later the better its place.
    """
    found: list[float] = []
    for layer, (n, stay) in reversed(list(enumerate(itertools.pairwise((*counts, 0)), 1))):
        found += [layer + (n - place) / (n - stay + 1) for place in range(stay, n)]
    return tuple(found)


def lives_in_order(order: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Lives (B, N) in raster order of patches that leave in `order` (B, N), as the schedule N_1..N_L has it."""
    lives = torch.tensor(lives_by_place(counts), device=order.device).expand(order.shape)
    return torch.empty_like(lives).scatter(1, order, lives)


def inherit(tokens: Tensor, mass: Tensor, heirs: Tensor) -> tuple[Tensor, Tensor]:
    """Add each of the last tokens, which leave, to its heir, as a mean weighted by their masses.

    Of `tokens` (B, n, D), `mass` (B, n, 2) holds the weight of each in a mean and how many original patches it stands
    for, and `heirs` (B, n - m) are the places of the last n - m tokens' heirs. Returns the m that stay (B, m, D) and
    their masses (B, m, 2): both add up.
    """
    stay = tokens.shape[1] - heirs.shape[1]
    weighted = tokens * mass[..., :1].to(tokens.dtype)
    total = mass[:, :stay].scatter_add(1, heirs.unsqueeze(-1).expand(-1, -1, 2), mass[:, stay:])
    return add_rows(weighted[:, :stay], heirs, weighted[:, stay:]) / total[..., :1].to(tokens.dtype), total


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
            return _in_float32(self.projection, normalised(patches, self.norm))


def _in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer without bias on x (..., C) in float32, whatever the dtype of its weight is.

    One that is more than its weight (quantized, with hooks or an adapter) is called, in its own dtype.
    """
    if is_plain_linear(layer):
        return F.linear(x, layer.weight.float())
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), x.dtype)
    found: Tensor = layer(x.to(dtype))
    return found.float()


class Context(nn.Module):
    """One narrow transformer block in which the tokens see each other: after an early block a patch alone says little.

    Adds to the scores of patches, and to the features that they are compared by; nothing before it is taught. Computed
    in the dtype of its weights.
    """

    def __init__(self, embed_dim: int, width: int, similarity_dim: int) -> None:
        super().__init__()
        self.num_heads = max(1, width // HEAD_CHANNELS)
        self.norm = nn.LayerNorm(embed_dim)
        self.reduce = nn.Linear(embed_dim, width)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.final_norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1, bias=False)
        self.features = nn.Linear(width, similarity_dim, bias=False)
        for last in (self.score, self.features):
            nn.init.zeros_(last.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, n, D) to what they are in context (B, n, width): see `score` and `features`."""
        with torch.autocast(tokens.device.type, enabled=False):
            x = self.reduce(self.norm(tokens.to(self.norm.weight.dtype)))
            qkv = self.qkv(self.attention_norm(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(*qkv.unbind(0))
            x = x + self.proj(attended.transpose(1, 2).flatten(2))
            x = x + self.mlp(self.mlp_norm(x))
            found: Tensor = self.final_norm(x)
            return found


def normalised(tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm in float32, whatever the dtype of tokens and weights is."""
    return F.layer_norm(tokens.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


class LifeHead(nn.Module):
    """Predicts the life of every patch from the tokens after one block (eqs. 1-3).

    s_i = (W_q h_0) . (W_k h_i) with h = LayerNorm(x). h_0 is the class token, or with `global_token="mean"`
    the mean of the patches' h_i. Everything is computed in float32, also under autocast.

    Beyond the paper, and off by default: patches are compared with each other by their tokens or, with
    `similarity_dim` above 0, by a projection of them, which may learn how alike they will be in later blocks; with
    `context_dim` above 0 a narrow transformer block adds to the scores and to that projection.
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
        self.similarity: Similarity | None = None
        self.context: Context | None = None

    @property
    def similarity_dim(self) -> int:
        """Width of the projection that patches are compared by; 0 if their tokens are compared as they are."""
        return self.similarity.projection.out_features if self.similarity is not None else 0

    @property
    def context_dim(self) -> int:
        """Width of the transformer block; 0 without one."""
        return self.context.reduce.out_features if self.context is not None else 0

    def extend(self, similarity_dim: int = 0, context_dim: int = 0) -> None:
        """Give the head a projection, and a transformer block, of these widths; 0 takes them away.

        What has its width already is kept. Raises ValueError for a block without a projection that it adds to.
        """
        if context_dim > 0 and similarity_dim <= 0:
            raise ValueError("context_dim above 0 needs similarity_dim above 0")
        weight = self.query.weight
        embed_dim = weight.shape[0]
        if context_dim != self.context_dim or similarity_dim != self.similarity_dim:
            made = Context(embed_dim, context_dim, similarity_dim) if context_dim > 0 else None
            self.context = None if made is None else made.to(weight.device, weight.dtype)
        if similarity_dim != self.similarity_dim:
            projection = Similarity(embed_dim, similarity_dim) if similarity_dim > 0 else None
            self.similarity = None if projection is None else projection.to(weight.device, weight.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # weights say whether there is a projection or a block, and how wide they are
        names = ("similarity.projection.weight", "context.reduce.weight")
        widths = [state_dict[prefix + name].shape[0] if prefix + name in state_dict else 0 for name in names]
        self.extend(*widths) if widths[0] else self.extend()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def read(self, tokens: Tensor, num_prefix_tokens: int, compare: bool = True) -> tuple[Tensor, Tensor | None]:
        """Importance s (B, N) of patches in `tokens` (B, P + N, D), and what they are compared by (B, N, C), or None.

        Both are float32. The paper's product is folded, s_i = (W_k^T W_q h_0) . h_i, which costs 2 D^2 + N D
        multiply-adds an image.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            h = normalised(tokens, self.norm)
            patches = h[:, num_prefix_tokens:]
            whole = h[:, 0] if self.global_token == "cls" else patches.mean(dim=1)
            query = _in_float32(self.query, whole)
            if is_plain_linear(self.key):
                score = torch.bmm(patches, (query @ self.key.weight.float()).unsqueeze(-1)).squeeze(-1)
            else:
                score = torch.bmm(_in_float32(self.key, patches), query.unsqueeze(-1)).squeeze(-1)
            raw = tokens[:, num_prefix_tokens:]
            features = (raw.float() if self.similarity is None else self.similarity(raw)) if compare else None
            if self.context is not None:
                seen = self.context(tokens)[:, num_prefix_tokens:]
                score = score + self.context.score(seen).squeeze(-1).float()
                features = features + self.context.features(seen).float() if features is not None else None
            return score, features

    def forward(self, tokens: Tensor, num_prefix_tokens: int, life_mean: float, life_std: float) -> Tensor:
        """Lives tau (B, N), float32, with mean `life_mean` and standard deviation `life_std` in every image."""
        score, _ = self.read(tokens, num_prefix_tokens, compare=False)
        return normalise_life(score, life_mean, life_std)
