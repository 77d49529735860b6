"""How well class maps fit their labels: mIoU and the share of right pixels, with their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimcli.data.segmentation import IGNORED


@dataclass
class Segments:
    """What class maps got right, image by image.

    `pixels` has (3, C) for each: how many of a class were given it, how many are of it, and how many were given it.
    """

    pixels: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits (B, C, H, W) and targets (B, H, W), where `IGNORED` pixels do not count."""
        count = logits.shape[1]
        for found, labels in zip(logits.argmax(dim=1), targets, strict=True):
            known = labels != IGNORED
            given, true = found[known], labels[known]
            counted = [torch.bincount(some, minlength=count) for some in (true[given == true], true, given)]
            self.pixels.append(torch.stack(counted).cpu())

    @property
    def count(self) -> int:
        return len(self.pixels)

    def row(self, dense: Segments | None = None) -> dict[str, float]:
        """Percentages with their standard errors, by the jackknife over images; nothing where there are no images.

        `dense`, of the same images, is what the difference in mIoU is from.
        """
        if not self.pixels:
            return {}
        every = torch.stack(self.pixels).double()
        total = every.sum(dim=0)
        found = {"miou": 100 * float(miou(total)), "pixel_accuracy": 100 * float(accuracy(total))}
        if len(every) > 1:
            found["miou_se"] = 100 * jackknife(miou(total - every))
            found["pixel_accuracy_se"] = 100 * jackknife(accuracy(total - every))
        if dense is not None and dense.count == self.count:
            other = torch.stack(dense.pixels).double()
            whole = other.sum(dim=0)
            found["miou_difference"] = 100 * float(miou(total) - miou(whole))
            if len(every) > 1:
                found["miou_difference_se"] = 100 * jackknife(miou(total - every) - miou(whole - other))
        return {key: round(value, 3) for key, value in found.items()}


def miou(pixels: Tensor) -> Tensor:
    """Mean over the classes of intersection over union, of pixels (..., 3, C) as `Segments` counts them.

    Classes that no pixel is of or was given are left out.
    """
    right, true, given = pixels.unbind(dim=-2)
    union = true + given - right
    return torch.where(union > 0, right / union.clamp(min=1), torch.nan).nanmean(dim=-1)


def accuracy(pixels: Tensor) -> Tensor:
    """The share of pixels that have the right class, of pixels (..., 3, C) as `Segments` counts them."""
    right, true, _ = pixels.unbind(dim=-2)
    return right.sum(dim=-1) / true.sum(dim=-1).clamp(min=1)


def jackknife(without: Tensor) -> float:
    """The standard error of a figure of n images, from its values (n,) without each of them."""
    count = len(without)
    return math.sqrt((count - 1) / count * float((without - without.mean()).square().sum()))
