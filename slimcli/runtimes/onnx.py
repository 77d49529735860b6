"""ONNX Runtime: one file of standard operators, that runs without torch and slim."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from slimcli.errors import SlimError, parameter
from slimcli.life.exported import known
from slimcli.runtimes.base import (
    IMAGES,
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
from slimcli.runtimes.onnx_graph import tidy, translations

FILE = "model.onnx"
#: the first one with GELU
OPSET = 20
#: a file of protobuf holds no more
LARGEST = 2**31 - 2**20
#: products that int8 may take; those of two activations (attention, and who is like whom) stay as they are
PRODUCTS = ("MatMul", "Gemm", "Conv")


class OnnxProgram(Program):
    """A session of ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def run(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {IMAGES: images.contiguous().numpy()})[0])

    def close(self) -> None:
        self.session = None


class OnnxRuntime(Runtime):
    """A file of ONNX, opset 20, without custom operators."""

    name = "onnx"
    about = "ONNX Runtime; the file runs anywhere, without torch and slim"
    precisions = ("float32", "int8")
    needs = {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}  # noqa: RUF012
    extra = "onnx"
    files = (FILE,)

    def write(self, model: Forward, folder: Path, conversion: Conversion) -> None:
        if conversion.precision == "int8":
            from slimcli.runtimes.onnx_int8 import quantize

            graph(model, conversion, folder / "float.onnx")
            quantize(folder / "float.onnx", folder / FILE, model, conversion.calibration)
            (folder / "float.onnx").unlink()
        else:
            graph(model, conversion, folder / FILE)

    def open(self, folder: Path, precision: str) -> Program:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # threads that spin after a run take the cores from what runs next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # attention to noise, which models are timed on, is full of numbers too small for the processor's fast ways
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        try:
            session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # a damaged file, an operator that this version does not have
            raise SlimError(f"{folder / FILE}: cannot be opened by ONNX Runtime: {first_line(error)}") from error
        return OnnxProgram(session)


def graph(model: Forward, conversion: Conversion, path: Path) -> None:
    """Write a model as ONNX in float32: constants folded, the number of images free unless it is given.

    Raises:
        SlimError: where the model's code cannot be made a graph of ONNX's operators.
    """
    require_graph(model, "to ONNX")
    free = free_batch(conversion)
    with _quietly():
        try:
            with torch.no_grad(), known():
                program = torch.onnx.export(
                    model,
                    (example(model, conversion),),
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=[IMAGES],
                    output_names=[model.output],
                    dynamic_shapes=free,
                    optimize=True,
                    verbose=False,
                    custom_translation_table=translations(),
                )
        except Exception as error:  # whatever a model's code does that ONNX cannot
            raise cannot_export(model, error, "to ONNX") from error
        assert program is not None
        tidy(program.model)
        _check_operators(program.model_proto.graph.node, model)
        if free is not None:
            check_free(program.model_proto.graph.input[0], model)
        if program.model_proto.ByteSize() > LARGEST:
            raise SlimError("the model is larger than the 2 GiB that one file of ONNX holds")
        program.save(str(path), external_data=False)


def check_free(images: Any, model: Forward) -> None:
    """`SlimError` where a number of images became part of the graph."""
    if not images.type.tensor_type.shape.dim[0].HasField("dim_param"):
        raise SlimError(
            f"the method {model.slim.method} on {type(model.slim.model).__name__} cannot be exported to ONNX for any "
            f"number of images: its code reads how many there are, as by len(images): images.shape[0] stays free; or "
            f"give {parameter('batch_size')}"
        )


def _check_operators(nodes: Sequence[Any], model: Forward) -> None:
    odd = sorted({node.op_type for node in nodes if node.domain or node.op_type in ("If", "Loop", "Scan")})
    if odd:
        raise SlimError(
            f"the method {model.slim.method} on {type(model.slim.model).__name__} cannot be exported to ONNX: it needs "
            f"{', '.join(odd)}"
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter prints on the way."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def as_numpy(batches: Sequence[Tensor]) -> list[Any]:
    """Batches of images for a quantizer."""
    return [numpy.ascontiguousarray(batch.numpy()) for batch in batches]
