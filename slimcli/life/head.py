"""The life head: how important a patch is, and what patches are compared with each other by (eqs. 1-3)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimcli.layout import has_hooks, is_plain_linear, version
from slimcli.life.correction import Correction
from slimcli.life.lives import exports_to_onnx, normalise_life
from slimcli.life.tables import records

#: channels of an attention head in the life head's own transformer block
HEAD_CHANNELS = 32


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


def _plus(found: Tensor, layer: nn.Linear, x: Tensor) -> Tensor:
    """`found` (B, n, C), float32, and what a linear layer without bias says of x (B, n, D): in one product."""
    if not is_plain_linear(layer) or layer.weight.dtype != torch.float32 or exports_to_onnx():
        more: Tensor = layer(x)
        return found + more.float()
    return torch.baddbmm(found, x, layer.weight.t().expand(x.shape[0], -1, -1))


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
            return self.block(self.reduce(self.norm(tokens.to(self.norm.weight.dtype))))

    def block(self, x: Tensor) -> Tensor:
        """The transformer block on reduced tokens (B, n, width), autocast being off: (B, n, width)."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.mlp_norm(x))
        found: Tensor = self.final_norm(x)
        return found


def _folded(layer: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias, float32, with which a linear layer says of normalised tokens what it says of LayerNorm's output.

    Normalised is what is to be multiplied with the norm's own weight, and added to its bias.
    """
    weight = layer.weight.float()
    bias = weight @ norm.bias.float()
    return weight * norm.weight.float(), bias if layer.bias is None else bias + layer.bias.float()


class _Folded(NamedTuple):
    """What reads tokens that were normalised once: weights and biases of `LifeHead` with those of its norms in them."""

    query: tuple[Tensor, Tensor]
    key: Tensor
    features: tuple[Tensor, Tensor]
    reduce: tuple[Tensor, Tensor]


class _Kept(NamedTuple):
    """Folded weights, and what they were made of, which keeps its memory: nothing else comes to lie there."""

    folded: _Folded
    sources: list[Tensor]
    state: list[tuple[int, int]]


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
        self._kept: _Kept | None = None
        #: what the features of patches that left lack, where that was learnt
        self.correction: Correction | None = None

    def correct(self, correction: Correction | None) -> None:
        """Take a correction of the features of patches that left, on the head's own device; None: none."""
        weight = self.query.weight
        self.correction = None if correction is None else correction.to(weight.device, weight.dtype)

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
        # weights say whether there is a projection, a block or a correction, and how wide they are
        names = ("similarity.projection.weight", "context.reduce.weight")
        widths = [state_dict[prefix + name].shape[0] if prefix + name in state_dict else 0 for name in names]
        self.extend(*widths) if widths[0] else self.extend()
        found = state_dict.get(prefix + "correction.up")
        known = None if self.correction is None else self.correction.up.shape
        if found is None or found.dim() != 3 or found.shape[1] != self.query.in_features:
            self.correct(None)
        elif found.shape != known:
            self.correct(Correction(*found.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def read(self, tokens: Tensor, num_prefix_tokens: int, compare: bool = True) -> tuple[Tensor, Tensor | None]:
        """Importance s (B, N) of patches in `tokens` (B, P + N, D), and what they are compared by (B, N, C), or None.

        Both are float32. The paper's product is folded, s_i = (W_k^T W_q h_0) . h_i, which costs 2 D^2 + N D
        multiply-adds an image.
        """
        if compare and self._shares_a_norm and self._may_fold():
            return self._read_folded(tokens, num_prefix_tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            h = normalised(tokens, self.norm)
            patches = h[:, num_prefix_tokens:]
            whole = h[:, 0] if self.global_token == "cls" else patches.mean(dim=1)
            query = _in_float32(self.query, whole)
            if is_plain_linear(self.key):
                keys, query = patches, query @ self.key.weight.float()
            else:
                keys = _in_float32(self.key, patches)
            raw = tokens[:, num_prefix_tokens:]
            features = (raw.float() if self.similarity is None else self.similarity(raw)) if compare else None
            if self.context is None:
                return torch.bmm(keys, query.unsqueeze(-1)).squeeze(-1), features
            seen = self.context(tokens)[:, num_prefix_tokens:]
            more = self.context.score(seen).float()
            score = torch.baddbmm(more, keys, query.unsqueeze(-1)).squeeze(-1)
            if features is not None:
                features = _plus(features, self.context.features, seen)
            return score, features

    @property
    def _shares_a_norm(self) -> bool:
        """Whether plain linear layers alone read tokens, each behind a LayerNorm, and these differ by weights only."""
        if self.similarity is None or self.context is None:
            return False
        norms = (self.norm, self.similarity.norm, self.context.norm)
        layers = (self.query, self.key, self.similarity.projection, self.context.reduce)
        plain = all(map(is_plain_linear, layers)) and not has_hooks(*norms)
        return plain and len({norm.eps for norm in norms}) == 1

    def _may_fold(self) -> bool:
        # a compiler would fold in every pass; what exports to ONNX folds once, in float32
        if records():
            return exports_to_onnx() and self.query.weight.dtype == torch.float32
        return not torch.is_grad_enabled()

    def _read_folded(self, tokens: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
        """`read` with tokens normalised once: the norms' own weights are in those of the layers behind them.

        Scores are less by a number that is the same for all patches of an image.
        """
        assert self.context is not None
        folded, dtype = self._fold(), self.context.qkv.weight.dtype
        with torch.autocast(tokens.device.type, enabled=False):
            n = F.layer_norm(tokens.float(), self.norm.normalized_shape, eps=self.norm.eps)
            patches = n[:, num_prefix_tokens:]
            whole = n[:, 0] if self.global_token == "cls" else patches.mean(dim=1)
            query = F.linear(whole, *folded.query) @ folded.key
            seen = self.context.block(F.linear(n, *folded.reduce).to(dtype))[:, num_prefix_tokens:]
            features = F.linear(patches, *folded.features)
            score = torch.baddbmm(self.context.score(seen).float(), patches, query.unsqueeze(-1)).squeeze(-1)
            return score, _plus(features, self.context.features, seen)

    def _fold(self) -> _Folded:
        """The folded weights, kept until one that they are made of changes."""
        assert self.similarity is not None and self.context is not None
        norms = self.norm, self.similarity.norm, self.context.norm
        layers = self.query, self.key, self.similarity.projection, self.context.reduce
        sources = [x for module in (*norms, *layers) for x in (module.weight, module.bias) if x is not None]
        state = [] if records() else [(x.data_ptr(), version(x)) for x in sources]
        if self._kept is not None and self._kept.state == state:
            return self._kept.folded
        with nullcontext() if records() else torch.inference_mode(False), torch.no_grad():
            query, features = _folded(self.query, norms[0]), _folded(self.similarity.projection, norms[1])
            key, reduce = self.key.weight.float() * norms[0].weight.float(), _folded(self.context.reduce, norms[2])
            folded = _Folded(query, key, features, reduce)
        if not records():
            self._kept = _Kept(folded, [x.detach() for x in sources], state)
        return folded

    def forward(self, tokens: Tensor, num_prefix_tokens: int, life_mean: float, life_std: float) -> Tensor:
        """Lives tau (B, N), float32, with mean `life_mean` and standard deviation `life_std` in every image."""
        score, _ = self.read(tokens, num_prefix_tokens, compare=False)
        return normalise_life(score, life_mean, life_std)
