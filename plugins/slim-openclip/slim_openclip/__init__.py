"""slim plugin for open_clip. open_clip itself is imported when a model asks for it."""

import sys

import slimcli

PREFIX = "openclip:"


@slimcli.hookimpl
def slim_backbone_names():
    return {"openclip:NAME": "open_clip's vision towers: image embeddings, or zero-shot classes with class texts"}


@slimcli.hookimpl
def slim_build_model(name, pretrained, args):
    if not name.startswith(PREFIX):
        return None
    from slim_openclip.tower import build_model

    return build_model(name.removeprefix(PREFIX), pretrained, args)


@slimcli.hookimpl
def slim_backbone(model):
    # a model of open_clip's cannot be here before open_clip is
    if "open_clip" not in sys.modules:
        return None
    from slim_openclip.backbone import find_backbone

    return find_backbone(model)


@slimcli.hookimpl
def slim_check_models():
    from slim_openclip.tower import small_models

    return small_models()
