"""How slim runs open_clip's vision towers."""

import slimcli
from open_clip.timm_model import TimmModel
from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock, VisionTransformer
from torch import nn
from torch.nn import functional as F

from slim_openclip.tower import ImageTower

CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
#: kinds of block, with that of their attention, that can run for some tokens alone
PLAIN = (ResidualAttentionBlock, nn.MultiheadAttention), (CustomResidualAttentionBlock, Attention)


def find_backbone(model):
    """The adapter for a tower, alone or in an `ImageTower`; None for anything else."""
    visual = model.visual if isinstance(model, ImageTower) else model
    if isinstance(visual, VisionTransformer):
        if visual.attn_pool is not None and visual.attn_pool_contrastive is not None:
            raise slimcli.SlimError("a tower with two attentional poolings cannot be slimmed: one reads the other's")
        return OpenClipViT(model)
    if isinstance(visual, TimmModel):
        return TimmTower(model)
    kind = type(model)
    if kind.__module__.startswith("open_clip."):
        if hasattr(model, "visual"):
            raise slimcli.SlimError(f"give the tower of a {kind.__name__}: model.visual = slimcli.slim(model.visual)")
        raise slimcli.SlimError(f"open_clip's {kind.__name__} cannot be slimmed: it is not a Vision Transformer")
    return None


class Tower(slimcli.Backbone):
    """What towers have in common: an embedding, compared with the dense one, and class texts on top of it."""

    compares_embeddings = True
    classifier_names = ("class_embeddings", "logit_scale")

    @property
    def visual(self):
        return self.model.visual if isinstance(self.model, ImageTower) else self.model

    @property
    def image_size(self):
        return tuple(self.visual.image_size)

    @property
    def has_classifier(self):
        return isinstance(self.model, ImageTower) and self.model.class_embeddings is not None

    def head(self, tokens, key_bias=None):
        embedding = self.embedding(tokens, key_bias)
        return self.model.classify(embedding) if isinstance(self.model, ImageTower) else embedding

    def preprocessing(self):
        config = getattr(self.visual, "preprocess_cfg", {})
        mean, std = config.get("mean", CLIP[0]), config.get("std", CLIP[1])
        return {**super().preprocessing(), "mean": tuple(mean), "std": tuple(std)}


class OpenClipViT(Tower):
    """open_clip's own Vision Transformer."""

    def __init__(self, model):
        super().__init__(model)
        self.head_reads_prefix_only = self.visual.attn_pool is None and self.visual.pool_type == "tok"

    @property
    def blocks(self):
        return self.visual.transformer.resblocks

    @property
    def grid_size(self):
        return tuple(self.visual.grid_size)

    def embed(self, images):
        return self.visual._embeds(images), None

    def block(self, layer, tokens, positions=None):
        return self.run(layer, tokens, None)

    def masked_block(self, layer, tokens, positions, key_bias):
        return self.run(layer, tokens, key_bias)

    def run(self, layer, tokens, key_bias):
        block = self.blocks[layer - 1]
        if not isinstance(block.attn, nn.MultiheadAttention):
            if key_bias is None:
                return block(tokens)
            with slimcli.biased_attention(key_bias, kernel=self.attention, where=f"block {layer}"):
                return block(tokens)
        tokens = tokens + block.ls_1(self.attend(block.attn, block.ln_1(tokens), key_bias))
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))

    def narrows(self, layer):
        return is_plain(self.blocks[layer - 1])

    def narrow_block(self, layer, tokens, positions, keep, key_bias=None, reading=None):
        block = self.blocks[layer - 1]
        if positions is not None or not is_plain(block) or has_hooks(block):
            return super().narrow_block(layer, tokens, positions, keep, key_bias, reading)
        x = block.ln_1(tokens)
        asking = x[:, :keep] if reading is None else block.ln_1(reading)
        attended = self.attend(block.attn, x, key_bias, asking)
        if type(block) is CustomResidualAttentionBlock:
            attended = block.ln_attn(attended)
        read = (tokens[:, :keep] if reading is None else reading) + block.ls_1(attended)
        return read + block.ls_2(block.mlp(block.ln_2(read)))

    def attend(self, attn, x, key_bias, asking=None):
        """The attention `attn`, torch's or open_clip's, of `asking` (B, m, D), by default x, to x (B, n, D).

        With a bias per key (B, n) on the kernel that slim chooses.
        """
        weight, bias, custom = attn.in_proj_weight, attn.in_proj_bias, type(attn) is Attention
        if asking is None:
            query, key, value = F.linear(x, weight, bias).chunk(3, dim=-1)
        else:
            width = x.shape[-1]
            first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
            query = F.linear(asking, weight[:width], first)
            key, value = F.linear(x, weight[width:], rest).chunk(2, dim=-1)
        query, key, value = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        if custom:
            query, key = attn.ln_q(query), attn.ln_k(key)
        dropout = (attn.attn_drop.p if custom else attn.dropout) if attn.training else 0.0
        if key_bias is None:
            out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        else:
            out = slimcli.attend(query, key, value, key_bias, dropout=dropout, kernel=self.attention)
        if custom and attn.head_scale is not None:
            out = out * attn.head_scale
        out = out.transpose(1, 2).flatten(2)
        return attn.out_drop(attn.out_proj(attn.ln_inner(out))) if custom else attn.out_proj(out)

    def final_norm(self, tokens):
        norm = self.visual.ln_post
        # an attentional pooling of another width is normalised, not the tokens
        return norm(tokens) if self.visual.attn_pool is None else tokens

    def pooled_tokens(self, tokens):
        """What the tower returns beside its embedding where it is asked for tokens, of all tokens (B, P + N, D)."""
        return self.visual._pool(tokens)[1]

    def embedding(self, tokens, key_bias=None):
        visual = self.visual
        if visual.attn_pool is not None and key_bias is not None:
            with slimcli.biased_attention(key_bias, kernel=self.attention, where="the attentional pooling"):
                pooled, _ = visual._pool(tokens)
        elif visual.pool_type == "avg" and visual.attn_pool is None and key_bias is not None:
            norm = visual.ln_post
            after = visual.final_ln_after_pool
            pooled = slimcli.pool_mean((tokens if after else norm(tokens))[:, 1:], key_bias[:, 1:])
            pooled = norm(pooled) if after else pooled
        else:
            pooled, _ = visual._pool(tokens)
        return pooled if visual.proj is None else pooled @ visual.proj


def is_plain(block):
    """Whether a block is open_clip's own, every part of it known: what it does can be done for some tokens alone."""
    attn = block.attn
    return (
        (type(block), type(attn)) in PLAIN
        and type(block.mlp) is nn.Sequential
        # scaled cosines and the plain formula do not go through scaled_dot_product_attention
        and (type(attn) is not Attention or (attn.logit_scale is None and attn.use_fsdpa))
    )


def has_hooks(block):
    """Whether somebody looks at what goes in and out of a block or its attention: they must then be called."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in (block, block.attn))


class TimmTower(Tower):
    """A timm model in open_clip's clothes: slim's own adapter for the trunk, and the tower's projection."""

    def __init__(self, model):
        super().__init__(model)
        self.trunk = slimcli.slim(self.visual.trunk, keep_rate=1.0).backbone
        self.global_token = self.trunk.global_token

    @property
    def head_reads_prefix_only(self):
        return self.trunk.head_reads_prefix_only

    @property
    def image_size(self):
        return self.trunk.image_size

    @property
    def blocks(self):
        return self.trunk.blocks

    @property
    def num_prefix_tokens(self):
        return self.trunk.num_prefix_tokens

    def embed(self, images):
        return self.trunk.embed(images)

    def block(self, layer, tokens, positions=None):
        return self.trunk.block(layer, tokens, positions)

    def masked_block(self, layer, tokens, positions, key_bias):
        self.trunk.attention = self.attention
        return self.trunk.masked_block(layer, tokens, positions, key_bias)

    def narrows(self, layer):
        return self.trunk.narrows(layer)

    def narrow_block(self, layer, tokens, positions, keep, key_bias=None, reading=None):
        self.trunk.attention = self.attention
        return self.trunk.narrow_block(layer, tokens, positions, keep, key_bias, reading)

    def final_norm(self, tokens):
        return self.trunk.final_norm(tokens)

    def embedding(self, tokens, key_bias=None):
        return self.visual.head(self.trunk.head(tokens, key_bias))
