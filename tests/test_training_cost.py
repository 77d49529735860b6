"""What training computes and keeps: no more than what learns needs."""

from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_vit

from slimcli import attention, slim
from slimcli.backbones.counting import counted
from slimcli.measure import clock
from slimcli.recipe import StageSection
from slimcli.training.optimizer import choose_parameters, set_training


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
    whole = clock.peak_memory_mib(lambda: step(dense.model), dense.model, torch.device("cpu"))
    for learns, mode, share, memory in (
        ("life", "soft", 0.6, 0.6),
        ("backbone", "hard", 0.75, 1),
        ("backbone", "soft", 1, 1),
    ):
        model = staged(learns, mode)
        cost, _ = counted(lambda model=model: step(model))
        assert cost < share * full, mode
        used = clock.peak_memory_mib(lambda model=model: step(model), model, torch.device("cpu"))
        assert used < memory * whole, (learns, mode)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("learns", "mode"), [("backbone", "hard"), ("both", "soft")])
def test_passes_at_several_keep_rates_share_their_first_blocks(learns, mode, checkpointing):
    """The same gradients as pass by pass, for less arithmetic."""
    model = staged(learns, mode)
    model.grad_checkpointing = checkpointing
    schedules = [model.at_keep_rate(rate) for rate in (1.0, 0.7, 0.5)]

    def passes(sharing):
        model.zero_grad()
        with sharing:
            for schedule in schedules:
                model.schedule = schedule
                step(model)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    apart, together = passes(nullcontext()), passes(model.untouched_blocks_once())
    assert apart.keys() == together.keys()
    for key, gradient in apart.items():
        torch.testing.assert_close(together[key], gradient, atol=1e-6, rtol=1e-3)
    dear, _ = counted(lambda: passes(nullcontext()))
    cheap, _ = counted(lambda: passes(model.untouched_blocks_once()))
    first = model.schedule.life_layer
    # two of three passes leave out the first blocks, forward and back
    assert cheap < dear * (1 - 2 * first / 36 * 0.9)
    # outside, every pass is of its own images
    images = torch.randn(2, 4, 3, 112, 112)
    assert not torch.allclose(model(images[0]), model(images[1]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_of_few_tokens_train_by_the_plain_formula_in_bfloat16(monkeypatch, checkpointing):
    """Again where gradient checkpointing runs them again; the fused kernel predicts."""
    ran, real = [], attention.kernels._reference
    monkeypatch.setattr(attention.kernels, "_reference", lambda *args: ran.append(args[1].shape[2]) or real(*args))
    model = staged("backbone", "hard").bfloat16()
    model.grad_checkpointing = checkpointing
    x = torch.randn(2, 3, 112, 112).bfloat16()
    loss = model(x).float().square().mean()
    # the first four have 197 tokens
    tokens = [1 + n for n in model.patches_per_layer[4:]]
    assert ran == tokens
    loss.backward()
    assert sorted(ran) == sorted(tokens * (2 if checkpointing else 1))
    ran.clear()
    with torch.no_grad():
        model(x)
    assert not ran


def test_a_rule_that_may_act_in_any_block_shares_what_comes_before_them():
    model = slim(tiny_vit(), 0.7, method="tome")
    images, schedules = torch.randn(2, 3, 32, 32), [model.at_keep_rate(rate) for rate in (0.9, 0.6)]

    def passes(sharing):
        model.zero_grad()
        with sharing:
            for schedule in schedules:
                model.schedule = schedule
                model(images).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    torch.testing.assert_close(passes(model.untouched_blocks_once()), passes(nullcontext()))


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_training_and_evaluation_give_the_same_logits(mode):
    model = staged("both" if mode == "soft" else "backbone", mode)
    x = torch.randn(2, 3, 112, 112)
    learning = model(x)
    torch.testing.assert_close(model.eval()(x), learning, atol=1e-4, rtol=1e-4)
