"""How many patches each block uses, the lives that this implies, and what it costs.

Layers are counted from 1 and costs are multiply-adds, as in the paper. Plain Python: no torch.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slimcli.errors import SlimError

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


def patches_per_layer(num_patches: int, depth: int, drops: Sequence[tuple[int, float]]) -> tuple[int, ...]:
    """N_t for t = 1..depth: after each drop layer, ceil(keep rate * N) patches go on (never fewer than one).

    `drops` holds (layer, keep rate) pairs: the patches leave *after* that block.
    """
    rates = dict(drops)
    counts, n = [], num_patches
    for layer in range(1, depth + 1):
        counts.append(n)
        # the small offset keeps 0.55 * 100 = 55.000000000000007 from becoming 56
        n = max(1, math.ceil(rates.get(layer, 1.0) * n - 1e-9))
    return tuple(counts)


def highest_keep_rate(cost: Callable[[float], float], target: float) -> float | None:
    """The highest keep rate, in ten-thousandths, that costs at most `target`; None if even 0.01 costs more."""
    low, high = 0.01, 1.0
    if cost(high) <= target:
        return high
    if cost(low) > target:
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    return int(low * 10_000) / 10_000


def falling_counts(num_patches: int, depth: int, life_layer: int, power: float, leave: float) -> tuple[int, ...]:
    """N_t that falls after every block from the life layer l on: N - leave ((t - l) / (L - l))^power, at least 1.

    `leave` is how many patches have left before the last block; with a power below 1 most of them leave early.
    """
    shares = [(max(0, layer - life_layer) / (depth - life_layer)) ** power for layer in range(1, depth + 1)]
    return tuple(max(1, round(num_patches - leave * share)) for share in shares)


def counts_with_total(counts: Sequence[int], total: int) -> tuple[int, ...] | None:
    """N_t that falls as `counts` does, but N_1 + ... + N_L is `total`; None if no fall of that form comes to it.

    The share of patches in each block is raised to a common power, so that few are left late and never none.
    """
    first = counts[0]

    def real(power: float) -> list[float]:
        return [max(1.0, first * (n / first) ** power) for n in counts]

    low, high = 0.0, 1000.0
    if not sum(real(high)) <= total <= sum(real(low)):
        return None
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(real(middle)) > total else (low, middle)
    found = real(high)
    # the patches that rounding down loses go to the blocks that lost most, so that the total comes out
    whole = [math.floor(n + 1e-9) for n in found]
    most_lost = sorted(range(len(found)), key=lambda t: (whole[t] - found[t], t))
    for t in most_lost[: total - sum(whole)]:
        whole[t] += 1
    return tuple(whole)


def life_moments(counts: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation of the lives under the schedule N_1..N_L.

    The share of patches whose life is t is p_t = (N_t - N_{t+1}) / N with N_{L+1} = 0; mu = sum t p_t,
    sigma^2 = sum (t - mu)^2 p_t. For N = 196 and keep rate 0.7 after blocks 4, 7, 10: 8.2908 and 3.3170.
    """
    ends = [*counts[1:], 0]
    shares = [(n - after) / counts[0] for n, after in zip(counts, ends, strict=True)]
    mean = sum(t * p for t, p in enumerate(shares, 1))
    variance = sum((t - mean) ** 2 * p for t, p in enumerate(shares, 1))
    return mean, math.sqrt(max(variance, 0.0))


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


@dataclass(frozen=True)
class Architecture:
    """What the cost formula needs to know of a model. Costs are multiply-adds.

    `block_weights` are the weights that each token is multiplied with in each block: 12 D^2 for an MLP ratio
    of 4. `head_fixed` and `head_per_patch` are the classifier's cost, for an image and for each patch it reads.
    `num_outputs` are the classes, 0 without a classifier. `key_value_weights` is the part of `block_weights` that makes
    keys and values, all a token needs that nothing reads after the block: 2 D^2, or all of `block_weights` where the
    block has no version that leaves the rest out.
    """

    embed_dim: int
    num_patches: int
    num_prefix_tokens: int
    patch_weights: int
    block_weights: tuple[int, ...]
    head_fixed: int
    head_per_patch: int = 0
    attention_dim: int | None = None
    num_outputs: int = 0
    key_value_weights: tuple[int, ...] | None = None
    head_reads_prefix_only: bool = False

    @property
    def depth(self) -> int:
        return len(self.block_weights)

    def block(self, layer: int, num_patches: int) -> int:
        """Multiply-adds of block `layer` on `num_patches` patches: W n + 2 n^2 D for n tokens (prefix included)."""
        n = num_patches + self.num_prefix_tokens
        return self.block_weights[layer - 1] * n + 2 * n * n * (self.attention_dim or self.embed_dim)

    def narrow_block(self, layer: int, num_patches: int, keep: int) -> int:
        """Multiply-adds of block `layer` where only its first `keep` of n tokens are read after it.

        K n + (W - K) keep + 2 n keep D for n tokens, where K makes keys and values.
        """
        n, weights = num_patches + self.num_prefix_tokens, self.block_weights[layer - 1]
        only_keys = self.key_value_weights[layer - 1] if self.key_value_weights else weights
        if only_keys == weights:
            return self.block(layer, num_patches)
        return only_keys * n + (weights - only_keys) * keep + 2 * n * keep * (self.attention_dim or self.embed_dim)

    def exact_savings(self, counts: Sequence[int] | None = None, life_layer: int | None = None) -> int:
        """Multiply-adds that go to tokens nothing reads any more, under the schedule N_1..N_L or of the dense model.

        In the last block these are the patches, where the classifier reads prefix tokens alone; with `life_layer`, in
        each later block also the patches that leave after it. They are needed there as keys and values only.
        """
        return sum(self.saved_in_block(layer, counts, life_layer) for layer in range(1, self.depth + 1))

    def saved_in_block(self, layer: int, counts: Sequence[int] | None = None, life_layer: int | None = None) -> int:
        """The part of `exact_savings` that falls to one block."""
        n = tuple(counts) if counts is not None else (self.num_patches,) * self.depth
        patches = n[layer - 1]
        if layer == self.depth:
            keep = 0 if self.head_reads_prefix_only else patches
        else:
            keep = n[layer] if life_layer is not None and layer > life_layer else patches
        if keep == patches:
            return 0
        return self.block(layer, patches) - self.narrow_block(layer, patches, keep + self.num_prefix_tokens)

    @property
    def embedding(self) -> int:
        """Multiply-adds of the patch embedding: N * 3 p^2 D."""
        return self.num_patches * self.patch_weights

    @property
    def life_head(self) -> int:
        """Multiply-adds of the folded life head: 2 D^2 + N D."""
        return 2 * self.embed_dim**2 + self.num_patches * self.embed_dim

    def multiply_adds(self, counts: Sequence[int] | None = None, planning: Planning | None = None) -> int:
        """Multiply-adds of one image under the schedule N_1..N_L; of the dense model without one.

        The life head counts only where the schedule drops a patch: otherwise it does not run. `planning` says what it
        does beside the paper's product.
        """
        n = tuple(counts) if counts is not None else (self.num_patches,) * self.depth
        total = self.embedding + self.head_fixed + self.head_per_patch * n[-1]
        total += sum(self.block(layer, patches) for layer, patches in enumerate(n, 1))
        if n[-1] == n[0]:
            return total
        if planning is not None:
            total += planning.multiply_adds(n, self.embed_dim, self.num_prefix_tokens)
        return total + self.life_head


@dataclass(frozen=True)
class Planning:
    """What the life head does at the life layer beside the paper's product: see `slimcli.life`.

    `similarity_dim` and `context_dim` are the widths of its projection and of its transformer block, 0 without;
    `compares`: patches are compared with each other, by their tokens where there is no projection; `ranks`: that also
    says which of them leave.
    """

    similarity_dim: int = 0
    context_dim: int = 0
    compares: bool = True
    ranks: bool = True

    def multiply_adds(self, counts: Sequence[int], embed_dim: int, num_prefix_tokens: int) -> int:
        """Multiply-adds of one image under the schedule N_1..N_L."""
        patches, width = counts[0], self.context_dim
        tokens = patches + num_prefix_tokens
        # the reduction, queries, keys, values, their projection and the MLP; attention; the score
        total = tokens * (embed_dim * width + 8 * width**2) + 2 * tokens**2 * width + patches * width
        if not self.compares:
            return total
        total += patches * self.similarity_dim * (embed_dim + width)
        channels = self.similarity_dim or embed_dim
        for n, stay in itertools.pairwise(dict.fromkeys(counts)):
            total += (n - stay) * stay * channels + (n**2 * (channels + 1) if self.ranks else 0)
        return total
