"""Retrieval: whether the images most like each are of its class, and the dense model's own."""

import json

import pytest
import torch
from torch import nn

import slimcli
from slimcli.measure.retrieval import _nearest, retrieve


def slow(embeddings, targets):
    """Image by image, as the definitions say."""
    nearest, firsts, tens, precisions = [], [], [], []
    for i, one in enumerate(embeddings):
        others = sorted((j for j in range(len(embeddings)) if j != i), key=lambda j: -float(one @ embeddings[j]))
        nearest.append(others[:10])
        hits = [bool(targets[j] == targets[i]) for j in others]
        if any(hits):
            firsts.append(float(hits[0]))
            tens.append(float(any(hits[:10])))
            found = [sum(hits[: k + 1]) / (k + 1) for k, hit in enumerate(hits) if hit]
            precisions.append(sum(found) / len(found))
    return nearest, firsts, tens, precisions


def test_scores_are_those_of_the_definitions():
    generator = torch.Generator().manual_seed(0)
    embeddings = nn.functional.normalize(torch.randn(30, 4, generator=generator), dim=-1)
    targets = torch.randint(0, 5, (30,), generator=generator)
    targets[7] = 9  # alone in its class
    nearest, scores = _nearest(embeddings, targets)
    expected = slow(embeddings, targets)
    assert nearest.tolist() == expected[0]
    for key, values in zip(("recall1", "recall10", "mean_average_precision"), expected[1:], strict=True):
        torch.testing.assert_close(scores[key].double(), torch.tensor(values, dtype=torch.float64))


def test_the_dense_model_finds_its_own_neighbours_and_a_slimmed_one_fewer():
    model = slimcli.slim("digits_vit", 0.3).eval()
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(8)]
    dense, slim = retrieve(model, batches, None, torch.device("cpu"), labelled=False)
    assert dense.neighbours == 100 and 0 < slim.neighbours < 100
    assert dense.recall1 is None and slim.images == 24
    with pytest.raises(slimcli.SlimError, match="two images"):
        retrieve(model, [(images[:1], torch.zeros(1))], None, torch.device("cpu"))


def test_eval_measures_retrieval_on_the_embedded_model(slim):
    result = slim("eval", "--task", "retrieval", "--limit", "60", "--keep-rate", "0.5", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    dense, half = document["rows"]
    assert document["task"] == "retrieval" and dense["recall1"] > 80 and dense["neighbours"] == 100
    assert half["mean_average_precision_se"] > 0 and half["gmacs"] < dense["gmacs"]
    result = slim("eval", "--task", "retrieval", "--runtime", "onnx")
    assert result.exit_code == 2 and "torch alone" in result.output
