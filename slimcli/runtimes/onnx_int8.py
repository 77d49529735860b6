"""int8 for ONNX Runtime: static, weights a channel each, ranges of activations from images; the life head in float."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor
from torch.nn import LayerNorm

from slimcli.runtimes.base import IMAGES, Forward
from slimcli.runtimes.onnx import PRODUCTS, as_numpy
from slimcli.runtimes.onnx_graph import join_biases


class _Reader:
    """Batches for the quantizer, one after another."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {IMAGES: batch}


@contextlib.contextmanager
def _errors_alone() -> Iterator[None]:
    """ONNX Runtime warns by the root logger; what others warn of afterwards is heard again."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def quantize(source: Path, to: Path, model: Forward, calibration: Sequence[Tensor]) -> None:
    """Write an ONNX file in float32 once more, its products with weights in int8."""
    import onnx
    import onnx_ir as ir
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory(prefix="slim-") as folder, quiet, _errors_alone():
        joined, prepared = Path(folder) / "joined.onnx", Path(folder) / "prepared.onnx"
        graph = ir.load(source)
        join_biases(graph, kept_in_float(onnx.load(str(source)), model))
        ir.save(graph, joined)
        quant_pre_process(str(joined), str(prepared), skip_symbolic_shape=True, skip_optimization=True)
        quantize_static(
            str(prepared),
            str(to),
            _Reader(as_numpy(calibration)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            op_types_to_quantize=list(PRODUCTS),
            nodes_to_exclude=kept_in_float(onnx.load(str(prepared)), model),
            # a product gives float at once; a convolution in int8 can only give int8
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )


def kept_in_float(proto: Any, model: Forward) -> list[str]:
    """The names of products that stay in float32: those of two activations, and those with a weight of the life head.

    A weight is known by its values: folding constants gives it another name, and may transpose it.
    """
    from onnx import numpy_helper

    own = [p.detach().numpy() for p in model.slim.selector.parameters() if p.dim() == 2]
    # those behind a LayerNorm may hold its weight
    norms = [m.weight.detach().numpy() for m in model.slim.selector.modules() if isinstance(m, LayerNorm)]
    own += [weight * norm for weight in own for norm in norms if weight.shape[1] == len(norm)]
    # those of queries, keys and values are taken apart
    own += [part for weight in own if len(weight) % 3 == 0 for part in numpy.split(weight, 3)]
    shapes = {shape for weight in own for shape in (weight.shape, weight.T.shape)}
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    kept = []
    for node in proto.graph.node:
        if node.op_type not in PRODUCTS:
            continue
        constants = [weights[name] for name in node.input if name in weights]
        if not constants:
            kept.append(node.name)
            continue
        found = [numpy_helper.to_array(tensor) for tensor in constants if tuple(tensor.dims) in shapes]
        if any(_same(value, weight) for value in found for weight in own):
            kept.append(node.name)
    return kept


def _same(value: Any, weight: Any) -> bool:
    return any(value.shape == other.shape and numpy.array_equal(value, other) for other in (weight, weight.T))
