"""Tokens that nothing reads after a block are only keys and values in it: the logits stay, for less arithmetic."""

from functools import partial

import pytest
import slimcli
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slim_openclip.tower import small_models

TOWERS = small_models()
CUSTOM = "norms and scales in the attention"


def awake(model):
    """With weights large enough that whatever is left out shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.8 * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.2 * noise)
    return model.eval()


def counted(run):
    """Multiply-adds of a call, and what it returns; fused attention would hide its products from the counter."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops() // 2, result


def slimmed(name, **arguments):
    return slimcli.slim(awake(TOWERS[name]()), 0.6, life_layer=1, drop_layers=[1, 2], **arguments).eval()


@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", TOWERS)
def test_a_narrow_block_is_the_block_cut_off(name, biased):
    """On tokens that lie apart in memory, for any number kept, handed over as `reading` or not."""
    backbone = slimmed(name).backbone
    assert all(backbone.narrows(layer) for layer in range(1, backbone.depth + 1))
    tokens = torch.randn(3, 29, 2 * backbone.embed_dim)[:, ::2, ::2]
    bias = torch.randn(3, 15) if biased else None
    for keep in (1, 8, 15):
        whole = slimcli.Backbone.narrow_block(backbone, 2, tokens, None, keep, bias)
        for reading in (None, tokens[:, :keep]):
            torch.testing.assert_close(backbone.narrow_block(2, tokens, None, keep, bias, reading), whole)


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_tokens_that_read_in_the_place_of_others_are_no_keys(name):
    backbone = slimmed(name).backbone
    width = backbone.embed_dim
    tokens, reading, bias = torch.randn(3, 15, width), torch.randn(3, 8, width), torch.randn(3, 15)
    never = torch.full((3, 8), float("-inf"))
    whole = backbone.masked_block(2, torch.cat((reading, tokens), 1), None, torch.cat((never, bias), 1))[:, :8]
    torch.testing.assert_close(backbone.narrow_block(2, tokens, None, 8, bias, reading), whole)


@torch.no_grad()
@pytest.mark.parametrize("dead", ["discard", "heir"])
@pytest.mark.parametrize("name", TOWERS)
def test_the_logits_stay_and_cost_what_the_formula_says(name, dead):
    model = slimmed(name, dead=dead)
    images = torch.randn(1, 3, *model.backbone.image_size)
    costs, logits = [], []
    for model.exact_savings in (False, True):
        cost, found = counted(partial(model.logits, images))
        assert cost == model.multiply_adds()
        costs.append(cost)
        logits.append(found)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-5)
    # what heirs save in earlier blocks is saved whether one asks for it or not
    saves = dead == "discard" or model.backbone.head_reads_prefix_only
    assert costs[1] < costs[0] if saves else costs[1] == costs[0]


@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
def test_dropout_is_the_blocks_own(biased):
    """Of everything, so that it is no matter of chance, in training alone."""
    model = slimmed(CUSTOM)
    tokens, bias = torch.randn(3, 15, 64), torch.randn(3, 15) if biased else None
    for part in ("attn_drop", "out_drop"):
        getattr(model.backbone.blocks[1].attn, part).p = 1.0
        predicted = model.eval().backbone.narrow_block(2, tokens, None, 5, bias)
        found = model.train().backbone.narrow_block(2, tokens, None, 5, bias)
        torch.testing.assert_close(found, slimcli.Backbone.narrow_block(model.backbone, 2, tokens, None, 5, bias))
        assert (found - predicted).abs().max() > 1e-2
        getattr(model.backbone.blocks[1].attn, part).p = 0.0


@torch.no_grad()
@pytest.mark.parametrize("unknown", ["a hook", "an attention of somebody's own"])
def test_an_unusual_block_runs_whole(unknown):
    model = slimmed(CUSTOM)
    attn, called = model.backbone.blocks[2].attn, []
    if unknown == "a hook":
        attn.register_forward_hook(lambda *_: called.append(1))
    else:

        class Own(type(attn)):
            def forward(self, *args, **kwargs):
                called.append(1)
                return 2 * super().forward(*args, **kwargs)

        attn.__class__ = Own
    # who takes over where does not hang on who looks
    assert model.backbone.narrows(2) and model.backbone.narrows(3) == (unknown == "a hook")
    images, logits = torch.randn(2, 3, 32, 32), []
    for model.exact_savings in (False, True):
        logits.append(model.logits(images))
    torch.testing.assert_close(*logits)
    assert len(called) == 2


def test_attention_that_is_not_fused_has_no_narrow_form():
    backbone = slimmed(CUSTOM).backbone
    backbone.blocks[1].attn.use_fsdpa = False
    cosine = small_models()["class token"](scaled_cosine_attn=True)
    assert [backbone.narrows(layer) for layer in (1, 2, 3)] == [True, False, True]
    assert not slimcli.slim(cosine).backbone.narrows(1)


@torch.no_grad()
@pytest.mark.parametrize("dead", ["discard", "heir"])
@pytest.mark.parametrize("name", ["LayerScale", CUSTOM])
def test_narrow_blocks_compile_in_one_graph(name, dead):
    model = slimmed(name, dead=dead)
    model.exact_savings = True
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model.logits, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(images), model.logits(images), atol=1e-5, rtol=1e-5)
