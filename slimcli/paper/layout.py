"""The paper's tables in its layout, each figure that was measured beside the paper's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimcli.comparison.line import Line
from slimcli.measure.rows import DOUBT, MEASURES, timing_notes
from slimcli.paper.published import METHODS, PLACES, TITLES, Entry, entries

#: keys of the figures that a table has, with their titles
FIGURES = {"top1": "Top-1 (%)", "top5": "Top-5 (%)", "gmacs": "G multiply-adds", "images_per_second": "img/s"}
#: digits of the paper's figures
DIGITS = 1
PAPER = "paper"


@dataclass(frozen=True)
class Place:
    """A line of a table, or a column of III to V: the paper's `entry`, and what was measured for it, None until it is.

    `model` is what stands for the paper's model; `dense` the same model as it came; `epochs` those it was trained for.
    """

    entry: Entry
    model: str
    line: Line | None
    dense: Line | None
    epochs: int | None

    @property
    def title(self) -> str:
        """As the paper calls it: the method, and in brackets the model."""
        name = PLACES[self.entry.place]
        return name if self.entry.dense else f"{METHODS.get(self.entry.method, self.entry.method)} ({name})"

    def value(self, key: str) -> float | None:
        """A measured figure."""
        return None if self.line is None else self.line.row.get(key)

    def text(self, key: str, change: bool = False) -> str:
        """A measured figure in words, with `change` and against the dense model as the paper has it in brackets."""
        if key == "epochs":
            return "-" if self.epochs is None else str(self.epochs)
        if self.line is None:
            return "-"
        text = MEASURES[key].text(self.line.row)
        if not change or self.entry.dense or self.dense is None or text == "-":
            return text
        if key == "images_per_second":
            gain = self.line.row.speedup
            return text if gain is None else f"{text} ({100 * (gain - 1):+.0f} %)"
        return f"{text}{_change(key, self.value(key), self.dense.row.get(key), MEASURES[key].digits)}"

    def published(self, key: str, change: bool = False) -> str:
        """The paper's figure in words."""
        found = getattr(self.entry, key)
        if found is None:
            return "-"
        text = str(found) if key == "epochs" else f"{found:.{DIGITS}f}"
        if not change or self.entry.dense or key == "epochs":
            return text
        dense = next(e for e in entries(self.entry.table) if e.place == self.entry.place and e.dense)
        return f"{text}{_change(key, found, getattr(dense, key), DIGITS)}"

    def to_json(self) -> dict[str, Any]:
        """The line as it stands in JSON."""
        entry = self.entry
        own = {"keep_rate": entry.keep_rate, "one_stage": entry.one_stage, "temperature": entry.temperature}
        return {
            "title": self.title,
            "place": entry.place,
            "model": self.model,
            "method": "dense" if entry.dense else entry.method,
            **(own if entry.method == "life" else {}),
            "epochs": self.epochs,
            "measured": None if self.line is None else self.line.to_json(),
            "paper": entry.published,
        }


def _change(key: str, found: float | None, dense: float | None, digits: int) -> str:
    """What the paper writes in brackets: points of accuracy, or a percentage of the slimmed model's cost or speed."""
    if found is None or dense is None:
        return ""
    if key in ("top1", "top5"):
        return f" ({found - dense:+.{digits}f})"
    return f" (-{100 * (dense / found - 1):.0f} %)" if key == "gmacs" else f" ({100 * (found / dense - 1):+.0f} %)"


@dataclass(frozen=True)
class Table:
    """A table of the paper: its number, its title, and its lines."""

    name: str
    places: tuple[Place, ...]

    @property
    def title(self) -> str:
        """What it is about, and the models where they are not the paper's."""
        return f"Table {self.name}. {TITLES[self.name]}"

    def cells(self, change: bool = False) -> tuple[list[str], list[list[str]]]:
        """Titles and lines; I and II have a line a method, the others a column a setting, as the paper has them."""
        if self.name in ("I", "II"):
            keys = {**FIGURES, "epochs": "Epochs"}
            titles = ["Method", *(word for title in keys.values() for word in (title, PAPER))]
            body = [
                [p.title, *(word for key in keys for word in (p.text(key, change), p.published(key, change)))]
                for p in self.places
            ]
            return titles, body
        titles = [{"III": "Keep rate", "IV": "Keep rate", "V": "Temperature U"}[self.name]]
        titles += [_setting(self.name, place.entry) for place in self.places]
        body = []
        for key, title in FIGURES.items():
            if self.name == "III" or key in ("top1", "top5"):
                body.append([title, *(place.text(key) for place in self.places)])
                body.append([f"{title}, {PAPER}", *(place.published(key) for place in self.places)])
        return titles, body


def _setting(table: str, entry: Entry) -> str:
    if table == "V":
        return f"{entry.temperature:g}"
    stages = ("1 stage " if entry.one_stage else "2 stages ") if table == "IV" else ""
    return f"{stages}{entry.keep_rate:.1f}"


def tables_of(places: Iterable[Place]) -> tuple[Table, ...]:
    """The tables of the lines, in the paper's order."""
    found: dict[str, list[Place]] = {}
    for place in places:
        found.setdefault(place.entry.table, []).append(place)
    return tuple(Table(name, tuple(own)) for name, own in found.items())


def document_of(facts: Mapping[str, Any], tables: Sequence[Table]) -> dict[str, Any]:
    """All of it as it stands in JSON."""
    listed = [{"name": t.name, "title": t.title, "rows": [p.to_json() for p in t.places]} for t in tables]
    return {**facts, "tables": listed}


def explained(document: Mapping[str, Any], tables: Sequence[Table]) -> list[str]:
    """What a reader of the tables should know, a sentence each."""
    places = [place for table in tables for place in table.places]
    models = ", ".join(f"{name}: {model}" for name, model in document["models"].items())
    found = [
        f"{models}. {document['images'] or 0} images of {document['data']} ({document['measured_on']}), "
        f"{document['precision']}, batch {document['batch_size']}, {document['device_name']}.",
        f"Beside each figure, under {PAPER!r}, the paper's: ImageNet-1k, its own weights, one Quadro P6000, batch 128. "
        "Every method costs the share of the dense model's arithmetic that it has there.",
        "Training keeps the epoch that was best on the images that are measured here.",
    ]
    lines = [place.line for place in places if place.line is not None]
    # every line was timed by itself, and its note has figures of its own: one of them says what to do
    found += [f"{DOUBT} do not trust: {note}" for note in timing_notes([line.row for line in lines])[:1]]
    missing = len([place for place in places if place.line is None])
    if missing:
        found.append(f"{missing} of {len(places)} are still to be measured.")
    return [*found, *document["notes"]]


def markdown(document: Mapping[str, Any], tables: Sequence[Table]) -> str:
    """The tables as Markdown, with what they were measured on, and figure 4 where it was drawn."""
    text = ["# Life Regression based Patch Slimming for Vision Transformers, measured again", ""]
    for table in tables:
        titles, body = table.cells(change=True)
        text += [f"## {table.title}", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        text += [*(f"| {' | '.join(cells)} |" for cells in body), ""]
    if document["figure"]:
        text += ["## Figure 4", "", f"![Lives and what is left after each drop layer]({document['figure']})", ""]
    return "\n".join(
        [*text, "In brackets: points of accuracy; dense over slimmed arithmetic, less one; speed against the dense "
         "model's.", *(f"\n{line}" for line in explained(document, tables)), ""]
    )  # fmt: skip
