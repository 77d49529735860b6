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
from slimcli.runtimes.torch_int8 import quantized, require_torchao
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
    here, dtype = next(model.parameters()), dtype_of(precision)
    if here.dtype != dtype or here.device.type != device.type:
        model = copy.deepcopy(model).to(device, dtype)
    return quantized(model) if precision == "int8" else model


def dtype_of(precision: str) -> torch.dtype:
    """What tokens are in: with int8 only the products of linear layers are."""
    return torch.float32 if precision == "int8" else DTYPES[precision]


def stored_megabytes(model: Forward) -> float:
    """What the weights of a model take in a file, the life head's where it runs."""
    module = model.slim.model if model.slim.mode == "none" else model.slim
    weights = {id(tensor): tensor for tensor in module.state_dict().values()}
    return sum(_bytes(tensor) for tensor in weights.values()) / 1e6


def _bytes(tensor: Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    # quantized: made of others
    inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return sum(part.nbytes for part in inner if isinstance(part, Tensor))


class Torch(Runtime):
    """Block by block, as it was trained; the artefact is a model folder."""

    name = "torch"
    about = "eager, with packed weights on a CPU; a model folder for slimcli.load"
    precisions = ("float32", "bfloat16", "int8")
    devices = ("cpu", "cuda", "mps")
    files = (WEIGHTS,)

    def require(self, precision: str = "float32") -> None:
        super().require(precision)
        if precision == "int8":
            require_torchao()

    def require_file(self, precision: str) -> None:
        if precision == "int8":
            raise SlimError("the runtime torch keeps no file in int8: export float32, and quantize what is loaded")

    def prepare(self, model: Forward, conversion: Conversion) -> Program:
        own = optimize(placed(model, conversion.precision, conversion.device))
        program = TorchProgram(own, dtype_of(conversion.precision), conversion.device)
        program.megabytes = stored_megabytes(own)
        return program

    def write(self, model: Forward, folder: Path, conversion: Conversion) -> None:
        # the model folder holds weights and config.json: who exports writes both
        return

    def open(self, folder: Path, precision: str) -> Program:
        from slimcli.store import load

        if not (folder / CONFIG).is_file():
            raise SlimError(f"{folder}: is not a model folder")
        return TorchProgram(optimize(placed(Forward(load(folder)), precision, CPU)), dtype_of(precision))
