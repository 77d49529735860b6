"""Where models run: lean graphs, ties broken alike, int8, and which runtime is the fastest here."""

import collections
import logging
from unittest.mock import Mock

import pytest
import torch
from conftest import document, tiny_vit

from slimcli import SlimError
from slimcli import slim as slimmed
from slimcli.deployment.export import Checked, check
from slimcli.layout import optimize
from slimcli.measure.rows import Row
from slimcli.runtimes import Conversion, Forward, find_runtime, runtimes
from slimcli.runtimes.eager import TorchProgram
from slimcli.runtimes.measuring import Place, fastest, profile_places


def images(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def model(kind="discard"):
    # so wide that the exporter folds its weights no more
    dense = tiny_vit(depth=3, embed_dim=128 if kind == "calibrated" else 32, init_values=0.5)
    with torch.no_grad():
        for block in dense.blocks:
            for scale in (block.ls1, block.ls2):
                scale.gamma.uniform_(0.4, 0.6)
    made = slimmed(dense, 0.5, life_layer=1, dead="discard" if kind == "discard" else "heir").eval()
    if kind == "calibrated":
        made.redundancy, made.merge_importance, made.exact_savings = 1.0, 0.5, True
        made.life_head.extend(16, 32)
        # the weights of its norms go into those of the layers behind them
        with torch.no_grad():
            for norm in (m for m in made.life_head.modules() if isinstance(m, torch.nn.LayerNorm)):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_()
    return made


def without_order(kind):
    """A model that finds all patches equally important."""
    made = model(kind)
    with torch.no_grad():
        made.life_head.query.weight.zero_()
        if made.life_head.context is not None:
            made.life_head.context.score.weight.zero_()
    return made


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders with exported models, by kind."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from slimcli.runtimes.onnx import graph

    found = {}
    for kind in ("discard", "calibrated"):
        found[kind] = tmp_path_factory.mktemp(kind)
        graph(Forward(without_order(kind)), Conversion(), found[kind] / "model.onnx")
    return found


@pytest.fixture(scope="module")
def graphs(exported):
    import onnx

    return {kind: onnx.load(folder / "model.onnx") for kind, folder in exported.items()}


def operators(proto):
    return collections.Counter(node.op_type for node in proto.graph.node)


def test_graphs_stay_lean(graphs):
    """A dense block is 29 operators, all that is not a block 15; dropping adds few, and no shape is found at run time
    but the number of images.
    """
    discard, planned = (operators(graphs[kind]) for kind in ("discard", "calibrated"))
    assert discard.total() <= 3 * 29 + 15 + 25
    assert planned.total() <= 3 * 29 + 15 + 230
    for found in (discard, planned):
        assert not {"If", "Loop", "Scan"} & set(found)
        assert found["Erf"] == 0 and found["Gelu"] >= 3
    assert discard["Shape"] <= 1 and planned["Shape"] <= 1
    # twice a block and once in the end; the life head's input, and its scores
    assert discard["LayerNormalization"] == 2 * 3 + 1 + 2
    # beside that three times in the head's own block, once a round of the plan, and where heirs take over in a block
    assert planned["LayerNormalization"] == discard["LayerNormalization"] + 3 + 2 + 1
    # heirs are put back in whole rows, in one operator each of two times, and none has to add to what another adds to
    assert planned["ScatterND"] == 2
    scatters = [node for node in graphs["calibrated"].graph.node if node.op_type == "ScatterND"]
    assert {attribute.s for node in scatters for attribute in node.attribute} <= {b"none"}
    # one order, and rows are taken once, whole
    assert discard["TopK"] == discard["GatherND"] == 1
    assert not {"ScatterElements", "GatherElements", "Cast"} & set(discard)


def test_queries_keys_and_values_are_products_of_their_own(graphs):
    for proto in graphs.values():
        assert [n for n in proto.graph.node if n.op_type == "Transpose" and len(n.attribute[0].ints) == 5] == []


def test_every_weight_stands_in_its_product_where_int8_finds_it(graphs):
    """Also that of queries alone, or of keys and values, where heirs take over inside a block."""
    for proto in graphs.values():
        weights = {
            tensor.name for tensor in proto.graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) >= 16
        }
        assert not [n for n in proto.graph.node if n.op_type in ("Slice", "Transpose") and n.input[0] in weights]


def test_no_output_is_scaled_channel_by_channel(graphs):
    """The weight before it is scaled instead (LayerScale)."""
    for proto in graphs.values():
        channels = {tensor.name for tensor in proto.graph.initializer if len(tensor.dims) == 1 and tensor.dims[0] > 16}
        assert not [n for n in proto.graph.node if n.op_type == "Mul" and channels & set(n.input)]


def test_products_in_int8_add_their_bias_and_give_float_at_once(exported, tmp_path):
    """What queries, keys and values read is quantized once, and nothing that a product gives."""
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    from slimcli.runtimes.onnx_int8 import kept_in_float, quantize

    made, source = without_order("calibrated"), exported["calibrated"] / "model.onnx"
    level = logging.getLogger().level
    quantize(source, tmp_path / "model.onnx", Forward(made), [images(4)])
    assert logging.getLogger().level == level
    proto = onnx.load(tmp_path / "model.onnx")
    kept = kept_in_float(onnx.load(source), Forward(made))
    producers = {name: node for node in proto.graph.node for name in node.output}
    readers = collections.defaultdict(list)
    for node in proto.graph.node:
        for name in node.input:
            readers[name].append(node.op_type)
    products = [n for n in proto.graph.node if n.op_type == "Gemm" and n.name not in kept]
    # six of each block, and the classifier
    assert len(products) == 3 * 6 + 1 and all(len(node.input) == 3 for node in products)
    assert not [node for node in products if "QuantizeLinear" in readers[node.output[0]]]
    assert not [n for n in proto.graph.node if n.op_type == "MatMul" and n.name not in kept]
    # queries, keys and values of the first block read the same
    assert len({producers[node.input[0]].input[0] for node in products[:3]}) == 1
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = made(images(4))
    found = torch.from_numpy(session.run(None, {"images": images(4).numpy()})[0])
    assert (found - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_what_int8_leaves_in_float_is_found_in_openvino_by_name(exported):
    pytest.importorskip("openvino")
    onnx = pytest.importorskip("onnx")
    from slimcli.runtimes.onnx_int8 import kept_in_float
    from slimcli.runtimes.openvino import names_there, read_graph

    source = exported["calibrated"] / "model.onnx"
    kept, there = kept_in_float(onnx.load(source), Forward(without_order("calibrated"))), read_graph(source)
    products = {op.get_friendly_name() for op in there.get_ops() if op.get_type_name() == "MatMul"}
    assert len(kept) > 10 and len(products & set(names_there(there, kept))) == len(kept)


def test_openvino_sorts_stably_where_somebody_asks_for_places(exported):
    pytest.importorskip("openvino")
    from slimcli.runtimes.openvino import read_graph

    there = read_graph(exported["calibrated"] / "model.onnx")
    sorts = [op for op in there.get_ops() if op.get_type_name() == "TopK"]
    asked = [bool(op.output(1).get_target_inputs()) for op in sorts]
    assert {*asked} == {True, False} and asked == [op.get_attributes()["stable"] for op in sorts]


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("taken", [120, 40])
def test_openvino_sorts_many_values_in_two_as_a_stable_sort_does(mode, taken):
    openvino = pytest.importorskip("openvino")
    from openvino import opset13 as ops

    from slimcli.runtimes.openvino import _sort_in_two

    given = ops.parameter([-1, 120])
    sort = ops.topk(given, taken, 1, mode, "value", index_element_type="i64", stable=True)
    model = openvino.Model([sort.output(0), sort.output(1)], [given])
    _sort_in_two(next(op for op in model.get_ops() if op.get_type_name() == "TopK"))
    assert not any(op.get_attributes()["stable"] for op in model.get_ops() if op.get_type_name() == "TopK")
    x = (4 * torch.randn(3, 120, generator=torch.Generator().manual_seed(0))).round()
    values, places = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x.numpy()]).values()
    expected = x.sort(dim=1, descending=mode == "max", stable=True)
    assert torch.equal(torch.from_numpy(values), expected.values[:, :taken])
    assert torch.equal(torch.from_numpy(places), expected.indices[:, :taken])


def test_openvino_chooses_what_is_not_in_int8(exported, tmp_path, monkeypatch):
    """bfloat16 where the processor has it; a precision that was asked for is left to nobody."""
    openvino = pytest.importorskip("openvino")
    openvino.save_model(openvino.Core().read_model(str(exported["discard"] / "model.onnx")), tmp_path / "model.xml")
    found = []

    class Core:
        def read_model(self, *_):
            return None

        def compile_model(self, model, device, options):
            found.append(options.get("INFERENCE_PRECISION_HINT"))
            return Mock()

    monkeypatch.setattr(openvino, "Core", Core)
    for precision in ("float32", "bfloat16", "int8"):
        find_runtime("openvino").open(tmp_path, precision)
    assert found == ["f32", "bf16", None]


def test_int8_in_openvino_keeps_the_life_head_in_float(exported):
    pytest.importorskip("nncf")
    onnx = pytest.importorskip("onnx")
    from slimcli.runtimes.onnx_int8 import kept_in_float
    from slimcli.runtimes.openvino import _quantized, names_there, read_graph

    source, forward = exported["calibrated"] / "model.onnx", Forward(without_order("calibrated"))
    there = read_graph(source)
    kept = set(names_there(there, kept_in_float(onnx.load(source), forward)))
    found = _quantized(there, source, forward, Conversion("int8", None, [images(4)]))
    products = [op for op in found.get_ops() if op.get_type_name() == "MatMul"]
    rounded = {
        op.get_friendly_name() for op in products if op.input_value(0).get_node().get_type_name() == "FakeQuantize"
    }
    # six of each block, and the classifier
    assert len(rounded) == 3 * 6 + 1 and not rounded & kept


@pytest.mark.parametrize("name", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize("kind", ["discard", "calibrated"])
def test_patches_with_equal_lives_leave_alike_in_every_runtime(name, kind, exported, tmp_path):
    """Who comes first in the image stays longer."""
    runtime = find_runtime(name)
    if runtime.missing():
        pytest.skip(f"{', '.join(runtime.missing())} is not installed")
    made = without_order(kind)
    with torch.no_grad():
        expected = made(images())
    if kind == "discard":
        assert (made.life.argsort(dim=1, descending=True, stable=True) == torch.arange(16)).all()
    if name == "torch":
        program = runtime.prepare(Forward(made), Conversion())
    elif name == "onnx":
        program = runtime.open(exported[kind], "float32")
    else:
        import openvino

        from slimcli.runtimes.openvino import read_graph

        openvino.save_model(read_graph(exported[kind] / "model.onnx"), tmp_path / "model.xml", False)
        program = runtime.open(tmp_path, "float32")
    torch.testing.assert_close(program.run(images()), expected, atol=2e-4, rtol=1e-3)


def test_int8_in_torch_keeps_the_life_head_in_float():
    pytest.importorskip("torchao")
    from slimcli.runtimes.torch_int8 import quantized

    made = model("calibrated")
    found = quantized(Forward(made)).slim
    kinds = {name: hasattr(layer.weight, "__tensor_flatten__") for name, layer in linear(found.model)}
    assert kinds and all(kinds.values())
    assert not any(hasattr(layer.weight, "__tensor_flatten__") for _, layer in linear(found.selector))
    # the model itself stays as it was
    assert not any(hasattr(layer.weight, "__tensor_flatten__") for _, layer in linear(made))
    program = find_runtime("torch").prepare(Forward(made), Conversion("int8"))
    with torch.no_grad():
        checked = check(program, TorchProgram(Forward(made), torch.float32), [images()], True)
    assert checked.relative < 0.1
    float32 = find_runtime("torch").prepare(Forward(made), Conversion())
    assert program.megabytes < 0.6 * float32.megabytes


def test_int8_in_torch_gives_queries_without_keys_and_values():
    pytest.importorskip("torchao")
    from slimcli.layout import rows
    from slimcli.runtimes.torch_int8 import quantized

    layer = optimize(quantized(Forward(model()))).slim.model.blocks[0].attn.qkv
    tokens, asked = torch.randn(2, 5, 32), []
    with torch.inference_mode():
        whole = layer(tokens)
        layer.forward = lambda x: asked.append(x) or whole
        for first, last in ((0, 32), (32, 96)):
            torch.testing.assert_close(rows(layer, tokens, first, last), whole[..., first:last])
        assert asked == []
        assert torch.equal(rows(layer, tokens, 0, 7), whole[..., :7]) and asked


def linear(module):
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)]


def test_torch_keeps_no_file_in_int8(refused, monkeypatch):
    pytest.importorskip("torchao")
    assert "keeps no file in int8" in refused("export", "--to", "torch", "--precision", "int8", "-o", "out")


def test_the_fastest_runtime_is_named_with_its_factors():
    rows = [
        Row(dense=True, runtime="torch", images_per_second=10.0),
        Row(keep_rate=0.7, runtime="torch", images_per_second=14.0, speedup=1.4, over_first=1.4),
        Row(dense=True, runtime="onnx int8", images_per_second=20.0, speedup=1.0, over_first=2.0),
        Row(keep_rate=0.7, runtime="onnx int8", images_per_second=30.0, speedup=1.5, over_first=3.0),
    ]
    assert fastest(rows) == (
        "fastest here: onnx int8 0.7, 30.0 images/s: 3.00 times as fast as torch dense, "
        "1.50 times as fast as dense in the same runtime"
    )
    assert fastest(rows[:2]) is None


def test_a_runtime_that_was_not_named_and_fails_is_left_out_with_a_warning(monkeypatch):
    def fails(*_):
        raise SlimError("no compiler")

    class Failing(type(find_runtime("torch"))):
        name = "failing"
        prepare = fails

    said = []
    places = [Place(find_runtime("torch"), "float32"), Place(Failing(), "float32", named=False)]
    rows = profile_places(model(), None, places, 2, 0.0, warn=said.append)
    assert [row.runtime for row in rows] == ["torch", "torch"]
    assert rows[0].over_first == 1 and rows[0].megabytes <= rows[1].megabytes
    assert said == ["failing is left out: no compiler"]
    with pytest.raises(SlimError, match="no compiler"):
        profile_places(model(), None, [Place(Failing(), "float32")], 2, 0.0)


def test_plugins_lists_runtimes_with_versions_and_what_is_missing(slim, monkeypatch):
    monkeypatch.setattr(type(find_runtime("aoti")), "missing", lambda self: ["compiler"])
    plugins = document(slim("plugins", "--json"))["plugins"]
    found = {name: about for plugin in plugins for name, about in plugin["runtimes"].items()}
    assert set(found) == set(runtimes())
    assert "torch 2" in found["torch"] and "float32" in found["torch"]
    assert "missing compiler: pip install" in found["aoti"]


def test_tolerances_lie_between_a_right_export_and_a_wrong_one():
    """The figures of the real model: the largest and the mean difference."""
    right = {"float32": (1e-5, 1e-5), "bfloat16": (0.182, 0.028), "int8": (0.256, 0.109)}
    for precision, (largest, mean) in right.items():
        assert (
            Checked(64, largest, largest, 98.5 if precision == "int8" else 99.8, True, mean).problem(precision) is None
        )
        # one block's MLP without its weights
        assert Checked(64, 0.478, 0.478, 95.0, True, 0.247).problem(precision)
        assert "in the mean" in Checked(64, 0.2, 0.0005, 99.8, True, 0.247).problem(precision)
