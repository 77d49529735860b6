"""The small random model that the checks of a backbone are made on."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from slimcli.backbones.base import Backbone
from slimcli.schedule import Schedule
from slimcli.slimming import LifeModel

#: difference between logits that rounding explains, as a share of their largest
ROUNDING = 2e-4


class Failed(Exception):
    """A check that failed, and the methods of the backbone that may have to change, the likeliest first."""

    def __init__(self, reason: str, *methods: str) -> None:
        super().__init__(reason)
        self.methods = methods


class Subject:
    """A copy of the model with weights that matter, slimmed, and images for it."""

    def __init__(self, model: nn.Module, adapter: type[Backbone]) -> None:
        self.dense = awake(model)
        self.backbone = adapter(self.dense)
        depth = self.backbone.depth
        if depth < 2:
            raise Failed(f"the model has {depth} block: nothing can be dropped before it", "blocks")
        drops = tuple((layer, 0.6) for layer in range(1, depth))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.slim = LifeModel(self.backbone, Schedule(depth, 1, drops)).eval()
        generator = torch.Generator().manual_seed(1)
        channels = self.backbone.preprocessing()["input_size"][0]
        height, width = self.backbone.image_size
        self.images = torch.randn(3, channels, height, width, generator=generator)

    def run(self, mode: str, images: Tensor | None = None) -> Tensor:
        """Logits (B, C) in a mode of the slimmed model."""
        self.slim.mode = mode
        with torch.no_grad():
            return self.slim.logits(self.images if images is None else images).float()


def awake(model: nn.Module) -> nn.Module:
    """A copy with random weights of a size that matters: a fresh model's tables and LayerScales are often zero."""
    model = copy.deepcopy(model).float().cpu().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_(0.2 * noise + (1.0 if parameter.abs().mean() > 0.5 else 0.0))
                if parameter.abs().mean() < 0.5 and parameter.numel() > 1:
                    parameter.add_(0.1)
            else:
                fan_in = 1 if parameter.shape[0] == 1 else parameter[0].numel()
                parameter.copy_(noise * 0.8 / fan_in**0.5)
    return model


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the largest logit."""
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))
