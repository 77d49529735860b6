"""How many times as fast as the dense model a slimmed one is, measured in the runtime that will be used."""

from __future__ import annotations

from functools import partial

import torch

from slimcli.device import DTYPES
from slimcli.measure import clock
from slimcli.measure.profiling import random_images
from slimcli.runtimes import Conversion, Forward, Program, find_runtime
from slimcli.runtimes.measuring import NOISE, Place
from slimcli.slimming import SlimModel

#: seconds for which the dense and a slimmed model are timed, about
TIMED_SECONDS = 1.0


def usual_place(device: torch.device, dtype: torch.dtype) -> Place:
    """Where a model runs if nobody says otherwise: a CUDA graph on CUDA, and torch elsewhere."""
    precision = next(name for name, known in DTYPES.items() if known == dtype)
    return Place(find_runtime("cuda-graph" if device.type == "cuda" else "torch"), precision, device)


class Stopwatch:
    """Times a model in a place with `batch_size` images, which are noise, as is what int8 is set by.

    With a `target`, that speed-up is to be reached.
    """

    def __init__(self, place: Place, batch_size: int, target: float | None = None) -> None:
        self.place, self.batch_size, self.target = place, batch_size, target
        self._dense: Program | None = None

    @property
    def where(self) -> str:
        """As notes have it."""
        return f"with {self.batch_size} image{'s' * (self.batch_size > 1)} in {self.place.name} on this device"

    def speedup(self, model: SlimModel) -> float:
        """Dense seconds over those of the model as it is, the median of interleaved rounds."""
        if self._dense is None:
            self._dense = self._program(model, dense=True)
        program = self._program(model, dense=False)
        try:
            images = random_images(model, self.batch_size, self.place.device, torch.float32)
            runs = [partial(each.run, images) for each in (self._dense, program)]
            with torch.inference_mode():
                return clock.speedup(*clock.interleave(runs, self.place.device, 5, TIMED_SECONDS))
        finally:
            program.close()

    def _program(self, model: SlimModel, dense: bool) -> Program:
        place, dtype = self.place, next(model.model.parameters()).dtype
        noise = [random_images(model, NOISE, place.device, torch.float32)] if place.precision == "int8" else []
        if place.runtime.files:  # what is written to a file is converted from float32
            model.float()
        try:
            with model.running(mode="hard"):
                return place.runtime.prepare(
                    Forward(model, dense), Conversion(place.precision, None, noise, place.device)
                )
        finally:
            model.to(dtype)

    def close(self) -> None:
        """Give back what the dense model holds there."""
        if self._dense is not None:
            self._dense.close()
            self._dense = None
