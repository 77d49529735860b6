"""The slimmed model: the exactness properties that the method rests on."""

import copy

import pytest
import timm
import torch
from conftest import tiny_vit

from slimcli import SlimError, slim
from slimcli.life import LifeHead
from slimcli.store.model_folder import load, save_model

# prefix tokens 0, 1, 2 and 5; average, attention and token pooling; LayerScale; a grid that is not square
SHAPES = {
    "class token": {},
    "no prefix, average": {"class_token": False, "global_pool": "avg"},
    "no prefix, attention pool": {"class_token": False, "global_pool": "map"},
    "class token, average": {"global_pool": "avg"},
    "max pool": {"class_token": False, "global_pool": "avgmax"},
    "four registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-1},
    "not square": {"img_size": (24, 40)},
    "pre-norm": {"pre_norm": True},
}


def slimmed(keep_rate=0.5, **changes):
    model = slim(tiny_vit(**changes), keep_rate)
    for parameter in model.life_head.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


def images(model, batch=2):
    return torch.randn(batch, 3, *model.backbone.image_size, generator=torch.Generator().manual_seed(1))


def distilled():
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
    return timm.create_model("deit_tiny_distilled_patch16_224", **args).eval()


@pytest.fixture(params=[*SHAPES, "distilled"])
def model(request):
    if request.param == "distilled":
        return slim(distilled(), 0.5).eval()
    return slimmed(**SHAPES[request.param])


@torch.no_grad()
def test_keep_rate_one_returns_the_backbones_logits(model):
    x = images(model)
    model.keep_rate = 1.0
    for mode in ("hard", "soft"):
        model.mode = mode
        assert torch.equal(model(x), model.model(x))


@torch.no_grad()
def test_masking_equals_discarding(model):
    x = images(model)
    hard = model(x)
    model.mode = "mask"
    assert torch.allclose(model(x), hard, atol=1e-5)
    model.mode = "none"
    assert not torch.allclose(model(x), hard, atol=1e-3)


@torch.no_grad()
def test_soft_weights_tend_to_the_threshold_rule(model):
    x = images(model)
    model.mode, model.temperature = "soft", 1e5
    soft = model(x)
    model.mode = "threshold"
    assert torch.allclose(soft, model(x), atol=1e-4)


@torch.no_grad()
def test_a_permutation_of_the_patches_permutes_the_lives_and_keeps_the_logits(model, monkeypatch):
    x = images(model)
    logits, life = model(x), model.life
    prefix, count = model.backbone.num_prefix_tokens, model.num_patches
    order = torch.randperm(count)
    embed = model.backbone.embed

    def permuted(batch):
        tokens, positions = embed(batch)
        return torch.cat((tokens[:, :prefix], tokens[:, prefix:][:, order]), 1), positions

    monkeypatch.setattr(model.backbone, "embed", permuted)
    assert torch.allclose(model(x), logits, atol=1e-5)
    assert torch.allclose(model.life, life[:, order], atol=1e-4)


@torch.no_grad()
def test_each_block_sees_the_patches_of_the_schedule(model, monkeypatch):
    seen = []
    block = model.backbone.block
    monkeypatch.setattr(
        model.backbone,
        "block",
        lambda layer, tokens, *rest: seen.append(tokens.shape[1]) or block(layer, tokens, *rest),
    )
    model(images(model))
    assert seen == [n + model.backbone.num_prefix_tokens for n in model.patches_per_layer]


def test_lives_of_the_last_batch_can_be_read():
    model = slimmed()
    model(images(model, 3))
    assert model.life.shape == (3, 16)
    assert not model.life.requires_grad
    model.keep_rate = 1.0
    model(images(model))
    assert model.life is None


def test_keep_rate_and_moments_change_at_run_time():
    model = slimmed(0.9)
    model(images(model))
    spread = model.life.std(1, unbiased=False).mean()
    model.keep_rate = 0.5
    model(images(model))
    assert model.life.std(1, unbiased=False).mean() > spread
    assert model.keep_rate == 0.5
    model.keep_rate = [(1, 0.9), (3, 0.2)]
    assert model.patches_per_layer == (16, 15, 15, 3)
    assert model.keep_rate is None
    model.keep_rate = [16, 11, 7, 1]
    assert model.patches_per_layer == (16, 11, 7, 1)


@torch.no_grad()
def test_a_different_number_of_patches_after_every_block():
    model = slimmed()
    model.keep_rate = [16, 13, 8, 3]
    x = images(model)
    hard = model(x)
    model.mode = "mask"
    assert torch.allclose(model(x), hard, atol=1e-5)


@torch.no_grad()
def test_any_image_size_that_the_backbone_takes():
    model = slimmed(dynamic_img_size=True)
    x = torch.randn(2, 3, 48, 64)
    logits = model(x)
    assert logits.shape == (2, 10)
    assert model.life.shape == (2, 48)


@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch_size(batch):
    model = slimmed()
    assert model(images(model, batch)).shape == (batch, 10)


@torch.no_grad()
def test_an_images_logits_do_not_depend_on_its_neighbours():
    model = slimmed()
    x = images(model, 3)
    assert torch.allclose(model(x)[1:2], model(x[1:2]), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_dtype(dtype):
    model = slimmed().to(dtype)
    assert model(images(model).to(dtype)).dtype == dtype


def test_soft_mode_teaches_the_life_head_and_hard_mode_only_the_backbone():
    model = slimmed()
    model.mode = "soft"
    model(images(model)).square().sum().backward()
    gradients = [p.grad for p in model.life_head.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    model.zero_grad(set_to_none=True)
    model.mode = "hard"
    model(images(model)).square().sum().backward()
    assert all(p.grad is None for p in model.life_head.parameters())
    assert model.model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_gradient_checkpointing_changes_no_gradient():
    plain = slimmed()
    plain.mode = "soft"
    plain.train()
    saving = copy.deepcopy(plain)
    saving.grad_checkpointing = True
    for model in (plain, saving):
        model(images(model)).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_the_forward_pass_is_one_graph_with_static_shapes(mode):
    model = slimmed()
    model.mode = mode
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


@torch.no_grad()
def test_the_slimmed_model_can_be_exported():
    model = slimmed()
    x = images(model)
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), model(x), atol=1e-5)


def test_the_dense_model_is_left_as_it_was():
    dense = tiny_vit()
    x = torch.randn(2, 3, 32, 32)
    before, keys = dense(x), list(dense.state_dict())
    model = slim(dense, 0.5)
    model(x)
    assert type(dense) is timm.models.VisionTransformer
    assert list(dense.state_dict()) == keys
    assert torch.equal(dense(x), before)


def test_the_life_head_reads_the_class_token_or_the_mean():
    assert slimmed().life_head.global_token == "cls"
    assert slimmed(class_token=False, global_pool="avg").life_head.global_token == "mean"
    assert slimmed(class_token=False, reg_tokens=2, global_pool="avg").life_head.global_token == "mean"
    with pytest.raises(ValueError):
        LifeHead(8, "last")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "windows"),
        ("convnext_atto", "convolutional"),
        ("pit_ti_224", "pools"),
        ("samvit_base_patch16_224", "windows"),
        ("coatnet_0_rw_224", "convolutions"),
    ],
)
def test_a_family_that_cannot_drop_patches_is_refused_with_the_reason(name, reason):
    with pytest.raises(SlimError, match=reason):
        slim(timm.create_model(name))


def test_a_model_that_nobody_knows_is_refused():
    with pytest.raises(SlimError, match="no installed plugin knows"):
        slim(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("value", [0, 1.5, -0.1, True, "abc", [(1, 2.0)], [16, 20, 8, 4], [[1]]])
def test_an_impossible_keep_rate_is_refused_and_changes_nothing(value):
    model = slimmed(0.5)
    with pytest.raises(SlimError):
        model.keep_rate = value
    assert model.keep_rate == 0.5


@torch.no_grad()
def test_a_heir_equal_to_the_dead_patch_changes_nothing(monkeypatch):
    """A token that stands for two equal ones is two equal ones: the size bias is exact."""
    model = slimmed(0.5, class_token=False, global_pool="avg")
    model.dead = "heir"
    model.keep_rate = [(1, 0.5)]
    embed = model.backbone.embed

    def doubled(batch):
        tokens, positions = embed(batch)
        return torch.cat((tokens[:, :8], tokens[:, :8].flip(1)), 1), positions

    score = torch.linspace(4, 1, 16).expand(2, 16)
    monkeypatch.setattr(model.backbone, "embed", doubled)
    monkeypatch.setattr(model.life_head, "read", lambda tokens, *_: (score, tokens.float()))
    x = images(model)
    heir = model(x)
    model.mode = "none"
    assert torch.allclose(heir, model(x), atol=1e-5)
    model.mode, model.dead = "hard", "discard"
    model.keep_rate = [16, 8, 8, 4]
    discarded = model(x)
    model.dead = "heir"
    assert not torch.allclose(discarded, model(x), atol=1e-3)


@pytest.mark.parametrize("counts", [[16, 8, 8, 3], [16, 15, 9, 2], [16, 16, 16, 16]])
def test_heirs_run_in_one_graph_and_teach_the_backbone(counts):
    model = slimmed()
    model.dead = "heir"
    model.keep_rate = counts
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
        assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-5)
    model(x).square().sum().backward()
    assert model.model.patch_embed.proj.weight.grad.isfinite().all()


def test_what_becomes_of_the_dead_is_saved_and_checked(tmp_path):
    from slimcli import load
    from slimcli.store.model_folder import save_model

    model = slim(tiny_vit(), 0.5, dead="heir")
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
    save_model(tmp_path, model, {"model": {"name": "vit_tiny_patch16_224", "args": args}})
    assert load(tmp_path).dead == "heir"
    with pytest.raises(SlimError):
        model.dead = "buried"


def test_the_rule_and_what_the_head_compares_by_travel_with_a_saved_model(tmp_path):
    model = slim("digits_vit", 0.5, dead="heir")
    model.life_head.extend(8, 32)
    torch.nn.init.normal_(model.life_head.context.score.weight)
    model.redundancy = 10.0
    model.merge_importance, model.size_bias = 0.7, 0.5
    save_model(tmp_path, model, {"model": {"name": "digits_vit", "args": {}}})
    loaded = load(tmp_path)
    assert (loaded.life_head.similarity_dim, loaded.life_head.context_dim, loaded.redundancy) == (8, 32, 10.0)
    assert (loaded.merge_importance, loaded.size_bias) == (0.7, 0.5)
    x = images(loaded)
    with torch.no_grad():
        assert torch.allclose(loaded(x), model.eval()(x), atol=1e-5)
    assert loaded.multiply_adds() == model.multiply_adds() != slim("digits_vit", 0.5, dead="heir").multiply_adds()


def test_straight_mode_sees_what_hard_mode_sees_and_teaches_the_life_head():
    model = slimmed()
    x = images(model)
    with torch.no_grad():
        hard = model(x)
    model.mode = "straight"
    found = model(x)
    assert torch.allclose(found, hard, atol=5e-3)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.life_head.parameters())


@pytest.mark.parametrize("name", ["dead", "grouping", "restoring", "attention", "mode"])
def test_a_setting_that_is_a_word_refuses_an_unknown_one(name):
    model = slimmed([16, 12, 7, 3])
    known = getattr(model, name)
    with pytest.raises(SlimError, match=rf"^{name} = 'other' is not possible.*: expected one of .*{known}"):
        setattr(model, name, "other")
    assert getattr(model, name) == known
