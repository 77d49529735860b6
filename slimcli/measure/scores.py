"""Accuracy and similarity over batches, with their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Accuracy:
    """Running sums of top-1, top-5 and cross-entropy over batches."""

    count: int = 0
    top1: int = 0
    top5: int = 0
    loss: float = 0.0
    squares: float = 0.0
    agree: int = 0
    #: images that were compared with other predictions: right where those are wrong, and the other way round
    paired: int = 0
    gained: int = 0
    lost: int = 0

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Add a batch: logits (B, C), classes (B,), and the predictions (B,) to compare with, if any."""
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == targets[:, None]
        losses = F.cross_entropy(logits, targets, reduction="none").double()
        self.count += targets.shape[0]
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.sum())
        self.loss += float(losses.sum())
        self.squares += float(losses.square().sum())
        if reference is not None:
            right = reference == targets
            self.agree += int((best[:, 0] == reference).sum())
            self.paired += targets.shape[0]
            self.gained += int((hits[:, 0] & ~right).sum())
            self.lost += int((~hits[:, 0] & right).sum())

    def row(self) -> dict[str, float]:
        """Percentages of `count` images and the mean loss, with standard errors; nothing where there are no images."""
        if not self.count:
            return {}
        found = {
            "top1": round(100 * self.top1 / self.count, 3),
            "top1_se": round(100 * binomial_error(self.top1, self.count), 3),
            "top5": round(100 * self.top5 / self.count, 3),
            "top5_se": round(100 * binomial_error(self.top5, self.count), 3),
            "loss": round(self.loss / self.count, 5),
        }
        if self.count > 1:
            found["loss_se"] = round(mean_error(self.loss, self.squares, self.count), 5)
        if self.paired:
            difference, deviation = paired_difference(self.gained, self.lost, self.paired)
            found |= {"top1_difference": round(100 * difference, 3), "top1_difference_se": round(100 * deviation, 3)}
        return found


@dataclass
class Similarity:
    """Running sum of the cosine between a model's features and the dense model's: what stands for accuracy where
    there is no classifier.
    """

    count: int = 0
    cosine: float = 0.0
    squares: float = 0.0

    def add(self, features: Tensor, reference: Tensor) -> None:
        """Add a batch: features (B, D) and those of the dense model."""
        cosines = F.cosine_similarity(features, reference).double()
        self.count += features.shape[0]
        self.cosine += float(cosines.sum())
        self.squares += float(cosines.square().sum())

    def row(self) -> dict[str, float]:
        """The mean over `count` images with its standard error; nothing where there are no images."""
        if not self.count:
            return {}
        found = {"similarity": round(self.cosine / self.count, 5)}
        if self.count > 1:
            found["similarity_se"] = round(mean_error(self.cosine, self.squares, self.count), 5)
        return found


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
        return {**self.accuracy.row(), **self.similarity.row()}


def binomial_error(hits: int, count: int) -> float:
    """Standard error of the share `hits / count`.

    The formula gives 0 where none or all of the images are hits: one more image of each kind then keeps it above.
    """
    if hits in (0, count):
        hits, count = hits + 1, count + 2
    share = hits / count
    return math.sqrt(share * (1 - share) / count)


def mean_error(total: float, squares: float, count: int) -> float:
    """Standard error of a mean of `count` values, from their sum and the sum of their squares; NaN stays NaN."""
    variance = (squares - total * total / count) / (count - 1)
    return math.sqrt(variance / count) if variance > 0 else variance * 0.0


def paired_difference(gained: int, lost: int, count: int) -> tuple[float, float]:
    """Difference of two shares of the same images, and its standard error (McNemar's).

    `gained` are images that only the first has right, `lost` those that only the second has.
    """
    difference = (gained - lost) / count
    return difference, math.sqrt(max(gained + lost - (gained - lost) ** 2 / count, 0.0)) / count


def pooled(output: Tensor) -> Tensor:
    """A model's outputs (B, C) in float32; the tokens (B, n, D) of one that does not pool are averaged."""
    return output.float().mean(dim=1) if output.dim() == 3 else output.float()


def predictions(logits: Tensor) -> Tensor:
    """The most likely class (B,) of logits (B, C)."""
    return torch.argmax(logits, dim=1)
