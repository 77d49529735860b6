"""A slimmed model in the place of its dense model: the same calls, and patches in raster order."""

import pytest
import timm
import torch

import slimcli
from slimcli.backbones.timm_families import small_models
from slimcli.errors import SlimError
from slimcli.life.restore import Drop, restore, whereabouts
from slimcli.schedule import Schedule

MODELS = small_models()


def build(name, keep_rate=0.5, **settings):
    torch.manual_seed(0)
    return slimcli.slim(MODELS[name]().eval(), keep_rate, **settings).eval()


def images_for(model, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *model.backbone.preprocessing()["input_size"], generator=generator)


@pytest.fixture(scope="module")
def tiny():
    return build("vit_small_patch16_224", dead="heir")


def same(found, expected):
    if isinstance(expected, (tuple, list)):
        assert type(found) is type(expected) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_keeps_all_patches_answers_every_call_as_its_dense_model(name):
    model = build(name, 1.0)
    dense, images = model.model, images_for(model)
    features = dense.forward_features(images)
    same(model.forward_features(images), features)
    same(model.forward_head(features), dense.forward_head(features))
    same(model.forward_head(features, pre_logits=True), dense.forward_head(features, pre_logits=True))
    for how in (
        {},
        {"indices": [2, 0, 2], "output_fmt": "NLC"},
        {"indices": 1, "norm": True, "intermediates_only": True},
    ):
        same(model.forward_intermediates(images, **how), dense.forward_intermediates(images, **how))
    if hasattr(dense, "get_intermediate_layers"):
        how = {"n": 2, "reshape": True, "return_prefix_tokens": True, "norm": True}
        same(model.get_intermediate_layers(images, **how), dense.get_intermediate_layers(images, **how))
    assert model.num_classes == 5 and model.num_features == dense.num_features
    assert model.pretrained_cfg is dense.pretrained_cfg
    found, expected = model.get_classifier(), dense.get_classifier()  # two of a distilled model
    assert found == expected if isinstance(expected, tuple) else found is expected
    assert model.no_weight_decay() == {f"model.{name}" for name in dense.no_weight_decay()}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_drops_patches_gives_all_of_them_back_in_the_dense_shapes(name):
    model = build(name, 0.5)
    dense, images = model.model, images_for(model)
    expected = dense.forward_intermediates(images)
    found = model.forward_intermediates(images)
    assert found[0].shape == expected[0].shape and [y.shape for y in found[1]] == [y.shape for y in expected[1]]
    same(found[1][0], expected[1][0])  # no patch has left after the first block


@torch.no_grad()
@pytest.mark.parametrize(
    "method", ["tome", "pitome", "tofu", "atc", "evit", "evit-nofuse", "random", "dynamicvit", "ia-red2"]
)
def test_every_method_gives_the_patches_that_left_back(method):
    model = build("deit_small_patch16_224", 0.5, method=method)
    images = images_for(model)
    found = model.forward_features(images)
    assert found.shape == model.model.forward_features(images).shape
    living = model.patches.left_after == model.backbone.depth
    assert 0 < living.float().mean() < 1
    tokens, _ = model._tokens(images)
    # the living have the features of the pass itself
    places = model.patches.token + model.backbone.num_prefix_tokens
    expected = model.backbone.final_norm(tokens).gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
    same(found[:, model.backbone.num_prefix_tokens :][living], expected[living])


@torch.no_grad()
@pytest.mark.parametrize("dead", ["heir", "discard"])
def test_a_patch_that_left_keeps_its_own_feature_or_takes_that_of_its_heir(dead):
    model = build("vit_small_patch16_224", Schedule(3, 1, ((1, 0.5), (2, 0.5))).resolve(16), dead=dead)
    images = images_for(model)
    model.restoring = "own"
    own = model.forward_features(images)[:, 1:]
    gone = model.patches
    assert set(gone.left_after.unique().tolist()) == {1, 2, 3}
    dense_first = model.model.forward_intermediates(images, [0], output_fmt="NLC", intermediates_only=True)[0]
    early = gone.left_after == 1
    same(own[early], model.backbone.final_norm(dense_first)[early])
    if dead == "heir":
        model.restoring = "heir"
        heir = model.forward_features(images)[:, 1:]
        for image in range(2):
            for patch in range(16):
                stands = [p for p in range(16) if gone.token[image, p] == gone.token[image, patch]]
                (living,) = [p for p in stands if gone.left_after[image, p] == 3]
                same(heir[image, patch], heir[image, living])
        assert gone.weight.sum().item() == pytest.approx(2 * 4)


@pytest.mark.parametrize("method", ["diffrate", "evo-vit", "a-vit", "resize"])
def test_a_method_that_does_not_say_where_patches_go_gives_none_back(method):
    model = build("deit_small_patch16_224", 0.5, method=method)
    with pytest.raises(SlimError, match=f"{method} does not say where its patches go"):
        model.forward_features(images_for(model))


def test_patches_come_back_as_a_slow_rule_says():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(1, 6, 2, generator=generator), torch.randn(1, 4, 2, generator=generator)
    # of 0..5, [4, 1, 0, 5] stay in this order, 2 joins 4 and 3 joins 0; then [2, 0] of those stay, the others join
    drops = [
        Drop(1, first, torch.tensor([[4, 1, 0, 5]]), torch.tensor([[2, 1, 0, 2, 0, 3]])),
        Drop(2, second, torch.tensor([[2, 0]]), torch.tensor([[1, 0, 0, 1]])),
    ]
    final = torch.randn(1, 2, 2, generator=generator)
    where = whereabouts(drops, 1, 6, 3, final.device)
    assert where.token.tolist() == [[0, 0, 1, 0, 1, 1]]
    assert where.left_after.tolist() == [[3, 2, 1, 1, 3, 2]]
    same(where.weight, torch.full((1, 6), 1 / 3))
    same(restore(final, drops, 0, "heir"), final[:, [0, 0, 1, 0, 1, 1]])
    expected = torch.stack([final[0, 0], second[0, 1], first[0, 2], first[0, 3], final[0, 1], second[0, 3]])
    same(restore(final, drops, 0, "own")[0], expected)


@torch.no_grad()
def test_with_last_the_patches_that_left_run_the_last_block_again(tiny):
    images = images_for(tiny)
    tiny.restoring = "last"
    try:
        found = tiny.forward_features(images)
        tiny.restoring = "own"
        entering = tiny.forward_intermediates(images, [1], True, output_fmt="NLC", intermediates_only=True)[0]
    finally:
        tiny.restoring = None
    tokens = torch.cat((entering[1], entering[0]), dim=1)
    same(found, tiny.model.norm(tiny.model.blocks[2](tokens)))


@torch.no_grad()
def test_one_pass_gives_logits_and_the_tokens_of_all_or_of_the_living_patches(tiny):
    images = images_for(tiny)
    logits, (entering, first, last) = tiny.logits_and_tokens(images, [0, 1, 3])
    same(logits, tiny(images))
    same(entering, tiny.backbone.embed(images)[0])
    expected = tiny.forward_intermediates(images, [0, 2], True, output_fmt="NLC", intermediates_only=True)
    same([first, last], [torch.cat((prefix, patches), dim=1) for patches, prefix in expected])
    embedding, (living,) = tiny.logits_and_tokens(images, [3], "living", embedding=True)
    same(embedding, tiny.embedding(images))
    places = tiny.living_patches
    assert places.shape == (2, tiny.patches_per_layer[-1]) and (places.diff(dim=1) > 0).all()
    assert torch.equal((tiny.patches.left_after == 3).nonzero()[:, 1].reshape(2, -1), places)
    same(living[:, 1:], last[:, 1:].gather(1, places.unsqueeze(-1).expand(-1, -1, 32)))
    for wrong in ({"layers": [4]}, {"layers": [1], "patches": "dead"}):
        with pytest.raises(SlimError, match=r"blocks 1 to 3|expected one of all, living"):
            tiny.logits_and_tokens(images, **wrong)


@torch.no_grad()
def test_how_patches_come_back_changes_no_logits_of_who_stands_for_whom(tiny):
    """With "last", all patches run the last block, where somebody asks for their features alone."""
    images = images_for(tiny)
    tiny.restoring = "last"
    try:
        same(tiny.logits_and_stand_ins(images)[0], tiny(images))
        logits, (tokens,) = tiny.logits_and_tokens(images, [3])
        same(logits, tiny.backbone.head(tokens))
    finally:
        tiny.restoring = None


@torch.no_grad()
@pytest.mark.parametrize("how", [{"dead": "heir"}, {"method": "tome"}], ids=str)
@pytest.mark.parametrize("pool", ["avg", "map"])
def test_what_pools_patches_sees_each_as_often_as_it_stands_for_some(pool, how):
    """The dense head on all patches, those that left being what they are part of."""
    dense = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=5, global_pool=pool, class_token=False
    )
    torch.manual_seed(0)
    model = slimcli.slim(dense.eval(), 0.5, **how).eval()
    images = images_for(model)
    same(model(images), model.forward_head(model.forward_features(images)))


@torch.no_grad()
def test_stopping_early_leaves_later_blocks_out_and_changes_nothing(tiny):
    images = images_for(tiny)
    ran = []
    hook = tiny.model.blocks[2].register_forward_hook(lambda *_: ran.append(1))
    try:
        found = tiny.forward_intermediates(images, [0, 1], stop_early=True, intermediates_only=True)
        assert not ran
        same(found, tiny.forward_intermediates(images, [0, 1], intermediates_only=True))
    finally:
        hook.remove()


def test_a_call_for_features_leaves_none_behind(tiny):
    tiny.forward_features(images_for(tiny))
    held = [
        value for drop in tiny._last_trail.drops for value in (drop.patches, drop.stay, drop.into) if value is not None
    ]
    assert all(not value.is_floating_point() or value.numel() == 0 for value in held)
    assert tiny.patches.left_after.min() < 3
    tiny.restoring = "own"
    assert tiny.with_schedule(tiny.schedule).restoring == "own"
    tiny.restoring = None


def test_what_cannot_be_is_said_in_one_line(tiny):
    images = images_for(tiny)
    with pytest.raises(SlimError, match=r"indices = .*blocks 0 to 2"):
        tiny.forward_intermediates(images, [3])
    with pytest.raises(SlimError, match=r"output_fmt = .CHW.*expected one of NCHW, NLC"):
        tiny.forward_intermediates(images, output_fmt="CHW")
    with pytest.raises(SlimError, match="expected one of heir, own, mix, last"):
        tiny.restoring = "back"
    with pytest.raises(SlimError, match="needs heirs"):
        build("vit_small_patch16_224").restoring = "heir"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = tiny.no_such_thing


def test_the_classifier_and_the_image_size_can_be_changed_as_the_dense_models():
    model = build("vit_small_patch16_224", 0.5)
    model.reset_classifier(7)
    model.set_input_size(img_size=(96, 64))
    assert model(torch.zeros(1, 3, 96, 64)).shape == (1, 7) and model.num_patches == 24
    features = model.forward_intermediates(torch.zeros(1, 3, 96, 64), 1, intermediates_only=True)[0]
    assert features.shape == (1, 32, 6, 4)


def test_timm_groups_and_decays_a_slimmed_models_parameters_as_the_dense_models():
    from timm.optim import param_groups_layer_decay

    model = build("vit_small_patch16_224")
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert scale["model.patch_embed.proj.weight"] < scale["model.blocks.0.mlp.fc1.weight"]
    assert scale["model.blocks.0.mlp.fc1.weight"] < scale["model.blocks.2.mlp.fc1.weight"] <= scale["model.head.weight"]
    assert decay["model.pos_embed"] == 0 and decay["model.blocks.0.mlp.fc1.weight"] == 0.05
