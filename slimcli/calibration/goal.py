"""What a calibration is to reach: a cost, or the speed that it stands for on this device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slimcli.calibration.stopwatch import Stopwatch
from slimcli.errors import SlimError, parameter
from slimcli.progress import Progress, no_progress
from slimcli.schedule import Schedule, default_drop_layers, default_life_layer, falling_counts
from slimcli.slimming import LifeModel, SlimModel


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


def cost_for_speedup(model: SlimModel, stopwatch: Stopwatch, progress: Progress = no_progress) -> float:
    """Multiply-adds at which the model may run as fast as the stopwatch's target: `by_time.reach` finds them out.

    Time is taken for linear in multiply-adds, between the dense model and the steepest schedule of three drops.

    Raises:
        SlimError: where that one is not fast enough.
    """
    assert stopwatch.target is not None
    depth, target = model.backbone.depth, stopwatch.target
    life_layer = default_life_layer(depth)
    progress("measuring speed", 0, 1)
    steepest = Schedule.uniform(depth, 0.05, life_layer, default_drop_layers(depth, life_layer))
    with model.running(schedule=steepest):
        faster = stopwatch.speedup(model)
    if faster < target:
        raise SlimError(
            f"a speed-up of {target:g} cannot be reached: with nearly all patches dropped after block "
            f"{life_layer} it is {faster:.2f} {stopwatch.where}"
        )
    progress("measuring speed", 1, 1)
    dense, least = model.cost(None), model.multiply_adds(steepest)
    return dense - (dense - least) * (1 - 1 / target) / (1 - 1 / faster)


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


def check_target(name: str, value: float | None, least: float = 0) -> None:
    """`SlimError` unless a goal is a finite number above `least`."""
    if value is not None and not (math.isfinite(value) and value > least):
        raise SlimError(f"{parameter(name, value)} is not possible: expected a number above {least:g}")
