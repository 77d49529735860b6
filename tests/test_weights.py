"""Weights files as people have them load, or are refused with the reason; none is ever unpickled."""

import argparse

import numpy
import pytest
import timm
import torch
from conftest import tiny_vit
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

import slimcli
from slimcli.errors import SlimError
from slimcli.session.targets import find_target
from slimcli.store.model_folder import load_weights, save_model
from slimcli.store.weights import read_weights


def fresh(**changes):
    model = tiny_vit(**changes)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return slimcli.slim(model)


def prefixed(prefix):
    return {prefix + name: value for name, value in tiny_vit().state_dict().items()}


STATE = tiny_vit().state_dict()
OTHER = {name: value + 1 for name, value in STATE.items()}
TIMM_TRAIN = {
    "epoch": 3,
    "arch": "vit_tiny_patch16_224",
    "state_dict": OTHER,
    "state_dict_ema": STATE,
    "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    "args": argparse.Namespace(lr=0.1, model="vit_tiny_patch16_224"),
    "metric": numpy.float64(71.5),
}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("module.model.backbone."),
        {"state_dict": {**prefixed("model."), "criterion.weight": torch.ones(3)}, "epoch": 1},
        {"model": {"state_dict": STATE}, "optimizer": {}},
        {"state_dict": {name.replace("blocks.0.", "blocks.0._orig_mod."): v for name, v in STATE.items()}},
        {"state_dict": {f"backbone.{n}" if n.split(".")[0] != "head" else n: v for n, v in STATE.items()}},
        {"ema": {"shadow": STATE}, "model": OTHER},
        {"state_dict": {**{f"model.{n}": v for n, v in OTHER.items()}, **prefixed("ema_model.")}},
        AveragedModel(tiny_vit()).state_dict(),
        DataParallel(slimcli.slim(tiny_vit())).state_dict(),
        TIMM_TRAIN,
    ],
    ids=range(14),
)
def test_wrapped_contained_and_averaged_weights_load(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    model = fresh()
    found = load_weights(model, tmp_path / "w.pth")
    assert found.classifier
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, STATE[name]), name


def test_which_weights_were_taken_is_said(tmp_path):
    torch.save(TIMM_TRAIN, tmp_path / "w.pth")
    (note,) = load_weights(fresh(), tmp_path / "w.pth").notes
    assert "averaged weights (state_dict_ema)" in note


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"state_dict": {"encoder.layers.0.attn.weight": torch.ones(2)}}, "found encoder.layers.0.attn.weight"),
        ({"epoch": 3, "args": {"lr": 1}}, "found the keys epoch, args"),
        ({**prefixed("student."), **prefixed("teacher.")}, "under student. and teacher."),
        ({"state_dict": torch.nn.Linear(2, 2)}, "could run code"),
    ],
)
def test_what_does_not_fit_is_said_by_name(tmp_path, content, part):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(SlimError) as error:
        load_weights(fresh(), tmp_path / "w.pth")
    assert part in str(error.value)


def test_names_that_do_not_fit_are_shown_beside_those_expected(tmp_path):
    torch.save({f"layers.{i}.w": torch.ones(2) for i in range(3)}, tmp_path / "w.pth")
    with pytest.raises(SlimError, match=r"expected names like blocks\.0\..*, found layers\.0\.w"):
        load_weights(fresh(), tmp_path / "w.pth")


def test_a_grid_that_is_not_square_is_resampled_where_it_is_known(tmp_path):
    wide = tiny_vit(img_size=(32, 64))
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    with pytest.raises(SlimError, match=r"weights_grid = \[ROWS, COLUMNS\]"):
        load_weights(fresh(img_size=(64, 32)), tmp_path / "wide.pth")
    tall = fresh(img_size=(64, 32))
    load_weights(tall, tmp_path / "wide.pth", (4, 8))
    again = fresh(img_size=(32, 64))
    load_weights(again, tmp_path / "wide.pth", (4, 8))
    assert torch.equal(again.model.pos_embed, wide.pos_embed)
    expected = timm.layers.resample_abs_pos_embed(wide.pos_embed, [8, 4], [4, 8], num_prefix_tokens=1)
    assert torch.equal(tall.model.pos_embed, expected)
    # slim's own files say their grid
    save_model(tmp_path / "made", slimcli.slim(wide), {"model": {"name": "x", "args": {}}})
    load_weights(tall, tmp_path / "made" / "model.safetensors")
    assert torch.equal(tall.model.pos_embed, expected)
    with pytest.raises(SlimError, match="which is no grid of 3 x 3"):
        load_weights(tall, tmp_path / "wide.pth", (3, 3))


def test_equal_weights_make_equal_files(tmp_path):
    for name in ("a", "b", "c", "d"):
        save_model(tmp_path / name, slimcli.slim(tiny_vit()), {"model": {"name": "x", "args": {}}})
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "c", "d")}) == 1
    assert read_weights(tmp_path / "a" / "model.safetensors").grid == (4, 4)


def test_a_weights_file_and_a_models_name_are_a_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, depth=2)
    torch.save({"state_dict": dense.state_dict()}, "ck.pth")
    for words in (("ck.pth", None), (None, tmp_path / "ck.pth")):
        text, weights = words
        found = find_target(text, weights=weights, model="vit_tiny_patch16_224", overrides=["model.args.depth=2"])
        assert found.model.architecture().num_outputs == 7
        assert found.model.backbone.image_size == (32, 32)
        assert found.has_classifier and not found.has_life_head
        assert torch.equal(found.model.model.head.weight, dense.head.weight)


def test_a_head_that_no_stage_taught_is_known_as_such(slim, tiny_recipe, tmp_path):
    result = slim("train", tiny_recipe, "--set", 'stages=[{learns="backbone", mode="none", lr=1e-3}]')
    assert result.exit_code == 0, result.output
    run = (tmp_path / "runs" / "latest").resolve()
    assert f"next: slim calibrate {run.relative_to(tmp_path)}" in result.stdout.replace(str(tmp_path) + "/", "")
    assert not find_target(str(run)).has_life_head
    again = find_target(str(tiny_recipe), ["model.num_classes=10"], weights=run / "model.safetensors")
    assert not again.has_life_head
    assert "has no trained life head: run `slim calibrate" in slim("eval", run, "--limit", 16).stderr
