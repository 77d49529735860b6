"""How long a calibration teaches its life heads, and the steps of one, with about how long each takes."""

from __future__ import annotations

from collections.abc import Sequence

from slimcli.calibration.fit import BATCH_IMAGES, batch_images
from slimcli.progress import Step
from slimcli.slimming import SlimModel

#: batches that the life head is taught with: as many as there are images, within these bounds
STEPS = (200, 1000)
#: what an image that is observed, and one that a search is made with, takes beside one of these batches
OBSERVING, SEARCHING = 0.2, 0.3
#: the share of the images of that teaching that a head sees where life layers are compared
BRIEF = 0.2


def fit_steps(num_images: int) -> int:
    """Batches that the life head is taught with."""
    return min(max(num_images, STEPS[0]), STEPS[1])


def brief_steps(steps: int, tokens: int, layers: int) -> int:
    """Batches that a head is taught with to compare `layers` life layers, of `steps` for the one that is chosen.

    One alone is not compared: its head is taught in full. More where images have so many `tokens` that a batch holds
    few: a head that has seen too few images says more of them than of its life layer.
    """
    return steps if layers == 1 else min(steps, round(BRIEF * steps * BATCH_IMAGES[0] / batch_images(tokens)))


def tokens_of(model: SlimModel) -> int:
    """Tokens of an image that enter the first block."""
    return model.backbone.num_prefix_tokens + model.num_patches


def plan(
    model: SlimModel,
    layers: Sequence[int],
    keeps_schedule: bool,
    num_images: int,
    purpose: str = "class",
    target: float | None = None,
) -> list[Step]:
    """The steps of a calibration, and about how long each takes beside a batch that the life head is taught with.

    With a `target`, that speed-up is to be reached.
    """
    steps = fit_steps(num_images)
    searched = not keeps_schedule
    brief = brief_steps(steps, tokens_of(model), len(layers))
    return [
        Step("observing the dense model", OBSERVING * num_images),
        *(Step(f"fitting the life head of block {layer}", brief) for layer in layers),
        *([Step("searching how patches should leave", SEARCHING * num_images)] if searched else []),
        *([Step("fitting the life head that was chosen", steps)] if searched else []),
        Step("searching who should leave first", SEARCHING * num_images),
        *([Step("choosing how patches come back", OBSERVING * num_images)] if purpose != "class" else []),
        *([Step("measuring speed", SEARCHING * num_images)] if target is not None else []),
    ]
