"""int8 in torch, by torchao: weights a channel each, activations a token each, as they come; the life head in float."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimcli.errors import SlimError
from slimcli.layout import CutLinear
from slimcli.runtimes.base import Forward


class _Parts(dict[tuple[int, int], tuple[Tensor, Tensor | None]]):
    """Parts of a layer's weight and bias, by first and last row. A copy of a layer has the same ones."""

    def __deepcopy__(self, memo: Any) -> _Parts:
        return self


class Int8Linear(CutLinear):
    """A quantized `layer` for queries, keys and values, which gives some of them without the others.

    Its weight is cut beforehand: a quantized one cannot be cut in inference mode. The parts share its memory.
    """

    @torch.no_grad()
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        third, self.parts = self.out_features // 3, _Parts()
        # the quantized weights of other versions may not be cut: all is asked for then
        with contextlib.suppress(NotImplementedError, RuntimeError, TypeError):
            for first, last in ((0, third), (third, self.out_features)):
                bias = None if self.bias is None else self.bias[first:last]
                self.parts[first, last] = self.weight[first:last], bias

    def rows(self, x: Tensor, first: int, last: int) -> Tensor:
        if (first, last) not in self.parts:
            return self(x)[..., first:last]
        return F.linear(x, *self.parts[first, last])


def require_torchao() -> None:
    """`SlimError` where torchao is missing."""
    if importlib.util.find_spec("torchao") is None:
        raise SlimError('int8 in torch needs torchao, not installed here: pip install "slimcli[torchao]"')


def quantized(model: Forward) -> Forward:
    """A copy of a model, float32, whose linear layers multiply in int8; those of the life head stay in float."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = copy.deepcopy(model)
        kept = {id(layer) for layer in model.slim.selector.modules()}
        quantize_(
            model,
            Int8DynamicActivationInt8WeightConfig(),
            lambda layer, _name: isinstance(layer, nn.Linear) and id(layer) not in kept,
        )
        for block in list(model.slim.model.modules()):
            layer = getattr(block, "qkv", None)
            if type(layer) is nn.Linear:
                block.qkv = Int8Linear(layer)
    return model
