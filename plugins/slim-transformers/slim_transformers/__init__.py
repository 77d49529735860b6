"""slim plugin for Hugging Face transformers. transformers itself is imported when a model asks for it."""

import sys

import slimcli

PREFIX = "hf:"


@slimcli.hookimpl
def slim_backbone_names():
    return {
        "hf:FOLDER, hf:OWNER/MODEL": "ViT, DeiT, DINOv2, BEiT, CLIP and SigLIP vision models of transformers",
        "hf:TYPE": "the same with random weights, by their model type (vit, deit, dinov2, beit, ...)",
    }


@slimcli.hookimpl
def slim_build_model(name, pretrained, args):
    if not name.startswith(PREFIX):
        return None
    from slim_transformers.build import build_model

    return build_model(name.removeprefix(PREFIX), pretrained, args)


@slimcli.hookimpl
def slim_backbone(model):
    # a model of transformers' cannot be here before transformers is
    if "transformers" not in sys.modules:
        return None
    from slim_transformers.backbone import find_backbone

    return find_backbone(model)


@slimcli.hookimpl
def slim_check_models():
    from slim_transformers.build import small_models

    return small_models()
