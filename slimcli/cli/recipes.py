"""slim recipes"""

from __future__ import annotations

from pathlib import Path

import click

from slimcli.cli import debug_option
from slimcli.cli.options import json_option, refuse_given, set_option
from slimcli.errors import SlimError


@click.command("recipes")
@click.argument("name", required=False)
@click.option("--copy", "copy_to", type=click.Path(path_type=Path), help="Write the built-in recipe NAME to this file.")
@click.option("--check", is_flag=True, help="Validate the recipe NAME (a file or a built-in one).")
@click.option("--force", is_flag=True, help="With --copy: overwrite the file if it exists.")
@set_option
@json_option
@debug_option
def command(
    name: str | None, copy_to: Path | None, check: bool, force: bool, overrides: tuple[str, ...], as_json: bool
) -> None:
    """List the built-in recipes, print one, copy one out, or check one.

    \b
      slim recipes                                   list them
      slim recipes quickstart                        print one
      slim recipes quickstart --copy my.toml         copy one, to edit
      slim recipes my.toml --check                   validate one
    """
    from slimcli.cli.display import Display
    from slimcli.files import check_writable, write_file
    from slimcli.recipe import FILES, find_recipe, summary_lines
    from slimcli.session.resolve import resolve

    display = Display(as_json)
    if not check:
        refuse_given("without --check: `slim train` and --check take it", "overrides")
    elif copy_to is not None:
        raise SlimError("--copy and --check are both given: choose one")
    if copy_to is None:
        refuse_given("without --copy", "force")
    if name is None:
        if copy_to is not None or check:
            raise SlimError("--copy and --check need the NAME of a recipe: `slim recipes` lists the built-in ones")
        lines = summary_lines()
        display.table(["Recipe", "About"], lines, left=True)
        display.document({"recipes": [{"name": name, "description": about} for name, about in lines]})
        return
    path = find_recipe(name)
    if check:
        recipe = resolve(str(path), "train", overrides, check=FILES).recipe
        count = len(recipe.stages)
        display.line(f"{path}: valid: {recipe.model.name}, {count} stage{'s' if count != 1 else ''}")
        display.document({"recipe": str(path), "valid": True, "resolved": recipe.model_dump(mode="json")})
    elif copy_to is not None:
        if copy_to.is_dir():
            copy_to = copy_to / path.name
        if copy_to.exists() and not force:
            raise SlimError(f"{copy_to}: is there already: choose another name, or --force to overwrite it")
        check_writable(copy_to, "file")
        write_file(copy_to, path.read_bytes())
        display.line(f"{copy_to} written: edit it, then `slim train {copy_to}`")
        display.document({"recipe": str(path), "copied_to": str(copy_to)})
    else:
        display.line(path.read_text(encoding="utf-8").rstrip())
        display.document({"recipe": str(path), "text": path.read_text(encoding="utf-8")})
