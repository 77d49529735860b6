"""What training computes and keeps: no more than what learns needs."""

import pytest
import torch
from conftest import tiny_vit

from slimcli import measure, slim
from slimcli.backbones.base import counted
from slimcli.recipe import StageSection
from slimcli.train import choose_parameters, set_training


def staged(learns, mode):
    """A model of 12 blocks and 197 tokens as a stage of training has it."""
    model = slim(tiny_vit(img_size=112, depth=12, embed_dim=64, num_heads=1), 0.7)
    stage = StageSection(learns=learns, mode=mode, lr=1e-3)
    choose_parameters(model, stage)
    set_training(model, stage)
    model.mode = mode
    return model


def step(run):
    x = torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    torch.autograd.backward(run(x).square().mean())


def test_the_first_stage_keeps_nothing_of_the_blocks_before_the_life_head(monkeypatch):
    model = staged("life", "soft")
    saved, at_the_head = [], []
    read = model.life_head.read
    monkeypatch.setattr(model.life_head, "read", lambda *args: at_the_head.append(len(saved)) or read(*args))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(1) or tensor, lambda tensor: tensor):
        step(model)
    assert at_the_head == [0]
    assert len(saved) > 100
    # where the backbone learns, they are kept
    model = staged("backbone", "soft")
    read, saved[:] = model.life_head.read, []
    monkeypatch.setattr(model.life_head, "read", lambda *args: at_the_head.append(len(saved)) or read(*args))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(1) or tensor, lambda tensor: tensor):
        step(model)
    assert at_the_head[-1] > 50


def test_the_first_stage_computes_no_gradient_of_the_backbone():
    model = staged("life", "soft")
    cost, _ = counted(lambda: step(model))
    assert all(p.grad is None for p in model.model.parameters())
    assert all(p.grad is not None for p in model.life_head.parameters())
    plain = staged("backbone", "none")
    full, _ = counted(lambda: step(plain.model))
    # 12 blocks forward and 8 back without weights are 20 of 36; attention has no weights and the last block leaves out
    assert cost < 0.6 * full


def test_nothing_needs_more_arithmetic_or_memory_than_dense():
    dense = staged("backbone", "none")
    full, _ = counted(lambda: step(dense.model))
    whole = measure.peak_memory_mib(lambda: step(dense.model), dense.model, torch.device("cpu"))
    for learns, mode, share, memory in (
        ("life", "soft", 0.6, 0.6),
        ("backbone", "hard", 0.75, 1),
        ("backbone", "soft", 1, 1),
    ):
        model = staged(learns, mode)
        cost, _ = counted(lambda model=model: step(model))
        assert cost < share * full, mode
        used = measure.peak_memory_mib(lambda model=model: step(model), model, torch.device("cpu"))
        assert used < memory * whole, (learns, mode)


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_training_and_evaluation_give_the_same_logits(mode):
    model = staged("both" if mode == "soft" else "backbone", mode)
    x = torch.randn(2, 3, 112, 112)
    learning = model(x)
    torch.testing.assert_close(model.eval()(x), learning, atol=1e-4, rtol=1e-4)
