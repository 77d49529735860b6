"""timm's plain Vision Transformers, run through timm's own layers and blocks."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from slimcli.backbones.base import Backbone, convolution_multiply_adds, linear_weights
from slimcli.errors import SlimError
from slimcli.schedule import Architecture

DIGITS_VIT = Path(__file__).parent.parent / "assets" / "digits_vit"

default_cfgs = generate_default_cfgs(
    {
        "digits_vit.slim": {
            "file": str(DIGITS_VIT / "model.safetensors"),
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def digits_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The embedded default: 12 blocks, width 96, patch 4 at 32 px (64 patches), for scikit-learn's 8 x 8 digits."""
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 12, "num_heads": 3, "num_classes": 10}
    return build_model_with_cfg(
        VisionTransformer, "digits_vit", pretrained, pretrained_filter_fn=_dense_weights, **{**size, **kwargs}
    )


def _dense_weights(state: dict[str, Tensor], _model: nn.Module) -> dict[str, Tensor]:
    """The dense model's weights out of a slimmed model's."""
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


# Why a family of timm's cannot drop patches, by the start of its module's name.
REFUSED = {
    "swin": "it attends within fixed windows and merges neighbouring patches between stages",
    "vision_transformer_sam": "most of its blocks attend within fixed windows",
    "vitamin": "it puts convolutions between its stages",
    "maxxvit": "it attends within windows and grids and has convolutions between them",
    "coatnet": "it has convolutions between its blocks",
    "convnext": "it has no patches that could be dropped: it is a convolutional network",
    "resnet": "it has no patches that could be dropped: it is a convolutional network",
    "efficientnet": "it has no patches that could be dropped: it is a convolutional network",
    "pvt": "it attends to a convolved, downsampled grid of keys",
    "pit": "it pools its patches with convolutions between stages",
    "levit": "it downsamples its grid of patches between stages",
    "hiera": "it merges patches between stages",
    "mvitv2": "it pools queries and keys on the grid in every block",
    "twins": "it attends within windows and has convolutions between its blocks",
    "coat": "it has convolutions in its attention",
    "crossvit": "it runs two grids of patches side by side",
    "davit": "it attends within fixed windows",
    "focalnet": "it has convolutions in place of attention",
    "mixer": "it mixes patches with weights fixed to their places",
    "mlp_mixer": "it mixes patches with weights fixed to their places",
    "nest": "it attends within blocks of the grid and merges them",
    "volo": "it attends within windows around each patch",
    "xcit": "it has convolutions in every block and attends over channels",
}


def build_model(name: str, pretrained: bool, args: dict[str, Any]) -> nn.Module | None:
    """`timm.create_model`, with its errors put plainly; None where timm has no such model."""
    hub = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not hub and not timm.is_model(name):
        return None
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except (TypeError, AssertionError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in args.items()) or "no arguments"
        raise SlimError(f"timm cannot build {name!r} with {given}: {error}") from error
    except RuntimeError as error:
        raise SlimError(f"timm cannot load {name!r}: {error}") from error
    except OSError as error:
        raise SlimError(
            f"the pretrained weights of {name!r} cannot be had: {error}; "
            "give a weights file (model.weights) or pretrained = false"
        ) from error


def similar_names(name: str) -> list[str]:
    """timm's model names that come nearest to `name`."""
    return difflib.get_close_matches(name, timm.list_models(), n=3)


def backbone(model: nn.Module) -> Backbone | None:
    """The adapter for `model`; None if it is not timm's; `SlimError` with the reason if it cannot drop patches."""
    if isinstance(model, VisionTransformer):
        if type(model).forward_features is not VisionTransformer.forward_features:
            raise SlimError(
                f"{type(model).__name__} runs its blocks in its own way: a backbone plugin must tell slim how"
            )
        return TimmViT(model)
    family = type(model).__module__
    if not family.startswith("timm.models."):
        return None
    family = family.removeprefix("timm.models.")
    name = type(model).__name__
    for prefix in sorted(REFUSED, key=len, reverse=True):
        if family.startswith(prefix):
            raise SlimError(f"{name} cannot be slimmed: {REFUSED[prefix]}")
    raise SlimError(f"{name} (timm.models.{family}) is not a plain ViT that slim knows; `slim plugins` lists what is")


class TimmViT(Backbone):
    """timm's `VisionTransformer` and its distilled variant."""

    model: VisionTransformer
    classifier_names = ("head", "head_dist")

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__(model)
        self.global_token = "cls" if model.has_class_token else "mean"
        self.head_reads_prefix_only = isinstance(model, VisionTransformerDistilled) or model.global_pool == "token"

    @property
    def depth(self) -> int:
        return len(self.model.blocks)

    @property
    def embed_dim(self) -> int:
        return self.model.embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        return self.model.num_prefix_tokens

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.model.patch_embed.grid_size

    @property
    def image_size(self) -> tuple[int, int]:
        return self.model.patch_embed.img_size

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        model = self.model
        tokens = model._pos_embed(model.patch_embed(images))
        return model.norm_pre(model.patch_drop(tokens)), None

    def block(
        self, layer: int, tokens: Tensor, positions: Tensor | None = None, key_bias: Tensor | None = None
    ) -> Tensor:
        block = self.model.blocks[layer - 1]
        if key_bias is None:
            return block(tokens)
        return block(tokens, attn_mask=_attention_mask(key_bias, tokens))

    def head(self, tokens: Tensor, key_bias: Tensor | None = None) -> Tensor:
        model = self.model
        tokens = model.norm(tokens)
        if key_bias is None or self.head_reads_prefix_only or model.global_pool == "":
            return model.forward_head(tokens)
        first = 0 if model.pool_include_prefix else model.num_prefix_tokens
        pooled = self._pool(tokens[:, first:], key_bias[:, first:])
        return model.head(model.head_drop(model.fc_norm(pooled)))

    def _pool(self, tokens: Tensor, key_bias: Tensor) -> Tensor:
        """timm's pooling with every token weighted by exp(key_bias)."""
        model, kind = self.model, self.model.global_pool
        if kind == "map":
            return model.attn_pool(tokens, attn_mask=_attention_mask(key_bias, tokens))
        # softmax: exp(key_bias) that sums to one, and does not vanish when every bias is far below zero
        mean = (tokens * key_bias.softmax(dim=1).unsqueeze(-1).to(tokens.dtype)).sum(dim=1)
        if kind == "avg":
            return mean
        if kind in ("max", "avgmax"):
            bias = key_bias - key_bias.amax(dim=1, keepdim=True)
            maximum = (tokens + bias.unsqueeze(-1).to(tokens.dtype)).amax(dim=1)
            return maximum if kind == "max" else 0.5 * (maximum + mean)
        raise SlimError(f"pooling {kind!r} cannot weight its patches: train in hard mode instead of soft")

    def architecture(self) -> Architecture:
        model = self.model
        rows, columns = self.grid_size
        weight = next(model.parameters())
        image = torch.zeros(1, model.in_chans, *self.image_size, device=weight.device, dtype=weight.dtype)
        embedding = convolution_multiply_adds(model.patch_embed, image)
        head_fixed = sum(linear_weights(getattr(model, name)) for name in ("head", "head_dist") if hasattr(model, name))
        head_per_patch = 0
        if model.global_pool == "map":
            keys_and_values = linear_weights(model.attn_pool.kv)
            head_fixed += linear_weights(model.attn_pool) - keys_and_values
            head_per_patch = keys_and_values + 2 * model.embed_dim
        return Architecture(
            embed_dim=model.embed_dim,
            num_patches=rows * columns,
            num_prefix_tokens=model.num_prefix_tokens,
            patch_weights=embedding // (rows * columns),
            block_weights=tuple(linear_weights(block) for block in model.blocks),
            head_fixed=head_fixed,
            head_per_patch=head_per_patch,
            attention_dim=getattr(getattr(model.blocks[0], "attn", None), "attn_dim", None),
            num_outputs=model.num_classes,
        )

    def adapt_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return checkpoint_filter_fn(dict(state), self.model, interpolation="bicubic", antialias=True)

    def preprocessing(self) -> dict[str, Any]:
        config = timm.data.resolve_model_data_config(self.model)
        config["input_size"] = (self.model.in_chans, *self.image_size)
        return config


def _attention_mask(key_bias: Tensor, tokens: Tensor) -> Tensor:
    """A bias per key (B, n) as the mask (B, 1, 1, n) that attention broadcasts, in the dtype attention runs in."""
    device = tokens.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
    return key_bias[:, None, None, :].to(dtype)
