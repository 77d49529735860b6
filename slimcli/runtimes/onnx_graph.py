"""What the exporter's graph is made leaner by: fewer copies, no shape arithmetic, operators that runtimes know."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy
import torch

from slimcli.life.exported import OPERATOR

#: queries, keys and values of one layer, (B, n, parts, heads, d), to parts first
PARTS_FIRST = [2, 0, 3, 1, 4]
#: of what is folded, and the end of what is not cut off
LARGEST_CONSTANT = 2**63 - 1


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators of torch's that are written in other ones than the exporter would.

    Attention, of which the exporter copies the keys twice, by shapes that it finds at run time; GELU in one operator;
    and slim's own, `slimcli.life.exported`.
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

    def product(self: Any, batch1: Any, batch2: Any, beta: float = 1.0, alpha: float = 1.0) -> Any:
        found = op.MatMul(batch1, batch2)
        if beta != 1:
            self = op.Mul(self, op.Constant(value_float=float(beta)))
        if alpha == -1:
            return op.Sub(self, found)
        return op.Add(self, found if alpha == 1 else op.Mul(found, op.Constant(value_float=float(alpha))))

    def join(tokens: Any, rows: Any, together: Any, share: Any, stay: int) -> Any:
        numbers: Any = [op.Constant(value_ints=[number]) for number in (0, stay, LARGEST_CONSTANT, 1)]
        zero, first, last, axis = numbers
        leave, stays = op.Slice(tokens, first, last, axis), op.Slice(tokens, zero, first, axis)
        there = op.GatherND(tokens, rows)
        more = op.MatMul(together, op.Mul(op.Sub(leave, there), share))
        return op.ScatterND(stays, rows, op.Add(there, more))

    aten = torch.ops.aten
    return {
        OPERATOR: join,
        aten.scaled_dot_product_attention.default: attention,
        aten.gelu.default: gelu,
        aten.baddbmm.default: product,
    }


class _Linear(NamedTuple):
    """What a linear layer reads, its weight (in, out) and its bias (out,), if it has one."""

    x: Any
    weight: Any
    bias: Any


def tidy(model: Any) -> None:
    """Make the exporter's graph, an `onnx_ir.Model`, one of fewer operators that gives the same."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    # parts of weights are cut out once, however large they are
    fold_constants(model, input_size_limit=LARGEST_CONSTANT, output_size_limit=LARGEST_CONSTANT)
    scale_weights(model)
    split_projections(model)
    take_whole_rows(model)
    cut_once(model)
    RemoveUnusedNodesPass()(model)


def scale_weights(model: Any) -> None:
    """Scale a linear layer's weight and bias where its output would be, channel by channel (LayerScale)."""
    import onnx_ir as ir

    graph = model.graph
    for scale in [n for n in graph if n.op_type == "Mul"]:
        factor, linear = _constant(scale.inputs[1]), _linear(scale.inputs[0])
        if factor is None or linear is None or factor.shape != linear.weight.shape[1:] or not _read_once(scale):
            continue
        nodes = [ir.node("MatMul", [linear.x, _new(graph, linear.weight * factor)])]
        if linear.bias is not None:
            nodes.append(ir.node("Add", [nodes[0].outputs[0], _new(graph, linear.bias * factor)]))
        graph.insert_before(scale, nodes[:-1])
        _put(graph, scale, nodes[-1])


def join_biases(model: Any, but: Collection[str] = ()) -> None:
    """Make linear layers one operator, Gemm, on the rows of all images, but those whose product has one of the names.

    Quantized, it adds the bias before it scales, and what several layers read is quantized once.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    flat: dict[Any, Any] = {}
    for add in [n for n in graph if n.op_type == "Add"]:
        product, bias = add.inputs[0].producer(), _constant(add.inputs[1])
        if product is None or product.op_type != "MatMul" or product.name in but or not _read_once(add):
            continue
        x, weight = product.inputs[0], _constant(product.inputs[1])
        if bias is None or weight is None or bias.shape != weight.shape[1:] or x.shape is None or len(x.shape) != 3:
            continue
        if not isinstance(tokens := x.shape[1], int):
            continue
        if x not in flat:
            flat[x] = ir.node("Reshape", [x, _new(graph, numpy.array([-1, len(weight)], dtype=numpy.int64))])
            graph.insert_before(product, flat[x])
        linear = ir.node("Gemm", [flat[x].outputs[0], product.inputs[1], add.inputs[1]], name=product.name)
        shape = _new(graph, numpy.array([-1, tokens, weight.shape[1]], dtype=numpy.int64))
        graph.insert_before(add, linear)
        _put(graph, add, ir.node("Reshape", [linear.outputs[0], shape]))
    RemoveUnusedNodesPass()(model)


def split_projections(model: Any) -> None:
    """Make queries, keys and values a product each in an `onnx_ir.Model`, so that none is copied out of all three.

    So are keys and values where queries are made of other tokens. ONNX Runtime saves a tenth of a ViT-S's time by it.
    """
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


def take_whole_rows(model: Any) -> None:
    """Take rows of tokens (B, n, D) by their places (B, m) as they are, and not number by number."""
    import onnx_ir as ir

    graph = model.graph
    for gather in [n for n in graph if n.op_type == "GatherElements"]:
        expand = gather.inputs[1].producer()
        if gather.attributes["axis"].value != 1 or expand is None or expand.op_type != "Expand":
            continue
        places, rows = expand.inputs[0], gather.inputs[0]
        if places.shape is None or len(places.shape) != 3 or places.shape[2] != 1:
            continue
        # the whole width of what is read
        if rows.shape is None or gather.outputs[0].shape is None or rows.shape[2] != gather.outputs[0].shape[2]:
            continue
        whole = ir.node("GatherND", [rows, places], {"batch_dims": 1})
        _put(graph, gather, whole)


def cut_once(model: Any) -> None:
    """Cut a piece out along all its dimensions in one operator."""
    import onnx_ir as ir

    graph = model.graph
    added: dict[Any, Any] = {}
    for cut in [n for n in graph if n.op_type == "Slice"]:
        own, before = _Cut.of(cut), cut.inputs[0].producer()
        if own is None or before is None:
            continue
        if before.op_type == "Slice" and (first := _Cut.of(before)) and not set(first.axes) & set(own.axes):
            joined = _Cut(first.starts + own.starts, first.ends + own.ends, first.axes + own.axes)
            _put(graph, cut, joined.node(graph, before.inputs[0]))
        elif (place := _one_of_second(before)) is not None and own.axes == [1]:
            # (B, k, n) at one k, cut and made (B, 1, 1, m): cut out of (B, k, 1, n)
            whole = before.inputs[0]
            for use, _ in list(cut.outputs[0].uses()):
                if use.op_type == "Unsqueeze" and _list(use.inputs[1]) == [1, 2]:
                    if whole not in added:
                        axis = _new(graph, numpy.array([2], dtype=numpy.int64))
                        added[whole] = ir.node("Unsqueeze", [whole, axis])
                        graph.insert_after(whole.producer(), added[whole])
                    end = place + 1 if place != -1 else LARGEST_CONSTANT
                    joined = _Cut([place, *own.starts], [end, *own.ends], [1, 3])
                    _put(graph, use, joined.node(graph, added[whole].outputs[0]))


class _Cut(NamedTuple):
    """What a Slice in steps of 1 cuts out."""

    starts: list[int]
    ends: list[int]
    axes: list[int]

    @classmethod
    def of(cls, node: Any) -> _Cut | None:
        found = [part for value in node.inputs[1:] if (part := _list(value)) is not None]
        if len(found) < max(3, len(node.inputs) - 1) or any(step != 1 for step in (found[3:] or [[1]])[0]):
            return None
        return cls(*found[:3])

    def node(self, graph: Any, value: Any) -> Any:
        import onnx_ir as ir

        parts = [_new(graph, numpy.array(part, dtype=numpy.int64)) for part in self]
        return ir.node("Slice", [value, *parts])


def _one_of_second(node: Any) -> int | None:
    """Which of those of the second dimension a Gather takes, if it takes one."""
    if node.op_type != "Gather" or node.attributes["axis"].value != 1:
        return None
    place = _constant(node.inputs[1])
    return int(place) if place is not None and place.ndim == 0 else None


def _put(graph: Any, old: Any, new: Any) -> None:
    """A node in the place of another, each with one output."""
    new.outputs[0].shape, new.outputs[0].type = old.outputs[0].shape, old.outputs[0].type
    graph.insert_before(old, new)
    old.outputs[0].replace_all_uses_with(new.outputs[0])


def _projection(graph: Any, before: Any, linear: _Linear, part: int, shape: Any) -> Any:
    """One part (B, heads, n, d) of a linear layer whose output is of `shape` (B, n, parts, heads, d)."""
    import onnx_ir as ir

    batch, tokens, _, heads, channels = (int(size) for size in shape)
    columns = slice(part * heads * channels, (part + 1) * heads * channels)
    nodes = [ir.node("MatMul", [linear.x, _new(graph, linear.weight[:, columns])])]
    if linear.bias is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], _new(graph, linear.bias[columns])]))
    split = _new(graph, numpy.array([batch, tokens, heads, channels], dtype=numpy.int64))
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


def _read_once(node: Any) -> bool:
    """Whether nothing else reads what a node reads first."""
    return len(list(node.inputs[0].uses())) == 1


def _sizes(value: Any) -> Any:
    found = _constant(value)
    return None if found is None or len(found) != 5 else numpy.array(found)


def _new(graph: Any, array: Any) -> Any:
    """A constant of a graph."""
    import onnx_ir as ir

    tensor = ir.tensor(numpy.ascontiguousarray(array))
    number = len(graph.initializers)
    while (name := f"part_{number}") in graph.initializers:  # of a graph that was read from a file
        number += 1
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def _list(value: Any) -> list[int] | None:
    found = _constant(value)
    return None if found is None else [int(number) for number in found.flatten()]


def _constant(value: Any) -> Any:
    """A constant's numbers; None for what is computed."""
    return None if value is None or value.const_value is None else value.const_value.numpy()
