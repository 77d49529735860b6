"""Models that leave slim: exported, checked, and run by programs that know neither torch nor slim."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from functools import partial

import numpy
import pytest
import torch
from conftest import document, tiny_vit
from packaging.requirements import Requirement
from PIL import Image

import slimcli
from slimcli import slim as slimmed
from slimcli.data import eval_transform
from slimcli.data.read import read_image
from slimcli.deployment import export as exporting
from slimcli.deployment.export import Checked, Inexact, check, export_model
from slimcli.deployment.prediction import predictor_of_export
from slimcli.errors import SlimError
from slimcli.runtimes import Conversion, Forward, Program, Runtime, find_runtime, runtimes
from slimcli.runtimes.onnx import check_free, graph
from slimcli.session.session import Request, open_session
from slimcli.store.model_folder import save_model

onnx = pytest.importorskip("onnx")
numpy_helper = pytest.importorskip("onnx.numpy_helper")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PREPARE = {
    "input_size": [3, 32, 32],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
CONFIG = {"model": {"name": "tiny", "args": {}}, "preprocessing": PREPARE, "class_names": [f"c{i}" for i in range(10)]}


def batches(count=4, size=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 32, 32, generator=generator) for _ in range(count)]


def planned(**changes):
    """Heirs, planning, a head with its own block and exact savings: what a calibrated model has."""
    model = slimmed(tiny_vit(**changes), 0.5, life_layer=1, dead="heir").eval()
    model.life_head.extend(8, 32)
    model.redundancy, model.merge_importance, model.exact_savings = 1.0, 0.7, True
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "onnx"
    export_model(planned(depth=2), find_runtime("onnx"), folder, CONFIG, batches())
    return folder


@pytest.fixture
def photograph(tmp_path):
    """One that is turned by its EXIF tag."""
    generator = numpy.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (6, 9, 3), dtype=numpy.uint8)).resize((90, 61))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "photograph.png", exif=exif)
    return tmp_path / "photograph.png"


def test_an_artefact_has_standard_operators_alone_and_takes_any_number_of_images(exported):
    proto = onnx.load(exported / "model.onnx")
    operators = {node.op_type for node in proto.graph.node}
    assert {node.domain for node in proto.graph.node} == {""}
    assert proto.opset_import[0].version >= 17
    assert not operators & {"If", "Loop", "Scan"}
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"))
    for count in (1, 7):
        assert session.run(None, {"images": numpy.zeros((count, 3, 32, 32), "f4")})[0].shape == (count, 10)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """A folder for the graphs of models by kind, which ONNX Runtime and OpenVINO both read."""
    return tmp_path_factory.mktemp("graphs")


def written_once(graphs, kind, model, conversion, path):
    known = graphs / f"{kind}.onnx"
    if not known.exists():
        graph(model, conversion, known)
    shutil.copy(known, path)


@pytest.mark.parametrize("kind", ["discard", "registers", "features"])
@pytest.mark.parametrize("name", ["torch", "onnx", "openvino"])
def test_runtimes_give_what_the_model_gives(name, kind, graphs, monkeypatch):
    runtime = find_runtime(name)
    if runtime.missing():
        pytest.skip(f"{', '.join(runtime.missing())} is not installed")
    changes = {"depth": 2, **{"registers": {"reg_tokens": 2}, "features": {"num_classes": 0}}.get(kind, {})}
    if name in ("onnx", "openvino"):
        monkeypatch.setattr(sys.modules[type(runtime).__module__], "graph", partial(written_once, graphs, kind))
    model = planned(**changes) if kind == "registers" else slimmed(tiny_vit(**changes), 0.5, life_layer=1).eval()
    forward = Forward(model)
    program = runtime.prepare(forward, Conversion())
    for images in (batches()[0], batches()[0][:1]):
        with torch.inference_mode():
            expected = model.embedding(images) if kind == "features" else model(images)
        torch.testing.assert_close(program.run(images), expected, atol=2e-4, rtol=1e-3)
    program.close()


RIVALS = (
    "tome",
    "evit",
    "dynamicvit",
    "pitome",
    "tofu",
    "atc",
    "diffrate",
    "evo-vit",
    "a-vit",
    "ia-red2",
    "resize",
    "random",
)


@pytest.mark.parametrize("method", RIVALS)
def test_rivals_are_exported_or_refused_in_a_line_as_they_say(method):
    # an export takes as long as there are blocks; patches leave in or after the first
    model = slimmed(tiny_vit(depth=2), 0.5, life_layer=1, method=method).eval()
    images = batches()[0]
    try:
        program = find_runtime("onnx").prepare(Forward(model), Conversion())
    except slimcli.SlimError as error:
        assert "\n" not in str(error) and method in str(error)
        assert model.no_graph is not None and model.no_graph in str(error)
        return
    assert model.no_graph is None
    with torch.inference_mode():
        torch.testing.assert_close(program.run(images), model(images), atol=1e-3, rtol=1e-3)


def test_predict_eval_load_and_the_artefact_see_one_image_alike(exported, photograph, slim, tmp_path):
    """One photograph, turned by its EXIF tag, through all that prepares images: the same pixels, the same answer."""
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    config = {**CONFIG, "model": {"name": "vit_tiny_patch16_224", "args": args}}
    save_model(tmp_path / "model", planned(depth=2), config, torch.float32)
    model = slimcli.load(tmp_path / "model")
    pixels = model.transform()(photograph)
    torch.testing.assert_close(pixels, eval_transform(PREPARE)(read_image(photograph)), atol=0, rtol=0)
    with torch.inference_mode():
        expected = model(pixels[None]).softmax(dim=-1)[0]
    right = model.class_names[int(expected.argmax())]

    for folder in (right, "c0" if right != "c0" else "c1"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    shutil.copy(photograph, tmp_path / "data" / right)
    shutil.copy(photograph, tmp_path / "data" / folder)
    session = open_session(Request("eval", "model", data="data", device="cpu"))
    ((seen, _),) = session.loader(session.images())
    torch.testing.assert_close(seen, pixels.expand(2, -1, -1, -1), atol=0, rtol=0)
    rows = document(slim("eval", "model", "--data", "data", "--json"))["rows"]
    assert rows[-1]["top1"] == 50

    for target in ("model", exported):
        (image,) = document(slim("predict", photograph, "--model", target, "--top", 10, "--json"))["images"]
        found = {entry["class"]: entry["probability"] for entry in image["classes"]}
        assert image["classes"][0]["class"] == right
        assert [found[name] for name in model.class_names] == pytest.approx(expected.tolist(), abs=2e-4)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_the_cards_program_runs_without_torch_and_slim(exported, photograph, tmp_path, mode):
    """It prints the classes that slim predicts, in an environment of onnxruntime, numpy and Pillow alone."""
    folder = tmp_path / "moved"
    shutil.copytree(exported, folder)
    prepare = {**PREPARE, "crop_mode": mode}
    from slimcli.deployment.card import export_card

    card = export_card(
        planned(), "onnx", {**CONFIG, "preprocessing": prepare}, Conversion(), Checked(1, 0, 0, 100), "logits"
    )
    if mode == "center":
        assert card.split("```")[1] == (folder / "README.md").read_text().split("```")[1]
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (folder / "run.py").write_text(program)
    # -S and -E: of what is installed here, Python sees these packages alone
    place = packages_alone(tmp_path / "packages", "onnxruntime", "numpy", "pillow")
    command = [sys.executable, "-S", "-E", "-c", f"import sys; sys.path.append({str(place)!r}); exec(sys.argv.pop(1))"]
    missing = "import importlib.util as i; print([n for n in ('torch', 'timm', 'slimcli') if i.find_spec(n)])"
    assert subprocess.check_output([*command, missing], text=True, cwd=folder).strip() == "[]"
    run = "import runpy; runpy.run_path('run.py', run_name='__main__')"
    done = subprocess.run([*command, run, str(photograph)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    predictor = predictor_of_export(folder)
    predictor.preprocessing = prepare
    (found,) = predictor.predict([photograph])
    printed = [line.split(" %  ") for line in done.stdout.splitlines()]
    assert [name for _, name in printed] == [predictor.name_of(number) for number, _ in found.top(5)]
    assert [float(chance) for chance, _ in printed] == pytest.approx([100 * c for _, c in found.top(5)], abs=0.02)


def packages_alone(place, *names):
    """A folder of these installed packages and of what they require, and of nothing else."""
    place.mkdir()
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (place / top).exists():
                (place / top).symlink_to(found.locate_file(top))
        needed = map(Requirement, found.requires or ())
        waiting += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return place


class Wrong(Runtime):
    name = "wrong"
    about = "gives something else"
    files = ("model.wrong",)

    def write(self, model, folder, conversion):
        (folder / "model.wrong").write_text("wrong")

    def open(self, folder, precision):
        class Zeros(Program):
            def run(self, images):
                return torch.zeros(images.shape[0], 10)

        return Zeros()


def test_an_artefact_that_gives_something_else_is_not_kept(tmp_path):
    with pytest.raises(Inexact, match="differ by"):
        export_model(planned(), Wrong(), tmp_path / "out", CONFIG, batches())
    assert list(tmp_path.iterdir()) == []


class _Off(Program):
    """Logits that are off by 0.01 for the first images."""

    def __init__(self, images=0):
        self.images = images

    def run(self, images):
        found = torch.eye(10)[torch.arange(len(images)) % 10]
        found[: self.images] += 0.01
        return found


@pytest.mark.parametrize(("off", "images", "passes"), [(0, 20, True), (1, 20, True), (2, 20, False), (1, 19, False)])
def test_one_image_in_twenty_may_be_off_in_float32(off, images, passes):
    found = check(_Off(off), _Off(), [torch.zeros(images, 3, 8, 8)], classifies=True)
    assert found.images == images and found.relative == pytest.approx(0.01 if off else 0.0)
    assert (found.problem("float32") is None) == passes


def test_tolerances_are_of_outputs_and_of_predictions():
    assert Checked(10, 0.0, 0.0, 100.0).problem("float32") is None
    assert "outputs differ" in Checked(10, 1.0, 0.002, 100.0).problem("float32")
    assert Checked(10, 1.0, 0.002, 100.0).problem("bfloat16") is None
    # in one image of twenty rounding may have tipped who leaves
    assert Checked(64, 1.0, 0.002, 100.0, usual=1e-6).problem("float32") is None
    assert "differ by 31 %" in Checked(64, 1.0, 0.31, 100.0, usual=1e-6).problem("float32")
    assert "differ by 0.2 %" in Checked(64, 1.0, 0.31, 100.0, usual=0.002).problem("float32")
    assert "predictions" in Checked(10, 0.0, 0.0, 89.0).problem("int8")
    assert "differ" in Checked(10, float("nan"), float("nan"), 100.0).problem("int8")


def test_a_plan_for_few_patches_is_said_to_gain_little_in_fast_arithmetic():
    model = planned()
    said = exporting.small_gain(model, "int8")
    assert "with 16 patches" in said and "bfloat16" in exporting.small_gain(model, "bfloat16")
    assert exporting.small_gain(model, "float32") is None
    discards = slimmed(tiny_vit(), 0.5, life_layer=1)
    assert exporting.small_gain(discards, "int8") is None
    discards.grouping = "pairs"
    assert exporting.small_gain(discards, "int8")
    assert exporting.small_gain(planned(img_size=96), "int8") is None


def test_int8_keeps_the_life_head_in_float(exported):
    from slimcli.runtimes.onnx_int8 import kept_in_float

    model = planned(depth=2)
    forward = Forward(model)
    proto = onnx.load(exported / "model.onnx")
    kept = kept_in_float(proto, forward)
    products = [n for n in proto.graph.node if n.op_type in ("MatMul", "Gemm", "Conv")]
    quantized = [n for n in products if n.name not in kept]
    # of the backbone and no more: 2 blocks of q, k, v, projection and two of the MLP, patches, classifier
    assert len(quantized) == 2 * 6 + 2
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    own = [p.detach().numpy() for p in model.selector.parameters() if p.dim() == 2]
    for found in (constants[name] for node in quantized for name in node.input if name in constants):
        assert not any(found.shape == w.shape and (found == w).all() for weight in own for w in (weight, weight.T))


@pytest.mark.parametrize("change", ["version", "file", "runtime", "schema"])
def test_a_damaged_artefact_is_refused_in_a_line(exported, tmp_path, photograph, refused, change):
    folder = tmp_path / "damaged"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    if change == "version":
        config["format_version"] = 99
    elif change == "file":
        (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-100])
    elif change == "runtime":
        config["runtime"] = "onix"
    else:
        config["preprocessing"]["interpolation"] = "../../etc"
    (folder / "config.json").write_text(json.dumps(config))
    line = refused("predict", photograph, "--model", folder)
    expected = {"version": "version 99", "file": "damaged", "runtime": "did you mean onnx", "schema": "interpolation"}
    assert expected[change] in line


def test_what_cannot_be_exported_is_refused_before_the_work(refused, tmp_path, photographs, monkeypatch):
    monkeypatch.setattr(exporting, "export_model", None)
    assert "did you mean onnx" in refused("export", "--to", "onxx", "-o", "out")
    assert "keeps no file" in refused("export", "--to", "compile", "-o", "out")
    assert "has no bfloat16" in refused("export", "--to", "onnx", "--precision", "bfloat16", "-o", "out")
    assert "is there already" in refused("export", "--to", "torch", "-o", photographs)
    assert "life head" in refused("export", "digits_vit", "--to", "torch", "-o", "out")
    assert not (tmp_path / "out").exists()


def test_machine_code_of_a_folder_runs_only_where_it_is_trusted(
    exported, tmp_path, photograph, refused, slim, monkeypatch
):
    folder = tmp_path / "code"
    shutil.copytree(exported, folder)
    monkeypatch.setattr(type(find_runtime("onnx")), "runs_code", True)
    assert "model.onnx: is machine code" in (line := refused("predict", photograph, "--model", folder))
    assert "--trust-code" in line
    assert str(photograph) in slim("predict", photograph, "--model", folder, "--trust-code").output
    assert [runtime.name for runtime in runtimes().values() if runtime.runs_code] == ["aoti", "onnx"]


def test_a_missing_package_is_named_with_its_extra(refused, monkeypatch):
    monkeypatch.setattr(find_runtime("onnx").__class__, "missing", lambda self: ["onnxruntime"])
    assert 'pip install "slimcli[onnx]"' in refused("export", "--to", "onnx", "-o", "out")


def test_every_runtime_says_what_it_is():
    found = runtimes()
    assert set(found) >= {"torch", "compile", "aoti", "onnx", "openvino"}
    assert all(runtime.about and "float32" in runtime.precisions for runtime in found.values())


def test_export_and_profile_and_eval_of_the_embedded_model(slim):
    found = document(slim("export", "--to", "torch", "-o", "out", "--keep-rate", "0.8", "--images", 16, "--json"))
    assert found["agreement"] == 100 and found["images"] == 16
    assert slimcli.load("out").keep_rate == 0.8
    rows = document(slim("profile", "out", "--runtime", "torch,torch:bfloat16", "--seconds", 0, "--json"))["rows"]
    assert [(row["runtime"], row["dense"]) for row in rows] == [
        ("torch", True), ("torch", False), ("torch bfloat16", True), ("torch bfloat16", False)
    ]  # fmt: skip
    assert rows[2]["speedup"] == 1
    rows = document(slim("eval", "out", "--data", "digits", "--runtime", "torch", "--limit", 32, "--json"))["rows"]
    plain = document(slim("eval", "out", "--data", "digits", "--limit", 32, "--json"))["rows"]
    assert [row["top1"] for row in rows] == [row["top1"] for row in plain]


def test_predict_says_what_it_cannot_do(refused, exported, photograph):
    assert "no such file" in refused("predict", "nothing.jpg")
    assert "no effect" in refused("predict", photograph, "--model", exported, "--keep-rate", "0.5")
    assert "no embeddings" in refused("predict", photograph, "--model", exported, "--embeddings", "a.npz")
    assert "expected a name" in refused("predict", photograph, "--embeddings", "a.txt")


def test_a_graph_that_kept_the_number_of_images_is_no_export_for_any_number():
    model = Forward(planned())
    value = partial(onnx.helper.make_tensor_value_info, "images", onnx.TensorProto.FLOAT)
    check_free(value(["batch", 3, 32, 32]), model)
    with pytest.raises(SlimError, match=r"any number of images: its code reads how many .* batch_size"):
        check_free(value([2, 3, 32, 32]), model)
