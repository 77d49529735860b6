"""The report's plots: matplotlib drawings as SVG inside a page, in the page's own colours, with a text alternative."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from slimcli.measure.rows import MEASURES, Measure
from slimcli.schedule import life_moments

# Colours that stand in the drawing until the page's own take their place.
INK, LINE = "#a10000", "#a1000f"
SERIES = ("#a10001", "#a10002", "#a10003", "#a10004", "#a10005", "#a10006")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))

Metrics = Sequence[Mapping[str, Any]]

#: inches; a phone shows a plot at its own size
PLOT = (4.6, 3.1)

#: an id of its own for every plot of a page
_numbers = itertools.count(1)


@contextmanager
def _style() -> Iterator[None]:
    settings: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": LINE,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "text.color": INK,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": LINE,
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "slim",
        "hatch.linewidth": 0.6,
    }
    with matplotlib.rc_context(settings):
        yield


def plot_of(draw: Callable[[Axes], str], title: str) -> Markup:
    """An SVG of what `draw` puts on the axes; it returns the description for those who cannot see the drawing."""
    with _style():
        figure = Figure(PLOT, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        described = draw(axes)
        # the layout depends on the ticks and the ticks on the layout: once is not enough
        layout = figure.get_layout_engine()
        assert layout is not None
        for _ in range(3):
            layout.execute(figure)
        # saving would lay it out and draw it once more
        figure.set_layout_engine("none")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), title, described)


def _inline(svg: str, title: str, described: str) -> Markup:
    """matplotlib's SVG made part of a page: the page's colours and fonts, ids of its own, a text alternative."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font: \1px sans-serif", svg)
    svg = svg.replace(INK, "currentColor").replace(LINE, "var(--line)")
    for number, colour in enumerate(SERIES, 1):
        svg = svg.replace(colour, f"var(--series-{number})")
    name = f"plot{next(_numbers)}"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    words = Markup('<title id="{0}-title">{1}</title><desc id="{0}-desc">{2}</desc>').format(name, title, described)
    role = f' role="img" aria-labelledby="{name}-title {name}-desc">'
    return Markup(opening + role) + words + Markup(rest)


def training_loss(runs: Mapping[str, Metrics]) -> Markup | None:
    """Training loss over the epochs of all stages, of runs by their name; None where there is none."""
    curves = _curves(runs, "loss", ("step", "epoch"))

    def draw(axes: Axes) -> str:
        words = []
        for number, (name, (places, losses)) in enumerate(curves.items()):
            colour, dash = SERIES[number % 6], DASHES[number % 6]
            axes.plot(places, losses, linewidth=1.6, color=colour, linestyle=dash, label=name)
            words.append(f"{name}: from {losses[0]:.3f} to {losses[-1]:.3f}")
        axes.margins(y=0.2)
        axes.set(xlabel="epoch", ylabel="loss")
        _mark_stages(axes, {name: runs[name] for name in curves})
        return "Mean loss since the start of the epoch. " + "; ".join(words) + "."

    return plot_of(draw, "Training loss") if curves else None


def validation(runs: Mapping[str, Metrics]) -> Markup | None:
    """Validation top-1 after each epoch, or without a classifier the cosine, of runs by their name."""
    key = next((key for key in ("top1", "miou", "similarity") if _curves(runs, f"val_{key}", ("epoch",))), None)
    if key is None:
        return None
    measure, curves = MEASURES[key], _curves(runs, f"val_{key}", ("epoch",))

    def text_of(value: float) -> str:
        return f"{value:.{measure.digits}f}{measure.unit}"

    def draw(axes: Axes) -> str:
        words = []
        for number, (name, (places, scores)) in enumerate(curves.items()):
            colour, marker, dash = SERIES[number % 6], MARKERS[number % 6], DASHES[number % 6]
            axes.plot(places, scores, color=colour, marker=marker, linestyle=dash, linewidth=1.6, label=name)
            start = next((row.get(key) for row in runs[name] if row.get("event") == "start"), None)
            # the dense model's cosine with itself is 1
            if start is not None and len(curves) == 1 and key != "similarity":
                axes.axhline(start, color=INK, linestyle=(0, (2, 2)), linewidth=1)
                axes.annotate(
                    f"dense as given {text_of(start)}", (1, start), xycoords=("axes fraction", "data"), ha="right",
                    xytext=(0, 3), textcoords="offset points", size=9,
                )  # fmt: skip
            words.append(f"{name}: from {text_of(scores[0])} to {text_of(scores[-1])}, best {text_of(max(scores))}")
        axes.margins(y=0.25)
        axes.set(xlabel="epoch", ylabel={"top1": "top-1 (%)", "miou": "mIoU (%)"}.get(key, "cosine"))
        _mark_stages(axes, {name: runs[name] for name in curves})
        return f"{name_of(measure)} on the validation images after each epoch. " + "; ".join(words) + "."

    return plot_of(
        draw, {"top1": "Validation top-1", "miou": "Validation mIoU"}.get(key, "Validation cosine with dense")
    )


def _curves(runs: Mapping[str, Metrics], key: str, events: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """A quantity of metrics.jsonl over the epochs of all stages, of the runs that have it."""
    found = {name: _curve(metrics, key, events) for name, metrics in runs.items()}
    return {name: curve for name, curve in found.items() if curve[0]}


def _curve(metrics: Metrics, key: str, events: Sequence[str]) -> tuple[list[float], list[float]]:
    """A quantity of metrics.jsonl over the epochs of all stages, one after the other."""
    batches = max((row["batch"] for row in metrics if "batch" in row), default=1) or 1
    before = _epochs_before(metrics)
    rows = [row for row in metrics if row.get("event") in events and row.get(key) is not None]
    places = [before[row["stage"]] + row["epoch"] - 1 + row["batch"] / batches for row in rows]
    return places, [row[key] for row in rows]


def _epochs_before(metrics: Metrics) -> dict[int, int]:
    """Epochs of the stages before each stage; the last entry is the number of all epochs."""
    epochs: dict[int, int] = {}
    for row in metrics:
        if "stage" in row:
            epochs[row["stage"]] = max(epochs.get(row["stage"], 0), row["epoch"])
    before, total = {}, 0
    for stage in sorted(epochs):
        before[stage] = total
        total += epochs[stage]
    before[max(before, default=0) + 1] = total
    return before


def _mark_stages(axes: Axes, runs: Mapping[str, Metrics]) -> None:
    """Lines between the stages of one run; a legend of several."""
    total = max(max(_epochs_before(metrics).values()) for metrics in runs.values())
    axes.set_xlim(-0.02 * total, 1.03 * total)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(runs) > 1:
        axes.legend()
        return
    (metrics,) = runs.values()
    before = _epochs_before(metrics)
    learns = {row["stage"]: row["learns"] for row in metrics if "stage" in row}
    for stage, start in before.items():
        if stage not in learns:
            continue
        if start:
            axes.axvline(start, color=LINE, linewidth=1)
        axes.annotate(
            f"{stage}: {learns[stage]}" if len(learns) <= 3 else str(stage), (start, 1),
            xycoords=("data", "axes fraction"), xytext=(4, -10), textcoords="offset points", size=9,
        )  # fmt: skip


def name_of(measure: Measure) -> str:
    """How a plot calls a score."""
    return "Top-1" if measure.key == "top1" else measure.title


def patches_by_block(dense: dict[str, Any], slim: dict[str, Any]) -> Markup:
    """Patches that each block uses, from two tables of `per_layer`."""

    def draw(axes: Axes) -> str:
        blocks = [layer["layer"] for layer in slim["layers"]]
        counts = [layer["patches"] for layer in slim["layers"]]
        axes.step(blocks, [layer["patches"] for layer in dense["layers"]], where="mid", color=SERIES[0],
                  linestyle="--", linewidth=1.6, label="dense")  # fmt: skip
        axes.step(blocks, counts, where="mid", color=SERIES[1], linewidth=2, label="slim")
        axes.set(xlabel="block", ylabel="patches", ylim=(0, 1.25 * counts[0]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(ncols=2, loc="upper right")
        used = ", ".join(map(str, counts))
        return f"Of {counts[0]} patches, blocks 1 to {len(blocks)} of the slimmed model use {used}."

    return plot_of(draw, "Patches in each block")


def time_by_block(dense: dict[str, Any], slim: dict[str, Any], batch_size: int) -> Markup:
    """Milliseconds that each block takes, from two tables of `per_layer`."""

    def draw(axes: Axes) -> str:
        totals = []
        for number, (name, table) in enumerate((("dense", dense), ("slim", slim))):
            blocks = numpy.array([layer["layer"] for layer in table["layers"]])
            times = [layer["ms"] for layer in table["layers"]]
            bars: dict[str, Any] = {"facecolor": "none" if number == 0 else SERIES[1], "edgecolor": SERIES[number]}
            axes.bar(
                blocks + (number - 0.5) * 0.4, times, 0.4, label=name, hatch="///" if number == 0 else None, **bars
            )
            totals.append(f"{name} {sum(times):.1f} ms, and {table['other_ms']:.1f} ms outside the blocks")
        axes.set(xlabel="block", ylabel="ms a batch")
        axes.margins(y=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(ncols=2, loc="upper right")
        return f"Measured time of each block at batch {batch_size}: {'; '.join(totals)} in all."

    return plot_of(draw, "Time in each block")


def life_histogram(lives: NDArray[numpy.float32], counts: Sequence[int]) -> Markup:
    """The predicted lives (images, N) against the moments and shares that the schedule N_1..N_L asks for."""
    images, depth = len(lives), len(counts)
    mean, std = life_moments(counts)
    lives = lives.reshape(-1)

    def draw(axes: Axes) -> str:
        low, high = min(lives.min(), 1.0), max(lives.max(), float(depth))
        edges = numpy.arange(numpy.floor(low * 2) / 2 - 0.25, numpy.ceil(high * 2) / 2 + 0.75, 0.5)
        weights = numpy.full(lives.size, 100 / lives.size)
        for place, dash, label in ((mean, "-", "target μ"), (mean - std, "--", "μ ± σ"), (mean + std, "--", None)):
            axes.axvline(place, color=INK, linewidth=1.5, linestyle=dash, label=label)
        axes.hist(lives, edges.tolist(), weights=weights, color=SERIES[1], label="predicted", zorder=1)
        axes.set(xlabel="life (last block that uses a patch)", ylabel="patches (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
        return (
            f"Lives of {lives.size} patches in {images} images: mean {lives.mean():.2f}, standard deviation "
            f"{lives.std():.2f}, from {lives.min():.1f} to {lives.max():.1f}; target mean {mean:.2f} and standard "
            f"deviation {std:.2f}."
        )

    return plot_of(draw, "Predicted lives against their target")
