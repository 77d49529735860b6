"""timm's Vision Transformers, run through timm's own layers and blocks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from slimcli.attention import attend, biased_attention
from slimcli.backbones.base import pool_mean
from slimcli.backbones.timm_folder import plain_architecture, timm_config
from slimcli.backbones.timm_names import is_fetched, plain_name
from slimcli.backbones.timm_sizes import Resizable
from slimcli.errors import SlimError
from slimcli.hub import cached_where_unreached
from slimcli.layout import has_hooks, rows

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


#: packages whose errors, while weights are fetched, are the network's or the hub's
HUBS = ("huggingface_hub", "requests", "httpx", "urllib3", "urllib")


def build_model(name: str, pretrained: bool, args: dict[str, Any]) -> nn.Module | None:
    """`timm.create_model`, with its errors put plainly; None where timm has no such model."""
    name = plain_name(name)
    hub = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not hub and not timm.is_model(name):
        return None
    if name.startswith("naflexvit") and "img_size" in args:
        # these take any size and do not say which one they were built for
        size = args["img_size"]
        height, width = (size, size) if isinstance(size, int) else size
        args = {**args, "pretrained_cfg_overlay": {"input_size": (args.get("in_chans", 3), height, width)}}
    try:
        with cached_where_unreached() if is_fetched(name, pretrained) else nullcontext():
            return timm.create_model(name, pretrained=pretrained, **args)
    except Exception as error:  # what constructors make of odd arguments, and hubs of a broken network, is anything
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if (pretrained or hub) and (isinstance(error, OSError) or type(error).__module__.split(".")[0] in HUBS):
            raise SlimError(
                f"the pretrained weights of {name!r} cannot be had: {reason}: connect to the network, or give a "
                "weights file (model.weights) or pretrained = false"
            ) from error
        if isinstance(error, RuntimeError) and pretrained:
            raise SlimError(f"timm cannot load {name!r}: {reason}") from error
        given = ", ".join(f"{key}={value!r}"[:80] for key, value in args.items())[:300] or "no arguments"
        raise SlimError(f"timm cannot build {name!r} with {given}: {reason}") from error


class TimmViT(Resizable):
    """timm's `VisionTransformer` and its distilled variant, and what its other ViTs have in common with it."""

    model: VisionTransformer
    classifier_names = ("head", "head_dist")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.global_token = "cls" if self._has_class_token() else "mean"

    @property
    def head_reads_prefix_only(self) -> bool:  # type: ignore[override]
        return isinstance(self.model, VisionTransformerDistilled) or self.model.global_pool == "token"

    def _has_class_token(self) -> bool:
        return getattr(self.model, "cls_token", None) is not None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.blocks

    @property
    def num_prefix_tokens(self) -> int:
        return self.model.num_prefix_tokens

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.model.patch_embed.grid_size

    @property
    def image_size(self) -> tuple[int, int]:
        return self.model.patch_embed.img_size

    @property
    def has_classifier(self) -> bool:
        return self.model.num_classes > 0

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        model = self.model
        tokens = model._pos_embed(model.patch_embed(images))
        return model.norm_pre(model.patch_drop(tokens)), None

    def masked_block(self, layer: int, tokens: Tensor, positions: Tensor | None, key_bias: Tensor) -> Tensor:
        block: Any = self.blocks[layer - 1]
        if positions is not None or not is_plain(block) or has_hooks(block, block.attn):
            where = f"block {layer} of {type(self.model).__name__}"
            with fused(block) as switched, biased_attention(key_bias, kernel=self._kernel(switched), where=where):
                return self.block(layer, tokens, positions)
        # to look for the attention of a block that is known would cost a call to Python for every operator
        return self.narrow_block(layer, tokens, None, tokens.shape[1], key_bias)

    def observed_block(self, layer: int, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        with fused(self.blocks[layer - 1]):
            return self.block(layer, tokens, positions)

    def _kernel(self, switched: bool) -> str:
        """The kernel for keys with a bias: the plain formula where timm was told to use it."""
        return "reference" if switched else self.attention

    def narrows(self, layer: int) -> bool:
        return is_plain(self.blocks[layer - 1])

    def narrow_block(
        self,
        layer: int,
        tokens: Tensor,
        positions: Tensor | None,
        keep: int,
        key_bias: Tensor | None = None,
        reading: Tensor | None = None,
    ) -> Tensor:
        block: Any = self.blocks[layer - 1]
        if positions is not None or not is_plain(block) or has_hooks(block, block.attn):
            return super().narrow_block(layer, tokens, positions, keep, key_bias, reading)
        x = block.norm1(tokens)
        if reading is not None:
            read, asking = reading, block.norm1(reading)
        elif keep < tokens.shape[1]:
            read, asking = tokens[:, :keep], x[:, :keep]
        else:
            read, asking = tokens, x
        read = read + block.drop_path1(block.ls1(self._attention(block.attn, asking, x, key_bias)))
        return read + block.drop_path2(block.ls2(block.mlp(block.norm2(read))))

    def _attention(self, attn: Attention, reading: Tensor, x: Tensor, key_bias: Tensor | None) -> Tensor:
        """timm's attention of the tokens `reading` (B, keep, D) to the tokens `x` (B, n, D): (B, keep, D)."""
        split = attn.num_heads * attn.head_dim
        batch, n, _ = x.shape
        keep = reading.shape[1]
        if reading is x:
            query, key, value = attn.qkv(x).reshape(batch, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            query = rows(attn.qkv, reading, 0, split).reshape(batch, keep, attn.num_heads, -1).transpose(1, 2)
            both = rows(attn.qkv, x, split, 3 * split)
            key, value = both.reshape(batch, n, 2, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = attn.q_norm(query), attn.k_norm(key)
        dropout = attn.attn_drop.p if attn.training else 0.0
        if not attn.fused_attn:
            # timm's switch for the plain formula
            out = attend(query, key, value, key_bias, dropout=dropout, kernel="reference")
        elif key_bias is None:
            out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        else:
            out = attend(query, key, value, key_bias, dropout=dropout, kernel=self.attention)
        out = attn.norm(out.transpose(1, 2).reshape(batch, keep, split))
        if getattr(attn, "gate", None) is not None:
            out = out * attn.gate(reading).sigmoid()
        return attn.proj_drop(attn.proj(out))

    def halves(self, layer: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
        block: Any = self.blocks[layer - 1]
        if type(block) is not Block:
            return None

        def attention(tokens: Tensor) -> Tensor:
            with fused(block):
                return tokens + block.drop_path1(block.ls1(block.attn(block.norm1(tokens))))

        def mlp(tokens: Tensor) -> Tensor:
            return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

        return attention, mlp

    def final_norm(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def head(self, tokens: Tensor, key_bias: Tensor | None = None) -> Tensor:
        if isinstance(self.model, VisionTransformerDistilled):
            return self.model.forward_head(self.model.norm(tokens))
        return self._classify(self._features(tokens, key_bias), pre_logits=False)

    def embedding(self, tokens: Tensor, key_bias: Tensor | None = None) -> Tensor:
        if isinstance(self.model, VisionTransformerDistilled):
            return self.model.forward_head(self.model.norm(tokens), pre_logits=True)
        return self._classify(self._features(tokens, key_bias), pre_logits=True)

    def _classify(self, features: Tensor, pre_logits: bool) -> Tensor:
        model = self.model
        # a model without pooling normalises and classifies every token
        features = model.head_drop(model.fc_norm(features))
        return features if pre_logits else model.head(features)

    def _features(self, tokens: Tensor, key_bias: Tensor | None) -> Tensor:
        """timm's final norm and pooling, with every token weighted by exp(key_bias)."""
        tokens = self.model.norm(tokens)
        if key_bias is None or self.head_reads_prefix_only or self.model.global_pool == "":
            return self._pool(tokens)
        return self._weighted_pool(tokens, key_bias)

    def _pool(self, tokens: Tensor) -> Tensor:
        return self.model.pool(tokens)

    def _weighted_pool(self, tokens: Tensor, key_bias: Tensor) -> Tensor:
        model, kind = self.model, self.model.global_pool
        first = 0 if getattr(model, "pool_include_prefix", False) else self.num_prefix_tokens
        if kind == "map":
            first = first if hasattr(model, "pool_include_prefix") else 0
            where = "the attention pooling"
            with fused(model) as off, biased_attention(key_bias[:, first:], kernel=self._kernel(off), where=where):
                return self._pool(tokens)
        tokens, key_bias = tokens[:, first:], key_bias[:, first:]
        mean = pool_mean(tokens, key_bias)
        if kind == "avg":
            return mean
        if kind in ("max", "avgmax"):
            bias = key_bias - key_bias.amax(dim=1, keepdim=True)
            maximum = (tokens + bias.unsqueeze(-1).to(tokens.dtype)).amax(dim=1)
            return maximum if kind == "max" else 0.5 * (maximum + mean)
        raise SlimError(f"pooling {kind!r} cannot weight its patches: train in hard mode instead of soft")

    def adapt_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # of older timm's not every module of models has one
        adapt = getattr(sys.modules[family(type(self.model))], "checkpoint_filter_fn", None)
        return dict(state) if adapt is None else adapt(dict(state), self.model)

    def preprocessing(self) -> dict[str, Any]:
        config = timm.data.resolve_model_data_config(self.model)
        config["input_size"] = (image_channels(self.model), *self.image_size)
        return config

    def rebuilt_as(self, name: str, args: Mapping[str, Any]) -> dict[str, Any]:
        return plain_architecture(self.model, name, args)

    def library_config(self, built_from: Mapping[str, Any], prepare: Mapping[str, Any] | None) -> dict[str, Any]:
        return timm_config(self.model, built_from["name"], built_from["args"], prepare or self.preprocessing())


def image_channels(model: nn.Module) -> int:
    """Channels of the images that a model takes; of older timm's not every model says so, but its first layer does."""
    for module in model.modules():
        if isinstance(channels := getattr(module, "in_chans", None), int):
            return channels
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise SlimError(f"{type(model).__name__} does not say how many channels its images have")


def is_plain(block: Any) -> bool:
    """Whether a block is timm's own, every part of it known: what it does can then be done for some tokens alone."""
    return (
        type(block) is Block
        and type(block.attn) is Attention
        and type(block.mlp) in (Mlp, GluMlp, SwiGLU)
        and not any("forward" in part.__dict__ for part in (block, block.attn))
    )


#: held while attention modules are switched
_SWITCHING = threading.RLock()


@contextmanager
def fused(module: nn.Module) -> Iterator[bool]:
    """Inside it, attention goes through torch's fused function, where slim adds a bias or reads queries and keys.

    timm's own switch for the plain formula (`TIMM_FUSED_ATTN=0`, `set_fused_attn`) is put back afterwards. Yields
    whether it was set.
    """
    off = [part for part in module.modules() if getattr(part, "fused_attn", True) is False]
    if not off:
        yield False
        return
    with _SWITCHING:
        for part in off:
            part.fused_attn = True  # type: ignore[assignment]
        try:
            yield True
        finally:
            for part in off:
                part.fused_attn = False  # type: ignore[assignment]


def family(kind: type) -> str:
    """The module of timm's that a model class or its nearest ancestor there comes from."""
    return str(next(base.__module__ for base in kind.__mro__ if base.__module__.startswith("timm.models.")))
