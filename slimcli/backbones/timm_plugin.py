"""The hooks of the built-in plugin for timm's plain Vision Transformers. timm itself is imported when first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimcli.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from slimcli.backbones.base import Backbone


@hookimpl
def slim_backbone_names() -> dict[str, str]:
    return {
        "vit_*": "timm's plain ViTs: ImageNet, DINOv2, MAE, CLIP and SigLIP vision towers, with or without registers",
        "deit_*": "DeiT, with and without distillation token",
        "deit3_*": "DeiT III",
        "digits_vit": "the small ViT that comes with slim",
    }


@hookimpl
def slim_build_model(name: str, pretrained: bool, args: dict[str, Any]) -> nn.Module | None:
    from slimcli.backbones import timm_vit

    return timm_vit.build_model(name, pretrained, args)


@hookimpl
def slim_backbone(model: nn.Module) -> Backbone | None:
    from slimcli.backbones import timm_vit

    return timm_vit.backbone(model)
