"""torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn

from slimcli.device import DTYPES
from slimcli.errors import SlimError
from slimcli.runtimes.base import Conversion, Forward, Program, Runtime, example, first_line
from slimcli.runtimes.eager import TorchProgram, in_dtype


class Compile(Runtime):
    """One graph, compiled in this process when it first runs."""

    name = "compile"
    about = "torch.compile, in this process; needs a C++ compiler on a CPU"
    precisions = ("float32", "bfloat16")

    def prepare(self, model: Forward, conversion: Conversion) -> Program:
        # packed layers are for what is not compiled
        own = model if conversion.precision == "float32" else in_dtype(model, conversion.precision)
        module = cast(nn.Module, torch.compile(own, dynamic=False))
        program = TorchProgram(module, DTYPES[conversion.precision])
        try:
            program.run(example(model, conversion))
        except Exception as error:  # no compiler here, or what it says
            raise SlimError(f"torch.compile cannot compile the model here: {first_line(error)}") from error
        return program

    def open(self, folder: Path, precision: str) -> Program:
        raise SlimError(f"the runtime {self.name} keeps no file")
