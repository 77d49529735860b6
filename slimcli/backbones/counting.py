"""Multiply-adds, counted by running a model without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def parameter_shapes(module: nn.Module) -> list[Any]:
    """The shapes of all parameters, and the kinds of modules that have none of their own."""
    # asked for at every step: a flat loop is five times as fast as generators in each other
    found: list[Any] = []
    waiting: list[nn.Module | None] = [module]
    while waiting:
        each = waiting.pop()
        if each is None:
            continue
        if not each._parameters and not each._modules:
            found.append(type(each))
        for parameter in each._parameters.values():
            found.append(None if parameter is None else parameter.shape)
        waiting.extend(each._modules.values())
    return found


@contextmanager
def countable(model: nn.Module) -> Iterator[None]:
    """Inside it, quantized linear layers are plain ones of their size: shapes alone cannot run them."""
    replaced = []
    for parent in list(model.modules()):
        for name, layer in list(parent._modules.items()):
            sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
            weight = getattr(layer, "weight", None)
            quantized = callable(weight) or hasattr(weight, "__tensor_flatten__")
            if layer is not None and quantized and all(isinstance(size, int) for size in sizes):
                parent._modules[name] = nn.Linear(*sizes)  # type: ignore[arg-type]
                replaced.append((parent, name, layer))
    try:
        yield
    finally:
        for parent, name, layer in replaced:
            parent._modules[name] = layer


@contextmanager
def without_computing() -> Iterator[None]:
    """Run modules for the shapes alone: tensors made inside hold no numbers."""
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        yield


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what torch's formulas say of the operators that run inside it."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        return output


def counted(run: Callable[[], Any]) -> tuple[int, Any]:
    """Multiply-adds of the matrix products and convolutions in a call, and what it returns."""
    counter = _Counter()  # type: ignore[no-untyped-call]
    # fused kernels hide their products from the counter
    with sdpa_kernel(SDPBackend.MATH), counter:
        result = run()
    return counter.flops // 2, result


def kind_of_block(block: nn.Module) -> tuple[Any, ...]:
    """What decides the cost of a block: the modules in it and the shapes of their parameters."""
    modules = tuple(type(module).__name__ for module in block.modules())
    return modules, tuple(tuple(parameter.shape) for parameter in block.parameters())


def parabola(tokens: Sequence[int], cost: Sequence[int]) -> tuple[int, int, int]:
    """F, W and A of the cost F + W n + 2 A n^2 of a block, from its cost at up to three numbers of tokens."""
    if len(tokens) == 1:
        return 0, cost[0] // tokens[0], 0
    if len(tokens) == 2:
        (n, m), (whole, part) = tokens, cost
        square = (whole * m - part * n) // (n * m * (n - m))
        return 0, (whole - square * n * n) // n, square // 2
    (n, m, k), (whole, half, quarter) = tokens, cost
    steep, flat = (whole - half) // (n - m), (half - quarter) // (m - k)
    square = (steep - flat) // (n - k)
    weights = steep - square * (n + m)
    return whole - weights * n - square * n * n, weights, square // 2


def key_value_weights(tokens: int, curve: tuple[int, int, int], narrow: int) -> int:
    """K, what each token is multiplied with where it is a key and a value only, from a block narrowed to one token.

    That costs F + K n + (W - K) + 2 A n for n tokens, with F, W and A of `parabola`. K is W where the block has
    no narrow version: then nothing is saved.
    """
    fixed, weights, attention = curve
    if tokens == 1 or narrow == fixed + weights * tokens + 2 * attention * tokens**2:
        return weights
    return (narrow - fixed - weights - 2 * attention * tokens) // (tokens - 1)
