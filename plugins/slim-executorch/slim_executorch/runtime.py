"""ExecuTorch, on XNNPACK."""

from __future__ import annotations

from pathlib import Path

import torch
from slimcli import SlimError
from slimcli.runtimes import Conversion, Forward, Program, Runtime
from torch import Tensor

FILE = "model.pte"


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
                exported = torch.export.export(model, (images,))
                edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
                missing = sorted(
                    {str(n.target) for n in edge.exported_program().graph.nodes if "sort" in str(n.target)}
                )
                if missing:
                    raise NotImplementedError(f"it has no kernel for {', '.join(missing)}")
                content = edge.to_executorch().buffer
        except Exception as error:  # an operator that ExecuTorch has not
            raise SlimError(f"the method {model.slim.method} cannot be exported to ExecuTorch: {error}") from error
        (folder / FILE).write_bytes(content)

    def open(self, folder: Path, precision: str) -> Program:
        try:
            return ExecuTorchProgram((folder / FILE).read_bytes())
        except (RuntimeError, OSError) as error:
            raise SlimError(f"{folder / FILE}: cannot be opened by ExecuTorch: {error}") from error
