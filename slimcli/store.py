"""Model folders on disk: safetensors weights and a config.json, written whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from slimcli.errors import SlimError
from slimcli.files import write_file, write_json
from slimcli.plugins import build_model, find_backbone, find_method
from slimcli.runs import CONFIG, WEIGHTS
from slimcli.schedule import Schedule
from slimcli.slimming import SlimModel

LIFE_HEAD = "life_head."
MODEL = "model."


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pth that holds tensors alone; never runs code from the file."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for key in ("state_dict", "model", "model_ema"):
                if isinstance(state, dict) and isinstance(state.get(key), dict):
                    state = state[key]
    except pickle.UnpicklingError as error:
        raise SlimError(
            f"{path}: refused, because it is not a plain file of tensors and could run code: "
            "convert it to .safetensors where it comes from"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise SlimError(f"{path}: is damaged or not a weights file ({error}): get it again") from error
    except OSError as error:
        raise SlimError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SlimError(f"{path}: expected named tensors, found something else")
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


class Loaded(NamedTuple):
    """Whether a weights file held what the model's method learns, and a classifier, beside the backbone's blocks."""

    life_head: bool
    classifier: bool


def load_weights(model: SlimModel, path: Path) -> Loaded:
    """Load a weights file of the dense model, or of a slimmed one; say whether it held classifier and life head.

    Position embeddings are resampled where the image size differs. A missing or differing classifier is left
    as it is, with the rest loaded; anything else that does not fit is a `SlimError`.
    """
    state = read_weights(path)
    own = f"{model.selector_name}."
    # the weights of a model slimmed by its lives serve every other method too
    dense = {name: value for name, value in state.items() if not name.startswith((LIFE_HEAD, own))}
    head = {name.removeprefix(own): value for name, value in state.items() if name.startswith(own)}
    if dense and all(name.startswith(MODEL) for name in dense):
        dense = {name.removeprefix(MODEL): value for name, value in dense.items()}
    dense = model.backbone.adapt_weights(dense)
    expected = model.model.state_dict()
    classifier = model.backbone.classifier_names
    problems = []
    has_classifier = True
    dense = {name: value for name, value in dense.items() if name in expected or name.split(".")[0] not in classifier}
    for name, value in expected.items():
        if name.split(".")[0] in classifier:
            if name not in dense or dense[name].shape != value.shape:
                dense[name] = value
                has_classifier = False
        elif name not in dense:
            problems.append(f"has no {name}")
        elif dense[name].shape != value.shape:
            problems.append(f"{name} is {tuple(dense[name].shape)}, expected {tuple(value.shape)}")
    problems += [f"has {name}, which the model has not" for name in dense if name not in expected]
    if problems:
        more = f", and {len(problems) - 2} more" if len(problems) > 2 else ""
        raise SlimError(f"{path}: holds the weights of another model: {'; '.join(problems[:2])}{more}")
    model.model.load_state_dict(dense)
    if head:
        try:
            model.selector.load_state_dict(head)
        except RuntimeError as error:
            what = model.selector_name.replace("_", " ")
            raise SlimError(
                f"{path}: its {what} does not fit the model: {str(error).splitlines()[-1].strip()}"
            ) from None
    learns = any(True for _ in model.selector.parameters())
    return Loaded(life_head=bool(head) or not learns, classifier=has_classifier)


def slimming_config(model: SlimModel) -> dict[str, Any]:
    """How a model drops patches, as it stands in config.json and in a recipe's [slimming]."""
    schedule = model.schedule
    config = {"life_layer": schedule.life_layer, **model.configuration()}
    if schedule.counts is not None:
        config["patches_per_layer"] = list(schedule.counts)
    elif schedule.keep_rate is not None:
        config |= {"keep_rate": schedule.keep_rate, "drop_layers": [layer for layer, _ in schedule.drops]}
    else:
        config["drops"] = [list(drop) for drop in schedule.drops]
    return config


def schedule_from_config(config: dict[str, Any], depth: int) -> Schedule:
    """The inverse of `slimming_config`."""
    if "patches_per_layer" in config:
        return Schedule(depth, config["life_layer"], counts=tuple(config["patches_per_layer"]))
    if "drops" in config:
        return Schedule(depth, config["life_layer"], drops=tuple((int(t), float(rate)) for t, rate in config["drops"]))
    return Schedule.uniform(depth, config["keep_rate"], config["life_layer"], config["drop_layers"])


def save_model(folder: Path, model: SlimModel, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write the model folder: weights in `dtype`, and `config` completed with the schedule and preprocessing.

    `config` holds at least `model`: {"name", "args"}, which say how the dense model is built.
    """
    from slimcli import __version__

    state = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    # bytes first, file after: the library's own writer maps the file, and a full disk would kill the process
    write_file(folder / WEIGHTS, save(state, metadata={"format": "pt", "slim": __version__}))
    content = {
        "format": "slim",
        "format_version": 1,
        "slim_version": __version__,
        **config,
        "slimming": slimming_config(model),
    }
    write_json(folder / CONFIG, content)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SlimError(f"{folder}: is not a model folder: expected {CONFIG} and {WEIGHTS} in it") from None
    except (OSError, ValueError) as error:
        raise SlimError(f"{path}: is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != "slim" or "slimming" not in config:
        raise SlimError(f"{path}: was not written by slim: expected a model folder made by train, calibrate or prune")
    return config


def load(folder: str | os.PathLike[str]) -> SlimModel:
    """Load a model folder written by `slim train`, `calibrate` or `prune`, in evaluation mode.

    It is plain torch, to be edited, quantized or trained as any model; `slimcli.optimize` makes it faster.

    Raises:
        SlimError: if the folder is missing, damaged, or needs a plugin that is not installed.
    """
    folder = Path(folder)
    config = read_config(folder)
    plugin = config["model"].get("backbone")
    dense = build_model(config["model"]["name"], plugin=plugin, **config["model"]["args"])
    backbone = find_backbone(dense, plugin)
    schedule = schedule_from_config(config["slimming"], backbone.depth)
    section = config["slimming"]
    kind = find_method(section.get("method", "life"))
    model = kind(backbone, schedule, section["temperature"])
    model.configure(section)
    load_weights(model, folder / WEIGHTS)
    return model.eval()
