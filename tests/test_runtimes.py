"""Where models run: lean graphs, ties broken alike, int8, and which runtime is the fastest here."""

import collections

import pytest
import torch
from conftest import document, tiny_vit

from slimcli import SlimError
from slimcli import slim as slimmed
from slimcli.deployment.export import Checked, check
from slimcli.measure.rows import Row
from slimcli.runtimes import Conversion, Forward, find_runtime, runtimes
from slimcli.runtimes.eager import TorchProgram
from slimcli.runtimes.measuring import Place, fastest, profile_places


def images(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def model(kind="discard"):
    made = slimmed(tiny_vit(), 0.5, life_layer=1, dead="discard" if kind == "discard" else "heir").eval()
    if kind == "calibrated":
        made.redundancy, made.merge_importance, made.exact_savings = 1.0, 0.5, True
        made.life_head.extend(16, 32)
    return made


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """The operators of each exported model, by kind."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from slimcli.runtimes.onnx import graph

    folder, found = tmp_path_factory.mktemp("graphs"), {}
    for kind in ("dense", "discard", "calibrated"):
        own = model("discard" if kind == "dense" else kind)
        graph(Forward(own, dense=kind == "dense"), Conversion(), folder / f"{kind}.onnx")
        found[kind] = onnx.load(folder / f"{kind}.onnx")
    return found


def operators(proto):
    return collections.Counter(node.op_type for node in proto.graph.node)


def test_graphs_stay_lean(graphs):
    """A block is 27 operators; dropping adds few, and shapes are not computed at run time."""
    dense, discard, planned = (operators(graphs[kind]) for kind in ("dense", "discard", "calibrated"))
    assert dense.total() <= 4 * 30 + 15
    assert discard.total() - dense.total() <= 45
    assert planned.total() - dense.total() <= 350
    for found in (dense, discard, planned):
        assert not {"If", "Loop", "Scan"} & set(found)
        # only the number of images is not known
        assert found["Shape"] <= (8 if found is planned else 2)
        assert found["Erf"] == 0 and found["Gelu"] >= 4
    # one order, counted; rows are taken once
    assert dense["Cast"] == 0 and discard["Cast"] <= 1
    assert discard["TopK"] == 0 and discard["ScatterElements"] <= 1


def test_queries_keys_and_values_are_not_copied_out_of_one_product(graphs):
    for proto in graphs.values():
        constants = {tensor.name for tensor in proto.graph.initializer}
        makers = {name: node for node in proto.graph.node for name in node.output}
        for node in proto.graph.node:
            if node.op_type == "Split":
                assert makers[node.input[0]].op_type != "Transpose"
        assert len(constants) == len(set(constants))


@pytest.mark.parametrize("name", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize("kind", ["discard", "calibrated"])
def test_patches_with_equal_lives_leave_alike_in_every_runtime(name, kind):
    """All lives are equal: the first in raster order stay."""
    runtime = find_runtime(name)
    if runtime.missing():
        pytest.skip(f"{', '.join(runtime.missing())} is not installed")
    made = model(kind)
    with torch.no_grad():
        made.life_head.query.weight.zero_()
        if made.life_head.context is not None:
            made.life_head.context.score.weight.zero_()
        expected = made(images())
        if kind == "discard":
            first = made.life.argsort(dim=1, descending=True, stable=True)
            assert (first == torch.arange(16)).all()
    program = runtime.prepare(Forward(made), Conversion())
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
    assert rows[0].over_first == 1 and rows[0].megabytes < rows[1].megabytes
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
    for precision, right, wrong in (("float32", 1e-5, 0.01), ("bfloat16", 0.06, 0.5), ("int8", 0.3, 0.9)):
        assert Checked(64, right, right, 99.5).problem(precision) is None
        assert Checked(64, wrong, wrong, 99.5).problem(precision)
