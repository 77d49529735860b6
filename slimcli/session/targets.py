"""A slimmed model from what a command works on: a recipe, a run, a model folder or a model's name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from slimcli.backbones.base import Backbone
from slimcli.backbones.timm_folder import base_model
from slimcli.backbones.timm_vit import DIGITS_VIT
from slimcli.data import open_dataset
from slimcli.errors import SlimError
from slimcli.plugins import build_model, find_backbone, find_method
from slimcli.recipe import DataSection, Recipe
from slimcli.schedule import Schedule
from slimcli.session.resolve import Resolved, resolve
from slimcli.slimming import SlimModel
from slimcli.store.model_folder import load_weights
from slimcli.store.weights import WeightsFile, read_weights, without_prefix


@dataclass
class Target:
    """A slimmed model, how it was built, and the data that belongs to it."""

    label: str
    model: SlimModel
    config: dict[str, Any]
    data: DataSection | None
    recipe: Recipe
    #: whether the life head has been calibrated or trained
    has_life_head: bool = True
    #: whether the weights that were asked for had a classifier for these classes; if not, it starts untrained
    has_classifier: bool = True
    #: the run's folder, where measurements of it are kept; None for a model folder made to be deployed
    run: Path | None = None
    #: what a user should know of how it was loaded
    notes: list[str] = field(default_factory=list)

    @property
    def model_name(self) -> str:
        return str(self.config["model"]["name"])

    @property
    def class_names(self) -> list[str] | None:
        """The classes that the model was trained on, where that is known."""
        return self.config.get("class_names")

    @property
    def preprocessing(self) -> dict[str, Any]:
        own = self.model.backbone.preprocessing()
        kept = self.config.get("preprocessing")
        # the size is the model's, which may be another than it was saved with
        return {**kept, "input_size": list(own["input_size"])} if kept else own


def find_target(
    text: str | None, overrides: Sequence[str] = (), pretrained: bool = False, command: str = "train", **options: Any
) -> Target:
    """Resolve a target, as `resolve` does with the same `options`, and build its model.

    A model given by its name has random weights unless `pretrained`; a recipe that does not say how many classes its
    model has then has them counted in its data.
    """
    found = resolve(text, command, overrides, pretrained=pretrained, **options)
    return build_target(found, found.recipe.data if pretrained else None)


def build_target(found: Resolved, counted_in: DataSection | None = None) -> Target:
    """The target that was resolved, with its model.

    A recipe that does not say how many classes its model has gets those of the data `counted_in`, where given.
    """
    recipe = found.recipe
    if found.kind == "recipe":
        names = None
        if counted_in is not None and recipe.model.num_classes is None:
            names = getattr(open_dataset(counted_in, train=False), "class_names", None)
        return from_recipe(recipe, found.label, names)
    if found.kind == "name" and recipe.model.weights is not None:
        recipe = fitted_to_weights(recipe)
    own_weights = found.folder is not None and not found.is_given("model.weights")
    target = from_recipe(recipe, found.label, same_grid=own_weights and not found.is_given("model.img_size"))
    target.data = recipe.data if found.has_data else None
    if found.folder is not None:
        target.config = {**found.config, "model": target.config["model"]}
        target.has_life_head = target.has_life_head and (
            not own_weights or bool(found.config.get("has_life_head", _learnt_life(found)))
        )
        target.config["has_life_head"] = target.has_life_head
        target.run = found.folder if found.kind == "run" else None
    if recipe.model.weights is not None and not own_weights:
        target.label = (
            str(recipe.model.weights) if found.kind == "name" else f"{found.label} with {recipe.model.weights}"
        )
    return target


def _learnt_life(found: Resolved) -> bool:
    """Whether a run of a version that did not write so can have taught its life head."""
    stages = found.recipe.stages
    return not stages or any(stage.mode != "none" for stage in stages)


def from_folder(folder: Path) -> Target:
    """A run's or a baked model's folder."""
    return find_target(str(folder))


def fitted_to_weights(recipe: Recipe) -> Recipe:
    """The recipe of a model's name with the classes and the image size of its weights, where they tell.

    Raises:
        SlimError: where the weights' grid of patches is not square, and no image size is given.
    """
    section = recipe.model
    assert section.weights is not None
    plugin, given = section.backbone, dict(section.args)
    if section.img_size is not None:
        given["img_size"] = section.img_size
    model = build_model(section.name, False, plugin, **given)
    backbone = find_backbone(model, plugin)
    read = read_weights(section.weights)
    dense, _ = without_prefix(read, model.state_dict(), "life_head.")
    update: dict[str, Any] = {}
    if section.num_classes is None and "num_classes" not in given:
        names = [n for n in model.state_dict() if n.split(".")[0] in backbone.classifier_names and n.endswith("weight")]
        found_classes = [dense[name].shape[0] for name in names if name in dense]
        if found_classes:
            update["num_classes"] = found_classes[0]
    if "img_size" not in given:
        size = _image_size(read, dense, model, backbone, section.weights_grid)
        if size is not None:
            update["img_size"] = size
    return recipe.model_copy(update={"model": section.model_copy(update=update)})


def _image_size(
    read: WeightsFile, dense: dict[str, Tensor], model: Any, backbone: Backbone, grid: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Height and width that weights were made for, from their position embeddings; None where those do not tell."""
    own, theirs = model.state_dict().get("pos_embed"), dense.get("pos_embed")
    if own is None or theirs is None or own.dim() != 3 or theirs.dim() != 3 or own.shape == theirs.shape:
        return None
    rows, columns = backbone.grid_size
    count = theirs.shape[1] - (own.shape[1] - rows * columns)
    side = math.isqrt(max(count, 0))
    known = grid or read.grid or ((side, side) if side * side == count else None)
    if known is None or known[0] * known[1] != count:
        raise SlimError(
            f"{read.path}: its position embeddings are for {count} patches, which is no square: "
            "say their rows and columns with model.weights_grid = [ROWS, COLUMNS]"
        )
    height, width = backbone.image_size
    return known[0] * (height // rows), known[1] * (width // columns)


def from_recipe(recipe: Recipe, label: str, class_names: list[str] | None = None, same_grid: bool = False) -> Target:
    """A recipe's model with its weights. The classes are counted in the data where the recipe does not say.

    With `same_grid` the weights are known to be for the model's own grid of patches.
    """
    args = dict(recipe.model.args)
    if recipe.model.img_size is not None:
        args["img_size"] = recipe.model.img_size
    segments = recipe.data.class_names if recipe.data.name == "segmentation" else None
    if segments is not None:
        if recipe.model.num_classes:
            raise SlimError(
                "model.num_classes is for images with classes: the head for label maps has those of data.class_names"
            )
        args |= {"num_classes": 0, "segments": args.get("segments", len(segments))}
    elif recipe.model.num_classes is not None:
        args["num_classes"] = recipe.model.num_classes
    elif class_names is not None:
        args["num_classes"] = len(class_names)
    pretrained = recipe.model.pretrained and recipe.model.weights is None
    plugin = recipe.model.backbone
    dense = build_model(recipe.model.name, pretrained, plugin, **args)
    model = slimmed(dense, recipe)
    config: dict[str, Any] = {"model": model.backbone.rebuilt_as(recipe.model.name, args)}
    if pretrained and (base := base_model(dense)) is not None:
        config["base_model"] = base
    if plugin is not None:
        config["model"]["backbone"] = plugin
    learns = any(True for _ in model.selector.parameters())
    target = Target(label, model, config, recipe.data, recipe, has_life_head=not learns)
    if recipe.model.weights is not None:
        grid = model.backbone.grid_size if same_grid else recipe.model.weights_grid
        target.has_life_head, target.has_classifier, notes = load_weights(model, recipe.model.weights, grid)
        target.notes += notes
    # what a training by this recipe will have taught when it saves the model
    taught = target.has_life_head or any(stage.teaches_life for stage in recipe.stages)
    config["has_life_head"] = taught
    return target


def embedded_target() -> Target:
    """The model that comes with slim."""
    return from_folder(DIGITS_VIT)


def slimmed(dense: Any, recipe: Recipe) -> SlimModel:
    """A dense model with the method and the schedule of a recipe."""
    backbone = find_backbone(dense, recipe.model.backbone)
    schedule = recipe_schedule(recipe, backbone)
    kind = find_method(recipe.slimming.method)
    model = kind(backbone, schedule, recipe.slimming.temperature)
    model.attention = recipe.slimming.attention
    model.configure(recipe.slimming.model_dump(include={"exact_savings", "restore", *kind.settings}, exclude_none=True))
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
