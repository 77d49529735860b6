"""What a command works on: a run, a model folder, a recipe or a model's name, turned into a slimmed model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slimcli.backbones.base import Backbone
from slimcli.backbones.timm_vit import DIGITS_VIT
from slimcli.data import has_split, open_dataset
from slimcli.errors import SlimError
from slimcli.plugins import build_model, find_backbone, find_method
from slimcli.recipe import (
    DataSection,
    ModelSection,
    Recipe,
    SlimmingSection,
    StageSection,
    builtin_recipes,
    load_recipe,
)
from slimcli.runs import CONFIG, LATEST, RECIPE, RUNS, find_run, latest_run
from slimcli.schedule import Schedule
from slimcli.slimming import LifeModel, SlimModel
from slimcli.store import load, load_weights, read_config, slimming_config

#: names such as hf-hub:owner/model or hf:folder, which a plugin reads: its word, a colon, anything
NAMED_BY_PLUGIN = re.compile(r"[a-z][a-z0-9_-]+:")


@dataclass
class Target:
    """A slimmed model, how it was built, and the data that belongs to it."""

    label: str
    model: SlimModel
    config: dict[str, Any]
    data: DataSection | None
    recipe: Recipe | None = None
    #: whether the life head has been calibrated or trained
    has_life_head: bool = True
    #: whether the weights that were asked for had a classifier for these classes; if not, it starts untrained
    has_classifier: bool = True
    #: the run's folder, where measurements of it are kept; None for a model folder made to be deployed
    run: Path | None = None

    @property
    def model_name(self) -> str:
        return str(self.config["model"]["name"])

    @property
    def preprocessing(self) -> dict[str, Any]:
        return self.config.get("preprocessing") or self.model.backbone.preprocessing()


def find_target(
    text: str | None,
    overrides: tuple[str, ...] = (),
    pretrained: bool = False,
    img_size: int | None = None,
    dead: str | None = None,
) -> Target:
    """Resolve a TARGET argument. Without one: the latest run, and where there is none the embedded model.

    A model given by its name has random weights unless `pretrained`; a recipe that does not say how many classes its
    model has then has them counted in its data. `img_size` is for a model's name. `dead` overrides what the target
    says of patches whose life is over.
    """
    found = _find(text, overrides, pretrained, img_size)
    if dead is not None:
        found.model.configure({"dead": dead})
    return found


def _find(text: str | None, overrides: tuple[str, ...], pretrained: bool, img_size: int | None) -> Target:
    if img_size is not None and (text is None or Path(text).exists() or text in builtin_recipes()):
        raise SlimError(
            "--img-size is for a model's name: a run or a recipe has its own size (--set model.img_size=...)"
        )
    if text is None:
        latest = latest_run()
        shown = str(RUNS / LATEST)
        return from_folder(latest, shown) if latest and (latest / CONFIG).is_file() else embedded_target()
    path = find_run(Path(text))
    if path.is_dir():
        if not (path / CONFIG).is_file() and (path / RECIPE).is_file():
            raise SlimError(f"{path}: this run has no model yet: finish an epoch with `slim train --resume {path}`")
        return from_folder(path)
    if path.suffix in (".toml", ".yaml", ".yml") or text in builtin_recipes():
        recipe = load_recipe(path, overrides)
        counted = pretrained and recipe.model.num_classes is None
        return from_recipe(recipe, str(path), open_dataset(recipe.data, train=False).class_names if counted else None)
    if (path.suffix or "/" in text) and not NAMED_BY_PLUGIN.match(text):
        raise SlimError(f"{text}: no such file or folder: expected a run, a model folder, a recipe or a model's name")
    args: dict[str, Any] = {"img_size": img_size} if img_size else {}
    dense = build_model(text, pretrained, **args)
    data = DataSection(name="digits") if text == "digits_vit" else None
    return Target(text, slimmed(dense), {"model": {"name": text, "args": args}}, data, has_life_head=False)


def from_folder(folder: Path, label: str | None = None) -> Target:
    """A run's or a baked model's folder."""
    config = read_config(folder)
    data = DataSection.model_validate(config["data"], strict=False) if config.get("data") else None
    name = label or ("the embedded model" if folder == DIGITS_VIT else str(folder))
    run = folder if (folder / RECIPE).is_file() else None
    return Target(name, load(folder), config, data, run=run)


def from_recipe(recipe: Recipe, label: str, class_names: list[str] | None = None) -> Target:
    """A recipe's model with its weights. The classes are counted in the data where the recipe does not say."""
    args = dict(recipe.model.args)
    if recipe.model.img_size is not None:
        args["img_size"] = recipe.model.img_size
    if recipe.model.num_classes is not None:
        args["num_classes"] = recipe.model.num_classes
    elif class_names is not None:
        args["num_classes"] = len(class_names)
    pretrained = recipe.model.pretrained and recipe.model.weights is None
    plugin = recipe.model.backbone
    dense = build_model(recipe.model.name, pretrained, plugin, **args)
    model = slimmed(dense, recipe)
    config: dict[str, Any] = {"model": {"name": recipe.model.name, "args": args}}
    if plugin is not None:
        config["model"]["backbone"] = plugin
    learns = any(True for _ in model.selector.parameters())
    target = Target(label, model, config, recipe.data, recipe, has_life_head=not learns)
    if recipe.model.weights is not None:
        target.has_life_head, target.has_classifier = load_weights(model, recipe.model.weights)
    return target


def embedded_target() -> Target:
    """The model that comes with slim."""
    return from_folder(DIGITS_VIT)


def calibrated_recipe(
    target: Target, data: DataSection, model: SlimModel, precision: str, keep_rates: Sequence[float] = ()
) -> Recipe:
    """The recipe that trains on from a calibrated model: the target's own, or the paper's stages.

    With heirs, a calibrated head knows more than a stage in soft mode can teach it: the epochs of stages that teach the
    head alone then go to the first that teaches the backbone. Calibrated for several `keep_rates`, the backbone is
    trained for all of them.
    """
    if data.root is not None:
        data = data.model_copy(update={"root": data.root.resolve()})
    data = data.model_copy(update={"val_limit": target.data.val_limit if target.data else None})
    slimming = SlimmingSection.model_validate(slimming_config(model), strict=False)
    if target.recipe is not None:
        # what a stage would calibrate is calibrated
        stages = [stage for stage in target.recipe.stages if stage.mode != "calibrate"]
        stages = backbone_stages(stages) if model.has_heirs else stages
        stages = for_keep_rates(stages, keep_rates)
        return target.recipe.model_copy(update={"data": data, "slimming": slimming, "stages": stages})
    args = dict(target.config["model"]["args"])
    size = args.pop("img_size", None)
    loss: Literal["labels", "cosine"] = "labels" if model.architecture().num_outputs else "cosine"
    if model.has_heirs:
        stages = [StageSection(learns="backbone", mode="hard", loss=loss, lr=2e-5, epochs=2, ema=0.995)]
    else:
        stages = [
            StageSection(learns="life", mode="soft", loss=loss, lr=1e-3),
            StageSection(learns="backbone", mode="soft", loss=loss, lr=1e-5),
        ]
    return Recipe(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", target.model_name).strip("-."),
        description="Written by slim calibrate: two stages from the calibrated head.",
        precision=precision,  # type: ignore[arg-type]
        model=ModelSection(
            name=target.model_name,
            img_size=tuple(size) if isinstance(size, list) else size,
            num_classes=args.pop("num_classes", None),
            args=args,
            backbone=target.config["model"].get("backbone"),
        ),
        data=data,
        slimming=slimming,
        stages=for_keep_rates(stages, keep_rates),
    )


def backbone_stages(stages: list[StageSection]) -> list[StageSection]:
    """The stages that follow a calibration with heirs.

    Those that teach the life head alone are left out, and the first of the others gets their epochs; the backbone alone
    is taught in hard mode, as soft weights know nothing of heirs. As they are where none teaches the backbone.
    """
    kept = [stage for stage in stages if stage.learns != "life"]
    if not kept:
        return stages
    saved = sum(stage.epochs for stage in stages if stage.learns == "life" and stage.mode != "calibrate")
    kept[0] = kept[0].model_copy(update={"epochs": kept[0].epochs + saved})
    hard = {"mode": "hard", "end_temperature": None}
    return [s.model_copy(update=hard) if s.learns == "backbone" and s.mode != "none" else s for s in kept]


def for_keep_rates(stages: list[StageSection], keep_rates: Sequence[float]) -> list[StageSection]:
    """The stages, those that teach the backbone to drop patches for all of `keep_rates`, if they are several."""
    if len(keep_rates) < 2:
        return stages
    rates = {"keep_rates": list(keep_rates)}
    return [s if s.learns == "life" or s.mode == "none" else s.model_copy(update=rates) for s in stages]


def slimmed(dense: Any, recipe: Recipe | None = None) -> SlimModel:
    """A dense model with the schedule of a recipe, or with the default one."""
    if recipe is None:
        backbone = find_backbone(dense)
        life_layer = backbone.life_layer
        layers = backbone.drop_layers(life_layer)
        return LifeModel(backbone, Schedule.uniform(backbone.depth, 0.7, life_layer, layers))
    backbone = find_backbone(dense, recipe.model.backbone)
    schedule = recipe_schedule(recipe, backbone)
    kind = find_method(recipe.slimming.method)
    model = kind(backbone, schedule, recipe.slimming.temperature)
    model.attention = recipe.slimming.attention
    model.configure(recipe.slimming.model_dump(include={"exact_savings", *kind.settings}))
    return model


def recipe_schedule(recipe: Recipe, backbone: Backbone) -> Schedule:
    """The schedule of a recipe's [slimming] for a model."""
    section, depth = recipe.slimming, backbone.depth
    life_layer = section.life_layer or backbone.life_layer
    if section.patches_per_layer is not None:
        return Schedule(depth, life_layer, counts=tuple(section.patches_per_layer))
    if section.drops is not None:
        return Schedule(depth, life_layer, drops=tuple(sorted(section.drops)))
    layers = section.drop_layers or backbone.drop_layers(life_layer)
    return Schedule.uniform(depth, section.keep_rate, life_layer, layers)


def choose_data(
    target: Target, path: str | None, split: str | None, limit: int | None, batch_size: int | None
) -> DataSection:
    """The data to evaluate a target on: its own, or what --data names; `SlimError` if there is neither."""
    section = target.data
    if path is not None:
        root = None if path == "digits" else Path(path)
        if root is not None and not root.exists():
            raise SlimError(f"--data {path}: no such folder or .tar of images")
        own_split = section.val_split if section is not None else "validation"
        update: dict[str, Any] = {"name": "digits" if root is None else "", "root": root}
        update |= {"train_limit": None, "val_limit": None}
        if root is not None and not has_split(root, own_split):
            split = split or "."
        if root is not None and not has_split(root, section.train_split if section is not None else "train"):
            update["train_split"] = "."
        section = (section or DataSection()).model_copy(update=update)
    if section is None:
        raise SlimError(f"{target.label}: comes without data: name a folder or .tar of images with --data PATH")
    changes = {"val_split": split, "val_limit": limit, "batch_size": batch_size}
    return section.model_copy(update={key: value for key, value in changes.items() if value is not None})
