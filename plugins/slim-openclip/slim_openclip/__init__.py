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


def as_openclip(slimmed, *, patches="all"):
    """A slimmed tower in the place of its dense one: `clip.visual = as_openclip(slimmed)`.

    `encode_image` and `forward_intermediates` of the model then answer as they did, in the dense tower's shapes, with
    all N patches in raster order: those that left are put back as `slimmed.restoring` says.

    Args:
        slimmed: what `slimcli.slim` made of a vision tower of open_clip's, or a run of one that `slimcli.load` opened.
        patches: "all", or "living": intermediates are (B, n, D), of the n patches that live to the end alone, and
            their places in raster order are "image_positions" (B, n).

    Raises:
        SlimError: for a model that is not open_clip's, and, when it is asked for features, a method that does not say
            where its patches go.
    """
    from slim_openclip.surface import OpenClipTower

    return OpenClipTower(slimmed, patches)
