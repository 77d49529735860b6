"""timm's ViTs on images of another size than they were built for, with the same weights."""

from __future__ import annotations

import copy
from typing import Any

from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from slimcli.backbones.base import Backbone


class Resizable(Backbone):
    """Embeds images of other sizes where timm can: it resamples the position embedding in every pass."""

    @property
    def resizes(self) -> bool:
        model: Any = self.model
        if isinstance(model, NaFlexVit):
            return True
        if not isinstance(model, (VisionTransformer, Eva)) or type(model.patch_embed) is not PatchEmbed:
            return False
        # a rotary table that was made for one grid stays that way
        return getattr(model, "rope", None) is None or model.dynamic_img_size

    def embed_resized(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        other = copy.copy(self)
        other.model = _of_any_size(self.model)
        return other.embed(images)


def _of_any_size(model: Any) -> nn.Module:
    """The model with the same modules and weights, told that its images have any size."""
    if isinstance(model, NaFlexVit) or model.dynamic_img_size:
        found: nn.Module = model
        return found
    # copies of two modules' attributes: their weights and the modules in them are the model's own
    other, patches = copy.copy(model), copy.copy(model.patch_embed)
    patches.strict_img_size, patches.flatten, patches.output_fmt = False, False, type(patches.output_fmt)("NHWC")
    other._modules = {**model._modules, "patch_embed": patches}
    other.dynamic_img_size = True
    return other
