"""open_clip's towers drop patches, learn from their dense selves without labels, and classify by texts."""

import json
import re

import open_clip
import pytest
import slimcli
import torch
from PIL import Image

from slim_openclip.tower import SMALL, build_model, small_models

TOWERS = small_models()
VISION = "{ image_size = 32, patch_size = 8, layers = 3, width = 64, head_width = 32 }"
TEXT = "{ context_length = 16, vocab_size = 49408, width = 16, heads = 2, layers = 1 }"
RECIPE = """
name = "clip"
[model]
name = "openclip:custom"
[model.args]
embed_dim = 16
vision_cfg = %s
text_cfg = %s
%s
[data]
%s
batch_size = 16
train_limit = 64
val_limit = 32
[slimming]
life_layer = 1
drop_layers = [1, 2]
keep_rate = 0.5
dead = "discard"
[[stages]]
learns = "life"
mode = "soft"
loss = "cosine"
lr = 1e-2
[[stages]]
learns = "backbone"
mode = "soft"
loss = "cosine"
epochs = 4
lr = 2e-3
[augmentation]
enabled = false
"""


def trained(slim, tmp_path, data, texts=""):
    (tmp_path / "recipe.toml").write_text(RECIPE % (VISION, TEXT, texts, data))
    done = slim("train", "recipe.toml", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_passes_the_conformance_kit(name):
    assert [check for check in slimcli.check_backbone(TOWERS[name]()) if not check.passed] == []


def test_a_tower_is_replaced_inside_a_clip_model():
    torch.manual_seed(0)
    clip = open_clip.CLIP(**SMALL).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = clip.encode_image(images)
        clip.visual = slimcli.slim(clip.visual, keep_rate=1.0, life_layer=1, drop_layers=[1]).eval()
        torch.testing.assert_close(clip.encode_image(images), expected)
        clip.visual.keep_rate = 0.5
        assert (clip.encode_image(images) - expected).abs().max() > 1e-4


def test_logits_are_the_scaled_cosine_to_the_class_texts():
    torch.manual_seed(0)
    clip = open_clip.CLIP(**SMALL).eval()
    from slim_openclip.tower import ImageTower, class_embeddings

    texts = class_embeddings(clip, open_clip.SimpleTokenizer(), ["a cat", ["a dog", "a hound"]])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = ImageTower(clip.visual, texts, clip.logit_scale.exp())(images)
        image = torch.nn.functional.normalize(clip.encode_image(images), dim=-1)
        cat = clip.encode_text(open_clip.SimpleTokenizer()(["a cat"], context_length=16), normalize=True)
        torch.testing.assert_close(logits[:, :1], clip.logit_scale.exp() * image @ cat.t())


def test_a_whole_clip_model_and_a_convolutional_tower_are_refused_with_what_to_do():
    clip = open_clip.CLIP(**SMALL)
    with pytest.raises(slimcli.SlimError, match=r"model.visual = slimcli.slim\(model.visual\)"):
        slimcli.slim(clip)
    resnet = open_clip.CLIP(16, {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}, SMALL["text_cfg"])
    with pytest.raises(slimcli.SlimError, match="ModifiedResNet cannot be slimmed"):
        slimcli.slim(resnet.visual)


def test_training_on_the_cosine_needs_no_labels_and_brings_the_embedding_nearer(slim, tmp_path):
    for split, count in (("train", 64), ("validation", 32)):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i in range(count):
            generator = torch.Generator().manual_seed(i)
            noise = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=generator), size=32)[0]
            pixels = (255 * noise).to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / "photos" / split / f"{i}.png")
    summary = trained(slim, tmp_path, 'root = "photos"')
    dense, slimmed = summary["rows"]
    assert "top1" not in dense
    assert dense["similarity"] > 0.9
    rows = [json.loads(line) for line in (tmp_path / summary["run"] / "metrics.jsonl").read_text().splitlines()]
    epochs = [row["val_similarity"] for row in rows if row["event"] == "epoch"]
    assert epochs[-1] > epochs[0], "the backbone learns to look like its dense self"
    shown = slim("eval", summary["run"], "--json")
    assert json.loads(shown.stdout)["rows"][1]["similarity"] == pytest.approx(slimmed["similarity"], abs=1e-4)


def test_eval_reports_the_cosine_and_zero_shot_top1_with_class_texts(slim, tmp_path):
    texts = f"class_texts = {json.dumps([f'the digit {i}' for i in range(10)])}"
    summary = trained(slim, tmp_path, 'name = "digits"', texts)
    shown = slim("eval", summary["run"], "--keep-rate", "0.9,0.3")
    assert shown.returncode == 0, shown.stderr
    # a figure, and after ± its standard error
    cells = [re.split(r"  +", line) for line in shown.stdout.splitlines()]
    lines = {name: [cell.split(" ")[0] for cell in figures] for name, *figures in cells}
    cosine = [float(value) for value in lines["Cosine with dense"]]
    assert cosine[0] == 1.0 and cosine[0] > cosine[1] > cosine[2]
    assert all(0 <= float(value) <= 100 for value in lines["Top-1 (%)"])


def test_calibration_without_a_classifier_agrees_by_the_cosine(slim, tmp_path):
    recipe = RECIPE % (VISION, TEXT, "", 'name = "digits"')
    (tmp_path / "recipe.toml").write_text(recipe)
    done = slim("calibrate", "recipe.toml", "--images", "32", "--limit", "32", "--output", "slimmed")
    assert done.returncode == 0, done.stderr
    assert "top-1" not in done.stdout.lower()
    assert 'loss = "cosine"' in (tmp_path / "slimmed" / "recipe.toml").read_text()


def test_a_stage_by_labels_without_class_texts_says_what_is_missing(slim, tmp_path):
    (tmp_path / "recipe.toml").write_text(
        RECIPE.replace('"cosine"', '"labels"') % (VISION, TEXT, "", 'name = "digits"')
    )
    done = slim("train", "recipe.toml")
    assert done.returncode == 2
    assert "or train with loss = 'cosine'" in done.stderr


def test_a_name_that_open_clip_does_not_know_is_refused():
    with pytest.raises(slimcli.SlimError, match="open_clip has no such model"):
        build_model("ViT-Q-1", False, {})
