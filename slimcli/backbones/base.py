"""What slim asks of a model, with defaults for all that can be inferred."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from slimcli.schedule import Architecture


class Backbone(ABC):
    """Runs a Vision Transformer block by block. It holds the model and changes nothing in it.

    Tokens are (B, P + N, D): P prefix tokens (class, distillation, registers), then N patches in raster order.
    Some models need something of a patch's position in every block (a rotary embedding, an index into a table of
    relative positions). They return it from `embed` as `positions`, a tensor (1 or B, N, ...); slim reorders and
    slices it together with the patches and hands it to every block.
    """

    #: which token the life head compares the patches with: "cls", the first, or "mean", the mean of the patches
    global_token: str = "cls"
    #: whether the classifier reads prefix tokens alone, so that patches are not needed after the last block
    head_reads_prefix_only: bool = False
    #: the first part of the names of the classifier's parameters, which may differ between data sets
    classifier_names: tuple[str, ...] = ("head",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    # What a plugin must say.

    @property
    @abstractmethod
    def depth(self) -> int:
        """Number of blocks L."""

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """Width D of a token."""

    @property
    @abstractmethod
    def num_prefix_tokens(self) -> int:
        """Number of tokens P before the patches; they are never dropped."""

    @property
    @abstractmethod
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of the model's own size."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the images that the model takes."""

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) to the tokens (B, P + N, D) that enter block 1, and their `positions` or None."""

    @abstractmethod
    def block(
        self, layer: int, tokens: Tensor, positions: Tensor | None = None, key_bias: Tensor | None = None
    ) -> Tensor:
        """Run block `layer` (1-based). `key_bias` (B, P + n) is added to the attention logits of each key."""

    @abstractmethod
    def head(self, tokens: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """Tokens after the last block to logits.

        `key_bias` is log w of every token: a classifier that pools patches weights them by w.
        """

    @abstractmethod
    def architecture(self) -> Architecture:
        """The numbers that the cost formula needs."""

    # What can be inferred.

    def preprocessing(self) -> dict[str, Any]:
        """How images are prepared: input_size (3, H, W), mean, std, interpolation, crop_pct, crop_mode."""
        return {
            "input_size": (3, *self.image_size),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
        }

    def adapt_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit a state dict to the model: rename keys, resample the position embedding to the model's grid."""
        return state

    def global_attention(self, layer: int, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run block `layer`; return its output and the attention (B, N) that the global token pays to each patch.

        Averaged over heads. The queries and keys are read where the block hands them to
        `scaled_dot_product_attention`; a block that attends in another way needs its own version.
        """
        recorder = _AttentionRecorder()
        with recorder:
            output = self.block(layer, tokens, positions)
        if recorder.query is None or recorder.key is None:
            raise RuntimeError(
                f"block {layer} of {type(self.model).__name__} does not use scaled_dot_product_attention: "
                f"{type(self).__name__}.global_attention must be written for it"
            )
        query, key, prefix = recorder.query.float(), recorder.key.float(), self.num_prefix_tokens
        whole = query[:, :, :1] if self.global_token == "cls" else query[:, :, prefix:].mean(dim=2, keepdim=True)
        scale = recorder.scale if recorder.scale is not None else query.shape[-1] ** -0.5
        attention = (whole @ key.transpose(-2, -1) * scale).softmax(dim=-1)
        return output, attention[:, :, 0, prefix:].mean(dim=1)


class _AttentionRecorder(TorchFunctionMode):
    """Remembers the queries and keys (B, heads, n, d) of the first fused attention that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.scale: float | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.query is None:
            query = args[0] if args else kwargs["query"]
            key = args[1] if len(args) > 1 else kwargs["key"]
            self.query, self.key, self.scale = query, key, kwargs.get("scale")
        return func(*args, **kwargs)


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers in `module`: the multiply-adds that one token costs in them."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def convolution_multiply_adds(module: nn.Module, images: Tensor) -> int:
    """Multiply-adds of the convolutions and linear layers that run when `module` takes `images`, for one image."""
    total = 0

    def count(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output[0].numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += output[0].numel() * layer.in_features

    handles = [layer.register_forward_hook(count) for layer in module.modules()]
    try:
        with torch.no_grad():
            module(images)
    finally:
        for handle in handles:
            handle.remove()
    return total
