"""The preprocessing of a model as a function of one image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from PIL import Image
from torch import Tensor

from slimcli.backbones.base import Backbone
from slimcli.data.loaders import eval_transform, preprocessing
from slimcli.data.read import read_image
from slimcli.errors import SlimError
from slimcli.recipe import DataSection


@dataclass(frozen=True)
class ImageTransform:
    """From an image, or a file that holds one, to the tensor (3, H, W) that a model takes; see `SlimModel.transform`.

    `prepare` says how, as `config.json` has it under `preprocessing`.
    """

    prepare: dict[str, Any]

    def __call__(self, image: Image.Image | Path | str | IO[bytes]) -> Tensor:
        channels = self.prepare["input_size"][0]
        if channels != 3:
            raise SlimError(f"the model takes images of {channels} channels, and this makes RGB ones: prepare your own")
        upright = read_image(Path(image) if isinstance(image, str) else image)
        found: Tensor = self._prepared(upright)
        return found

    @cached_property
    def _prepared(self) -> Callable[[Image.Image], Tensor]:
        return eval_transform(self.prepare)


def default_transform(backbone: Backbone, kept: dict[str, Any] | None = None) -> ImageTransform | None:
    """The transform of a model: as it was saved, `kept`, or as its library prepares images; the size is the model's.

    None where the model does not say how images are prepared.
    """
    try:
        own = preprocessing(backbone.preprocessing(), DataSection())
    except (SlimError, KeyError):
        return None
    return ImageTransform({**own, **(kept or {}), "input_size": own["input_size"]})
