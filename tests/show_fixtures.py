"""Model folders and photographs for the tests of pictures and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from conftest import tiny_vit
from PIL import Image

from slimcli.plugins import find_backbone
from slimcli.schedule import Schedule
from slimcli.slimming import LifeModel
from slimcli.store.model_folder import save_model

#: how `tiny_vit` is built again from its name
TINY_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}


def tiny_slim(keep_rate: float = 0.5, layers: tuple[int, ...] = (1, 2, 3), **changes: Any) -> LifeModel:
    """A random slimmed ViT whose lives differ from patch to patch."""
    model = LifeModel(find_backbone(tiny_vit(**changes)), Schedule.uniform(4, keep_rate, 1, layers))
    torch.manual_seed(1)
    # what the image holds decides, not what is the same in all of them: biases, and a random class token
    for name, parameter in model.model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.constant_(parameter, float(name.endswith("weight")))
    if model.model.cls_token is not None:
        torch.nn.init.zeros_(model.model.cls_token)
    torch.nn.init.normal_(model.model.patch_embed.proj.weight, std=1.0)
    for parameter in model.life_head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def save_tiny(folder: Path, keep_rate: float = 0.5, data: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A model folder of `tiny_slim`."""
    model = tiny_slim(keep_rate, **changes)
    args = {**TINY_ARGS, **changes}
    config: dict[str, Any] = {
        "model": {"name": "vit_tiny_patch16_224", "args": args},
        "preprocessing": {**model.backbone.preprocessing(), "crop_pct": 1.0},
        "class_names": [str(digit) for digit in range(10)] if args["num_classes"] else None,
    }
    if data is not None:
        config["data"] = data
    save_model(folder, model, config)
    return folder


def photograph(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth picture in which every region has a colour of its own."""
    y, x = numpy.mgrid[0:height, 0:width]
    pixels = numpy.stack([255 * x / width, 255 * y / height, numpy.full_like(x, 37 * seed % 256)], axis=-1)
    return Image.fromarray(pixels.astype(numpy.uint8))
