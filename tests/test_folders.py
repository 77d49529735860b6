"""What a class folder is, and what is read of it."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from slimcli.data import match_classes, open_dataset
from slimcli.data.folders import by_class, is_hidden
from slimcli.data.read import is_image_name
from slimcli.errors import DataError, SlimError
from slimcli.recipe import DataSection


def picture(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 2), "red").save(path, **options)


def opened(root):
    return open_dataset(DataSection(root=root, val_split="."), train=False)


def classes_of(samples):
    """The class of every sample, by the name of its file below the root."""
    return {samples.name(i): samples.class_names[samples[i][1]] for i in range(len(samples))}


def packed(root, names):
    path = root / "images.tar"
    content = io.BytesIO()
    Image.new("RGB", (4, 2), "red").save(content, "png")
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content.getvalue())
            tar.addfile(info, io.BytesIO(content.getvalue()))
    return path


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".tiff", ".gif", ".JPG", ".png", ".ppm", ".jp2", ".avif"])
def test_every_format_that_pillow_reads_is_an_image(tmp_path, suffix):
    if not is_image_name(f"0{suffix}"):
        pytest.skip(f"this Pillow reads no {suffix}")
    picture(tmp_path / "cat" / f"0{suffix}")
    picture(tmp_path / "dog" / "0.png")
    samples = opened(tmp_path)
    assert samples.class_names == ["cat", "dog"]
    assert samples[0][0].size == (4, 2)
    assert samples.notes == []


def test_folders_inside_a_class_belong_to_it(tmp_path):
    for name in ("cat/indoor/1.png", "cat/outdoor/1.png", "dog/indoor/1.png", "dog/2.png"):
        picture(tmp_path / name)
    assert classes_of(opened(tmp_path)) == {
        str(tmp_path / "cat/indoor/1.png"): "cat",
        str(tmp_path / "cat/outdoor/1.png"): "cat",
        str(tmp_path / "dog/2.png"): "dog",
        str(tmp_path / "dog/indoor/1.png"): "dog",
    }


def test_hidden_folders_are_no_classes_and_no_part_of_one(tmp_path):
    for name in ("cat/1.png", "dog/1.png", ".ipynb_checkpoints/1.png", "__MACOSX/1.png", "cat/.thumbs/2.png"):
        picture(tmp_path / name)
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "cat" / "Thumbs.db").touch()
    samples = opened(tmp_path)
    assert (samples.class_names, len(samples), samples.notes) == (["cat", "dog"], 2, [])


def test_what_is_skipped_is_counted_aloud(tmp_path):
    for name in ("cat/1.png", "dog/1.png", "stray.png"):
        picture(tmp_path / name)
    (tmp_path / "labels.csv").touch()
    (tmp_path / "cat" / "notes.txt").touch()
    samples = opened(tmp_path)
    assert (samples.class_names, len(samples)) == (["cat", "dog"], 2)
    assert samples.notes == [
        f"{tmp_path}: skipped 2 files beside the class folders (labels.csv, stray.png)",
        f"{tmp_path}: skipped 1 file not named as an image that Pillow reads (cat/notes.txt)",
    ]


def test_commands_say_what_was_skipped(slim, tiny_recipe, photographs):
    (photographs / "val" / "cat" / "notes.txt").touch()
    words = ["--set", "data.name=", "--set", f"data.root={photographs}", "--set", "data.batch_size=8"]
    result = slim("eval", tiny_recipe, *words)
    assert result.exit_code == 0, result.output
    assert "Warning: " in result.stderr and "skipped 1 file" in result.stderr and "cat/notes.txt" in result.stderr
    result = slim("train", tiny_recipe, *words)
    assert result.exit_code == 0, result.output
    assert "skipped 1 file" in result.output


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (["cat/1.png", "dog/a.heicx"], "dog: this class folder holds no image .*none of its 1 files .a.heicx."),
        (["1.txt"], "holds no images in class folders"),
        (["train/cat/1.png", "val/cat/1.png"], "its folders train, val are splits, not classes"),
        (["cat/1.png", "\u00fc/1.png", "u\u0308/1.png"], "have the same name"),
    ],
)
def test_folders_that_cannot_be_meant_are_refused_by_name(tmp_path, files, line):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(DataError, match=line):
        opened(tmp_path)


def test_images_without_class_folders_have_no_labels_and_are_refused_where_classes_are_needed(tmp_path):
    for name in ("10.png", "2.png"):
        picture(tmp_path / name)
    (tmp_path / "labels.csv").touch()
    found = opened(tmp_path)
    assert [Path(found.name(index)).name for index in range(len(found))] == ["2.png", "10.png"]
    assert found.class_names == []
    assert found.notes == [f"{tmp_path}: skipped 1 file not named as an image that Pillow reads (labels.csv)"]
    assert match_classes(found, None, 0) == (found, None)
    for names in (None, ["cat", "dog"]):
        with pytest.raises(SlimError, match="lie in no class folders"):
            match_classes(found, names, 2)


def test_one_class_whose_folders_may_have_been_meant_is_said(tmp_path):
    for name in ("data/cat/1.png", "data/dog/1.png"):
        picture(tmp_path / name)
    assert opened(tmp_path).notes == [f"{tmp_path}: holds one class, data; the folders in it (cat, dog) are none"]


def test_links_are_followed_and_those_that_lead_back_are_not(tmp_path):
    picture(tmp_path / "elsewhere" / "1.png")
    picture(tmp_path / "photos" / "dog" / "1.png")
    try:
        (tmp_path / "photos" / "cat").symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("no symbolic links here")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "dog" / "self").symlink_to("self")
    samples = opened(tmp_path / "photos")
    assert samples.class_names == ["cat", "dog"]
    assert len(samples) == 2
    assert any("lead back (cat/round)" in note for note in samples.notes)
    (tmp_path / "photos" / "fox").symlink_to("gone")
    with pytest.raises(DataError, match="fox: is a link to gone"):
        opened(tmp_path / "photos")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_image(tmp_path):
    picture(tmp_path / "cat" / "1.png")
    os.mkfifo(tmp_path / "cat" / "2.png")
    assert len(opened(tmp_path)) == 1


def test_classes_of_a_tar_are_those_of_the_folder(tmp_path):
    names = ["./cat/indoor/1.png", "cat/2.png", "dog/1.png", ".hidden/1.png", "stray.png", "dog/a.txt"]
    samples = opened(packed(tmp_path, names))
    assert list(classes_of(samples).values()) == ["cat", "cat", "dog"]
    assert samples[0][0].size == (4, 2)
    assert len(samples.notes) == 2


def test_folders_that_lead_to_all_images_of_a_tar_are_not_classes(tmp_path):
    assert opened(packed(tmp_path, ["data/x/cat/1.png", "data/x/dog/1.png", "README.txt"])).class_names == [
        "cat",
        "dog",
    ]
    assert opened(packed(tmp_path, ["cat/1.png", "cat/2.png"])).class_names == ["cat"]
    with pytest.raises(DataError, match="data holds images and folders of images"):
        opened(packed(tmp_path, ["data/cat/1.png", "data/dog/1.png", "data/stray.png"]))


def test_links_within_a_tar_are_images_too(tmp_path):
    path = packed(tmp_path, ["cat/1.png", "dog/1.png"])
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("dog/hard.png", tarfile.LNKTYPE, "cat/1.png"),
            ("dog/soft.png", tarfile.SYMTYPE, "../cat/1.png"),
            ("dog/lost.png", tarfile.SYMTYPE, "nowhere.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    samples = opened(path)
    assert [samples.class_names[samples[i][1]] for i in range(len(samples))] == ["cat", "dog", "dog", "dog"]
    assert samples.notes == [f"{path}: skipped 1 file that links to what is not in it (dog/lost.png)"]


@pytest.mark.parametrize("damage", [lambda b: b[:700], lambda b: b"no tar", lambda b: b""])
def test_a_tar_that_is_damaged_is_refused(tmp_path, damage):
    path = packed(tmp_path, ["cat/1.png", "dog/1.png"])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"images\.tar"):
        opened(path)


NAMES = st.sampled_from(["cat", "Dog", "10", "2", ".x", "__MACOSX", "é", "a b", "²"])
FILES = st.sampled_from(["1.png", "2.JPG", "3.webp", "a.txt", ".h", "no suffix"])
TREES = st.lists(st.tuples(st.lists(NAMES, max_size=3), FILES).map(lambda pair: (*pair[0], pair[1])), unique=True)


@given(TREES)
def test_any_tree_has_the_classes_of_its_first_level(tree):
    files = [parts for parts in tree if not any(is_hidden(part) for part in parts[:-1])]
    expected = {parts[0] for parts in files if len(parts) > 1}
    full = {parts[0] for parts in files if len(parts) > 1 and is_image_name(parts[-1])}
    try:
        found = by_class("root", set(), files)
    except DataError:
        assert full != expected or not any(is_image_name(parts[-1]) for parts in files)
        return
    assert set(found.class_names) == expected == full
    assert {files[place] for place, _ in found.images} == {
        parts for parts in files if is_image_name(parts[-1]) and (len(parts) > 1 or not expected)
    }
    for place, target in found.images if expected else ():
        assert found.class_names[target] == files[place][0]
    numbers = [int(name) for name in found.class_names if name.isascii() and name.isdigit()]
    assert numbers == sorted(numbers)
