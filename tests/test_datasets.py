"""Data sets of every kind that timm opens."""

import io
import json
import tarfile

import pytest
from conftest import document


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


def test_hugging_face_datasets(slim, tiny_recipe, photographs):
    pytest.importorskip("datasets", reason="pip install slimcli[hfds]")
    words = train_words(f"hfds/{photographs}", "")[4:]
    summary = document(slim("train", tiny_recipe, "--set", f"data.name=hfds/{photographs}", *words, "--json"))
    assert summary["rows"][1]["schedule"] == [16, 12, 9, 7]


def test_a_kind_of_data_set_that_does_not_exist(refused, tiny_recipe, photographs):
    line = refused("train", tiny_recipe, *train_words("torch/no_such_set", photographs))
    assert "cannot be opened" in line
