"""Lines of several seeds as one, and which methods can be told apart on the images that they were measured on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from slimcli.comparison.line import Line, dense_of, right_of

#: figures whose mean over the seeds is shown
AVERAGED = ("top1", "top5", "loss", "similarity", "top1_difference", "agreement", "kl", "logit_error",
            "miou", "pixel_accuracy", "patch_similarity")  # fmt: skip
#: a difference that chance makes more seldom than this is called one
SURE = 0.05
#: drawn signs, where they are too many to count
DRAWN = 20_000


def over_seeds(lines: Sequence[Line]) -> list[Line]:
    """One line for each method at each keep rate: means over the seeds, with the standard errors of the means.

    A line of one seed keeps its standard errors, which are over the images. Which images were right is left out.
    """
    groups: dict[tuple[str, float | None], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.title, line.row.keep_rate), []).append(line)
    return [_mean(group) for group in groups.values()]


def _mean(group: Sequence[Line]) -> Line:
    first = replace(group[0], row=group[0].row.also(right=None))
    if len(group) == 1:
        return first
    values: dict[str, Any] = {}
    for key in AVERAGED:
        found = [line.row.get(key) for line in group if line.row.get(key) is not None]
        if len(found) == len(group):
            values |= {key: round(statistics.mean(found), 6), f"{key}_se": round(_error(found), 6)}
    lost = [line.lost for line in group if line.lost is not None]
    figures = [{"seed": line.seed, "run": line.run, "lost": line.lost, **_figures(line)} for line in group]
    return replace(
        first,
        row=first.row.also(**values),
        run=None,
        seed=None,
        seeds=tuple(figures),
        seconds=round(sum(line.seconds or 0.0 for line in group), 1),
        lost=round(statistics.mean(lost), 3) if lost else None,
        lost_se=round(_error(lost), 3) if lost else None,
    )


def _figures(line: Line) -> dict[str, Any]:
    return {key: line.row.get(key) for key in AVERAGED if line.row.get(key) is not None}


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Pair:
    """Two methods on the same images: the difference of their top-1 in points, image by image, and what it says.

    `gained` and `lost` count images that the one or the other alone has right, over all seeds. `p` is how often chance
    alone makes a difference as large: McNemar's exact test, of several seeds by the signs of each image's mean.
    """

    one: str
    other: str
    keep_rate: float | None
    images: int
    seeds: int
    difference: float
    error: float
    gained: int
    lost: int
    p: float

    @property
    def verdict(self) -> str:
        """The pair in words."""
        rate = "" if self.keep_rate is None else f" at {self.keep_rate:g}"
        figures = f"{abs(self.difference):.2f} ± {self.error:.2f} points, p = {self.p:.2g}"
        if self.p >= SURE:
            return f"{self.one} and {self.other}{rate}: not distinguishable with {self.images} images ({figures})"
        word = "ahead of" if self.difference > 0 else "behind"
        return f"{self.one} is {word} {self.other}{rate} by {figures}"

    def to_json(self) -> dict[str, Any]:
        """The pair as it stands in JSON."""
        return {**vars(self), "verdict": self.verdict}


def pairs(lines: Sequence[Line]) -> list[Pair]:
    """The first method beside each other, and beside the dense model given the same epochs, at every keep rate."""
    methods = [line for line in lines if not line.dense]
    if not methods:
        return []
    own = [line for line in methods if line.title == methods[0].title]
    found = []
    for rate in dict.fromkeys(line.row.keep_rate for line in own):
        first = [line for line in own if line.row.keep_rate == rate]
        for title in dict.fromkeys(line.title for line in methods if line.title != methods[0].title):
            others = [line for line in methods if line.title == title and line.row.keep_rate == rate]
            if others:
                # a method that draws nothing was measured once: it stands beside every seed
                found.append(_pair(first, [_like(line, others) for line in first], rate))
        found.append(_pair(first, [dense_of(line, lines) for line in first], rate))
    return [pair for pair in found if pair is not None]


def _like(line: Line, others: Sequence[Line]) -> Line:
    return next((other for other in others if other.seed == line.seed), others[0])


def _pair(first: Sequence[Line], second: Sequence[Line], rate: float | None) -> Pair | None:
    rights = [(right_of(a.row), right_of(b.row)) for a, b in zip(first, second, strict=True)]
    if any(a is None or b is None for a, b in rights) or first[0].row.top1 is None:
        return None
    # (seeds, images): 1 where the first alone is right, -1 where the second alone is
    apart = numpy.array([numpy.array(a, int) - numpy.array(b, int) for a, b in rights])
    means = apart.mean(axis=0)
    images = means.size
    gained, lost = int((apart > 0).sum()), int((apart < 0).sum())
    error = float(means.std(ddof=1)) / math.sqrt(images) if images > 1 else 0.0
    p = mcnemar(gained, lost) if len(first) == 1 else signs(means)
    return Pair(
        first[0].title, second[0].title, rate, images, len(first), round(100 * float(means.mean()), 3),
        round(100 * error, 3), gained, lost, float(f"{p:.3g}"),
    )  # fmt: skip


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test, two-sided: how often fair coins fall at least as unevenly as `gained` to `lost`."""
    total, few = gained + lost, min(gained, lost)
    term = tail = 1
    for index in range(few):
        term = term * (total - index) // (index + 1)
        tail += term
    return min(1.0, 2 * (tail / 2**total)) if total else 1.0


def signs(means: Any) -> float:
    """How often the mean of the values (n,), each with a sign drawn at random, is as far from 0 as theirs."""
    values = means[means != 0]
    if not values.size:
        return 1.0
    generator = numpy.random.default_rng(0)
    seen, far = abs(values.sum()) - 1e-9, 0
    for drawn in range(0, DRAWN, 1000):
        count = min(1000, DRAWN - drawn)
        far += int((abs((generator.integers(0, 2, (count, values.size)) * 2 - 1) @ values) >= seen).sum())
    return (1 + far) / (1 + DRAWN)
