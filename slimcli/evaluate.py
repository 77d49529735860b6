"""Accuracy, cost and throughput of a model, dense and slimmed, on the same images in one run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from slimcli import measure
from slimcli.errors import SlimError
from slimcli.files import write_json
from slimcli.layout import lay_out_for_inference
from slimcli.progress import Progress, no_progress
from slimcli.runs import EVALUATIONS
from slimcli.schedule import Schedule
from slimcli.slimming import SlimModel

#: rounds that speed is of: at least; with fewer full batches topped up to, as long as that many seconds allow
FEWEST_ROUNDS, ENOUGH_ROUNDS, TOP_UP_SECONDS = 3, 10, 5.0


@dataclass
class Accuracy:
    """Running sums of top-1, top-5 and cross-entropy over batches."""

    count: int = 0
    top1: int = 0
    top5: int = 0
    loss: float = 0.0
    agree: int = 0

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Add a batch: logits (B, C), classes (B,), and the predictions (B,) to compare with, if any."""
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == targets[:, None]
        self.count += targets.shape[0]
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.sum())
        self.loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        if reference is not None:
            self.agree += int((best[:, 0] == reference).sum())

    def row(self) -> dict[str, float]:
        """Percentages of `count` images, and the mean loss."""
        share = 100 / max(self.count, 1)
        return {
            "top1": round(self.top1 * share, 3),
            "top5": round(self.top5 * share, 3),
            "loss": round(self.loss / max(self.count, 1), 5),
        }


@dataclass
class Similarity:
    """Running sum of the cosine between a model's features and the dense model's: what stands for accuracy where
    there is no classifier.
    """

    count: int = 0
    cosine: float = 0.0

    def add(self, features: Tensor, reference: Tensor) -> None:
        """Add a batch: features (B, D) and those of the dense model."""
        self.count += features.shape[0]
        self.cosine += float(F.cosine_similarity(features, reference).sum())

    def row(self) -> dict[str, float]:
        """The mean over `count` images."""
        return {"similarity": round(self.cosine / max(self.count, 1), 5)}


@dataclass
class Scores:
    """What a validation measured: accuracy of a model with a classifier, similarity where there is a dense model to
    compare with, or both.
    """

    accuracy: Accuracy = field(default_factory=Accuracy)
    similarity: Similarity = field(default_factory=Similarity)

    @property
    def count(self) -> int:
        return max(self.accuracy.count, self.similarity.count)

    @property
    def score(self) -> float:
        """What is to be high: top-1 in percent, or without a classifier the similarity."""
        row = self.row()
        return row.get("top1", row.get("similarity", 0.0))

    def row(self) -> dict[str, float]:
        """The rows of both, as far as they were measured."""
        return {
            **(self.accuracy.row() if self.accuracy.count else {}),
            **(self.similarity.row() if self.similarity.count else {}),
        }


def pooled(output: Tensor) -> Tensor:
    """A model's outputs (B, C) in float32; the tokens (B, n, D) of one that does not pool are averaged."""
    return output.float().mean(dim=1) if output.dim() == 3 else output.float()


@dataclass
class Variant:
    """A way to run the model: dense (`schedule` None) or under a schedule, with `exact_savings` or without."""

    schedule: Schedule | None
    exact_savings: bool = False
    #: the model that runs, where it is not the one that is measured but a rival of it
    rival: SlimModel | None = None
    #: the schedule that a rival's is compared with
    like: Schedule | None = None
    scores: Scores = field(default_factory=Scores)
    seconds: list[float] = field(default_factory=list)

    def set(self, model: SlimModel) -> None:
        model.mode = "none" if self.schedule is None else "hard"
        model.exact_savings = self.exact_savings
        if self.schedule is not None:
            model.schedule = self.schedule


def describe(model: SlimModel, schedule: Schedule | None, exact_savings: bool = False) -> dict[str, Any]:
    """What can be said of a variant without running it: keep rate, schedule, cost, parameters."""
    architecture = model.architecture()
    counts = model.patches_used(schedule) if schedule else None
    dense = sum(p.numel() for p in model.model.parameters())
    head = sum(p.numel() for p in model.selector.parameters()) if schedule else 0
    cost = model.cost(schedule) - (model.savings(schedule) if exact_savings else 0)
    return {
        "dense": schedule is None,
        "method": model.method if schedule else None,
        "keep_rate": model.keep_rate_of(schedule, cost) if schedule else None,
        "exact_savings": exact_savings,
        "schedule": list(counts or (architecture.num_patches,) * architecture.depth),
        "gmacs": round(cost / 1e9, 4),
        "params_millions": round((dense + head) / 1e6, 4),
    }


def schedules(model: SlimModel, keep_rates: Sequence[float] | None) -> list[Schedule | None]:
    """The dense model, then the model's own schedule or, where given, one schedule a keep rate."""
    if keep_rates is None:
        return [None, model.schedule]
    return [None, *(model.at_keep_rate(rate) for rate in keep_rates)]


def check_classes(model: SlimModel, class_names: Sequence[str] | None) -> None:
    """`SlimError` if the data's classes are not the model's."""
    outputs = model.architecture().num_outputs
    if class_names is not None and outputs and len(class_names) != outputs:
        raise SlimError(f"the data has {len(class_names)} classes and the model {outputs}: they must be the same")


def check_classifier(model: SlimModel) -> None:
    """`SlimError` if the model has no classifier to train."""
    if not model.architecture().num_outputs:
        raise SlimError(
            "the model has no classifier (num_classes = 0): give model.num_classes to train one, or slim it as it is "
            "with `slim calibrate`, which needs no classes, or train with loss = 'cosine'"
        )


@torch.inference_mode()
def evaluate(
    model: SlimModel,
    loader: DataLoader[Any],
    keep_rates: Sequence[float] | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Rows for the dense model and each keep rate: accuracy on all images of `loader`, cost, and speed.

    Of a model without a classifier, `similarity` to the dense model's features takes the place of accuracy; a
    backbone that `compares_embeddings` has both.
    The variants run in turn on every batch; speed is the median over the full batches and the speed-up the median
    of the ratios within a batch. Small sets are topped up with more rounds on the last full batch, ten in all or
    what five seconds allow.
    """
    model = model.to(device, dtype).eval()
    lay_out_for_inference(model)
    before = model.mode, model.schedule, model.exact_savings
    # the dense model runs as its library runs it, whatever the slimmed one leaves out
    variants = [Variant(s, model.exact_savings and s is not None) for s in schedules(model, keep_rates)]
    has_classes = model.architecture().num_outputs > 0
    timed: Tensor | None = None
    warm = False
    total = len(loader)
    for index, (images, targets) in enumerate(loader):
        progress("evaluating", index, total)
        images, targets = images.to(device, dtype), targets.to(device)
        full = timed is None or images.shape[0] == timed.shape[0]
        if full and not warm:
            for variant in variants:
                variant.set(model)
                model.logits(images)
            warm = True
        reference: Tensor | None = None
        for variant in variants:
            variant.set(model)
            output, took = measure.timed(partial(model.logits, images), device)
            if has_classes:
                variant.scores.accuracy.add(output, targets)
            if not has_classes or model.backbone.compares_embeddings:
                features = pooled(model.embedding(images) if has_classes else output)
                reference = features if reference is None else reference
                variant.scores.similarity.add(features, reference)
            if full:
                variant.seconds.append(took)
        timed = images if full else timed
    progress("evaluating", total, total)
    if timed is None:
        raise SlimError("there are no images to evaluate on")

    have = len(variants[0].seconds)
    if have < ENOUGH_ROUNDS:
        runs = [partial(_run, model, variant, timed) for variant in variants]
        fewest, most = max(FEWEST_ROUNDS - have, 1), ENOUGH_ROUNDS - have
        more = measure.interleave(runs, device, fewest, TOP_UP_SECONDS, most, progress, "timing")
        for variant, seconds in zip(variants, more, strict=True):
            variant.seconds += seconds
    model.mode, model.schedule, model.exact_savings = before
    rows = []
    for variant in variants:
        rows.append(
            {
                **describe(model, variant.schedule, variant.exact_savings),
                "images": variant.scores.count,
                **variant.scores.row(),
                "images_per_second": round(timed.shape[0] / statistics.median(variant.seconds), 2),
                "speedup": round(measure.speedup(variants[0].seconds, variant.seconds), 4),
            }
        )
    return rows


def add_evaluation(folder: Path, evaluation: dict[str, Any]) -> None:
    """Add a measurement to those in a run's folder, for its report; the file is replaced whole."""
    path = folder / EVALUATIONS
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError as error:
        raise SlimError(f"{path}: is damaged ({error}): remove it to start anew") from error
    write_json(path, [*before, evaluation])


def _run(model: SlimModel, variant: Variant, images: Tensor) -> Tensor:
    variant.set(model)
    return model.logits(images)


@torch.inference_mode()
def agreement(
    model: SlimModel, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, dtype: torch.dtype
) -> tuple[float, Accuracy | Similarity, Accuracy | Similarity]:
    """How often dense and slimmed model predict the same class, in percent, and the accuracy of each.

    Without a classifier: the mean cosine of their features, times 100.
    """
    if not model.architecture().num_outputs:
        same, near = Similarity(), Similarity()
        for images, _targets in batches:
            images = images.to(device, dtype)
            with model.running(mode="none"):
                features = pooled(model.logits(images))
            same.add(features, features)
            with model.running(mode="hard"):
                near.add(pooled(model.logits(images)), features)
        return 100 * near.row()["similarity"], same, near
    dense, slim = Accuracy(), Accuracy()
    for images, targets in batches:
        images, targets = images.to(device, dtype), targets.to(device)
        with model.running(mode="none"):
            logits = model.logits(images)
        dense.add(logits, targets)
        with model.running(mode="hard"):
            slim.add(model.logits(images), targets, logits.argmax(dim=1))
    return 100 * slim.agree / max(slim.count, 1), dense, slim


def first_images(loader: DataLoader[Any], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `loader` until `count` images have come."""
    taken = 0
    for images, targets in loader:
        yield images[: count - taken], targets[: count - taken]
        taken += images.shape[0]
        if taken >= count:
            return
