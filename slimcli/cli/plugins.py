"""slim plugins"""

from __future__ import annotations

from pathlib import Path

import click

from slimcli.cli import debug_option
from slimcli.cli.options import json_option


@click.group("plugins", invoke_without_command=True)
@json_option
@debug_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """What is installed, with versions, and which models each plugin serves.

    With --debug also the traceback of every plugin that failed.
    """
    if ctx.invoked_subcommand is not None:
        return
    from slimcli.cli.display import Display
    from slimcli.cli.tables import print_plugins
    from slimcli.plugins import installed
    from slimcli.plugins.manager import failures

    display = Display(as_json)
    plugins = installed()
    print_plugins(display, plugins)
    for failure in failures if ctx.meta.get("slim.debug") else ():
        display.line(f"{failure}\n{failure.traceback()}")
    display.document({"plugins": [vars(p) for p in plugins], "failures": [failure.document() for failure in failures]})


@command.command("check")
@click.argument("name")
@click.option("--model", help="A model's name, built with random weights.  [default: the plugin's small models]")
@json_option
@debug_option
@click.pass_context
def check(ctx: click.Context, name: str, model: str | None, as_json: bool) -> None:
    """Prove that the backbones of the plugin NAME do what slim needs, on small random models.

    Exit code 1 if a check fails.
    """
    from slimcli.cli.display import Display
    from slimcli.cli.tables import print_checks
    from slimcli.conformance import check_backbone
    from slimcli.plugins import check_models

    display = Display(as_json)
    found = {}
    builders = check_models(name, model)
    with display.progress() as progress:
        for done, (label, build) in enumerate(builders.items()):
            progress(label, done, len(builders))
            found[label] = check_backbone(build(), plugin=name)
    print_checks(display, name, found)
    display.document({"plugin": name, "models": {k: [vars(o) for o in v] for k, v in found.items()}})
    ctx.exit(0 if all(outcome.passed for outcomes in found.values() for outcome in outcomes) else 1)


@command.command("new")
@click.argument("name")
@click.option("--to", type=click.Path(path_type=Path), help="Folder to write.  [default: slim-NAME]")
@debug_option
def new(name: str, to: Path | None) -> None:
    """Write a plugin package for a model of your own: a tiny ViT, its backbone, and tests that pass."""
    from slimcli.cli.display import Display
    from slimcli.plugins.scaffold import write_plugin

    folder = write_plugin(name, to)
    display = Display()
    display.line(f"Wrote {folder}. Next:")
    display.line(f"  pip install -e {folder}")
    display.line(f"  slim plugins check {name}")
    display.line(f"  python -m pytest {folder}")
