"""ExecuTorch, on XNNPACK."""

from __future__ import annotations

from pathlib import Path

import torch
from slimcli import SlimError
from slimcli.runtimes import Conversion, Forward, Program, Runtime
from torch import Tensor

FILE = "model.pte"


def sorted_by_counting(values: Tensor, stable: bool | None = None, dim: int = -1, descending: bool = False):
    """What `torch.sort(values, stable=True)` gives: how many values come before each, by comparing all pairs."""
    values = values.movedim(dim, -1)
    one, other = values.unsqueeze(-1), values.unsqueeze(-2)
    n = values.shape[-1]
    earlier = torch.ones(n, n, device=values.device).tril(-1) > 0
    first = other > one if descending else other < one
    before = (first | ((other == one) & earlier)).sum(dim=-1)
    places = torch.arange(n, device=values.device).expand(values.shape)
    order = torch.zeros_like(places).scatter(-1, before, places)
    return values.gather(-1, order).movedim(-1, dim), order.movedim(-1, dim)


def without_sorting(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A program that sorts by comparing: ExecuTorch has no kernel that sorts."""
    sort = torch.ops.aten.sort
    table = {
        sort.stable: sorted_by_counting,
        sort.default: lambda values, dim=-1, descending=False: sorted_by_counting(values, True, dim, descending),
    }
    return exported.run_decompositions(table)


class ExecuTorchProgram(Program):
    """A program with one method, for a fixed number of images."""

    def __init__(self, content: bytes) -> None:
        from executorch.runtime import Runtime as Host

        # both are held: the method reads the program's memory, and that the file's
        self.content = content
        self.program = Host.get().load_program(content)
        self.method = self.program.load_method("forward")
        self.batch_size = self.method.metadata.input_tensor_meta(0).sizes()[0]

    def run(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the output (B, C), as many at a time as the artefact takes."""
        parts = images.contiguous().split(self.batch_size)
        short = self.batch_size - parts[-1].shape[0]
        parts = [*parts[:-1], torch.cat((parts[-1], parts[-1].new_zeros(short, *images.shape[1:])))]
        found = torch.cat([self.method.execute([part])[0].clone() for part in parts])
        return found[: images.shape[0]]

    def close(self) -> None:
        self.method = self.program = None


class ExecuTorch(Runtime):
    """One file, for phones and small devices."""

    name = "executorch"
    about = "ExecuTorch on XNNPACK: phones and small devices; one image at a time unless the batch is fixed"
    needs = {"executorch": "executorch"}  # noqa: RUF012
    files = (FILE,)

    def write(self, model: Forward, folder: Path, conversion: Conversion) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        images = torch.zeros(conversion.batch_size or 1, *model.image_shape)
        try:
            with torch.no_grad():
                exported = without_sorting(torch.export.export(model, (images,)))
                edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
                content = edge.to_executorch().buffer
        except Exception as error:  # an operator that ExecuTorch has not
            raise SlimError(f"the method {model.slim.method} cannot be exported to ExecuTorch: {error}") from error
        (folder / FILE).write_bytes(content)

    def open(self, folder: Path, precision: str) -> Program:
        try:
            return ExecuTorchProgram((folder / FILE).read_bytes())
        except (RuntimeError, OSError) as error:
            raise SlimError(f"{folder / FILE}: cannot be opened by ExecuTorch: {error}") from error
