"""torch.export and AOTInductor: a package of machine code that torch runs without slim."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from slimcli.device import DTYPES
from slimcli.errors import SlimError
from slimcli.runtimes.base import (
    Conversion,
    Forward,
    Program,
    Runtime,
    cannot_export,
    example,
    first_line,
    free_batch,
    require_graph,
)
from slimcli.runtimes.eager import TorchProgram

FILE = "model.pt2"


class AotInductor(Runtime):
    """Compiled beforehand, for this kind of processor."""

    name = "aoti"
    about = "torch.export and AOTInductor: machine code for this processor, run by torch without slim"
    files = (FILE,)
    runs_code = True

    def write(self, model: Forward, folder: Path, conversion: Conversion) -> None:
        require_graph(model, "to AOTInductor")
        try:
            with torch.no_grad():
                images, free = example(model, conversion), free_batch(conversion)
                exported = torch.export.export(model, (images,), dynamic_shapes=free)
                torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / FILE))
        except Exception as error:  # whatever a model's code does that a graph cannot, or a compiler says
            raise cannot_export(model, error, "to AOTInductor") from error

    def open(self, folder: Path, precision: str) -> Program:
        try:
            package = torch._inductor.aoti_load_package(str(folder / FILE))
        except Exception as error:  # a package of another version, another processor
            raise SlimError(f"{folder / FILE}: cannot be opened here: {first_line(error)}") from error

        class Package(torch.nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                found: Tensor = package(images)
                return found

        return TorchProgram(Package(), DTYPES[precision])
