"""Models without a classifier: slimmed without labels, measured by how near their features stay."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import document

from slimcli.measure.scores import Similarity

FEATURES = ("--set", "model.num_classes=0")


def test_calibrate_brings_features_nearer_to_the_dense_models(slim, tiny_recipe):
    words = ("--keep-rate", 0.6, "--images", 32, "--limit", 32, "-o", "cal", "--json")
    found = document(slim("calibrate", tiny_recipe, *FEATURES, *words))
    dense, slimmed = found["rows"]
    assert dense["similarity"] == 1
    assert 0 < slimmed["similarity"] < 1
    assert "top1" not in slimmed
    assert set(found["before"]) == {"agreement"}
    again = document(slim("eval", "cal", "--keep-rate", "1.0,0.6,0.3", "--json"))
    _, full, same, less = [row["similarity"] for row in again["rows"]]
    assert full == pytest.approx(1, abs=1e-6)
    assert same == slimmed["similarity"] and less < same


def test_the_tables_show_the_cosine(slim, tiny_recipe):
    result = slim("calibrate", tiny_recipe, *FEATURES, "--images", 16, "--limit", 16, "-o", "cal")
    assert result.exit_code == 0, result.output
    assert "cosine with dense features" in result.stdout and "Cosine with dense" in result.stdout
    assert slim("prune", "cal", "-o", "baked").exit_code == 0
    assert "Cosine with dense" in Path("baked/README.md").read_text()


def test_training_a_model_without_classifier_is_refused_with_what_to_do(refused, tiny_recipe):
    for words in ((), ("--dry-run",)):
        line = refused("train", tiny_recipe, *FEATURES, *words)
        assert "no classifier" in line and "slim calibrate" in line


def test_similarity_is_the_mean_cosine():
    import torch

    found = Similarity()
    found.add(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    found.add(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 2.0]]))
    assert found.row() == pytest.approx({"similarity": 2 / 3, "similarity_se": 1 / 3}, abs=1e-5)
