"""What timm reads of a model folder: `timm.create_model("local-dir:FOLDER")` and `hf-hub:owner/name`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

#: of a model's own configuration what says where weights come from, or how somebody else prepared images
_NOT_KEPT = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "test_input_size",
             "test_crop_pct", "label_names", "label_descriptions", "label_offset", "architecture", "tag")  # fmt: skip


def timm_config(model: nn.Module, name: str, args: Mapping[str, Any], prepare: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json by which timm builds a model and prepares images; none where the model is not timm's."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        return {}
    if not timm.model_entrypoint(architecture).__module__.startswith("timm."):
        return {}
    classes = int(getattr(model, "num_classes", 0))
    own = {key: value for key, value in getattr(model, "pretrained_cfg", {}).items() if key not in _NOT_KEPT}
    images = {key: value for key, value in prepare.items() if value is not None}
    return {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": getattr(model, "num_features", None),
        "model_args": {"num_classes": classes, **args},
        "pretrained_cfg": {**own, **images, "num_classes": classes},
    }


def plain_architecture(model: nn.Module, name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """{"name", "args"} of a model that was built from the hub or a folder of timm's, by its architecture alone."""
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return {"name": name, "args": dict(args)}
    known = {key: value for key, value in getattr(model, "_model_args", {}).items() if not key.startswith("pretrained")}
    classes = {"num_classes": int(getattr(model, "num_classes", 0))}
    return {"name": str(getattr(model, "pretrained_cfg", {})["architecture"]), "args": {**classes, **known, **args}}


def base_model(model: nn.Module) -> str | None:
    """The repository on the hub that a model's pretrained weights come from; None where it is not known."""
    found = str((getattr(model, "pretrained_cfg", None) or {}).get("hf_hub_id") or "").partition("@")[0]
    return found if re.fullmatch(r"[\w.-]+/[\w.-]+", found) else None
