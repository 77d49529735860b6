"""Finds the plugins, the built-in ones first, and asks them; one that fails is named in a line and left out."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from slimcli import hookspecs
from slimcli.errors import SlimError

if TYPE_CHECKING:
    pass


logger = logging.getLogger(__name__)

GROUP = "slim"
BUILT_IN = {
    "timm": "slimcli.plugins.timm_models",
    "methods": "slimcli.plugins.built_in_methods",
    "runtimes": "slimcli.runtimes.plugin",
}


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

    def document(self) -> dict[str, str]:
        """All but the traceback, as plain values."""
        return {"plugin": self.plugin, "package": self.package, "asked": self.asked, "error": str(self.error)}

    def traceback(self) -> str:
        """The traceback, as Python prints it."""
        return "".join(traceback.format_exception(self.error))


#: everything that has failed in this process, the first failure of a plugin in a hook alone
failures: list[Failure] = []


def failed(plugin: str, asked: str, error: Exception) -> None:
    """Note a failure and say so once, in one line."""
    package, version = packages().get(plugin, ("slimcli", ""))
    failure = Failure(plugin, f"{package} {version}".strip(), asked, error)
    if not any((known.plugin, known.asked) == (plugin, asked) for known in failures):
        failures.append(failure)
        logger.warning("slim: %s (`slim plugins --debug` shows where)", failure)


@functools.cache
def entries() -> tuple[tuple[importlib.metadata.EntryPoint, str, str], ...]:
    """Every entry point in the group, with its package's name and version."""
    return tuple(
        (entry, entry.dist.name if entry.dist else "?", entry.dist.version if entry.dist else "?")
        for entry in importlib.metadata.entry_points(group=GROUP)
    )


def packages() -> dict[str, tuple[str, str]]:
    return {entry.name: (package, version) for entry, package, version in entries()}


@functools.cache
def plugin_manager() -> pluggy.PluginManager:
    """The plugin manager with everything registered."""
    manager = pluggy.PluginManager("slim")
    manager.add_hookspecs(hookspecs)
    for name, module in BUILT_IN.items():
        manager.register(importlib.import_module(module), name=name)
    for entry, package, _version in entries():
        if manager.has_plugin(entry.name):
            if package != "slimcli":
                failed(entry.name, "its name", SlimError(f"another plugin is called {entry.name} too"))
            continue
        try:
            manager.register(entry.load(), name=entry.name)
        except Exception as error:  # a plugin's own import may fail in any way; slim goes on without it
            if manager.has_plugin(entry.name):
                manager.unregister(name=entry.name)
            failed(entry.name, "its import", error)
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
            if "meta tensor" in str(error):
                # a model that cannot be built without memory, to see its shapes, is no fault of the plugin's
                refusals[name] = SlimError(f"the plugin {name} builds no model without memory")
                refusals[name].__cause__ = error
            else:
                failed(name, hook, error)
        else:
            if answer is not None:
                answers[name] = answer
    return answers, refusals
