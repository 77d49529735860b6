"""The classifier that a training starts from, and the classes that it was trained for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from slimcli.data import ImageSamples, StreamedImages, match_classes
from slimcli.errors import SlimError
from slimcli.session.targets import Target
from slimcli.store.model_folder import read_config
from slimcli.store.run_folder import CONFIG, WEIGHTS

Images = ImageSamples | StreamedImages


def match_classifier(
    target: Target, train: Images, val: Images, log: Callable[[str], None] = lambda _line: None
) -> tuple[Images, Images]:
    """The images with the classes of the weights that a target started from, where those say what their classes are.

    The same classes in another order, and some of the model's, are mapped by name. For other classes the classifier
    of the weights means nothing: it starts untrained, as one for another number of classes does. Both are told to
    `log`. Where the model knows no names, its classes and the data's must be as many.

    Raises:
        SlimError: where they differ and the classifier has no weights that could start anew, or a class map was given.
    """
    recipe = target.recipe
    weights = recipe.model.weights if recipe is not None and target.has_classifier else None
    class_map = recipe.data.class_map if recipe is not None else None
    names = None
    if weights is not None and weights.name == WEIGHTS and (weights.parent / CONFIG).is_file():
        names = read_config(weights.parent).get("class_names")
    outputs = target.model.architecture().num_outputs
    try:
        matched, note = match_classes(train, names, outputs, class_map)
        val, _ = match_classes(val, names, outputs, class_map)
    except SlimError:
        if names is None or class_map or not _reset(target.model.model, target.model.backbone.classifier_names):
            raise
        log(f"{weights} is of other classes ({', '.join(names[:5])}): its classifier is left out")
        target.has_classifier = False
        return train, val
    if note is not None:
        log(note)
    return matched, val


def _reset(model: Any, names: Sequence[str]) -> bool:
    """Give the layers of a classifier random weights; whether it has any that can be."""
    modules = [getattr(model, name) for name in names if isinstance(getattr(model, name, None), nn.Module)]
    layers = [layer for module in modules for layer in module.modules() if hasattr(layer, "reset_parameters")]
    for layer in layers:
        layer.reset_parameters()
    return bool(layers)
