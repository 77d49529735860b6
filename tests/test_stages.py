"""Stages of a training: those that calibrate, values that are not finite, the plan, and settings that fit no stage."""

import json
import math

import pytest
import torch
from conftest import TINY_RECIPE, document
from PIL import Image
from safetensors.torch import load_file

import slimcli
from slimcli import train
from slimcli.calibration.observe import share_out
from slimcli.errors import Interrupted, SlimError
from slimcli.recipe import load_recipe
from slimcli.training import control, learner, stages

CALIBRATED = (
    TINY_RECIPE.replace('mode = "soft"\nlr = 1e-3', 'mode = "calibrate"\nimages = 32', 1)
    .replace('mode = "soft"', 'mode = "hard"\nema = 0.9')
    .replace("drop_layers = [1, 2, 3]", "keep_rate = 0.5")
    .replace("life_layer = 1\n", "")
)


@pytest.fixture
def calibrated_recipe(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(CALIBRATED)
    return path


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_calibrates_and_the_next_trains_on(slim, calibrated_recipe, tmp_path):
    summary = document(slim("train", calibrated_recipe, "--json"))
    run = tmp_path / summary["run"]
    assert load_recipe(run / "recipe.toml") == load_recipe(calibrated_recipe), "the recipe stays as it was given"
    epochs = [row for row in metrics(run) if row["event"] == "epoch"]
    assert [(row["stage"], row["mode"]) for row in epochs] == [(1, "calibrate"), (2, "hard"), (2, "hard")]
    config = json.loads((run / "config.json").read_text())
    assert "patches_per_layer" in config["slimming"] and config["life_head_taught"] is True
    assert summary["rows"][1]["schedule"] == config["slimming"]["patches_per_layer"]
    best = max(epochs, key=lambda row: row["val_top1"])
    assert summary["best_epoch"] == {"stage": best["stage"], "epoch": best["epoch"]}
    # the head is what the first stage made of it, the backbone has learned
    last = slimcli.load(run / "last")
    assert last.life_head.similarity_dim > 0


def test_the_log_says_which_epoch_the_saved_model_is_of(slim, calibrated_recipe):
    lines = slim("train", calibrated_recipe).stdout.splitlines()
    assert any(line.startswith("best epoch: stage ") for line in lines)


def test_a_run_goes_on_after_a_stage_that_calibrated_to_the_same_weights(calibrated_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(calibrated_recipe)
    whole, _ = train.train(recipe, "cpu")
    other = recipe.model_copy(update={"output": tmp_path / "broken"})

    class Break(Exception):
        pass

    def stop(label, _done, _total):
        if label.startswith("stage 2 epoch 2"):
            raise Break

    with pytest.raises(Break):
        train.train(other, "cpu", progress=stop)
    run = train.unfinished_run(other)
    train.train(other, "cpu", resume=run)
    one, two = (load_file(folder / "last" / "model.safetensors") for folder in (whole, run))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("changes", [{"keep_rates": [0.8, 0.5]}, {"end_temperature": 9.0}])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_run_that_stops_between_batches_goes_on_to_the_same(tiny_recipe, tmp_path, monkeypatch, changes, batches):
    """Also where each step runs at other keep rates, or at another temperature: neither is the model's own."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(tiny_recipe)
    (stage,) = recipe.stages[-1:]
    recipe = recipe.model_copy(update={"stages": [stage.model_copy(update={"epochs": 1, **changes})]})
    whole, _ = train.train(recipe, "cpu")
    other = recipe.model_copy(update={"output": tmp_path / "broken"})
    asked = []
    monkeypatch.setattr(control.Control, "stopping", lambda *_given: asked.append(1) or len(asked) == batches)
    with pytest.raises(Interrupted):
        train.train(other, "cpu")
    assert len(asked) == batches
    run = train.unfinished_run(other)
    train.train(other, "cpu", resume=run)
    one, two = (json.loads((folder / "config.json").read_text())["slimming"] for folder in (whole, run))
    assert one == two
    one, two = (load_file(folder / "last" / "model.safetensors") for folder in (whole, run))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_stopping_during_a_validation_loses_nothing(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(tiny_recipe)
    whole, _ = train.train(recipe, "cpu")
    other = recipe.model_copy(update={"output": tmp_path / "broken"})
    asked = []
    monkeypatch.setattr(control.Control, "stopping", lambda self, accelerator: False)
    monkeypatch.setattr(
        stages.LearningStage, "_label", lambda self, epoch: asked.append(epoch) or f"stage {self.number + 1}  "
    )

    def watched(self, progress, accelerator):
        def report(label, done, total):
            raise control.Stopped

        return report

    monkeypatch.setattr(control.Control, "watched", watched)
    with pytest.raises(Interrupted):
        train.train(other, "cpu")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run = train.unfinished_run(other)
    train.train(other, "cpu", resume=run)
    one, two = (load_file(folder / "last" / "model.safetensors") for folder in (whole, run))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_changes_no_weight_and_is_named(tiny_recipe, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    seen, lines, weights = [], [], []
    real = learner.Learner._gradients

    def gradients(self, images, targets):
        seen.append(1)
        weights.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        if len(seen) == 2:
            forward = self.task.compare
            with monkeypatch.context() as patch:
                patch.setattr(self.task, "compare", lambda batch: (forward(batch)[0] * value, torch.zeros(())))
                return real(self, images, targets)
        return real(self, images, targets)

    monkeypatch.setattr(learner.Learner, "_gradients", gradients)
    run, _ = train.train(load_recipe(tiny_recipe), "cpu", log=lines.append)
    (note,) = [line for line in lines if "left out" in line]
    assert f"the loss became {value} at batch 2" in note and "16 images: digit " in note
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1])
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(tensor.isfinite().all() for tensor in load_file(run / "last" / "model.safetensors").values())


def test_a_loss_that_stays_not_finite_names_blank_images_and_keeps_a_good_checkpoint(
    photographs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 24), "white").save(sorted((photographs / "train" / "cat").glob("*.jpg"))[0])
    path = tmp_path / "tiny.toml"
    path.write_text(TINY_RECIPE)
    over = ["data.name=", f"data.root={photographs}", "data.batch_size=20", "data.workers=0", "checkpoint_minutes=1e-9"]
    recipe = load_recipe(path, over)
    real, calls = learner.Learner._update, []

    def update(self, number):
        calls.append(number)
        if len(calls) > 2:
            for parameter in self.task.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)
        return real(self, number)

    monkeypatch.setattr(learner.Learner, "_update", update)
    lines = []
    with pytest.raises(SlimError, match=r"\(blank\)|became nan or inf") as found:
        train.train(recipe, "cpu", log=lines.append)
    assert "keeps the last good checkpoint" in str(found.value)
    assert any("0.jpg (blank)" in line for line in lines)
    state = torch.load(train.unfinished_run(recipe) / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_plan_counts_the_updates_that_are_made(slim, tiny_recipe, monkeypatch, accumulation):
    words = [tiny_recipe, "--set", f"optimizer.accumulation={accumulation}"]
    plan = document(slim("train", *words, "--dry-run", "--json"))
    real, made = learner.Learner._update, []
    monkeypatch.setattr(learner.Learner, "_update", lambda self, number: made.append(1) or real(self, number))
    assert slim("train", *words).exit_code == 0
    assert sum(stage["updates"] for stage in plan["stages"]) == len(made)
    assert plan["seconds"] + 0.01 >= sum(stage["seconds"] for stage in plan["stages"]) > 0


def test_the_plan_refuses_what_training_would(photographs, refused, tiny_recipe):
    data = ["--set", "data.name=", "--set", f"data.root={photographs}"]
    for words in (
        [*data, "--set", "data.val_split=nowhere"],
        [*data, "--set", "data.batch_size=1000"],
        ["--set", "optimizer.opt=nonsense"],
    ):
        assert refused("train", tiny_recipe, *words, "--dry-run") == refused("train", tiny_recipe, *words)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (["stages.0.mode=calibrate"], "lr: not for mode = 'calibrate'"),
        (["stages.1.images=64"], "images: for mode = 'calibrate' only"),
        (["stages.1.warmup_epochs=3"], "warmup_epochs = 3 is longer than the stage"),
        (["stages.1.distill_temperature=2.0"], "distill_temperature is for loss = 'distill'"),
        (["stages=[{learns='backbone',mode='calibrate'}]"], "teaches the life head"),
        (["stages=[{learns='backbone',mode='hard'}]"], "lr is missing"),
        (["stages=[{learns='life',mode='soft',lr=1e-3}]", "optimizer.layer_decay=0.9"], "optimizer.layer_decay"),
        (["stages.0.loss=distill", "stages.1.loss=distill", "augmentation.label_smoothing=0.2"], "label_smoothing"),
        (["optimizer.opt=sgd", "optimizer.betas=[0.9,0.99]"], "optimizer"),
        (["optimizer.momentum=0.5"], "momentum"),
    ],
)
def test_settings_that_would_be_dropped_are_refused(refused, tiny_recipe, changes, part):
    assert part in refused("train", tiny_recipe, *(word for change in changes for word in ("--set", change)))


def test_accelerates_environment_does_not_overrule_the_recipe(slim, refused, tiny_recipe, monkeypatch):
    plain = document(slim("train", tiny_recipe, "--json"))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    again = document(slim("train", tiny_recipe, "--json"))
    assert [row["loss"] for row in again["rows"]] == [row["loss"] for row in plain["rows"]]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "ACCELERATE_USE_FSDP is set" in refused("train", tiny_recipe)


def test_a_summary_says_that_the_life_head_was_never_taught(slim, tiny_recipe):
    words = ["--set", "stages=[{learns='backbone',mode='none',lr=1e-3}]", "--json"]
    assert document(slim("train", tiny_recipe, *words))["life_head_taught"] is False


@pytest.mark.parametrize(
    ("fit", "available", "check", "expected"),
    [
        (1024, None, None, (1024, 256)),
        (1024, 1280, 256, (1024, 256)),
        (512, None, 128, (512, 128)),
        (16, None, None, (16, 8)),
        (1024, 300, None, (240, 60)),
        (16, 10, None, (8, 2)),
        (16, 1, None, (1, 1)),
    ],
)
def test_a_calibration_keeps_a_fifth_of_few_images_to_check_on(fit, available, check, expected):
    assert share_out(fit, available, check) == expected


def test_class_maps_are_checked_on_more_images_since_some_classes_are_on_few_of_them():
    assert share_out(96, fewest=64) == (96, 64) and share_out(1024, fewest=64) == (1024, 256)
    assert share_out(24, available=40, fewest=64) == (24, 16), "of few images most are to fit on"
