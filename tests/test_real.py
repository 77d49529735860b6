"""The real ViT-S/14 on real photographs."""

import pytest
from conftest import document

from slimcli.calibration import effort


@pytest.fixture
def real(shared):
    """Options that point the CIFAR-10 recipe at the real weights and photographs."""
    weights = shared / "weights" / "vit_small_patch14_dinov2_112_cifar10.safetensors"
    # bfloat16, the recipe's precision, takes four times as long on a processor without instructions for it
    data = ["--set", f"data.root={shared / 'data' / 'cifar10'}", "--set", "precision=float32"]
    return [*data, "--set", f"model.weights={weights}"]


def test_calibration_makes_the_real_model_cheaper_and_keeps_its_accuracy(slim, real, monkeypatch):
    monkeypatch.setattr(effort, "STEPS", (80, 1000))
    words = ["cifar10-dinov2-small", *real, "--keep-rate", "0.7", "--images", 64]
    report = document(slim("calibrate", *words, "--limit", 64, "--batch-size", 8, "--json"))
    dense, slimmed = report["rows"]
    assert dense["top1"] >= 88
    assert dense["gmacs"] == pytest.approx(1.434, abs=1e-3)
    assert 0.98 < slimmed["gmacs"] <= 1.001
    assert report["after"]["agreement"] >= max(85, report["before"]["agreement"] + 2)
    found = document(slim("eval", "--keep-rate", "1.0", "--limit", 8, "--batch-size", 8, "--json"))
    assert found["rows"][0]["loss"] == found["rows"][1]["loss"]


def test_weights_of_another_image_size_are_resampled(slim, shared):
    weights = shared / "weights" / "vit_small_patch14_dinov2_518.safetensors"
    words = ["--set", f"model.weights={weights}", "--set", "model.num_classes=0", "--set", "model.img_size=56"]
    result = slim("profile", "cifar10-dinov2-small", *words, "--seconds", 0, "--json")
    assert document(result)["rows"][0]["schedule"] == [16] * 12
