"""OpenVINO: Intel's runtime, from the same graph as ONNX Runtime's."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimcli.errors import SlimError
from slimcli.runtimes.base import Conversion, Forward, Program, Runtime, first_line
from slimcli.runtimes.onnx import as_numpy, graph

XML, BIN = "model.xml", "model.bin"


class OpenVinoProgram(Program):
    """A compiled model and the request that runs it."""

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()

    def run(self, images: Tensor) -> Tensor:
        # a copy: the next run writes its output to the same place
        found = next(iter(self.request.infer([images.contiguous().numpy()], share_inputs=True).values()))
        return torch.from_numpy(found.copy()).float()

    def close(self) -> None:
        self.request = None


class OpenVino(Runtime):
    """Two files of OpenVINO's own format."""

    name = "openvino"
    about = "OpenVINO, the fastest on most Intel and AMD processors"
    precisions = ("float32", "bfloat16", "int8")
    needs = {"openvino": "openvino", "onnx": "onnx", "onnxscript": "onnxscript"}  # noqa: RUF012
    extra = "openvino"
    files = (XML, BIN)

    def require(self, precision: str = "float32") -> None:
        super().require(precision)
        if precision == "int8":
            import importlib.util

            if importlib.util.find_spec("nncf") is None:
                raise SlimError('int8 for openvino needs nncf, not installed here: pip install "slimcli[openvino]"')

    def write(self, model: Forward, folder: Path, conversion: Conversion) -> None:
        import openvino

        with tempfile.TemporaryDirectory(prefix="slim-") as place:
            path = Path(place) / "model.onnx"
            graph(model, conversion, path)
            converted = read_graph(path)
            if conversion.precision == "int8":
                converted = _quantized(converted, path, model, conversion)
            openvino.save_model(converted, str(folder / XML), compress_to_fp16=False)

    def open(self, folder: Path, precision: str) -> Program:
        import openvino

        core = openvino.Core()
        options = {
            # left to itself it takes bfloat16 where the processor has it
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            # weights are read now: the folder may go
            content = (folder / XML).read_text(encoding="utf-8"), (folder / BIN).read_bytes()
            model = core.read_model(content[0], openvino.Tensor(_bytes(content[1])))
            return OpenVinoProgram(core.compile_model(model, "CPU", options))
        except (RuntimeError, OSError, ValueError) as error:
            raise SlimError(f"{folder / XML}: cannot be opened by OpenVINO: {first_line(error)}") from error


def read_graph(path: Path) -> Any:
    """A graph of ONNX's as OpenVINO's own."""
    import openvino

    found = openvino.Core().read_model(str(path))
    for operation in found.get_ops():
        # who comes first among equals: ONNX says so, and OpenVINO only if it is told to, for ten times the time. Where
        # nobody asks for places, equals are the same
        if operation.get_type_name() == "TopK":
            operation.set_attribute("stable", bool(operation.output(1).get_target_inputs()))
    return found


def names_there(converted: Any, names: Iterable[str]) -> list[str]:
    """The names that products of an ONNX graph have in OpenVINO's: one with a bias, a Gemm, is two operators there."""
    there = {operation.get_friendly_name() for operation in converted.get_ops()}
    return [found for name in names for found in (name, f"{name}/WithoutBiases") if found in there]


def _bytes(content: bytes) -> Any:
    import numpy

    return numpy.frombuffer(content, dtype=numpy.uint8).copy()


def _quantized(converted: Any, path: Path, model: Forward, conversion: Conversion) -> Any:
    """The model in int8, the life head as it was."""
    import logging

    import nncf
    import onnx

    from slimcli.runtimes.onnx_int8 import kept_in_float

    logging.getLogger("nncf").setLevel(logging.ERROR)
    names = names_there(converted, kept_in_float(onnx.load(str(path)), model))
    batches = as_numpy(conversion.calibration)
    # its progress bars go to stdout, which may hold a document
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return nncf.quantize(
            converted,
            nncf.Dataset(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(names=names),
        )
