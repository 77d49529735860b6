"""int8 in torch, by torchao: weights a channel each, activations a token each, as they come; the life head in float."""

from __future__ import annotations

import copy
import importlib.util
import warnings

from torch import nn

from slimcli.errors import SlimError
from slimcli.runtimes.base import Forward


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
    return model
