"""The tables of "Life Regression based Patch Slimming for Vision Transformers": what stands in which, and its figures.

Accuracy is in percent on ImageNet-1k, cost in G multiply-adds (the paper says FLOPs), speed in images a second on one
Quadro P6000 in batches of 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: the paper's models, by the names that a user gives them
PLACES = {"deit-s": "DeiT-S", "deit-b": "DeiT-B", "vit-t": "ViT-T", "vit-s": "ViT-S", "vit-b": "ViT-B"}
#: the built-in recipe of each
RECIPES = {
    "deit-s": "imagenet-deit-small",
    "deit-b": "imagenet-deit-base",
    "vit-t": "imagenet-vit-tiny",
    "vit-s": "imagenet-vit-small",
    "vit-b": "imagenet-vit-base",
}
#: the paper's methods, as it calls them
METHODS = {
    "life": "Ours",
    "ia-red2": "IA-RED2",
    "evit": "EViT",
    "dynamicvit": "DynamicViT",
    "a-vit": "A-ViT",
    "evo-vit": "Evo-ViT",
}
#: where a model of the user's own stands in the tables
OWN_PLACES = ("deit-s", "vit-s")
#: what the paper trains others, and its own method, for
OTHERS_EPOCHS, OWN_EPOCHS = 30, 2
KEEP_RATE, TEMPERATURE = 0.7, 1.5
TITLES = {
    "I": "DeiT-S and DeiT-B",
    "II": "ViT-T, ViT-S and ViT-B",
    "III": "Keep rates",
    "IV": "One stage of training and two",
    "V": "Temperature",
}
FIGURE = "figure4"
#: everything that can be asked for
PARTS = (*TITLES, FIGURE)


@dataclass(frozen=True)
class Entry:
    """A line, or in tables III to V a column: a model of the paper and how it is run, with the paper's figures.

    Figures are None where the paper has none. `keep_rate` None: by the cost that the paper gives the method.
    """

    table: str
    place: str
    method: str
    keep_rate: float | None = None
    one_stage: bool = False
    temperature: float = TEMPERATURE
    top1: float | None = None
    top5: float | None = None
    gmacs: float | None = None
    images_per_second: float | None = None
    epochs: int | None = None

    @property
    def dense(self) -> bool:
        """Whether it is the model as it came: also where the paper's own method keeps all patches."""
        return self.method == "dense" or self.keep_rate == 1.0

    @property
    def published(self) -> dict[str, Any]:
        """The paper's figures, as far as it has them."""
        names = ("top1", "top5", "gmacs", "images_per_second", "epochs")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def share(entry: Entry) -> float | None:
    """The share of the dense model's arithmetic that another method has in the paper; None where it is not there."""
    if entry.gmacs is None:
        return None
    dense = next(one for one in entries() if one.place == entry.place and one.dense and one.gmacs is not None)
    assert dense.gmacs is not None
    return entry.gmacs / dense.gmacs


def entries(table: str | None = None) -> list[Entry]:
    """What stands in a table of the paper, or in all, in its order."""
    found = [*_compared(), *_keep_rates(), *_schemes(), *_temperatures()]
    return [entry for entry in found if table in (None, entry.table)]


#: table, model, method, top-1, top-5, G multiply-adds, images a second
_FIGURES: tuple[tuple[str, str, str, float, float, float, float | None], ...] = (
    ("I", "deit-s", "dense", 79.8, 95.0, 4.6, 503.9),
    ("I", "deit-s", "ia-red2", 79.1, 94.5, 3.3, None),
    ("I", "deit-s", "evit", 79.2, 94.7, 3.0, 658.2),
    ("I", "deit-s", "dynamicvit", 79.3, 94.6, 3.4, 642.4),
    ("I", "deit-s", "life", 79.3, 94.7, 3.2, 704.8),
    ("I", "deit-b", "dense", 82.0, 95.7, 17.6, 186.4),
    ("I", "deit-b", "ia-red2", 80.3, 95.0, 11.8, None),
    ("I", "deit-b", "evo-vit", 80.0, 94.7, 11.7, 273.1),
    ("I", "deit-b", "life", 80.1, 94.7, 12.3, 262.0),
    ("II", "vit-t", "dense", 75.5, 92.8, 1.3, 1212.1),
    ("II", "vit-t", "dynamicvit", 70.9, 90.0, 0.9, 1533.9),
    ("II", "vit-t", "a-vit", 71.4, 90.4, 0.8, None),
    ("II", "vit-t", "evo-vit", 72.0, 90.7, 0.8, 1334.1),
    ("II", "vit-t", "life", 73.6, 91.8, 0.9, 1573.8),
    ("II", "vit-s", "dense", 81.4, 96.1, 4.6, 504.7),
    ("II", "vit-s", "evo-vit", 79.5, 94.8, 3.0, 733.4),
    ("II", "vit-s", "a-vit", 78.8, 93.9, 3.6, None),
    ("II", "vit-s", "life", 79.8, 95.3, 3.2, 723.3),
    ("II", "vit-b", "dense", 84.5, 97.3, 17.6, 187.1),
    ("II", "vit-b", "evo-vit", 81.6, 95.6, 12.0, 219.0),
    ("II", "vit-b", "evit", 82.4, 96.0, 12.1, 248.2),
    ("II", "vit-b", "life", 82.3, 96.4, 12.3, 256.0),
)


def _compared() -> list[Entry]:
    """Tables I and II."""
    found = []
    for table, place, method, top1, top5, gmacs, speed in _FIGURES:
        epochs = {"dense": None, "life": OWN_EPOCHS}.get(method, OTHERS_EPOCHS)
        rate = KEEP_RATE if method == "life" else None
        figures = {"top1": top1, "top5": top5, "gmacs": gmacs, "images_per_second": speed, "epochs": epochs}
        found.append(Entry(table, place, method, rate, **figures))  # type: ignore[arg-type]
    return found


def _keep_rates() -> list[Entry]:
    """Table III."""
    figures = (
        (1.0, 79.8, 95.0, 4.6, 503.9),
        (0.9, 79.7, 94.8, 4.1, 512.5),
        (0.8, 79.5, 94.8, 3.6, 601.3),
        (0.7, 79.3, 94.7, 3.2, 704.8),
    )
    return [
        Entry("III", "deit-s", "life", rate, top1=top1, top5=top5, gmacs=gmacs, images_per_second=speed)
        for rate, top1, top5, gmacs, speed in figures
    ]


def _schemes() -> list[Entry]:
    """Table IV."""
    figures = (
        (True, 0.9, 78.7, 93.4),
        (True, 0.8, 78.5, 92.1),
        (True, 0.7, 78.3, 91.9),
        (False, 0.9, 79.8, 95.2),
        (False, 0.8, 79.5, 95.0),
        (False, 0.7, 79.3, 94.7),
    )
    return [Entry("IV", "deit-s", "life", rate, one, top1=top1, top5=top5) for one, rate, top1, top5 in figures]


def _temperatures() -> list[Entry]:
    """Table V."""
    figures = ((0.5, 79.0, 94.4), (1.0, 79.2, 94.6), (1.5, 79.3, 94.7), (2.0, 79.2, 94.5), (3.0, 79.2, 94.5))
    return [Entry("V", "deit-s", "life", KEEP_RATE, False, u, top1=top1, top5=top5) for u, top1, top5 in figures]
