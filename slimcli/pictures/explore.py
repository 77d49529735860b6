"""A page to play with: where every patch of an image goes, at each keep rate and after each block."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from matplotlib.colors import rgb2hex
from PIL import Image
from torch import Tensor

from slimcli.errors import SlimError
from slimcli.files import write_file
from slimcli.layout import optimize
from slimcli.measure.evaluation import pooled
from slimcli.pictures.geometry import Geometry, predicts_lives
from slimcli.pictures.outcome import ClassMaps, Guess, Outcome
from slimcli.pictures.pixels import class_colour, class_map_image, picture
from slimcli.pictures.words import class_name, short_name
from slimcli.slimming import SlimModel

if TYPE_CHECKING:
    from slimcli.pictures.drawing import Style

#: what the slider goes over
KEEP_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
#: smaller images are kept exactly, larger ones as photographs
EXACT = 128
QUALITY = 88


@dataclass(frozen=True)
class Scene:
    """An image and, for each keep rate, what became of its patches: as the page reads it."""

    outcome: Outcome
    document: dict[str, Any]
    #: those that its class maps have
    classes: frozenset[int] = frozenset()


@torch.inference_mode()
def look_closely(model: SlimModel, outcome: Outcome, style: Style, device: torch.device, dtype: torch.dtype) -> Scene:
    """Run an image at every one of `KEEP_RATES` that the model can have, and note who stands for each patch."""
    model = optimize(predicts_lives(model).to(device, dtype).eval())
    images = outcome.image.unsqueeze(0).to(device, dtype)
    names, seen = style.class_names, outcome.maps
    rates, slim_maps = [], []
    for rate in KEEP_RATES:
        try:
            schedule = model.at_keep_rate(rate)
        except SlimError:  # below what this schedule can have
            continue
        with model.running(mode="hard", schedule=schedule):
            logits, stages = model.logits_and_stand_ins(images)
            life = model.life
            maps = None if seen is None else replace(seen, slim=model.segment(images).argmax(dim=1)[0].cpu())
        slim_maps += [] if maps is None else [maps]
        rates.append(
            {
                "rate": rate,
                "cost": round(model.multiply_adds(schedule) / 1e9, 7),
                "slim": _guess(_best(pooled(logits)), names) if outcome.slim is not None else None,
                "life": None if life is None else [round(value, 1) for value in life[0].tolist()],
                "stages": [{"after": layer, "by": stands[0].tolist()} for layer, stands in stages],
                "map": None if maps is None else _slim_map(maps),
            }
        )
    pixels = Image.fromarray(picture(outcome, style.prepare))
    return Scene(
        outcome,
        {
            "name": short_name(outcome.name),
            "size": list(pixels.size),
            "image": _data_url(pixels),
            "dense": _guess(outcome.dense, names),
            "maps": None if seen is None else _still_maps(seen),
            "rates": rates,
        },
        frozenset(
            index for maps in slim_maps for each in _all(maps) for index in numpy.unique(each).tolist() if index >= 0
        ),
    )


def _best(logits: torch.Tensor) -> Guess:
    value, index = logits.float().softmax(dim=-1)[0].max(dim=-1)
    return Guess(int(index), float(value))


def _guess(guess: Guess | None, names: Sequence[str] | None) -> dict[str, Any] | None:
    if guess is None:
        return None
    return {"class": class_name(guess.index, names), "probability": round(guess.probability, 4)}


def _slim_map(maps: ClassMaps) -> dict[str, Any]:
    """The slimmed model's class map, and the shares of pixels that are as the dense model's and right."""
    return {"image": _data_url(class_map_image(maps.slim)), "same": maps.same, "right": maps.right(maps.slim)}


def _still_maps(maps: ClassMaps) -> dict[str, Any]:
    """The class maps that are the same at every keep rate: the dense model's, and the labels where they are known."""
    labels = None if maps.truth is None else _data_url(class_map_image(maps.truth))
    return {
        "labels": labels,
        "dense": {"image": _data_url(class_map_image(maps.dense)), "right": maps.right(maps.dense)},
    }


def _all(maps: ClassMaps) -> list[Tensor]:
    return [maps.dense, maps.slim, *([] if maps.truth is None else [maps.truth])]


def _legend(scenes: Sequence[Scene], names: Sequence[str] | None) -> list[dict[str, str]]:
    """The classes that the class maps of `scenes` have, and their colours."""
    found = sorted(frozenset().union(*(scene.classes for scene in scenes)))
    return [{"class": class_name(index, names), "colour": rgb2hex(class_colour(index))} for index in found]


def _data_url(pixels: Image.Image) -> str:
    # a class map has few colours, and edges
    exact = max(pixels.size) <= EXACT or pixels.mode == "P"
    file = io.BytesIO()
    if exact:
        pixels.save(file, "PNG")
    else:
        pixels.save(file, "JPEG", quality=QUALITY)
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def page_of(
    scenes: Sequence[Scene], geometry: Geometry, model_name: str, class_names: Sequence[str] | None = None
) -> str:
    """The page of `scenes`: one document that needs no network. `class_names` are for the legend of class maps."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(loader=PackageLoader("slimcli.pictures", "."), autoescape=select_autoescape(default=True))
    document = {
        "grid": geometry.grid,
        "corner": geometry.top_left,
        "cell": geometry.cell,
        "depth": geometry.depth,
        "scenes": [scene.document for scene in scenes],
        "legend": _legend(scenes, class_names),
    }
    return environment.get_template("explore.html.jinja").render(title=f"Patches of {model_name}", document=document)


def write_page(
    path: Path,
    scenes: Sequence[Scene],
    geometry: Geometry,
    model_name: str,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write the page of `scenes`, see `page_of`, to `path`."""
    write_file(path, page_of(scenes, geometry, model_name, class_names).encode("utf-8", "replace"))
