"""slim plugins"""

from __future__ import annotations

import click

from slimcli.cli import debug_option
from slimcli.cli.options import json_option


@click.command("plugins")
@json_option
@debug_option
def command(as_json: bool) -> None:
    """What is installed, with versions, and which models each plugin serves."""
    from slimcli.cli.display import Display
    from slimcli.plugins import installed

    display = Display(as_json)
    plugins = installed()
    for plugin in plugins:
        display.line(f"{plugin.name} ({plugin.package} {plugin.version})")
        for name, about in plugin.backbones.items():
            display.line(f"  {name:<12} {about}")
    display.document(
        {
            "plugins": [
                {"name": p.name, "package": p.package, "version": p.version, "backbones": p.backbones} for p in plugins
            ]
        }
    )
