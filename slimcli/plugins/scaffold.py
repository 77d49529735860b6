"""The plugin package that `slim plugins new` writes, from the files in `template`."""

from __future__ import annotations

import re
from pathlib import Path

from slimcli.errors import SlimError, parameter
from slimcli.files import check_writable, write_file
from slimcli.plugins import plugin_manager

TEMPLATE = Path(__file__).parent / "template"


def write_plugin(name: str, to: Path | None = None) -> Path:
    """Write the package slim-NAME to the folder `to`, by default `slim-NAME`; return the folder.

    Raises:
        SlimError: for a name that is taken or no plugin can have, and for a folder that is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        raise SlimError(
            f"{name!r} cannot be a plugin's name: expected small letters, digits and dashes, such as my-vit"
        )
    if plugin_manager().has_plugin(name):
        raise SlimError(f"a plugin called {name} is installed already: choose another name")
    folder = to or Path(f"slim-{name}")
    if folder.exists():
        raise SlimError(f"{folder}: is there already: choose another with {parameter('to')}")
    check_writable(folder, "folder")
    for path, text in plugin_files(name).items():
        write_file(folder / path, text.encode())
    return folder


def plugin_files(name: str) -> dict[str, str]:
    """The files of the package slim-NAME: their text, by path."""
    module = name.replace("-", "_")
    return {
        str(path.relative_to(TEMPLATE)).replace("NAME", module).removesuffix(".in"): path.read_text(encoding="utf-8")
        .replace("slim_NAME", f"slim_{module}")
        .replace("NAME_tiny", f"{module}_tiny")
        .replace("NAME", name)
        for path in sorted(TEMPLATE.rglob("*.in"))
    }
