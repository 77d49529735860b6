"""How far a slimmed model is from the dense one, on images that it was not fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.backbones.segmenter import SegmentationHead
from slimcli.measure.evaluation import Scores, pooled
from slimcli.memory import freed_memory_kept
from slimcli.schedule import Schedule
from slimcli.slimming import LifeModel, SlimModel

#: what is to stay as the dense model has it: its output, the features of all patches, or both
PURPOSES = ("class", "patches", "both")


@dataclass
class CheckSet:
    """The images that candidates are compared on, in batches: what enters the block after each life layer, and what
    the dense model made of it: logits (B, C), or features.
    """

    tokens: dict[int, list[Tensor]]
    positions: list[Tensor | None]
    outputs: list[Tensor]
    #: the features of all patches (B, N, D), where they are to stay as they are
    features: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Ranking:
    """Who leaves first, and how patches are added to their heirs, as the life head and the slimmed model have it."""

    # where the search starts: the class's `slimcli.calibration.search.Space`
    redundancy: float = 3.5
    merge_importance: float = 0.7
    size_bias: float = 0.7
    grouping: str = "ranked"

    def set(self, model: LifeModel) -> None:
        """Have `model` follow it."""
        model.redundancy, model.grouping = self.redundancy, self.grouping
        model.merge_importance, model.size_bias = self.merge_importance, self.size_bias


#: lives by importance alone, as the paper has it
PLAIN = Ranking(0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Candidate:
    """A candidate: how patches leave, and how far the slimmed model is from the dense one on the check images.

    `apart` is `Likeness.error` of its logits, or without a classifier 1 - cosine of the features: on images that the
    model was trained with, predictions are too sure to tell candidates apart, and rank them worse for other images
    than logits do. `agreement` is how often it predicts the same class, in percent, or 100 cosine.
    For patches they are `PatchError.error` and 100 times its cosine; for both purposes, means of the two.
    """

    schedule: Schedule
    ranking: Ranking
    gmacs: float
    apart: float
    agreement: float
    #: how far the features of all patches are from the dense model's, where they were looked at
    patches: PatchError | None = None


@torch.no_grad()
@freed_memory_kept()
def observe_checks(
    model: SlimModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    layers: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    purpose: str = "class",
) -> CheckSet:
    """Run the dense model over the check images and remember where candidates go on from."""
    backbone = model.backbone
    found = CheckSet({layer: [] for layer in layers}, [], [])
    for images, _targets in batches:
        x, positions = backbone.embed(images.to(device, dtype))
        for layer in range(1, backbone.depth + 1):
            x = backbone.block(layer, x, positions)
            if layer in found.tokens:
                found.tokens[layer].append(x)
        found.positions.append(positions)
        found.outputs.append(pooled(backbone.head(x)))
        if purpose != "class":
            found.features.append(backbone.features(x)[:, backbone.num_prefix_tokens :])
    return found


@dataclass(frozen=True)
class PatchError:
    """The features of all patches beside the dense model's, patches that left put back `way`.

    `error` is the squared error over the squared dense features, in the mean of the images; of a model that segments,
    the divergence of its class maps (`MapErrors`). `cosine` is the mean cosine of the features.
    """

    way: str
    error: float
    cosine: float


class FeatureErrors:
    """The squared error of features (B, N, D) over the squared dense ones, in the mean of the images."""

    def __init__(self) -> None:
        self.errors: list[Tensor] = []

    def add(self, found: Tensor, dense: Tensor) -> None:
        """More images."""
        squares = dense.square().sum(dim=(1, 2)).clamp(min=1e-12)
        self.errors.append((found - dense).square().sum(dim=(1, 2)) / squares)

    def mean(self) -> float:
        """Of all images so far."""
        return torch.cat(self.errors).mean().item()


class MapErrors:
    """The Kullback-Leibler divergence of class maps from the dense model's, in nats a patch.

    Every class that the dense model sees counts as much as any other, as it does in mIoU, however few its patches are.
    """

    def __init__(self, head: SegmentationHead, grid: tuple[int, int]) -> None:
        self.head, self.grid = head, grid
        self.errors = self.counts = torch.zeros(head.num_classes)

    def _logs(self, features: Tensor) -> Tensor:
        """Features (B, N, D) to the logarithms (B N, C) of what the head gives each class."""
        patches = features.mT.reshape(-1, features.shape[2], *self.grid).to(self.head.classifier.weight.dtype)
        return self.head(patches).float().flatten(2).mT.flatten(0, 1).log_softmax(dim=1)

    def add(self, found: Tensor, dense: Tensor) -> None:
        """More images, of features (B, N, D)."""
        logs = self._logs(dense)
        errors = F.kl_div(self._logs(found), logs, reduction="none", log_target=True).sum(dim=1).cpu()
        classes = logs.argmax(dim=1).cpu()
        self.errors = self.errors.index_add(0, classes, errors)
        self.counts = self.counts.index_add(0, classes, torch.ones_like(errors))

    def mean(self) -> float:
        """Of all classes that were seen."""
        seen = self.counts > 0
        return (self.errors[seen] / self.counts[seen]).mean().item()


@torch.no_grad()
def patch_error(model: SlimModel, check_set: CheckSet, way: str) -> PatchError:
    """How far the features of all patches, or the class maps, are from dense, under the model's schedule."""
    backbone, head = model.backbone, model.segmenter
    errors = FeatureErrors() if head is None else MapErrors(head, backbone.grid_size)
    cosines: list[Tensor] = []
    starts = check_set.tokens[model.schedule.life_layer]
    for tokens, positions, dense in zip(starts, check_set.positions, check_set.features, strict=True):
        counts = model.schedule.resolve(dense.shape[1])
        with model.following([backbone.depth], way=way) as trail:
            trail.begin(tokens, positions)
            model.slimmed(tokens, positions, counts)
            found = backbone.features(trail.restored(backbone.depth))[:, backbone.num_prefix_tokens :]
        found, dense = found.float(), dense.float()
        errors.add(found, dense)
        cosines.append(F.cosine_similarity(found, dense, dim=-1).mean(dim=1))
    return PatchError(way, errors.mean(), torch.cat(cosines).mean().item())


@torch.no_grad()
def distance(model: SlimModel, check_set: CheckSet) -> tuple[float, float]:
    """How far apart the model under its schedule and the dense one are, and their agreement: see `Candidate`."""
    found = Scores()
    classifies = model.architecture().num_outputs > 0
    starts = check_set.tokens[model.schedule.life_layer]
    for tokens, positions, dense in zip(starts, check_set.positions, check_set.outputs, strict=True):
        counts = model.schedule.resolve(tokens.shape[1] - model.backbone.num_prefix_tokens)
        found.compare(pooled(model.backbone.head(*model.slimmed(tokens, positions, counts))), dense, classifies)
    return apart(found)


def apart(found: Scores) -> tuple[float, float]:
    """`apart` and `agreement` as `Candidate` has them."""
    if found.likeness.count:
        return found.likeness.error, found.likeness.agreement
    cosine = found.similarity.cosine / found.similarity.count
    return 1 - cosine, 100 * cosine


#: scores of the dense and of the slimmed model on the same images
Agreement = tuple[Scores, Scores]


def comparison(before: Agreement, after: Agreement) -> dict[str, Any]:
    """Likeness and top-1, in percent, of the slimmed model with an untaught head (before) and the fitted (after).

    Without a classifier, agreement is 100 times the cosine of the features, and there is no top-1.
    """

    def half(found: Agreement) -> dict[str, float]:
        row = found[1].row()
        agreed = row["agreement"] if "agreement" in row else 100 * row["similarity"]
        kept: dict[str, float] = {key: row[key] for key in ("top1", "loss", "kl", "logit_error") if key in row}
        return {"agreement": round(agreed, 2), **kept}

    return {
        "before": half(before),
        "after": half(after),
        "images": after[1].count,
        "dense_top1": after[0].row().get("top1"),
    }
