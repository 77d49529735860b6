"""Bad input gets one clear line and exit code 2, and nothing that was written is lost."""

import errno
import os
import pickle
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from conftest import document
from safetensors.torch import load_file, save_file

from slimcli import files
from slimcli.calibration.workflow import Goal
from slimcli.errors import SlimError, parameter
from slimcli.pictures.files import choose_format
from slimcli.plugins.scaffold import write_plugin
from slimcli.recipe import load_recipe


@pytest.mark.parametrize("rate", ["0", "1.5", "abc", "-1", "nan", "0.7,", "0.5,2"])
@pytest.mark.parametrize("command", ["eval", "profile", "calibrate"])
def test_an_impossible_keep_rate(refused, command, rate):
    line = refused(command, "--keep-rate", rate)
    assert line.startswith(f"Error: --keep-rate {rate}")
    assert "0.7" in line


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["eval", "nowhere/run"], "nowhere/run: no such file or folder"),
        (["eval", "deit_smal_patch16_224"], "did you mean deit_small_patch16_224"),
        (["profile", "swin_tiny_patch4_window7_224"], "SwinTransformer cannot be slimmed: it attends within"),
        (["train"], "which RECIPE?"),
        (["train", "quikstart"], "did you mean quickstart?"),
        (["train", "quickstart", "--resume"], "no unfinished run"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["train", "quickstart", "--set", "data.name=", "--set", "data.root=none"], "'none' does not exist"),
        (["train", "quickstart", "--set", "model.name=vit_giant"], "no model is called 'vit_giant'"),
        (["train", "quickstart", "--set", "model.args.depht=3"], "timm cannot build 'digits_vit' with depht=3"),
        (["train", "quickstart", "--set", "slimming.drop_layers=[4,12]"], "drop layer 12 is not possible"),
        (["train", "quickstart", "--set", "data.batch_size=2000"], "do not fill one batch"),
        (["train", "quickstart", "--set", "optimizer.opt=magic"], "optimizer.opt: found 'magic', which timm has not"),
        (["train", "quickstart", "--set", "model.num_classes=7"], "the data has 10 classes and the model 7"),
        (["eval", "--device", "tpu"], "'tpu' is not one of"),
        (["eval", "--data", "nowhere"], "--data nowhere: no such folder"),
        (["eval", "--limit", "0"], "--limit"),
        (["eval", "--no-such-option"], "No such option"),
        (["evl"], "No such command 'evl'"),
        (["prune"], "Missing option"),
        (["prune", "vit_tiny_patch16_224.nothing", "-o", "x"], "vit_tiny_patch16_224.nothing"),
        (["calibrate", "--target-flops", "1", "--keep-rate", "0.5"], "two goals"),
        (["calibrate", "--target-flops", "-3"], "--target-flops -3.0 is not possible"),
        (["calibrate", "--target-flops", "0.001"], "cannot be reached"),
        (["recipes", "--check"], "need the NAME"),
        (["profile", "quickstart", "--img-size", "64"], "--img-size is for a model's name"),
    ],
)
def test_one_clear_line(refused, words, part):
    assert part in refused(*words)


def test_a_device_that_is_not_here(refused):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert "--device cuda: not available here: expected one of auto, cpu" in refused("eval", "--device", "cuda")


def train_on(photographs, *more):
    return ["--set", "data.name=", "--set", f"data.root={photographs}", "--set", "data.batch_size=8", *more]


def test_an_empty_class_folder(refused, tiny_recipe, photographs):
    (photographs / "train" / "emu").mkdir()
    line = refused("train", tiny_recipe, *train_on(photographs))
    assert "emu: this class folder holds no image" in line


@pytest.mark.parametrize("damage", ["truncated", "not an image", "empty"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(refused, tiny_recipe, photographs, damage, workers):
    path = photographs / "val" / "dog" / "3.jpg"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "not an image": b"hello", "empty": b""}[damage])
    line = refused("train", tiny_recipe, *train_on(photographs, "--set", f"data.workers={workers}"))
    assert str(path) in line
    assert "not a readable image" in line


def test_classes_that_differ_between_the_splits(refused, tiny_recipe, photographs):
    (photographs / "val" / "dog").rename(photographs / "val" / "fox")
    assert "the classes of 'train' and 'validation' differ" in refused("train", tiny_recipe, *train_on(photographs))


def test_a_folder_without_the_split(refused, tiny_recipe, photographs):
    (photographs / "val").rename(photographs / "holdout")
    line = refused("train", tiny_recipe, *train_on(photographs))
    assert "has no 'validation' folder or .tar" in line
    assert "found holdout, train" in line


@pytest.fixture
def weights(slim, tiny_recipe, tmp_path):
    """A weights file of the tiny model."""
    slim("train", tiny_recipe)
    path = tmp_path / "weights.safetensors"
    path.write_bytes((tmp_path / "runs" / "latest" / "model.safetensors").read_bytes())
    return path


def test_a_truncated_weights_file(refused, tiny_recipe, weights):
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights}: is damaged" in refused("train", tiny_recipe, "--set", f"model.weights={weights}")


def test_the_weights_of_another_model(refused, tiny_recipe, weights):
    line = refused("train", tiny_recipe, "--set", f"model.weights={weights}", "--set", "model.args.embed_dim=64")
    assert "holds the weights of another model" in line
    assert "expected (1, 1, 64)" in line


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(refused, tiny_recipe, tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    assert "could run code" in refused("train", tiny_recipe, "--set", f"model.weights={path}")
    torch.save({"state_dict": Evil()}, path)
    assert "could run code" in refused("train", tiny_recipe, "--set", f"model.weights={path}")
    assert not (tmp_path / "executed").exists()


def test_a_plain_pth_file_is_fine(slim, tiny_recipe, weights, tmp_path):
    torch.save({"state_dict": load_file(weights)}, tmp_path / "weights.pth")
    result = slim("train", tiny_recipe, "--set", f"model.weights={tmp_path / 'weights.pth'}")
    assert result.exit_code == 0, result.output


def test_another_classifier_is_left_untrained_with_the_rest_loaded(slim, tiny_recipe, weights, tmp_path, photographs):
    result = slim("train", tiny_recipe, "--set", f"model.weights={weights}", *train_on(photographs), "--debug")
    assert result.exit_code == 0, result.output
    assert "has no classifier for these classes: it starts untrained" in result.stdout
    before = load_file(weights)["model.cls_token"]
    after = load_file(tmp_path / "runs" / "latest" / "model.safetensors")["model.cls_token"]
    assert torch.allclose(before, after, atol=0.1)


def test_a_damaged_config(refused, weights, tmp_path):
    run = (tmp_path / "runs" / "latest").resolve()
    (run / "config.json").write_text("{")
    assert f"{run / 'config.json'}: is damaged" in refused("eval", run)
    (run / "config.json").unlink()
    assert "has no model yet" in refused("eval", run)


def test_a_truncated_model_in_a_run(refused, weights, tmp_path):
    run = (tmp_path / "runs" / "latest").resolve()
    (run / "model.safetensors").write_bytes(b"")
    assert "model.safetensors: is damaged" in refused("eval", run)


def test_a_full_disk_loses_nothing_that_was_written(slim, refused, tiny_recipe, tmp_path, monkeypatch):
    real = os.fsync
    allowed = 9

    def full(handle: int) -> None:
        nonlocal allowed
        allowed -= 1
        if allowed < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    line = refused("train", tiny_recipe)
    assert "no space left on the disk" in line
    run = (tmp_path / "runs" / "latest").resolve()
    assert not list(run.rglob("*.part"))
    monkeypatch.setattr(os, "fsync", real)
    assert slim("train", "--resume", run).exit_code == 0


def test_a_folder_that_cannot_be_written(refused, tiny_recipe, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert "file: is a file: expected the name of a folder" in refused("train", tiny_recipe, "--set", "output=file")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    files.write_file(path, b"old")

    def interrupted(part: BinaryIO) -> None:
        part.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_file(path, interrupted)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_debug_shows_the_traceback(slim):
    result = slim("eval", "nowhere/run", "--debug")
    assert result.exit_code == 1
    assert result.exception is not None
    assert "SlimError" in repr(result.exception)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_reason(refused, tiny_recipe):
    line = refused("train", tiny_recipe, "--set", "stages.1.lr=1e30", "--set", "optimizer.opt=sgd")
    assert "the loss became" in line


def test_half_precision_safetensors_load_as_float32(slim, tiny_recipe, weights):
    save_file({name: value.half() for name, value in load_file(weights).items()}, weights)
    assert document(slim("train", tiny_recipe, "--set", f"model.weights={weights}", "--json"))["rows"]


@pytest.mark.parametrize(
    ("call", "named", "words", "spelled"),
    [
        (
            lambda: choose_format(Path("lives.txt"), None),
            "output=lives.txt: a picture is written",
            ("show", "--pick", "random", "-o", "lives.txt"),
            "-o lives.txt: a picture is written",
        ),
        (
            lambda: Goal(flops=-1.0),
            "flops=-1.0 is not possible",
            ("calibrate", "--target-flops", "-1"),
            "--target-flops -1.0 is not possible",
        ),
        (
            lambda: load_recipe("quickstart", ["nonsense"]),
            "overrides nonsense: expected field=value",
            ("recipes", "quickstart", "--check", "--set", "nonsense"),
            "--set nonsense: expected field=value",
        ),
        (
            lambda: write_plugin("fresh", Path()),
            "choose another with to",
            ("plugins", "new", "fresh", "--to", "."),
            "choose another with --to",
        ),
    ],
)
def test_an_error_names_the_parameter_in_python_and_the_option_in_a_command(refused, call, named, words, spelled):
    with pytest.raises(SlimError) as error:
        call()
    assert named in str(error.value)
    assert "--" not in str(error.value)
    assert spelled in refused(*words)


def test_a_parameter_that_a_command_has_no_option_for_keeps_its_name():
    error = SlimError(f"{parameter('overrides')} a=1 and {parameter('data', 'photos')} are both given")
    assert str(error) == "overrides a=1 and data=photos are both given"
    assert error.spelled({"data": "--data"}) == "overrides a=1 and --data photos are both given"
