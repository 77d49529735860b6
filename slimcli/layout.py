"""Linear layers on packed weights, for models that only predict on a CPU."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

M = TypeVar("M", bound=nn.Module)

#: dtypes that oneDNN multiplies in with packed weights
PACKED_DTYPES = (torch.float32, torch.bfloat16)


class Packed(NamedTuple):
    """Rows of a weight in the blocks in which oneDNN multiplies, and what they were made of."""

    blocks: Tensor
    #: keeps the memory of the weight, so that nothing else comes to lie where it lay
    source: Tensor
    version: int


class _Packs(dict[tuple[int, int], Packed]):
    """Packed rows of a layer, by first and last. A copy of a layer, or one read from a file, packs its own."""

    def __deepcopy__(self, memo: Any) -> _Packs:
        return _Packs()

    def __reduce__(self) -> tuple[type[_Packs], tuple[()]]:
        return _Packs, ()


class PackedLinear(nn.Linear):
    """A linear layer with a copy of its weight beside it that oneDNN need not pack.

    torch hands oneDNN and MKL the weight as it is, and they pack it in every call: with few tokens that takes as long
    as the product. The copy serves calls without gradients on a CPU, uncompiled, and is made again when the weight has
    changed. Weight, bias and names stay as they are.
    """

    _packs: _Packs

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input, 0, self.out_features)

    def rows(self, x: Tensor, first: int, last: int) -> Tensor:
        """Tokens (..., `in_features`) times the rows of the weight from `first` up to `last`: (..., last - first)."""
        whole = last - first == self.out_features
        bias = self.bias if whole or self.bias is None else self.bias[first:last]
        if not self._can_pack(x):
            return F.linear(x, self.weight if whole else self.weight[first:last], bias)
        found = self._packs.get((first, last))
        if found is None or found.version != version(self.weight) or not _same_memory(found.source, self.weight):
            part = self.weight.detach()[first:last].contiguous()
            blocks = torch.ops.mkldnn._reorder_linear_weight(part)
            found = self._packs[first, last] = Packed(blocks, self.weight.detach(), version(self.weight))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, found.blocks, bias, "none", [], "")
        return product

    def _can_pack(self, x: Tensor) -> bool:
        # a graph that is compiled or exported makes its own arrangements, and what counts operators knows the plain one
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._get_tracing_state() is not None:
            return False
        weight = self.weight
        return (
            type(x) is Tensor
            and _get_current_dispatch_mode() is None
            and x.dtype == weight.dtype
            and weight.device.type == "cpu"
            and x.device.type == "cpu"
            and x.numel() > 0
            and can_pack(weight.dtype)
            and not torch.is_autocast_enabled("cpu")
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # on its way to another device or dtype
        self._packs.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> PackedLinear:
        # what learns changes, and by ways that no version counts
        if mode:
            self._packs.clear()
        super().train(mode)
        return self

    @property
    def packed_bytes(self) -> int:
        """Memory that the copies take."""
        return sum((last - first) * self.in_features * self.weight.element_size() for first, last in self._packs)


def version(weight: Tensor) -> int:
    """How often a weight was changed in place; a tensor made in inference mode has no version: -1."""
    return -1 if weight.is_inference() else weight._version


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.dtype == other.dtype


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch multiplies with packed weights here: it may be built without, or the processor may not."""
    if dtype not in PACKED_DTYPES or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 16, generator=generator).to(dtype) for rows in (24, 8))
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        blocks = torch.ops.mkldnn._reorder_linear_weight(weight)
        found = torch.ops.mkldnn._linear_pointwise(x, blocks, None, "none", [], "")
    # operators that torch does not document may be missing or have other arguments in another version
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return torch.allclose(found.float(), F.linear(x.float(), weight.float()), atol=0.1, rtol=0.02)


class CutLinear(nn.Linear):
    """A linear layer that is more than its weight and bias, and can give some of its outputs without the others."""

    def rows(self, x: Tensor, first: int, last: int) -> Tensor:
        """Tokens (..., `in_features`) to the outputs from `first` up to `last`: (..., last - first)."""
        raise NotImplementedError


def has_hooks(*modules: nn.Module) -> bool:
    """Whether somebody looks at what goes in and out of a module, or changes it: it must then be called."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether all that a linear layer does is in its weight and bias, so that they may be read in its place.

    Not so where something else takes part: hooks, a parametrization, weight norm, quantized weights, an adapter.
    Such a layer must be called.
    """
    return (
        type(layer) in (nn.Linear, PackedLinear)
        and not has_hooks(layer)
        and "forward" not in layer.__dict__
        and layer._parameters.get("weight") is not None
        # as quantized weights have it: a tensor that is made of others
        and not hasattr(layer.weight, "__tensor_flatten__")
    )


def rows(layer: nn.Module, x: Tensor, first: int, last: int) -> Tensor:
    """Tokens (..., C) times the rows of a linear layer's weight from `first` up to `last`, its bias added.

    A layer that is more than its weight and bias is called, and its output cut.
    """
    if isinstance(layer, CutLinear) and not has_hooks(layer):
        return layer.rows(x, first, last)
    if not is_plain_linear(layer):
        found: Tensor = layer(x)[..., first:last]
        return found
    if isinstance(layer, PackedLinear):
        return layer.rows(x, first, last)
    assert isinstance(layer, nn.Linear)
    return F.linear(x, layer.weight[first:last], None if layer.bias is None else layer.bias[first:last])


def optimize(model: M) -> M:
    """A copy of a model that predicts as fast as it can here, in evaluation mode; the model itself stays as it is.

    The copy shares the memory of all weights, and on a CPU keeps packed ones beside them: a ViT-S takes 10 to 20 %
    less time so in float32 and 4 to 10 % in bfloat16 (`benchmarks/packing.py`). Weights that are changed through
    `.data` after the copy has run need a new copy.
    """
    shared = {id(tensor): tensor for module in model.modules() for tensor in _tensors(module)}
    twin = copy.deepcopy(model, dict(shared)).eval()
    return lay_out_for_inference(twin)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that a module holds itself: parameters, buffers, and what weight norm and pruning leave in it."""
    for held in (module._parameters, module._buffers, vars(module)):
        yield from (value for value in held.values() if isinstance(value, Tensor))


def lay_out_for_inference(model: M) -> M:
    """Put layers with packed weights in the place of a model's plain linear layers, for a CPU; return the model.

    They share the parameters. Layers that are more than weight and bias (`is_plain_linear`) are left alone. See
    `optimize`, which leaves the model itself as it is.
    """
    _replace(model)
    if type(model) is nn.Linear and is_plain_linear(model):
        return cast(M, _pack(cast(nn.Linear, model)))
    return model


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside it the model's plain linear layers have packed weights; afterwards its own layers are back."""
    replaced = _replace(model)
    try:
        yield
    finally:
        for parent, name, layer in replaced:
            parent._modules[name] = layer


def _replace(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Replace the plain linear layers below a model; return where each stood."""
    twins: dict[int, PackedLinear] = {}
    replaced = []
    for parent in list(model.modules()):
        for name, layer in parent._modules.items():
            # elsewhere a packed layer would only ask, at every call, whether it can serve
            if type(layer) is nn.Linear and is_plain_linear(layer) and layer.weight.device.type == "cpu":
                twins.setdefault(id(layer), _pack(layer))
                replaced.append((parent, name, layer))
    for parent, name, layer in replaced:
        parent._modules[name] = twins[id(layer)]
    return replaced


def _pack(layer: nn.Linear) -> PackedLinear:
    """A packed layer with the parameters of `layer`; whatever else is set on it comes along."""
    twin = PackedLinear.__new__(PackedLinear)
    # one dict of parameters for both: who still holds the plain layer and gives it a weight gives it to both
    twin.__dict__.update(layer.__dict__)
    twin.__dict__["_packs"] = _Packs()
    return twin


def packed_bytes(model: nn.Module) -> int:
    """Memory of all packed copies in a model."""
    return sum(module.packed_bytes for module in model.modules() if isinstance(module, PackedLinear))
