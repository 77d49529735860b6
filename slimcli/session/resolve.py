"""What a command works on, as a user says it, resolved to one recipe: the target's own, and what was set beside it.

A recipe brings all of it, a run its recipe and its weights, a model folder its config.json, a model's name the
defaults. Every field that is set either has an effect in the command or is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slimcli.errors import SlimError, parameter
from slimcli.recipe import (
    DataSection,
    ModelSection,
    Recipe,
    apply_override,
    builtin_recipes,
    read_recipe,
    require_files,
    validate,
)
from slimcli.recipe.text import Location
from slimcli.store.run_folder import CONFIG, LATEST, RECIPE, RUNS, WEIGHTS, find_run, latest_run

#: names such as hf-hub:owner/model or hf:folder, which a plugin reads: its word, a colon, anything; and timm/NAME
NAMED_BY_PLUGIN = re.compile(r"[a-z][a-z0-9_-]+:|timm/")
#: how the files of weights end that may stand as a target
WEIGHTS_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
RECIPES = (".toml", ".yaml", ".yml")
#: forms of a schedule: one that is set takes the place of what the target had
SCHEDULES = ("drop_layers", "drops", "patches_per_layer")
#: fields of [slimming] that only life regression reads
LIFE_ONLY = tuple(f"slimming.{name}" for name in ("dead", "grouping", "redundancy", "merge_importance", "size_bias"))

_TRAINING = ("stages", "optimizer", "augmentation", "tracker", "checkpoint_minutes", "data.cache", "data.cache_gib")
_OF_A_RUN = ("name", "description", "seed", "output", *_TRAINING)
_LEARNING_DATA = ("data.train_split", "data.train_limit")
_FILES_ALONE = ("root", "name", "val_split", "val_limit", "batch_size", "workers", "class_map")
#: fields that have no effect in a command, by their beginnings; all others have one
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "calibrate": (),
    "compare": _TRAINING,
    "compare --train": (),
    "eval": (*_OF_A_RUN, *_LEARNING_DATA, "slimming.temperature"),
    "export": (*_OF_A_RUN, "data.train_limit", "precision", "slimming.temperature"),
    "predict": (*_OF_A_RUN, *_LEARNING_DATA, "slimming.temperature", *(f"data.{name}" for name in _FILES_ALONE)),
    "profile": (*_OF_A_RUN, "data", "slimming.temperature"),
    "prune": (*_OF_A_RUN, *_LEARNING_DATA),
    "report": (*_OF_A_RUN, *_LEARNING_DATA, "slimming.temperature"),
    "show": (*_OF_A_RUN, *_LEARNING_DATA, "slimming.temperature"),
    "show IMAGE": (*_OF_A_RUN, *_LEARNING_DATA, "slimming.temperature", *(f"data.{name}" for name in _FILES_ALONE)),
    "train": (),
}
#: fields that a kind of target decides itself, and why
DECIDED: dict[str, dict[str, str]] = {
    "recipe": {},
    "run": {
        "model.name": "a run's weights are of its own model",
        "model.pretrained": "a run has its own weights",
        "model.num_classes": "a run's classifier has its own classes",
    },
    "folder": {
        "model.name": "a model folder's weights are of its own model",
        "model.pretrained": "a model folder has its own weights",
        "model.num_classes": "a model folder's classifier has its own classes",
    },
    "name": {"model.name": "the target names the model"},
}

Kind = Literal["recipe", "run", "folder", "name"]


@dataclass
class Resolved:
    """A recipe that says all of what a command works on, and where it comes from."""

    recipe: Recipe
    kind: Kind
    label: str
    #: the run or model folder, and its config.json
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    #: whether images belong to it
    has_data: bool = True
    #: places of the fields that were set beside the target, and how: `overrides data.root=photos`, as an error names it
    given: dict[Location, str] = field(default_factory=dict)

    def is_given(self, name: str) -> bool:
        """Whether the field called `name` (`data.batch_size`), or a part of it, was set beside the target."""
        return any(f"{'.'.join(map(str, place))}.".startswith(f"{name}.") for place in self.given)


def resolve(
    text: str | None,
    command: str,
    overrides: Sequence[str] = (),
    *,
    weights: Path | None = None,
    model: str | None = None,
    pretrained: bool = False,
    img_size: int | None = None,
    dead: str | None = None,
    precision: str | None = None,
    embedded: bool = False,
    default_dead: str = "discard",
    check: tuple[str, ...] = ("model.weights",),
) -> Resolved:
    """Resolve a target. Without one: the latest run, and where there is none, or with `embedded`, slim's own model.

    `command` is one of `WITHOUT_EFFECT`. `weights` replaces the target's weights; `text` may be such a file itself,
    with `model` the model's name. `pretrained` and `img_size` are for a model's name. `default_dead` is what becomes
    of dead patches where the target does not say. Files in the fields called `check` must exist.

    Raises:
        SlimError: for a target that is not there, an unknown or impossible field, and one without effect.
    """
    text, weights = _target_of(text, weights, model)
    found, raw, sources = _start(text, pretrained, embedded, default_dead)
    if img_size is not None and found.kind != "name":
        raise SlimError(
            f"{parameter('img_size')} is for a model's name: a run or a recipe has its own size "
            f"({parameter('overrides')} model.img_size=...)"
        )
    if not isinstance(raw, dict):
        validate(raw, found.label)
    given = _set_fields(raw, sources, overrides, command)
    options: dict[Location, tuple[str, Any]] = {
        ("model", "weights"): ("weights", str(weights) if weights is not None else None),
        ("model", "img_size"): ("img_size", img_size),
        ("slimming", "dead"): ("dead", dead),
        ("precision",): ("precision", precision),
    }
    _set_options(raw, sources, given, options)
    if found.kind != "recipe":
        found.has_data = bool(raw.get("data"))
        raw.setdefault("data", {})
    # what stands in a file of slim's own was valid when it was written
    found.recipe = validate(raw, found.label, sources, check_files=False)
    found.given = given
    _refuse_without_effect(found, command)
    require_files(found.recipe, found.label, sources, check)
    return found


def _target_of(text: str | None, weights: Path | None, model: str | None) -> tuple[str | None, Path | None]:
    """The words of the target and the weights file that replaces its own, if there is one.

    Raises:
        SlimError: where two of them say the same, or weights come without a model.
    """
    if text is not None and _is_weights_file(text):
        if weights is not None:
            raise SlimError(f"{text} and {parameter('weights', weights)} are both weights: choose one")
        if not Path(text).is_file():
            raise SlimError(f"{text}: no such weights file")
        weights, text = Path(text), None
        if model is None:
            named = parameter("model", "NAME")
            raise SlimError(f"{weights}: of which model are these weights? {named} says it, or a recipe's [model]")
    if model is not None:
        if text is not None:
            raise SlimError(f"{text} and {parameter('model', model)} both say which model: choose one")
        text = model
        if kind_of(text) != "name":
            raise SlimError(f"{parameter('model', model)}: expected a model's name, such as vit_small_patch16_224")
    elif text is None and weights is not None:
        named = parameter("model", "NAME")
        raise SlimError(f"{parameter('weights', weights)}: of which model? Name a target, or the model with {named}")
    return text, weights


def _set_fields(raw: Any, sources: dict[Location, str], overrides: Sequence[str], command: str) -> dict[Location, str]:
    """Set the fields of `overrides` in `raw`; return the place of each and how it was set. Changes `sources` too."""
    given: dict[Location, str] = {}
    for override in overrides:
        twice = any(place[0] == "slimming" and place[-1] in (*SCHEDULES, "keep_rate") for place in given)
        try:
            place = apply_override(raw, override, () if twice else SCHEDULES)
        except SlimError:
            # a field of a section that the target does not have, and the command has no use for either
            _refuse_unused(override.partition("=")[0].strip(), f"{parameter('overrides')} {override}", command)
            raise
        for known in [known for known in sources if known[: len(place)] == place]:
            del sources[known]
        sources[place] = f"{parameter('overrides')} {override}"
        given |= dict.fromkeys(leaves(place, _at(raw, place)), f"{parameter('overrides')} {override}")
    return given


def _set_options(
    raw: dict[str, Any],
    sources: dict[Location, str],
    given: dict[Location, str],
    options: dict[Location, tuple[str, Any]],
) -> None:
    """Set the fields that options of their own stand for; `SlimError` where one was set already."""
    for place, (name, value) in options.items():
        if value is None:
            continue
        if place in given:
            raise SlimError(f"{given[place]} and {parameter(name, value)} are both given: choose one")
        *above, key = map(str, place)
        section = raw.get(above[0]) if above else raw
        if not isinstance(section, dict):
            section = raw[above[0]] = {}
        section[key] = value
        given[place] = sources[place] = parameter(name, value)


def _is_weights_file(text: str) -> bool:
    path = Path(text)
    return (path.name.endswith((*WEIGHTS_FILES, ".pth.tar"))) and not path.is_dir()


def kind_of(text: str) -> Kind:
    """What a target is, by its words alone; `SlimError` where it can be nothing."""
    path = find_run(Path(text))
    if path.is_dir():
        return "run" if (path / RECIPE).is_file() else "folder"
    if path.suffix in RECIPES or text in builtin_recipes() or path.is_file():
        return "recipe"
    if (path.suffix or "/" in text) and not NAMED_BY_PLUGIN.match(text):
        # a pretrained tag follows the name of a model of timm's
        known = re.fullmatch(r"[\w-]+(\.[\w-]+)+", text) and not path.exists()
        if not known:
            raise SlimError(
                f"{text}: no such file or folder: expected a run, a model folder, a recipe, a weights file or a "
                "model's name"
            )
    return "name"


def _start(
    text: str | None, pretrained: bool, embedded: bool, default_dead: str
) -> tuple[Resolved, dict[str, Any], dict[Location, str]]:
    """The target before anything is set beside it: what it is, its recipe as plain values, and where each stands."""
    from slimcli.backbones.timm_vit import DIGITS_VIT

    label = None
    if text is None:
        latest = None if embedded else latest_run()
        has_model = latest is not None and (latest / CONFIG).is_file()
        text, label = (str(latest), str(RUNS / LATEST)) if has_model else (str(DIGITS_VIT), "the embedded model")
    kind, path = kind_of(text), find_run(Path(text))
    if kind == "name" and text.startswith(("hf-hub:", "hf_hub:")):
        from slimcli.store.hub import find_on_hub

        fetched = find_on_hub(text)
        if fetched is not None:
            kind, path, label = "folder", fetched, text
    # takes its place in `resolve`, once all that was set is in it
    empty = Recipe.model_construct(name=label or text, model=ModelSection(name="unnamed"), data=DataSection())
    if kind == "recipe":
        raw, sources = read_recipe(path)
        return Resolved(empty, kind, str(path)), raw, sources
    if kind == "name":
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "model"
        raw = {"name": name, "model": {"name": text, "pretrained": pretrained}, "slimming": {"dead": default_dead}}
        if text == "digits_vit":
            raw["data"] = {"name": "digits"}
        return Resolved(empty, kind, text), raw, {}
    config, raw = _folder(path, default_dead)
    return Resolved(empty, kind, label or str(path), path, config), raw, {}


def _folder(path: Path, default_dead: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config.json of a run or a model folder, and the recipe that it stands for."""
    from slimcli.recipe import load_recipe
    from slimcli.store.model_folder import open_folder

    own = path / RECIPE
    if not (path / CONFIG).is_file() and own.is_file():
        raise SlimError(f"{path}: this run has no model yet: finish an epoch with `slim train --resume {path}`")
    config = open_folder(path)
    raw: dict[str, Any] = {}
    if own.is_file():
        raw = load_recipe(own, check_files=False).model_dump(mode="json", exclude_none=True)
    args = dict(config["model"]["args"])
    model = {key: args.pop(key) for key in ("img_size", "num_classes") if args.get(key) is not None}
    model |= {"name": config["model"]["name"], "args": args, "weights": str(path / WEIGHTS)}
    if config["model"].get("backbone"):
        model["backbone"] = config["model"]["backbone"]
    raw["model"] = model
    raw.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", model["name"]).strip("-._"))
    # config.json says all of [slimming] but the kernel of training
    attention = raw.get("slimming", {}).get("attention", "auto")
    raw["slimming"] = {"dead": default_dead, "attention": attention, **config["slimming"]}
    # the images of somebody else's machine are not here, and those of a hub are not fetched unasked
    if config.get("data") and (path.parent.name != "snapshots" or config["data"].get("name") == "digits"):
        raw["data"] = dict(config["data"])
    return config, raw


def leaves(place: Location, value: Any) -> Iterator[Location]:
    """The places of all fields that setting `place` to `value` sets."""
    if isinstance(value, dict) and place != ("model", "args"):
        for key, below in value.items():
            yield from leaves((*place, key), below)
    else:
        yield place


def _refuse_without_effect(found: Resolved, command: str) -> None:
    """`SlimError` for what was set and the command does not use, or the target decides itself."""
    for place, source in found.given.items():
        name = ".".join(map(str, place))
        reason = DECIDED[found.kind].get(name)
        if reason is not None:
            raise SlimError(f"{source}: {name} cannot be set here: {reason}")
        _refuse_unused(name, source, command)
        section = found.recipe.slimming
        discards = name == "slimming.dead" and section.dead == "discard"
        if name in LIFE_ONLY and section.method != "life" and not discards:
            raise SlimError(f"{source}: {name} is for the method life: {section.method} has a rule of its own")


def _refuse_unused(name: str, source: str, command: str) -> None:
    if _begins(name, WITHOUT_EFFECT[command]):
        users = [f"`slim {other}`" for other in WITHOUT_EFFECT if not _begins(name, WITHOUT_EFFECT[other])]
        raise SlimError(f"{source}: {name} has no effect in `slim {command}`: it is for {', '.join(users)}")


def _at(raw: Any, place: Location) -> Any:
    for part in place:
        raw = raw[part]
    return raw


def _begins(name: str, beginnings: Sequence[str]) -> bool:
    return any(name == beginning or name.startswith(f"{beginning}.") for beginning in beginnings)
