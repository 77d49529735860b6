"""Model folders on disk: safetensors weights and a config.json, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from slimcli.backbones.segmenter import SEGMENTER
from slimcli.data.transform import default_transform
from slimcli.documents import visible
from slimcli.errors import SlimError
from slimcli.files import write_file, write_json
from slimcli.hub import offline
from slimcli.plugins import build_model, find_backbone, find_method
from slimcli.schedule import Schedule
from slimcli.slimming import SlimModel
from slimcli.store.hub import hub_folder
from slimcli.store.run_folder import CONFIG, SLIM_WEIGHTS, WEIGHTS
from slimcli.store.schema import VERSION, check_config, inside, read_json
from slimcli.store.weights import WeightsFile, fit_positions, foreign_names, read_weights, without_prefix
from slimcli.version import __version__

LIFE_HEAD = "life_head."
#: bytes that a model may need beside its weights, for tables of positions
ALLOWANCE = 2**28


class Loaded(NamedTuple):
    """Whether a weights file held a taught life head, or what the method learns instead, and a classifier."""

    life_head: bool
    classifier: bool
    #: what a user should know: which of the file's weights were taken
    notes: tuple[str, ...] = ()


def load_weights(model: SlimModel, path: Path, grid: tuple[int, int] | None = None, shapes: bool = False) -> Loaded:
    """Load a weights file of the dense model, or of a slimmed one; say whether it held classifier and life head.

    Position embeddings are resampled where the image size differs; `grid` gives the file's rows and columns of
    patches, where they are not square and the file does not say. A missing or differing classifier is left as it is,
    with the rest loaded; anything else that does not fit is a `SlimError`. What a method learns may stand beside the
    dense model in a file of its own. With `shapes` the model is on the device `meta`, and only shapes are read.
    """
    read = read_weights(path, shapes)
    _add_beside(read, shapes)
    expected = model.model.state_dict()
    own = f"{model.selector_name}."
    dense, head = without_prefix(read, expected, own)
    # the weights of a model slimmed by its lives serve every other method too
    dense = {name: value for name, value in dense.items() if not name.startswith(LIFE_HEAD)}
    dense = fit_positions(dense, expected, model.backbone.grid_size, read, grid)
    dense = model.backbone.adapt_weights(dense)
    has_classifier = _fit_classifier(dense, expected, (*model.backbone.classifier_names, SEGMENTER))
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


def _add_beside(read: WeightsFile, shapes: bool) -> None:
    """Add what the method learnt, where the file says that it stands beside it."""
    digest = read.metadata.get("beside")
    if digest is None:
        return
    path = inside(read.path.parent, SLIM_WEIGHTS)
    if not path.is_file():
        read.notes.append(f"{read.path}: what slim learnt stood beside it in {SLIM_WEIGHTS}, which is not there")
        return
    if not shapes and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        read.notes.append(f"{path}: was not written together with {read.path.name}: save the model again")
    read.state |= read_weights(path, shapes).state


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
    return problems + [f"has {visible(name)[:100]}, which the model has not" for name in dense if name not in expected]


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
    return Schedule.uniform(depth, config.get("keep_rate", 0.7), config["life_layer"], config["drop_layers"])


def save_model(
    folder: Path,
    model: SlimModel,
    config: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    separate: bool = False,
) -> None:
    """Write the model folder: weights in `dtype`, and `config` completed with the schedule and preprocessing.

    `config` holds at least `model`: {"name", "args"}, which say how the dense model is built. With `separate` the
    dense model's weights have a file of their own, under the names that its library gives them, so that the folder is
    one of timm's too; without it all weights are replaced at once, also where the process is killed.
    """
    state = model.state_dict()
    metadata = {}
    with contextlib.suppress(SlimError):  # a backbone whose patches form no grid
        metadata["grid"] = "x".join(map(str, model.backbone.grid_size))
    if not config.get("has_life_head", True):
        metadata["life_head"] = "untaught"
    if separate:
        own = f"{model.selector_name}."
        learnt = {name: value for name, value in state.items() if name.startswith(own)}
        state = {name.removeprefix("model."): value for name, value in state.items() if name not in learnt}
        if learnt:
            content = _packed(learnt, dtype, {})
            metadata["beside"] = hashlib.sha256(content).hexdigest()
            write_file(folder / SLIM_WEIGHTS, content)
    write_file(folder / WEIGHTS, _packed(state, dtype, metadata))
    if "beside" not in metadata:
        (folder / SLIM_WEIGHTS).unlink(missing_ok=True)
    content_of_config = {
        "format": "slim",
        "format_version": VERSION,
        "slim_version": __version__,
        **config,
        "slimming": slimming_config(model),
        **(model.backbone.library_config(config["model"], config.get("preprocessing")) if separate else {}),
    }
    write_json(folder / CONFIG, content_of_config)


def _packed(state: dict[str, Tensor], dtype: torch.dtype, metadata: dict[str, str]) -> bytes:
    """The content of a safetensors file: bytes first, since the library's own writer maps the file, and a full disk
    would kill the process.
    """
    stored = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in state.items()
    }
    return _canonical(save(stored, metadata={"format": "pt", "slim": __version__, **metadata}))


def _canonical(content: bytes) -> bytes:
    """The same safetensors file with the keys of its metadata in order: the library writes them in any."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder; `SlimError` where it is not there, damaged, or says what it may not."""
    path = inside(folder, CONFIG)
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise SlimError(f"{folder}: is not a model folder: expected {CONFIG} and {WEIGHTS} in it") from None
    return check_config(path, config)


def open_folder(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder whose weights fit what it says; nothing large has been read or made.

    The one way into a folder, whoever wrote it: its files lie in it, its model is an architecture and no place to
    fetch from, and the shapes of its tensors are those of that architecture.

    Raises:
        SlimError: where it is missing, damaged, hostile, or needs a plugin that is not installed.
    """
    config = read_config(folder)
    path = inside(folder, WEIGHTS)
    if not path.is_file():
        raise SlimError(f"{folder}: is not a model folder: expected {CONFIG} and {WEIGHTS} in it")
    check_architecture(folder, config, lambda model: load_weights(model, path, shapes=True), path.stat().st_size)
    return config


def check_architecture(
    folder: Path, config: dict[str, Any], fits: Callable[[SlimModel], Any], weights_bytes: int
) -> None:
    """Build a folder's model without any memory, see that it is not too large for its weights, and that these `fit`.

    Raises:
        SlimError: where it cannot be built, with nothing fetched, or is much larger than its weights.
    """
    try:
        with torch.device("meta"), offline():
            model = _model_of(config)
            needed = 4 * sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
            if needed > 4 * weights_bytes + ALLOWANCE:
                raise SlimError(
                    f"{folder}: its {CONFIG} describes a model of {needed / 2**30:.1f} GiB, and its weights have "
                    f"{weights_bytes / 2**30:.3f} GiB: it is damaged"
                )
            fits(model)
    except (SlimError, NotImplementedError, RuntimeError) as error:
        # a plugin's model that cannot be built without memory is seen when it is built
        cause = error.__cause__ if isinstance(error, SlimError) else error
        if not isinstance(cause, (NotImplementedError, RuntimeError)) or "meta tensor" not in str(cause):
            raise


def load(folder: str | os.PathLike[str]) -> SlimModel:
    """Load a model folder written by `slim train`, `calibrate` or `prune`, in evaluation mode.

    It is plain torch, to be edited, quantized or trained as any model; `slimcli.optimize` makes it faster. Its
    `class_names` and `transform()` are those that it was saved with.

    Args:
        folder: a folder, or one on the Hugging Face hub: `hf-hub:owner/name` or `hf-hub:owner/name@revision`.

    Raises:
        SlimError: if the folder is missing, damaged, or needs a plugin that is not installed.
    """
    folder = hub_folder(str(folder)) or Path(folder)
    config = open_folder(folder)
    model = _model_of(config)
    found = load_weights(model, folder / WEIGHTS, model.backbone.grid_size)
    model.describe(
        built_from=config["model"],
        class_names=config.get("class_names"),
        transform=default_transform(model.backbone, config.get("preprocessing")),
        taught=found.life_head and config.get("has_life_head", True),
    )
    return model.eval()


def _model_of(config: dict[str, Any]) -> SlimModel:
    """The model that config.json describes, without its weights."""
    plugin = config["model"].get("backbone")
    dense = build_model(config["model"]["name"], plugin=plugin, **config["model"]["args"])
    backbone = find_backbone(dense, plugin)
    section = config["slimming"]
    schedule = schedule_from_config(section, backbone.depth)
    model = find_method(section.get("method", "life"))(backbone, schedule, section.get("temperature", 1.5))
    model.configure(section)
    return model
