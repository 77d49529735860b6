"""The hooks of the built-in plugin for timm's Vision Transformers. timm itself is imported when first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimcli.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from slimcli.backbones.base import Backbone


@hookimpl
def slim_backbone_names() -> dict[str, str]:
    return {
        "vit_*": "timm's ViTs: ImageNet, DINOv2, DINOv3, MAE, CLIP, SigLIP, with or without registers and rope",
        "deit_*": "DeiT, with and without distillation token",
        "deit3_*": "DeiT III",
        "beit*": "BEiT and BEiT v2",
        "eva*": "EVA and EVA-02",
        "cait_*": "CaiT",
        "naflexvit_*": "NaFlex ViT on images of one size",
        "digits_vit": "the small ViT that comes with slim",
    }


@hookimpl
def slim_build_model(name: str, pretrained: bool, args: dict[str, Any]) -> nn.Module | None:
    from slimcli.backbones import timm_vit

    return timm_vit.build_model(name, pretrained, args)


@hookimpl
def slim_check_models() -> dict[str, Callable[[], nn.Module]]:
    from slimcli.backbones import timm_families

    return timm_families.small_models()


@hookimpl
def slim_similar_names(name: str) -> list[str]:
    from slimcli.backbones import timm_names

    return timm_names.similar_names(name)


@hookimpl
def slim_backbone(model: nn.Module) -> Backbone | None:
    from slimcli.backbones import timm_families

    return timm_families.backbone(model)
