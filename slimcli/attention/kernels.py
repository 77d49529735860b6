"""Attention with a bias on every key, on the fastest kernel there is for the device, the dtype and the shape.

Shapes: B images, H heads, n tokens, d channels a head. A bias per key is (B, n) and shared by all heads and queries;
a bias per pair of tokens (relative positions) is (1, H, M, M) over all M tokens of an image, and `places` (1 or B, n)
says which of the M are still there. No bias of shape (B, H, n, n) is ever made.

`reference`  the plain formula in torch operators; what the others are tested against, and the fastest for few tokens
`mask`       `scaled_dot_product_attention` with the bias as a mask (B, 1, 1, n): fused unless the bias needs a gradient
`channel`    the bias as one more channel of queries and keys: fused, gradients of the bias included
`flex`       FlexAttention with the bias in its `score_mod`, compiled: the bias per pair is read where it lies (CUDA)
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.attention.choice import choose

#: exp of it is 0 in every dtype, and it is finite in every dtype: stands for -inf where -inf would give nan
NEVER = -1e4


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None = None,
    *,
    pair_bias: Tensor | None = None,
    places: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: str = "auto",
) -> Tensor:
    """softmax(q k^T scale + biases) v for query (B, H, m, d), key and value (B, H, n, d); returns (B, H, m, d).

    Args:
        key_bias: (B, n), added to the logits of each key; -inf takes a key out.
        pair_bias: (1, H, M, M), or (1, 1, m, n) without `places`; booleans say which pairs may attend.
        places: (1 or B, n) int64, the rows and columns of `pair_bias` that the tokens stand for.
        scale: 1 / sqrt(d) by default.
        kernel: one of `KERNELS`; "auto" asks `choose`.
    """
    per_image = places is not None and places.shape[0] > 1
    if kernel == "auto":
        biases = (key_bias, pair_bias if per_image else None)
        kernel = choose(
            query.device.type,
            tokens=key.shape[-2],
            channels=query.shape[-1],
            learns=_need_gradients(*biases),
            pairs_per_image=per_image,
            dropout=dropout > 0,
            images=query.shape[0],
            bfloat16=_dtype(value) == torch.bfloat16,
            trains=_need_gradients(query, key, value),
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if pair_bias is not None and places is not None and not per_image:
        # one part for all images: as large as the bias of the dense model
        rows = places[0]
        pair_bias, places = pair_bias[..., rows, :][..., rows], None
    if kernel == "reference":
        return _reference(query, key, value, key_bias, pair_bias, places, scale, dropout)
    if kernel == "flex":
        return _flex(query, key, value, key_bias, pair_bias, places, scale)
    query, key, value = _in_one_dtype(query, key, value)
    if pair_bias is not None and places is not None:
        return _head_by_head(query, key, value, key_bias, pair_bias, places, scale, dropout)
    if key_bias is not None and (kernel == "channel" or pair_bias is not None):
        return _channel(query, key, value, key_bias, pair_bias, scale, dropout)
    mask = key_bias[:, None, None, :].to(query.dtype) if key_bias is not None else _as_mask(pair_bias, query)
    if mask is not None and mask.device.type == "cuda":
        mask = aligned(mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


def aligned(mask: Tensor) -> Tensor:
    """The mask (..., n) in memory where each row begins at a multiple of 16 bytes: cuDNN's kernel fails on others."""
    step = 16 // mask.element_size()
    starts = (stride for size, stride in zip(mask.shape[:-1], mask.stride()[:-1], strict=True) if size > 1)
    if mask.stride(-1) == 1 and mask.storage_offset() % step == 0 and all(start % step == 0 for start in starts):
        return mask
    n = mask.shape[-1]
    return F.pad(mask, (0, -n % step))[..., :n]


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    pair_bias: Tensor | None,
    places: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    query, key, value = _in_one_dtype(query, key, value)
    logits = query @ key.transpose(-2, -1) * scale
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if pair_bias is not None:
        if places is not None:
            heads = [_part(pair_bias, head, places) for head in range(query.shape[1])]
            logits = torch.stack([logits[:, head] + part for head, part in enumerate(heads)], dim=1)
        elif pair_bias.dtype == torch.bool:
            logits = logits.masked_fill(~pair_bias, float("-inf"))
        else:
            logits = logits + pair_bias
    if key_bias is not None:
        logits = logits + key_bias[:, None, None, :]
    return F.dropout(logits.softmax(dim=-1), dropout).to(value.dtype) @ value


def _channel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor,
    pair_bias: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """The bias as an inner product: q has c in a new channel, k has bias / (c scale).

    In a 16-bit dtype a second channel carries what rounding took from the first.
    """
    batch, heads, tokens, channels = key.shape
    # a power of two is exact in every dtype
    constant = 2.0 ** round(math.log2(1 / scale))
    bias = _finite(key_bias.to(torch.promote_types(key_bias.dtype, torch.float32))) / (constant * scale)
    high = bias.to(key.dtype)
    parts = [high] if key.dtype == bias.dtype else [high, (bias - high.to(bias.dtype)).to(key.dtype)]
    width = -(-(channels + len(parts)) // 8) * 8
    spare = width - channels - len(parts)
    biases = torch.stack(parts, dim=-1)[:, None].expand(batch, heads, tokens, len(parts))
    constants = query.new_full((1, 1, 1, 1), constant).expand(*query.shape[:3], len(parts))
    out = F.scaled_dot_product_attention(
        F.pad(torch.cat((query, constants), dim=-1), (0, spare)),
        F.pad(torch.cat((key, biases), dim=-1), (0, spare)),
        F.pad(value, (0, width - channels)),
        attn_mask=_as_mask(pair_bias, query),
        dropout_p=dropout,
        scale=scale,
    )
    return out[..., :channels]


def _head_by_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    pair_bias: Tensor,
    places: Tensor,
    scale: float,
    dropout: float,
) -> Tensor:
    """One head at a time, so that the images' parts of the bias per pair are (B, 1, n, n) and no more."""
    outs = []
    for head in range(query.shape[1]):
        mask = _part(pair_bias, head, places)[:, None]
        if key_bias is not None:
            mask = mask + key_bias[:, None, None, :]
        one = slice(head, head + 1)
        outs.append(
            F.scaled_dot_product_attention(
                query[:, one],
                key[:, one],
                value[:, one],
                attn_mask=mask.to(query.dtype),
                dropout_p=dropout,
                scale=scale,
            )
        )
    return torch.cat(outs, dim=1)


def _part(pair_bias: Tensor, head: int, places: Tensor) -> Tensor:
    """What head `head` of a bias per pair says of the tokens at `places` (B, n): (B, n, n)."""
    return pair_bias[0, head][places[:, :, None], places[:, None, :]]


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    pair_bias: Tensor | None,
    places: Tensor | None,
    scale: float,
) -> Tensor:
    query, key, value = _in_one_dtype(query, key, value)
    if key_bias is not None:
        key_bias = _finite(key_bias)
    # older torch traces a score_mod only where every index is a tensor
    table = None if pair_bias is None else pair_bias[0]

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if key_bias is not None:
            score = score + key_bias[b, j]
        if table is not None and places is not None:
            score = score + table[h, places[b, i], places[b, j]]
        elif table is not None:
            score = score + table[h, i, j]
        return score

    out: Tensor = _compiled_flex()(query.contiguous(), key.contiguous(), value.contiguous(), score_mod, scale=scale)
    return out


def _finite(key_bias: Tensor) -> Tensor:
    """A bias (B, n) with the same softmax, 0 at its highest and finite everywhere."""
    return (key_bias - key_bias.detach().amax(dim=-1, keepdim=True)).clamp(min=NEVER)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _dtype(value: Tensor) -> torch.dtype:
    """The dtype that attention runs in: autocast's where it is on, else the value's."""
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


def _in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = _dtype(tensors[-1])
    return tuple(tensor.to(dtype) for tensor in tensors)


def _need_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _as_mask(pair_bias: Tensor | None, query: Tensor) -> Tensor | None:
    return pair_bias if pair_bias is None or pair_bias.dtype == torch.bool else pair_bias.to(query.dtype)
