"""The layer that gives every patch a class: a model for semantic segmentation beside its backbone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slimcli.backbones.base import Backbone
from slimcli.errors import SlimError

#: the attribute of a dense model that holds its segmentation head, and the first part of its weights' names
SEGMENTER = "segmenter"
MOST_CLASSES = 65535


class SegmentationHead(nn.Module):
    """A linear classifier of patches after batch normalisation, as DINOv2 is measured by."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, patches: Tensor) -> Tensor:
        """Patch features (B, D, rows, columns) to logits (B, C, rows, columns)."""
        found: Tensor = self.classifier(self.norm(patches))
        return found


def add_segmenter(backbone: Backbone, num_classes: Any) -> None:
    """Give the backbone's model an untrained head for `num_classes`; `SlimError` for a number that is none."""
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or not 2 <= num_classes <= MOST_CLASSES:
        raise SlimError(f"segments = {num_classes!r}: expected a number of classes, 2 to {MOST_CLASSES}")
    setattr(backbone.model, SEGMENTER, SegmentationHead(backbone.embed_dim, num_classes))


def segmenter_of(model: nn.Module) -> SegmentationHead | None:
    """The segmentation head of a dense model, if it has one."""
    found = getattr(model, SEGMENTER, None)
    return found if isinstance(found, SegmentationHead) else None
