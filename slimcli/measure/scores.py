"""Accuracy, and likeness to the dense model, over batches, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.measure.segments import Segments


@dataclass
class Accuracy:
    """Running sums of top-1, top-5 and cross-entropy over batches."""

    count: int = 0
    top1: int = 0
    top5: int = 0
    loss: float = 0.0
    squares: float = 0.0
    #: for each image, whether it was right
    right: list[bool] = field(default_factory=list)
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
        self.right += hits[:, 0].tolist()
        if reference is not None:
            right = reference == targets
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
class Likeness:
    """Running sums of how near a model's logits are to the dense model's: it needs no labels, and tells models apart
    on far fewer images than accuracy does.

    `agreement` is the share of images with the same first class, `kl` the mean over the images of the divergence of
    the model's classes from the dense model's, in nats. `error` is the squared error of the logits over the squares
    of the dense model's, summed over the images, each image's mean taken out of both: classes do not see it.
    """

    count: int = 0
    agree: int = 0
    divergence: float = 0.0
    divergence_squares: float = 0.0
    #: sums over the images of e and d, the squared error and the squares of the dense logits, and of their products
    wrong: float = 0.0
    whole: float = 0.0
    products: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def add(self, logits: Tensor, dense: Tensor) -> None:
        """Add a batch: logits (B, C) of both."""
        # not every device has numbers of 64 bits
        logits, dense = logits.cpu().double(), dense.cpu().double()
        apart = F.kl_div(logits.log_softmax(dim=1), dense.log_softmax(dim=1), reduction="none", log_target=True)
        divergence = apart.sum(dim=1)
        wrong, whole = squared_error(logits, dense)
        self.count += logits.shape[0]
        self.agree += int((logits.argmax(dim=1) == dense.argmax(dim=1)).sum())
        self.divergence += float(divergence.sum())
        self.divergence_squares += float(divergence.square().sum())
        self.wrong, self.whole = self.wrong + float(wrong.sum()), self.whole + float(whole.sum())
        ee, ed, dd = self.products
        self.products = (
            ee + float(wrong.square().sum()),
            ed + float((wrong * whole).sum()),
            dd + float(whole.square().sum()),
        )

    @property
    def agreement(self) -> float:
        """In percent."""
        return 100 * self.agree / self.count

    @property
    def kl(self) -> float:
        """In nats an image."""
        return self.divergence / self.count

    @property
    def error(self) -> float:
        """Squared error over squares; NaN where the dense model's logits are all alike."""
        return self.wrong / self.whole if self.whole else math.nan

    def row(self) -> dict[str, float]:
        """All three with their standard errors; nothing where there are no images."""
        if not self.count:
            return {}
        found = {
            "agreement": round(self.agreement, 3),
            "agreement_se": round(100 * binomial_error(self.agree, self.count), 3),
            "kl": round(self.kl, 6),
            "logit_error": round(self.error, 6),
        }
        if self.count > 1:
            found["kl_se"] = round(mean_error(self.divergence, self.divergence_squares, self.count), 6)
            found["logit_error_se"] = round(ratio_error(self.wrong, self.whole, self.products, self.count), 6)
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
        self._add(F.cosine_similarity(features, reference).double())

    def add_patches(self, patches: Tensor, reference: Tensor) -> None:
        """Add the mean over the patches of each image: patches (B, D, rows, columns) and those of the dense model."""
        self._add(F.cosine_similarity(patches, reference).mean(dim=(1, 2)).double())

    def _add(self, cosines: Tensor) -> None:
        self.count += len(cosines)
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
    """What a validation measured: accuracy of a model with a classifier, and how near it is to the dense model where
    there is one to compare with: `likeness` of the logits, `similarity` of the features.
    """

    accuracy: Accuracy = field(default_factory=Accuracy)
    likeness: Likeness = field(default_factory=Likeness)
    similarity: Similarity = field(default_factory=Similarity)
    #: of a model with a segmentation head: its class maps, and its patches beside the dense model's
    segments: Segments = field(default_factory=Segments)
    patches: Similarity = field(default_factory=Similarity)

    def classified(self, logits: Tensor, targets: Tensor, dense: Tensor | None = None) -> None:
        """Add a batch: logits (B, C), classes (B,), and the dense model's logits, if there are any."""
        self.accuracy.add(logits, targets, None if dense is None else predictions(dense))
        if dense is not None:
            self.likeness.add(logits, dense)

    def segmented(self, logits: Tensor, targets: Tensor, patches: Tensor, dense: Tensor) -> None:
        """Add a batch: logits (B, C, H, W), targets (B, H, W), and patches (B, D, rows, columns) of both models.

        Images without label maps have targets (B,), which tell nothing.
        """
        if targets.dim() == 3:
            self.segments.add(logits, targets)
        self.patches.add_patches(patches.float(), dense.float())

    def compare(self, output: Tensor, dense: Tensor, classifies: bool) -> None:
        """Add a batch of outputs (B, C), logits or features, and the dense model's; no classes are needed."""
        if classifies:
            self.likeness.add(output, dense)
        else:
            self.similarity.add(output, dense)

    @property
    def count(self) -> int:
        return max(self.accuracy.count, self.similarity.count, self.patches.count, self.segments.count)

    @property
    def score(self) -> float:
        """What is to be high: top-1 or mIoU in percent, or without a classifier the similarity."""
        row = self.row()
        return next((row[key] for key in ("top1", "miou", "similarity", "patch_similarity") if key in row), 0.0)

    def row(self, dense: Scores | None = None) -> dict[str, float]:
        """The rows of all, as far as they were measured; `dense` is what a difference in mIoU is from."""
        patches = {f"patch_{key}": value for key, value in self.patches.row().items()}
        segments = self.segments.row(None if dense is None else dense.segments)
        return {**self.accuracy.row(), **self.likeness.row(), **self.similarity.row(), **segments, **patches}


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


def ratio_error(above: float, below: float, products: tuple[float, float, float], count: int) -> float:
    """Standard error of the ratio of two sums over the same images, from the sums of their products (aa, ab, bb)."""
    if count < 2 or not below:
        return math.nan
    ratio, (aa, ab, bb) = above / below, products
    residual = max(aa - 2 * ratio * ab + ratio * ratio * bb, 0.0)
    return math.sqrt(residual / (count - 1) * count) / below


def squared_error(logits: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """For each image, the squared error (B,) of logits (B, C), and the squares (B,) of the dense model's.

    Each image's mean is taken out of both, unless there is one logit alone.
    """
    if dense.shape[-1] > 1:
        logits, dense = (x - x.mean(dim=-1, keepdim=True) for x in (logits, dense))
    return (logits - dense).square().sum(dim=-1), dense.square().sum(dim=-1)


def paired_difference(gained: int, lost: int, count: int) -> tuple[float, float]:
    """Difference of two shares of the same images, and its standard error (McNemar's).

    `gained` are images that only the first has right, `lost` those that only the second has.
    """
    difference = (gained - lost) / count
    return difference, math.sqrt(max(gained + lost - (gained - lost) ** 2 / count, 0.0)) / count


def packed(right: Sequence[bool]) -> str:
    """A bit an image, the first in front, in hexadecimal digits of four each."""
    bits = "".join("1" if hit else "0" for hit in right)
    return "".join(f"{int(bits[i : i + 4].ljust(4, '0'), 2):x}" for i in range(0, len(bits), 4))


def unpacked(text: str, count: int) -> list[bool]:
    """The inverse of `packed` for `count` images."""
    return [bit == "1" for digit in text for bit in f"{int(digit, 16):04b}"][:count]


def pooled(output: Tensor) -> Tensor:
    """A model's outputs (B, C) in float32; the tokens (B, n, D) of one that does not pool are averaged."""
    return output.float().mean(dim=1) if output.dim() == 3 else output.float()


def predictions(logits: Tensor) -> Tensor:
    """The most likely class (B,) of logits (B, C)."""
    return torch.argmax(logits, dim=1)
