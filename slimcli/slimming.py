"""`slim`: a model that drops patches out of one that does not, by any of the methods."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from slimcli.data.transform import default_transform
from slimcli.errors import SlimError
from slimcli.methods.base import Method
from slimcli.methods.life import LifeModel
from slimcli.methods.slim_model import SlimModel
from slimcli.plugins import build_model, find_backbone, find_method
from slimcli.schedule import Schedule, check_whole, with_keep_rate

__all__ = ["LifeModel", "SlimModel", "rival", "slim"]


def slim(
    model: nn.Module | str,
    keep_rate: float | Sequence[tuple[int, float]] | Sequence[int] = 0.7,
    *,
    life_layer: int | None = None,
    drop_layers: Sequence[int] | None = None,
    temperature: float = 1.5,
    dead: str = "discard",
    plugin: str | None = None,
    method: str = "life",
) -> SlimModel:
    """Make a model drop patches: `slim(timm.create_model("deit_small_patch16_224", pretrained=True))`.

    The life head starts untrained: run `slim calibrate` or `slim train` before expecting accuracy.

    Args:
        model: a model that an installed plugin serves, or the name of one (built with pretrained weights).
        keep_rate: the fraction of patches kept after each drop layer; or (layer, keep rate) pairs; or N_1..N_L.
        life_layer: the block, counted from 1, whose output the life head reads; a third of the depth by default.
        drop_layers: the blocks after which patches leave; by default three, spread evenly from `life_layer` on.
        temperature: U of the soft weight in training.
        dead: what becomes of a patch whose life is over: "discard", or "heir": it is added to the one most like it.
        plugin: which plugin's backbone to take, where two of them know the model.
        method: the rule by which patches leave: "life", or another that `slim plugins` lists.

    Raises:
        SlimError: for a model that cannot drop patches, with the reason, and for an impossible schedule.
    """
    built_from = None
    if isinstance(model, str):
        built_from = {"name": model, "args": {}, **({"backbone": plugin} if plugin is not None else {})}
        model = build_model(model, pretrained=True, plugin=plugin)
    backbone = find_backbone(model, plugin)
    life_layer = backbone.life_layer if life_layer is None else check_whole(life_layer, "life layer")
    layers = backbone.drop_layers(life_layer) if drop_layers is None else drop_layers
    schedule = with_keep_rate(Schedule.uniform(backbone.depth, 1.0, life_layer, layers), keep_rate)
    slimmed = find_method(method)(backbone, schedule, temperature)
    slimmed.configure({"dead": dead})
    slimmed.describe(built_from=built_from, transform=default_transform(backbone), taught=False)
    return slimmed


def rival(name: str, model: SlimModel) -> Method:
    """The method called `name` on the dense model of `model`, weights shared; `SlimError` if it is no `Method`."""
    kind = find_method(name)
    if not issubclass(kind, Method):
        raise SlimError(f"the method {name!r} is what the others are compared with: name another one")
    found = kind(model.backbone, model.schedule)
    found.describe_as(model)
    return found
