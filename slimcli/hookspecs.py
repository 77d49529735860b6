"""The whole plugin interface. A plugin is a module or object with any of these functions, marked `@slimcli.hookimpl`,
named by an entry point in the group `slim`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from slimcli.backbones.base import Backbone

hookspec = pluggy.HookspecMarker("slim")
hookimpl = pluggy.HookimplMarker("slim")


@hookspec
def slim_backbone_names() -> dict[str, str]:
    """The model families that this plugin serves, each with a line about it; shown by `slim plugins`."""
    raise NotImplementedError


@hookspec(firstresult=True)
def slim_build_model(name: str, pretrained: bool, args: dict[str, Any]) -> nn.Module | None:
    """Build the model called `name` (`args`: img_size, num_classes, ...); None if the name is not this plugin's."""
    raise NotImplementedError


@hookspec(firstresult=True)
def slim_backbone(model: nn.Module) -> Backbone | None:
    """Wrap `model` in the `Backbone` that tells slim how to run it; None if it is not this plugin's.

    Raise `slimcli.SlimError` with the reason for a model of this plugin's that cannot drop patches.
    """
    raise NotImplementedError
