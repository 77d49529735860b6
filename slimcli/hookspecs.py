"""The whole plugin interface. A plugin is a module or object with any of these functions, marked `@slimcli.hookimpl`,
named by an entry point in the group `slim`. How a model runs is what the `Backbone` that it returns says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click
    from torch import nn
    from torch.utils.data import Dataset

    from slimcli.backbones.base import Backbone
    from slimcli.methods.slim_model import SlimModel

hookspec = pluggy.HookspecMarker("slim")
hookimpl = pluggy.HookimplMarker("slim")


@hookspec
def slim_backbone_names() -> dict[str, str]:
    """The model families that this plugin serves, each with a line about it; shown by `slim plugins`."""
    raise NotImplementedError


@hookspec
def slim_build_model(name: str, pretrained: bool, args: dict[str, Any]) -> nn.Module | None:
    """Build the model called `name` (`args`: img_size, num_classes, ...); None if the name is not this plugin's."""
    raise NotImplementedError


@hookspec
def slim_similar_names(name: str) -> list[str]:
    """Names of this plugin's models that come near to `name`, for the error that nobody knows it."""
    raise NotImplementedError


@hookspec
def slim_backbone(model: nn.Module) -> Backbone | None:
    """Wrap `model` in the `Backbone` that tells slim how to run it; None if it is not this plugin's.

    Raise `slimcli.SlimError` with the reason for a model of this plugin's that cannot drop patches.
    """
    raise NotImplementedError


@hookspec
def slim_check_models() -> dict[str, Callable[[], nn.Module]]:
    """Small models with random weights, by name, that `slim plugins check` builds and proves the backbone on."""
    raise NotImplementedError


@hookspec
def slim_datasets() -> dict[str, str]:
    """The data sets that this plugin opens by name (`data.name` in a recipe), each with a line about it."""
    raise NotImplementedError


@hookspec
def slim_open_dataset(name: str, root: Path | None, split: str, train: bool) -> Dataset[Any]:
    """Open one of them: items are (PIL image, class), and `classes` lists the class names, if there are any."""
    raise NotImplementedError


@hookspec
def slim_register_methods(register: Callable[[str, type[SlimModel], str], None]) -> None:
    """Add rules by which patches leave: call `register(name, class, a line about it)` for each; see docs/methods.md."""
    raise NotImplementedError


@hookspec
def slim_runtimes() -> list[type[Any]]:
    """Where models run: classes made from `slimcli.runtimes.Runtime`, for `slim export --to` and `--runtime`."""
    raise NotImplementedError


@hookspec
def slim_commands() -> dict[str, click.Command]:
    """Subcommands of `slim`, by name. Import what is heavy inside the command."""
    raise NotImplementedError
