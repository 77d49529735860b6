"""CUDA graphs: all launches of a forward pass, captured once for a batch size and replayed as one."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimcli.device import DTYPES
from slimcli.errors import SlimError
from slimcli.life.tables import tables_used
from slimcli.runtimes.base import Conversion, Forward, Program, Runtime, first_line
from slimcli.runtimes.eager import placed

logger = logging.getLogger(__name__)

#: passes before a capture: what is made once is made in them
WARM_UP = 3
#: graphs that a program keeps, each with memory of its own; those that were not used for longest are forgotten
MOST_GRAPHS = 16


@dataclass
class _Captured:
    """A graph, the memory that it reads images from and writes its output to, and tables that it reads."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    output: Tensor
    tables: list[Tensor]


class GraphProgram(Program):
    """A model on a CUDA device, captured anew for every batch size, and whenever its keep rate or mode is changed.

    What cannot be captured runs eagerly, and a warning says so once. Weights may change in their place. One thread at
    a time may run it; `pool` is memory that programs share which never run at the same time.
    """

    def __init__(self, model: Forward, dtype: torch.dtype, device: torch.device, pool: Any = None) -> None:
        self.model, self.dtype, self.device, self.pool = model, dtype, device, pool
        self._captured: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self._weight = next(model.parameters())
        self._warned = False

    @torch.inference_mode()
    def run(self, images: Tensor) -> Tensor:
        # weights that were moved lie elsewhere
        key = (images.shape, self.model.settings, self._weight.data_ptr())
        if key in self._captured:
            self._captured.move_to_end(key)
        else:
            self._captured[key] = self._capture(images)
            while len(self._captured) > MOST_GRAPHS:
                self._captured.popitem(last=False)
        captured = self._captured[key]
        if captured is None:
            return self._eager(images.to(self.device, self.dtype)).to(images.device)
        captured.images.copy_(images)
        captured.graph.replay()
        # the next run writes over the graph's own output
        return captured.output.to(images.device, copy=True)

    def close(self) -> None:
        self._captured.clear()

    @property
    def captured(self) -> int:
        """How many graphs it holds."""
        return sum(captured is not None for captured in self._captured.values())

    def _eager(self, images: Tensor) -> Tensor:
        found: Tensor = self.model(images)
        return found.float()

    def _capture(self, images: Tensor) -> _Captured | None:
        """A graph for images of this shape; None where there can be none. What fails without a graph too is raised."""
        static = images.to(self.device, self.dtype, copy=True)
        with torch.cuda.device(self.device), tables_used() as tables:
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._eager(static)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # threads that load images may go on meanwhile
                with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                    output = self._eager(static)
            except Exception as error:  # whatever a model does that a graph cannot hold, or memory that is not there
                # torch leaves the stream of a capture that failed in its place
                torch.cuda.set_stream(current)
                if not self._warned:
                    logger.warning("slim: no CUDA graph of this model, it runs eagerly: %s", first_line(error))
                self._warned = True
                return None
        return _Captured(graph, static, output, tables)


class CudaGraph(Runtime):
    """Eager PyTorch without the time that launching takes."""

    name = "cuda-graph"
    about = "eager, captured in a CUDA graph for each batch size; needs a CUDA device"
    precisions = ("float32", "bfloat16")
    devices = ("cuda",)

    def prepare(self, model: Forward, conversion: Conversion) -> Program:
        self.require_device(conversion.device)
        own = placed(model, conversion.precision, conversion.device)
        return GraphProgram(own, DTYPES[conversion.precision], conversion.device)

    def open(self, folder: Path, precision: str) -> Program:
        raise SlimError(f"the runtime {self.name} keeps no file")
