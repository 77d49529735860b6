"""Where patches, multiply-adds and milliseconds go: a table of every block."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from slimcli.backbones.base import Backbone
from slimcli.device import synchronise
from slimcli.errors import SlimError, parameter
from slimcli.layout import optimize
from slimcli.measure import clock
from slimcli.measure.evaluation import Variant, describe
from slimcli.measure.profiling import compared
from slimcli.measure.timing import Watch
from slimcli.progress import Progress, no_progress
from slimcli.slimming import LifeModel, SlimModel


@torch.inference_mode()
def per_layer(
    model: SlimModel,
    keep_rates: Sequence[float] | None,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    rounds: int = 5,
    progress: Progress = no_progress,
    exact_savings: bool = False,
) -> list[dict[str, Any]]:
    """For each variant: patches, multiply-adds and milliseconds (median, whole batch) of every block.

    What is outside the blocks stands under `other_ms`: embedding, life head, gather and classifier.
    """
    if not isinstance(model, LifeModel):
        raise SlimError(
            f"{parameter('per_layer')} is for life regression: the method {model.method} works inside the blocks"
        )
    model = optimize(model.to(device, dtype).eval())
    variants, images = compared(model, keep_rates, batch_size, device, dtype, exact_savings)
    backbone, timed_backbone = model.backbone, _BlockClock(model.backbone, device)
    seconds: list[list[list[float]]] = [[] for _ in variants]
    model.backbone = cast(Backbone, timed_backbone)
    watch = Watch(device.type == "cpu")
    try:
        with model.running():
            for done in range(rounds + 1):
                progress("per layer", done, rounds + 1)
                for variant, found in zip(variants, seconds, strict=True):
                    timed_backbone.seconds = []
                    variant.set(model)
                    _, whole = clock.timed(partial(model.logits, images), device)
                    if done:
                        found.append([*timed_backbone.seconds, whole - sum(timed_backbone.seconds)])
    finally:
        model.backbone = backbone
    progress("per layer", 1, 1)
    problem = watch.load().problem
    trust = {"timing_reliable": problem is None, **({"timing_note": problem} if problem else {})}
    return [{**_layer_table(model, variant, found), **trust} for variant, found in zip(variants, seconds, strict=True)]


def _layer_table(model: LifeModel, variant: Variant, seconds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Patches, multiply-adds and the median milliseconds of every block, from the seconds of each round."""
    row = describe(model, variant.schedule, variant.exact_savings)
    *blocks, other = [statistics.median(column) * 1000 for column in zip(*seconds, strict=True)]
    layers = [
        {
            "layer": layer,
            "patches": patches,
            "gmacs": round(model.block_cost(layer, variant.schedule, variant.exact_savings) / 1e9, 5),
            "ms": round(ms, 3),
        }
        for layer, (patches, ms) in enumerate(zip(row.schedule, blocks, strict=True), 1)
    ]
    named = {"dense": row.dense, "keep_rate": row.keep_rate, "exact_savings": row.exact_savings}
    return {**named, "layers": layers, "other_ms": round(other, 3)}


class _BlockClock:
    """A backbone that notes how long each of its blocks takes."""

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self.backbone, self.device = backbone, device
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    def block(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._timed(self.backbone.block, *args, **kwargs)

    def masked_block(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._timed(self.backbone.masked_block, *args, **kwargs)

    def narrow_block(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._timed(self.backbone.narrow_block, *args, **kwargs)

    def _timed(self, run: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        synchronise(self.device)
        start = time.perf_counter()
        output = run(*args, **kwargs)
        synchronise(self.device)
        self.seconds.append(time.perf_counter() - start)
        return output
