"""torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from slimcli.errors import SlimError
from slimcli.runtimes.base import Conversion, Forward, Program, Runtime, example, first_line
from slimcli.runtimes.eager import TorchProgram, dtype_of, placed, stored_megabytes
from slimcli.runtimes.torch_int8 import require_torchao


class CompiledProgram(TorchProgram):
    """A compiled module: one graph for one image, and one for every batch of more."""

    @torch.inference_mode()
    def run(self, images: Tensor) -> Tensor:
        given = images.to(self.device, self.dtype)
        if given.shape[0] > 1:
            torch._dynamo.mark_dynamic(given, 0)
        found: Tensor = self.module(given)
        return found.float().to(images.device)


class Compile(Runtime):
    """One graph, compiled in this process when it first runs."""

    name = "compile"
    about = "torch.compile, in this process; needs a C++ compiler on a CPU"
    precisions = ("float32", "bfloat16", "int8")
    devices = ("cpu", "cuda")

    def require(self, precision: str = "float32") -> None:
        super().require(precision)
        if precision == "int8":
            require_torchao()

    def prepare(self, model: Forward, conversion: Conversion) -> Program:
        # packed layers are for what is not compiled
        own = placed(model, conversion.precision, conversion.device)
        module = cast(nn.Module, torch.compile(own, dynamic=False))
        program = CompiledProgram if conversion.batch_size is None else TorchProgram
        compiled = program(module, dtype_of(conversion.precision), conversion.device)
        compiled.megabytes = stored_megabytes(own)
        try:
            compiled.run(example(model, conversion))
        except Exception as error:  # no compiler here, or what it says
            raise SlimError(f"torch.compile cannot compile the model here: {first_line(error)}") from error
        return compiled

    def open(self, folder: Path, precision: str) -> Program:
        raise SlimError(f"the runtime {self.name} keeps no file")
