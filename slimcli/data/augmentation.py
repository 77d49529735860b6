"""What timm's automatic augmentation needs mended."""

from __future__ import annotations

from typing import Any

from timm.data.auto_augment import AugmentOp


def keep_one_bit(transform: Any) -> None:
    """Make the operations in a timm transform that reduce colours leave at least one bit a channel.

    The strongest leave none, which newer Pillows refuse: an augmentation as common as rand-m9-mstd0.5-inc1 would end a
    training at some random image.
    """
    for part in getattr(transform, "transforms", ()):
        keep_one_bit(part)
    nested = getattr(transform, "policy", None) or [getattr(transform, "ops", ())]
    for operation in (operation for group in nested for operation in group):
        if isinstance(operation, AugmentOp) and operation.name.startswith("Posterize"):
            operation.level_fn = _OneBit(operation.level_fn)


class _OneBit:
    """A level function of timm's with a least result; a class, as loader processes may have to be sent it."""

    def __init__(self, level: Any) -> None:
        self.level = level

    def __call__(self, magnitude: float, settings: Any) -> tuple[int]:
        return (max(1, *self.level(magnitude, settings)),)
