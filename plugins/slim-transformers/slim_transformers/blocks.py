"""transformers' blocks, run for some of their tokens alone."""

from collections.abc import Callable
from typing import NamedTuple

import slimcli
from torch import nn
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer, CLIPMLP
from transformers.models.deit.modeling_deit import DeiTAttention, DeiTLayer, DeiTMLP
from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention, Dinov2Layer, Dinov2MLP, Dinov2SwiGLUFFN
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersAttention,
    Dinov2WithRegistersLayer,
    Dinov2WithRegistersMLP,
    Dinov2WithRegistersSwiGLUFFN,
)
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer, SiglipMLP
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, ViTMLP


class Parts(NamedTuple):
    """A block: x + project(attention(norm(x))), then x + mlp(x); `project` and `mlp` hold all that belongs to them."""

    norm: nn.Module
    attention: nn.Module
    project: Callable
    mlp: Callable
    scale: float
    dropout: float


def vit_parts(block):
    attention = block.attention
    return Parts(
        block.layernorm_before,
        attention,
        lambda x: block.dropout(attention.o_proj(x)),
        lambda x: block.dropout(block.mlp(block.layernorm_after(x))),
        attention.scaling,
        attention.attention_dropout,
    )


def dinov2_parts(block):
    attention = block.attention
    return Parts(
        block.norm1,
        attention,
        lambda x: block.drop_path(block.layer_scale1(attention.o_proj(x))),
        lambda x: block.drop_path(block.layer_scale2(block.mlp(block.norm2(x)))),
        attention.scaling,
        attention.attention_dropout,
    )


def clip_parts(block):
    attention = block.self_attn
    return Parts(
        block.layer_norm1,
        attention,
        attention.out_proj,
        lambda x: block.mlp(block.layer_norm2(x)),
        attention.scale,
        attention.dropout,
    )


#: the parts of each kind of block, and of which kind its attention and its MLP must be
KNOWN = {
    ViTLayer: (vit_parts, ViTAttention, (ViTMLP,)),
    DeiTLayer: (vit_parts, DeiTAttention, (DeiTMLP,)),
    Dinov2Layer: (dinov2_parts, Dinov2Attention, (Dinov2MLP, Dinov2SwiGLUFFN)),
    Dinov2WithRegistersLayer: (
        dinov2_parts,
        Dinov2WithRegistersAttention,
        (Dinov2WithRegistersMLP, Dinov2WithRegistersSwiGLUFFN),
    ),
    CLIPEncoderLayer: (clip_parts, CLIPAttention, (CLIPMLP,)),
    SiglipEncoderLayer: (clip_parts, SiglipAttention, (SiglipMLP,)),
}


def plain_parts(block):
    """The parts of a block that is transformers' own, every part of it known; None for any other."""
    if type(block) not in KNOWN:
        return None
    parts_of, attention_kind, mlp_kinds = KNOWN[type(block)]
    parts = parts_of(block)
    plain = (
        type(parts.attention) is attention_kind
        and type(block.mlp) in mlp_kinds
        and parts.attention.config._attn_implementation == "sdpa"
        # a forward that replaces the class's is not there in a narrow block
        and not any("forward" in module.__dict__ for module in (block, parts.attention))
    )
    return parts if plain else None


def has_hooks(block, parts):
    """Whether somebody looks at what goes in and out of a block or its attention: they must then be called."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in (block, parts.attention))


def narrow(parts, tokens, keep, key_bias, reading, kernel):
    """A block of these parts on tokens (B, n, D) for the first `keep` or, in their place, `reading`: (B, keep, D).

    All tokens are keys and values, with `key_bias` (B, n) or None; `kernel` is one of slim's for a bias per key.
    """
    attention, x = parts.attention, parts.norm(tokens)
    asking = x[:, :keep] if reading is None else parts.norm(reading)
    query, key, value = (
        projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projected in (attention.q_proj(asking), attention.k_proj(x), attention.v_proj(x))
    )
    dropout = parts.dropout if attention.training else 0.0
    if key_bias is None:
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=parts.scale)
    else:
        out = slimcli.attend(query, key, value, key_bias, scale=parts.scale, dropout=dropout, kernel=kernel)
    read = tokens[:, :keep] if reading is None else reading
    read = read + parts.project(out.transpose(1, 2).flatten(2))
    return read + parts.mlp(read)
