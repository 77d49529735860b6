"""What a comparison of methods found: its lines, as a table and as a plot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slimcli.measure.rows import DOUBT, MEASURES, Row, timing_notes

MARKERS = "os^DvPX<>"
SCALE = {"top1": 1.0, "similarity": 100.0}


@dataclass(frozen=True)
class Line:
    """One line of the table: a method and what was measured of it.

    `lost` are points of top-1 (or of 100 times the cosine) less than the dense model given the same epochs has.
    """

    row: Row
    title: str
    trained: bool = False
    #: how the method came to its cost: its keep rate at which layers, or its patches in every block
    setting: dict[str, Any] = field(default_factory=dict)
    run: str | None = None
    seconds: float | None = None
    lost: float | None = None

    @property
    def dense(self) -> bool:
        return self.row.method == "dense"

    @property
    def rate(self) -> str:
        """The keep rate whose cost the method was given."""
        return "-" if self.dense else "own" if self.row.keep_rate is None else f"{self.row.keep_rate:g}"

    @property
    def score(self) -> float | None:
        """Top-1 in percent, or 100 times the cosine of the features where there is no classifier."""
        measure = self.row.score
        return None if measure is None else SCALE[measure.key] * self.row[measure.key]

    @property
    def score_title(self) -> str:
        return "Cosine x 100" if self.row.score is MEASURES["similarity"] else "Top-1 (%)"

    @property
    def summary(self) -> str:
        """The line in words, for a log."""
        score = "-" if self.score is None else f"{self.score:.2f}"
        cost, speed = (MEASURES[key].text(self.row, unit=True) for key in ("gmacs", "speedup"))
        return f"{self.score_title} {score}, {cost}, speed-up {speed}"

    @property
    def cells(self) -> list[str]:
        """Score, what was lost, images a second, speed-up and its share of the arithmetic's, as a table has them."""
        return [
            "-" if self.score is None else f"{self.score:.2f}",
            "-" if self.lost is None else f"{self.lost:.2f}",
            *(
                MEASURES[key].text(self.row, unit=key == "realised")
                for key in ("images_per_second", "speedup", "realised")
            ),
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
        more = {"run": self.run, "seconds": self.seconds, "lost": self.lost}
        return {**self.row.to_json(), **own, **{key: value for key, value in more.items() if value is not None}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Line:
        """A line of a file, also of an earlier version's."""
        row = Row.from_json(content, dense=content.get("method") == "dense")
        own = {key: content.get(key) for key in ("run", "seconds", "lost")}
        title = content.get("title") or content.get("method") or "-"
        return cls(row, title, bool(content.get("trained")), content.get("setting") or {}, **own)


def against_dense(lines: Sequence[Line]) -> list[Line]:
    """The lines with what each lost against the dense model given the same epochs, and the share of the arithmetic's
    gain that it has in time.
    """
    dense = [line for line in lines if line.dense][-1]
    found = []
    for line in lines:
        known = dense.score is not None and line.score is not None
        lost = (
            round(dense.score - line.score, 3) if known and dense.score is not None and line.score is not None else None
        )
        gain = dense.row.gmacs / line.row.gmacs if dense.row.gmacs and line.row.gmacs else None
        realised = round(line.row.speedup / gain, 4) if gain and line.row.speedup is not None else None
        found.append(replace(line, lost=lost, row=line.row.also(realised=realised)))
    return found


def how_trained(document: Mapping[str, Any]) -> str:
    """What was done with every method before it was measured."""
    epochs = document["epochs"]
    return f"each trained for {epochs} epochs" if epochs else "nothing trained"


def doubts(lines: Sequence[Line]) -> list[str]:
    """What a reader of the speeds should be told."""
    return [f"{DOUBT} do not trust: {note}" for note in timing_notes([line.row for line in lines])]


def markdown(document: dict[str, Any]) -> str:
    """The table, with what it was measured on."""
    lines: list[Line] = document["rows"]
    titles = ["Method", "Keep rate", "Setting", "G multiply-adds", lines[0].score_title, "Lost", "img/s", "Speed-up"]
    text = [
        f"# {document['recipe']}: {document['model']}, {how_trained(document)}",
        "",
        f"| {' | '.join([*titles, 'Of ideal'])} |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for line in lines:
        cost = "-" if line.row.gmacs is None else f"{line.row.gmacs:.4f}"
        text.append(f"| {' | '.join([line.title, line.rate, line.setting_text, cost, *line.cells])} |")
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    text += [
        "",
        f"{lines[0].row.images} images, {document['precision']}, batch {document['batch_size']}, "
        f"{document['device_name']}, {document['threads']} threads; {versions}; commit {document['git_commit']}.",
        "Every method costs at most what three drops with discarding cost at the keep rate. Speed-up is over the dense "
        "model, measured in turn on the same batch; of ideal: speed-up over the ratio of multiply-adds.",
        *doubts(lines),
        "",
    ]
    return "\n".join(text)


def draw(document: dict[str, Any]) -> Figure:
    """Accuracy against multiply-adds, and against throughput with the dense model's as 1."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lines: list[Line] = document["rows"]
    _points(left, lines, lambda row: row.gmacs)
    _points(right, lines, lambda row: row.speedup)
    left.set_xlabel("G multiply-adds an image")
    right.set_xlabel("throughput, dense = 1" + (" (measured on a busy machine)" if doubts(lines) else ""))
    left.set_ylabel("cosine with dense x 100" if lines[0].row.score is MEASURES["similarity"] else "top-1 (%)")
    right.legend(frameon=False, fontsize=9)
    epochs = document["epochs"]
    figure.suptitle(f"{document['model']}: {f'{epochs} epochs each' if epochs else 'nothing trained'}", fontsize=11)
    return figure


def _points(axes: Axes, lines: Sequence[Line], place: Callable[[Row], float | None]) -> None:
    """One line a method, its keep rates joined; the dense models as stars."""
    titles = list(dict.fromkeys(line.title for line in lines))
    colours = itertools.cycle(["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555"])
    markers = itertools.cycle(MARKERS)
    for title in titles:
        own = [line for line in lines if line.title == title]
        style: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 12}
        if own[0].dense and own[0].trained:
            style["markerfacecolor"] = "white"
        if not own[0].dense:
            style = {"color": next(colours), "marker": next(markers), "markersize": 6}
        at = [(place(line.row), line.score) for line in own]
        points = sorted((x, y) for x, y in at if x is not None and y is not None)
        axes.plot([x for x, _ in points], [y for _, y in points], label=title, linewidth=1.2, **style)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
