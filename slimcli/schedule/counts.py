"""How many patches each block uses, and the lives that this implies.

Layers are counted from 1, as in the paper. Plain Python: no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence


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

    `leave` is how many patches have left before the last block; with a power below 1 most of them leave early, with 0
    all of them after block l.
    """
    past = [max(0, layer - life_layer) / (depth - life_layer) for layer in range(1, depth + 1)]
    shares = [share**power if share > 0 else 0.0 for share in past]
    return tuple(max(1, round(num_patches - leave * share)) for share in shares)


def counts_with_total(counts: Sequence[int], total: int) -> tuple[int, ...] | None:
    """N_t that falls as `counts` does, but N_1 + ... + N_L is `total`; None if no fall of that form comes to it.

    The share of patches in each block is raised to a common power, so that few are left late and never none. Blocks
    that have as many patches as each other still do, for which up to one patch a block may be missing from the total.
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
    alike = [[t for t, n in enumerate(counts) if n == count] for count in dict.fromkeys(counts)]
    missing = total - sum(whole)
    for blocks in sorted(alike, key=lambda blocks: (whole[blocks[0]] - found[blocks[0]], blocks)):
        if len(blocks) <= missing and blocks[0] > 0 and whole[blocks[0]] < whole[blocks[0] - 1]:
            missing -= len(blocks)
            for t in blocks:
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


#: in how many rounds who leaves and who takes over is decided, however often patches leave
PLANNING_ROUNDS = 3


def planned_rounds(counts: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """The rounds in which it is decided who leaves as the falling patch counts N_1..N_L say, three at most.

    Each is the counts that it starts from and comes to; the last has those between them too. The first two end after
    two ninths and four ninths of the times that patches leave: who leaves early decides what groups there are later.
    """
    steps = tuple(dict.fromkeys(counts))
    times = len(steps) - 1
    if times <= PLANNING_ROUNDS:
        return tuple(itertools.pairwise(steps))
    first, second = round(2 * times / 9), round(4 * times / 9)
    return (steps[0], steps[first]), (steps[first], steps[second]), steps[second:]


#: how often it is decided anew who leaves where groups are joined in pairs
PAIRED_TIMES = 4


def planned_counts(counts: Iterable[int]) -> tuple[int, ...]:
    """Of the falling patch counts N_1..N_L those, five at most, that groups are joined to in pairs.

    The first, the last, and those that lie evenly between them in the number of times that patches leave.
    """
    steps = tuple(dict.fromkeys(counts))
    times = len(steps) - 1
    rounds = min(times, PAIRED_TIMES)
    return tuple(steps[round(i * times / rounds)] for i in range(rounds + 1)) if rounds else steps


#: the largest share of all groups that join others in one round of pairs: with less it is hardly nearer to one by one
MOST_OF_A_ROUND = 0.14


def rounds_of_pairs(count: int, stay: int) -> tuple[int, ...]:
    """How many groups there are before, between and after rounds of pairs that join `count` groups to `stay`.

    Their number falls by the same share, about, in each round.
    """
    rounds = max(1, math.ceil(math.log(stay / count) / math.log(1 - MOST_OF_A_ROUND) - 1e-9))
    return tuple(dict.fromkeys(round(count * (stay / count) ** (i / rounds)) for i in range(rounds + 1)))
