"""Model folders on disk: safetensors weights and a config.json, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from slimcli.data.transform import default_transform
from slimcli.errors import SlimError
from slimcli.files import write_file, write_json
from slimcli.plugins import build_model, find_backbone, find_method
from slimcli.schedule import Schedule
from slimcli.slimming import SlimModel
from slimcli.store.run_folder import CONFIG, WEIGHTS
from slimcli.store.weights import fit_positions, foreign_names, read_weights, without_prefix

LIFE_HEAD = "life_head."


class Loaded(NamedTuple):
    """Whether a weights file held a taught life head, or what the method learns instead, and a classifier."""

    life_head: bool
    classifier: bool
    #: what a user should know: which of the file's weights were taken
    notes: tuple[str, ...] = ()


def load_weights(model: SlimModel, path: Path, grid: tuple[int, int] | None = None) -> Loaded:
    """Load a weights file of the dense model, or of a slimmed one; say whether it held classifier and life head.

    Position embeddings are resampled where the image size differs; `grid` gives the file's rows and columns of
    patches, where they are not square and the file does not say. A missing or differing classifier is left as it is,
    with the rest loaded; anything else that does not fit is a `SlimError`.
    """
    read = read_weights(path)
    expected = model.model.state_dict()
    own = f"{model.selector_name}."
    dense, head = without_prefix(read, expected, own)
    # the weights of a model slimmed by its lives serve every other method too
    dense = {name: value for name, value in dense.items() if not name.startswith(LIFE_HEAD)}
    dense = fit_positions(dense, expected, model.backbone.grid_size, read, grid)
    dense = model.backbone.adapt_weights(dense)
    has_classifier = _fit_classifier(dense, expected, model.backbone.classifier_names)
    problems = _misfits(dense, expected)
    if problems:
        if sum(name in expected for name in dense) * 2 < len(expected):
            raise SlimError(foreign_names(path, dense, list(expected)))
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
    return Loaded((bool(head) and read.taught) or not learns, has_classifier, tuple(read.notes))


def _fit_classifier(dense: dict[str, Tensor], expected: dict[str, Tensor], names: Collection[str]) -> bool:
    """Leave the model's own classifier where the file has none that fits; whether it has one. Changes `dense`."""
    for name in [name for name in dense if name not in expected and name.split(".")[0] in names]:
        del dense[name]
    fits = True
    for name, value in expected.items():
        if name.split(".")[0] in names and (name not in dense or dense[name].shape != value.shape):
            dense[name] = value
            fits = False
    return fits


def _misfits(dense: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What of a file's tensors does not fit a model, a phrase each."""
    problems = []
    for name, value in expected.items():
        if name not in dense:
            problems.append(f"has no {name}")
        elif dense[name].shape != value.shape:
            problems.append(f"{name} is {tuple(dense[name].shape)}, expected {tuple(value.shape)}")
    return problems + [f"has {name}, which the model has not" for name in dense if name not in expected]


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
    from slimcli.version import __version__

    state = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    metadata = {"format": "pt", "slim": __version__}
    with contextlib.suppress(SlimError):  # a backbone whose patches form no grid
        metadata["grid"] = "x".join(map(str, model.backbone.grid_size))
    if not config.get("has_life_head", True):
        metadata["life_head"] = "untaught"
    # bytes first, file after: the library's own writer maps the file, and a full disk would kill the process
    write_file(folder / WEIGHTS, _canonical(save(state, metadata=metadata)))
    content = {
        "format": "slim",
        "format_version": 1,
        "slim_version": __version__,
        **config,
        "slimming": slimming_config(model),
    }
    write_json(folder / CONFIG, content)


def _canonical(content: bytes) -> bytes:
    """The same safetensors file with the keys of its metadata in order: the library writes them in any."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


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

    It is plain torch, to be edited, quantized or trained as any model; `slimcli.optimize` makes it faster. Its
    `class_names` and `transform()` are those that it was saved with.

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
    found = load_weights(model, folder / WEIGHTS, backbone.grid_size)
    model.describe(
        built_from=config["model"],
        class_names=config.get("class_names"),
        transform=default_transform(backbone, config.get("preprocessing")),
        taught=found.life_head and config.get("has_life_head", True),
    )
    return model.eval()
