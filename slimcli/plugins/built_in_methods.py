"""The hooks of the built-in methods. torch is imported when they are first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimcli.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from slimcli.methods.slim_model import SlimModel


@hookimpl
def slim_register_methods(register: Callable[[str, type[SlimModel], str], None]) -> None:
    from slimcli.methods.a_vit import AViT
    from slimcli.methods.atc import ATC, ATCComplete
    from slimcli.methods.diffrate import DiffRate
    from slimcli.methods.dynamicvit import DynamicViT
    from slimcli.methods.evit import EViT, EViTNoFuse
    from slimcli.methods.evo_vit import EvoViT
    from slimcli.methods.ia_red2 import IARed2
    from slimcli.methods.life import LifeModel
    from slimcli.methods.pitome import PiToMe
    from slimcli.methods.random_discard import RandomDiscard
    from slimcli.methods.resize import Resize
    from slimcli.methods.tofu import ToFu
    from slimcli.methods.tome import ToMe

    register("life", LifeModel, "lives predicted once, then the patches are sorted and sliced")
    register("evit", EViT, "the class token's attention at each drop layer; the rest becomes one token")
    register("evit-nofuse", EViTNoFuse, "the class token's attention at each drop layer; the rest is discarded")
    register("dynamicvit", DynamicViT, "a learned score at each drop layer")
    register("tome", ToMe, "similar tokens are merged in every block")
    register("pitome", PiToMe, "patches that are like many others are merged in every block")
    register("tofu", ToFu, "similar patches are dropped in early blocks, merged in late ones")
    register("atc", ATC, "agglomerative clustering at each drop layer, average linkage; on the CPU")
    register("atc-complete", ATCComplete, "agglomerative clustering at each drop layer, complete linkage; on the CPU")
    register("diffrate", DiffRate, "pruned and merged by class attention in every block, as many as learned")
    register("evo-vit", EvoViT, "few patches are updated, the others move along with one token")
    register("a-vit", AViT, "halting scores off one channel add up until a patch is done")
    register("ia-red2", IARed2, "an interpreter at each drop layer, taught by a reward, says which patches inform")
    register("random", RandomDiscard, "random patches leave at each drop layer")
    register("resize", Resize, "no patch leaves: the same model on a smaller image")
