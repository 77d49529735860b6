"""A line of a comparison's table, and what it is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slimcli.measure.rows import MEASURES, Row
from slimcli.measure.scores import paired_difference, unpacked

#: what a score is multiplied by, so that all are in points
SCALE = {"top1": 1.0, "miou": 1.0, "similarity": 100.0, "patch_similarity": 100.0}
#: how a table calls a score, and what likeness to the dense model stands beside it
TITLES = {"top1": "Top-1 (%)", "miou": "mIoU (%)"}
LIKENESS = {"miou": ("pixel_accuracy", "patch_similarity")}
USUAL_LIKENESS = ("agreement", "kl", "logit_error")


@dataclass(frozen=True)
class Line:
    """One line of the table: a method and what was measured of it.

    `lost` are points of top-1 (or of 100 times the cosine) less than the dense model given the same epochs has. `asks`
    says what the method asks for beside arithmetic: `extra_parameters`, `operators` of a pass, whether it `exports`.
    Of several seeds the row has the means, with their standard errors, and `seeds` the figures of each.
    """

    row: Row
    title: str
    trained: bool = False
    #: how the method came to its cost: its keep rate at which layers, or its patches in every block
    setting: dict[str, Any] = field(default_factory=dict)
    run: str | None = None
    seconds: float | None = None
    lost: float | None = None
    lost_se: float | None = None
    seed: int | None = None
    seeds: tuple[dict[str, Any], ...] = ()
    asks: dict[str, Any] = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        return self.row.method == "dense"

    @property
    def rate(self) -> str:
        """The keep rate whose cost the method was given."""
        return "-" if self.dense else "own" if self.row.keep_rate is None else f"{self.row.keep_rate:g}"

    @property
    def score(self) -> float | None:
        """Top-1 or mIoU in percent, or 100 times the cosine of the features where there is no classifier."""
        measure = self.row.score
        return None if measure is None else SCALE[measure.key] * self.row[measure.key]

    @property
    def score_title(self) -> str:
        return TITLES["top1"] if self.row.score is None else TITLES.get(self.row.score.key, "Cosine x 100")

    @property
    def likeness(self) -> tuple[str, ...]:
        """The keys of what a table shows between what was lost and the speed."""
        return USUAL_LIKENESS if self.row.score is None else LIKENESS.get(self.row.score.key, USUAL_LIKENESS)

    @property
    def summary(self) -> str:
        """The line in words, for a log."""
        score = "-" if self.score is None else f"{self.score:.2f}"
        cost, speed = (MEASURES[key].text(self.row, unit=True) for key in ("gmacs", "speedup"))
        return f"{self.score_title} {score}, {cost}, speed-up {speed}"

    def cells(self, errors: bool = False) -> list[str]:
        """Score, what was lost, likeness to the dense model, images a second, speed-up and its share of the
        arithmetic's, as a table has them; with `errors` beside the score and what was lost.
        """
        deviation = None if self.row.score is None else self.row.get(self.row.score.error)
        scale = 1.0 if self.row.score is None else SCALE[self.row.score.key]
        return [
            _figure(self.score, None if deviation is None else scale * deviation, errors),
            _figure(self.lost, self.lost_se, errors),
            *(MEASURES[key].text(self.row) for key in (*self.likeness, "images_per_second", "speedup")),
            MEASURES["realised"].text(self.row, unit=True),
        ]

    @property
    def setting_text(self) -> str:
        """How the method came to its cost, in a few words."""
        if "keep_rate" in self.setting:
            return f"keep {self.setting['keep_rate']:.4g} after {', '.join(map(str, self.setting['drop_layers']))}"
        if "drops" in self.setting:
            return "keep " + ", ".join(f"{rate:.4g} after {layer}" for layer, rate in self.setting["drops"])
        if "patches_per_layer" in self.setting:
            falls = sorted({a - b for a, b in itertools.pairwise(self.setting["patches_per_layer"])})
            return f"{falls[0]} to {falls[-1]} fewer after each block" if falls else "-"
        return "-"

    def to_json(self) -> dict[str, Any]:
        """The line as it stands in JSON: the row's figures and its own."""
        own = {"setting": self.setting, "title": self.title, "trained": self.trained}
        names = ("run", "seconds", "lost", "lost_se", "seed", "seeds", "asks")
        more = {name: getattr(self, name) for name in names}
        return {
            **self.row.to_json(),
            **own,
            **{key: value for key, value in more.items() if value not in (None, (), {})},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Line:
        """A line of a file, also of an earlier version's."""
        row = Row.from_json(content, dense=content.get("method") == "dense")
        known = {"run", "seconds", "lost", "lost_se", "seed", "asks"}
        own: dict[str, Any] = {key: value for key, value in content.items() if key in known}
        title = content.get("title") or content.get("method") or "-"
        setting, seeds = content.get("setting") or {}, tuple(content.get("seeds") or ())
        return cls(row, title, bool(content.get("trained")), setting, seeds=seeds, **own)


def against_dense(lines: Sequence[Line]) -> list[Line]:
    """The lines with what each lost against the dense model given the same epochs and seed, and the share of the
    arithmetic's gain that it has in time.
    """
    found = []
    for line in lines:
        dense = dense_of(line, lines)
        lost = lost_se = None
        if dense.score is not None and line.score is not None:
            lost = round(dense.score - line.score, 3)
            lost_se = None if line is dense else _paired_error(dense.row, line.row)
            if line.row.miou is not None and not line.dense and not line.trained:
                # of the same weights, whose dense model the row was measured beside
                lost_se = line.row.miou_difference_se
        gain = dense.row.gmacs / line.row.gmacs if dense.row.gmacs and line.row.gmacs else None
        realised = round(line.row.speedup / gain, 4) if gain and line.row.speedup is not None else None
        found.append(replace(line, lost=lost, lost_se=lost_se, row=line.row.also(realised=realised)))
    return found


def dense_of(line: Line, lines: Sequence[Line]) -> Line:
    """The dense model that a line is compared with: given the same epochs with the same seed, where there is one."""
    dense = [other for other in lines if other.dense]
    return next((other for other in reversed(dense) if other.seed == line.seed), dense[-1])


def right_of(row: Row) -> list[bool] | None:
    """For each image, whether the row's model was right; None where that is not known."""
    return None if row.right is None or row.images is None else unpacked(row.right, row.images)


def _paired_error(dense: Row, row: Row) -> float | None:
    """Standard error of the difference of two rows' top-1 on the same images, in points."""
    one, other = right_of(dense), right_of(row)
    if row.top1 is None or one is None or other is None:
        return None
    gained = sum(b and not a for a, b in zip(one, other, strict=True))
    lost = sum(a and not b for a, b in zip(one, other, strict=True))
    return round(100 * paired_difference(gained, lost, len(one))[1], 3)


def _figure(value: float | None, error: float | None, errors: bool) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} ± {error:.2f}" if errors and error is not None else f"{value:.2f}"
