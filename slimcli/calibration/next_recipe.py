"""The recipe that trains on from a calibrated model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from slimcli.recipe import Recipe, SlimmingSection, StageSection
from slimcli.session.session import Session
from slimcli.slimming import SlimModel
from slimcli.store.model_folder import slimming_config


def next_recipe(session: Session, keep_rates: Sequence[float] = ()) -> Recipe:
    """The recipe that trains on from a calibrated model: the target's own, with the paper's stages where it has none.

    With heirs, a calibrated head knows more than a stage in soft mode can teach it: the epochs of stages that teach the
    head alone then go to the first that teaches the backbone. Calibrated for several `keep_rates`, the backbone is
    trained for all of them.
    """
    target, model = session.target, session.model
    data, own = session.data, target.recipe.data
    if session.request.limit is not None:
        # how many images to report on is not for training
        data = data.model_copy(update={"val_limit": own.val_limit if session.request.data is None else None})
    if data.root is not None:
        data = data.model_copy(update={"root": data.root.resolve()})
    slimming = SlimmingSection.model_validate(
        {**slimming_config(model), "attention": target.recipe.slimming.attention}, strict=False
    )
    # what a stage would calibrate is calibrated
    stages = [stage for stage in target.recipe.stages if stage.mode != "calibrate"]
    if all(stage.mode == "none" for stage in stages):
        stages = default_stages(model)
    elif model.has_heirs:
        stages = backbone_stages(stages)
    return target.recipe.model_copy(
        update={
            "description": target.recipe.description or "Written by slim calibrate, to train on.",
            "model": target.recipe.model.model_copy(update={"pretrained": False}),
            "data": data,
            "slimming": slimming,
            "stages": for_keep_rates(stages, keep_rates),
        }
    )


def default_stages(model: SlimModel) -> list[StageSection]:
    """Stages for a target that comes without any."""
    loss: Literal["labels", "cosine"] = "labels" if model.architecture().num_outputs or model.segments else "cosine"
    if model.has_heirs:
        return [StageSection(learns="backbone", mode="hard", loss=loss, lr=2e-5, epochs=2, ema=0.995)]
    return [
        StageSection(learns="life", mode="soft", loss=loss, lr=1e-3),
        StageSection(learns="backbone", mode="soft", loss=loss, lr=1e-5),
    ]


def backbone_stages(stages: list[StageSection]) -> list[StageSection]:
    """The stages that follow a calibration with heirs.

    Those that teach the life head alone are left out, and the first of the others gets their epochs; the backbone alone
    is taught in hard mode, as soft weights know nothing of heirs. As they are where none teaches the backbone.
    """
    kept = [stage for stage in stages if stage.learns != "life"]
    if not kept:
        return stages
    saved = sum(stage.epochs for stage in stages if stage.learns == "life")
    kept[0] = kept[0].model_copy(update={"epochs": kept[0].epochs + saved})
    hard = {"mode": "hard", "end_temperature": None}
    return [s.model_copy(update=hard) if s.learns == "backbone" and s.mode != "none" else s for s in kept]


def for_keep_rates(stages: list[StageSection], keep_rates: Sequence[float]) -> list[StageSection]:
    """The stages, those that teach the backbone to drop patches for all of `keep_rates`, if they are several."""
    if len(keep_rates) < 2:
        return stages
    rates = {"keep_rates": list(keep_rates)}
    return [s if s.learns == "life" or s.mode == "none" else s.model_copy(update=rates) for s in stages]
