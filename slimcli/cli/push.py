"""slim push"""

from __future__ import annotations

from pathlib import Path

import click

from slimcli.cli import debug_option
from slimcli.cli.options import json_option


@click.command("push")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="For you and those you invite alone, where the repository is new.")
@click.option("--revision", metavar="BRANCH", help="The branch to push to, new or not.  [default: main]")
@json_option
@debug_option
def command(folder: Path, repository: str, private: bool, revision: str | None, as_json: bool) -> None:
    """Publish a run's model, or a model folder, on the Hugging Face hub.

    `slimcli.load("hf-hub:OWNER/NAME")` gives it back, and every command takes that name as its target. The token is
    the hub's own: `hf auth login`, or the environment variable HF_TOKEN.
    """
    from slimcli.cli.display import Display
    from slimcli.deployment.publish import push

    display = Display(as_json)
    address = push(folder, repository, private, revision)
    display.line(f"{folder} is published: slimcli.load('hf-hub:{repository}{f'@{revision}' if revision else ''}')")
    display.document({"repository": repository, "revision": revision, "commit": address})
