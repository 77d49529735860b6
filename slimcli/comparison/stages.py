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
    stages = [stage for stage in recipe.stages if stage.learns != "life"]
    if not stages:
        raise SlimError(f"{recipe.name} has no stage that teaches the backbone: there is nothing to compare trained")
    return stages[-1]


def total_epochs(recipe: Recipe, epochs: int | None) -> int:
    """Epochs that every method is trained for."""
    return 0 if epochs is None else epochs or sum(stage.epochs for stage in recipe.stages if stage.mode != "calibrate")


def stages_for(method: str, recipe: Recipe, epochs: int | None) -> list[StageSection]:
    """How a method spends the epochs: life regression by the recipe's stages, every other in one stage.

    Rules that learn nothing train the backbone with patches gone, as in inference; one with a mode `soft` of its own
    trains that and the backbone together; the dense model trains as it is.
    """
    stage, total = backbone_stage(recipe), total_epochs(recipe, epochs)
    lr = stage.backbone_lr or stage.lr
    one = {"name": None, "epochs": total, "lr": lr, "backbone_lr": None}
    if method == "dense":
        return [stage.model_copy(update={**one, "learns": "backbone", "mode": "none", "keep_rates": None})]
    kind = find_method(method)
    if issubclass(kind, Method):
        if "soft" not in kind.modes:
            return [stage.model_copy(update={**one, "learns": "backbone", "mode": "hard"})]
        head_lr = next((s.lr for s in recipe.stages if s.learns != "backbone" and s.lr is not None), lr)
        return [
            stage.model_copy(update={**one, "lr": head_lr, "backbone_lr": lr, "learns": "both", "mode": "soft"}),
        ]
    if not epochs:
        return list(recipe.stages)
    learning = [stage for stage in recipe.stages if stage.mode != "calibrate"]
    count = len(learning)
    if epochs < count:
        raise SlimError(
            f"{parameter('epochs', epochs)}: {recipe.name} has {count} stages, and each needs an epoch at least"
        )
    # what is over goes to the last stages
    shares = iter([epochs // count + (index >= count - epochs % count) for index in range(count)])
    return [s if s.mode == "calibrate" else s.model_copy(update={"epochs": next(shares)}) for s in recipe.stages]
