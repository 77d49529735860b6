"""What a comparison of methods found: its lines, as a table and as a plot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slimcli.comparison.line import Line
from slimcli.measure.rows import DOUBT, MEASURES, Row, timing_notes

MARKERS = "os^DvPX<>"


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
    shown = [MEASURES[key].short for key in lines[0].likeness]
    titles = ["Method", "Keep rate", "Setting", "G multiply-adds", lines[0].score_title, "Lost", *shown, "img/s",
              "Speed-up", "Of ideal"]  # fmt: skip
    text = [f"# {document['recipe']}: {document['model']}, {how_trained(document)}", "", *_head(titles)]
    for line in lines:
        cost = "-" if line.row.gmacs is None else f"{line.row.gmacs:.4f}"
        text.append(f"| {' | '.join([line.title, line.rate, line.setting_text, cost, *line.cells(errors=True)])} |")
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    # None where the command did not run in a checkout
    commit = f"; commit {document['git_commit']}" if document["git_commit"] else ""
    text += [
        "",
        f"{lines[0].row.images} images, {document['precision']}, batch {document['batch_size']}, "
        f"{document['device_name']}, {document['threads']} threads; {versions}{commit}.",
        "Every method costs at most what three drops with discarding cost at the keep rate. Speed-up is over the dense "
        "model, measured in turn on the same batch; of ideal: speed-up over the ratio of multiply-adds.",
        *explained(document),
        *doubts(lines),
        "",
    ]
    if document["pairs"]:
        text += ["## Told apart?", "", *(f"- {pair.verdict}" for pair in document["pairs"]), ""]
    titles = ["Method", "Epochs", "Parameters beside the model's", "Operators of a pass", "Export"]
    text += ["## What each asks for", "", *_head(titles)]
    seen = {line.title: line for line in reversed(lines) if line.asks}
    for title in dict.fromkeys(line.title for line in lines if line.asks):
        asks, epochs = seen[title].asks, document["epochs"] if seen[title].trained else 0
        exports = "yes" if asks["exports"] else "no"
        text.append(f"| {title} | {epochs} | {asks['extra_parameters']} | {asks['operators']} | {exports} |")
    return "\n".join([*text, ""])


def _head(titles: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def explained(document: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures should know: what likeness is to, what ± is over, and what was chosen by."""
    lines: list[Line] = document["rows"]
    if lines[0].row.miou is not None:
        found = ["Patches: the mean cosine of all patch features with those of the dense model as it came."]
    else:
        found = [
            "Agrees (%), KL (nats) and error of the logits are to the dense model as it came, before any training."
        ]
    seeds = document["seeds"]
    if len(seeds) > 1:
        found.append(f"Means of the seeds {', '.join(map(str, seeds))}; after ± the standard error of the mean.")
    else:
        found.append("After ± standard errors over the images.")
    if document["chosen_on"] == document["measured_on"]:
        found.append(
            f"Measured on the images of {document['measured_on']}, by which each training chose its best epoch as well."
        )
    return found


def draw(document: dict[str, Any]) -> Figure:
    """Accuracy against multiply-adds, and against measured time with the dense model's as 1."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lines: list[Line] = document["rows"]
    _points(left, lines, lambda row: row.gmacs)
    _points(right, lines, lambda row: 1 / row.speedup if row.speedup else None)
    left.set_xlabel("G multiply-adds an image")
    right.set_xlabel("time an image, dense = 1" + (" (measured on a busy machine)" if doubts(lines) else ""))
    left.set_ylabel({"Cosine x 100": "cosine with dense x 100"}.get(lines[0].score_title, lines[0].score_title))
    right.legend(frameon=False, fontsize=9)
    epochs = document["epochs"]
    figure.suptitle(f"{document['model']}: {f'{epochs} epochs each' if epochs else 'nothing trained'}", fontsize=11)
    return figure


def _error(line: Line) -> float | None:
    score = line.row.score
    return None if score is None or score.key not in ("top1", "miou") else line.row.get(score.error)


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
        at = [(place(line.row), line.score, _error(line) if line.seeds else None) for line in own]
        points = sorted((x, y, error or 0.0) for x, y, error in at if x is not None and y is not None)
        x, y, error = zip(*points, strict=True) if points else ((), (), ())
        axes.errorbar(x, y, yerr=error if any(error) else None, label=title, linewidth=1.2, **style)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
