"""Reaches the fused attention inside a model's own modules: adds biases to it, chooses its kernel, or records it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from slimcli.attention.kernels import attend
from slimcli.errors import SlimError


class ReplacedAttention(TorchFunctionMode):
    """Runs `attend` in the place of every fused attention that is called inside it, by whom it may be."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None
    ) -> Tensor:
        """The attention of queries (B, H, n, d) to keys and values (B, H, m, d), with the caller's mask."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        return self._replace(*args, **kwargs)

    def _replace(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal:
            raise SlimError("attention in order (is_causal) has no place for patches that are dropped")
        if enable_gqa and key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return self.attend(query, key, value, attn_mask, dropout_p, scale)


class _Biased(ReplacedAttention):
    """Hands the fused attention of the modules that run inside it to `slimcli.attention.attend`, with the biases."""

    def __init__(self, key_bias: Tensor | None, places: Tensor | None, kernel: str) -> None:
        super().__init__()
        self.key_bias, self.places, self.kernel = key_bias, places, kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward and self.key_bias is not None:
            # torch's own attention module: what it calls inside does not come through here
            self.calls += 1
            kwargs["key_padding_mask"] = self.key_bias.to(args[0].dtype)
        return super().__torch_function__(func, types, args, kwargs)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None
    ) -> Tensor:
        places = self.places if mask is not None else None
        return attend(
            query, key, value, self.key_bias, pair_bias=mask, places=places, scale=scale, dropout=dropout,
            kernel=self.kernel,
        )  # fmt: skip


@contextmanager
def biased_attention(
    key_bias: Tensor | None, places: Tensor | None = None, kernel: str = "auto", where: str = "this block"
) -> Iterator[None]:
    """Add biases to every `scaled_dot_product_attention` that runs inside, whoever calls it.

    `key_bias` (B, n); `places` (1 or B, n) takes those rows and columns out of the mask that the caller passes.
    Raises `SlimError` at the end if no attention ran that the bias could be added to.
    """
    mode = _Biased(key_bias, places, kernel)
    with mode:
        yield
    if not mode.calls:
        raise SlimError(
            f"{where} does not use torch's scaled_dot_product_attention, so no bias can be added to its keys: "
            "override masked_block in its Backbone"
        )


class TrainingAttention(_Biased):
    """Lets every fused attention that runs inside it choose its kernel as `attend` does, with no bias added.

    torch's fused kernel for the CPU has a slow backward pass in bfloat16: see `FEW_TOKENS`.
    """

    def __init__(self) -> None:
        super().__init__(None, None, "auto")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("is_causal"):
            return func(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)


class AttentionRecorder(TorchFunctionMode):
    """Remembers the queries and keys (B, H, n, d) of the first fused attention that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.scale: float | None = None
        #: whether it had a mask or biases beside queries and keys
        self.masked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.query is None:
            self.masked = (args[3] if len(args) > 3 else kwargs.get("attn_mask")) is not None
            self.query = args[0] if args else kwargs["query"]
            self.key = args[1] if len(args) > 1 else kwargs["key"]
            self.scale = kwargs.get("scale")
        return func(*args, **kwargs)
