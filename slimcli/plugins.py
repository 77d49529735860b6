"""Finds the plugins, the built-in ones first, and asks them; one that fails is named in a line and left out."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

from slimcli import hookspecs
from slimcli.errors import SlimError

if TYPE_CHECKING:
    import click
    from torch import nn

    from slimcli.backbones.base import Backbone
    from slimcli.methods.slim_model import SlimModel

GROUP = "slim"
#: plugins of slim's own that are packages beside it, by the word that their models' names begin with
PACKAGES = {"hf": "slim-transformers", "openclip": "slim-openclip", "open_clip": "slim-openclip"}
BUILT_IN = {"timm": "slimcli.backbones.timm_plugin", "methods": "slimcli.methods.plugin"}


@dataclass(frozen=True)
class Plugin:
    """An installed plugin: its name, the package and version it came from, and what it adds."""

    name: str
    package: str
    version: str
    backbones: dict[str, str]
    datasets: dict[str, str]
    commands: dict[str, str]
    methods: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A plugin that raised: which, where it comes from, what it was asked, and what happened."""

    plugin: str
    package: str
    asked: str
    error: Exception

    def __str__(self) -> str:
        first = (str(self.error).strip() or "no message").splitlines()[0]
        return f"plugin {self.plugin} of {self.package} failed in {self.asked}: {type(self.error).__name__}: {first}"

    def traceback(self) -> str:
        """The traceback, as Python prints it."""
        return "".join(traceback.format_exception(self.error))


#: everything that has failed in this process, the first failure of a plugin in a hook alone
failures: list[Failure] = []


def _failed(plugin: str, asked: str, error: Exception) -> None:
    """Note a failure and say so once, in one line."""
    package, version = _packages().get(plugin, ("slimcli", ""))
    failure = Failure(plugin, f"{package} {version}".strip(), asked, error)
    if not any((known.plugin, known.asked) == (plugin, asked) for known in failures):
        failures.append(failure)
        print(f"slim: {failure} (`slim plugins --debug` shows where)", file=sys.stderr)


@functools.cache
def _entries() -> tuple[tuple[importlib.metadata.EntryPoint, str, str], ...]:
    """Every entry point in the group, with its package's name and version."""
    return tuple(
        (entry, entry.dist.name if entry.dist else "?", entry.dist.version if entry.dist else "?")
        for entry in importlib.metadata.entry_points(group=GROUP)
    )


def _packages() -> dict[str, tuple[str, str]]:
    return {entry.name: (package, version) for entry, package, version in _entries()}


@functools.cache
def plugin_manager() -> pluggy.PluginManager:
    """The plugin manager with everything registered."""
    manager = pluggy.PluginManager("slim")
    manager.add_hookspecs(hookspecs)
    for name, module in BUILT_IN.items():
        manager.register(importlib.import_module(module), name=name)
    for entry, package, _version in _entries():
        if manager.has_plugin(entry.name):
            if package != "slimcli":
                _failed(entry.name, "its name", SlimError(f"another plugin is called {entry.name} too"))
            continue
        try:
            manager.register(entry.load(), name=entry.name)
        except Exception as error:  # a plugin's own import may fail in any way; slim goes on without it
            if manager.has_plugin(entry.name):
                manager.unregister(name=entry.name)
            _failed(entry.name, "its import", error)
    return manager


def ask(hook: str, only: str | None = None, **arguments: Any) -> tuple[dict[str, Any], dict[str, SlimError]]:
    """Ask every plugin, or `only` one; return what each answered, and with what reason each refused.

    A plugin that fails in any other way than with a `SlimError` is left out.
    """
    manager = plugin_manager()
    if only is not None and not manager.has_plugin(only):
        known = ", ".join(name for name, _ in manager.list_name_plugin())
        raise SlimError(f"no plugin is called {only!r}: installed are {known}")
    answers: dict[str, Any] = {}
    refusals: dict[str, SlimError] = {}
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        name = implementation.plugin_name
        if only is not None and name != only:
            continue
        given = {key: arguments[key] for key in implementation.argnames}
        try:
            answer = implementation.function(**given)
        except SlimError as error:
            refusals[name] = error
        except Exception as error:  # whatever a plugin does wrong, the others go on
            _failed(name, hook, error)
        else:
            if answer is not None:
                answers[name] = answer
    return answers, refusals


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
        broken = f" ({'; '.join(map(str, failures))})" if failures else ""
        raise SlimError(
            f"no installed plugin knows {kind}: `slim plugins` lists what is served, and docs/plugins.md shows how "
            f"to add a backbone{broken}"
        )
    return backbone


def build_model(name: str, pretrained: bool = False, plugin: str | None = None, **args: Any) -> nn.Module:
    """Build the dense model called `name` through the plugins; `SlimError` with the nearest names if none knows it."""
    try:
        # pydantic is not for `slim --help`
        from slimcli.values import constructor_arguments

        constructor_arguments(args)
    except ValueError as error:
        raise SlimError(f"the arguments of the model {name!r}: {error}") from None
    what, given = f"the model name {name!r}", {"name": name, "pretrained": pretrained, "args": args}
    model: nn.Module | None = _one("slim_build_model", what, plugin, **given) if plugin is not None else None
    if model is None:
        # a plugin that runs a model need not be the one that builds it
        model = _one("slim_build_model", what, None, **given)
    if model is None:
        package = PACKAGES.get(name.partition(":")[0]) if ":" in name else None
        if package is not None and package not in {found for found, _ in _packages().values()}:
            raise SlimError(
                f"{name}: such models are run by the plugin {package}, which is not installed: "
                f"`pip install ./plugins/{package}` in slim's repository"
            )
        near = [found for names in ask("slim_similar_names", name=name)[0].values() for found in names][:3]
        hint = (
            f"did you mean {', '.join(near)}?" if near else "expected a timm model name such as deit_small_patch16_224"
        )
        raise SlimError(f"no model is called {name!r}: {hint}")
    return model


def check_models(plugin: str, model: str | None = None) -> dict[str, Callable[[], nn.Module]]:
    """Builders of what a plugin is checked on: its small models, or the one called `model`, with random weights."""
    builders: dict[str, Callable[[], nn.Module]] = ask("slim_check_models", plugin)[0].get(plugin, {})
    if model is not None:
        return {model: builders.get(model, functools.partial(build_model, model, plugin=plugin))}
    if not builders:
        broken = next((f": {failure}" for failure in failures if failure.plugin == plugin), "")
        raise SlimError(
            f"the plugin {plugin} names no model to check (slim_check_models){broken}: give one with --model"
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


def commands() -> dict[str, click.Command]:
    """The subcommands that installed plugins add; nothing is loaded where slim is installed alone."""
    if not _entries():
        return {}
    return {name: command for found in ask("slim_commands")[0].values() for name, command in found.items()}


def installed() -> list[Plugin]:
    """Every plugin that loads, built-in ones first."""
    manager = plugin_manager()
    own = ("slimcli", importlib.metadata.version("slimcli"))
    backbones, datasets = ask("slim_backbone_names")[0], ask("slim_datasets")[0]
    added, rules = ask("slim_commands")[0], methods()
    found = []
    for name, _plugin in manager.list_name_plugin():
        package, version = own if name in BUILT_IN else _packages().get(name, own)
        helps = {command: value.get_short_help_str() for command, value in added.get(name, {}).items()}
        own_rules = {rule: entry.about for rule, entry in rules.items() if entry.plugin == name}
        found.append(Plugin(name, package, version, backbones.get(name, {}), datasets.get(name, {}), helps, own_rules))
    return found
