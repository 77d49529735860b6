"""The server of docs/serve.md, under load, and the class of docs/large-collections.md in a local Ray."""

import contextlib
import json
import os
import signal
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
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RAY_AUTH_MODE": "disabled"}


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


def run(place, *words):
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=place, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_server_of_the_manual_answers_every_client(place):
    pytest.importorskip("litserve", reason="pip install slimcli[serve]")
    (place / "server.py").write_text(python_of("serve.md"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "server.py", "exported", str(port)]
    server = subprocess.Popen(words, cwd=place, env=ENVIRONMENT, start_new_session=True)
    try:
        load = ["--server", f"slim=http://127.0.0.1:{port}", "--clients", "4", "--seconds", "1.5"]
        run(place, ROOT / "benchmarks" / "serving.py", "photos", *load, "--json", "found.json")
    finally:
        # as Ctrl-C does: its worker ends too
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        finally:
            # nor is anything left where it did not
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
    (row,) = json.loads((place / "found.json").read_text())["rows"]
    assert row["errors"] == 0 and row["images"] > 4


def test_two_workers_of_ray_data_give_what_predict_gives(place):
    pytest.importorskip("ray", reason="pip install 'ray[data]'")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install slimcli[parquet]")
    exported = str(place / "exported")
    code = python_of("large-collections.md").replace('"exported"', repr(exported))
    # beside the two actors one reads, whatever the number of cores is; `batch_size` gives both of them some
    start = 'ray.init(address="local", num_cpus=3, include_dashboard=False)\n'
    code = code.replace("batch_size=64", "batch_size=2").replace("images = ", start + "images = ", 1)
    (place / "classify.py").write_text(code)
    run(place, "classify.py")
    rows = parquet.read_table(place / "classes").to_pylist()
    assert len(rows) == 6
    found = {row["image"].rpartition("/")[2]: row for row in rows}
    for prediction in slimcli.open_predictor(exported).predict(sorted((place / "photos").iterdir())):
        row = found[prediction.image.rpartition("/")[2]]
        ((number, chance),) = prediction.top(1)
        assert (row["number"], row["error"]) == (number, "") and row["probability"] == pytest.approx(chance, abs=1e-5)
