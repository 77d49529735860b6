"""A model folder or a run made ready for the Hugging Face hub, and pushed there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from slimcli.errors import SlimError
from slimcli.store.card import bake
from slimcli.store.hub import check_repository, push_folder
from slimcli.store.model_folder import load, open_folder, read_config
from slimcli.store.run_folder import CONFIG, RECIPE, SUMMARY, WEIGHTS, find_run
from slimcli.store.schema import inside, read_json

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


def push(folder: Path, repository: str, private: bool = False, revision: str | None = None) -> str:
    """Publish the model of a model folder or a run; return the address of the commit.

    What is pushed is written anew: weights as they are stored, config.json without the names of folders on this
    machine, and a card with what was measured.

    Raises:
        SlimError: where the folder holds no slimmed model, the repository something else, or the hub refuses.
    """
    check_repository(repository)
    folder = find_run(folder)
    if not folder.is_dir():
        raise SlimError(f"{folder}: no such folder: expected a run or a model folder")
    if not (folder / CONFIG).is_file() and (folder / RECIPE).is_file():
        raise SlimError(f"{folder}: this run has no model yet: finish an epoch with `slim train --resume {folder}`")
    config = read_config(folder)
    open_folder(folder)
    if not config.get("has_life_head", True):
        raise SlimError(f"{folder}: its life head was never taught: run `slim calibrate {folder}` first")
    measured = config.get("measured") or _measured_in_run(folder)
    with safe_open(folder / WEIGHTS, "pt") as file:
        stored = next((file.get_slice(name).get_dtype() for name in file.keys()), "F32")  # noqa: SIM118
    with tempfile.TemporaryDirectory(prefix="slim-") as place:
        model, dtype = load(folder), DTYPES.get(stored, torch.float32)
        try:
            bake(Path(place), model, config, measured, dtype, repository)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise SlimError(f"{folder}: what it says of measurements is damaged: measure it anew") from None
        return push_folder(Path(place), repository, private, revision)


def _measured_in_run(folder: Path) -> Mapping[str, Any]:
    """What a run measured when it ended; nothing where it has not."""
    try:
        summary = read_json(inside(folder, SUMMARY))
    except FileNotFoundError:
        return {}
    return summary if isinstance(summary, dict) and summary.get("rows") else {}
