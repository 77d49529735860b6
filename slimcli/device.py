"""The one place that turns a device string into a device, and says what the machine is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, TorchDynamoPlugin

from slimcli.errors import SlimError, parameter
from slimcli.version import __version__

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: ways of training that Accelerate takes from the environment and that change what slim trains or saves
OTHER_LAUNCHES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


def find_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` takes CUDA, then MPS, then the CPU. `SlimError` if it is not here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in available.items() if here))
    if not available.get(name, False):
        here = ", ".join(kind for kind, present in available.items() if present)
        raise SlimError(f"{parameter('device', name)}: not available here: expected one of auto, {here}")
    return torch.device(name)


def find_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype called `precision`; `SlimError` where the device cannot run a ViT in it."""
    if precision == "float16" and device.type == "cpu":
        raise SlimError(f"{parameter('precision', precision)}: too slow to use on a CPU: expected float32 or bfloat16")
    return DTYPES[precision]


def make_accelerator(device: torch.device, precision: str, seed: int, tracker: str | None = None) -> Accelerator:
    """Accelerate set up for training: device, mixed precision, processes, tracker, and shuffling by the seed.

    What a recipe says wins over Accelerate's environment variables; `SlimError` names one that cannot be overruled.
    """
    find_dtype(precision, device)
    for name in OTHER_LAUNCHES:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on"):
            raise SlimError(f"{name} is set: slim trains without it: unset it, or choose another `accelerate config`")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        # a second training in one Python process may want another precision
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision],
        # the loop adds gradients up itself: a plugin, as a plain number would yield to the environment
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
        step_scheduler_with_optimizer=False,
        log_with=tracker,
        # asked for together with a tracker; the run's folder takes its place once it is known
        project_dir="." if tracker else None,
    )
    if accelerator.device.type != device.type:
        found = [name for name in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE") if name in os.environ]
        raise SlimError(
            f"{' and '.join(found) or 'Accelerate'} chooses {accelerator.device.type} where {device.type} is asked "
            f"for: unset it, or ask for {accelerator.device.type}"
        )
    return accelerator


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """A name for people: the GPU's or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type == "cpu" else device.type


def versions() -> dict[str, str]:
    """Versions of slim and of the packages that decide its results."""
    found = {"python": platform.python_version(), "slimcli": __version__}
    for package in ("torch", "timm", "accelerate", "numpy"):
        found[package] = importlib.metadata.version(package)
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """What is worth knowing when a figure is read again: versions, device, threads, and the git commit if any."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": versions(),
        "git_commit": _git_commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the folder the command runs in, with `-dirty` if it has changes; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
