"""timm's other ViT families: which adapter each has, and why some cannot drop patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import HybridEmbed
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from slimcli.attention import biased_attention
from slimcli.backbones.base import Backbone, pool_mean
from slimcli.backbones.timm_vit import TimmViT, build_model, family, fused
from slimcli.errors import SlimError
from slimcli.life import prefix_bias

# Why a family of timm's cannot drop patches, by the start of its module's name.
REFUSED = {
    "swin": "it attends within fixed windows and merges neighbouring patches between stages",
    "vision_transformer_hybrid": "a convolutional network computes its patches, and dropping saves nothing of that",
    "vision_transformer_sam": "most of its blocks attend within fixed windows",
    "vitamin": "it puts convolutions between its stages",
    "maxxvit": "it attends within windows and grids and has convolutions between them",
    "coatnet": "it has convolutions between its blocks",
    "convit": "its first blocks weigh attention with fixed places on the grid",
    "convnext": "it has no patches that could be dropped: it is a convolutional network",
    "resnet": "it has no patches that could be dropped: it is a convolutional network",
    "efficientnet": "it has no patches that could be dropped: it is a convolutional network",
    "mobilenet": "it has no patches that could be dropped: it is a convolutional network",
    "regnet": "it has no patches that could be dropped: it is a convolutional network",
    "vgg": "it has no patches that could be dropped: it is a convolutional network",
    "densenet": "it has no patches that could be dropped: it is a convolutional network",
    "efficientvit": "it has convolutions in its attention",
    "efficientformer": "it has convolutions between its blocks and downsamples its grid between stages",
    "fastvit": "it has convolutions between its blocks",
    "gcvit": "it attends within fixed windows",
    "metaformer": "it downsamples its grid of patches between stages",
    "mobilevit": "it has convolutions between its blocks",
    "edgenext": "it has convolutions between its blocks",
    "nextvit": "it has convolutions between its blocks",
    "pvt": "it attends to a convolved, downsampled grid of keys",
    "pit": "it pools its patches with convolutions between stages",
    "levit": "it downsamples its grid of patches between stages",
    "hiera": "it merges patches between stages",
    "mvitv2": "it pools queries and keys on the grid in every block",
    "tiny_vit": "it attends within windows and has convolutions in its blocks",
    "tnt": "it runs a second transformer inside every patch",
    "twins": "it attends within windows and has convolutions between its blocks",
    "coat": "it has convolutions in its attention",
    "crossvit": "it runs two grids of patches side by side",
    "davit": "it attends within fixed windows",
    "focalnet": "it has convolutions in place of attention",
    "mlp_mixer": "it mixes patches with weights fixed to their places",
    "nest": "it attends within blocks of the grid and merges them",
    "visformer": "it has convolutions in its blocks and downsamples its grid between stages",
    "volo": "it attends within windows around each patch",
    "xcit": "it has convolutions in every block and attends over channels",
}


def backbone(model: nn.Module) -> Backbone | None:
    """The adapter for `model`; None if it is not timm's; `SlimError` with the reason if it cannot drop patches."""
    name = type(model).__name__
    for kind, adapter in ADAPTERS.items():
        if isinstance(model, kind):
            if any("forward_features" in vars(base) for base in type(model).__mro__[: type(model).__mro__.index(kind)]):
                raise SlimError(f"{name} runs its blocks in its own way: a backbone plugin must tell slim how")
            if isinstance(getattr(model, "patch_embed", None), HybridEmbed):
                raise SlimError(f"{name} cannot be slimmed: {REFUSED['vision_transformer_hybrid']}")
            return adapter(model)
    if not type(model).__module__.startswith("timm.models."):
        return None
    where = family(type(model)).removeprefix("timm.models.")
    for prefix in sorted(REFUSED, key=len, reverse=True):
        if where.startswith(prefix):
            raise SlimError(f"{name} cannot be slimmed: {REFUSED[prefix]}")
    raise SlimError(f"{name} (timm.models.{where}) is not a plain ViT that slim knows; `slim plugins` lists what is")


class TimmEva(TimmViT):
    """EVA, EVA-02, DINOv3, the rope ViTs and the perception encoders: rotary embeddings travel with the patches."""

    model: Eva

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens, rope = self.model._pos_embed(self.model.patch_embed(images))
        return self.model.norm_pre(tokens), rope_positions(rope, self.model.rope_mixed)

    def block(self, layer: int, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        rope = rope_of_layer(positions, layer, self.model.rope_mixed)
        return self.model.blocks[layer - 1](tokens, rope=rope)


class TimmNaFlex(TimmViT):
    """NaFlexViT on images of one size, as a plain ViT runs on them."""

    model: NaFlexVit

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if model.rope is not None and model.rope_is_mixed:
            raise SlimError("a NaFlexVit with mixed rotary embeddings cannot be slimmed: they are made block by block")

    def _has_class_token(self) -> bool:
        return self.model.embeds.has_class_token

    @property
    def image_size(self) -> tuple[int, int]:
        return self.model.embeds.default_img_size or tuple(self.model.pretrained_cfg["input_size"][1:])

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.model.embeds.dynamic_feat_size(self.image_size)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = self.model._forward_embeds(images, patch_coord=None, patch_valid=None, attn_mask=None)
        return found["patches"], rope_positions(found["rope_embeds"], False)

    def block(self, layer: int, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        block = self.model.blocks[layer - 1]
        return block(tokens) if positions is None else block(tokens, rope=rope_of_layer(positions, layer, False))

    def _pool(self, tokens: Tensor) -> Tensor:
        return self.model._pool(tokens)


def rope_positions(rope: Tensor | None, mixed: bool) -> Tensor | None:
    """timm's rotary table as positions (1 or B, N, ...): the patches' dimension second.

    timm has (N, d), after patch dropout (B, 1, N, d); with `mixed`, every block and head has its own: (L, H, N, d)
    or (L, B, H, N, d).
    """
    if rope is None:
        return None
    if mixed:
        rope = rope.unsqueeze(1) if rope.dim() == 4 else rope
        return rope.permute(1, 3, 0, 2, 4)
    return rope.unsqueeze(0) if rope.dim() == 2 else rope.squeeze(1)


def rope_of_layer(positions: Tensor | None, layer: int, mixed: bool) -> Tensor | None:
    """The inverse of `rope_positions` for one block: (B, 1 or H, n, d)."""
    if positions is None:
        return None
    return positions[:, :, layer - 1].transpose(1, 2) if mixed else positions.unsqueeze(1)


class TimmRelPos(TimmViT):
    """ViTs with a table of relative position biases. A patch's position is its place in the dense sequence.

    timm's blocks pass the bias of all pairs of tokens to the attention; the rows and columns of the tokens that are
    left are taken out of it there.
    """

    model: VisionTransformerRelPos

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = self.model.patch_embed(images)
        if self.model.cls_token is not None:
            tokens = torch.cat((self.model.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        return tokens, self._places(tokens)

    def _places(self, tokens: Tensor) -> Tensor:
        return torch.arange(self.num_prefix_tokens, tokens.shape[1], device=tokens.device)[None]

    def block(self, layer: int, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return self._related(layer, tokens, positions, None)

    def masked_block(self, layer: int, tokens: Tensor, positions: Tensor | None, key_bias: Tensor) -> Tensor:
        return self._related(layer, tokens, positions, key_bias)

    def _related(self, layer: int, tokens: Tensor, positions: Tensor | None, key_bias: Tensor | None) -> Tensor:
        if positions is not None:
            prefix = torch.arange(self.num_prefix_tokens, device=tokens.device).expand(positions.shape[0], -1)
            positions = torch.cat((prefix, positions), dim=1)
        where = f"block {layer} of {type(self.model).__name__}"
        with fused(self.blocks[layer - 1]) as off, biased_attention(key_bias, positions, self._kernel(off), where):
            return self._run(layer, tokens)

    def _run(self, layer: int, tokens: Tensor) -> Tensor:
        shared = self.model.shared_rel_pos
        return self.model.blocks[layer - 1](tokens, shared_rel_pos=shared.get_bias() if shared is not None else None)

    def _pool(self, tokens: Tensor) -> Tensor:
        model = self.model
        if not model.global_pool:
            return tokens
        return pool_mean(tokens[:, self.num_prefix_tokens :]) if model.global_pool == "avg" else tokens[:, 0]


class TimmBeit(TimmRelPos):
    """BEiT and BEiT v2."""

    model: Beit

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        model = self.model
        tokens = model.patch_embed(images)
        tokens = torch.cat((model.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        if model.pos_embed is not None:
            tokens = tokens + model.pos_embed
        return model.pos_drop(tokens), self._places(tokens)

    def _run(self, layer: int, tokens: Tensor) -> Tensor:
        shared = self.model.rel_pos_bias
        return self.model.blocks[layer - 1](tokens, shared_rel_pos_bias=shared() if shared is not None else None)


class TimmCait(TimmViT):
    """CaiT: talking heads on patches alone, then class attention, which is part of the head.

    Its heads talk twice: before the softmax, so that a key's bias comes after that, and after it with a constant for
    every key, which a patch that leaves takes away with it.
    """

    model: Cait

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.global_token = "mean"

    @property
    def head_reads_prefix_only(self) -> bool:  # type: ignore[override]
        return False

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.blocks)

    @property
    def num_prefix_tokens(self) -> int:
        return 0

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.model.pos_drop(self.model.patch_embed(images) + self.model.pos_embed), None

    def masked_block(self, layer: int, tokens: Tensor, positions: Tensor | None, key_bias: Tensor) -> Tensor:
        return self._talking(layer, tokens, key_bias)[0]

    def global_attention(self, layer: int, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._talking(layer, tokens, None)

    def _talking(self, layer: int, tokens: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """A block's output, and the attention (B, n) that each patch is paid, averaged over heads and queries."""
        block = self.model.blocks[layer - 1]
        attn = block.attn
        x = block.norm1(tokens)
        batch, n, width = x.shape
        query, key, value = attn.qkv(x).reshape(batch, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = _talk(attn.proj_l, (query * attn.scale) @ key.transpose(-2, -1))
        if key_bias is not None:
            logits = logits + key_bias[:, None, None, :].to(logits.dtype)
        paid = logits.softmax(dim=-1)
        weights = _talk(attn.proj_w, paid)
        if key_bias is not None:
            nothing = weights.new_zeros(1, attn.num_heads, 1, 1)
            constant = _talk(attn.proj_w, nothing) * (key_bias.exp() - 1)[:, None, None, :].to(logits.dtype)
            weights = weights + constant
        x = (attn.attn_drop(weights) @ value).transpose(1, 2).reshape(batch, n, width)
        x = tokens + block.drop_path(block.gamma_1 * attn.proj_drop(attn.proj(x)))
        return x + block.drop_path(block.gamma_2 * block.mlp(block.norm2(x))), paid.mean(dim=(1, 2))

    def _features(self, tokens: Tensor, key_bias: Tensor | None) -> Tensor:
        model = self.model
        whole = model.cls_token.expand(tokens.shape[0], -1, -1)
        for block in model.blocks_token_only:
            if key_bias is None:
                whole = block(tokens, whole)
            else:
                bias, where = prefix_bias(key_bias, 1), "the class attention"
                with fused(block) as off, biased_attention(bias, kernel=self._kernel(off), where=where):
                    whole = block(tokens, whole)
        tokens = model.norm(torch.cat((whole, tokens), dim=1))
        if not model.global_pool:
            return tokens
        return pool_mean(tokens[:, 1:], key_bias) if model.global_pool == "avg" else tokens[:, 0]

    def features(self, tokens: Tensor) -> Tensor:
        model = self.model
        return model.norm(model.forward_cls(tokens) if model.blocks_token_only is not None else tokens)

    def _classify(self, features: Tensor, pre_logits: bool) -> Tensor:
        features = self.model.head_drop(features)
        return features if pre_logits else self.model.head(features)


def _talk(projection: nn.Linear, heads: Tensor) -> Tensor:
    """Mix heads (B, H, n, n) with a linear layer over H."""
    found: Tensor = projection(heads.permute(0, 2, 3, 1))
    return found.permute(0, 3, 1, 2)


ADAPTERS: dict[type[nn.Module], type[TimmViT]] = {
    VisionTransformer: TimmViT,
    Eva: TimmEva,
    NaFlexVit: TimmNaFlex,
    VisionTransformerRelPos: TimmRelPos,
    Beit: TimmBeit,
    Cait: TimmCait,
}


#: A small variant of every family: what differs from `SMALL`. timm builds them by their names.
SMALL = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
VARIANTS: dict[str, dict[str, object]] = {
    "vit_small_patch16_224": {},
    "vit_base_patch16_rpn_224": {},
    "vit_medium_patch16_reg4_gap_256": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch16_siglip_gap_224": {},
    "vit_relpos_small_patch16_224": {},
    "vit_relpos_medium_patch16_cls_224": {},
    "vit_srelpos_small_patch16_224": {},
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
    "vit_small_patch16_dinov3": {},
    "vit_pe_core_tiny_patch16_384": {},
    "aimv2_large_patch14_224": {"img_size": 56},
    "deit_small_patch16_224": {},
    "deit_small_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "beit_base_patch16_224": {},
    "beitv2_base_patch16_224": {},
    "eva_giant_patch14_224": {"img_size": 56},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "eva02_base_patch16_clip_224": {},
    "cait_xxs24_224": {"depth_token_only": 1},
    "naflexvit_base_patch16_gap": {},
    "naflexvit_base_patch16_map": {},
}


def small_models() -> dict[str, Callable[[], Any]]:
    """Builders of a small random model of every family."""
    return {name: partial(build_model, name, False, {**SMALL, **changes}) for name, changes in VARIANTS.items()}
