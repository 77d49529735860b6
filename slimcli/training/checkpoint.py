"""What going on exactly needs beside the weights: random states, and how the model drops patches."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy
import torch
from accelerate.utils import set_seed

from slimcli import data as datasets
from slimcli.slimming import SlimModel
from slimcli.store.model_folder import schedule_from_config, slimming_config


def adopt_slimming(model: SlimModel, config: dict[str, Any]) -> None:
    """Let the model drop patches as `slimming_config` says of another: a stage may have searched how."""
    if not config or config == slimming_config(model):
        return
    model.temperature = config["temperature"]
    model.configure(config)
    model.schedule = schedule_from_config(config, model.backbone.depth)


def seed_epoch(seed: int, epoch: int, process: int) -> None:
    """Seed everything for an epoch, so that one that is run again runs the same."""
    set_seed((seed * 1_000_003 + epoch * 1_009 + process) % 2**32)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell sampler and transforms which epoch it is: their randomness follows from it."""
    dataset = loader.dataset
    if isinstance(dataset, datasets.ImageSamples):
        dataset.epoch.fill_(epoch)
    elif hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)


def random_state() -> dict[str, Any]:
    """The states of all random generators, in what torch loads with `weights_only`."""
    kind, keys, place, has_gauss, cached = cast(tuple[Any, ...], numpy.random.get_state())
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(numpy.int64)), place, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, place, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, words.numpy().astype(numpy.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
