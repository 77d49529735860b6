"""Builds transformers' models by name."""

from functools import partial
from pathlib import Path

import slimcli
import torch
import transformers

from slim_transformers.backbone import BACKBONES, Body

#: which class a model type has where its configuration names none
CLASSES = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
    "beit": "BeitForImageClassification",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip_vision_model": "SiglipVisionModel",
    "clip": "CLIPForImageClassification",
    "siglip": "SiglipForImageClassification",
}


def build_model(name, pretrained, args):
    """The model in a folder, on the hub, or of a model type; `args` are img_size, num_classes and config fields."""
    args = dict(args)
    fields = {"image_size": args.pop("img_size", None), "num_labels": args.pop("num_classes", None), **args}
    fields = {key: value for key, value in fields.items() if value is not None}
    by_type = name in CLASSES and not Path(name).is_dir()
    try:
        if by_type:
            config = transformers.AutoConfig.for_model(name, **fields)
        else:
            config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise slimcli.SlimError(
            f"hf:{name}: {first}; expected a folder with a config.json, a name on the hub, or {', '.join(CLASSES)}"
        ) from error
    # a body in a folder is loaded with a classifier, to be trained; one that slim saved says itself what it is
    kind = _model_class(config, name, bodies=by_type)
    if by_type:
        if pretrained:
            raise slimcli.SlimError(f"hf:{name} is a model type and has no weights: give a folder or a hub name")
        return kind(config).eval()
    if not pretrained:
        _set(config, fields)
        return kind(config).eval()
    wanted = fields.pop("image_size", None)
    own = getattr(config, "vision_config", config).image_size
    if wanted is not None and wanted != own:
        raise slimcli.SlimError(f"hf:{name} was trained for {own} px and keeps that size: leave img_size out")
    transformers.utils.logging.disable_progress_bar()
    try:
        # a classifier for another number of classes starts anew
        model = kind.from_pretrained(name, dtype=torch.float32, ignore_mismatched_sizes=True, **fields)
    except OSError as error:
        raise slimcli.SlimError(f"hf:{name}: its weights cannot be had: {str(error).splitlines()[0]}") from error
    return model.eval()


def _model_class(config, name, bodies):
    names = [*(config.architectures or []), CLASSES.get(config.model_type, "")]
    for found in names:
        kind = getattr(transformers, found, None) if found else None
        if kind in BACKBONES and (bodies or not issubclass(BACKBONES[kind], Body)):
            return kind
    served = ", ".join(sorted(kind.__name__ for kind in BACKBONES))
    raise slimcli.SlimError(f"hf:{name} is a {names[0] or config.model_type}: served are {served}")


def _set(config, fields):
    for key, value in fields.items():
        setattr(getattr(config, "vision_config", config) if key == "image_size" else config, key, value)


def small_models():
    """Builders of a small random model of every kind."""
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    size |= {"image_size": 32, "patch_size": 8}

    def plain(kind, config, **fields):
        return kind(config(**size, num_labels=5, **fields)).eval()

    def with_vision(kind, config, **fields):
        return kind(config(vision_config=size, num_labels=5, **fields)).eval()

    beit = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1}
    return {
        "ViTForImageClassification": partial(plain, transformers.ViTForImageClassification, transformers.ViTConfig),
        "DeiTForImageClassification": partial(plain, transformers.DeiTForImageClassification, transformers.DeiTConfig),
        "DeiTForImageClassificationWithTeacher": partial(
            plain, transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig
        ),
        "Dinov2ForImageClassification": partial(
            plain, transformers.Dinov2ForImageClassification, transformers.Dinov2Config, mlp_ratio=2
        ),
        "Dinov2WithRegistersForImageClassification": partial(
            plain,
            transformers.Dinov2WithRegistersForImageClassification,
            transformers.Dinov2WithRegistersConfig,
            mlp_ratio=2,
        ),
        "BeitForImageClassification": partial(
            plain, transformers.BeitForImageClassification, transformers.BeitConfig, **beit
        ),
        "BeitForImageClassification, shared": partial(
            plain,
            transformers.BeitForImageClassification,
            transformers.BeitConfig,
            use_shared_relative_position_bias=True,
            use_mean_pooling=False,
        ),
        "Dinov2Model": partial(plain, transformers.Dinov2Model, transformers.Dinov2Config, mlp_ratio=2),
        "CLIPVisionModel": partial(plain, transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
        "CLIPVisionModelWithProjection": partial(
            plain, transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig, projection_dim=16
        ),
        "CLIPForImageClassification": partial(
            with_vision, transformers.CLIPForImageClassification, transformers.CLIPConfig
        ),
        "SiglipVisionModel": partial(plain, transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
        "SiglipForImageClassification": partial(
            with_vision, transformers.SiglipForImageClassification, transformers.SiglipConfig
        ),
    }


def small_bodies():
    """Builders of small random models without a classifier, whose blocks are those of `small_models`."""
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}

    def plain(kind, config, **fields):
        return kind(config(**size, **fields)).eval()

    dinov2, registers = transformers.Dinov2Config, transformers.Dinov2WithRegistersConfig
    beit = {"intermediate_size": 64, "use_relative_position_bias": True, "layer_scale_init_value": 0.1}
    return {
        "ViTModel": partial(plain, transformers.ViTModel, transformers.ViTConfig, intermediate_size=64),
        "DeiTModel": partial(plain, transformers.DeiTModel, transformers.DeiTConfig, intermediate_size=64),
        "Dinov2Backbone": partial(plain, transformers.Dinov2Backbone, dinov2, mlp_ratio=2),
        "Dinov2WithRegistersModel": partial(plain, transformers.Dinov2WithRegistersModel, registers, mlp_ratio=2),
        "Dinov2WithRegistersBackbone": partial(plain, transformers.Dinov2WithRegistersBackbone, registers, mlp_ratio=2),
        "BeitModel": partial(plain, transformers.BeitModel, transformers.BeitConfig, **beit),
        "BeitBackbone": partial(plain, transformers.BeitBackbone, transformers.BeitConfig, **beit),
    }
