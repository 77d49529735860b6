"""timm's families: each passes the conformance kit, keeps what is special to it, or is refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from conftest import families, tiny_vit

import slimcli
from slimcli.backbones import likeness
from slimcli.backbones.base import Backbone
from slimcli.backbones.timm_families import VARIANTS, small_models
from slimcli.conformance import CHECKS, awake, run_check
from slimcli.errors import SlimError
from slimcli.plugins import build_model, find_backbone

DOCS = Path(__file__).parent.parent / "docs" / "backbones.md"


#: the check that takes longest: one of the families with the same kinds of modules is traced
TRACED = "no graph break and no host sync"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_passes_the_conformance_kit(name):
    checks = [check for check in CHECKS if check != TRACED or name in families()]
    model = small_models()[name]()
    outcomes = [run_check(check, model, plugin="timm") for check in checks]
    assert [outcome.name for outcome in outcomes] == checks
    assert [outcome for outcome in outcomes if not outcome.passed] == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "fixed windows"),
        ("pvt_v2_b0", "downsampled grid of keys"),
        ("hiera_tiny_224", "merges patches"),
        ("mvitv2_tiny", "pools queries and keys"),
        ("coatnet_0_224", "windows and grids|convolutions"),
        ("levit_128s", "downsamples"),
        ("resnet18", "no patches that could be dropped"),
        ("convnext_atto", "no patches that could be dropped"),
        ("samvit_base_patch16", "fixed windows"),
        ("vit_tiny_r_s16_p8_224", "a convolutional network computes its patches"),
        ("mixer_s32_224", "weights fixed to their places"),
        ("xcit_nano_12_p16_224", "attends over channels"),
    ],
)
def test_models_that_cannot_drop_patches_are_refused_by_name_with_the_reason(name, reason):
    model = timm.create_model(name)
    with pytest.raises(SlimError, match=f"^{type(model).__name__} cannot be slimmed: .*({reason})"):
        slimcli.slim(model)


def test_the_documentation_has_a_row_for_every_family_that_is_served():
    # the two tables of timm's
    text = DOCS.read_text().partition("## From other libraries")[0]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    documented = " ".join(rows)
    for name in VARIANTS:
        assert f"`{name}`" in documented, name
    assert all(re.search(r"\| (works|refused)", row) for row in rows)


def test_relative_positions_of_the_survivors_are_the_right_ones():
    """BEiT on survivors by hand: the bias of every pair, looked up by where the two patches were."""
    model = awake(small_models()["beit_base_patch16_224"]())
    backbone = find_backbone(model)
    tokens, places = backbone.embed(torch.randn(1, 3, 64, 64))
    kept = torch.tensor([[13, 2, 7, 8, 1]])
    survivors = torch.cat((tokens[:, :1], tokens[:, 1:][:, kept[0]]), dim=1)
    block = model.blocks[0]
    where = torch.cat((torch.tensor([0]), kept[0] + 1))
    bias = block.attn.relative_position_bias_table[block.attn.relative_position_index[where][:, where]].permute(2, 0, 1)
    x = block.norm1(survivors)
    qkv_bias = torch.cat((block.attn.q_bias, block.attn.k_bias, block.attn.v_bias))
    qkv = torch.nn.functional.linear(x, block.attn.qkv.weight, qkv_bias)
    query, key, value = qkv.reshape(1, 6, 3, 2, 16).permute(2, 0, 3, 1, 4)
    attended = ((query @ key.transpose(-2, -1)) / 4 + bias).softmax(-1) @ value
    x = survivors + block.gamma_1 * block.attn.proj(attended.transpose(1, 2).reshape(1, 6, 32))
    expected = x + block.gamma_2 * block.mlp(block.norm2(x))
    found = backbone.block(1, survivors, places[:, kept[0]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    # the first five places instead would be another bias
    assert (backbone.block(1, survivors, places[:, :5]) - expected).abs().max() > 1e-3


def test_rotary_embeddings_move_with_their_patches():
    model = awake(small_models()["vit_small_patch16_dinov3"]())
    slim = slimcli.slim(model, keep_rate=0.5, life_layer=1, drop_layers=[1]).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        hard = slim(images)
        slim.mode = "mask"
        torch.testing.assert_close(hard, slim(images), atol=1e-5, rtol=1e-4)
        slim.mode = "hard"
        # if patches left their positions behind, the first ones would be taken: other logits
        first, run = slim.backbone.embed(images)[1], slim.backbone.block
        slim.backbone.block = lambda layer, x, p: run(layer, x, first[:, : p.shape[1]])
        assert (slim(images) - hard).abs().max() > 1e-3


def test_a_model_with_its_own_forward_is_not_mistaken_for_its_parent():
    from timm.models.vision_transformer import VisionTransformer

    class Own(VisionTransformer):
        def forward_features(self, x):
            return super().forward_features(x).flip(1)

    with pytest.raises(SlimError, match="runs its blocks in its own way"):
        slimcli.slim(Own(img_size=32, patch_size=16, embed_dim=16, depth=3, num_heads=1))


def test_naflex_is_built_for_the_size_that_is_asked_for():
    model = build_model("naflexvit_base_patch16_gap", img_size=(64, 96), embed_dim=32, depth=2, num_heads=2)
    backbone = find_backbone(model)
    assert (backbone.image_size, backbone.grid_size) == ((64, 96), (4, 6))


def test_the_cost_that_is_read_off_the_model_is_the_papers():
    architecture = find_backbone(timm.create_model("deit_small_patch16_224")).architecture()
    assert round(architecture.multiply_adds() / 1e9, 3) == 4.599
    assert architecture.block_weights == (12 * 384**2,) * 12
    assert (architecture.attention_dim, architecture.head_fixed) == (384, 384_000)


def test_a_life_layer_of_the_backbones_own_is_the_default(monkeypatch):
    from slimcli.backbones.timm_vit import TimmViT

    monkeypatch.setattr(TimmViT, "life_layer", property(lambda self: 2))
    monkeypatch.setattr(TimmViT, "drop_layers", lambda self, life_layer: (life_layer,))
    slim = slimcli.slim(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4), keep_rate=0.5)
    assert (slim.schedule.life_layer, slim.schedule.drops) == (2, ((2, 0.5),))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "cait_xxs24_224", "eva02_tiny_patch14_224"])
def test_heirs_work_where_positions_travel_and_heads_talk(name):
    model = awake(small_models()[name]())
    slim = slimcli.slim(model, keep_rate=0.4, life_layer=1, drop_layers=[1, 2], dead="heir").eval()
    images = torch.randn(3, 3, *slim.backbone.image_size)
    with torch.no_grad():
        whole = slim(images)
        alone = torch.cat([slim(image[None]) for image in images])
        torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-4)
        slim.dead = "discard"
        assert (slim(images) - whole).abs().max() > 1e-3


def test_where_all_patches_are_dead_a_pooling_reads_what_lives_longest_or_the_prefix():
    """The limit of soft weights and the threshold rule, with and without prefix tokens beside the patches."""
    for name in ("vit_pe_core_tiny_patch16_384", "vit_base_patch16_siglip_224", "vit_medium_patch16_reg4_gap_256"):
        model = awake(small_models()[name]())
        slim = slimcli.slim(model, keep_rate=0.2, life_layer=1, drop_layers=[1], temperature=1e7).eval()
        # lives around 1.4 +- 0.8: in many images no patch lives to the third and last block
        images = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            slim.mode = "threshold"
            threshold = slim(images)
            assert (slim.life.amax(dim=1) < 3).any()
            slim.mode = "soft"
            torch.testing.assert_close(slim(images), threshold, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("told", [True, False])
def test_images_of_other_channels_are_known_also_where_timm_does_not_say_so(told):
    model = tiny_vit(in_chans=2)
    if not told:
        model.__dict__.pop("in_chans", None)
    slim = slimcli.slim(model, 0.5)
    assert slim.backbone.preprocessing()["input_size"] == (2, 32, 32)
    assert slim(torch.randn(1, 2, 32, 32)).shape == (1, 10)


def test_a_module_of_timms_without_a_filter_takes_weights_as_they_are(monkeypatch):
    model = tiny_vit()
    monkeypatch.delattr(timm.models.vision_transformer, "checkpoint_filter_fn")
    assert find_backbone(model).adapt_weights(model.state_dict()).keys() == model.state_dict().keys()


def test_models_that_are_built_alike_are_counted_once_and_others_for_themselves(monkeypatch):
    monkeypatch.setattr(likeness, "_FOUND", {})

    def key(**changes):
        return likeness.likeness(find_backbone(tiny_vit(**changes)))

    assert key() is not None and key() == key()
    others = [{"num_heads": 4}, {"depth": 3}, {"num_classes": 9}, {"global_pool": "avg"}, {"qk_norm": True}]
    assert len({key(), *(key(**changes) for changes in others)}) == 1 + len(others)
    # a hook may compute anything, and so may an attribute that nobody knows
    hooked, odd = tiny_vit(), tiny_vit()
    hooked.blocks[0].register_forward_hook(lambda *_: None)
    odd.blocks[0].strange = object()
    assert likeness.likeness(find_backbone(hooked)) is likeness.likeness(find_backbone(odd)) is None

    count, counts = Backbone._count, []
    monkeypatch.setattr(Backbone, "_count", lambda self: counts.append(1) or count(self))
    first, second = (find_backbone(tiny_vit()).architecture() for _ in range(2))
    assert first == second and counts == [1]
    other = find_backbone(tiny_vit(mlp_ratio=2.0)).architecture()
    assert other.block_weights != first.block_weights and counts == [1, 1]
