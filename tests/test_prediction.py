"""`slim predict`: what it reads, in which order, what it writes, and where it goes on after it was stopped."""

import csv
import io
import json
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy
import pytest
import torch
from click.testing import CliRunner
from conftest import document, tiny_vit
from PIL import Image

import slimcli
from slimcli.backbones.timm_vit import DIGITS_VIT
from slimcli.cli import main
from slimcli.deployment.inputs import Inputs, Shard
from slimcli.deployment.prediction import Prediction

PREPARE = {
    "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3,
    "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center",
}  # fmt: skip


@pytest.fixture(scope="module")
def predictor():
    model = slimcli.slim(tiny_vit(), 0.5, life_layer=1).eval()
    return slimcli.open_predictor(model)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four shards as WebDataset writes them, of five images each; the last of them cannot be decoded."""
    folder = tmp_path_factory.mktemp("shards")
    generator = numpy.random.default_rng(0)
    for shard in range(4):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number in range(5):
                content = io.BytesIO()
                Image.fromarray(generator.integers(0, 255, (9, 8, 3), dtype=numpy.uint8)).save(content, "PNG")
                broken = (shard, number) == (3, 4)
                for suffix, data in (("png", b"no image" if broken else content.getvalue()), ("cls", b"3")):
                    member = tarfile.TarInfo(f"{shard}{number}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def names(*words, shard=None, stdin=None):
    return [item.name for item in Inputs([str(word) for word in words], shard, stdin).items()]


def rows_of(folder):
    """The rows of Parquet parts, as a program without slim reads them."""
    dataset = pytest.importorskip("pyarrow.dataset")
    return dataset.dataset(folder, format="parquet").to_table().to_pylist()


def test_files_folders_and_names_come_in_the_order_given(slim, photographs):
    (photographs / "val" / "broken.png").write_text("no image")
    one = photographs / "train" / "dog" / "3.jpg"
    result = slim("predict", one, photographs / "val", "--csv", "table.csv", "--top", 2)
    assert result.exit_code == 1 and "broken.png" in result.stderr and "1 of 14 images" in result.stderr
    rows = list(csv.DictReader(io.StringIO(Path("table.csv").read_text())))
    found = [row["image"] for row in rows]
    assert found[0] == str(one) and len(rows) == 14 and found[1:] == sorted(found[1:])
    assert [row["error"] != "" for row in rows] == [name.endswith("broken.png") for name in found]
    piped = CliRunner().invoke(main, ["predict", "-", "--json", "--top", "2"], input=f"{one}\n")
    (image,) = document(piped)["images"]
    assert image["image"] == str(one)
    assert [entry["class"] for entry in image["classes"]] == [rows[0]["class_1"], rows[0]["class_2"]]


def test_hidden_folders_and_links_that_lead_back_are_no_images(photographs):
    (photographs / ".thumbnails").mkdir()
    shutil.copy(photographs / "val" / "cat" / "0.jpg", photographs / ".thumbnails")
    (photographs / "val" / "dog" / "again").symlink_to(photographs)
    assert len(names(photographs)) == 52


def test_shards_are_read_in_the_order_that_they_hold(shards):
    found = names(shards / "{000..003}.tar")
    assert len(found) == 20 and found == names(*sorted(shards.iterdir())) == sorted(found)
    assert found[0] == f"{shards}/000.tar/00.png"


def test_a_shard_that_is_damaged_is_named_after_the_images_before_the_damage(shards, tmp_path, slim):
    content = (shards / "000.tar").read_bytes()
    (tmp_path / "short.tar").write_bytes(content[:3000])
    (tmp_path / "torn.tar").write_bytes(content[:4096] + b"x" * 512 + content[4608:])
    (tmp_path / "no.tar").write_text("no .tar")
    result = slim("predict", "short.tar", "no.tar", "torn.tar", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)["images"]
    errors = [entry["error"] for entry in found if "error" in entry]
    assert len(found) - len(errors) >= 2
    assert [[name for name in ("short", "no", "torn") if f"{name}.tar" in said] for said in errors] == [
        ["short"], ["no"], ["torn"]
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 3, 4, 16])
@pytest.mark.parametrize("kind", ["tars", "folder", "names"])
def test_shares_are_disjoint_and_together_all(shards, photographs, kind, count):
    words = {"tars": [shards / "{000..003}.tar"], "folder": [photographs, shards / "000.tar"], "names": ["-"]}[kind]
    listed = "".join(f"{number}.jpg\n" for number in range(23))
    whole = names(*words, stdin=io.StringIO(listed))
    shares = [names(*words, shard=Shard(index + 1, count), stdin=io.StringIO(listed)) for index in range(count)]
    assert sorted(name for share in shares for name in share) == sorted(whole)
    if kind != "tars":
        assert max(map(len, shares)) - min(map(len, shares)) <= (5 if count == 1 else 4)
    elif count <= 4:
        # each .tar is opened by one of them alone
        opened = [{name.rpartition("/")[0] for name in share} for share in shares]
        assert sum(map(len, opened)) == 4
    for share in shares:
        assert share == [name for name in whole if name in share]


def test_embeddings_have_no_classes():
    (found,) = slimcli.open_predictor(embeddings=True).predict([Image.new("RGB", (20, 30))])
    assert found.output.shape == (96,)
    with pytest.raises(slimcli.SlimError, match="embeddings, which have no classes"):
        found.top(5)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_embeddings_are_written_with_the_names_of_their_images(slim, photographs, suffix):
    from safetensors.numpy import load_file

    shutil.move(photographs / "val" / "cat" / "0.jpg", photographs / "val" / "cat" / "0 é.jpg")
    file = f"found.{suffix}"
    assert slim("predict", photographs / "val", "--embeddings", file).exit_code == 0
    if suffix == "npz":
        with numpy.load(file, allow_pickle=False) as found:
            embeddings, images = found["embeddings"], list(found["images"])
    else:
        found = load_file(file)
        embeddings, images = found["embeddings"], [bytes(row).rstrip(b"\0").decode() for row in found["images"]]
    assert embeddings.shape == (12, 96) and embeddings.dtype == numpy.float32
    assert images == names(photographs / "val") and images[0].endswith("cat/0 é.jpg")


def test_memory_does_not_grow_with_the_number_of_images(predictor, tmp_path, monkeypatch):
    """The first result is there before the second batch is read, and nothing of what has passed is kept."""
    alive, most = set(), 0
    monkeypatch.setattr(Prediction, "__del__", lambda self: alive.discard(self.image), raising=False)

    def read():
        nonlocal most
        for number in range(60):
            alive.add(f"{number}.missing")
            most = max(most, len(alive))
            yield f"{number}.missing"

    for _ in predictor.predict(read(), batch_size=2):
        pass
    assert most <= 20
    monkeypatch.undo()

    import tracemalloc

    from slimcli.deployment.embeddings import write_embeddings

    def peak(count):
        rows = (
            Prediction(f"a name of fifty characters for image {number:09d}.jpg", torch.zeros(8))
            for number in range(count)
        )
        tracemalloc.start()
        write_embeddings(tmp_path / "found.npz", rows)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(3000) < peak(300) + 100_000


def test_two_workers_give_the_parts_of_one(slim, shards):
    words = ("predict", shards / "{000..003}.tar", "--top", 2, "--part-rows", 4)
    assert slim(*words, "--parquet", "one").exit_code == 1
    for index in (1, 2):
        assert slim(*words, "--parquet", "two", "--shard", f"{index}/2").exit_code == index - 1
    one, two = ({row["image"]: row for row in rows_of(folder)} for folder in ("one", "two"))
    assert len(one) == 20 and set(one) == set(two)
    assert [name for name, row in one.items() if row["error"]] == [f"{shards}/003.tar/34.png"]
    for name, row in one.items():
        assert row["numbers"] == two[name]["numbers"] and row["classes"] == two[name]["classes"]
        if row["error"] is None:
            assert row["probabilities"] == pytest.approx(two[name]["probabilities"], abs=1e-5)
            assert len(row["classes"]) == 2


def test_parts_go_on_after_the_process_was_killed(slim, shards):
    """SIGKILL between a part's last byte and its name: what is there is whole, and the rest is made."""
    words = ("predict", shards / "{000..003}.tar", "--parquet", "out", "--part-rows", 3)
    child = os.fork()
    if child == 0:
        replace = Path.replace

        def killed(self, target):
            if "000002" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        Path.replace = killed
        slim(*words)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.parquet")}
    assert len(kept) == 2 and len(rows_of("out")) == 6
    assert [path for path in Path("out").iterdir() if path.name.startswith(".part")]
    result = slim(*words)
    assert result.exit_code == 1 and "20 images" in result.stdout
    assert {name: Path("out", name).stat().st_mtime_ns for name in kept} == kept
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "_slim.json", *(f"part-{number:06d}.parquet" for number in range(7))
    ]  # fmt: skip
    assert [row["image"] for row in rows_of("out")] == names(shards / "{000..003}.tar")
    # all is there: the same answer again, and what could not be read is still said
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    again = slim(*words)
    assert again.exit_code == 1 and "34.png" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in Path("out").iterdir()} == before


def test_parts_of_something_else_are_refused(slim, refused, shards, photographs):
    tars = shards / "{000..001}.tar"
    assert slim("predict", tars, "--parquet", "out", "--part-rows", 4).exit_code == 0
    for words, said in (
        ((tars, "--part-rows", 5), "another images in a part (4 there, 5 here)"),
        ((tars, "--part-rows", 4, "--top", 3), "the 5 most likely classes there"),
        ((tars, "--part-rows", 4, "--keep-rate", 0.5), "another model"),
        ((tars, "--part-rows", 4, "--shard", "1/2"), "another shards (1 there, 2 here)"),
        ((shards / "002.tar", "--part-rows", 4), "another input"),
    ):
        assert said in refused("predict", *words, "--parquet", "out")
    assert "no parts of predictions" in refused("predict", tars, "--parquet", photographs)
    listed = (photographs / "val", "--model", DIGITS_VIT, "--embeddings", "out.parquet", "--part-rows", 4)
    assert slim("predict", *listed).exit_code == 0
    assert len(rows_of("out.parquet")[0]["embedding"]) == 96
    (listed[0] / "cat" / "00.jpg").write_bytes((listed[0] / "cat" / "0.jpg").read_bytes())
    assert "another input" in refused("predict", *listed)
    (listed[0] / "cat" / "00.jpg").unlink()
    (listed[0] / "dog" / "5.jpg").unlink()
    assert "another input" in refused("predict", *listed)
    Path("out.parquet/part-000001.parquet").write_bytes(b"PAR1")
    assert "is damaged" in refused("predict", *listed)


def test_without_a_target_the_newer_of_run_and_export_predicts(slim, photographs, tmp_path):
    image = photographs / "val" / "cat" / "0.jpg"
    assert "Model: the embedded model" in slim("predict", image).stderr
    assert slim("export", "--to", "torch", "-o", "out", "--images", 4, "--keep-rate", 0.8).exit_code == 0
    assert "Model: the latest export for torch, out" in slim("predict", image).stderr
    run = tmp_path / "runs" / "mine-20260101-000000"
    shutil.copytree("out", run)
    (run.parent / "latest").symlink_to(run.name)
    for config in (run / "config.json",):
        os.utime(config, (time.time() + 5, time.time() + 5))
    assert f"Model: the latest run, {run.relative_to(tmp_path)}" in slim("predict", image).stderr
    shutil.rmtree(run)
    shutil.rmtree("out")
    assert "Model: the embedded model" in slim("predict", image).stderr


def test_a_predictor_takes_what_holds_an_image(predictor, photographs):
    path = photographs / "val" / "cat" / "0.jpg"
    with path.open("rb") as file:
        found = list(predictor.predict([path, str(path), path.read_bytes(), file, Image.open(path), b"no image"]))
    assert [prediction.image for prediction in found[:3]] == [str(path), str(path), "image 3"]
    assert found[5].error.startswith("image 6: not a readable image")
    for prediction in found[1:5]:
        torch.testing.assert_close(prediction.output, found[0].output)
    torch.testing.assert_close(predictor.run(predictor.transform()(path)[None])[0], found[0].output)
    with pytest.raises(slimcli.SlimError, match="keep_rate has no effect"):
        slimcli.open_predictor(slimcli.slim(tiny_vit(), 0.5, life_layer=1), keep_rate=0.3)


def test_predict_refuses_before_the_work(refused, photographs):
    image = photographs / "val" / "cat" / "0.jpg"
    assert "no such file" in refused("predict", "nothing.jpg")
    assert "expected a name that ends" in refused("predict", image, "--embeddings", "a.txt")
    assert "--csv and --embeddings are both given" in refused("predict", image, "--embeddings", "a.npz", "--csv", "b")
    assert "--shard 0/4: expected" in refused("predict", image, "--shard", "0/4")
    assert "--part-rows 4 has no effect without --parquet" in refused("predict", image, "--part-rows", 4)
    assert "is no range" in refused("predict", "{9..0}.tar")
    (photographs / "empty").mkdir()
    (photographs / "empty" / "0.tar").write_bytes(b"")
    assert "name the .tar files" in refused("predict", photographs / "empty")
