"""torch itself, with packed weights on a CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from slimcli.device import DTYPES
from slimcli.errors import SlimError
from slimcli.layout import optimize
from slimcli.runtimes.base import CPU, Conversion, Forward, Program, Runtime
from slimcli.store.run_folder import CONFIG, WEIGHTS


class TorchProgram(Program):
    """A module of torch's, run without gradients in one dtype on one device."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.module, self.dtype, self.device = module, dtype, device

    @torch.inference_mode()
    def run(self, images: Tensor) -> Tensor:
        found: Tensor = self.module(images.to(self.device, self.dtype))
        return found.float().to(images.device)


def placed(model: Forward, precision: str, device: torch.device) -> Forward:
    """A copy of a model in another precision or on another device; the weights are shared where both are the same."""
    here, dtype = next(model.parameters()), DTYPES[precision]
    if here.dtype != dtype or here.device.type != device.type:
        model = copy.deepcopy(model).to(device, dtype)
    return model


class Torch(Runtime):
    """Block by block, as it was trained; the artefact is a model folder."""

    name = "torch"
    about = "eager, with packed weights on a CPU; a model folder for slimcli.load"
    precisions = ("float32", "bfloat16")
    devices = ("cpu", "cuda", "mps")
    files = (WEIGHTS,)

    def prepare(self, model: Forward, conversion: Conversion) -> Program:
        own = optimize(placed(model, conversion.precision, conversion.device))
        return TorchProgram(own, DTYPES[conversion.precision], conversion.device)

    def write(self, model: Forward, folder: Path, conversion: Conversion) -> None:
        # the model folder holds weights and config.json: who exports writes both
        return

    def open(self, folder: Path, precision: str) -> Program:
        from slimcli.store import load

        if not (folder / CONFIG).is_file():
            raise SlimError(f"{folder}: is not a model folder")
        return TorchProgram(optimize(placed(Forward(load(folder)), precision, CPU)), DTYPES[precision])
