"""What is measured of a model, and how each figure is called, written and rounded: one table for every output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

#: marks a figure of a timing that is not to be trusted
DOUBT = "?"


@dataclass(frozen=True)
class Measure:
    """A figure of a row: its key in JSON, its titles, and how many digits are printed."""

    key: str
    title: str
    #: the title where there is little room
    short: str
    digits: int
    unit: str = ""
    #: "higher", "lower" or "" where neither is better
    better: str = ""
    #: the key of its standard error
    error: str = ""
    #: whether a busy machine changes it
    timed: bool = False
    #: what the figure is multiplied by where it is printed
    scale: float = 1.0

    def value(self, row: Row) -> float | None:
        """The figure, or None where it was not measured."""
        found = row.get(self.key)
        return None if found is None or not math.isfinite(found) else float(found)

    def text(self, row: Row, error: bool = False, unit: bool = False, doubt: bool = True) -> str:
        """The figure of a row, as `92.50`; with `error` as `92.50 ± 0.42`, and a `?` after what is in doubt."""
        found = self.value(row)
        if found is None:
            return "-"
        text = f"{self.scale * found:.{self.digits}f}{self.unit if unit else ''}"
        deviation = row.get(self.error) if self.error and error else None
        if deviation is not None:
            text += f" ± {self.scale * deviation:.{self.digits}f}"
        # the dense model's speed-up over itself is 1 whatever the machine does
        compared = self.key in ("speedup", "realised") and row.dense and not row.exact_savings
        return text + (DOUBT if doubt and self.timed and row.timing_reliable is False and not compared else "")


MEASURES = {
    measure.key: measure
    for measure in (
        Measure("top1", "Top-1 (%)", "Top-1", 2, " %", "higher", "top1_se"),
        Measure("top5", "Top-5 (%)", "Top-5", 2, " %", "higher", "top5_se"),
        Measure("loss", "Loss", "Loss", 4, "", "lower", "loss_se"),
        Measure("similarity", "Cosine with dense", "Cosine", 4, "", "higher", "similarity_se"),
        Measure("top1_difference", "Top-1 less dense", "Less dense", 2, "", "higher", "top1_difference_se"),
        Measure("agreement", "Agrees with dense (%)", "Agrees", 1, " %", "higher", "agreement_se"),
        Measure("kl", "KL from dense", "KL", 4, "", "lower", "kl_se"),
        Measure("logit_error", "Error of logits", "Error", 4, "", "lower", "logit_error_se"),
        Measure("miou", "mIoU (%)", "mIoU", 2, " %", "higher", "miou_se"),
        Measure("miou_difference", "mIoU less dense", "Less dense", 2, "", "higher", "miou_difference_se"),
        Measure("pixel_accuracy", "Right pixels (%)", "Pixels", 2, " %", "higher", "pixel_accuracy_se"),
        Measure("patch_similarity", "Cosine of patches", "Patches", 4, "", "higher", "patch_similarity_se"),
        Measure("recall1", "Recall at 1 (%)", "R@1", 2, " %", "higher", "recall1_se"),
        Measure("recall10", "Recall at 10 (%)", "R@10", 2, " %", "higher", "recall10_se"),
        Measure(
            "mean_average_precision",
            "Mean average precision (%)",
            "mAP",
            2,
            " %",
            "higher",
            "mean_average_precision_se",
        ),
        Measure("neighbours", "Neighbours as dense (%)", "Same 10", 1, " %", "higher", "neighbours_se"),
        Measure("gmacs", "Multiply-adds (G)", "G MACs", 3, " G", "lower"),
        Measure("params_millions", "Parameters (M)", "M params", 2, " M"),
        Measure("images_per_second", "Images/s", "img/s", 1, "", "higher", timed=True),
        Measure("speedup", "Speed-up", "Speed-up", 2, "", "higher", timed=True),
        Measure("over_first", "Over the first row", "Over first", 2, "", "higher", timed=True),
        Measure("realised", "Speed-up of ideal", "of ideal", 0, " %", "higher", timed=True, scale=100.0),
        Measure("latency_ms_p50", "Latency p50 (ms)", "p50 ms", 1, " ms", "lower", timed=True),
        Measure("latency_ms_p95", "Latency p95 (ms)", "p95 ms", 1, " ms", "lower", timed=True),
        Measure("megabytes", "MB on disk", "MB", 0, " MB", "lower"),
        Measure("peak_memory_mib", "Peak memory (MiB)", "MiB", 0, " MiB", "lower"),
    )
}
#: what tables of accuracy, cost and speed show, in this order, as far as it was measured
TABLE = ("top1", "top5", "loss", "similarity", "top1_difference", "agreement", "kl", "logit_error", "miou",
         "miou_difference", "pixel_accuracy", "patch_similarity", "recall1", "recall10",
         "mean_average_precision", "neighbours", "gmacs",
         "params_millions", "images_per_second", "speedup")  # fmt: skip
#: keys that stand in every row's JSON, also where there is nothing to say
ALWAYS = ("dense", "method", "keep_rate", "exact_savings", "schedule", "gmacs", "params_millions")


@dataclass(frozen=True)
class Row:
    """What was measured of one way to run a model: dense, or slimmed by a schedule. None: not measured.

    Accuracy is in percent, `similarity` the mean cosine between features and the dense model's, `*_se` standard errors;
    `top1_difference` is top-1 less the dense model's on the same images, in points. `agreement` (percent), `kl` (nats)
    and `logit_error` say how near its logits are to the dense model's: see `scores.Likeness`. `right` has the images
    that it got right, where they are asked for: see `scores.packed`. `speedup` is over the dense model in the same
    runtime, with its 95 % interval, and `over_first` over the first row, where rows are of several runtimes;
    `timing_reliable` says whether to believe what was timed, and `timing_note` why not. Values are also read by their
    key, `row["top1"]`, as they stand in JSON.
    """

    dense: bool = False
    #: where it ran and in what precision, where that was chosen: `onnx int8`
    runtime: str | None = None
    method: str | None = None
    keep_rate: float | None = None
    exact_savings: bool = False
    schedule: tuple[int, ...] = ()
    gmacs: float | None = None
    params_millions: float | None = None
    images: int | None = None
    top1: float | None = None
    top1_se: float | None = None
    top5: float | None = None
    top5_se: float | None = None
    loss: float | None = None
    loss_se: float | None = None
    similarity: float | None = None
    similarity_se: float | None = None
    top1_difference: float | None = None
    top1_difference_se: float | None = None
    agreement: float | None = None
    agreement_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    logit_error: float | None = None
    logit_error_se: float | None = None
    miou: float | None = None
    miou_se: float | None = None
    miou_difference: float | None = None
    miou_difference_se: float | None = None
    pixel_accuracy: float | None = None
    pixel_accuracy_se: float | None = None
    patch_similarity: float | None = None
    patch_similarity_se: float | None = None
    recall1: float | None = None
    recall1_se: float | None = None
    recall10: float | None = None
    recall10_se: float | None = None
    mean_average_precision: float | None = None
    mean_average_precision_se: float | None = None
    neighbours: float | None = None
    neighbours_se: float | None = None
    right: str | None = None
    images_per_second: float | None = None
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None
    over_first: float | None = None
    realised: float | None = None
    latency_ms_p50: float | None = None
    latency_ms_p95: float | None = None
    megabytes: float | None = None
    peak_memory_mib: float | None = None
    timing_reliable: bool | None = None
    timing_note: str | None = None

    @property
    def name(self) -> str:
        """`dense`, the keep rate, or `own` for another schedule; then `exact` where exact savings are on.

        Before it stands the runtime, where that was chosen.
        """
        name = "dense" if self.dense else "own" if self.keep_rate is None else f"{self.keep_rate:g}"
        name = f"{name} exact" if self.exact_savings else name
        return f"{self.runtime} {name}" if self.runtime else name

    @property
    def score(self) -> Measure | None:
        """What stands for accuracy: top-1, or without a classifier the cosine with the dense model's features."""
        return next(
            (
                MEASURES[key]
                for key in ("top1", "miou", "similarity", "patch_similarity", "neighbours")
                if MEASURES[key].value(self) is not None
            ),
            None,
        )

    def also(self, **values: Any) -> Row:
        """The row with more of its values known."""
        return replace(self, **values)

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in JSON: what was measured, and what every row says."""
        found = {key.name: getattr(self, key.name) for key in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in found.items()
            if value is not None or key in ALWAYS
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], dense: bool = False) -> Row:
        """A row of a file, also of an earlier version's. `dense` where the file does not say whether it is."""
        known = {key.name for key in fields(cls)}
        found = {key: value for key, value in content.items() if key in known}
        for key in ("schedule", "speedup_interval"):
            if isinstance(found.get(key), list):
                found[key] = tuple(found[key])
        return cls(**{"dense": dense, **found})

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the row's JSON."""
        value = getattr(self, key, None)
        return default if value is None else value

    def keys(self) -> Iterable[str]:
        """The keys of the row's JSON."""
        return self.to_json().keys()

    def __getitem__(self, key: str) -> Any:
        return self.to_json()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.to_json()

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_json())


def read_rows(content: Sequence[Mapping[str, Any] | Row]) -> list[Row]:
    """Rows of a file, dense first, also those of earlier versions."""
    return [row if isinstance(row, Row) else Row.from_json(row, index == 0) for index, row in enumerate(content)]


def measured(rows: Sequence[Row], keys: Sequence[str] = TABLE) -> list[Measure]:
    """The measures that at least one of the rows has."""
    return [MEASURES[key] for key in keys if any(MEASURES[key].value(row) is not None for row in rows)]


def interval_text(row: Row) -> str:
    """The 95 % interval of the speed-up, as `1.38-1.44`."""
    compared = not row.dense or row.exact_savings
    return "-" if row.speedup_interval is None or not compared else "{:.2f}-{:.2f}".format(*row.speedup_interval)


def timing_notes(rows: Sequence[Row]) -> list[str]:
    """Why timings of the rows are not to be trusted and what to do about it: a sentence each, the same one once."""
    return list(dict.fromkeys(row.timing_note for row in rows if row.timing_reliable is False and row.timing_note))


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of a table of these rows should be told, a line each."""
    found = [f"{DOUBT} do not trust: {note}" for note in timing_notes(rows)]
    if any(row.exact_savings for row in rows):
        found.append("exact: without the work for tokens that nothing reads; the same logits")
    if any("own" in row.name.split() for row in rows):
        found.append("own: a schedule of its own, not that of one keep rate")
    alike = [row.name for row in rows if told_apart(row) is False]
    if alike:
        images = next((row.images for row in rows if row.images), "these")
        found.append(f"not to be told from dense by top-1 on {images} images: {', '.join(alike)}")
    return found


def told_apart(row: Row) -> bool | None:
    """Whether top-1 differs from the dense model's by twice its standard error or more; None: not measured."""
    if row.dense or row.top1_difference is None or row.top1_difference_se is None:
        return None
    return row.top1_difference_se > 0 and abs(row.top1_difference) >= 2 * row.top1_difference_se
