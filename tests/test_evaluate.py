"""How `slimcli.evaluate` times: as many rounds as a small set allows, and no more than it has time for."""

import pytest
import torch
from conftest import tiny_vit
from torch.utils.data import DataLoader, TensorDataset

from slimcli import evaluate, measure, slim

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("images", "seconds", "rounds"),
    [
        pytest.param(4, 60.0, 10, id="one batch is topped up"),
        pytest.param(4, 0.0, 3, id="three at least"),
        pytest.param(20, 0.0, 6, id="five batches and one more"),
        pytest.param(44, 60.0, 11, id="eleven batches are not topped up"),
    ],
)
def test_rounds(images, seconds, rounds, monkeypatch):
    calls = []
    real = measure.timed
    monkeypatch.setattr(measure, "timed", lambda run, device: calls.append(1) or real(run, device))
    monkeypatch.setattr(evaluate, "TOP_UP_SECONDS", seconds)
    model = slim(tiny_vit(), 0.5)
    loader = DataLoader(TensorDataset(torch.randn(images, 3, 32, 32), torch.zeros(images, dtype=torch.long)), 4)
    rows = evaluate.evaluate(model, loader, [0.5], CPU)
    assert len(calls) == rounds * len(rows)
    assert all(row["images"] == images and row["speedup"] > 0 for row in rows)
