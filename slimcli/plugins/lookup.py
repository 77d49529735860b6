"""Asks the plugins for a backbone, a model, a data set or a method by name."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimcli.errors import SlimError, parameter

if TYPE_CHECKING:
    from torch import nn

    from slimcli.backbones.base import Backbone
    from slimcli.methods.slim_model import SlimModel
from slimcli.plugins import manager
from slimcli.plugins.manager import ask, packages, plugin_manager

#: plugins of slim's own that are packages beside it, by the word that their models' names begin with
PACKAGES = {"hf": "slim-transformers", "openclip": "slim-openclip", "open_clip": "slim-openclip"}


def _one(hook: str, what: str, only: str | None, **arguments: Any) -> Any:
    """The one answer to a hook; None if there is none; `SlimError` for several, or for refusals alone."""
    answers, refusals = ask(hook, only, **arguments)
    if len(answers) > 1:
        raise SlimError(
            f"{what} is claimed by the plugins {' and '.join(answers)}: "
            f'say which is meant with model.backbone = "{next(iter(answers))}" in the recipe'
        )
    if not answers and refusals:
        raise next(iter(refusals.values()))
    return next(iter(answers.values()), None)


def find_backbone(model: nn.Module, plugin: str | None = None) -> Backbone:
    """The adapter that an installed plugin, or the one called `plugin`, has for `model`; `SlimError` if none has."""
    kind = f"{type(model).__module__}.{type(model).__name__}"
    backbone: Backbone | None = _one("slim_backbone", kind, plugin, model=model)
    if backbone is None:
        broken = f" ({'; '.join(map(str, manager.failures))})" if manager.failures else ""
        raise SlimError(
            f"no installed plugin knows {kind}: `slim plugins` lists what is served, and docs/plugins.md shows how "
            f"to add a backbone{broken}"
        )
    return backbone


def build_model(name: str, pretrained: bool = False, plugin: str | None = None, **args: Any) -> nn.Module:
    """Build the dense model called `name` through the plugins; `SlimError` with the nearest names if none knows it.

    `segments` among the arguments is a number of classes: the model gets a `SegmentationHead` for them.
    """
    # the schema of recipes takes a while to import, which commands that only list plugins need not wait for
    from slimcli.recipe.values import constructor_arguments

    try:
        constructor_arguments(args)
    except ValueError as error:
        raise SlimError(f"the arguments of the model {name!r}: {error}") from None
    segments = args.pop("segments", 0)
    what, given = f"the model name {name!r}", {"name": name, "pretrained": pretrained, "args": args}
    model: nn.Module | None = _one("slim_build_model", what, plugin, **given) if plugin is not None else None
    if model is None:
        # a plugin that runs a model need not be the one that builds it
        model = _one("slim_build_model", what, None, **given)
    if model is None:
        package = PACKAGES.get(name.partition(":")[0]) if ":" in name else None
        if package is not None and package not in {found for found, _ in packages().values()}:
            raise SlimError(
                f"{name}: such models are run by the plugin {package}, which is not installed: "
                f"`pip install ./plugins/{package}` in slim's repository"
            )
        near = [found for names in ask("slim_similar_names", name=name)[0].values() for found in names][:3]
        hint = (
            f"did you mean {', '.join(near)}?" if near else "expected a timm model name such as deit_small_patch16_224"
        )
        raise SlimError(f"no model is called {name!r}: {hint}")
    if segments:
        from slimcli.backbones.segmenter import add_segmenter

        add_segmenter(find_backbone(model, plugin), segments)
    return model


def check_models(plugin: str, model: str | None = None) -> dict[str, Callable[[], nn.Module]]:
    """Builders of what a plugin is checked on: its small models, or the one called `model`, with random weights."""
    builders: dict[str, Callable[[], nn.Module]] = ask("slim_check_models", plugin)[0].get(plugin, {})
    if model is not None:
        return {model: builders.get(model, functools.partial(build_model, model, plugin=plugin))}
    if not builders:
        broken = next((f": {failure}" for failure in manager.failures if failure.plugin == plugin), "")
        raise SlimError(
            f"the plugin {plugin} names no model to check (slim_check_models){broken}: "
            f"give one with {parameter('model')}"
        )
    return builders


def open_plugin_dataset(name: str, root: Any, split: str, train: bool) -> Any:
    """The data set called `name` that a plugin adds; None if no plugin has one of that name."""
    owners = [plugin for plugin, names in ask("slim_datasets")[0].items() if name in names]
    if not owners:
        return None
    if len(owners) > 1:
        raise SlimError(f"the data set {name!r} is claimed by the plugins {' and '.join(owners)}: uninstall one")
    answers, refusals = ask("slim_open_dataset", owners[0], name=name, root=root, split=split, train=train)
    if refusals:
        raise refusals[owners[0]]
    if not answers:
        raise SlimError(f"the plugin {owners[0]} names the data set {name!r} and does not open it")
    return answers[owners[0]]


@dataclass(frozen=True)
class RegisteredMethod:
    """A rule by which patches leave: the plugin that adds it, its class, and a line about it."""

    plugin: str
    kind: type[SlimModel]
    about: str


def methods() -> dict[str, RegisteredMethod]:
    """Every rule by which patches can leave, by name; `SlimError` if two plugins give one name."""
    found: dict[str, RegisteredMethod] = {}
    for implementation in plugin_manager().hook.slim_register_methods.get_hookimpls():
        plugin = implementation.plugin_name
        own: dict[str, tuple[type[SlimModel], str]] = {}

        def register(name: str, kind: type[SlimModel], about: str = "", own: Any = own) -> None:
            own[name] = kind, about

        ask("slim_register_methods", plugin, register=register)
        for name, (kind, about) in own.items():
            if name in found:
                raise SlimError(
                    f"the method {name!r} is claimed by the plugins {found[name].plugin} and {plugin}: uninstall one"
                )
            found[name] = RegisteredMethod(plugin, kind, about)
    return found


def find_method(name: str) -> type[SlimModel]:
    """The class of the method called `name`; `SlimError` with the known names if there is none."""
    known = methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SlimError(f"no method is called {name!r}: {hint}known are {', '.join(known)}")
    return known[name].kind
