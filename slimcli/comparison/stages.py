"""How each method of a comparison spends the same epochs."""

from __future__ import annotations

from slimcli.errors import SlimError, parameter
from slimcli.methods.base import Method
from slimcli.methods.slim_model import LIFE_SETTINGS
from slimcli.plugins import find_method
from slimcli.recipe import Recipe, SlimmingSection, StageSection
from slimcli.slimming import SlimModel
from slimcli.store.model_folder import slimming_config

#: what of a schedule stands in [slimming]; a cell replaces all of it
SCHEDULE_FIELDS = {"life_layer", "drop_layers", "keep_rate", "drops", "patches_per_layer", "method", "dead"}


def slimming_section(recipe: Recipe, model: SlimModel) -> SlimmingSection:
    """The recipe's [slimming] with the method and the schedule of `model`."""
    given = recipe.slimming.model_dump(exclude_none=True, exclude={*SCHEDULE_FIELDS, *LIFE_SETTINGS})
    return SlimmingSection.model_validate({**given, **slimming_config(model)}, strict=False)


def backbone_stage(recipe: Recipe) -> StageSection:
    """The last stage that teaches the backbone: its learning rate and losses are every method's."""
    stages = [stage for stage in recipe.stages if stage.teaches_backbone]
    if not stages:
        raise SlimError(f"{recipe.name} has no stage that teaches the backbone: there is nothing to compare trained")
    return stages[-1]


def total_epochs(recipe: Recipe, epochs: int | None) -> int:
    """Epochs that every method is trained for."""
    return 0 if epochs is None else epochs or sum(stage.epochs for stage in recipe.stages if stage.mode != "calibrate")


def stages_for(method: str, recipe: Recipe, epochs: int | None) -> list[StageSection]:
    """How a method spends the epochs: life regression by the recipe's stages, every other in its own.

    A method says itself what learns in which mode (`Method.taught_in`); the dense model trains as it is.
    """
    stage, total = backbone_stage(recipe), total_epochs(recipe, epochs)
    lr = stage.backbone_lr or stage.lr
    one = {"name": None, "epochs": total, "lr": lr, "backbone_lr": None}
    if method == "dense":
        return [stage.model_copy(update={**one, "learns": "backbone", "mode": "none", "keep_rates": None})]
    kind = find_method(method)
    if issubclass(kind, Method):
        head_lr = next((s.lr for s in recipe.stages if s.teaches_life and s.lr is not None), lr)
        own = {"backbone": {}, "life": {"lr": head_lr}, "both": {"lr": head_lr, "backbone_lr": lr}}
        shares = shared_out(total, len(kind.taught_in()))
        return [
            stage.model_copy(update={**one, **own[learns], "learns": learns, "mode": mode, "epochs": share})
            for (learns, mode), share in zip(kind.taught_in(), shares, strict=True)
            if share
        ]
    if not epochs:
        return list(recipe.stages)
    learning = [stage for stage in recipe.stages if stage.mode != "calibrate"]
    count = len(learning)
    if epochs < count:
        raise SlimError(
            f"{parameter('epochs', epochs)}: {recipe.name} has {count} stages, and each needs an epoch at least"
        )
    each = iter(shared_out(epochs, count))
    return [s if s.mode == "calibrate" else s.model_copy(update={"epochs": next(each)}) for s in recipe.stages]


def shared_out(epochs: int, count: int) -> list[int]:
    """Epochs of `count` stages; what is over goes to the last, and where there are too few, the first have one each."""
    if epochs < count:
        return [1] * epochs + [0] * (count - epochs)
    return [epochs // count + (index >= count - epochs % count) for index in range(count)]
