"""A recipe that a user names, with what was set instead."""

from __future__ import annotations

from collections.abc import Sequence

from slimcli.recipe import FILES, Recipe, find_recipe
from slimcli.session.resolve import resolve
from slimcli.session.session import choose_data


def read_recipe(
    name: str,
    command: str,
    overrides: Sequence[str] = (),
    precision: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    class_map: str | None = None,
) -> Recipe:
    """The recipe called `name`, a file or a built-in one, for `command`, one of `resolve.WITHOUT_EFFECT`.

    `overrides` are FIELD=VALUE; `limit` validation images are used; `class_map` is a file or A=B,...

    Raises:
        SlimError: where it is wrong, or what it names is not there.
    """
    resolved = resolve(str(find_recipe(name)), command, overrides, precision=precision, check=FILES)
    section = choose_data(resolved, None, None, limit, batch_size, class_map)
    return resolved.recipe if section is None else resolved.recipe.model_copy(update={"data": section})
