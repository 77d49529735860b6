"""What a slimmed model knows of itself beside its weights: its classes, its preprocessing, how it is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimcli.errors import SlimError

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from slimcli.schedule import Architecture

    #: what `SlimModel.transform` gives: from an image, or a file that holds one, to a tensor (3, H, W)
    Transform = Callable[[Image.Image | Path | str | IO[bytes]], Tensor]


class Described:
    """The part of `SlimModel` that remembers what the weights do not say; copies of a model remember it too."""

    #: how the dense model is built, {"name", "args"} and a plugin's "backbone"; None where nobody said
    built_from: Mapping[str, Any] | None = None
    #: parameters of `selector` from before it was taught; None where it is taught
    _untaught: Sequence[Tensor] | None = None
    _class_names: Sequence[str] | None = None
    _transform: Transform | None = None

    if TYPE_CHECKING:

        def architecture(self) -> Architecture: ...

        @property
        def selector(self) -> nn.Module: ...

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, in the order of the logits; None where they are not known. May be set.

        Raises `SlimError` when it is set to another number of names than the model has classes.
        """
        names = self._class_names
        # a classifier that was replaced has other classes
        return None if names is None or len(names) != self.architecture().num_outputs else list(names)

    @class_names.setter
    def class_names(self, names: Sequence[str] | None) -> None:
        outputs = self.architecture().num_outputs
        if names is not None and len(names) != outputs:
            raise SlimError(f"class_names: {len(names)} names for a model of {outputs} classes: give one for each")
        self._class_names = None if names is None else [str(name) for name in names]

    def transform(self) -> Transform:
        """The saved preprocessing: a function from an image to the tensor (3, H, W) that the model takes.

        It takes an image of Pillow's of any mode, or a path or an open file. As `slim eval` does, it turns the image
        as its EXIF tag asks, makes it RGB, resizes, crops and normalises it:
        `model(model.transform()("photo.jpg").unsqueeze(0))`.

        Raises:
            SlimError: where the preprocessing is not known, or the model does not take RGB images.
        """
        if self._transform is None:
            raise SlimError(
                "the preprocessing of this model is not known: a model of slimcli.slim or slimcli.load knows its own"
            )
        return self._transform

    @property
    def is_taught(self) -> bool:
        """Whether what the method learns beside the backbone, such as the life head, differs from how it began."""
        if self._untaught is None:
            return True
        now = _rounded(self.selector)
        return len(now) != len(self._untaught) or not all(map(torch.equal, now, self._untaught))

    def describe(
        self,
        *,
        built_from: Mapping[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
        transform: Transform | None = None,
        taught: bool = True,
    ) -> None:
        """Say what is known of the model; names that are not one for each class are left out."""
        self.built_from = built_from
        self._transform = transform
        known = class_names is not None and len(class_names) == self.architecture().num_outputs
        self._class_names = list(class_names) if class_names is not None and known else None
        self._untaught = None if taught else (_rounded(self.selector) or None)

    def describe_as(self, other: Described) -> None:
        """Say what is known of `other`, which has the same dense model."""
        self.built_from, self._transform, self._class_names = other.built_from, other._transform, other._class_names


def _rounded(module: nn.Module) -> list[Tensor]:
    # what a cast to half precision and back does not change
    return [parameter.detach().to("cpu", torch.bfloat16) for parameter in module.parameters()]
