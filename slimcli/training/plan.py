"""The stages of a recipe, and what training them would do."""

from __future__ import annotations

import time
from typing import Any

import torch

from slimcli.measure.evaluation import describe
from slimcli.progress import Progress
from slimcli.recipe import Recipe
from slimcli.training.calibration import CalibrationStage
from slimcli.training.head import HeadStage
from slimcli.training.optimizer import choose_parameters
from slimcli.training.session import Session, life_head_taught, set_up
from slimcli.training.stages import LearningStage, Stage

#: kinds of stages by their `mode` or what learns; every other mode learns by gradients
KINDS: dict[str, type[Stage]] = {"calibrate": CalibrationStage, "head": HeadStage}


def stages_of(session: Session) -> list[Stage]:
    """The stages of the session's recipe, in order."""
    kinds = ["head" if stage.learns == "head" else stage.mode for stage in session.recipe.stages]
    return [KINDS.get(kind, LearningStage)(session, number) for number, kind in enumerate(kinds)]


def plan(recipe: Recipe, device_name: str, progress: Progress) -> dict[str, Any]:
    """What training would do: the model, what learns in each stage, schedule, cost, updates and seconds.

    Builds and checks all that training does, times a few steps of each stage, and leaves nothing behind.
    """
    session = set_up(recipe, device_name, progress)
    model = session.model
    rows = [describe(model, None), describe(model, model.schedule, model.exact_savings)]
    stages, done = stages_of(session), []
    for number, stage in enumerate(stages):
        progress("timing a few steps", number, len(stages) + 1)
        choose_parameters(model, stage.section)
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        done.append(
            {
                **stage.section.model_dump(exclude_none=True),
                "learning_parameters": learning,
                "updates": stage.updates,
                "seconds": round(stage.seconds(), 1),
            }
        )
    progress("timing a few steps", len(stages), len(stages) + 1)
    validation = validation_seconds(session)
    # before the stages, after each epoch, and dense beside slim at the end
    validations = 3 + sum(stage.epochs for stage in recipe.stages)
    return {
        "model": recipe.model.name,
        "device": session.device.type,
        "train_images": len(session.train_set),
        "val_images": len(session.val_set),
        "life_head_taught": life_head_taught(session),
        "rows": rows,
        "stages": done,
        "validation_seconds": round(validation, 1),
        "seconds": round(sum(stage["seconds"] for stage in done) + validations * validation, 1),
    }


@torch.no_grad()
def validation_seconds(session: Session) -> float:
    """How long a validation takes, from a few batches of the dense model."""
    model = session.model.eval()
    times: list[float] = []
    clock = time.perf_counter()
    for images, _targets in session.check_on:
        with session.accelerator.autocast(), model.running(mode="none"):
            model.output(images.to(session.device))
        times.append(time.perf_counter() - clock)
        clock = time.perf_counter()
        if len(times) > 3:
            break
    return sum(times[1:] or times) / len(times[1:] or times) * len(session.check_on)
