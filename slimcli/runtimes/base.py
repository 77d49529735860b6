"""What a runtime is: where a model runs, and how it gets there."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from slimcli.errors import SlimError
from slimcli.methods.slim_model import SlimModel

CPU = torch.device("cpu")
#: names of an artefact's input, and of its output: with a classifier, with a segmentation head, and without either
IMAGES, LOGITS, MAPS, EMBEDDINGS = "images", "logits", "maps", "embeddings"


class Forward(nn.Module):
    """A slimmed model as a function of images (B, 3, H, W) alone: `output` says of what it gives.

    `logits` (B, C); with a segmentation head `maps`, logits (B, C, H, W); without either `embeddings` (B, D).

    It runs a copy of the model's outer module, so that nothing that a conversion leaves behind stays in the model; the
    weights are shared. `dense` runs all patches.
    """

    def __init__(self, model: SlimModel, dense: bool = False) -> None:
        super().__init__()
        self.slim = model.with_schedule(model.schedule)
        self.slim.mode = "none" if dense else "hard"
        self.slim.exact_savings = model.exact_savings and not dense
        self.output = MAPS if model.segments else LOGITS if model.architecture().num_outputs else EMBEDDINGS
        self.eval()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that it takes."""
        channels = self.slim.backbone.preprocessing()["input_size"][0]
        height, width = self.slim.backbone.image_size
        return int(channels), int(height), int(width)

    @property
    def settings(self) -> Hashable:
        """What decides which operators run, beside the images' shape."""
        slim = self.slim
        return slim.mode, slim.schedule, slim.exact_savings, slim.attention, *(getattr(slim, s) for s in slim.settings)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.slim.embedding(images) if self.output == EMBEDDINGS else self.slim.output(images)
        return found


@dataclass(frozen=True)
class Conversion:
    """How a model is converted: its precision, the number of images in a batch (None: any), what int8 is set by, and
    where it runs.
    """

    precision: str = "float32"
    batch_size: int | None = None
    #: batches (b, 3, H, W) of prepared images, for int8
    calibration: Sequence[Tensor] = ()
    device: torch.device = CPU


class Program(ABC):
    """A model that is ready to run in a runtime."""

    #: what its artefact, or its weights, take in files; None where nobody knows
    megabytes: float | None = None

    @abstractmethod
    def run(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), float32, to the model's output (B, ...), float32, on the device where the images are."""

    def close(self) -> None:
        """Give back what it holds."""
        return


class Runtime(ABC):
    """Where a model runs. A plugin adds one with the hook `slim_runtimes`."""

    name: ClassVar[str]
    about: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    #: the types of device that it runs on
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    #: modules that it imports, by the name of the package that has each
    needs: ClassVar[dict[str, str]] = {}
    #: the extra of slim's that installs them
    extra: ClassVar[str | None] = None
    #: the files of its artefact, the first one that which is opened; none where it cannot be exported
    files: ClassVar[tuple[str, ...]] = ()
    #: whether opening its artefact runs code that the artefact holds
    runs_code: ClassVar[bool] = False

    def missing(self) -> list[str]:
        """The packages that it needs and that are not installed."""
        return [package for module, package in self.needs.items() if importlib.util.find_spec(module) is None]

    def require(self, precision: str = "float32") -> None:
        """`SlimError` where a package is missing, or the precision is not one of its own."""
        missing = self.missing()
        if missing:
            package = f'"slimcli[{self.extra}]"' if self.extra else " ".join(missing)
            raise SlimError(
                f"the runtime {self.name} needs {', '.join(missing)}, not installed here: pip install {package}"
            )
        if precision not in self.precisions:
            raise SlimError(f"the runtime {self.name} has no {precision}: expected {', '.join(self.precisions)}")

    def require_file(self, precision: str) -> None:
        """`SlimError` where it keeps no file in this precision, which it has."""
        if not self.files:
            raise SlimError(f"the runtime {self.name} keeps no file: expected another runtime")

    def described(self) -> str:
        """Its precisions and devices, the versions of what it needs, and what is missing of it."""
        found = [" ".join(self.precisions), f"on {' '.join(self.devices)}"]
        missing = self.missing()
        for package in self.needs.values() or ["torch"]:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.append(f"{package} {importlib.metadata.version(package)}")
        if missing:
            install = f'"slimcli[{self.extra}]"' if self.extra else " ".join(missing)
            found.append(f"missing {' '.join(missing)}: pip install {install}")
        return ", ".join(found)

    def require_device(self, device: torch.device) -> None:
        """`SlimError` where it does not run on this device."""
        if device.type in self.devices:
            return
        if self.devices == ("cuda",) and not torch.cuda.is_available():
            raise SlimError(
                f"the runtime {self.name} needs a CUDA device, and there is none here: take torch or compile"
            )
        raise SlimError(f"the runtime {self.name} runs on {', '.join(self.devices)}, not on {device.type}")

    def prepare(self, model: Forward, conversion: Conversion) -> Program:
        """The model as a program, without an artefact that stays."""
        with tempfile.TemporaryDirectory(prefix="slim-") as folder:
            self.write(model, Path(folder), conversion)
            program = self.open(Path(folder), conversion.precision)
            program.megabytes = sum((Path(folder) / name).stat().st_size for name in self.files) / 1e6
            return program

    def write(self, model: Forward, folder: Path, conversion: Conversion) -> None:
        """Write the artefact `files` into a folder that is there.

        Raises:
            SlimError: where the runtime cannot run the model, with the reason.
        """
        raise SlimError(f"the runtime {self.name} keeps no file: it cannot be exported to")

    @abstractmethod
    def open(self, folder: Path, precision: str) -> Program:
        """The artefact in a folder, as a program; it needs the folder no more."""


def require_graph(model: Forward, where: str) -> None:
    """`SlimError` if the method is known to run what no graph holds."""
    slim = model.slim
    if slim.no_graph is not None and slim.mode != "none" and slim.schedule.drops_patches():
        raise SlimError(
            f"the method {slim.method} cannot be exported {where}: {slim.no_graph}, which no graph holds: choose "
            "another method, or the runtime torch"
        )


def example(model: Forward, conversion: Conversion) -> Tensor:
    """Images (b, 3, H, W) to trace a model with: as many as asked for, two where any number is."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(conversion.batch_size or 2, *model.image_shape, generator=generator)


def free_batch(conversion: Conversion) -> dict[str, dict[int, torch.export.Dim]] | None:
    """What exporters are told of the input's sizes: that of the batch is free, from one image; None where it is set."""
    return None if conversion.batch_size is not None else {IMAGES: {0: torch.export.Dim("batch", min=1)}}


def first_line(error: BaseException) -> str:
    """What an exporter's error says, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def cannot_export(model: Forward, error: BaseException, where: str) -> SlimError:
    """What to tell somebody whose model cannot be made a graph."""
    return SlimError(
        f"the method {model.slim.method} on {type(model.slim.model).__name__} cannot be exported {where}: "
        f"{first_line(error)}"
    )
