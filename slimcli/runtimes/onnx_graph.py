"""What the exporter's graph is made leaner by: fewer copies, no shape arithmetic, operators that runtimes know."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy
import torch

#: queries, keys and values of one layer, (B, n, parts, heads, d), to parts first
PARTS_FIRST = [2, 0, 3, 1, 4]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators of torch's that are written in other ones than the exporter would.

    Attention, of which the exporter copies the keys twice, by shapes that it finds at run time; GELU in one operator.
    """
    from onnxscript import opset20 as op

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if is_causal or enable_gqa:
            raise NotImplementedError("attention that is causal, or has groups of queries")
        factor = op.Constant(value_float=scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
        scores = op.Mul(op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2])), factor)
        if attn_mask is not None:
            scores = op.Add(scores, attn_mask)
        return op.MatMul(op.Softmax(scores, axis=-1), value)

    def gelu(self: Any, approximate: str = "none") -> Any:
        return op.Gelu(self, approximate=approximate)

    aten = torch.ops.aten
    return {aten.scaled_dot_product_attention.default: attention, aten.gelu.default: gelu}


class _Linear(NamedTuple):
    """What a linear layer reads, its weight (in, out) and its bias (out,), if it has one."""

    x: Any
    weight: Any
    bias: Any


def split_projections(model: Any) -> None:
    """Make queries, keys and values a product each in an `onnx_ir.Model`, so that none is copied out of all three.

    ONNX Runtime saves a tenth of a ViT-S's time by it.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    for transpose in [n for n in graph if n.op_type == "Transpose" and list(n.attributes["perm"].value) == PARTS_FIRST]:
        reshape = transpose.inputs[0].producer()
        shape = _sizes(reshape.inputs[1]) if reshape is not None and reshape.op_type == "Reshape" else None
        linear = None if shape is None else _linear(reshape.inputs[0])
        if shape is not None and linear is not None:
            # a size that is left to be found, or copied, must not be taken for a number
            shape[4] = linear.weight.shape[1] // (shape[2] * shape[3])
            shape[0] = -1
            if (shape[1:] <= 0).any():
                continue
            for part, old in list(_parts(transpose)):
                old.replace_all_uses_with(_projection(graph, transpose, linear, part, shape))
    RemoveUnusedNodesPass()(model)


def _projection(graph: Any, before: Any, linear: _Linear, part: int, shape: Any) -> Any:
    """One part (B, heads, n, d) of a linear layer whose output is of `shape` (B, n, parts, heads, d)."""
    import onnx_ir as ir

    def constant(array: Any) -> Any:
        tensor = ir.tensor(numpy.ascontiguousarray(array))
        name = f"part_{len(graph.initializers)}"
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
        return value

    batch, tokens, _, heads, channels = (int(size) for size in shape)
    columns = slice(part * heads * channels, (part + 1) * heads * channels)
    nodes = [ir.node("MatMul", [linear.x, constant(linear.weight[:, columns])])]
    if linear.bias is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], constant(linear.bias[columns])]))
    split = constant(numpy.array([batch, tokens, heads, channels], dtype=numpy.int64))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], split], {"allowzero": 1}))
    nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 2, 1, 3]}))
    graph.insert_before(before, nodes)
    return nodes[-1].outputs[0]


def _parts(transpose: Any) -> Iterator[tuple[int, Any]]:
    """The values that are cut out of what comes with parts first, each with its part's number."""
    for cut, _ in transpose.outputs[0].uses():
        if cut.op_type != "Slice" or len(cut.inputs) != 4:
            continue
        start, end, axes = (_constant(value) for value in cut.inputs[1:])
        if start is not None and end is not None and axes is not None and list(axes) == [0] and end == start + 1:
            for squeeze, _ in cut.outputs[0].uses():
                if squeeze.op_type == "Squeeze":
                    yield int(start[0]), squeeze.outputs[0]


def _linear(value: Any) -> _Linear | None:
    """The linear layer that gives a value; None where it is something else."""
    node, bias = value.producer(), None
    if node is not None and node.op_type == "Add":
        bias = _constant(node.inputs[1])
        node = None if bias is None else node.inputs[0].producer()
    weight = _constant(node.inputs[1]) if node is not None and node.op_type == "MatMul" else None
    return None if weight is None else _Linear(node.inputs[0], weight, bias)


def _sizes(value: Any) -> Any:
    found = _constant(value)
    return None if found is None or len(found) != 5 else numpy.array(found)


def _constant(value: Any) -> Any:
    """A constant's numbers; None for what is computed."""
    return None if value is None or value.const_value is None else value.const_value.numpy()
