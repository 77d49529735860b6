"""Accuracy, cost and throughput of a model, dense and slimmed, on the same images in one run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from slimcli.errors import SlimError
from slimcli.layout import optimize
from slimcli.measure import clock
from slimcli.measure.rows import Row
from slimcli.measure.scores import Scores as Scores
from slimcli.measure.scores import packed
from slimcli.measure.scores import pooled as pooled
from slimcli.progress import Progress, Step, Steps, no_progress
from slimcli.schedule import Schedule
from slimcli.slimming import SlimModel

#: rounds that speed is of at least, and the seconds that more are made for until the speed-ups are known narrowly
FEWEST_ROUNDS, MOST_SECONDS = 3, 5.0


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

    def set(self, model: SlimModel) -> None:
        model.mode = "none" if self.schedule is None else "hard"
        model.exact_savings = self.exact_savings
        if self.schedule is not None:
            model.schedule = self.schedule


def describe(model: SlimModel, schedule: Schedule | None, exact_savings: bool = False) -> Row:
    """What can be said of a variant without running it: keep rate, schedule, cost, parameters."""
    architecture = model.architecture()
    counts = model.patches_used(schedule) if schedule else None
    dense = sum(p.numel() for p in model.model.parameters())
    head = sum(p.numel() for p in model.selector.parameters()) if schedule else 0
    savings = model.savings(schedule) if exact_savings else 0
    cost = model.cost(schedule) + model.dense_cost(schedule) - savings
    return Row(
        dense=schedule is None,
        method=model.method if schedule else None,
        keep_rate=model.keep_rate_of(schedule, cost) if schedule else None,
        exact_savings=exact_savings,
        schedule=tuple(counts or (architecture.num_patches,) * architecture.depth),
        gmacs=round(cost / 1e9, 4),
        params_millions=round((dense + head) / 1e6, 4),
    )


def schedules(model: SlimModel, keep_rates: Sequence[float] | None) -> list[Schedule | None]:
    """The dense model, then the model's own schedule or, where given, one schedule a keep rate."""
    if keep_rates is None:
        return [None, model.schedule]
    return [None, *(model.at_keep_rate(rate) for rate in keep_rates)]


def variants_of(model: SlimModel, keep_rates: Sequence[float] | None) -> list[Variant]:
    """The dense model and each keep rate, slimmed with the model's own `exact_savings`."""
    # the dense model runs as its library runs it, whatever the slimmed one leaves out
    return [Variant(s, model.saves_exactly and s is not None) for s in schedules(model, keep_rates)]


def check_classifier(model: SlimModel) -> None:
    """`SlimError` if the model has no classifier to train."""
    if not model.architecture().num_outputs and not model.segments:
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
    reference: SlimModel | None = None,
) -> list[Row]:
    """Rows for the dense model and each keep rate: accuracy on all images of `loader`, likeness, cost, and speed.

    Likeness is to the dense model, or where the weights were trained since to `reference` run dense. Without a
    classifier, `similarity` to the dense model's features takes the place of accuracy; a backbone that
    `compares_embeddings` has both. With a segmentation head, `loader` gives label maps, and rows have mIoU, the share
    of right pixels, and the mean cosine of patch features with the dense model's. With a `reference`, rows also have
    `right`, a bit an image.
    Speed is measured afterwards, on one batch, when no process loads images any more: the variants run in turn, three
    rounds at least and for up to five seconds until the ratios are known narrowly. The speed-up is the median of the
    ratios within a round, and `timing_reliable` says whether to believe it.
    """
    model = optimize(model.to(device, dtype).eval())
    variants = variants_of(model, keep_rates)
    steps = Steps(progress, [Step("evaluating", 4.0), Step("timing", 1.0)])
    with model.running():
        with steps.step() as part:
            batch = _score(model, loader, variants, device, dtype, part, reference)
        runs = [partial(_run, model, variant, batch) for variant in variants]
        with steps.step() as part:
            timing = clock.take_turns(runs, device, FEWEST_ROUNDS, 0.0, MOST_SECONDS, progress=part)
    return [
        describe(model, variant.schedule, variant.exact_savings).also(
            images=variant.scores.count,
            images_per_second=round(batch.shape[0] / statistics.median(timing.seconds[index]), 2),
            **variant.scores.row(None if index == 0 else variants[0].scores),
            **({"right": packed(variant.scores.accuracy.right)} if reference is not None else {}),
            **timing.figures(index),
        )
        for index, variant in enumerate(variants)
    ]


def _score(
    model: SlimModel,
    loader: DataLoader[Any],
    variants: Sequence[Variant],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    reference: SlimModel | None = None,
) -> Tensor:
    """Run every variant over all images; return one full batch."""
    has_classes = model.architecture().num_outputs > 0
    full: Tensor | None = None
    total = len(loader)
    for index, (images, targets) in enumerate(loader):
        progress("evaluating", index, total)
        if images.shape[0] == 0:
            continue
        images, targets = images.to(device, dtype), targets.to(device)
        features: Tensor | None = None
        dense: Tensor | None = None
        # of the same weights, the first variant is the reference
        if reference is not None and reference.model is not model.model:
            with reference.running(mode="none"):
                dense = reference.logits(images) if has_classes else None
                features = None if has_classes else pooled(reference.logits(images))
        if model.segments:
            _segmented(model, variants, images, targets, reference)
            full = images if full is None else full
            continue
        for variant in variants:
            variant.set(model)
            output = model.logits(images)
            if has_classes:
                variant.scores.classified(output, targets, dense)
                dense = output if dense is None else dense
            if not has_classes or model.backbone.compares_embeddings:
                found = pooled(model.embedding(images) if has_classes else output)
                features = found if features is None else features
                variant.scores.similarity.add(found, features)
        full = images if full is None else full
    progress("evaluating", 1, 1)
    if full is None:
        raise SlimError("there are no images to evaluate on")
    return full


def _segmented(
    model: SlimModel, variants: Sequence[Variant], images: Tensor, targets: Tensor, reference: SlimModel | None
) -> None:
    """Run every variant over images (B, 3, H, W) with label maps (B, H, W)."""
    dense: Tensor | None = None
    if reference is not None and reference.model is not model.model:
        with reference.running(mode="none"):
            dense = reference.patch_map(images)
    for variant in variants:
        variant.set(model)
        patches = model.patch_map(images)
        dense = patches if dense is None else dense
        variant.scores.segmented(model.class_map(patches, images.shape[-2:]), targets, patches, dense)


def _run(model: SlimModel, variant: Variant, images: Tensor) -> Tensor:
    variant.set(model)
    return model.output(images)


@torch.inference_mode()
def agreement(
    model: SlimModel, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, dtype: torch.dtype
) -> tuple[Scores, Scores]:
    """The scores of the dense and of the slimmed model, those of the slimmed with its likeness to the dense one.

    Without a classifier: the cosine of their features alone.
    """
    has_classes = model.architecture().num_outputs > 0
    dense, slim = Scores(), Scores()
    with model.running():
        for images, targets in batches:
            images, targets = images.to(device, dtype), targets.to(device)
            model.mode = "none"
            reference = model.logits(images)
            model.mode = "hard"
            output = model.logits(images)
            if has_classes:
                dense.classified(reference, targets)
                slim.classified(output, targets, reference)
            else:
                dense.similarity.add(pooled(reference), pooled(reference))
                slim.similarity.add(pooled(output), pooled(reference))
    if not slim.count:
        raise SlimError("there are no images to compare the dense and the slimmed model on")
    return dense, slim


def first_images(loader: DataLoader[Any], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `loader` until `count` images have come."""
    taken = 0
    for images, targets in loader:
        yield images[: count - taken], targets[: count - taken]
        taken += images.shape[0]
        if taken >= count:
            return
