"""What config.json of a model folder may say. It may come from a stranger: nothing in it fetches or leads away."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from slimcli.documents import UNPRINTABLE, visible
from slimcli.errors import SlimError
from slimcli.recipe.schema import SlimmingSection
from slimcli.recipe.values import architecture_arguments

#: bytes of a JSON document: a larger one was not written by slim
LARGEST_JSON = 2**24
#: values within values
DEEPEST_JSON = 32
#: a model's name is timm's, or a plugin's word and a name: no path, no place on a hub
_NAME = re.compile(r"(?:(?:hf[-_]hub:)?timm/)?((?:[a-z][a-z0-9_-]*:)?[A-Za-z0-9][A-Za-z0-9._-]*)")
_PLACES = ("hf-hub:", "hf_hub:", "local-dir:", "http:", "https:", "file:")


def inside(folder: Path, name: str) -> Path:
    """The file called `name` in a folder; `SlimError` where it is a link that leads out.

    A folder of the hub's cache is made of links to files beside it.
    """
    path = folder / name
    root = Path(os.path.realpath(folder))
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    if not Path(os.path.realpath(path)).is_relative_to(root):
        raise SlimError(f"{path}: is a link that leads out of the folder: refused; copy the file to its place")
    return path


def read_json(path: Path) -> Any:
    """A JSON document of a bounded size, whose text can be shown.

    Raises:
        FileNotFoundError: where it is not there.
        SlimError: where it is damaged, too large, too deep, or holds control characters.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise SlimError(f"{path}: is larger than {LARGEST_JSON >> 20} MiB: it was not written by slim")
        found = json.loads(content)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise SlimError(f"{path}: is damaged: {visible(str(error))}") from error
    except RecursionError:
        raise SlimError(f"{path}: is damaged: values within values, more than {DEEPEST_JSON} deep") from None
    _check_text(path, found)
    return found


def _check_text(path: Path, content: Any) -> None:
    waiting: list[tuple[Any, tuple[str, ...]]] = [(content, ())]
    while waiting:
        value, place = waiting.pop()
        if len(place) > DEEPEST_JSON:
            raise SlimError(f"{path}: is damaged: values within values, more than {DEEPEST_JSON} deep")
        if isinstance(value, dict):
            waiting += [(key, (*place, "a name")) for key in value]
            waiting += [(below, (*place, key)) for key, below in value.items()]
        elif isinstance(value, list):
            waiting += [(below, (*place, str(index))) for index, below in enumerate(value)]
        elif isinstance(value, str) and UNPRINTABLE.search(value):
            where = visible(".".join(place))[:100]
            raise SlimError(f"{path}: {where}: holds control characters ({visible(value)[:60]}): refused")


def _model_name(value: str) -> str:
    found = _NAME.fullmatch(value)
    if found is None or found[1].startswith(_PLACES):
        raise ValueError("expected the name of an architecture, not a file or a place to fetch it from")
    return found[1]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Preprocessing(_Part):
    """How images are prepared."""

    input_size: tuple[
        Annotated[int, Field(ge=1, le=16)], Annotated[int, Field(ge=1, le=16384)], Annotated[int, Field(ge=1, le=16384)]
    ]
    mean: list[Annotated[float, Field(ge=-1000, le=1000)]] = Field(min_length=1, max_length=16)
    std: list[Annotated[float, Field(gt=0, le=1000)]] = Field(min_length=1, max_length=16)
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"]
    crop_pct: float = Field(ge=0.01, le=10)
    crop_mode: Literal["center", "squash", "border"] | None = "center"


class ModelEntry(_Part):
    """How the dense model is built."""

    name: Annotated[str, Field(max_length=200), AfterValidator(_model_name)]
    args: Annotated[dict[str, Any], AfterValidator(architecture_arguments)] = {}
    backbone: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] | None = None


ClassNames = Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=10_000_000)]


class FolderConfig(BaseModel):
    """config.json of a model folder; what else stands in it is not read."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    format: Literal["slim"]
    format_version: int = 1
    model: ModelEntry
    slimming: SlimmingSection
    preprocessing: Preprocessing | None = None
    class_names: ClassNames | None = None
    has_life_head: bool = True
    data: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    base_model: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$", max_length=200)] | None = None


#: the newest version of a model folder that can be read
VERSION = 1


def check_config(path: Path, config: Any) -> dict[str, Any]:
    """`config`, what stands in the config.json at `path`, with names in their plain form.

    Raises:
        SlimError: where it is none of slim's, of a newer version, or says what it may not.
    """
    if not isinstance(config, dict) or config.get("format") != "slim" or "slimming" not in config:
        raise SlimError(f"{path}: was not written by slim: expected a model folder made by train, calibrate or prune")
    version = config.get("format_version", 1)
    if version != VERSION:
        raise SlimError(f"{path}: is of version {str(version)[:20]}: this slim reads version {VERSION}")
    checked = validated(path, FolderConfig, config)
    section = checked.slimming
    scheduled = section.patches_per_layer or section.drops is not None or section.drop_layers
    if section.life_layer is None or not scheduled:
        raise SlimError(f"{path}: is damaged: slimming: does not say after which blocks patches leave")
    return {**config, "model": {**config["model"], "name": checked.model.name, "args": dict(checked.model.args)}}


def validated(path: Path, kind: type[Any], content: Mapping[str, Any]) -> Any:
    """`content` as a model of pydantic's; `SlimError` that names the first thing that is wrong."""
    try:
        return kind.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = str(first["msg"]).removeprefix("Value error, ")
        found = "" if isinstance(first["input"], (dict, list)) else f" (found {visible(repr(first['input']))[:60]})"
        raise SlimError(f"{path}: is damaged: {visible(where)}: {visible(what)[:300]}{found}") from None
