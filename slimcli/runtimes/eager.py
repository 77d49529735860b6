"""torch itself, with packed weights on a CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from slimcli.device import DTYPES
from slimcli.errors import SlimError
from slimcli.layout import optimize
from slimcli.runtimes.base import Conversion, Forward, Program, Runtime
from slimcli.store.run_folder import CONFIG, WEIGHTS


class TorchProgram(Program):
    """A module of torch's, run without gradients in one dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype

    @torch.inference_mode()
    def run(self, images: Tensor) -> Tensor:
        found: Tensor = self.module(images.to(self.dtype))
        return found.float()


def in_dtype(model: Forward, precision: str) -> Forward:
    """A copy of a model in another precision, on packed weights; the weights are shared where it is the same."""
    if precision != "float32":
        model = copy.deepcopy(model).to(DTYPES[precision])
    return optimize(model)


class Torch(Runtime):
    """Block by block, as it was trained; the artefact is a model folder."""

    name = "torch"
    about = "eager, with packed weights on a CPU; a model folder for slimcli.load"
    precisions = ("float32", "bfloat16")
    files = (WEIGHTS,)

    def prepare(self, model: Forward, conversion: Conversion) -> Program:
        return TorchProgram(in_dtype(model, conversion.precision), DTYPES[conversion.precision])

    def write(self, model: Forward, folder: Path, conversion: Conversion) -> None:
        # the model folder holds weights and config.json: who exports writes both
        return

    def open(self, folder: Path, precision: str) -> Program:
        from slimcli.store import load

        if not (folder / CONFIG).is_file():
            raise SlimError(f"{folder}: is not a model folder")
        return TorchProgram(in_dtype(Forward(load(folder)), precision), DTYPES[precision])
