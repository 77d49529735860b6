"""Data sets of every kind that timm opens."""

import io
import json
import tarfile
from pathlib import Path

import numpy
import pytest
import torch
from conftest import document
from PIL import Image
from sklearn import datasets

from slimcli.data import DecodedImages, keep_decoded, open_dataset, train_loader
from slimcli.errors import DataError
from slimcli.recipe import AugmentationSection, DataSection


def train_words(name, root):
    words = {"data.name": name, "data.root": root, "data.batch_size": 8, "model.num_classes": 2}
    words |= {"data.train_limit": 40, "data.val_limit": 12}
    return [word for field, value in words.items() for word in ("--set", f"{field}={value}")]


def test_torchvision_folders(slim, tiny_recipe, photographs):
    summary = document(slim("train", tiny_recipe, *train_words("torch/image_folder", photographs), "--json"))
    assert summary["rows"][1]["schedule"] == [16, 12, 9, 7]


def test_webdataset_shards(slim, tiny_recipe, photographs, tmp_path):
    pytest.importorskip("webdataset", reason="pip install slimcli[wds]")
    root = tmp_path / "shards"
    root.mkdir()
    splits = {}
    for split in ("train", "val"):
        files = sorted((photographs / split).rglob("*.jpg"))
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for index, path in enumerate(files):
                label = str(["cat", "dog"].index(path.parent.name)).encode()
                for name, content in ((f"{index:03}.jpg", path.read_bytes()), (f"{index:03}.cls", label)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        shards = {"filenames": [f"{split}.tar"], "shard_lengths": [len(files)]}
        splits[split] = {"name": split, "num_samples": len(files), **shards}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    words = [*train_words("wds/photographs", root), "--set", "data.val_split=val", "--set", "data.workers=0"]
    result = slim("train", tiny_recipe, *words, "--json")
    assert document(result)["rows"][0]["top1"] >= 0
    found = document(slim("eval", "--json"))
    assert len(found["rows"]) == 2

    # of several processes each reads a share, but the one that measures at the end reads all
    section = DataSection(name="wds/photographs", root=root, val_split="val")
    stream = open_dataset(section, train=False)
    count = len(list(stream.unsplit()))
    stream = open_dataset(section, train=False)
    stream.reader.dist_rank, stream.reader.dist_num_replicas = 1, 2
    whole = stream.unsplit()
    assert len(list(stream)) < count and len(list(whole)) == count


def test_hugging_face_datasets(slim, tiny_recipe, photographs):
    pytest.importorskip("datasets", reason="pip install slimcli[hfds]")
    words = train_words(f"hfds/{photographs}", "")[4:]
    summary = document(slim("train", tiny_recipe, "--set", f"data.name=hfds/{photographs}", *words, "--json"))
    assert summary["rows"][1]["schedule"] == [16, 12, 9, 7]


def test_a_kind_of_data_set_that_does_not_exist(refused, tiny_recipe, photographs):
    line = refused("train", tiny_recipe, *train_words("torch/no_such_set", photographs))
    assert "cannot be opened" in line


def cached(root, **changes):
    section = DataSection(root=root, cache=True, **changes)
    plain = open_dataset(section, train=True, seed=3)
    kept = open_dataset(section, train=True, seed=3)
    keep_decoded(kept, section)
    return plain, kept


def test_cached_images_are_the_images(photographs, monkeypatch):
    monkeypatch.setattr(DecodedImages, "CHUNK", 3 * 24 * 32 * 3)  # three images a chunk
    # sizes and modes of their own
    Image.new("L", (7, 9), 40).save(photographs / "train" / "cat" / "grey.png")
    plain, kept = cached(photographs)
    assert len(plain) == len(kept) == 41
    for number in (0, 20, 40, 3):
        assert plain[number][0].tobytes() == kept[number][0].tobytes()
        assert plain[number][1] == kept[number][1]
    for path in (photographs / "train").rglob("*.*g"):
        path.unlink()
    assert kept[0][0].size in ((32, 24), (7, 9))
    with pytest.raises(DataError):
        plain[0]


def test_cached_images_are_transformed_as_before_in_worker_processes_too(photographs):
    plain, kept = cached(photographs, train_limit=16)
    assert kept.read.__self__.bytes == 16 * 24 * 32 * 3
    prepare = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    prepare |= {"crop_pct": 1.0, "crop_mode": "center"}
    seen = []
    for dataset, workers in ((plain, 0), (kept, 2)):
        torch.manual_seed(0)
        loader = train_loader(dataset, prepare, AugmentationSection(), 8, workers, torch.device("cpu"))
        seen.append(list(loader))
    for (images, classes), (others, also) in zip(*seen, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(classes, also)


def test_a_cache_that_is_too_large_is_refused_before_training(refused, tiny_recipe, photographs):
    words = train_words("", photographs)
    line = refused("train", tiny_recipe, *words, "--set", "data.cache=true", "--set", "data.cache_gib=1e-5")
    assert line == (
        "Error: data.cache: 40 decoded images need about 8.58e-05 GiB, data.cache_gib allows 1e-05: "
        "raise it, set data.cache = false, or make the images smaller"
    )


def test_a_cached_image_that_cannot_be_read_is_named(refused, tiny_recipe, photographs):
    (photographs / "train" / "dog" / "7.jpg").write_bytes(b"no image")
    line = refused("train", tiny_recipe, *train_words("", photographs), "--set", "data.cache=true")
    assert "dog/7.jpg: not a readable image" in line


def test_training_on_cached_images_gives_the_same_model(slim, tiny_recipe, photographs):
    losses = []
    for cache in ("false", "true"):
        words = train_words("", photographs)
        run = document(slim("train", tiny_recipe, *words, "--set", f"data.cache={cache}", "--json"))["run"]
        rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
    assert losses[0] == losses[1]


def test_the_digits_are_scikit_learns():
    digits = datasets.load_digits()
    samples = [open_dataset(DataSection(name="digits"), train=train) for train in (True, False)]
    assert [len(each) for each in samples] == [1437, 360]
    for place, index in ((0, 1), (3, 4), (4, 6)):
        image, target = samples[0][place]
        assert (numpy.asarray(image)[..., 0] == (digits.images[index] * (255 / 16)).round()).all()
        assert target == digits.target[index]
