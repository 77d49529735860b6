"""Tokens that nothing reads after a block are only keys and values in it: the logits stay, for less arithmetic."""

from functools import partial

import pytest
import slimcli
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slim_transformers.build import small_models

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


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


def dinov2(kind=transformers.Dinov2ForImageClassification, config=transformers.Dinov2Config, **fields):
    return kind(config(**SIZE, mlp_ratio=2, **fields)).eval()


def vit(**fields):
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZE, intermediate_size=64, **fields))


def clip(**fields):
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZE, intermediate_size=64, **fields))


SMALL = {name: build for name, build in small_models().items() if "Beit" not in name}
KINDS = {
    **SMALL,
    "Dinov2, SwiGLU": partial(dinov2, use_swiglu_ffn=True),
    "Dinov2WithRegisters, SwiGLU": partial(
        dinov2,
        transformers.Dinov2WithRegistersForImageClassification,
        transformers.Dinov2WithRegistersConfig,
        use_swiglu_ffn=True,
    ),
}


def slimmed(model, **arguments):
    return slimcli.slim(awake(model), [16, 12, 7], life_layer=1, **arguments).eval()


@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_narrow_block_is_the_block_cut_off(name, biased):
    """On tokens that lie apart in memory, for any number kept, handed over as `reading` or not."""
    backbone = slimmed(KINDS[name]()).backbone
    assert all(backbone.narrows(layer) for layer in (1, 2, 3))
    tokens = torch.randn(3, 29, 64)[:, ::2, ::2]
    bias = torch.randn(3, 15) if biased else None
    for keep in (1, 8, 15):
        whole = slimcli.Backbone.narrow_block(backbone, 2, tokens, None, keep, bias)
        for reading in (None, tokens[:, :keep]):
            torch.testing.assert_close(backbone.narrow_block(2, tokens, None, keep, bias, reading), whole)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_tokens_that_read_in_the_place_of_others_are_no_keys(name):
    backbone = slimmed(KINDS[name]()).backbone
    tokens, reading, bias = torch.randn(3, 15, 32), torch.randn(3, 8, 32), torch.randn(3, 15)
    never = torch.full((3, 8), float("-inf"))
    whole = backbone.masked_block(2, torch.cat((reading, tokens), 1), None, torch.cat((never, bias), 1))[:, :8]
    torch.testing.assert_close(backbone.narrow_block(2, tokens, None, 8, bias, reading), whole)


@torch.no_grad()
@pytest.mark.parametrize("dead", ["discard", "heir"])
@pytest.mark.parametrize("name", SMALL)
def test_the_logits_stay_and_cost_what_the_formula_says(name, dead):
    model = slimmed(SMALL[name](), dead=dead)
    images = torch.randn(1, 3, 32, 32)
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
def test_drop_path_leaves_the_same_images_out():
    backbone = slimmed(dinov2(drop_path_rate=0.5)).train().backbone
    tokens = torch.randn(16, 17, 32)
    torch.manual_seed(0)
    expected = slimcli.Backbone.narrow_block(backbone, 2, tokens, None, 5)
    torch.manual_seed(0)
    torch.testing.assert_close(backbone.narrow_block(2, tokens, None, 5), expected)
    backbone.model.eval()
    assert (backbone.narrow_block(2, tokens, None, 5) - expected).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "build",
    [
        partial(vit, hidden_dropout_prob=1.0),
        partial(vit, attention_probs_dropout_prob=1.0),
        partial(dinov2, attention_probs_dropout_prob=1.0),
        partial(clip, attention_dropout=1.0),
    ],
)
def test_dropout_is_the_blocks_own(build, biased):
    """Of everything, so that it is no matter of chance, in training alone."""
    model = slimmed(build())
    tokens, bias = torch.randn(3, 15, 32), torch.randn(3, 15) if biased else None
    predicted = model.backbone.narrow_block(2, tokens, None, 5, bias)
    model.train()
    found = model.backbone.narrow_block(2, tokens, None, 5, bias)
    torch.testing.assert_close(found, slimcli.Backbone.narrow_block(model.backbone, 2, tokens, None, 5, bias))
    assert (found - predicted).abs().max() > 1e-2


def test_gradients_stay():
    images, gradients = torch.randn(2, 3, 32, 32), []
    model = slimmed(dinov2())
    for model.exact_savings in (False, True):
        model.zero_grad()
        model.logits(images).square().sum().backward()
        gradients.append(
            [parameter.grad.clone() for parameter in model.model.parameters() if parameter.grad is not None]
        )
    for plain, narrow in zip(*gradients, strict=True):
        torch.testing.assert_close(narrow, plain, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("unknown", ["a hook", "an attention of somebody's own", "another forward", "eager attention"])
def test_an_unusual_block_runs_whole(unknown):
    model = slimmed(SMALL["ViTForImageClassification"]())
    attention, called = model.backbone.blocks[2].attention, []
    forward = attention.forward

    def counting(*args, **kwargs):
        called.append(1)
        return forward(*args, **kwargs)

    if unknown == "a hook":
        attention.register_forward_hook(lambda *_: called.append(1))
    elif unknown == "another forward":
        attention.forward = counting
    elif unknown == "eager attention":
        model.model.set_attn_implementation("eager")
    else:
        attention.__class__ = type("Own", (type(attention),), {"forward": lambda self, *a, **k: counting(*a, **k)})
    # who takes over where does not hang on who looks
    assert model.backbone.narrows(3) == (unknown == "a hook")
    images, logits = torch.randn(2, 3, 32, 32), []
    for model.exact_savings in (False, True):
        logits.append(model.logits(images))
    torch.testing.assert_close(*logits)
    assert len(called) == (0 if unknown == "eager attention" else 2)


@torch.no_grad()
@pytest.mark.parametrize("dead", ["discard", "heir"])
def test_narrow_blocks_compile_in_one_graph_and_run_under_autocast(dead):
    model = slimmed(dinov2(), dead=dead)
    model.exact_savings = True
    images = torch.randn(2, 3, 32, 32)
    expected = model.logits(images)
    compiled = torch.compile(model.logits, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(images), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.logits(images).dtype == torch.bfloat16
