"""transformers' models drop patches, keep their calling convention, and equal timm's on the real weights."""

import json
from pathlib import Path

import pytest
import slimcli
import torch
import transformers
from PIL import Image

from slim_transformers.build import small_models

SHARED = Path(__file__).parents[4] / "shared"
SMALL = small_models()


@pytest.mark.parametrize("name", SMALL)
def test_every_model_passes_the_conformance_kit(name):
    assert [check for check in slimcli.check_backbone(SMALL[name]()) if not check.passed] == []


@pytest.mark.parametrize("name", SMALL)
def test_the_output_is_what_the_dense_model_returns(name):
    dense = SMALL[name]()
    images = torch.randn(2, 3, 32, 32)
    slimmed = slimcli.slim(dense, keep_rate=1.0, life_layer=1, drop_layers=[1]).eval()
    with torch.no_grad():
        expected, found = dense(pixel_values=images), slimmed(pixel_values=images)
    assert type(found) is type(expected)
    field = next(key for key in ("logits", "image_embeds", "pooler_output") if key in expected)
    torch.testing.assert_close(found[field], expected[field])
    torch.testing.assert_close(slimmed(images)[field], expected[field])


def test_labels_give_the_loss_and_return_dict_a_tuple():
    dense = SMALL["ViTForImageClassification"]()
    slimmed = slimcli.slim(dense, keep_rate=1.0, life_layer=1, drop_layers=[1]).eval()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 3])
    torch.testing.assert_close(slimmed(images, labels=labels).loss, dense(images, labels=labels).loss)
    loss, logits = slimmed(pixel_values=images, labels=labels, return_dict=False)
    assert (loss.shape, logits.shape) == ((), (2, 5))


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("output_hidden_states", r"as_transformers\(model\) does"),
        ("output_attentions", "attend to different numbers of patches"),
    ],
)
def test_what_a_slimmed_model_cannot_return_is_refused_with_the_reason(asked, reason):
    slimmed = slimcli.slim(SMALL["ViTForImageClassification"](), life_layer=1, drop_layers=[1])
    with pytest.raises(slimcli.SlimError, match=f"{asked}: .*{reason}"):
        slimmed(pixel_values=torch.randn(1, 3, 32, 32), **{asked: True})


def test_an_attention_without_a_place_for_the_bias_is_refused_with_what_to_call():
    model = SMALL["ViTForImageClassification"]()
    model.set_attn_implementation("eager")
    with pytest.raises(slimcli.SlimError, match=r'model.set_attn_implementation\("sdpa"\)'):
        slimcli.slim(model)


def test_a_folder_is_profiled_and_calibrated_and_loads_again(slim, tmp_path):
    model = SMALL["Dinov2ForImageClassification"]()
    model.save_pretrained(tmp_path / "dinov2")
    for number in range(40):
        split = "train" if number < 30 else "validation"
        folder = tmp_path / "photos" / split / f"class{number % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    words = ("--keep-rate", "0.5", "--batch-size", "2", "--json")
    profiled = slim("profile", "hf:dinov2", *words, "--seconds", "0")
    assert profiled.returncode == 0, profiled.stderr
    assert json.loads(profiled.stdout)["rows"][1]["schedule"][-1] < 16
    calibrate = ("calibrate", "hf:dinov2", "--data", "photos", "--images", "8", "--output", "slimmed")
    made = slim(*calibrate, *words)
    assert made.returncode == 0, made.stderr
    evaluated = slim("eval", "slimmed", "--data", "photos", "--batch-size", "2", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert len(json.loads(evaluated.stdout)["rows"]) == 2


def test_a_recipe_trains_a_model_type(slim, tmp_path):
    (tmp_path / "recipe.toml").write_text(
        """
name = "hf"
[model]
name = "hf:vit"
img_size = 32
args = { hidden_size = 32, num_hidden_layers = 3, num_attention_heads = 2, intermediate_size = 64, patch_size = 8 }
[data]
name = "digits"
batch_size = 16
train_limit = 32
val_limit = 16
[slimming]
life_layer = 1
drop_layers = [1, 2]
[[stages]]
learns = "both"
mode = "soft"
lr = 1e-3
"""
    )
    done = slim("train", "recipe.toml", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["model"] == "hf:vit"
    again = slim("eval", summary["run"], "--json")
    assert json.loads(again.stdout)["rows"][1]["top1"] == summary["rows"][1]["top1"]


@pytest.mark.parametrize(
    ("name", "part"),
    [("hf:nowhere/at-all", "expected a folder with a config.json"), ("hf:swin", "expected a folder")],
)
def test_a_name_that_is_nothing_is_one_clear_line(slim, tmp_path, name, part):
    done = slim("profile", name)
    assert done.returncode == 2
    assert part in done.stderr and "Traceback" not in done.stderr


def test_a_model_that_cannot_drop_patches_is_refused_by_name(slim, tmp_path):
    config = transformers.SwinConfig(image_size=32, embed_dim=16, depths=[1], num_heads=[2])
    transformers.SwinForImageClassification(config).save_pretrained(tmp_path / "swin")
    done = slim("profile", "hf:swin")
    assert done.returncode == 2
    assert "is a SwinForImageClassification: served are BeitBackbone, BeitForImageClassification" in done.stderr


def dinov2_from_timm(state, depth):
    """timm's DINOv2 weights under the names of transformers'."""
    model = transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(
            hidden_size=384,
            num_hidden_layers=depth,
            num_attention_heads=6,
            image_size=112,
            patch_size=14,
            num_labels=10,
        )
    ).eval()
    new = {
        "dinov2.embeddings.cls_token": state["cls_token"],
        "dinov2.embeddings.mask_token": torch.zeros(1, 384),
        "dinov2.embeddings.position_embeddings": state["pos_embed"],
        # timm reads the class token alone, transformers the mean of the patches too
        "classifier.weight": torch.cat((state["head.weight"], torch.zeros(10, 384)), dim=1),
        "classifier.bias": state["head.bias"],
    }
    for end in ("weight", "bias"):
        new[f"dinov2.embeddings.patch_embeddings.projection.{end}"] = state[f"patch_embed.proj.{end}"]
        new[f"dinov2.layernorm.{end}"] = state[f"norm.{end}"]
        for i in range(depth):
            old, ours = f"blocks.{i}", f"dinov2.encoder.layer.{i}"
            for name, part in zip("qkv", state[f"{old}.attn.qkv.{end}"].chunk(3), strict=True):
                new[f"{ours}.attention.{name}_proj.{end}"] = part
            new[f"{ours}.attention.o_proj.{end}"] = state[f"{old}.attn.proj.{end}"]
            for theirs, mine in (
                ("norm1", "norm1"),
                ("norm2", "norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                new[f"{ours}.{mine}.{end}"] = state[f"{old}.{theirs}.{end}"]
    for i in range(depth):
        for number in (1, 2):
            new[f"dinov2.encoder.layer.{i}.layer_scale{number}.lambda1"] = state[f"blocks.{i}.ls{number}.gamma"]
    model.load_state_dict(new)
    return model


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="the real weights (../shared) are not here")
def test_real_weights_give_timms_logits_dense_and_timms_classes_slimmed(slim, tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import load_file

    weights = SHARED / "weights" / "vit_small_patch14_dinov2_112_cifar10.safetensors"
    state = {name: value.float() for name, value in load_file(weights).items()}
    theirs = timm.create_model("vit_small_patch14_dinov2", img_size=112, num_classes=10).eval()
    theirs.load_state_dict(state)
    ours = dinov2_from_timm(state, 12)
    ours.save_pretrained(tmp_path / "dinov2")

    photographs = _photographs(64)
    for number, (photograph, label) in enumerate(photographs):
        folder = tmp_path / "photos" / ("train" if number % 2 else "validation") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        photograph.save(folder / f"{number}.png")
    photos = ("--data", "photos", "--batch-size", "4", "--json")
    goal = ("--keep-rate", "0.7", "--keep-schedule", "--images", "24", "--limit", "8")
    made = slim("calibrate", f"hf:{tmp_path / 'dinov2'}", *goal, "--output", "slimmed", *photos)
    assert made.returncode == 0, made.stderr
    evaluated = slim("eval", "slimmed", *photos)
    assert evaluated.returncode == 0, evaluated.stderr
    dense, slimmed = json.loads(evaluated.stdout)["rows"]
    assert dense["images"] == 32 and dense["top1"] > 85 and slimmed["top1"] > 75

    here = transformers.Dinov2ForImageClassification.from_pretrained(tmp_path / "dinov2", dtype=torch.float32)
    one, other = slimcli.slim(here.eval()), slimcli.slim(theirs)
    head = slimcli.load(tmp_path / "slimmed").life_head.state_dict()
    for model in (one, other):
        model.eval().life_head.load_state_dict(head)
    prepare = timm.data.create_transform(112, crop_pct=1.0, interpolation="bicubic")
    images = torch.stack([prepare(photograph) for photograph, _ in photographs[:16]])
    with torch.no_grad():
        torch.testing.assert_close(here(pixel_values=images).logits, theirs(images), atol=1e-4, rtol=0)
        torch.testing.assert_close(one(pixel_values=images).logits, other(images), atol=1e-3, rtol=0)
        assert torch.equal(one(pixel_values=images).logits.argmax(1), other(images).argmax(1))
        assert (one(pixel_values=images).logits - here(pixel_values=images).logits).abs().max() > 1e-2


def _photographs(count):
    """Photographs of CIFAR-10's validation set and their classes, spread over all of it."""
    from timm.data import create_dataset

    dataset = create_dataset("", root=str(SHARED / "data" / "cifar10" / "val.tar"))
    step = len(dataset) // count
    return [(image.convert("RGB"), label) for image, label in (dataset[i * step] for i in range(count))]
