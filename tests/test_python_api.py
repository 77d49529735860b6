"""The functions of `slimcli` as a program of one's own uses them: own batches, results, and the model left alone."""

import copy
import dataclasses

import pytest
import timm
import torch
from conftest import TINY_RECIPE, tiny_vit
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import slimcli
from slimcli.backbones.timm_vit import DIGITS_VIT
from slimcli.calibration.goal import Cost
from slimcli.calibration.search import search
from slimcli.errors import SlimError


@pytest.fixture
def model():
    return slimcli.slim(tiny_vit(), keep_rate=0.5, dead="heir")


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(24, 3, 32, 32, generator=generator), torch.arange(24) % 10)


@pytest.fixture
def photo(tmp_path):
    """A photo that is stored on its side, and the same one upright."""
    upright = Image.new("RGB", (40, 60), "white")
    upright.paste("red", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    return tmp_path / "turned.png", upright


def same_state(before, model):
    return all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_calibrating_teaches_the_head_and_leaves_dense_weights_device_and_mode(model, pairs):
    dense = copy.deepcopy(model.model.state_dict())
    model.train()
    seen = []
    done = slimcli.calibrate_model(
        model, DataLoader(pairs, 8), keep_rate=0.6, num_images=16, progress=lambda *step: seen.append(step)
    )
    assert same_state(dense, model.model) and model.training and model.mode == "hard"
    assert model.is_taught and done.images + done.held_out == 24
    assert done.chosen.schedule == model.schedule
    assert done.chosen.gmacs == pytest.approx(model.multiply_adds() / 1e9)
    assert done.chosen.apart == min(candidate.apart for candidate in done.candidates)
    assert seen and seen[-1][1] == pytest.approx(seen[-1][2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        done.images = 1


def test_a_failed_calibration_leaves_the_model_as_it_was(model, pairs):
    before, schedule = copy.deepcopy(model.state_dict()), model.schedule
    with pytest.raises(slimcli.SlimError, match="cannot be reached"):
        slimcli.calibrate_model(model, DataLoader(pairs, 8), target_flops=1e-9)
    assert same_state(before, model) and model.schedule == schedule and not model.is_taught


def test_batches_of_every_form_give_the_same_figures(model, pairs):
    images, labels = pairs.tensors
    forms = [
        DataLoader(pairs, 24),
        [(images, labels)],
        (
            {"pixel_values": part, "labels": classes}
            for part, classes in zip(images.split(6), labels.split(6), strict=True)
        ),
    ]
    rows = [slimcli.evaluate_model(model, form, keep_rates=0.5).rows for form in forms]
    assert [row.images for row in rows[0]] == [24, 24]
    assert len({(row[0].top1, row[1].top1, round(row[1].loss, 4)) for row in rows}) == 1


def test_features_need_no_labels(pairs):
    model = slimcli.slim(tiny_vit(num_classes=0), keep_rate=0.5)
    dense, slimmed = slimcli.evaluate_model(model, pairs.tensors[0]).rows
    assert dense.similarity == pytest.approx(1) and 0 < slimmed.similarity < 1


def test_measuring_leaves_the_model_as_it_is(model, pairs):
    before = copy.deepcopy(model.state_dict())
    model.train()
    notes = slimcli.evaluate_model(model, DataLoader(pairs, 8), keep_rates=[0.9], precision="bfloat16").notes
    assert "untaught" in notes[0]
    found = slimcli.profile_model(
        model, keep_rates=[0.5], seconds=0, batch_size=2, per_layer=True, precision="bfloat16"
    )
    assert [row.name for row in found.rows] == ["dense", "0.5"]
    assert [block.patches for block in found.blocks[1].blocks] == list(found.rows[1].schedule)
    assert same_state(before, model) and model.training and model.keep_rate == 0.5


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (torch.rand(3, 32, 32), "one image is no batch"),
        ([torch.rand(2, 3, 32, 16)], r"\(2, 3, 32, 16\): expected \(B, 3, 32, 32\)"),
        ([torch.zeros(2, 3, 32, 32, dtype=torch.uint8)], "expected floats"),
        ([torch.full((2, 3, 32, 32), torch.nan)], "not finite"),
        ([torch.rand(2, 3, 32, 32)], "no labels"),
        ([(torch.rand(2, 3, 32, 32), torch.tensor([0, 10]))], "classes 0 to 9"),
        ([(torch.rand(2, 3, 32, 32), torch.rand(2, 10))], "expected class numbers"),
        ([(torch.rand(2, 3, 32, 32),) * 3], "tuple of 3"),
        ([{"x": 1}], "pixel_values"),
        ([], "no images"),
        (7, "not iterable"),
        ("nowhere", "no such folder"),
    ],
)
def test_what_is_no_batch_of_the_model_is_refused_in_one_line(model, batches, words):
    with pytest.raises(slimcli.SlimError, match=words) as found:
        slimcli.evaluate_model(model, batches)
    assert "\n" not in str(found.value)


def test_errors_name_parameters_not_flags(model, pairs):
    for given, words in (
        ({"target_flops": 1.0, "keep_rate": 0.5}, "^target_flops and keep_rate"),
        ({"keep_rate": 2}, "^keep_rate"),
        ({"num_images": 1}, "^num_images"),
        ({"device": "tpu"}, "^device=tpu"),
        ({"precision": "half"}, "^precision = 'half'"),
        ({"batch_size": 4}, "^batch_size"),
    ):
        with pytest.raises(slimcli.SlimError, match=words):
            slimcli.calibrate_model(model, DataLoader(pairs, 8), **given)


def test_a_saved_model_is_loaded_with_its_classes_and_preprocessing(model, pairs, photo, tmp_path):
    model.class_names = [f"class {number}" for number in range(10)]
    slimcli.save(model, tmp_path / "model", model_name="vit_tiny_patch16_224", model_args=tiny_args())
    loaded = slimcli.load(tmp_path / "model")
    images = pairs.tensors[0]
    assert torch.equal(loaded(images), model.eval()(images))
    assert not loaded.is_taught
    for found in (loaded, copy.deepcopy(loaded), slimcli.optimize(loaded), loaded.to(torch.bfloat16)):
        assert found.class_names == model.class_names
        assert torch.equal(found.transform()(photo[0]), model.transform()(photo[1]))


def tiny_args(**changes):
    return {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10, **changes}


def test_a_model_that_would_be_built_otherwise_is_not_saved(model, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(slimcli.SlimError, match=r"has other weights.*model_name"):
        slimcli.save(model, folder)
    with pytest.raises(slimcli.SlimError, match="predicts otherwise"):
        slimcli.save(model, folder, model_name="vit_tiny_patch16_224", model_args=tiny_args(num_heads=4))
    assert not folder.exists()


def test_timms_models_say_themselves_how_they_are_built(tmp_path):
    model = slimcli.slim(timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64), keep_rate=0.5)
    slimcli.save(model, tmp_path / "model", dtype="bfloat16")
    loaded = slimcli.load(tmp_path / "model")
    assert loaded.backbone.image_size == (64, 64) and loaded.architecture().num_outputs == 3
    # a classifier that was replaced has other classes
    loaded.class_names = ["a", "b", "c"]
    loaded.model.head = torch.nn.Linear(192, 2)
    assert loaded.class_names is None


def test_the_transform_turns_a_photo_upright_in_rgb(photo):
    model = slimcli.load(DIGITS_VIT)
    assert model.class_names == [str(digit) for digit in range(10)]
    turned, upright = photo
    for image in (turned, str(turned), Image.open(turned), upright, upright.convert("RGBA"), upright.convert("P")):
        assert torch.equal(model.transform()(image), model.transform()(upright))
    # red is above
    assert model.transform()(turned)[1].flatten()[0] < model.transform()(turned)[1].flatten()[-1]


def test_class_names_are_one_for_each_class(model):
    with pytest.raises(slimcli.SlimError, match="2 names for a model of 10 classes"):
        model.class_names = ["cat", "dog"]


def test_pictures_are_drawn_of_files(tmp_path, photo):
    model = slimcli.load(DIGITS_VIT)
    (tmp_path / "broken.png").write_bytes(b"no image")
    found = slimcli.draw_lives(model, [photo[0], tmp_path / "broken.png"], output=tmp_path / "lives.png")
    assert found.files == (tmp_path / "lives.png",) and found.files[0].is_file()
    assert [outcome.life.shape for outcome in found.outcomes] == [(model.num_patches,)]
    assert len(found.skipped) == 1 and "broken.png" in found.skipped[0]


def test_a_recipe_is_planned_and_trained_and_reported(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = slimcli.plan_training(tiny_recipe)
    assert plan.train_images == 64 and [stage.settings["learns"] for stage in plan.stages] == ["life", "backbone"]
    lines = []
    done = slimcli.train_model(tiny_recipe, ["data.train_limit=32"], log=lines.append)
    assert lines and [row.dense for row in done.rows] == [True, False]
    assert slimcli.load(done.folder).is_taught
    written = slimcli.write_report(done.folder, limit=8)
    assert written.path.is_file() and written.left_out == ()
    assert TINY_RECIPE in tiny_recipe.read_text()


def test_methods_are_compared_in_a_folder(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = slimcli.compare_methods(tiny_recipe, methods=["tome", "random"], keep_rates=0.7, limit=8)
    assert [line.title for line in found.lines] == ["dense", "tome", "random"]
    assert (found.folder / "compare.md").is_file()


def test_a_goal_that_no_schedule_reaches_is_told_in_multiply_adds():
    with pytest.raises(SlimError, match=r"^2e-06 G multiply-adds: no schedule of this model comes to that"):
        search(slimcli.slim(tiny_vit(), 0.5, life_layer=1), Cost(2e3), [1, 2], lambda *_: None)
