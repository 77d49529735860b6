"""The models that stand in the paper's tables, each with its recipe: those of the paper, or the user's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slimcli.data import has_split
from slimcli.errors import SlimError, parameter
from slimcli.paper.published import OWN_PLACES, PLACES, RECIPES
from slimcli.recipe import DataSection, Recipe, StageSection, builtin_recipes, find_recipe
from slimcli.session.resolve import RECIPES as RECIPE_FILES
from slimcli.session.resolve import WEIGHTS_FILES, resolve
from slimcli.session.session import named_data

#: the model and the recipe of a quick run, on handwritten digits
QUICK_MODEL, QUICK_RECIPE = "digits_vit", "paper-digits"
#: folders that validation images are looked for in
VALIDATION = ("val", "validation", "valid", "test")


@dataclass(frozen=True)
class Entrant:
    """A model with its recipe; `places` are the models of the paper that it stands for."""

    key: str
    places: tuple[str, ...]
    recipe: Recipe


def find_entrants(
    backbones: Sequence[str],
    data: str | None = None,
    overrides: Sequence[str] = (),
    precision: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    quick: bool = False,
) -> list[Entrant]:
    """The models called `backbones`: `deit-s`, `deit-s=TARGET` or TARGET, a model's name, a recipe, or weights.

    `overrides` are FIELD=VALUE for every recipe.

    Raises:
        SlimError: for what is not there, and a place that is taken twice.
    """
    found: list[Entrant] = []
    for text in backbones or ((QUICK_MODEL,) if quick else tuple(PLACES)):
        place, equals, target = text.partition("=")
        if not equals:
            place, target = (text.lower(), "") if text.lower() in PLACES else ("", text)
        place = place.lower()
        if (place and place not in PLACES) or (equals and not target):
            raise SlimError(
                f"{parameter('backbones', text)}: expected one of {', '.join(PLACES)}, or one of them = your own, such "
                "as deit-s=my.safetensors, or a model's name or a recipe"
            )
        places = (place,) if place else OWN_PLACES
        taken = [PLACES[one] for entrant in found for one in entrant.places if one in places]
        if taken:
            raise SlimError(
                f"{parameter('backbones', text)}: something stands for {taken[0]} already: say where each stands, such "
                f"as {places[0]}={target or text}"
            )
        recipe = _recipe(place, target, data, overrides, precision, quick)
        section = recipe.data.model_copy(
            update={k: v for k, v in (("val_limit", limit), ("batch_size", batch_size)) if v is not None}
        )
        recipe = recipe.model_copy(update={"data": section})
        paper_stages(recipe)
        found.append(Entrant(place or re.sub(r"\W+", "-", Path(target).stem).strip("-"), places, recipe))
    return found


def _recipe(
    place: str, target: str, data: str | None, overrides: Sequence[str], precision: str | None, quick: bool
) -> Recipe:
    """The recipe of a model: its own, or the built-in one of its place with the model or the weights in it."""
    weights = target.endswith(WEIGHTS_FILES)
    if weights and not place:
        raise SlimError(f"{parameter('backbones', target)}: say whose weights they are, such as deit-s={target}")
    if weights and not Path(target).is_file():
        raise SlimError(f"{parameter('backbones', f'{place}={target}')}: no such file of weights")
    own = target.endswith(RECIPE_FILES) or target in builtin_recipes()
    name = target if own else QUICK_RECIPE if quick else RECIPES[place or OWN_PLACES[0]]
    check = ("model.weights", *(("data.root",) if data is None else ()))
    resolved = resolve(str(find_recipe(name)), "compare --train", overrides, precision=precision, check=check)
    recipe = resolved.recipe
    if weights:
        changed = {"weights": Path(target), "pretrained": False}
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=changed)})
    elif target and not own:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": target})})
    section = recipe.data
    if data is not None:
        section = _both_splits(named_data(data, section, "data", resolved.is_given), data)
    recipe = recipe.model_copy(update={"data": section})
    if quick:
        recipe = recipe.model_copy(update={"stages": [s.model_copy(update={"epochs": 1}) for s in recipe.stages]})
    return recipe


def _both_splits(section: DataSection, path: str) -> DataSection:
    """The data with a split to train on and another to measure on."""
    if section.root is None:
        return section
    root = section.root
    val = section.val_split
    if val == ".":
        val = next((split for split in VALIDATION if has_split(root, split)), ".")
    train = section.train_split if section.train_split != "." else "train"
    if val == "." or not has_split(root, train):
        raise SlimError(
            f"{parameter('data', path)}: needs images to train on and others to measure on: expected train/ and "
            "val/ in it, each with a folder for every class"
        )
    return section.model_copy(update={"train_split": train, "val_split": val})


def paper_stages(recipe: Recipe) -> tuple[StageSection, StageSection]:
    """The paper's two stages of a recipe: the life head alone, then the backbone alone, both with soft weights.

    Raises:
        SlimError: for a recipe with others.
    """
    found = [(stage.learns, stage.mode) for stage in recipe.stages]
    if found != [("life", "soft"), ("backbone", "soft")]:
        raise SlimError(
            f"{recipe.name}: the paper trains in two stages, learns = 'life' and learns = 'backbone', both with "
            f"mode = 'soft': start from the built-in recipe {RECIPES['deit-s']}"
        )
    return recipe.stages[0], recipe.stages[1]


def one_stage(recipe: Recipe) -> StageSection:
    """The paper's ablation: head and backbone learn at once, each at its rate, for the epochs of both stages."""
    head, backbone = paper_stages(recipe)
    changed = {"name": "one stage", "learns": "both", "epochs": head.epochs + backbone.epochs}
    return backbone.model_copy(update={**changed, "lr": head.lr, "backbone_lr": backbone.lr})
