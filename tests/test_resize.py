"""The method `resize`: the same model on a smaller image, at the cost that a keep rate stands for."""

from collections import Counter

import pytest
import torch
from conftest import document, tiny_vit
from timm.layers import resample_abs_pos_embed

import slimcli
from slimcli.backbones.counting import counted
from slimcli.backbones.timm_families import small_models
from slimcli.calibration.smaller import SmallerImage, smaller_images
from slimcli.errors import SlimError
from slimcli.measure import evaluation
from slimcli.methods.resize import smaller
from slimcli.slimming import rival

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def made(**changes):
    """The method on a tiny model of 4 x 4 patches, at keep rate 0.5."""
    return rival("resize", slimcli.slim(tiny_vit(**changes), 0.5)).eval()


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 2, "no_embed_class": True}, {"dynamic_img_size": True}])
def test_it_is_the_model_built_for_the_smaller_image(changes):
    model = made(**changes)
    height, width = size = model.image_size_of(model.schedule)
    assert (height, width) != (32, 32) and height % 8 == width % 8 == 0
    other = tiny_vit(**changes, img_size=size)
    state = model.model.state_dict()
    prefix = 0 if "reg_tokens" in changes else 1
    grid = [height // 8, width // 8]
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, [4, 4], num_prefix_tokens=prefix)
    other.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), other(smaller(IMAGES, size)))
        model.mode = "none"
        torch.testing.assert_close(model(IMAGES), model.model(IMAGES))


def test_it_costs_at_most_what_the_keep_rate_stands_for_and_what_really_runs():
    model = made()
    found = Counter()
    for rate in (1.0, 0.9, 0.7, 0.5, 0.3, 0.1):
        model.keep_rate = rate
        assert model.multiply_adds() <= model.usual_cost(rate)
        assert len(set(model.patches_used(model.schedule))) == 1
        found[model.patches_used(model.schedule)[0]] += 1
        with torch.no_grad():
            assert counted(lambda: model(IMAGES[:1]))[0] == model.multiply_adds()
    assert len(found) >= 4, "rows and columns may differ by one, so that more costs can be met"
    with pytest.raises(SlimError, match="resize cannot cost as little"):
        model.schedule_for_cost(1.0)


def test_it_learns_all_of_the_models_own_position_embedding_and_is_saved_as_any_method(tmp_path, slim, tiny_recipe):
    words = ["compare", tiny_recipe, "--methods", "resize", "--keep-rate", "0.5", "--train", "--json"]
    row = document(slim(*words))["rows"][-1]
    assert row["title"] == "resize" and row["setting"]["patches_per_layer"][0] == 16
    model = slimcli.load(tmp_path / row["run"])
    assert model.method == "resize" and model.patches_used(model.schedule) == tuple(row["schedule"])
    assert model.model.pos_embed.shape[1] == 17
    model.train()
    model(IMAGES).sum().backward()
    assert (model.model.pos_embed.grad.abs().sum(dim=-1) > 0).all()


def test_it_is_measured_beside_the_others_without_data(slim):
    found = document(
        slim("profile", "digits_vit", "--against", "resize", "--keep-rate", "0.5", "--seconds", 0, "--json")
    )
    _dense, life, resize = found["rows"]
    assert (resize["method"], resize["keep_rate"]) == ("resize", 0.5)
    assert 0.7 * life["gmacs"] < resize["gmacs"] <= 1.01 * life["gmacs"]


def test_a_calibration_says_where_a_smaller_image_does_as_well(slim):
    words = ["calibrate", "paper-digits", "--keep-rate", "1.0,0.7", "--images", 48, "--limit", 24, "--batch-size", 8]
    result = slim(*words, "-o", "out", "--json")
    (found,) = document(result)["smaller_images"]
    assert found["keep_rate"] == 0.7 and found["gmacs"] <= found["slim_gmacs"]
    # digits of 32 px lose more than slim does: nothing is said
    assert found["apart"] > found["slim_apart"] and "a smaller image" not in result.stderr
    better = SmallerImage(0.3, (140, 154), 2.5, 2.67, 0.06, 0.07)
    assert "keep rate 0.3: a smaller image does as well: at 140 x 154 px (2.5 G)" in better.note


def test_a_smaller_image_is_as_far_from_dense_as_the_method_resize_measures():
    model = slimcli.slim(tiny_vit(), 0.5)
    batches = [(IMAGES, torch.zeros(3, dtype=torch.long))]
    found = {
        each.keep_rate: each for each in smaller_images(model, batches, [1.0, 0.7, 0.4], IMAGES.device, IMAGES.dtype)
    }
    assert set(found) == {0.7, 0.4}
    other = rival("resize", model).eval()
    other.schedule = other.schedule_for_cost(model.multiply_adds(model.at_keep_rate(0.4)))
    (row,) = evaluation.evaluate(other, batches, None, IMAGES.device)[1:]
    assert found[0.4].apart == pytest.approx(row.logit_error, abs=1e-4)
    # a model whose images have one size
    beit = slimcli.slim(small_models()["beit_base_patch16_224"](), 0.5)
    assert smaller_images(beit, batches, [0.5], IMAGES.device, IMAGES.dtype) == []


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_small_patch16_dinov3", "naflexvit_base_patch16_gap"])
def test_families_that_timm_can_resize(name):
    backbone = slimcli.slim(small_models()[name](), 0.5).backbone
    assert backbone.resizes
    with torch.no_grad():
        tokens, _ = backbone.embed_resized(torch.randn(1, 3, 48, 32))
    assert tokens.shape[1] == 6 + backbone.num_prefix_tokens


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "cait_xxs24_224", "vit_relpos_small_patch16_224"])
def test_others_are_refused_in_one_line(name):
    with pytest.raises(SlimError, match=r"resize cannot run \w+: it cannot be given images of another size"):
        slimcli.slim(small_models()[name](), 0.5, method="resize")


def test_patches_that_leave_block_by_block_stand_for_their_cost():
    life = slimcli.slim(tiny_vit(), (16, 12, 9, 8))
    model = rival("resize", life)
    assert 0.7 * life.multiply_adds() < model.multiply_adds() <= life.multiply_adds()
    again = slimcli.slim(tiny_vit(), model.schedule.counts, method="resize")
    assert again.patches_used(again.schedule) == model.patches_used(model.schedule)
