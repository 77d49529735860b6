"""What a calibration is to reach: a cost, or the speed that it stands for on this device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slimcli.errors import SlimError, parameter
from slimcli.measure import clock
from slimcli.measure.evaluation import Variant
from slimcli.measure.profiling import random_images
from slimcli.progress import Progress, no_progress
from slimcli.schedule import Schedule, default_drop_layers, default_life_layer, falling_counts
from slimcli.slimming import LifeModel, SlimModel

#: seconds for which a keep rate is timed, about
TIMED_SECONDS = 1.0


@dataclass(frozen=True)
class Cost:
    """A goal: at most so many multiply-adds an image, comparisons of patches and `exact_savings` counted."""

    multiply_adds: float

    def __str__(self) -> str:
        return f"{self.multiply_adds / 1e9:.3g} G multiply-adds"


def falling_schedule(model: SlimModel, goal: Cost, life_layer: int, power: float) -> Schedule | None:
    """The schedule of `falling_counts` that keeps as many patches as the goal allows; None if none is so steep."""
    depth, num_patches = model.backbone.depth, model.num_patches

    def schedule(leave: float) -> Schedule:
        return Schedule(depth, life_layer, counts=falling_counts(num_patches, depth, life_layer, power, leave))

    def fits(candidate: Schedule) -> bool:
        return model.multiply_adds(candidate) <= goal.multiply_adds

    # more than there are may leave: the last blocks are then left with one patch
    low, high = 0.0, 4.0 * num_patches
    if not fits(schedule(high)):
        return None
    while high - low > 0.05:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(schedule(middle)) else (middle, high)
    return schedule(high)


def cost_for_speedup(
    model: SlimModel,
    target: float,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = no_progress,
) -> float:
    """Multiply-adds of the keep rate at which the model runs `target` times faster than dense, measured here."""
    depth = model.backbone.depth
    life_layer = default_life_layer(depth)
    images = random_images(model, batch_size, device, dtype)
    low, high = 0.05, 1.0
    rounds = 7
    for done in range(rounds):
        progress("measuring speed", done, rounds)
        rate = (low + high) / 2 if done else low
        schedule = Schedule.uniform(depth, rate, life_layer, default_drop_layers(depth, life_layer))
        faster = measured_speedup(model, schedule, images, device)
        if not done and faster < target:
            raise SlimError(
                f"a speed-up of {target:g} cannot be reached: with nearly all patches dropped after block "
                f"{life_layer} it is {faster:.2f} on this device"
            )
        low, high = (rate, high) if faster >= target else (low, rate)
    progress("measuring speed", 1, 1)
    return model.multiply_adds(Schedule.uniform(depth, low, life_layer, default_drop_layers(depth, life_layer)))


@torch.inference_mode()
def measured_speedup(model: SlimModel, schedule: Schedule, images: Tensor, device: torch.device) -> float:
    """Dense seconds over slimmed seconds on `images`, the median of interleaved rounds."""
    model.eval()
    variants = [Variant(None), Variant(schedule)]

    def run(variant: Variant) -> Tensor:
        variant.set(model)
        return model.logits(images)

    with model.running():
        times = clock.interleave([partial(run, variant) for variant in variants], device, 5, TIMED_SECONDS)
    return clock.speedup(*times)


def paper_schedule(model: LifeModel, goal: Cost) -> Schedule | None:
    """The paper's three drops at the highest keep rate that costs no more; None where there is none.

    Costs are of `model` as it is: exact savings count where they are on.
    """
    depth = model.backbone.depth
    life_layer = default_life_layer(depth)
    uniform = Schedule.uniform(depth, 1.0, life_layer, default_drop_layers(depth, life_layer))
    return model.at_cost(uniform, goal.multiply_adds)


def check_cost(model: SlimModel, target: float, layers: Sequence[int]) -> None:
    """`SlimError` unless some schedule costs at most `target` multiply-adds."""
    first, depth = min(layers), model.backbone.depth
    steepest = Schedule(depth, first, counts=(model.num_patches,) * first + (1,) * (depth - first))
    lowest = model.multiply_adds(steepest)
    if target < lowest:
        raise SlimError(
            f"a cost of {target / 1e9:.3g} G cannot be reached: with all patches in blocks 1 to {first} "
            f"it is at least {lowest / 1e9:.3g} G (dense: {model.cost(None) / 1e9:.3g} G)"
        )


def check_target(name: str, value: float | None) -> None:
    """`SlimError` unless a goal is a positive, finite number."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise SlimError(f"{parameter(name, value)} is not possible: expected a number above 0")
