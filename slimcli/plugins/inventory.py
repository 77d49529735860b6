"""What is installed: every plugin, and what it adds."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

from slimcli.plugins.lookup import methods
from slimcli.plugins.manager import BUILT_IN, ask, entries, packages, plugin_manager


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
    #: each with a line about it: precisions, versions of what it needs, or what is missing
    runtimes: dict[str, str] = field(default_factory=dict)


def commands() -> dict[str, click.Command]:
    """The subcommands that installed plugins add; nothing is loaded where slim is installed alone."""
    if not entries() and not plugin_manager.cache_info().currsize:
        return {}
    return {name: command for found in ask("slim_commands")[0].values() for name, command in found.items()}


def installed() -> list[Plugin]:
    """Every plugin that loads, built-in ones first."""
    manager = plugin_manager()
    own = ("slimcli", importlib.metadata.version("slimcli"))
    backbones, datasets = ask("slim_backbone_names")[0], ask("slim_datasets")[0]
    added, rules, places = ask("slim_commands")[0], methods(), ask("slim_runtimes")[0]
    found = []
    for name, _plugin in manager.list_name_plugin():
        package, version = own if name in BUILT_IN else packages().get(name, own)
        helps = {command: value.get_short_help_str() for command, value in added.get(name, {}).items()}
        own_rules = {rule: entry.about for rule, entry in rules.items() if entry.plugin == name}
        own_places = {kind.name: kind().described() for kind in places.get(name, ())}
        found.append(
            Plugin(
                name, package, version, backbones.get(name, {}), datasets.get(name, {}), helps, own_rules, own_places
            )
        )
    return found
