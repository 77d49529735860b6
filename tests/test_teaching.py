"""What a stage learns from: labels, the dense model, several keep rates at once."""

import json

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch.nn import functional as F

import slimcli
from slimcli.recipe import AugmentationSection, StageSection
from slimcli.training.tasks import distillation, feature_error, keep_rates_of_step, make_mixup, make_task


def stage(**fields):
    return StageSection(**{"learns": "backbone", "mode": "hard", "lr": 1e-3, **fields})


def test_distillation_is_the_divergence_from_the_dense_models_predictions():
    torch.manual_seed(0)
    logits, dense = torch.randn(4, 10), torch.randn(4, 10)
    p, q = (dense / 2).softmax(1), (logits / 2).softmax(1)
    plain = (p * (p / q).log()).sum(1).mean() * 4
    assert distillation(logits, dense, 2.0).item() == pytest.approx(plain.item(), rel=1e-5)
    assert distillation(dense, dense).item() == pytest.approx(0.0, abs=1e-6)


def test_each_loss_uses_what_it_says():
    torch.manual_seed(0)
    model = slimcli.slim("digits_vit", 0.5).eval()
    teacher = slimcli.slim("digits_vit", 0.5).eval()
    teacher.mode = "none"
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])

    def found(**fields):
        task = make_task(model, stage(**fields), teacher, AugmentationSection(label_smoothing=0.0))
        task.start()
        return task(task.batch(images, labels))["loss"].item()

    with torch.no_grad():
        dense, near = teacher.logits_and_embedding(images)
        model.mode = "hard"
        output, embedding = model.logits_and_embedding(images)
    entropy, taught = F.cross_entropy(output, labels).item(), distillation(output, dense).item()
    far = (F.mse_loss(embedding, near) / near.var()).item()
    cosine = F.cosine_similarity(embedding, near).mean().item()
    assert found() == pytest.approx(entropy, rel=1e-4)
    assert found(loss="distill") == pytest.approx(taught, rel=1e-3)
    assert found(loss="both") == pytest.approx((entropy + taught) / 2, rel=1e-4)
    assert found(features=0.5) == pytest.approx(entropy + 0.5 * far, rel=1e-4)
    assert found(features=0.5, loss="distill") == pytest.approx(taught + 0.5 * far, rel=1e-3)
    assert found(loss="cosine") == pytest.approx(1 - cosine, rel=1e-3)


def test_features_that_are_all_alike_give_a_finite_error():
    same = torch.ones(4, 8, requires_grad=True)
    error = feature_error(same, torch.ones(4, 8))
    error.backward()
    assert error.item() == 0 and torch.isfinite(same.grad).all()
    assert torch.isfinite(feature_error(torch.ones(1, 1), torch.ones(1, 1)))


@pytest.mark.parametrize("count", [1, 4, 5])
def test_mixup_takes_any_number_of_images(count):
    mix = make_mixup(AugmentationSection(mixup=0.8, cutmix=1.0), 10)
    before = torch.randn(count, 3, 8, 8)
    images, labels = mix(before.clone(), torch.arange(count))
    assert images.shape == before.shape and labels.shape == (count, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(count))
    if count % 2:
        # the last image has no partner
        assert torch.equal(images[-1], before[-1]) and labels[-1].argmax() == count - 1


def test_a_step_trains_the_highest_the_lowest_and_one_in_between():
    assert keep_rates_of_step(stage()) == [None]
    assert keep_rates_of_step(stage(keep_rates=[0.5, 1.0])) == [1.0, 0.5]
    torch.manual_seed(0)
    seen = [keep_rates_of_step(stage(keep_rates=[0.7, 0.5, 0.9, 0.6])) for _ in range(40)]
    assert all(rates[0] == 0.9 and rates[2] == 0.5 for rates in seen)
    assert {rates[1] for rates in seen} == {0.7, 0.6}


def test_training_for_several_keep_rates_leaves_the_recipes_own(slim, tiny_recipe, tmp_path):
    words = ["--set", "stages.1.keep_rates=[1.0,0.7,0.4]", "--set", "stages.1.loss=both"]
    words += ["--set", "stages.1.features=0.5"]
    words += ["--set", "stages.0.mode=straight", "--set", "stages.0.end_temperature=3.0"]
    result = slim("train", tiny_recipe, *words)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "runs" / "latest"
    config = json.loads((folder / "config.json").read_text())["slimming"]
    assert config["temperature"] == 1.5
    summary = json.loads((folder / "summary.json").read_text())
    assert config["keep_rate"] == summary["rows"][1]["keep_rate"]


def test_distilling_needs_no_labels(slim, tiny_recipe, tmp_path):
    result = slim("train", tiny_recipe, "--set", "stages.0.loss=distill", "--set", "stages.1.loss=distill")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "runs" / "latest" / "metrics.jsonl").read_text().splitlines()]
    # the divergence from the model that training started from is small, a cross-entropy with smoothed labels is not
    assert all(row["loss"] < 0.5 for row in rows if row["event"] == "epoch")


def test_the_average_of_the_weights_is_validated_and_saved(slim, tiny_recipe, tmp_path, monkeypatch):
    """Every update is recorded and averaged here in the plain way."""
    trained = []
    real = ModelEmaV3.update

    def update(self, model, step=None):
        trained.append({name: value.clone() for name, value in model.state_dict().items()})
        return real(self, model, step)

    monkeypatch.setattr(ModelEmaV3, "update", update)
    result = slim("train", tiny_recipe, "--set", "stages.1.ema=0.6")
    assert result.exit_code == 0, result.output
    updates = len(trained)
    assert updates > 3
    average = trained[0]
    for step, weights in enumerate(trained[1:], 1):
        decay = min(0.6, 1 - (1 + step) ** (-2 / 3))
        average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
    folder = tmp_path / "runs" / "latest"
    saved = load_file(folder / "last" / "model.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(saved[name], value, atol=1e-6, rtol=1e-5)
    name = "model.blocks.0.mlp.fc1.weight"
    assert not torch.allclose(saved[name], trained[-1][name], atol=1e-6)
