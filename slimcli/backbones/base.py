"""What slim asks of a model, with defaults for all that can be inferred."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from slimcli.attention import AttentionRecorder, biased_attention
from slimcli.backbones.counting import (
    countable,
    counted,
    key_value_weights,
    kind_of_block,
    parabola,
    parameter_shapes,
    without_computing,
)
from slimcli.backbones.likeness import once_for_alike
from slimcli.errors import SlimError
from slimcli.schedule import Architecture, default_drop_layers, default_life_layer

T = TypeVar("T")


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
    #: whether `slim eval` also reports the cosine between the slimmed and the dense image embedding
    compares_embeddings: bool = False
    #: which of `slimcli.attention.KERNELS` runs where keys have a bias
    attention: str = "auto"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    # What a plugin must say.

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the images that the model takes."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, the first at index 0; patches may leave between any two of them."""

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) to the tokens (B, P + N, D) that enter block 1, and their `positions` or None."""

    @abstractmethod
    def head(self, tokens: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """Tokens (B, P + n, D) after the last block to logits (B, C), final norm and pooling included.

        `key_bias` (B, P + n) is log w of every token: a classifier that pools patches weights them by w, as
        `pool_mean` does. One that reads prefix tokens alone may ignore it.
        """

    # What can be inferred. Override what is not so in your model.

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens P before the patches; they are never dropped. 1, the class token, by default."""
        return 1

    @property
    def depth(self) -> int:
        """Number of blocks L."""
        return len(self.blocks)

    @property
    def embed_dim(self) -> int:
        """Width D of a token."""
        return self._embedded[1]

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of the model's own size."""
        patches = self._embedded[0] - self.num_prefix_tokens
        height, width = self.image_size
        rows = round((patches * height / width) ** 0.5)
        if rows < 1 or rows * (patches // rows) != patches:
            raise SlimError(f"{patches} patches form no grid of {height} x {width} px: override grid_size")
        return rows, patches // rows

    @property
    def life_layer(self) -> int:
        """The block whose output the life head reads where nobody says otherwise: a third of the depth."""
        return default_life_layer(self.depth)

    def drop_layers(self, life_layer: int) -> tuple[int, ...]:
        """The blocks after which patches leave where nobody says otherwise: three, spread from `life_layer` on."""
        return default_drop_layers(self.depth, life_layer)

    def block(self, layer: int, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Run block `layer` (1-based) on tokens (B, P + n, D)."""
        output: Tensor = self.blocks[layer - 1](tokens)
        return output

    def observed_block(self, layer: int, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Run block `layer` so that its attention is seen in torch's `scaled_dot_product_attention`.

        For a model whose blocks may be switched to another formula; by default `block`.
        """
        return self.block(layer, tokens, positions)

    def masked_block(self, layer: int, tokens: Tensor, positions: Tensor | None, key_bias: Tensor) -> Tensor:
        """Run block `layer` with `key_bias` (B, P + n) added to the attention logits of each key.

        The bias is added where the block calls torch's `scaled_dot_product_attention`, in the kernel that
        `slimcli.attention` chooses. A block that attends in another way needs its own version.
        """
        with biased_attention(key_bias, kernel=self.attention, where=f"block {layer} of {type(self.model).__name__}"):
            return self.observed_block(layer, tokens, positions)

    def narrows(self, layer: int) -> bool:
        """Whether `narrow_block` can run block `layer` for some tokens alone, where patches have no positions.

        False by default. Where it can, a patch's heir takes over before the queries of the block that the patch leaves
        after; where it cannot, after the block.
        """
        return False

    def narrow_block(
        self,
        layer: int,
        tokens: Tensor,
        positions: Tensor | None,
        keep: int,
        key_bias: Tensor | None = None,
        reading: Tensor | None = None,
    ) -> Tensor:
        """Run block `layer` on tokens (B, P + n, D) and return its first `keep` tokens (B, keep, D) alone.

        The others are needed as keys and values only: their queries, projection and MLP may be left out, which changes
        nothing in what is returned. By default everything is computed and cut off.

        With `reading` (B, keep, D), these tokens ask and go on in the place of the first `keep`, which remain keys and
        values as they are. A block is given it only where it `narrows`.
        """
        if reading is not None:
            # the whole block on both, in which what asks is no key for anybody
            nobody = tokens.new_full(reading.shape[:2], float("-inf"), dtype=torch.float32)
            bias = nobody.new_zeros(tokens.shape[:2]) if key_bias is None else key_bias.to(nobody.dtype)
            both, bias = torch.cat((reading, tokens), dim=1), torch.cat((nobody, bias), dim=1)
            return self.masked_block(layer, both, positions, bias)[:, :keep]
        if key_bias is None:
            return self.block(layer, tokens, positions)[:, :keep]
        return self.masked_block(layer, tokens, positions, key_bias)[:, :keep]

    def halves(self, layer: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
        """Block `layer` in two, tokens to tokens: attention and what surrounds it, then the MLP and what surrounds it.

        For methods that take patches out between the two. None where nobody says what lies in the middle of the
        block: they are then taken out after it.
        """
        return None

    @property
    def resizes(self) -> bool:
        """Whether `embed_resized` can be called: False by default."""
        return False

    def embed_resized(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """`embed` for images of another size than the model's own, a multiple of its patches, with the same weights."""
        raise SlimError(f"{type(self.model).__name__} takes images of its own size alone")

    def final_norm(self, tokens: Tensor) -> Tensor:
        """Tokens after the last block as the classifier sees them: normalised, where the model does that first."""
        return tokens

    def features(self, tokens: Tensor) -> Tensor:
        """All tokens (B, P + N, D) after the last block to what the dense model's `forward_features` gives of them."""
        return self.final_norm(tokens)

    def embedding(self, tokens: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """Tokens after the last block to the image embedding (B, E) that training on the cosine compares.

        By default what `head` returns.
        """
        return self.head(tokens, key_bias)

    def call(self, run: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Call the slimmed model as the dense one is called; `run` takes images (B, 3, H, W) to logits (B, C)."""
        return run(*args, **kwargs)

    def logits(self, output: Any) -> Tensor:
        """The logits (B, C) in what `call` returns."""
        return output

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

    def rebuilt_as(self, name: str, args: Mapping[str, Any]) -> dict[str, Any]:
        """{"name", "args"} that build this architecture with no file and nothing fetched; by default as given."""
        return {"name": name, "args": dict(args)}

    def library_config(self, built_from: Mapping[str, Any], prepare: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the model's own library reads in the config.json of a model that is built as `built_from` says."""
        return {}

    def architecture(self) -> Architecture:
        """The numbers that the cost formula needs.

        Read off the model by counting the multiply-adds of its parts at two numbers of tokens; nothing is computed.
        """
        return self.derived("architecture", self._count)

    def global_attention(self, layer: int, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run block `layer`; return its output and the attention (B, n) that the global token pays to each patch.

        Averaged over heads. The queries and keys are read where the block hands them to
        `scaled_dot_product_attention`; a block that attends in another way needs its own version.
        """
        recorder = AttentionRecorder()
        with recorder:
            output = self.observed_block(layer, tokens, positions)
        if recorder.query is None or recorder.key is None:
            raise SlimError(
                f"block {layer} of {type(self.model).__name__} does not use scaled_dot_product_attention: "
                f"{type(self).__name__}.global_attention must be written for it"
            )
        query, key, prefix = recorder.query.float(), recorder.key.float(), self.num_prefix_tokens
        whole = query[:, :, :1] if self.global_token == "cls" else query[:, :, prefix:].mean(dim=2, keepdim=True)
        scale = recorder.scale if recorder.scale is not None else query.shape[-1] ** -0.5
        attention = (whole @ key.transpose(-2, -1) * scale).softmax(dim=-1)
        return output, attention[:, :, 0, prefix:].mean(dim=1)

    def derived(self, name: str, find: Callable[[], T]) -> T:
        """What `find` reads off the model's shapes; kept under `name`, found again when the model has got others."""
        known: dict[str, tuple[Any, T]] = self.__dict__.setdefault("_derived", {})
        shapes = self._shapes()
        if name not in known or known[name][0] != shapes:
            known[name] = shapes, once_for_alike(self, name, find)
        return known[name][1]

    def _shapes(self) -> tuple[Any, ...]:
        """What all that is derived from the model hangs on: another image size, classifier or layer changes it."""
        return (
            self.image_size,
            self.num_prefix_tokens,
            self.head_reads_prefix_only,
            self.depth,
            *parameter_shapes(self.model),
        )

    @property
    def _embedded(self) -> tuple[int, int]:
        """Number of tokens P + N, and their width D."""

        def embed() -> tuple[int, int]:
            with without_computing():
                tokens, _ = self.embed(self._images())
            return tokens.shape[1], tokens.shape[2]

        return self.derived("embedded", embed)

    def _count(self) -> Architecture:
        prefix = self.num_prefix_tokens
        training = self.model.training
        self.model.eval()
        try:
            with without_computing(), countable(self.model):
                embedding, (tokens, positions) = counted(lambda: self.embed(self._images()))
                patches = tokens.shape[1] - prefix
                sizes = patches, max(1, patches // 2), max(1, patches // 4)
                inputs = [(tokens[:, : prefix + n], _first(positions, n)) for n in dict.fromkeys(sizes)]
                costs: dict[tuple[Any, ...], list[int]] = {}
                narrow: dict[tuple[Any, ...], int] = {}
                kinds = [kind_of_block(block) for block in self.blocks]
                for layer, kind in enumerate(kinds, 1):
                    if kind not in costs:
                        costs[kind] = [counted(partial(self.block, layer, *part))[0] for part in inputs]
                        narrow[kind] = counted(partial(self.narrow_block, layer, tokens, positions, 1))[0]
                heads = [counted(partial(self.head, part))[0] for part, _ in inputs]
                outputs = self.head(tokens).shape[-1]
        finally:
            self.model.train(training)
        lengths = [part.shape[1] for part, _ in inputs]
        curves = [parabola(lengths, costs[kind]) for kind in kinds]
        key_values = tuple(
            key_value_weights(lengths[0], curve, narrow[kind]) for curve, kind in zip(curves, kinds, strict=True)
        )
        per_patch = (heads[0] - heads[-1]) // max(1, sizes[0] - sizes[-1])
        return Architecture(
            embed_dim=tokens.shape[2],
            num_patches=patches,
            num_prefix_tokens=prefix,
            patch_weights=embedding // patches,
            block_weights=tuple(weights for _, weights, _ in curves),
            # what blocks cost whatever the number of tokens (a table of relative positions) stands with the head
            head_fixed=heads[0] - per_patch * patches + sum(fixed for fixed, _, _ in curves),
            head_per_patch=per_patch,
            attention_dim=curves[0][2],
            num_outputs=outputs if self.has_classifier else 0,
            key_value_weights=key_values,
            head_reads_prefix_only=self.head_reads_prefix_only and prefix > 0,
        )

    @property
    def has_classifier(self) -> bool:
        """Whether `head` ends in a classifier; without one it returns features."""
        return any(name.split(".")[0] in self.classifier_names for name, _ in self.model.named_parameters())

    def _images(self) -> Tensor:
        parameter = next(self.model.parameters())
        channels = self.preprocessing()["input_size"][0]
        return torch.zeros(1, channels, *self.image_size, device=parameter.device, dtype=parameter.dtype)


def _first(positions: Tensor | None, count: int) -> Tensor | None:
    return None if positions is None else positions[:, :count]


def pool_mean(tokens: Tensor, key_bias: Tensor | None = None) -> Tensor:
    """The mean of tokens (B, n, D) over n, each weighted by exp of its bias (B, n)."""
    if key_bias is None:
        return tokens.mean(dim=1)
    # softmax: exp(key_bias) that sums to one, and does not vanish when every bias is far below zero
    return (tokens * key_bias.softmax(dim=1).unsqueeze(-1).to(tokens.dtype)).sum(dim=1)
