"""A slimmed tower back in the model of open_clip's that it comes from."""

import open_clip
import pytest
import slimcli
import torch

from slim_openclip import as_openclip
from slim_openclip.tower import SMALL, small_models

TOWERS = {name: build for name, build in small_models().items() if name != "class token, zero-shot"}
HOW = [
    {},
    {"image_indices": [2, 0], "image_output_fmt": "NLC", "image_output_extra_tokens": True},
    {"image_indices": 2, "normalize_intermediates": True, "intermediates_only": True},
    {"image_indices": [0], "stop_early": True},
]


def tower(dense, keep_rate, patches="all", **how):
    torch.manual_seed(0)
    return as_openclip(slimcli.slim(dense, keep_rate, **how).eval(), patches=patches)


def images_for(clip):
    trunk = getattr(clip.visual, "trunk", None)
    height, width = clip.visual.image_size if trunk is None else trunk.patch_embed.img_size
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def clip_with(name):
    torch.manual_seed(0)
    clip = open_clip.CLIP(**SMALL).eval()
    clip.visual = TOWERS[name]().visual
    return clip


def same(found, expected):
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def ordered(output):
    return dict(sorted(output.items()))


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_that_keeps_all_patches_answers_every_call_as_its_dense_one(name):
    clip = clip_with(name)
    images, dense = images_for(clip), clip.visual
    pooled_apart = getattr(dense, "attn_pool", None) is not None
    for how in HOW:
        if pooled_apart and how.get("normalize_intermediates"):
            continue  # open_clip would apply the norm of what is pooled, of another width, to tokens
        clip.visual = dense
        expected = clip.forward_intermediates(images, **how)
        clip.visual = tower(dense, 1.0)
        same(ordered(clip.forward_intermediates(images, **how)), ordered(expected))
    embedding = dense(images)
    same(clip.encode_image(images), embedding)
    assert clip.visual.image_size == dense.image_size
    parameters = dict(clip.named_parameters())
    decay = {name for name in clip.no_weight_decay() if name.startswith("visual.")}
    assert not hasattr(dense, "no_weight_decay") or (decay and decay <= set(parameters))


@torch.no_grad()
@pytest.mark.parametrize("name", ["class token", "average pooling", "timm tower"])
def test_a_tower_that_drops_patches_gives_all_of_them_back_or_the_living_alone(name):
    clip = clip_with(name)
    images, dense = images_for(clip), clip.visual
    expected = clip.forward_intermediates(images)
    clip.visual = tower(dense, 0.5, dead="heir")
    found = clip.forward_intermediates(images)
    assert [y.shape for y in found["image_intermediates"]] == [y.shape for y in expected["image_intermediates"]]
    assert (found["image_features"] - expected["image_features"]).abs().max() > 1e-4
    same(found["image_features"], clip.encode_image(images, normalize=True))

    clip.visual = as_openclip(clip.visual.slimmed, patches="living")
    living = clip.forward_intermediates(images, image_output_fmt="NLC")
    places = living["image_positions"]
    assert places.shape == (2, clip.visual.slimmed.patches_per_layer[-1])
    for one, whole in zip(living["image_intermediates"], found["image_intermediates"], strict=True):
        patches = whole.flatten(2).transpose(1, 2)
        same(one, patches.gather(1, places.unsqueeze(-1).expand(-1, -1, patches.shape[2])))
    with pytest.raises(slimcli.SlimError, match=r"NCHW.*are no map, expected NLC"):
        clip.forward_intermediates(images)


@torch.no_grad()
@pytest.mark.parametrize("name", ["average pooling", "average pooling, norm after it", "attentional pooling"])
def test_what_pools_patches_sees_each_as_often_as_it_stands_for_some(name):
    slimmed = tower(TOWERS[name]().visual, 0.5, dead="heir").slimmed
    images = torch.randn(2, 3, *slimmed.backbone.image_size)
    embedding, (tokens,) = slimmed.logits_and_tokens(images, [slimmed.backbone.depth])
    same(embedding, slimmed.backbone.embedding(tokens))


@torch.no_grad()
@pytest.mark.parametrize("name", ["class token", "attentional pooling"])
def test_a_tower_that_is_asked_for_tokens_gives_them_too(name):
    """As CoCa asks, whose decoder reads them."""
    dense = TOWERS[name]().visual
    dense.output_tokens = True
    images = torch.randn(2, 3, 32, 32)
    expected = dense(images)
    same(tower(dense, 1.0)(images), expected)
    assert [part.shape for part in tower(dense, 0.5)(images)] == [part.shape for part in expected]


@torch.no_grad()
def test_a_zero_shot_run_goes_back_as_the_tower_that_it_is():
    run = slimcli.slim(small_models()["class token, zero-shot"](), 0.5).eval()
    images = torch.randn(2, 3, 32, 32)
    assert run(images).shape == (2, 3)
    found = as_openclip(run)
    same(found(images), run.embedding(images))
    same(found.forward_intermediates(images)["image_features"], found(images))


def test_what_cannot_be_is_said_in_one_line():
    dense = TOWERS["class token"]().visual
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(slimcli.SlimError, match=r"takes a slimmed tower of open_clip's.* not a VisionTransformer"):
        as_openclip(dense)
    with pytest.raises(slimcli.SlimError, match="expected all or living"):
        tower(dense, 0.5, patches="dead")
    with pytest.raises(slimcli.SlimError, match="expected NCHW or NLC"):
        tower(dense, 0.5).forward_intermediates(images, output_fmt="CHW")
    with pytest.raises(slimcli.SlimError, match="evo-vit does not say where its patches go"):
        tower(dense, 0.5, method="evo-vit").forward_intermediates(images)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = tower(dense, 0.5).no_such_thing
