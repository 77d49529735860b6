"""How weights lie in memory while a model only predicts."""

from __future__ import annotations

import torch
from torch import nn


def lay_out_for_inference(model: nn.Module) -> nn.Module:
    """Store the weights of linear layers by columns where that is faster; return the model.

    Products with few tokens, such as those of one slimmed image, run 5 to 35 % faster so in float32 with MKL, and those
    with many as fast as before. Nothing else changes: shapes, values and names stay, for the dense model as well.
    """
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return model
    for module in model.modules():
        # a subclass may use its weight in another way
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.weight.data = module.weight.data.t().contiguous().t()
    return model
