"""Whether a smaller image would do as well as dropping patches, at the same cost: the user should hear it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimcli.calibration.judge import apart
from slimcli.errors import SlimError
from slimcli.measure.evaluation import Scores, pooled
from slimcli.methods.resize import Resize
from slimcli.slimming import SlimModel


@dataclass(frozen=True)
class SmallerImage:
    """The dense model on the largest image that costs no more than the slimmed one does.

    `apart` and `slim_apart` are how far both are from the dense model on the full image, as `Candidate` has it; costs
    are in G multiply-adds.
    """

    keep_rate: float | None
    size: tuple[int, int]
    gmacs: float
    slim_gmacs: float
    apart: float
    slim_apart: float

    @property
    def note(self) -> str | None:
        """What a user should know; None where slim is nearer to the dense model."""
        if self.apart > self.slim_apart:
            return None
        rate = "this schedule" if self.keep_rate is None else f"keep rate {self.keep_rate:g}"
        height, width = self.size
        return (
            f"{rate}: a smaller image does as well: at {height} x {width} px ({self.gmacs:.3g} G) the dense model is "
            f"{self.apart:.3g} apart from itself, slim {self.slim_apart:.3g} ({self.slim_gmacs:.3g} G)"
        )

    def to_json(self) -> dict[str, Any]:
        """The figures as they stand in JSON."""
        return dict(vars(self))


@torch.inference_mode()
def smaller_images(
    model: SlimModel,
    batches: Sequence[tuple[Tensor, Tensor]],
    keep_rates: Sequence[float] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> list[SmallerImage]:
    """A smaller image beside the model at each keep rate (None: its own schedule), on batches (images, classes).

    Nothing for a model that takes images of one size alone, nor where no smaller image costs so little.
    """
    classifies = model.architecture().num_outputs > 0
    rates: Sequence[float | None] = [None] if keep_rates is None else keep_rates
    contests = []
    for rate in rates:
        schedule = model.schedule if rate is None else model.at_keep_rate(rate)
        try:
            other = Resize(model.backbone, model.schedule)
            other.schedule = other.schedule_for_cost(model.multiply_adds(schedule))
        except SlimError:
            continue
        if schedule.drops_patches():
            contests.append((rate, schedule, other.eval(), Scores(), Scores()))
    for images, _classes in batches if contests else ():
        images = images.to(device, dtype)
        with model.running(mode="none"):
            dense = pooled(model.logits(images))
        for _, schedule, other, small, slim in contests:
            small.compare(pooled(other.logits(images)), dense, classifies)
            with model.running(mode="hard", schedule=schedule):
                slim.compare(pooled(model.logits(images)), dense, classifies)
    return [
        SmallerImage(
            rate,
            other.image_size_of(other.schedule),
            round(other.multiply_adds() / 1e9, 4),
            round(model.multiply_adds(schedule) / 1e9, 4),
            round(apart(small)[0], 5),
            round(apart(slim)[0], 5),
        )
        for rate, schedule, other, small, slim in contests
    ]
