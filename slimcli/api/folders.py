"""Write a model folder, which `slimcli.load` and every command read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimcli.device import DTYPES
from slimcli.errors import SlimError, check_word
from slimcli.files import check_writable
from slimcli.measure.profiling import random_images
from slimcli.measure.scores import pooled
from slimcli.plugins import build_model, find_backbone
from slimcli.slimming import SlimModel
from slimcli.store.model_folder import save_model


def save(
    model: SlimModel,
    folder: str | os.PathLike[str],
    *,
    model_name: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    plugin: str | None = None,
    dtype: str = "float32",
) -> Path:
    """Write a model folder that `load` and every command read: weights, schedule, class names and preprocessing.

    `model` may be on any device. How its dense model is built is known of one that was loaded or built by its name,
    and found out for timm's; before anything is written, one is built so and must predict the same. Returns the folder.

    Args:
        model: a slimmed model.
        folder: where to write; a model folder that is there is replaced.
        model_name: the dense model's name, as timm or a plugin calls it, where it cannot be found out.
        model_args: the arguments that it was built with, such as `{"num_classes": 5}`; plain JSON values.
        plugin: whose backbone is to run it, where several plugins know the model.
        dtype: how weights are stored: "float32", "bfloat16" or "float16".

    Raises:
        SlimError: where it cannot be told how the dense model is built, or the folder cannot be written.
    """
    if not isinstance(model, SlimModel):
        raise SlimError(f"model: {type(model).__name__} is no slimmed model: expected one of slim() or load()")
    check_word("dtype", dtype, DTYPES)
    if model_args is not None and model_name is None:
        raise SlimError("model_args: give model_name too, whose arguments they are")
    path = Path(folder)
    check_writable(path, "folder")
    if model_name is not None:
        built_from: Mapping[str, Any] = {"name": model_name, "args": dict(model_args or {})}
    else:
        built_from = model.built_from or _found_out(model)
    if plugin is not None:
        built_from = {**built_from, "backbone": plugin}
    reason = _differs(model, built_from)
    if reason is not None:
        raise SlimError(
            f"the model built as {_call(built_from)} {reason}: "
            "say how yours is built with model_name and model_args, so that it can be loaded again"
        )
    prepare = getattr(model._transform, "prepare", None)
    config = {
        "model": {**built_from, "args": dict(built_from["args"])},
        **({"preprocessing": prepare} if prepare is not None else {}),
        "class_names": model.class_names,
        "has_life_head": model.is_taught,
    }
    save_model(path, model, config, DTYPES[dtype], separate=True)
    return path


def _found_out(model: SlimModel) -> Mapping[str, Any]:
    """How a model of timm's was built, from what it says of itself."""
    found = getattr(model.model, "pretrained_cfg", None) or {}
    name = found.get("architecture") if isinstance(found, Mapping) else None
    if not name:
        raise SlimError(
            f"model: {type(model.model).__name__} does not say how it is built: name it with model_name and model_args"
        )
    args: dict[str, Any] = {"num_classes": model.architecture().num_outputs}
    size = model.backbone.image_size
    if tuple(size) != tuple(found.get("input_size", (3, 0, 0)))[1:]:
        args["img_size"] = size[0] if size[0] == size[1] else list(size)
    return {"name": name, "args": args}


@torch.inference_mode()
def _differs(model: SlimModel, built_from: Mapping[str, Any]) -> str | None:
    """How a dense model that is built as said differs from the model's; None if it predicts the same."""
    dense: nn.Module = build_model(built_from["name"], False, built_from.get("backbone"), **built_from["args"])
    # what kind of numbers these are does not matter: the answers are compared
    state = {name: value.detach().to("cpu", copy=True) for name, value in model.model.state_dict().items()}
    try:
        dense.load_state_dict(state)
    except RuntimeError as error:
        return f"has other weights ({str(error).splitlines()[-1].strip()})"
    twin = type(model.backbone)
    backbone = find_backbone(dense.eval(), built_from.get("backbone"))
    if type(backbone) is not twin:
        return f"is run as {type(backbone).__name__}, and this one as {twin.__name__}"
    weight = next(model.parameters())
    dense.to(weight.device, weight.dtype)
    images = random_images(model, 1, weight.device, weight.dtype)
    was_training = model.training
    model.eval()
    try:
        with model.running(mode="none"):
            own = pooled(model.logits(images)).float()
    finally:
        model.train(was_training)
    other = pooled(backbone.head(_tokens(backbone, images))).float()
    spread = float(own.abs().max().clamp(min=1e-6))
    tolerance = 1e-3 if weight.dtype == torch.float32 else 0.1
    return None if float((own - other).abs().max()) <= tolerance * spread else "predicts otherwise"


def _tokens(backbone: Any, images: torch.Tensor) -> torch.Tensor:
    tokens, positions = backbone.embed(images)
    for layer in range(1, backbone.depth + 1):
        tokens = backbone.block(layer, tokens, positions)
    found: torch.Tensor = tokens
    return found


def _call(built_from: Mapping[str, Any]) -> str:
    args = "".join(f", {name}={value!r}" for name, value in built_from["args"].items())
    return f"{built_from['name']!r}{args}"
