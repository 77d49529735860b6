"""OpenVINO: Intel's runtime, from the same graph as ONNX Runtime's."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from slimcli.errors import SlimError
from slimcli.runtimes.base import Conversion, Forward, Program, Runtime, first_line
from slimcli.runtimes.onnx import as_numpy, graph

XML, BIN = "model.xml", "model.bin"
#: what is computed in, beside the products in int8: left to itself it takes bfloat16 where the processor has it
HINTS = {"float32": {"INFERENCE_PRECISION_HINT": "f32"}, "bfloat16": {"INFERENCE_PRECISION_HINT": "bf16"}}
#: from so many values on, two sorts that are not stable take less time than one that is
MANY = 100


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
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            **HINTS.get(precision, {}),
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
    for operation in [o for o in found.get_ops() if o.get_type_name() == "TopK"]:
        # who comes first among equals: ONNX says so, and OpenVINO only if it is told to, for ten times the time. Where
        # nobody asks for places, equals are the same
        asked = bool(operation.output(1).get_target_inputs())
        operation.set_attribute("stable", asked)
        if asked:
            _sort_in_two(operation)
    return found


def _sort_in_two(sort: Any) -> None:
    """Sort many values by two sorts that are not stable, as one that is: the second puts equals in their order.

    Its keys are whole numbers: how many other values come before, times n, and the place.
    """
    from openvino import opset13 as ops

    shape, attributes = sort.input(0).get_partial_shape(), sort.get_attributes()
    n = shape[1].get_length() if shape.rank.get_length() == 2 and shape[1].is_static else 0
    if n < MANY or attributes["sort"] != "value":
        return
    sort.set_attribute("stable", False)
    whole = ops.topk(sort.input_value(0), n, 1, attributes["mode"], "value", index_element_type="i32")
    values = whole.output(0)
    before, after = (ops.slice(values, [start], [start + n - 1], [1], [1]) for start in (0, 1))
    rank = ops.cumsum(ops.convert(ops.not_equal(before, after), "i32"), numpy.int32(1))
    rank = ops.pad(rank, [0, 1], [0, 0], "constant", numpy.int32(0))
    keys = ops.add(ops.multiply(rank, numpy.int32(n)), whole.output(1))
    in_order = ops.topk(keys, n, 1, "min", "value", index_element_type="i32").output(0)
    places = ops.convert(ops.floor_mod(in_order, numpy.int32(n)), attributes["index_element_type"])
    for number, found in enumerate((values, places.output(0))):
        taken = sort.output(number).get_partial_shape()[1].get_length()
        if taken < n:
            found = ops.slice(found, [0], [taken], [1], [1]).output(0)
        sort.output(number).replace(found)


def names_there(converted: Any, names: Iterable[str]) -> list[str]:
    """The names that products of an ONNX graph have in OpenVINO's: one with a bias, a Gemm, is two operators there."""
    there = {operation.get_friendly_name() for operation in converted.get_ops()}
    return [found for name in names for found in (name, f"{name}/WithoutBiases") if found in there]


def _bytes(content: bytes) -> Any:
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
