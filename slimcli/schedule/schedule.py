"""Which patches leave when, for any number of patches. Layers are counted from 1, as in the paper. No torch."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slimcli.errors import SlimError
from slimcli.schedule.counts import counts_with_total, patches_per_layer

Drops = tuple[tuple[int, float], ...]


def default_life_layer(depth: int) -> int:
    """The block whose output the life head reads: a third of the depth (4 of 12)."""
    return max(1, round(depth / 3))


def default_drop_layers(depth: int, life_layer: int | None = None) -> tuple[int, ...]:
    """The three blocks after which patches leave, spread evenly from the life layer on (4, 7, 10 of 12)."""
    first = default_life_layer(depth) if life_layer is None else life_layer
    layers = {min(depth - 1, first + int(i * (depth - first) * 3 / 8)) for i in range(3)}
    return tuple(sorted(layer for layer in layers if layer >= first))


def plain_number(value: Any) -> Any:
    """A number of numpy's or torch's as Python's own; anything else as it is.

    One of 32 bits becomes the shortest number that it stands for: 0.55, not 0.550000011920929.
    """
    if getattr(value, "ndim", None) != 0 or not callable(getattr(value, "item", None)):
        return value
    found = value.item()
    short = isinstance(found, float) and getattr(value.dtype, "itemsize", 8) == 4
    return float(f"{found:.7g}") if short else found


def check_keep_rate(keep_rate: Any) -> float:
    """Return `keep_rate`, a number of Python's, numpy's or torch's, as a float; `SlimError` unless in (0, 1]."""
    value = plain_number(keep_rate)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) <= 1:
        raise SlimError(
            f"keep rate {keep_rate!r} is not possible: expected a number above 0 and at most 1, such as 0.7"
        )
    return float(value)


def check_whole(value: Any, what: str) -> int:
    """Return a whole number as an int; raise `SlimError`, which calls it `what`, for anything else."""
    found = plain_number(value)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, numbers.Integral):
        raise SlimError(f"{what} {value!r} is not possible: expected a whole number")
    return int(found)


def _items(values: Any, what: str, expected: str) -> list[Any]:
    """The items of a sequence, an array's too; `SlimError` for what has none."""
    if isinstance(values, (str, bytes)) or getattr(values, "ndim", 1) == 0 or not isinstance(values, Iterable):
        raise SlimError(f"{what} {values!r} is not possible: expected {expected}")
    return list(values)


def with_keep_rate(schedule: Schedule, value: Any, at_keep_rate: Callable[[float], Schedule] | None = None) -> Schedule:
    """`schedule` with a keep rate, with (layer, keep rate) pairs, or with explicit patch counts N_1..N_L.

    `at_keep_rate` is what a single keep rate becomes, by default the same drop layers with it.
    """
    number = plain_number(value)
    if number is None or isinstance(number, (numbers.Number, str, bytes)):
        return (at_keep_rate or schedule.at_keep_rate)(check_keep_rate(number))
    expected = "a number, (layer, keep rate) pairs, or N_1..N_L"
    values = _items(value, "keep rate", expected)
    if not values:
        raise SlimError(f"keep rate {value!r} is not possible: expected {expected}")
    if all(isinstance(plain_number(item), numbers.Number) for item in values):
        counts = tuple(check_whole(item, "patch count") for item in values)
        return Schedule(schedule.depth, schedule.life_layer, counts=counts)
    pairs = [_items(item, "keep rate", expected) for item in values]
    if any(len(pair) != 2 for pair in pairs):
        raise SlimError(f"keep rate {value!r} is not possible: expected {expected}")
    drops = sorted((check_whole(layer, "drop layer"), check_keep_rate(rate)) for layer, rate in pairs)
    return Schedule(schedule.depth, schedule.life_layer, drops=tuple(drops))


@dataclass(frozen=True)
class Schedule:
    """Which patches leave when, for any number of patches.

    Either `drops`, (layer, keep rate) pairs, or `counts`, the explicit N_1..N_L for a grid of N_1 patches
    (scaled when an image has another number of patches).
    """

    depth: int
    life_layer: int
    drops: Drops = ()
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        # whatever numbers it was made of, it is compared and written as Python's
        set_once = object.__setattr__
        set_once(self, "depth", check_whole(self.depth, "depth"))
        set_once(self, "life_layer", check_whole(self.life_layer, "life layer"))
        drops = [_items(drop, "drop", "a (layer, keep rate) pair") for drop in _items(self.drops, "drops", "pairs")]
        if any(len(drop) != 2 for drop in drops):
            raise SlimError(f"drops {self.drops!r} are not possible: expected (layer, keep rate) pairs")
        set_once(self, "drops", tuple((check_whole(t, "drop layer"), check_keep_rate(rate)) for t, rate in drops))
        if self.counts is not None:
            counts = _items(self.counts, "patch counts", "N_1..N_L")
            set_once(self, "counts", tuple(check_whole(n, "patch count") for n in counts))
        if not 1 <= self.life_layer < max(self.depth, 2):
            raise SlimError(
                f"life layer {self.life_layer} is not possible in a model of {self.depth} blocks: "
                f"expected 1 to {self.depth - 1}"
            )
        layers = [layer for layer, _ in self.drops]
        for layer in layers:
            if not self.life_layer <= layer < self.depth:
                raise SlimError(
                    f"drop layer {layer} is not possible: patches leave after a block from the life layer "
                    f"({self.life_layer}) to the last but one ({self.depth - 1})"
                )
        if len(set(layers)) != len(layers):
            raise SlimError(f"drop layers {layers} name a block twice: give each block one keep rate")
        if self.counts is not None:
            self._check_counts(self.counts)

    def _check_counts(self, counts: tuple[int, ...]) -> None:
        if len(counts) != self.depth:
            raise SlimError(f"a schedule of {len(counts)} patch counts does not fit a model of {self.depth} blocks")
        if any(n < 1 for n in counts) or any(a < b for a, b in itertools.pairwise(counts)):
            raise SlimError(f"schedule {list(counts)}: the counts must be at least 1 and never grow")
        if counts[self.life_layer - 1] != counts[0]:
            raise SlimError(
                f"schedule {list(counts)} drops patches before their lives are known: "
                f"blocks 1 to {self.life_layer} must use all {counts[0]}"
            )

    @classmethod
    def uniform(cls, depth: int, keep_rate: float, life_layer: int, drop_layers: Sequence[int]) -> Schedule:
        """The paper's schedule: the same keep rate after every drop layer."""
        rate = check_keep_rate(keep_rate)
        layers = _items(drop_layers, "drop layers", "whole numbers such as (4, 7, 10)")
        return cls(depth, life_layer, tuple((t, rate) for t in sorted(check_whole(t, "drop layer") for t in layers)))

    @property
    def keep_rate(self) -> float | None:
        """The keep rate common to all drop layers; None where they differ, and of explicit counts."""
        rates = {rate for _, rate in self.drops}
        return rates.pop() if len(rates) == 1 else None

    def at_keep_rate(self, keep_rate: float) -> Schedule:
        """The same drop layers with another keep rate; the default ones where none are named."""
        layers = [layer for layer, _ in self.drops] or list(default_drop_layers(self.depth, self.life_layer))
        return Schedule.uniform(self.depth, keep_rate, self.life_layer, layers)

    def scaled(self, cost: Callable[[Schedule], float], target: float) -> Schedule | None:
        """Explicit counts that fall in the same form, with the most patches that cost at most `target`.

        None where all patches in blocks 1 to l, and few later, cost more already.
        """
        counts = self.counts or ()
        found = None
        low, high = self.life_layer * counts[0], self.depth * counts[0]
        while low <= high:
            middle = (low + high) // 2
            scaled = counts_with_total(counts, middle)
            candidate = None if scaled is None else Schedule(self.depth, self.life_layer, counts=scaled)
            if candidate is not None and cost(candidate) > target:
                high = middle - 1
            else:
                found, low = candidate or found, middle + 1
        return found

    def resolve(self, num_patches: int) -> tuple[int, ...]:
        """N_1..N_L for an image of `num_patches` patches."""
        if self.counts is None:
            return patches_per_layer(num_patches, self.depth, self.drops)
        if self.counts[0] == num_patches:
            return self.counts
        scale = num_patches / self.counts[0]
        return tuple(max(1, math.ceil(n * scale - 1e-9)) for n in self.counts)

    def drops_patches(self) -> bool:
        """Whether any patch ever leaves."""
        if self.counts is not None:
            return self.counts[-1] < self.counts[0]
        return any(rate < 1 for _, rate in self.drops)
