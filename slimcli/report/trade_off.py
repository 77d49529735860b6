"""Accuracy against cost and against speed, of all that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from slimcli.measure.rows import MEASURES, Row
from slimcli.report.plots import MARKERS, SERIES, name_of, plot_of


@dataclass(frozen=True)
class Point:
    """A measured model, dense or slimmed, and the series that it belongs to."""

    series: str
    row: Row

    @property
    def title(self) -> str:
        """The keep rate, or what stands for it."""
        return self.row.name


def trade_off(points: Sequence[Point], axis: str) -> Markup | None:
    """Measured points: accuracy over `axis`, "gmacs" or "speedup"; None where nothing was measured of both."""
    score = next((point.row.score for point in points if point.row.score is not None), None)
    x_of = MEASURES[axis]
    placed = [
        (point, x, y)
        for point in points
        if score and (x := x_of.value(point.row)) is not None and (y := score.value(point.row)) is not None
    ]
    if score is None or not placed:
        return None
    cost = axis == "gmacs"
    doubted = x_of.timed and any(point.row.timing_reliable is False for point, _, _ in placed)

    def draw(axes: Axes) -> str:
        names = list(dict.fromkeys(point.series for point, _, _ in placed))
        words = []
        for number, name in enumerate(names):
            colour, marker = SERIES[number % 6], MARKERS[number % 6]
            # the first series shows behind a second one at the same place
            size = 11 if number == 0 and len(names) > 1 else 7
            for point, x, y in placed:
                if point.series != name:
                    continue
                fill = "none" if point.row.dense else colour
                axes.plot(x, y, marker, color=colour, markerfacecolor=fill, markersize=size, linestyle="none")
                unit = "G multiply-adds" if cost else "times as fast as dense"
                words.append(f"{name}, {point.title}: {y:.4g}{score.unit} at {x:.3g} {unit}")
            axes.plot([], [], marker, color=colour, linestyle="none", label=name)
        _scale(axes, [x for _, x, _ in placed] if cost else [])
        axes.margins(x=0.15, y=0.3)
        axes.autoscale_view()
        _label(axes, [(point.title, x, y, point.row.dense) for point, x, y in placed])
        speed = "speed-up over dense, " + ("not measured reliably" if doubted else "measured")
        axes.set(
            xlabel="multiply-adds an image (G)" if cost else speed,
            ylabel={"top1": "top-1 (%)", "miou": "mIoU (%)"}.get(score.key, "cosine"),
        )
        if len(names) > 1:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1)
        return "Measured points, labelled with their keep rate. " + "; ".join(words) + "."

    return plot_of(draw, f"{name_of(score)} against {'cost' if cost else 'speed'}")


def _scale(axes: Axes, costs: Sequence[float]) -> None:
    """A logarithmic axis where costs differ much."""
    if costs and min(costs) > 0 and max(costs) > 8 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())


def _label(axes: Axes, points: Sequence[tuple[str, float, float, bool]]) -> None:
    """Write the keep rate below or above each point where no other stands; the table has those that found no room.

    Points are (title, x, y, whether dense).
    """
    share_of_axes = axes.transData + axes.transAxes.inverted()
    placed: list[tuple[str, float, float]] = []
    for name, place, score, dense in points:
        x, y = share_of_axes.transform((place, score))
        if any(title == name and abs(x - a) < 0.06 and abs(y - b) < 0.15 for title, a, b in placed):
            continue
        for side in (1, -1) if dense else (-1, 1):
            at = y + 0.08 * side
            if all(abs(x - a) > 0.13 or abs(at - b) > 0.08 for _, a, b in placed):
                placed.append((name, x, at))
                axes.annotate(name, (x, at), xycoords="axes fraction", ha="center", va="center", size=9)
                break
