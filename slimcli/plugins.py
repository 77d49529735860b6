"""Finds the plugins: the built-in ones first, then every package with an entry point in the group `slim`."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from dataclasses import dataclass

import pluggy

from slimcli import hookspecs

GROUP = "slim"
BUILT_IN = ("slimcli.backbones.timm_plugin",)


@dataclass(frozen=True)
class Plugin:
    """An installed plugin: its name, the package and version it came from, what it serves."""

    name: str
    package: str
    version: str
    backbones: dict[str, str]


@functools.cache
def plugin_manager() -> pluggy.PluginManager:
    """The plugin manager with everything registered; plugins that fail to load are named in one line each."""
    manager = pluggy.PluginManager("slim")
    manager.add_hookspecs(hookspecs)
    for module in BUILT_IN:
        manager.register(importlib.import_module(module), name=module.rpartition(".")[2])
    for distribution in importlib.metadata.distributions():
        for entry in distribution.entry_points:
            if entry.group != GROUP or manager.has_plugin(entry.name):
                continue
            try:
                manager.register(entry.load(), name=entry.name)
            except Exception as error:  # a plugin's own import may fail in any way; slim goes on without it
                package = f"{distribution.name} {distribution.version}"
                print(f"slim: plugin {entry.name} of {package} failed to load: {error}", file=sys.stderr)
    return manager


def hook() -> pluggy.HookRelay:
    """The hooks of all plugins."""
    return plugin_manager().hook


def installed() -> list[Plugin]:
    """Every registered plugin, built-in ones first."""
    manager = plugin_manager()
    own = importlib.metadata.version("slimcli")
    packages = {
        entry.name: (distribution.name, distribution.version)
        for distribution in importlib.metadata.distributions()
        for entry in distribution.entry_points
        if entry.group == GROUP
    }
    found = []
    for name, plugin in manager.list_name_plugin():
        package, version = packages.get(name, ("slimcli", own))
        backbones = plugin.slim_backbone_names() if hasattr(plugin, "slim_backbone_names") else {}
        found.append(Plugin(name, package, version, backbones))
    return found
