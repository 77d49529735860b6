"""The server of docs/serve.md, under load, and the class of docs/large-collections.md in a local Ray."""

import json
import socket
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import tiny_vit
from documents import ROOT, blocks
from PIL import Image

import slimcli
from slimcli.store.model_folder import save_model

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder, and photographs."""
    folder = tmp_path_factory.mktemp("serving")
    model = slimcli.slim(tiny_vit(), 0.5, life_layer=1).eval()
    prepare = model.transform().prepare
    config = {"model": {"name": "vit_tiny_patch16_224", "args": ARGS}, "preprocessing": prepare, "class_names": None}
    save_model(folder / "exported", model, config, torch.float32)
    (folder / "photos").mkdir()
    generator = numpy.random.default_rng(0)
    for number in range(6):
        pixels = generator.integers(0, 255, (40, 50, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
    return folder


def python_of(page):
    (block,) = blocks(ROOT / "docs" / page, "python")
    return block.text


def test_the_server_of_the_manual_answers_every_client(place):
    pytest.importorskip("litserve", reason="litserve is not installed: pip install 'slimcli[serve]'")
    (place / "server.py").write_text(python_of("serve.md"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "server.py", "exported", str(port)], cwd=place)
    try:
        words = ["photos", "--server", f"slim=http://127.0.0.1:{port}", "--clients", "4", "--seconds", "1.5"]
        program = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), *words, "--json", "found.json"]
        done = subprocess.run(program, cwd=place, capture_output=True, text=True, timeout=100, check=False)
    finally:
        server.terminate()
        server.wait(20)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((place / "found.json").read_text())["rows"]
    assert row["errors"] == 0 and row["images"] > 4


def test_ray_data_gives_what_predict_gives(place, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[data]'")
    monkeypatch.chdir(place)
    exported = str(place / "exported")
    code = (
        python_of("large-collections.md")
        .replace('"exported"', repr(exported))
        .replace("concurrency=2", "concurrency=1")
    )
    ray.init(num_cpus=2, include_dashboard=False, address="local")
    try:
        names = {}
        exec(compile(code, "large-collections.md", "exec"), names)
        found = {row["image"]: row for row in ray.data.read_parquet("classes").take_all()}
    finally:
        ray.shutdown()
    expected = slimcli.open_predictor(exported).predict(sorted((place / "photos").iterdir()))
    for prediction in expected:
        (row,) = [row for name, row in found.items() if prediction.image.endswith(name.split("/photos/")[-1])]
        ((number, chance),) = prediction.top(1)
        assert (row["number"], row["error"]) == (number, "") and row["probability"] == pytest.approx(chance, abs=1e-5)
