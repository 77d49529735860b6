"""Exact savings: tokens that nothing reads after a block are keys and values in it and no more; the logits stay."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import document
from test_slimming import SHAPES, distilled, images, slimmed

from slimcli import load, slim
from slimcli.backbones.base import Backbone
from slimcli.backbones.counting import counted
from slimcli.backbones.timm_vit import build_model
from slimcli.store.model_folder import save_model

#: kinds of block beside those of `SHAPES`
BLOCKS = {
    "query and key norms": {"qk_norm": True, "scale_attn_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
}


@pytest.fixture(params=[*SHAPES, *BLOCKS, "distilled"])
def model(request):
    if request.param == "distilled":
        return slim(distilled(), [16, 12, 7, 3]).eval()
    return slimmed([16, 12, 7, 3], **{**SHAPES, **BLOCKS}[request.param])


def both(model, run):
    """What `run` gives without and with exact savings."""
    found = []
    for model.exact_savings in (False, True):
        found.append(run())
    return found


@torch.no_grad()
@pytest.mark.parametrize("dead", ["discard", "heir"])
@pytest.mark.parametrize("mode", ["none", "soft", "hard", "mask"])
def test_the_logits_stay(model, mode, dead):
    model.mode, model.dead = mode, dead
    x = images(model, 3)
    plain, narrow = both(model, lambda: model(x))
    torch.testing.assert_close(narrow, plain, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_the_cost_formula_counts_it_exactly(model):
    x = images(model, 1)
    for mode, counts, life_layer in (("none", None, None), ("hard", model.patches_per_layer, 1)):
        model.mode = mode
        architecture = model.architecture()
        plain, narrow = (cost for cost, _ in both(model, lambda: counted(lambda: model(x))))
        assert plain - narrow == architecture.exact_savings(counts, life_layer)
        if mode == "hard":
            assert narrow < plain
            assert model.multiply_adds() == architecture.multiply_adds(counts) - (plain - narrow)


def test_deit_small_costs_what_the_documentation_says():
    model = slim(build_model("deit_small_patch16_224", False, {}), 0.7)
    architecture = model.architecture()
    assert (architecture.multiply_adds() - architecture.exact_savings()) / 1e9 == pytest.approx(4.280, abs=6e-4)
    assert model.multiply_adds() / 1e9 == pytest.approx(3.148, abs=6e-4)
    model.exact_savings = True
    assert model.multiply_adds() / 1e9 == pytest.approx(2.935, abs=6e-4)
    # heirs take over in the block that patches leave after whether one asks for it or not: only the last block is left
    model.dead = "heir"
    heirs = model.multiply_adds()
    model.exact_savings = False
    assert model.multiply_adds() - heirs == architecture.exact_savings(model.patches_per_layer)
    assert heirs / 1e9 == pytest.approx(2.935 + 0.005 + 0.005, abs=6e-4)  # comparing patches, and adding them


@pytest.mark.parametrize("keep_rate", [0.9, 0.8, 0.7, 0.5])
def test_the_documentations_table_is_the_formulas(keep_rate):
    model = slim(build_model("deit_small_patch16_224", False, {}), keep_rate)
    plain = model.multiply_adds() / 1e9
    model.exact_savings = True
    row = f"| keep rate {keep_rate} | {plain:.3f} | {model.multiply_adds() / 1e9:.3f} |"
    assert row in (Path(__file__).parent.parent / "docs" / "speed.md").read_text()


@torch.no_grad()
def test_a_token_that_nothing_reads_has_no_query(monkeypatch):
    model = slimmed([16, 12, 7, 3])
    model.exact_savings = True
    seen = []
    narrow = model.backbone.narrow_block
    monkeypatch.setattr(
        model.backbone,
        "narrow_block",
        lambda layer, tokens, positions, keep, bias=None: (
            seen.append((layer, tokens.shape[1], keep)) or narrow(layer, tokens, positions, keep, bias)
        ),
    )
    model(images(model))
    # block 1 is the life layer: who leaves after it is known only when it has run
    assert seen == [(2, 13, 8), (3, 8, 4), (4, 4, 1)]


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_gradients_stay(mode):
    model = slimmed([16, 12, 7, 3], qk_norm=True, init_values=0.1).train()
    model.mode = mode
    x = images(model)
    wanted, found = (copy.deepcopy(model) for _ in range(2))
    found.exact_savings = True
    saving = copy.deepcopy(found)
    saving.grad_checkpointing = True
    for one in (wanted, found, saving):
        one(x).square().sum().backward()
    for name, parameter in wanted.named_parameters():
        for other in (found, saving):
            gradient = dict(other.named_parameters())[name].grad
            if parameter.grad is None:
                assert gradient is None, name
            else:
                torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("dead", ["discard", "heir"])
def test_it_runs_under_autocast_in_one_graph_and_exported(dead):
    model = slimmed([16, 12, 7, 3])
    model.dead, model.exact_savings = dead, True
    x = images(model)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.bfloat16
    model.exact_savings = False
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(low, model(x), atol=0.05 * float(expected.abs().max()), rtol=0)
    model.exact_savings = True
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
def test_a_narrow_block_is_the_block_cut_off(biased):
    """On tokens that lie apart in memory, for any number kept, with and without a bias per key."""
    backbone = slimmed(qk_norm=True).backbone
    tokens = torch.randn(3, 29, 64)[:, ::2, ::2]
    bias = torch.randn(3, 15) if biased else None
    for keep in (1, 8, 15):
        narrow = backbone.narrow_block(2, tokens, None, keep, bias)
        torch.testing.assert_close(narrow, Backbone.narrow_block(backbone, 2, tokens, None, keep, bias))


@torch.no_grad()
@pytest.mark.parametrize("unknown", ["a hook", "an attention of somebody's own", "unfused attention"])
def test_an_unusual_block_runs_whole(unknown):
    model = slimmed([16, 12, 7, 3])
    x = images(model)
    attention = model.model.blocks[3].attn
    called = []
    if unknown == "a hook":
        attention.register_forward_hook(lambda *_: called.append(1))
    elif unknown == "unfused attention":
        attention.fused_attn = False
    else:

        class Own(type(attention)):
            def forward(self, *args, **kwargs):
                called.append(1)
                return 2 * super().forward(*args, **kwargs)

        attention.__class__ = Own
    plain, narrow = both(model, lambda: model(x))
    torch.testing.assert_close(narrow, plain, atol=1e-5, rtol=1e-5)
    assert len(called) == (0 if unknown == "unfused attention" else 2)


def test_it_is_saved_and_loaded(tmp_path):
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
    model = slim(build_model("vit_tiny_patch16_224", False, args), 0.5)
    for wanted in (False, True):
        model.exact_savings = wanted
        save_model(tmp_path, model, {"model": {"name": "vit_tiny_patch16_224", "args": args}})
        assert load(tmp_path).exact_savings is wanted


def test_profile_shows_it_as_rows_of_its_own(slim, tiny_recipe):
    words = ("profile", tiny_recipe, "--dead", "discard", "--keep-rate", "0.5", "--seconds", "0", "--batch-size", "2")
    found = document(slim(*words, "--exact-savings", "--per-layer", "--json"))
    rows = found["rows"]
    assert [(row["dense"], row["exact_savings"]) for row in rows] == [
        (True, False),
        (False, False),
        (True, True),
        (False, True),
    ]
    assert rows[2]["gmacs"] < rows[0]["gmacs"]
    assert rows[3]["gmacs"] < rows[1]["gmacs"]
    # the saving is the last block's and that of the blocks after which patches leave
    layers = [[layer["gmacs"] for layer in table["layers"]] for table in found["per_layer"]]
    assert [a == b for a, b in zip(layers[0], layers[2], strict=True)] == [True, True, True, False]
    assert [a == b for a, b in zip(layers[1], layers[3], strict=True)] == [True, False, False, False]
    plain = slim(*words, "--exact-savings").stdout
    assert "dense exact" in plain
    assert "0.5 exact" in plain
    assert "exact" not in slim(*words).stdout


def test_a_recipe_asks_for_it_and_the_dense_row_stays_plain(slim, tiny_recipe):
    words = ("profile", tiny_recipe, "--seconds", "0", "--batch-size", "2", "--json")
    plain = document(slim(*words))["rows"]
    rows = document(slim(*words, "--set", "slimming.exact_savings=true"))["rows"]
    assert rows[0]["gmacs"] == plain[0]["gmacs"]
    assert not rows[0]["exact_savings"]
    assert rows[1]["exact_savings"]
    assert rows[1]["gmacs"] < plain[1]["gmacs"]
