"""What timm reads of a model folder: `timm.create_model("local-dir:FOLDER")` and `hf-hub:owner/name`."""

from __future__ import annotations

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
