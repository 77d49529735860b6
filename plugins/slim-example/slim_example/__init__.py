"""slim plugin: which models it knows. What is heavy is imported when it is needed."""

import slimcli


@slimcli.hookimpl
def slim_backbone_names():
    return {"example_tiny": "a tiny ViT written from scratch"}


@slimcli.hookimpl
def slim_build_model(name, pretrained, args):
    from slim_example.model import TinyViT

    if name != "example_tiny":
        return None
    if pretrained:
        raise slimcli.SlimError("example_tiny has no pretrained weights: give a weights file (model.weights)")
    return TinyViT(**args)


@slimcli.hookimpl
def slim_backbone(model):
    from slim_example.backbone import TinyBackbone
    from slim_example.model import TinyViT

    return TinyBackbone(model) if isinstance(model, TinyViT) else None


@slimcli.hookimpl
def slim_check_models():
    from slim_example.model import TinyViT

    return {"example_tiny": TinyViT}
